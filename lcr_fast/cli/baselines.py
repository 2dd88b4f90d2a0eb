"""``lcr-fast baselines``: what counting reaches."""

import argparse
from pathlib import Path

from lcr_fast.cli.arguments import (
    Commands,
    add_catalogue_users,
    add_command,
    add_csv,
    add_protocols,
    check_file,
    ranking_options,
)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "baselines",
        run,
        "evaluate the baselines that count",
        "Print what popularity, recency, and counts of items after the last query or item reach on "
        "the test users, by candidate set and kind of target. Nothing is trained.",
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    add_protocols(parser)
    add_catalogue_users(parser)
    add_csv(parser)


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.experiments.comparison import baseline_results
    from lcr_fast.experiments.tables import result_tables, write_results

    check_file("--csv", arguments.csv)
    results = baseline_results(PreparedData.open(arguments.data), **ranking_options(arguments))
    print("\n\n".join(result_tables(results, {})))
    if arguments.csv:
        write_results(arguments.csv, results)
