"""Command line ``lcr-fast``: prepare data, train, evaluate, compare, recommend, study, and more."""

import argparse
import contextlib
import csv
import io
import itertools
import json
import logging
import os
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lcr_fast.config import LCRConfig, TrainConfig

# The default job's data is small, and so is its model.
SYNTHETIC_DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "dim": 32, "steps": 2, "max_search_len": 8, "max_rec_len": 12, "max_clicks": 2,
    },
    "train": {
        "epochs": 10, "align_pairs": 256, "rl_epochs": 2, "rl_epoch_size": 1024, "noise_scale": 0.5,
    },
}  # fmt: skip
# A study trains dozens of models, so each a little shorter.
STUDY_DEFAULTS = {
    "model": SYNTHETIC_DEFAULTS["model"],
    "train": {**SYNTHETIC_DEFAULTS["train"], "epochs": 8, "rl_epoch_size": 768},
}
_QUICK = {"epochs": 1, "rl_epochs": 1, "rl_epoch_size": 64, "rl_negatives": 19}
_QUICK_USERS = 150
_FROM_DATA = ("n_items", "n_users", "n_queries", "n_terms", "item_text_dim", "query_text_dim")
READING = ("keep_duplicates", "time_unit", "test_query", "targets")  # options of readers
_SHARED = ("train", "evaluate", "recommend")  # commands that several processes can share
_SECTIONS: dict[str, type] = {"model": LCRConfig, "train": TrainConfig}


def main(argv: list[str] | None = None) -> None:
    """Run the command line; bad input ends it with one sentence and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The ids of the data are any text, whatever the terminal's locale can spell.
        sys.stdout.reconfigure(encoding="utf-8")
    arguments = _parser().parse_args(argv)
    try:
        with _processes(arguments):
            arguments.run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter would complain once more when it flushes stdout.
        sys.stderr.close()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"lcr-fast {arguments.command}: {where}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ValueError as error:
        print(f"lcr-fast {arguments.command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        print(f"lcr-fast {arguments.command}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nstopped; --resume continues from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def _processes(arguments: argparse.Namespace) -> Iterator[None]:
    """Join the other processes where torchrun has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if arguments.command not in _SHARED:
        raise ValueError(f"runs in one process; torchrun is for {', '.join(_SHARED)}")
    from lcr_fast.training.distributed import joined

    with joined(arguments.device) as arguments.device:
        yield


