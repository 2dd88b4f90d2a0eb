"""Models of every depth: what the studies ``latency`` and ``strata`` train and compare.

On the same data a seed trains Base (K = 0), Base for as long as a teacher and its student together,
LCR for each K, LCR with every step supervised, and a student of K = 0. Of the supervised one there
are, besides all K steps, the models that stop after fewer: at a fixed number (after none: trained
with the steps, never stepped) or by a rule that validation chooses.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments.comparison import Job
from lcr_fast.experiments.distill import distill
from lcr_fast.experiments.tables import protocol_titles, with_interval
from lcr_fast.model import LCRSER
from lcr_fast.training import adaptive
from lcr_fast.training.adaptive import Choice, Depths
from lcr_fast.training.evaluation import rank_model
from lcr_fast.training.idle import Trained
from lcr_fast.training.models import load_model
from lcr_fast.training.ranks import Difference, weighted_metric
from lcr_fast.training.trainer import DISTILL, MODEL

METRIC = "ndcg@5"
DEEP_SUPERVISION = 0.3  # where the config has none
LOSS = 0.002  # that an adaptive model may lose on validation
_ALONE: dict[str, Any] = {"tcl_weight": 0.0, "deep_supervision": 0.0}  # no loss but of the ranking
ENDS = ("low", "high", "seeds_low", "seeds_high")  # of a Difference


class SeedModels(NamedTuple):
    """The models of one seed, and what the deep one has after each number of steps."""

    models: dict[str, LCRSER]  # base, long, k1 .. kK, deep, distilled
    valid: Depths  # of deep
    test: Depths
    valid_scores: dict[str, float]  # of the models, METRIC on the validation users


def open_seeds(job: Job, n_seeds: int) -> list[SeedModels]:
    """Train the models of n seeds; raise ValueError, before any, where that cannot be."""
    if not job.model.steps:
        raise ValueError("a study of depth needs steps of at least 1")
    if job.model.cross_memory == "initial":
        raise ValueError(
            "a study of depth needs steps that stand alone, unlike cross_memory=initial"
        )
    phase_1 = [
        Trained("supervised", {"steps": steps, **changes})
        for _, steps, changes in _cells(job).values()
    ]
    job.check([*phase_1, Trained(DISTILL, {"steps": 0, **_ALONE})])
    job.open()
    return [train_models(job, seed) for seed in job.seeds(n_seeds)]


def _cells(job: Job) -> dict[str, tuple[str, int, dict[str, Any]]]:
    """Give title, steps and what is fixed of the training of each model of phase 1."""
    K = job.model.steps
    cells = {"base": ("Base (K = 0)", 0, _ALONE)}
    cells |= {f"k{k}": (f"LCR, K = {k}", k, _ALONE) for k in range(1, K + 1)}
    cells["deep"] = (f"LCR, K = {K}, every step supervised", K, {"tcl_weight": 0.0})
    longer = {"epochs": 2 * job.train.epochs, "min_updates": 2 * job.train.min_updates}
    return cells | {"long": ("Base, twice as long", 0, {**_ALONE, **longer})}


def train_models(job: Job, seed: int) -> SeedModels:
    """Train, or with ``resume`` read back, the models of a seed."""
    job = job.of_seed(seed, measures=(), last_measures=(), protocols=("sampled",))
    weight = job.train.deep_supervision or DEEP_SUPERVISION
    cells = _cells(job)
    for name, (title, steps, changes) in cells.items():
        changes = {"deep_supervision": weight, **changes}
        job.cell(name, f"seed {seed}, {title}", "supervised", model={"steps": steps}, train=changes)
    models = {
        name: load_model(job.out / name / MODEL, job.data, job.device, any_data=job.any_data)
        for name in cells
    }
    job.report(f"seed {seed}, student of K = 0:")
    models["distilled"] = distill(
        models["deep"], job.data, job.train.replace(**_ALONE), 0,
        job.out / "distilled", resume=job.resume, any_data=job.any_data, report=job.report,
    )  # fmt: skip
    scores = {
        name: float(gains_of(model, job.data, "valid").mean()) for name, model in models.items()
    }
    depths = {
        split: adaptive.read_depths(models["deep"], job.data, split) for split in ("valid", "test")
    }
    return SeedModels(models, depths["valid"], depths["test"], scores)


def gains_of(model: LCRSER, data: PreparedData, split: str = "test") -> NDArray:
    """Measure every user of a split: [n]."""
    ranks = rank_model(model, data, split, protocols=("sampled",)).by_protocol["sampled"]
    return weighted_metric(ranks, METRIC)


def best_fixed(seeds: Sequence[SeedModels], K: int) -> str:
    """Name the LCR of a single number of steps that validation likes best, over the seeds."""
    names = ["base", *(f"k{k}" for k in range(1, K + 1))]
    return max(names, key=lambda name: np.mean([s.valid_scores[name] for s in seeds]))


class Stopped(NamedTuple):
    """The deep model, stopped by a rule with thresholds of validation."""

    gains: NDArray  # [seeds, n] of the test users
    steps: float  # mean
    at_random: NDArray  # [seeds, n] expected, as many steps dealt to users at random
    shares: NDArray  # [K + 1] of the users, by steps, means over the seeds
    choices: list[Choice]  # a seed


def stop_by(seeds: Sequence[SeedModels], rules: Sequence[str], **goal: float) -> Stopped | None:
    """Choose among rules on each seed's validation users and apply to its test users."""
    gains, at_random, shares, choices = [], [], [], []
    for seed in seeds:
        head = adaptive.fit_confidence(seed.valid)
        try:
            choice = adaptive.choose(seed.valid, METRIC, rules, confidence=head, **goal)
        except ValueError:
            return None  # no threshold of the rule keeps within the goal
        taken = choice.taken(seed.test, head)
        all_gains = seed.test.gains(METRIC)
        share = np.bincount(taken, minlength=seed.test.n_steps + 1) / len(taken)
        gains.append(np.take_along_axis(all_gains, taken[:, None], 1)[:, 0])
        at_random.append(all_gains @ share)
        shares.append(share)
        choices.append(choice)
    share = np.mean(shares, 0)
    return Stopped(
        np.stack(gains),
        float(share @ np.arange(len(share))),
        np.stack(at_random),
        share,
        choices,
    )


# -- words of both studies ------------------------------------------------------------------------


def heading(job: Job, n_seeds: int, title: str) -> str:
    """Say above the tables of a study what they measure, and how."""
    seeds = "one seed" if n_seeds == 1 else f"each user's mean over {n_seeds} seeds"
    by_seed = "" if n_seeds == 1 else ", seeds [Student's t over the seeds' means]"
    return (
        f"{title}: test NDCG@5, {protocol_titles(job.n_negatives)['sampled']}; {seeds}, "
        f"[95 % bootstrap interval over users]{by_seed}."
    )


def named(name: str, found: Difference) -> dict[str, float]:
    """Spread a difference over columns of a CSV file."""
    return {name: found.mean} | {f"{name}_{end}": getattr(found, end) for end in ENDS}


def shown(found: Difference) -> str:
    """Write a difference for a table."""
    text = with_interval(found._asdict(), "+", 4)
    if not np.isnan(found.seeds_low):
        text += f", seeds [{found.seeds_low:+.4f}, {found.seeds_high:+.4f}]"
    return text
