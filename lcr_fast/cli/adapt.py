"""``lcr-fast adapt``: a rule by which users leave before the last step."""

import argparse
from pathlib import Path

from lcr_fast.cli.arguments import (
    Commands,
    add_command,
    add_model_arguments,
    apply_run_options,
    check_new,
    open_model,
)
from lcr_fast.config import TrainConfig


def add(commands: Commands) -> None:
    from lcr_fast.training.adaptive import SERVED, TITLES

    parser = add_command(
        commands,
        "adapt",
        run,
        "let each user take as many steps as it needs",
        "Choose, on the validation users, a rule by which a user leaves before K steps, and write "
        "the model with it: " + "; ".join(f"{name}, {TITLES[name]}" for name in SERVED) + ".",
    )
    add_model_arguments(parser)
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write, a new one")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--loss",
        type=float,
        help="most that the metric may lose to the best fixed number of "
        "steps, with as few steps as that takes; default: 0.002",
    )
    goal.add_argument(
        "--mean-steps",
        type=float,
        metavar="STEPS",
        help="most steps on average, for the best metric that they reach",
    )
    parser.add_argument("--metric", default="ndcg@5", help="hr@k, ndcg@k, mrr, or a sum of them")
    parser.add_argument(
        "--rules", nargs="+", choices=SERVED, default=list(SERVED), help="rules to choose from"
    )


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast.training.adaptive import adapt

    apply_run_options(arguments)
    check_new(arguments.out)
    TrainConfig(valid_metric=arguments.metric)
    loss = arguments.loss
    if loss is None and arguments.mean_steps is None:
        loss = 0.002
    model, data = open_model(arguments, arguments.model)
    print(adapt(
        model, data, arguments.rules, metric=arguments.metric, loss=loss,
        steps=arguments.mean_steps,
    ))  # fmt: skip
    model.save(arguments.out)
    print(f"model: {arguments.out}")
