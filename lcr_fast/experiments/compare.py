"""Compare finished runs user by user: the differences of their models, with paired intervals."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lcr_fast.experiments.comparison import VARIANTS
from lcr_fast.experiments.tables import protocol_titles, strata_table
from lcr_fast.training.models import OTHER_DATA
from lcr_fast.training.ranks import CUTS, RANKS, Ranks, cuts_of, differences


class Comparison(NamedTuple):
    """Differences of two groups of runs."""

    models: dict[str, list[dict[str, Any]]]  # rows of ranks.differences by model
    n_negatives: str  # beside a target in the protocol "sampled"
    metric: str  # of the tables


def compare_runs(
    first: Sequence[Path],
    second: Sequence[Path],
    metric: str = "ndcg@5",
    *,
    any_data: bool = False,
) -> Comparison:
    """Compare the models of one group of runs to those of another, the i-th run to the i-th.

    A run is the folder of a job, whose models are compared by name, or the folder of one model in
    it. ``metric`` is measured beside the usual ones. Raises ValueError for an unknown metric, and
    where groups differ in size, a run holds no ranks, two runs have no model in common, or a pair
    was not evaluated on the same samples, or without ``any_data`` not on the same prepared data.
    """
    if not re.fullmatch(r"(hr|ndcg)@[1-9][0-9]*|mrr", metric):
        raise ValueError(f"metric must be hr@k, ndcg@k or mrr, got {metric!r}")
    if len(first) != len(second):
        raise ValueError(
            f"runs are compared in pairs, a pair a seed: got {len(first)} and {len(second)}"
        )
    pairs = [(find_ranks(a), find_ranks(b)) for a, b in zip(first, second, strict=True)]
    names = [name for name in pairs[0][0] if all(name in run for pair in pairs for run in pair)]
    if not names:
        models = " and ".join(", ".join(run) or "one model" for run in pairs[0])
        raise ValueError(f"the runs have no model in common: {models}")
    cuts = tuple(sorted({*CUTS, *cuts_of([metric])}))
    found: dict[str, list[dict[str, Any]]] = {}
    n_negatives: set[int] = set()
    for name in names:
        ranks = [_load_pair(a[name], b[name], any_data) for a, b in pairs]
        found[name] = differences(ranks, cuts)
        n_negatives |= {mine.n_negatives for mine, _ in ranks}
    if not any(found.values()):
        raise ValueError("the runs have no candidate set in common, by which both were evaluated")
    return Comparison(found, " or ".join(map(str, sorted(n_negatives))), metric)


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


def _load_pair(first: Path, second: Path, any_data: bool) -> tuple[Ranks, Ranks]:
    a, b = Ranks.load(first), Ranks.load(second)
    if a.samples != b.samples:
        raise ValueError(
            f"{first} and {second} rank other samples: runs must be of the same prepared data"
        )
    if a.data != b.data and not any_data:
        raise ValueError(f"{second}: compared with {first}, {OTHER_DATA}")
    return a, b


def comparison_tables(found: Comparison, title: str) -> str:
    """Lay out differences as Markdown, a table a protocol; ``title`` names the two groups."""
    results = {
        name: {"title": name or "model", "rows": rows} for name, rows in found.models.items()
    }
    rows = next(iter(found.models.values()))
    seeds = rows[0]["seeds"]
    how = "[95 % interval: paired bootstrap over users"
    if seeds > 1:
        how += f", of each user's mean over {seeds} seeds; seeds: Student's t over the seeds' means"
    parts = [f"{found.metric.upper()}, {title}, {how}]"]
    for protocol, of_protocol in protocol_titles(found.n_negatives).items():
        if any(row["protocol"] == protocol for row in rows):
            table = strata_table(results, protocol, metric=found.metric, sign="+")
            parts.append(f"{of_protocol}:\n\n{table}")
    return "\n\n".join(parts)
