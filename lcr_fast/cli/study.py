"""``lcr-fast study``: many models over seeds, a study a question."""

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from lcr_fast.cli.arguments import (
    Commands,
    add_catalogue_users,
    add_command,
    apply_run_options,
    given_fields,
)
from lcr_fast.cli.jobs import (
    SYNTHETIC_DEFAULTS,
    add_job_options,
    open_job,
    out_folder,
    print_results,
)
from lcr_fast.config import LCRConfig, TrainConfig

if TYPE_CHECKING:
    from lcr_fast.experiments.comparison import Job

# A study trains dozens of models, so each a little shorter.
STUDY_DEFAULTS = {
    "model": SYNTHETIC_DEFAULTS["model"],
    "train": {**SYNTHETIC_DEFAULTS["train"], "epochs": 8, "rl_epoch_size": 768},
}
_QUICK = {"epochs": 1, "rl_epochs": 1, "rl_epoch_size": 64, "rl_negatives": 19}
QUICK_USERS = 150


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "study", help="train many models over seeds: what phase 2 does, the paper's figures"
    )
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    for add_study in (_add_rl, _add_paper, _add_grid, _add_latency, _add_strata):
        each = add_study(studies)
        each.add_argument("--seeds", type=int, help="number of seeds, from --seed on; default: 3")
        each.add_argument(
            "--quick",
            action="store_true",
            help="one seed, one short epoch, few users if synthetic: to see that it runs",
        )
        add_job_options(each, STUDY_DEFAULTS)


def _add_rl(studies: Commands) -> argparse.ArgumentParser:
    from lcr_fast.experiments.rl import AXES, REWARDS

    rl = add_command(
        studies,
        "rl",
        _run_rl,
        "rewards and settings of phase 2, beside its control",
        "Train phase 1 once a seed, then phase 2 with each reward and along each axis, every model "
        "beside its control (the same noisy trajectories under the ranking loss L_rank alone). All "
        "seeds share the data. The default takes about 25 minutes on two cores.",
    )
    rl.add_argument(
        "--rewards",
        nargs="*",
        default=list(REWARDS),
        help="rewards to compare: hr@k, ndcg@k, mrr, sums such as 0.5*hr@1+0.5*ndcg@10",
    )
    rl.add_argument(
        "--axes",
        nargs="*",
        default=list(AXES),
        metavar="NAME[=V,V,...]",
        help="fields of phase 2 to vary one at a time, with the values to try",
    )
    add_catalogue_users(rl)
    return rl


def _run_rl(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.rl import parse_axis, run_rl_study

    n_seeds = _n_seeds(arguments)
    for reward in arguments.rewards:
        TrainConfig(reward=reward)
    axes = [parse_axis(axis) for axis in arguments.axes]
    if not (axes or arguments.rewards):
        raise ValueError("nothing to study: name a reward or an axis")
    with _open_job(arguments, "rl") as job:
        print_results(job, run_rl_study(job, n_seeds, arguments.rewards, axes))


def _add_paper(studies: Commands) -> argparse.ArgumentParser:
    from lcr_fast.experiments.paper import STEPS

    paper = add_command(
        studies,
        "paper",
        _run_paper,
        "the paper's ablation and figures",
        "Train Base, LCR, LCR+TCL, LCR+TCL+RL and its control over seeds, and the last three for "
        "each number of reasoning steps; measure distances to the target and latency. All seeds "
        "share the data. The default takes about 30 minutes on two cores.",
    )
    paper.add_argument(
        "--all-steps",
        type=int,
        nargs="+",
        default=list(STEPS),
        metavar="K",
        help="numbers of reasoning steps to compare",
    )
    add_catalogue_users(paper)
    return paper


def _run_paper(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.paper import run_paper_study

    n_seeds = _n_seeds(arguments)
    for steps in arguments.all_steps:
        LCRConfig(steps=steps)
    with _open_job(arguments, "paper") as job:
        print_results(job, run_paper_study(job, n_seeds, arguments.all_steps))


def _add_grid(studies: Commands) -> argparse.ArgumentParser:
    from lcr_fast.experiments.grid import MAPS

    grid = add_command(
        studies,
        "grid",
        _run_grid,
        "stability maps of TCL and of phase 2",
        "Train the model for every pair of two settings: TCL's margin and weight, with both "
        "distances, and phase 2's KL weight and noise. Marks what is level with the best. All "
        "seeds share the data. The default takes about 25 minutes on one core.",
    )
    grid.add_argument(
        "--maps", nargs="+", choices=tuple(MAPS), default=list(MAPS), help="which maps to make"
    )
    return grid


def _run_grid(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.grid import run_grid_study

    n_seeds = _n_seeds(arguments)
    with _open_job(arguments, "grid") as job:
        print_results(job, run_grid_study(job, n_seeds, arguments.maps))


def _add_latency(studies: Commands) -> argparse.ArgumentParser:
    return add_command(
        studies,
        "latency",
        _run_latency,
        "accuracy against steps and time",
        "Train Base, LCR for K = 1 to --steps, LCR with every step supervised, and a student of "
        "K = 0; set their NDCG against the time of a forward, and rules for leaving early against "
        "the best fixed number of steps, as many steps at random, and an oracle.",
    )


def _run_latency(arguments: argparse.Namespace) -> None:
    from lcr_fast.experiments.latency import run_latency_study

    n_seeds = _n_seeds(arguments)
    with _open_job(arguments, "depth") as job:
        print_results(job, run_latency_study(job, n_seeds))


def _add_strata(studies: Commands) -> argparse.ArgumentParser:
    strata = add_command(
        studies,
        "strata",
        _run_strata,
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
    return strata


def _run_strata(arguments: argparse.Namespace) -> None:
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.data.synthetic import World
    from lcr_fast.experiments.strata import run_strata_of_runs, run_strata_study

    if arguments.runs:
        apply_run_options(arguments)
        _refuse_training(arguments)
        data = PreparedData.open(arguments.data) if arguments.data else None
        with out_folder(arguments, "study-strata") as out:
            table = run_strata_of_runs(arguments.runs, out, data, any_data=arguments.any_data)
            print(f"{table}\n\ntables and plots: {out}")
        return
    n_seeds = _n_seeds(arguments)
    worlds = [World(noise=chance) for chance in arguments.noise]
    if arguments.disjoint:
        worlds.append(World(disjoint=True))
    with _open_job(arguments, "depth") as job:
        print_results(job, run_strata_study(job, n_seeds, worlds))


def _refuse_training(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options of training beside --runs, which trains nothing."""
    names = [
        n for n in ("seeds", "quick", "noise", "disjoint", "resume", "config") if vars(arguments)[n]
    ]
    for kind in (LCRConfig, TrainConfig):
        names += [n for n, value in given_fields(arguments, kind).items() if value is not None]
    if names:
        flag = names[0].replace("_", "-")
        raise ValueError(f"--runs trains nothing: leave out --{flag}")


def _n_seeds(arguments: argparse.Namespace) -> int:
    n = arguments.seeds if arguments.seeds is not None else 1 if arguments.quick else 3
    if n < 1:
        raise ValueError(f"--seeds must be at least 1, got {n}")
    return n


def _open_job(arguments: argparse.Namespace, name: str) -> "AbstractContextManager[Job]":
    defaults = {"model": {}, "train": {}} if arguments.data else STUDY_DEFAULTS
    quick = _QUICK if arguments.quick else {}
    world = {"n_users": QUICK_USERS} if arguments.quick else {}
    defaults = {"model": defaults["model"], "train": {**defaults["train"], **quick}}
    return open_job(arguments, defaults, f"study-{name}-", **world)
