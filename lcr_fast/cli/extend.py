"""``lcr-fast extend``: rows for new ids."""

import argparse
from pathlib import Path

from lcr_fast.cli.arguments import Commands, add_command, check_new


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "extend",
        run,
        "append new items, users, queries and terms to a model",
        "Write a model with rows for the ids that the data, prepared with --vocabulary, has beyond "
        "the model's. New rows are the mean of their table; everything else keeps its bits.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="prepared data with more ids")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write, a new one")


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.training.identity import extend
    from lcr_fast.training.models import load_model

    check_new(arguments.out)
    data = PreparedData.open(arguments.data)
    model = load_model(arguments.model, data, "cpu")
    extended = extend(model, data)
    extended.save(arguments.out)
    for name in ("items", "users", "queries", "terms"):
        old, new = (getattr(m.config, f"n_{name}") for m in (model, extended))
        print(f"{name}: {old:,} + {new - old:,}")
    print(f"model: {arguments.out}")
