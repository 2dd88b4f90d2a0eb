"""``lcr-fast compare``: differences between runs, user by user."""

import argparse
from pathlib import Path

from lcr_fast.cli.arguments import Commands, add_any_data, add_command, add_csv, check_file


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compare",
        run,
        "compare runs user by user, with paired intervals",
        "Print the differences between the models of runs on the same prepared data: by candidate "
        "set and kind of target, the first run less the second. Several seeds: name the runs of "
        "each group in the order of their seeds, the second group behind --than. Intervals over "
        "users are paired bootstraps of each user's difference, averaged over seeds; those over "
        "seeds are Student's t of the seeds' means.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="folder of a job (its models are compared by name), of a seed of a study, or of one "
        "model in it; without --than two of them",
    )
    parser.add_argument("--than", metavar="RUN", type=Path, nargs="+", help="the second group")
    parser.add_argument("--metric", default="ndcg@5", help="hr@k, ndcg@k or mrr")
    add_any_data(parser, "compare although the runs are of other prepared data")
    add_csv(parser)


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.compare import compare_runs, comparison_tables
    from lcr_fast.experiments.tables import write_rows

    check_file("--csv", arguments.csv)
    first, second = arguments.runs, arguments.than
    if second is None:
        if len(first) != 2:
            raise ValueError(f"two runs, or two groups with --than between them; got {len(first)}")
        first, second = first[:1], first[1:]
    found = compare_runs(first, second, arguments.metric, any_data=arguments.any_data)
    names = " less ".join(" ".join(map(str, group)) for group in (first, second))
    print(comparison_tables(found, names))
    if arguments.csv:
        write_rows(
            arguments.csv,
            [{"model": name, **row} for name, rows in found.models.items() for row in rows],
        )