class _Parser(argparse.ArgumentParser):
    """Complain in one line: the usage of ``train`` alone would fill a screen."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _version() -> str:
    from lcr_fast import __version__

    return __version__


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lcr-fast", description="Latent cross reasoning for search-aware recommendation."
    )
    parser.add_argument("--version", action="version", version=f"lcr-fast {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prepare(commands)
    _add_inspect(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_baselines(commands)
    _add_compare(commands)
    _add_report(commands)
    _add_recommend(commands)
    _add_extend(commands)
    _add_export(commands)
    _add_serve(commands)
    _add_adapt(commands)
    _add_distill(commands)
    _add_study(commands)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show a default only where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _command(commands: Any, name: str, run: Any, help: str, description: str):
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=_Help,
    )
    parser.set_defaults(run=run)
    return parser


def _add_prepare(commands: Any) -> None:
    from lcr_fast.data import SOURCES

    parser = _command(
        commands,
        "prepare",
        _prepare,
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


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        _inspect,
        "say what prepared data hold, and what may mislead",
        "Print sizes, spans, histories, repeats, ties, coverage, leakage in time and what the "
        "streams share, and warn of what makes results mean little.",
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="prepared data")
    parser.add_argument("--split", choices=("valid", "test"), default="test")


def _inspect(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.report.facts import fact_table, facts_of

    print(fact_table(facts_of(PreparedData.open(arguments.data), arguments.split)))


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--backend",
        choices=typing.get_args(typing.get_type_hints(LCRConfig)["backend"]),
        help="which implementation the ops use; default: the config's, auto",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _train,
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
    _add_protocols(parser)
    _add_job_options(parser, SYNTHETIC_DEFAULTS)


def _add_protocols(parser: argparse.ArgumentParser) -> None:
    from lcr_fast.training.evaluation import PROTOCOLS

    parser.add_argument(
        "--protocols",
        nargs="+",
        choices=PROTOCOLS,
        default=list(PROTOCOLS),
        help="what targets are ranked among, where the data has it",
    )


def _add_catalogue_users(parser: argparse.ArgumentParser) -> None:
    from lcr_fast.training.evaluation import CATALOGUE_SECONDS

    parser.add_argument(
        "--catalogue-users",
        type=int,
        metavar="N",
        help="test users ranked in the whole catalogue, the same for every model; 0 for all; "
        f"default: as many as take some {CATALOGUE_SECONDS} s a model on two cores",
    )


def _add_any_data(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--any-data", action="store_true", help=help)


def _add_job_options(parser: argparse.ArgumentParser, defaults: dict[str, dict]) -> None:
    """Add what all jobs share: their data, folder and configs."""
    parser.add_argument("--data", type=Path, help="prepared data; default: synthetic")
    parser.add_argument("--out", type=Path, help="folder to write; default: the next runs/NAME-N")
    parser.add_argument("--resume", action="store_true", help="continue the job in --out")
    _add_any_data(parser, "resume although the models in --out are of other data")
    _add_catalogue_users(parser)
    parser.add_argument(
        "--config", type=Path, help='JSON file {"model": {...}, "train": {...}}; flags override it'
    )
    _add_run_options(parser)
    for section, kind in _SECTIONS.items():
        own = ", ".join(f"{k} {v}" for k, v in defaults[section].items())
        group = parser.add_argument_group(
            f"{section} config", f"Without --data the defaults differ: {own}."
        )
        for name, options in _flags(kind).items():
            group.add_argument("--" + name.replace("_", "-"), **options)


def _add_study(commands: Any) -> None:
    from lcr_fast.experiments import study
    from lcr_fast.experiments.grid import MAPS

    parser = commands.add_parser(
        "study", help="train many models over seeds: what phase 2 does, the paper's figures"
    )
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    rl = _command(
        studies,
        "rl",
        _study_rl,
        "rewards and settings of phase 2, beside its control",
        "Train phase 1 once a seed, then phase 2 with each reward and along each axis, every model "
        "beside its control (the same noisy trajectories under the ranking loss L_rank alone). All "
        "seeds share the data. The default takes about 25 minutes on two cores.",
    )
    rl.add_argument(
        "--rewards",
        nargs="*",
        default=list(study.REWARDS),
        help="rewards to compare: hr@k, ndcg@k, mrr, sums such as 0.5*hr@1+0.5*ndcg@10",
    )
    rl.add_argument(
        "--axes",
        nargs="*",
        default=list(study.AXES),
        metavar="NAME[=V,V,...]",
        help="fields of phase 2 to vary one at a time, with the values to try",
    )
    paper = _command(
        studies,
        "paper",
        _study_paper,
        "the paper's ablation and figures",
        "Train Base, LCR, LCR+TCL, LCR+TCL+RL and its control over seeds, and the last three for "
        "each number of reasoning steps; measure distances to the target and latency. All seeds "
        "share the data. The default takes about 30 minutes on two cores.",
    )
    paper.add_argument(
        "--all-steps",
        type=int,
        nargs="+",
        default=list(study.STEPS),
        metavar="K",
        help="numbers of reasoning steps to compare",
    )
    grid = _command(
        studies,
        "grid",
        _study_grid,
        "stability maps of TCL and of phase 2",
        "Train the model for every pair of two settings: TCL's margin and weight, with both "
        "distances, and phase 2's KL weight and noise. Marks what is level with the best. All "
        "seeds share the data. The default takes about 25 minutes on one core.",
    )
    grid.add_argument(
        "--maps", nargs="+", choices=tuple(MAPS), default=list(MAPS), help="which maps to make"
    )
    latency = _command(
        studies,
        "latency",
        _study_latency,
        "accuracy against steps and time",
        "Train Base, LCR for K = 1 to --steps, LCR with every step supervised, and a student of "
        "K = 0; set their NDCG against the time of a forward, and rules for leaving early against "
        "the best fixed number of steps, as many steps at random, and an oracle.",
    )
    strata = _command(
        studies,
        "strata",
        _study_strata,
        "who gains from the steps",
        "Train what study latency trains, or with --resume read it back, and show the differences "
        "to Base by likeness of the histories, searches, noise and kind of target.",
    )
    strata.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="train nothing: strata of finished runs of lcr-fast train, of --data or their own",
    )
    strata.add_argument(
        "--noise",
        type=float,
        nargs="*",
        default=[],
        metavar="CHANCE",
        help="also train Base and LCR on synthetic worlds with these chances of a noise search",
    )
    strata.add_argument(
        "--disjoint",
        action="store_true",
        help="also on a synthetic world whose searches have nothing to do with the events",
    )
    for each in (rl, paper, grid, latency, strata):
        each.add_argument("--seeds", type=int, help="number of seeds, from --seed on; default: 3")
        each.add_argument(
            "--quick",
            action="store_true",
            help="one seed, one short epoch, few users if synthetic: to see that it runs",
        )
        _add_job_options(each, STUDY_DEFAULTS)


def _flags(kind: type) -> dict[str, dict[str, Any]]:
    """Build argparse options for the fields of a config class; absent flags stay None."""
    hints = typing.get_type_hints(kind)
    flags = {}
    for f in fields(kind):
        if f.name in _FROM_DATA or f.name == "backend":
            continue
        hint = hints[f.name]
        default = "" if f.default is MISSING else f" (default: {f.default})"
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "dest": f.name,
            "help": f.metadata["help"].replace("%", "%%") + default,
        }
        if typing.get_origin(hint) is typing.Literal:
            options["choices"] = typing.get_args(hint)
        elif typing.get_origin(hint) is tuple:
            options |= {"type": int, "nargs": "+", "metavar": "N"}
        elif hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": hint, "metavar": hint.__name__.upper()}
        flags[f.name] = options
    return flags


def _add_evaluate(commands: Any) -> None:
    from lcr_fast.training.ranks import CUTS

    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "evaluate a saved model",
        "Print ranking metrics with 95 % bootstrap intervals, by candidate set and kind of target.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    _add_protocols(parser)
    _add_catalogue_users(parser)
    parser.add_argument(
        "-k", type=int, nargs="+", default=list(CUTS), metavar="K", help="cuts of HR@k and NDCG@k"
    )
    parser.add_argument("--csv", type=Path, help="also write every number to this file")


def _add_baselines(commands: Any) -> None:
    parser = _command(
        commands,
        "baselines",
        _baselines,
        "evaluate the baselines that count",
        "Print what popularity, recency, and counts of items after the last query or item reach on "
        "the test users, by candidate set and kind of target. Nothing is trained.",
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    _add_protocols(parser)
    _add_catalogue_users(parser)
    parser.add_argument("--csv", type=Path, help="also write every number to this file")


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        _compare,
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
    _add_any_data(parser, "compare although the runs are of other prepared data")
    parser.add_argument("--csv", type=Path, help="also write every number to this file")


def _add_report(commands: Any) -> None:
    parser = _command(
        commands,
        "report",
        _report,
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
    _add_any_data(parser, "use the data although the run is of other data")


def _report(arguments: argparse.Namespace) -> None:
    from lcr_fast.report.make import report

    out = arguments.out or arguments.run_folder / "report.html"
    if out.is_dir():
        raise ValueError(f"--out {out}: a folder; name a file in it")
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


def _add_recommend(commands: Any) -> None:
    parser = _command(
        commands,
        "recommend",
        _recommend,
        "recommend items to users",
        "Write CSV lines (user, rank, item, score), with the ids of the raw data, to stdout.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--users", nargs="+", help="ids of the raw data; default: all users")
    parser.add_argument("-k", type=int, default=10, help="items a user")
    parser.add_argument(
        "--budget-ms",
        type=float,
        help="one user at a time, with as many steps as take at most this (p99, measured first)",
    )


def _add_extend(commands: Any) -> None:
    parser = _command(
        commands,
        "extend",
        _extend,
        "append new items, users, queries and terms to a model",
        "Write a model with rows for the ids that the data, prepared with --vocabulary, has beyond "
        "the model's. New rows are the mean of their table; everything else keeps its bits.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="prepared data with more ids")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write, a new one")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        "write a model as a program for another engine",
        "Write what scores candidates, or with -k finds the best items of the catalogue, for any "
        "number of users: pt2 for torch.export.load, aoti compiled for processes without Python, "
        "onnx for other engines.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model.safetensors")
    parser.add_argument("--format", choices=("pt2", "aoti", "onnx"), default="pt2")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write")
    parser.add_argument("-k", type=int, help="find K items a user; default: score candidates")
    parser.add_argument("--data", type=Path, help="prepared data, of a model with text vectors")
    _add_any_data(parser, "use the model although it was trained on other data")
    _add_run_options(parser)


def _add_serve(commands: Any) -> None:
    parser = _command(
        commands,
        "serve",
        _serve,
        "answer requests over HTTP",
        "Answer POST /score and /recommend (JSON, ids of the raw data), GET /health and /metrics "
        "until SIGTERM or Ctrl-C. Anyone who reaches the port may ask.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument(
        "--max-batch", type=int, default=64, help="requests that are computed together"
    )
    parser.add_argument(
        "--wait-ms", type=float, default=0.0, help="time that a first request waits for others"
    )


def _add_adapt(commands: Any) -> None:
    from lcr_fast.training.adaptive import SERVED, TITLES

    parser = _command(
        commands,
        "adapt",
        _adapt,
        "let each user take as many steps as it needs",
        "Choose, on the validation users, a rule by which a user leaves before K steps, and write "
        "the model with it: " + "; ".join(f"{name}, {TITLES[name]}" for name in SERVED) + ".",
    )
    _add_model_arguments(parser)
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


def _add_distill(commands: Any) -> None:
    parser = _command(
        commands,
        "distill",
        _distill,
        "teach a model of fewer steps what a trained one ranks",
        "Train a student of 0 or 1 steps on the lists and pooled states of a teacher, from the "
        "teacher's weights, and compare the two on the test users.",
    )
    parser.add_argument("teacher", metavar="TEACHER", type=Path, help="a model.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    parser.add_argument("--steps", type=int, default=0, help="reasoning steps of the student")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--resume", action="store_true", help="continue in --out")
    _add_any_data(parser, "use the teacher although it was trained on other data")
    _add_run_options(parser)
    group = parser.add_argument_group("train config")
    for name, options in _flags(TrainConfig).items():
        group.add_argument("--" + name.replace("_", "-"), **options)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    _add_any_data(parser, "use the model although it was trained on other data")
    _add_run_options(parser)


def _check_csv(arguments: argparse.Namespace) -> None:
    """Raise ValueError where --csv cannot be written, before what it would hold is computed."""
    if arguments.csv and arguments.csv.is_dir():
        raise ValueError(f"--csv {arguments.csv}: a folder; name a file in it")


def _set_threads(arguments: argparse.Namespace) -> None:
    import torch

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {arguments.device!r}")
    if device.type == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not n:
            raise ValueError(f"--device {arguments.device}: this torch sees no GPU")
        if (device.index or 0) >= n:
            raise ValueError(
                f"--device {arguments.device}: this torch sees {n} GPUs, from cuda:0 on"
            )


def _prepare(arguments: argparse.Namespace) -> None:
    from lcr_fast import data
    from lcr_fast.data.build import prepare
    from lcr_fast.data.prepared import PreparedData

    if arguments.n_negatives < 1:
        raise ValueError(
            "--n-negatives must be at least 1, among none every model ranks first, got "
            f"{arguments.n_negatives}"
        )
    known = data.reader_options(arguments.source)
    given = vars(arguments)
    options = {name: given[name] for name in READING if given[name] is not None}
    for name in options.keys() - known:
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag}: the reader of {arguments.source} has no such option")
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


def _configs(arguments: argparse.Namespace, defaults: dict[str, dict]) -> dict[str, Any]:
    """Merge defaults, --config and flags into the two configs."""
    values = {section: dict(defaults.get(section, {})) for section in _SECTIONS}
    if arguments.config:
        try:
            given = json.loads(arguments.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{arguments.config}: not valid JSON: {error}") from None
        if not isinstance(given, dict) or given.keys() - _SECTIONS.keys():
            raise ValueError(
                f'{arguments.config} must be a JSON object of "model" and "train", '
                f"got {', '.join(given) if isinstance(given, dict) else type(given).__name__}"
            )
        for section, options in given.items():
            if not isinstance(options, dict):
                raise ValueError(f"{arguments.config}: {section} must be a JSON object")
        for section, options in given.items():
            values[section] |= options
    flags = vars(arguments)
    for section, kind in _SECTIONS.items():
        given = {f.name: flags[f.name] for f in fields(kind) if f.name in flags}
        # Absent flags are not there at all, apart from --backend.
        values[section] |= {name: value for name, value in given.items() if value is not None}
    return {
        "model": LCRConfig.from_dict(values["model"]),
        "train": TrainConfig.from_dict(values["train"]),
    }


def _train(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.comparison import run_comparison, with_requirements

    with_requirements(arguments.variants)
    with _open_job(arguments, {} if arguments.data else SYNTHETIC_DEFAULTS) as job:
        _print_results(job, run_comparison(job, arguments.variants))


def _study_rl(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.study import parse_axis, run_rl_study

    n_seeds = _n_seeds(arguments)
    for reward in arguments.rewards:
        TrainConfig(reward=reward)
    axes = [parse_axis(axis) for axis in arguments.axes]
    if not (axes or arguments.rewards):
        raise ValueError("nothing to study: name a reward or an axis")
    with _open_job(arguments, _study_defaults(arguments), "study-rl-") as job:
        _print_results(job, run_rl_study(job, n_seeds, arguments.rewards, axes))


def _study_paper(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.study import run_paper_study

    n_seeds = _n_seeds(arguments)
    for steps in arguments.all_steps:
        LCRConfig(steps=steps)
    with _open_job(arguments, _study_defaults(arguments), "study-paper-") as job:
        _print_results(job, run_paper_study(job, n_seeds, arguments.all_steps))


def _study_grid(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.grid import run_grid_study

    n_seeds = _n_seeds(arguments)
    with _open_job(arguments, _study_defaults(arguments), "study-grid-") as job:
        _print_results(job, run_grid_study(job, n_seeds, arguments.maps))


def _study_latency(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.depth import run_latency_study

    n_seeds = _n_seeds(arguments)
    with _open_job(arguments, _study_defaults(arguments), "study-depth-") as job:
        _print_results(job, run_latency_study(job, n_seeds))


def _study_strata(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.data.synthetic import World
    from lcr_fast.experiments.depth import run_strata_of_runs, run_strata_study

    if arguments.runs:
        _set_threads(arguments)
        data = PreparedData.open(arguments.data) if arguments.data else None
        with _out_folder(arguments, "study-strata") as out:
            table = run_strata_of_runs(arguments.runs, out, data, any_data=arguments.any_data)
            print(f"{table}\n\ntables and plots: {out}")
        return
    n_seeds = _n_seeds(arguments)
    worlds = [World(noise=chance) for chance in arguments.noise]
    if arguments.disjoint:
        worlds.append(World(disjoint=True))
    with _open_job(arguments, _study_defaults(arguments), "study-depth-") as job:
        _print_results(job, run_strata_study(job, n_seeds, worlds))


def _n_seeds(arguments: argparse.Namespace) -> int:
    n = arguments.seeds if arguments.seeds is not None else 1 if arguments.quick else 3
    if n < 1:
        raise ValueError(f"--seeds must be at least 1, got {n}")
    return n


def _study_defaults(arguments: argparse.Namespace) -> dict[str, dict]:
    defaults = {"model": {}, "train": {}} if arguments.data else STUDY_DEFAULTS
    quick = _QUICK if arguments.quick else {}
    return {"model": defaults["model"], "train": {**defaults["train"], **quick}}


@contextlib.contextmanager
def _open_job(
    arguments: argparse.Namespace, defaults: dict[str, dict], prefix: str = ""
) -> Iterator[Any]:
    """Read the configs, open or make the data, claim the folder; yield a Job."""
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.experiments.comparison import Job
    from lcr_fast.model import LCRSER
    from lcr_fast.storage import claimed
    from lcr_fast.training import distributed
    from lcr_fast.training.evaluation import PROTOCOLS
    from lcr_fast.training.models import fit_config

    _set_threads(arguments)
    configs = _configs(arguments, defaults)
    # Fails where the backend cannot serve it, before a file is written.
    LCRSER(configs["model"]).backend_report(arguments.device)
    data = PreparedData.open(arguments.data) if arguments.data else None
    name = arguments.data.resolve().name if arguments.data else "synthetic"
    small = {"n_users": _QUICK_USERS} if vars(arguments).get("quick") else {}
    with contextlib.ExitStack() as held:

        def claim() -> Path:
            out = held.enter_context(_out_folder(arguments, prefix + name))
            held.enter_context(claimed(out))
            if data is None and not (arguments.resume and (out / "data").is_dir()):
                _make_synthetic(out / "data", configs["train"].seed, **small)
            return out

        out = distributed.current().by_first(claim)
        if data is None:
            data = PreparedData.open(out / "data")
        print(data.summary())
        print(f"writing to {out}")
        yield Job(
            data,
            fit_config(data, configs["model"]),
            configs["train"],
            out,
            device=arguments.device,
            resume=arguments.resume,
            any_data=arguments.any_data,
            protocols=vars(arguments).get("protocols", PROTOCOLS),
            catalogue_users=arguments.catalogue_users,
            report=lambda line: print(line, flush=True),
        )


def _print_results(job: Any, tables: str) -> None:
    print(f"\n{tables}\n\ntables, plots and models: {job.out}")


def _make_synthetic(folder: Path, seed: int, **world: Any) -> None:
    from lcr_fast.data import synthetic
    from lcr_fast.data.build import prepare

    prepare(synthetic.generate(synthetic.World(seed=seed, **world)), folder, seed=seed)


@contextlib.contextmanager
def _out_folder(arguments: argparse.Namespace, name: str) -> Iterator[Path]:
    """Choose and make the folder of a job; one that is still empty at an error goes again."""
    out = arguments.out
    if out is None:
        if arguments.resume:
            raise ValueError("--resume needs --out, the folder of the job to continue")
        out = _next_folder(Path("runs"), name)
    elif not arguments.resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: continue with --resume, or name another")
    existed = arguments.out is not None and out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield out
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # it holds something
                out.rmdir()


def _next_folder(parent: Path, name: str) -> Path:
    """Make the first folder ``name-1``, ``name-2``, ... that nobody has made."""
    parent.mkdir(exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = parent / f"{name}-{number}"
            folder.mkdir()
            return folder
    raise AssertionError("unreachable")


def _evaluate(arguments: argparse.Namespace) -> None:
    from tabulate import tabulate

    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.experiments.tables import protocol_titles, write_rows
    from lcr_fast.training.adaptive import StepCount
    from lcr_fast.training.evaluation import rank_model
    from lcr_fast.training.identity import describe_unknown
    from lcr_fast.training.models import load_model

    _set_threads(arguments)
    _check_csv(arguments)
    if min(arguments.k) < 1:
        raise ValueError(f"-k must be at least 1, got {min(arguments.k)}")
    data = PreparedData.open(arguments.data)
    model = load_model(
        arguments.model, data, arguments.device, arguments.backend, any_data=arguments.any_data
    )
    print(model.backend_report())
    if unknown := describe_unknown(model.config, data):
        print(unknown)
    steps = model.on_steps = StepCount(model.config.steps)
    ranks = rank_model(
        model, data, arguments.split, backend=model.config.backend, **_ranking(arguments)
    )
    if taken := steps.describe():
        print(taken)
    rows = ranks.rows(sorted(set(arguments.k)))
    titles = protocol_titles(ranks.n_negatives)
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        mine = [row for row in rows if row["protocol"] == protocol and row["n"]]
        groups = dict.fromkeys(row["targets"] for row in mine)
        table = {
            metric: [
                f"{row['mean']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
                for row in mine
                if row["metric"] == metric
            ]
            for metric in dict.fromkeys(row["metric"] for row in mine)
        }
        counts = [next(r["n"] for r in mine if r["targets"] == g) for g in groups]
        headers = [
            titles[protocol],
            *(f"{g} (n={n:,})" for g, n in zip(groups, counts, strict=True)),
        ]
        lines = [[metric, *cells] for metric, cells in table.items()]
        print("\n" + tabulate(lines, headers, tablefmt="github", disable_numparse=True))
    if arguments.csv:
        write_rows(arguments.csv, rows)


def _baselines(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.experiments.comparison import baseline_results
    from lcr_fast.experiments.tables import result_tables, write_results

    _check_csv(arguments)
    results = baseline_results(PreparedData.open(arguments.data), **_ranking(arguments))
    print("\n\n".join(result_tables(results, {})))
    if arguments.csv:
        write_results(arguments.csv, results)


def _ranking(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"protocols": arguments.protocols, "catalogue_users": arguments.catalogue_users}


def _compare(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.compare import compare_runs, comparison_tables
    from lcr_fast.experiments.tables import write_rows

    _check_csv(arguments)
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


def _recommend(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.serving.budget import with_budget
    from lcr_fast.serving.offline import recommend
    from lcr_fast.training.adaptive import StepCount
    from lcr_fast.training.identity import describe_unknown
    from lcr_fast.training.models import load_model

    _set_threads(arguments)
    data = PreparedData.open(arguments.data)
    model = load_model(
        arguments.model, data, arguments.device, arguments.backend, any_data=arguments.any_data
    )
    batch_size = 256
    if arguments.budget_ms is not None:
        choice = with_budget(model, arguments.budget_ms, k=arguments.k)
        print(choice.describe(), file=sys.stderr)
        model, batch_size = choice.model, 1
    steps = model.on_steps = StepCount(model.config.steps)
    lines = recommend(model, data, arguments.users, arguments.k, batch_size)
    if unknown := describe_unknown(model.config, data):
        print(unknown, file=sys.stderr)
    writer = csv.writer(sys.stdout)
    writer.writerow(("user", "rank", "item", "score"))
    for user, rank, item, score in lines:
        writer.writerow((user, rank, item, f"{score:.6g}"))
    if taken := steps.describe():
        print(taken, file=sys.stderr)


def _adapt(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.training.adaptive import adapt
    from lcr_fast.training.models import load_model

    _set_threads(arguments)
    if arguments.out.exists():
        raise ValueError(f"{arguments.out} exists already: name another file")
    TrainConfig(valid_metric=arguments.metric)
    loss = arguments.loss
    if loss is None and arguments.mean_steps is None:
        loss = 0.002
    data = PreparedData.open(arguments.data)
    model = load_model(
        arguments.model, data, arguments.device, arguments.backend, any_data=arguments.any_data
    )
    print(adapt(
        model, data, arguments.rules, metric=arguments.metric, loss=loss,
        steps=arguments.mean_steps,
    ))  # fmt: skip
    model.save(arguments.out)
    print(f"model: {arguments.out}")


def _distill(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.experiments.distill import distill, distillation_table
    from lcr_fast.storage import claimed
    from lcr_fast.training.models import load_model

    _set_threads(arguments)
    flags = vars(arguments)
    train = TrainConfig(**{f.name: flags[f.name] for f in fields(TrainConfig) if f.name in flags})
    out = arguments.out
    if not arguments.resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: continue with --resume, or name another")
    data = PreparedData.open(arguments.data)
    teacher = load_model(
        arguments.teacher, data, arguments.device, arguments.backend, any_data=arguments.any_data
    )
    with claimed(out):
        student = distill(
            teacher, data, train, arguments.steps, out, resume=arguments.resume,
            any_data=arguments.any_data, report=lambda line: print(line, flush=True),
        )  # fmt: skip
        print(f"\n{distillation_table(teacher, student, data)}\n\nmodel: {out}")


def _extend(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.training.identity import extend
    from lcr_fast.training.models import load_model

    if arguments.out.exists():
        raise ValueError(f"{arguments.out} exists already: name another file")
    data = PreparedData.open(arguments.data)
    model = load_model(arguments.model, data, "cpu")
    extended = extend(model, data)
    extended.save(arguments.out)
    for name in ("items", "users", "queries", "terms"):
        old, new = (getattr(m.config, f"n_{name}") for m in (model, extended))
        print(f"{name}: {old:,} + {new - old:,}")
    print(f"model: {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from lcr_fast import export
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.model import LCRSER
    from lcr_fast.training.models import load_model

    _set_threads(arguments)
    options: dict[str, Any] = {"device": arguments.device, "backend": arguments.backend}
    if arguments.data:
        data = PreparedData.open(arguments.data)
        model = load_model(arguments.model, data, any_data=arguments.any_data, **options)
    else:
        model = LCRSER.load(arguments.model, **options)
    export.save(model, arguments.out, arguments.format, k=arguments.k)
    print(f"{arguments.format}: {arguments.out}")


def _say(line: str) -> None:
    print(line, flush=True)


def _serve(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.serving.app import create_app, make_server
    from lcr_fast.serving.engine import Engine
    from lcr_fast.training.identity import describe_unknown
    from lcr_fast.training.models import load_model

    _set_threads(arguments)
    data = PreparedData.open(arguments.data)
    model = load_model(
        arguments.model, data, arguments.device, arguments.backend, any_data=arguments.any_data
    )
    if unknown := describe_unknown(model.config, data):
        print(unknown, file=sys.stderr)
    app = create_app(
        Engine(model, data), max_batch=arguments.max_batch, max_wait=arguments.wait_ms / 1e3
    )
    make_server(app, host=arguments.host, port=arguments.port, say=_say).run()


if __name__ == "__main__":
    main()
