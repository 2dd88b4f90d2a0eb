"""Cells of a study: models trained over seeds, each at most once, and their numbers.

A study trains cells (:class:`lcr_fast.experiments.comparison.Job`) in a folder a seed, all on the
same data, and takes means with 95 % confidence intervals across the seeds (Student's t).
Differences are paired: within a seed first.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lcr_fast.experiments.comparison import VARIANTS, Job
from lcr_fast.experiments.tables import protocol_titles, write_rows, write_tables
from lcr_fast.training.idle import PHASE_2, POLICY, Trained
from lcr_fast.training.ranks import Interval, across_seeds
from lcr_fast.training.trainer import validation_scores

DIVERSITY = ("entropy", "coverage", "tail")
SIGNAL = ("signal", "silent_pull")  # of GRPO's log
METRICS = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr")
_MEASURES = ("distances", "relevance", "diversity")

Numbers = dict[str, float]  # of one cell, by metric
Change = Mapping[str, Any]


class Cells:
    """The cells of a study, by seed; each is trained at most once.

    ``changes`` are those that will be made of phase 2 and the number of steps.
    """

    def __init__(
        self,
        job: Job,
        n_seeds: int,
        changes: Iterable[Change] = (),
        measures: tuple[str, ...] = (),
    ) -> None:
        self.job = dataclasses.replace(
            job, measures=(*_MEASURES, *measures), last_measures=("rows", "diversity")
        )
        self.seeds = job.seeds(n_seeds)
        self.results: dict[tuple[int, str], dict[str, Any]] = {}
        self.job.check(
            Trained(kind.objective, {**change, **kind.trained.fixed})
            for change in ({}, *changes)
            for kind in VARIANTS.values()
        )
        self.job.open()

    def _resolve(self, variant: str, change: Change) -> tuple[str, dict[str, Any]]:
        """Find what a cell really is, so that it is the same cell on whatever axis it lies."""
        defaults = {**self.job.model.to_dict(), **self.job.train.to_dict()}
        supervised = VARIANTS[variant].start is None
        ignored = PHASE_2 if supervised else POLICY if variant == "control" else ()
        change = {
            key: value
            for key, value in change.items()
            if key not in ignored and value != defaults[key]
        }
        no_steps = supervised and not change.get("steps", defaults["steps"])
        if variant == "base" or (no_steps and VARIANTS[variant].searches):
            return "base", {}
        return variant, change

    def name(self, variant: str, change: Change) -> str:
        """Name a cell, and its folder, by what it changes."""
        variant, change = self._resolve(variant, change)
        parts = [f"{key}={value}" for key, value in change.items()]
        return ",".join((variant, *parts)).replace("*", "x").replace(" ", "")

    def train(self, seed: int, variant: str, change: Change) -> None:
        """Train a variant of the comparison with some fields changed, after what it starts from."""
        key = seed, self.name(variant, change)
        if key in self.results:
            return
        variant, change = self._resolve(variant, change)
        kind = VARIANTS[variant]
        if kind.start is not None:
            self.train(seed, kind.start, change)
        model = {"steps": change["steps"]} if "steps" in change else {}
        training = {name: value for name, value in change.items() if name not in model}
        shown = "".join(f", {name}={value}" for name, value in change.items())
        self.results[key] = self.job.of_seed(seed).cell(
            key[1],
            f"seed {seed}, {kind.title}{shown}",
            kind.objective,
            start=None if kind.start is None else self.name(kind.start, change),
            model=model | kind.model_changes,
            train=training | kind.train_changes,
        )

    def numbers(self, variant: str, change: Change) -> list[Numbers]:
        """Give a cell's numbers, one entry a seed."""
        name = self.name(variant, change)
        return [_numbers(self.results[seed, name]) for seed in self.seeds]

    def write(self, path: Path) -> None:
        """Write every number of every cell."""
        write_rows(
            path,
            [
                {"seed": seed, "cell": name, "metric": metric, "value": value}
                for (seed, name), result in self.results.items()
                for metric, value in _numbers(result).items()
            ],
        )


def _numbers(result: dict[str, Any]) -> Numbers:
    """Flatten a cell's results; ``last_*`` are those of the last weights, the others of the best.

    Phase 1 counts with its best weights in both.
    """
    numbers: Numbers = {}
    for prefix, part in (("", result), ("last_", result["last"] or result)):
        rows = {
            (row["protocol"], row["metric"]): row["mean"]
            for row in part["rows"]
            if row["targets"] == "all"
        }
        numbers |= {prefix + name: rows["sampled", name] for name in METRICS}
        numbers[prefix + "catalogue_ndcg@10"] = rows.get(("catalogue", "ndcg@10"), math.nan)
        numbers |= {prefix + key: part["diversity"][key] for key in DIVERSITY}
    for name in SIGNAL:  # of the epochs that log it
        logged = [record[name] for record in result["history"] if name in record]
        numbers[name] = sum(logged) / len(logged) if logged else math.nan
    numbers["readout"] = result["readout"]
    scores = validation_scores(result)
    numbers["kept"] = float(max(scores) > scores[0])  # validation kept an epoch, not the start
    return numbers | {"seconds": result["seconds"]}


def interval_of(cells: list[Numbers], metric: str, than: list[Numbers] | None = None) -> Interval:
    """Mean of a metric, or of its difference to other cells, across seeds."""
    values = [numbers[metric] for numbers in cells]
    if than is not None:
        values = [v - numbers[metric] for v, numbers in zip(values, than, strict=True)]
    return across_seeds(values)


def text_of(interval: Interval, sign: str = "") -> str:
    """Write an interval for a table; nothing for none."""
    if math.isnan(interval.mean):
        return ""
    text = f"{interval.mean:{sign}.3f}"
    if not math.isnan(interval.low):
        text += f" [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
    return text


def mean_text(cells: list[Numbers], metric: str) -> str:
    """Write the mean of a metric alone."""
    return text_of(Interval(interval_of(cells, metric).mean, math.nan, math.nan, len(cells)))


def finish(out: Path, cells: Cells, title: str, parts: list[str], rows: list[dict]) -> str:
    """Write ``cells.csv``, ``results.csv`` and ``results.md``; return the tables."""
    n = len(cells.seeds)
    spread = "one seed, so no interval" if n == 1 else f"mean [95 % t-interval] over {n} seeds"
    candidates = protocol_titles(cells.job.n_negatives)["sampled"]
    cells.write(out / "cells.csv")
    write_rows(out / "results.csv", rows)
    return write_tables(out, [f"{title}, test, {candidates}; {spread}.", *parts])
