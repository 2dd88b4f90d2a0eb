"""``lcr-fast inspect``: facts of prepared data."""

import argparse
from pathlib import Path

from lcr_fast.cli.arguments import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "inspect",
        run,
        "say what prepared data hold, and what may mislead",
        "Print sizes, spans, histories, repeats, ties, coverage, leakage in time and what the "
        "streams share, and warn of what makes results mean little.",
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="prepared data")
    parser.add_argument("--split", choices=("valid", "test"), default="test")


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.report.facts import fact_table, facts_of

    print(fact_table(facts_of(PreparedData.open(arguments.data), arguments.split)))
