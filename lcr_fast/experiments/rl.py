"""Study of phase 2: rewards and settings, every model beside its control.

Phase 1 is trained once a seed and shared; the control of a model of phase 2 has the same noisy
trajectories under the ranking loss L_rank alone.
"""

import typing
from collections.abc import Callable, Sequence
from typing import Any

from lcr_fast.config import TrainConfig
from lcr_fast.experiments import plots
from lcr_fast.experiments.cells import (
    DIVERSITY,
    SIGNAL,
    Cells,
    Numbers,
    finish,
    interval_of,
    mean_text,
    text_of,
)
from lcr_fast.experiments.comparison import Job
from lcr_fast.experiments.tables import markdown
from lcr_fast.training.idle import PHASE_2, POLICY
from lcr_fast.training.trainer import check_trainable

REWARDS = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr", "0.5*hr@1+0.5*ndcg@10")
AXES: dict[str, tuple[Any, ...]] = {
    "kl_weight": (0.0, 0.01, 0.1, 1.0),
    "noise_scale": (0.1, 0.25, 0.5, 1.0),
    "n_trajectories": (2, 4, 8, 16),
    "silent_groups": ("keep", "mask", "resample"),
    "scale_advantages": (True, False),
}


def parse_axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """Read ``NAME`` (with its usual values) or ``NAME=V,V,...``, a field of phase 2.

    Raises ValueError for another name, and for a value that the config refuses.
    """
    name, given, values = text.partition("=")
    if name not in PHASE_2:
        raise ValueError(f"an axis must be one of {', '.join(PHASE_2)}, got {name!r}")
    if not given:
        if name not in AXES:
            raise ValueError(f"axis {name} has no usual values: write {name}=V,V,...")
        return name, AXES[name]
    hint = typing.get_type_hints(TrainConfig)[name]
    kinds: dict[Any, Callable[[str], Any]] = {int: int, float: float, bool: _boolean}
    kind = kinds.get(hint, str)
    try:
        parsed = tuple(kind(value.strip()) for value in values.split(","))
    except ValueError:
        raise ValueError(f"axis {name}: {values!r} is no list of {hint.__name__} values") from None
    for value in parsed:
        TrainConfig().replace(**{name: value})
    return name, parsed


def _boolean(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise ValueError
    return values[text.lower()]


def run_rl_study(
    job: Job, n_seeds: int, rewards: Sequence[str], axes: Sequence[tuple[str, tuple[Any, ...]]]
) -> str:
    """Compare rewards, and vary one field of phase 2 at a time; return the tables.

    Writes ``cells.csv`` (every number of every model), ``results.csv`` (across seeds),
    ``results.md`` and a plot an axis. The default value of a field always belongs to its axis.
    """
    axes = [("reward", tuple(rewards)), *axes] if rewards else list(axes)
    axes = [(name, _with_default(values, getattr(job.train, name))) for name, values in axes]
    for name, values in axes:
        for value in values:
            check_trainable(job.data, job.train.replace(**{name: value}), ("grpo", "noisy"))
    cells = Cells(job, n_seeds, [{name: value} for name, values in axes for value in values])
    for seed in cells.seeds:
        for name, values in axes:
            for value in values:
                for variant in ("rl", "control"):
                    cells.train(seed, variant, {name: value})
    parts, rows = [_readouts(cells)], []
    for name, values in axes:
        parts.append(f"### {name}\n\n{_axis_table(cells, name, values)}")
        rows += _axis_rows(cells, name, values)
        metrics = ["ndcg@5", "hr@1", "mrr"] + ["entropy", "tail"] * (name == "reward")
        titles = {"rl": "RL", "control": "control", "tcl": "no RL"}
        series = {
            variant: {
                m: [interval_of(cells.numbers(variant, {name: v}), "last_" + m) for v in values]
                for m in metrics
            }
            for variant in titles
        }
        plots.intervals(name, values, series, titles, job.out / f"{name}.png")
    legend = _LEGEND.format(n_negatives=job.n_negatives)
    return finish(job.out, cells, "Phase 2", [*parts, legend], rows)


_LEGEND = """All but the last two columns are of the weights after the last epoch, so that harm
shows. RL - no RL, RL - control: paired differences in NDCG@5. signal: share of the users whose
trajectories earn differently, so that they have an advantage; silent pull: norm of the gradient of
the weighted KL of all others over that of the policy's objective, both over all epochs. entropy:
of the softmax over the 1 + {n_negatives} candidates, in nats. coverage: share of the items that
stand in at least one user's top 10 of the catalogue; tail: share of the places in these lists that
the 80 % least popular items take. chosen: NDCG@5 of the weights that validation chose; kept: in how
many seeds these were not the start."""


def _readouts(cells: Cells) -> str:
    """Say what share of h^(K) the models that phase 2 starts from read."""
    shares = (f"{numbers['readout']:g}" for numbers in cells.numbers("tcl", {}))
    return (
        f"Share of h^(K) that validation chose to be read after phase 1, by seed: "
        f"{', '.join(shares)}. Where it is 0, h^(0) is read, which has no noise, and all "
        "trajectories of a user are alike."
    )


def _with_default(values: tuple[Any, ...], default: Any) -> tuple[Any, ...]:
    if default in values:
        return values
    numeric = all(isinstance(value, (int, float)) for value in values)
    return tuple(sorted((*values, default))) if numeric else (default, *values)


def _axis_table(cells: Cells, name: str, values: tuple[Any, ...]) -> str:
    shown = ("ndcg@5", "hr@1", "mrr")
    headers = [
        name, *(metric.upper() for metric in shown), "RL - no RL", "control", "RL - control",
        "signal", "silent pull", *DIVERSITY, "chosen", "kept",
    ]  # fmt: skip

    def row(
        title: str, numbers: list[Numbers], differences: tuple[str, str, str] = ("", "", "")
    ) -> list[str]:
        kept = f"{sum(n['kept'] for n in numbers):.0f} of {len(numbers)}"
        return [
            title,
            *(text_of(interval_of(numbers, "last_" + metric)) for metric in shown),
            *differences,
            *(mean_text(numbers, name) for name in SIGNAL),
            *(mean_text(numbers, "last_" + name) for name in DIVERSITY),
            text_of(interval_of(numbers, "ndcg@5")),
            kept,
        ]

    start = cells.numbers("tcl", {})
    rows = [[*row("no RL", start)[:-2], "", ""]]
    if name in POLICY:  # which the control does not depend on
        rows.append(row("control", cells.numbers("control", {})))
    for value in values:
        rl, control = (cells.numbers(variant, {name: value}) for variant in ("rl", "control"))
        differences = (
            text_of(interval_of(rl, "last_ndcg@5", start), "+"),
            text_of(interval_of(control, "last_ndcg@5")),
            text_of(interval_of(rl, "last_ndcg@5", control), "+"),
        )
        rows.append(row(str(value), rl, differences))
    return markdown(rows, headers)


def _axis_rows(cells: Cells, name: str, values: tuple[Any, ...]) -> list[dict[str, Any]]:
    start = cells.numbers("tcl", {})
    rows = []
    for value in values:
        rl, control = (cells.numbers(variant, {name: value}) for variant in ("rl", "control"))
        for series, numbers, than in (
            ("no_rl", start, None),
            ("rl", rl, None),
            ("control", control, None),
            ("rl-no_rl", rl, start),
            ("rl-control", rl, control),
        ):
            for metric in rl[0]:
                interval = interval_of(numbers, metric, than)
                key = {"axis": name, "value": value, "series": series, "metric": metric}
                rows.append({**key, **interval._asdict()})
    return rows
