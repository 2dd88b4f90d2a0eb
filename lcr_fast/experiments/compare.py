"""Compare finished runs user by user: the differences of their models, with paired intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcr_fast.experiments.comparison import PROTOCOL_TITLES, VARIANTS, strata_table
from lcr_fast.training.ranks import METRICS, RANKS, Ranks, differences

Rows = list[dict[str, Any]]


def compare_runs(first: Sequence[Path], second: Sequence[Path]) -> dict[str, Rows]:
    """Compare the models of one group of runs to those of another, the i-th run to the i-th.

    A run is the folder of a job, whose models are compared by name, or the folder of one model in
    it. Returns the rows of :func:`~lcr_fast.training.ranks.differences` by model. Raises ValueError
    where groups differ in size, a run holds no ranks, two runs have no model in common, or a pair
    was not evaluated on the same samples.
    """
    if len(first) != len(second):
        raise ValueError(
            f"runs are compared in pairs, a pair a seed: got {len(first)} and {len(second)}"
        )
    pairs = [(find_ranks(a), find_ranks(b)) for a, b in zip(first, second, strict=True)]
    names = [name for name in pairs[0][0] if all(name in run for pair in pairs for run in pair)]
    if not names:
        found = " and ".join(", ".join(run) or "one model" for run in pairs[0])
        raise ValueError(f"the runs have no model in common: {found}")
    return {name: _compare(name, pairs) for name in names}


def find_ranks(run: Path) -> dict[str, Path]:
    """Find the ranks of a job's models, by name; those of a model's own folder are nameless."""
    if (run / RANKS).is_file():
        return {"": run / RANKS}
    found = {path.parent.name: path for path in sorted(run.glob(f"*/{RANKS}"))}
    order = [*VARIANTS, *found]
    found = {name: found[name] for name in sorted(found, key=order.index)}
    if not found:
        raise ValueError(
            f"{run}: no {RANKS} there; a run is the folder of `lcr-fast train`, of a seed of a "
            "study, or of one of their models"
        )
    return found


def _compare(name: str, pairs: Sequence[tuple[dict[str, Path], dict[str, Path]]]) -> Rows:
    ranks = []
    for run_a, run_b in pairs:
        a, b = (Ranks.load(run[name]) for run in (run_a, run_b))
        if a.samples != b.samples:
            raise ValueError(
                f"{run_a[name]} and {run_b[name]} rank other samples: runs must be of the same "
                "prepared data"
            )
        ranks.append((a, b))
    return differences(ranks)


def comparison_tables(found: dict[str, Rows], title: str, metric: str) -> str:
    """Lay out differences as Markdown, a table a protocol; ``title`` names the two groups.

    Raises ValueError for a metric that no row has.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    results = {name: {"title": name or "model", "rows": rows} for name, rows in found.items()}
    rows = next(iter(found.values()))
    seeds = rows[0]["seeds"]
    how = "[95 % interval: paired bootstrap over users"
    if seeds > 1:
        how += f", of each user's mean over {seeds} seeds; seeds: Student's t over the seeds' means"
    parts = [f"{metric.upper()}, {title}, {how}]"]
    for protocol, of_protocol in PROTOCOL_TITLES.items():
        if any(row["protocol"] == protocol for row in rows):
            table = strata_table(results, protocol, metric=metric, sign="+")
            parts.append(f"{of_protocol}:\n\n{table}")
    return "\n\n".join(parts)
