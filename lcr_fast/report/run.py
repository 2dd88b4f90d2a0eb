"""A finished run, read back from its folder: of ``train``, of a seed of a study, or of a study."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

from lcr_fast.data.folder import MANIFEST
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments.comparison import (
    BASELINES,
    EVALUATION,
    EVALUATION_KIND,
    JOB,
    JOB_KIND,
    VARIANTS,
)
from lcr_fast.storage import load_json
from lcr_fast.training.baselines import TITLES
from lcr_fast.training.models import OTHER_DATA
from lcr_fast.training.ranks import RANKS, Ranks

# Tables that studies leave in their folder, and what a page calls them.
_TABLES = {
    "strata.csv": "Strata of users",
    "rules.csv": "When users leave the reasoning",
    "worlds.csv": "Worlds",
    "latency.csv": "Latency of a forward",
    "distances.csv": "Distance to the target by number of steps",
}
CONTROL = "control"  # how the names of phase 2's controls begin
_MOST_ROWS = 200  # of such a table


class Table(NamedTuple):
    """A CSV file of a run."""

    title: str
    head: list[str]
    rows: list[list[str]]
    left_out: int  # rows


class Run(NamedTuple):
    """What a page shows: results by model (with ``ranks``), in the order of the tables."""

    folder: Path
    models: dict[str, dict[str, Any]]
    baselines: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, Any]]  # "model" and "train" of the job; {} where unknown
    tables: list[Table]

    @property
    def ranks(self) -> Ranks:
        return next(iter(self.models.values()))["ranks"]


def read_run(folder: Path) -> Run:
    """Read the models of a folder; of a study those of its first seed, and its tables.

    Raises ValueError, in one sentence, where no model is, or where a file is damaged.
    """
    root, seeds = folder, sorted(folder.glob("seed-*"), key=lambda path: (len(path.name), path))
    if seeds and not _models(folder):
        folder = seeds[0]
    models = _models(folder)
    if not models:
        raise ValueError(f"{root}: holds no evaluated model, so it is no run")
    results = {
        path.name: load_json(path / EVALUATION, EVALUATION_KIND)
        | {"ranks": Ranks.load(path / RANKS)}
        for path in models
    }
    baselines = {
        name: {"title": title, "ranks": ranks, "rows": ranks.rows()}
        for name, title in TITLES.items()
        if (folder / BASELINES / name / RANKS).is_file()
        for ranks in [Ranks.load(folder / BASELINES / name / RANKS)]
    }
    places = dict.fromkeys((folder, root, folder.parent))
    job = next((place / JOB for place in places if (place / JOB).is_file()), None)
    configs = {} if job is None else load_json(job, JOB_KIND)
    tables = [
        _table(place / name, title)
        for name, title in _TABLES.items()
        for place in dict.fromkeys((folder, root))
        if (place / name).is_file()
    ]
    kept: dict[str, dict[str, Any]] = {n: configs[n] for n in ("model", "train") if n in configs}
    return Run(folder, results, baselines, kept, tables)


def find_data(run: Run, given: Path | None, any_data: bool = False) -> PreparedData | None:
    """Open the prepared data of a run: those given, or those that lie in its folder; None if none.

    Raises ValueError for data that are not those of the run, without ``any_data``.
    """
    places = [given] if given else [place / "data" for place in (run.folder, run.folder.parent)]
    for place in places:
        if given or (place / MANIFEST).is_file():
            data = PreparedData.open(place)
            if not any_data and run.ranks.data not in (None, data.fingerprint):
                raise ValueError(f"{place}: {OTHER_DATA}")
            return data
    return None


def _models(folder: Path) -> list[Path]:
    """List the folders of evaluated models, variants in their order, then others by name."""
    found = [p.parent for p in folder.glob(f"*/{EVALUATION}") if (p.parent / RANKS).is_file()]
    order = {name: place for place, name in enumerate(VARIANTS)}
    return sorted(found, key=lambda path: (order.get(path.name, len(order)), path.name))


def _table(path: Path, title: str) -> Table:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = list(csv.reader(file)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    return Table(title, head, rows[:_MOST_ROWS], max(len(rows) - _MOST_ROWS, 0))
