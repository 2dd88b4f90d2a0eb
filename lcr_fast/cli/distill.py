"""``lcr-fast distill``: a student of few steps."""

import argparse
from pathlib import Path

from lcr_fast.cli.arguments import (
    Commands,
    add_any_data,
    add_command,
    add_config_options,
    add_run_options,
    apply_run_options,
    check_unoccupied,
    given_fields,
    open_model,
    say,
)
from lcr_fast.config import TrainConfig


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "distill",
        run,
        "teach a model of fewer steps what a trained one ranks",
        "Train a student of 0 or 1 steps on the lists and pooled states of a teacher, from the "
        "teacher's weights, and compare the two on the test users.",
    )
    parser.add_argument("teacher", metavar="TEACHER", type=Path, help="a model.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    parser.add_argument("--steps", type=int, default=0, help="reasoning steps of the student")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--resume", action="store_true", help="continue in --out")
    add_any_data(parser, "use the teacher although it was trained on other data")
    add_run_options(parser)
    add_config_options(parser.add_argument_group("train config"), TrainConfig)


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.distill import distill, distillation_table
    from lcr_fast.storage import claimed

    apply_run_options(arguments)
    given = given_fields(arguments, TrainConfig)
    train = TrainConfig(**given)
    out = arguments.out
    check_unoccupied(out, resume=arguments.resume)
    teacher, data = open_model(arguments, arguments.teacher)
    with claimed(out):
        student = distill(
            teacher, data, train, arguments.steps, out, resume=arguments.resume,
            any_data=arguments.any_data, report=say, given=given,
        )  # fmt: skip
        print(f"\n{distillation_table(teacher, student, data)}\n\nmodel: {out}")
