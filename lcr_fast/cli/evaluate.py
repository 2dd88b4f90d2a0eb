"""``lcr-fast evaluate``: metrics of a saved model."""

import argparse

from lcr_fast.cli.arguments import (
    Commands,
    add_catalogue_users,
    add_command,
    add_csv,
    add_model_arguments,
    add_protocols,
    apply_run_options,
    check_file,
    open_model,
    ranking_options,
)


def add(commands: Commands) -> None:
    from lcr_fast.training.ranks import CUTS

    parser = add_command(
        commands,
        "evaluate",
        run,
        "evaluate a saved model",
        "Print ranking metrics with 95 % bootstrap intervals, by candidate set and kind of target.",
    )
    add_model_arguments(parser)
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    add_protocols(parser)
    add_catalogue_users(parser)
    parser.add_argument(
        "-k", type=int, nargs="+", default=list(CUTS), metavar="K", help="cuts of HR@k and NDCG@k"
    )
    add_csv(parser)


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.tables import rank_tables, write_rows
    from lcr_fast.training.adaptive import StepCount
    from lcr_fast.training.evaluation import check_protocols, rank_model
    from lcr_fast.training.identity import describe_unknown

    apply_run_options(arguments)
    check_file("--csv", arguments.csv, arguments.model)
    if min(arguments.k) < 1:
        raise ValueError(f"-k must be at least 1, got {min(arguments.k)}")
    model, data = open_model(arguments, arguments.model)
    check_protocols(data, arguments.split, arguments.protocols)
    print(model.backend_report())
    if unknown := describe_unknown(model.config, data):
        print(unknown)
    steps = model.on_steps = StepCount(model.config.steps)
    ranks = rank_model(
        model, data, arguments.split, backend=model.config.backend, **ranking_options(arguments)
    )
    if taken := steps.describe():
        print(taken)
    rows = ranks.rows(sorted(set(arguments.k)))
    for table in rank_tables(rows, ranks.n_negatives):
        print("\n" + table)
    if arguments.csv:
        write_rows(arguments.csv, rows)
