"""``lcr-fast recommend``: the best items of the catalogue for users, as CSV."""

import argparse
import csv
import itertools
import sys

from lcr_fast.cli.arguments import (
    Commands,
    add_capture,
    add_command,
    add_model_arguments,
    apply_run_options,
    captured,
    open_model,
)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "recommend",
        run,
        "recommend items to users",
        "Write CSV lines (user, rank, item, score), with the ids of the raw data, to stdout.",
    )
    add_model_arguments(parser)
    parser.add_argument("--users", nargs="+", help="ids of the raw data; default: all users")
    parser.add_argument("-k", type=int, default=10, help="items a user")
    parser.add_argument(
        "--budget-ms",
        type=float,
        help="one user at a time, with as many steps as take at most this (p99, measured first)",
    )
    add_capture(parser)


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast.serving.budget import with_budget
    from lcr_fast.serving.offline import recommend
    from lcr_fast.training.adaptive import StepCount
    from lcr_fast.training.identity import describe_unknown

    apply_run_options(arguments)
    model, data = open_model(arguments, arguments.model)
    model = model.projected()
    batch_size = 256
    if arguments.budget_ms is not None:
        k = min(arguments.k, model.config.n_items)  # as many as are found
        choice = with_budget(model, arguments.budget_ms, k=k)
        print(choice.describe(), file=sys.stderr)
        model, batch_size = choice.model, 1
    recommender = captured(arguments, model, batch_size)
    steps = model.on_steps = StepCount(model.config.steps)
    lines = recommend(model, data, arguments.users, arguments.k, batch_size, recommender)
    if unknown := describe_unknown(model.config, data):
        print(unknown, file=sys.stderr)
    first = list(itertools.islice(lines, 1))  # what fails does so before a line is written
    writer = csv.writer(sys.stdout)
    writer.writerow(("user", "rank", "item", "score"))
    for user, rank, item, score in itertools.chain(first, lines):
        writer.writerow((user, rank, item, f"{score:.6g}"))
    if taken := steps.describe():
        print(taken, file=sys.stderr)
