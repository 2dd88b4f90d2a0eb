"""``lcr-fast report``: a page that shows a run."""

import argparse
from pathlib import Path

from lcr_fast.cli.arguments import Commands, add_any_data, add_command, check_file


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        run,
        "write a page that shows a run",
        "Write one HTML file that needs no network: results with intervals, differences, learning "
        "curves, what the states do, a few users with their histories, and the data.",
    )
    parser.add_argument(
        "run_folder",
        metavar="RUN",
        type=Path,
        help="folder of a job, of a seed of a study, or of a study (its first seed)",
    )
    parser.add_argument("--data", type=Path, help="prepared data; default: those in RUN")
    parser.add_argument("-o", "--out", type=Path, help="file to write; default: RUN/report.html")
    parser.add_argument("--users", type=int, default=6, metavar="N", help="users to look at")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="whose users; default: of those that reason the one that validation ranks first",
    )
    add_any_data(parser, "use the data although the run is of other data")


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast.report.make import report

    out = arguments.out or arguments.run_folder / "report.html"
    check_file("--out", out)
    lacking = report(
        arguments.run_folder,
        out,
        data=arguments.data,
        model=arguments.model,
        n_users=arguments.users,
        any_data=arguments.any_data,
    )
    for line in lacking:
        print(line)
    print(f"page: {out}")
