"""``lcr-fast train``: the models of the paper's ablation, side by side."""

import argparse

from lcr_fast.cli.arguments import (
    Commands,
    add_catalogue_users,
    add_command,
    add_protocols,
)
from lcr_fast.cli.jobs import SYNTHETIC_DEFAULTS, add_job_options, open_job, print_results


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        run,
        "train and compare Base, LCR, LCR+TCL and LCR+TCL+RL",
        "Train the models of the paper's ablation on prepared data (without --data: on synthetic "
        "data made for it), evaluate them side by side, print a table and write plots.",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["base", "lcr", "nosearch", "tcl", "rl"],
        help="what to train, among base, lcr, nosearch (LCR without searches), tcl, rl, control; "
        "rl brings tcl and control along",
    )
    add_protocols(parser)
    add_catalogue_users(parser)
    add_job_options(parser, SYNTHETIC_DEFAULTS)


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.comparison import run_comparison, with_requirements

    with_requirements(arguments.variants)
    with open_job(arguments, {} if arguments.data else SYNTHETIC_DEFAULTS) as job:
        print_results(job, run_comparison(job, arguments.variants))
