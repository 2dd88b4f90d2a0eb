"""``lcr-fast export``: a model as a program for another engine."""

import argparse
from pathlib import Path
from typing import Any

from lcr_fast.cli.arguments import (
    Commands,
    add_any_data,
    add_command,
    add_dtype,
    add_run_options,
    apply_run_options,
    check_file,
)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        run,
        "write a model as a program for another engine",
        "Write what scores candidates, or with -k finds the best items of the catalogue, for any "
        "number of users: pt2 for torch.export.load, aoti compiled for processes without Python, "
        "onnx for other engines.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model.safetensors")
    parser.add_argument("--format", choices=("pt2", "aoti", "onnx"), default="pt2")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write")
    parser.add_argument("-k", type=int, help="find K items a user; default: score candidates")
    add_dtype(parser)
    parser.add_argument("--data", type=Path, help="prepared data, of a model with text vectors")
    add_any_data(parser, "use the model although it was trained on other data")
    add_run_options(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from lcr_fast import export
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.model import LCRSER
    from lcr_fast.training.models import load_model

    apply_run_options(arguments)
    check_file("--out", arguments.out, arguments.model)
    options: dict[str, Any] = {"device": arguments.device, "backend": arguments.backend}
    if arguments.data:
        data = PreparedData.open(arguments.data)
        model = load_model(arguments.model, data, any_data=arguments.any_data, **options)
    else:
        model = LCRSER.load(arguments.model, **options)
    dtype = getattr(torch, arguments.dtype)
    export.save(model, arguments.out, arguments.format, k=arguments.k, dtype=dtype)
    print(f"{arguments.format}: {arguments.out}")
