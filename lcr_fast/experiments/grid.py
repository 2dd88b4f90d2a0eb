"""Stability maps: two settings of a loss against each other, over seeds.

Which settings of TCL, and of phase 2's noise and KL term, are as good as the best one, user by
user? A map's region is what the data cannot tell from its best cell.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcr_fast.experiments import plots
from lcr_fast.experiments.comparison import VARIANTS, Job
from lcr_fast.experiments.tables import (
    in_brackets,
    markdown,
    protocol_titles,
    write_rows,
    write_tables,
)
from lcr_fast.training.idle import Trained
from lcr_fast.training.ranks import spread, weighted_metric
from lcr_fast.training.trainer import check_trainable

METRIC = "ndcg@5"


class Map(NamedTuple):
    """Two fields of the TrainConfig and their values; others fixed."""

    title: str
    variant: str
    rows: tuple[str, tuple[float, ...]]
    columns: tuple[str, tuple[float, ...]]
    fixed: dict[str, Any]


_TCL = ("tcl_margin", (0.0, 0.1, 0.5)), ("tcl_weight", (0.01, 0.1, 1.0))
MAPS = {
    "tcl-l2": Map("TCL, l2", "tcl", *_TCL, {"tcl_distance": "l2"}),
    "tcl-cosine": Map("TCL, cosine", "tcl", *_TCL, {"tcl_distance": "cosine"}),
    "kl-noise": Map(
        "phase 2, last weights",
        "rl",
        ("kl_weight", (0.01, 0.1, 1.0)),
        ("noise_scale", (0.1, 0.5, 1.0)),
        {},
    ),
}


class Cell(NamedTuple):
    """One place of a map, over the seeds."""

    mean: float
    low: float  # its difference to the best place, user by user: 95 % interval over users
    high: float
    seeds_low: float  # and over seeds; NaN for one
    seeds_high: float
    seeds: tuple[float, ...]

    @property
    def level(self) -> bool:
        """Whether the users cannot tell it from the best."""
        return not self.high < 0  # nor can one user alone


def run_grid_study(job: Job, n_seeds: int, names: Sequence[str]) -> str:
    """Train every place of the maps over seeds; return the tables.

    Writes ``results.csv``, ``results.md`` and a plot a map. Phase 2 counts with its last weights:
    validation would keep the start where it harms.
    """
    maps = [MAPS[name] for name in dict.fromkeys(names)]
    job = dataclasses.replace(
        job, measures=(), last_measures=("test_ranks",), protocols=("sampled",)
    )
    variants = [VARIANTS[part.variant] for part in maps]
    job.check([
        *(VARIANTS[kind.start].trained for kind in variants if kind.start),
        *(
            Trained(kind.objective, {**kind.trained.fixed, **change})
            for part, kind in zip(maps, variants, strict=True)
            for _, change in _places(part)
        ),
    ])  # fmt: skip
    for part in maps:
        for _, change in _places(part):
            objective = VARIANTS[part.variant].objective
            check_trainable(job.data, job.train.replace(**change), [objective])
    job.open()
    found = {name: _measure(job, n_seeds, MAPS[name]) for name in dict.fromkeys(names)}
    write_rows(job.out / "results.csv", [
        {"map": name, "row": row, "column": column, "metric": METRIC, **cell._asdict(),
         "level": cell.level, "seeds": " ".join(f"{value:.6f}" for value in cell.seeds)}
        for name, cells in found.items()
        for (row, column), cell in cells.items()
    ])  # fmt: skip
    plots.heat_maps([(MAPS[name], cells) for name, cells in found.items()], job.out / "maps.png")
    candidates = protocol_titles(job.n_negatives)["sampled"]
    seeds = "one seed" if n_seeds == 1 else f"means over {n_seeds} seeds"
    by_seed = "" if n_seeds == 1 else "; seeds: Student's t over the seeds' means"
    head = (
        f"Stability, test NDCG@5, {candidates}; {seeds}. In brackets the 95 % interval of the "
        "difference to the map's best place: bootstrap over users of each user's "
        f"mean over the seeds{by_seed}. Bold: the interval over users does not lie below 0."
    )
    tables = [
        f"### {MAPS[name].title}\n\n{_table(MAPS[name], cells)}" for name, cells in found.items()
    ]
    return write_tables(job.out, [head, *tables])


def _places(part: Map) -> list[tuple[tuple[float, float], dict[str, Any]]]:
    (row, rows), (column, columns) = part.rows, part.columns
    return [((a, b), {row: a, column: b, **part.fixed}) for a in rows for b in columns]


def _measure(job: Job, n_seeds: int, part: Map) -> dict[tuple[float, float], Cell]:
    """Train the places of a map, and set each against the best of the means over the seeds."""
    variant = VARIANTS[part.variant]
    gains: dict[tuple[float, float], list[NDArray]] = {place: [] for place, _ in _places(part)}
    for seed in job.seeds(n_seeds):
        mine = job.of_seed(seed)
        if variant.start is not None:
            first = VARIANTS[variant.start]
            mine.cell(
                variant.start,
                f"seed {seed}, {first.title}",
                first.objective,
                model=first.model_changes,
                train=first.train_changes,
            )
        for place, change in _places(part):
            shown = ",".join(f"{name}={value}" for name, value in change.items())
            result = mine.cell(
                f"{part.variant},{shown}",
                f"seed {seed}, {variant.title}, {shown}",
                variant.objective,
                start=variant.start,
                model=variant.model_changes,
                train=variant.train_changes | change,
            )
            last = result["last"]
            ranks = np.array(last["test_ranks"]) if last else result["ranks"].by_protocol["sampled"]
            gains[place].append(weighted_metric(ranks, METRIC))
    found = {place: np.stack(values) for place, values in gains.items()}  # [seeds, n]
    best = max(found, key=lambda place: float(found[place].mean()))
    cells = {}
    for place, values in found.items():
        less = spread(values - found[best])
        seeds = tuple(float(mean) for mean in values.mean(1))
        cells[place] = Cell(
            float(values.mean()), less.low, less.high, less.seeds_low, less.seeds_high, seeds
        )
    return cells


def _table(part: Map, cells: dict[tuple[float, float], Cell]) -> str:
    (row, rows), (column, columns) = part.rows, part.columns
    lines = []
    for a in rows:
        texts = []
        for b in columns:
            cell = cells[a, b]
            mean = f"**{cell.mean:.3f}**" if cell.level else f"{cell.mean:.3f}"
            text = f"{mean} {in_brackets(cell.low, cell.high, '+')}"
            if len(cell.seeds) > 1:
                text += f", seeds {in_brackets(cell.seeds_low, cell.seeds_high, '+')}"
            texts.append(text)
        lines.append([str(a), *texts])
    headers = [f"{row} \\ {column}", *map(str, columns)]
    return markdown(lines, headers)
