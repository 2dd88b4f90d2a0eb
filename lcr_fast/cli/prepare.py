"""``lcr-fast prepare``: raw logs to prepared data."""

import argparse
from pathlib import Path

from lcr_fast.cli.arguments import Commands, add_command

_READING = ("keep_duplicates", "time_unit", "test_query", "targets")  # options of readers


def add(commands: Commands) -> None:
    from lcr_fast.data import SOURCES

    parser = add_command(
        commands,
        "prepare",
        run,
        "turn raw logs into prepared data",
        "Read raw logs, split them by time and write a folder of plain arrays.",
    )
    parser.add_argument("source", choices=sorted(SOURCES), help="format of the raw data")
    parser.add_argument(
        "input", metavar="IN", help="file or folder of the raw data; - for the default synthetic"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the evaluation negatives")
    parser.add_argument("--n-negatives", type=int, default=99, help="evaluation negatives a target")
    parser.add_argument(
        "--negatives", choices=("popularity", "uniform"), default="popularity", help="their law"
    )
    parser.add_argument(
        "--min-targets", type=int, default=3, help="samples that a user needs to be tested"
    )
    parser.add_argument(
        "--min-history", type=int, default=1, help="events of either stream before a target"
    )
    parser.add_argument(
        "--min-rec-history", type=int, default=0, help="recommendation events before a target"
    )
    parser.add_argument(
        "--min-search-history", type=int, default=0, help="searches before a target"
    )
    parser.add_argument(
        "--split",
        choices=("user", "time"),
        default="user",
        help="hold out each user's last targets, or what comes last of all users'",
    )
    parser.add_argument(
        "--time-shares",
        type=float,
        nargs=2,
        default=(0.1, 0.1),
        metavar=("VALID", "TEST"),
        help="shares of the samples that --split time holds out",
    )
    parser.add_argument(
        "--k-core",
        type=int,
        default=0,
        metavar="K",
        help="drop users and items with fewer than K events, again and again",
    )
    parser.add_argument(
        "--vocabulary",
        type=Path,
        metavar="DATA",
        help="prepared data whose ids keep their numbers, so that its models read OUT too",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace prepared data at OUT")
    reading = parser.add_argument_group("how to read", "Not every format has each of these.")
    reading.add_argument(
        "--keep-duplicates",
        action="store_true",
        default=None,
        help="keep rows that repeat another exactly; they are dropped otherwise",
    )
    reading.add_argument(
        "--time-unit",
        choices=("s", "ms", "us", "ns"),
        help="of frames; default: ms, of RecBole files s",
    )
    reading.add_argument(
        "--test-query",
        action="store_true",
        default=None,
        help="of jdsearch: make the product found by a user's test query a target",
    )
    reading.add_argument(
        "--targets",
        nargs="+",
        metavar="ACTION",
        help="of synerise and ubi: the actions that may be predicted; default: carts, or clicks",
    )


def run(arguments: argparse.Namespace) -> None:
    from lcr_fast import data
    from lcr_fast.data.build import prepare
    from lcr_fast.data.folder import require_free
    from lcr_fast.data.prepared import PreparedData

    if arguments.n_negatives < 1:
        raise ValueError(
            "--n-negatives must be at least 1, among none every model ranks first, got "
            f"{arguments.n_negatives}"
        )
    known = data.reader_options(arguments.source)
    given = vars(arguments)
    options = {name: given[name] for name in _READING if given[name] is not None}
    for name in options.keys() - known:
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag}: the reader of {arguments.source} has no such option")
    require_free(arguments.out, arguments.overwrite)  # before hours of reading
    vocabulary = PreparedData.open(arguments.vocabulary) if arguments.vocabulary else None
    log = data.read(arguments.source, arguments.input, **options)
    prepared = prepare(
        log,
        arguments.out,
        seed=arguments.seed,
        n_negatives=arguments.n_negatives,
        negatives=arguments.negatives,
        min_targets=arguments.min_targets,
        min_history=arguments.min_history,
        min_rec_history=arguments.min_rec_history,
        min_search_history=arguments.min_search_history,
        split=arguments.split,
        time_shares=tuple(arguments.time_shares),
        k_core=arguments.k_core,
        vocabulary=vocabulary,
        overwrite=arguments.overwrite,
    )
    print(prepared.summary())
