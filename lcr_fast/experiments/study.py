"""Studies over seeds: what phase 2 does to ranking, and the paper's tables and figures.

A study trains cells (:class:`lcr_fast.experiments.comparison.Job`) in a folder a seed, all on the
same data, and takes means with 95 % confidence intervals across the seeds (Student's t). Phase 1
is trained once a seed and shared; every model of phase 2 has its control beside it, the same
noisy trajectories under the ranking loss L_rank alone. Differences are paired: within a seed first.
"""

import dataclasses
import math
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate

from lcr_fast.batch import Batch
from lcr_fast.config import TrainConfig
from lcr_fast.experiments import plots
from lcr_fast.experiments.comparison import VARIANTS, Job, baseline_results
from lcr_fast.experiments.tables import protocol_titles, write_rows
from lcr_fast.model import LCRSER
from lcr_fast.storage import replacing
from lcr_fast.training.evaluation import make_batcher, with_target
from lcr_fast.training.models import attach_text
from lcr_fast.training.ranks import Interval, across_seeds
from lcr_fast.training.trainer import PHASE_2, check_trainable, validation_scores

REWARDS = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr", "0.5*hr@1+0.5*ndcg@10")
AXES: dict[str, tuple[Any, ...]] = {
    "kl_weight": (0.0, 0.01, 0.1, 1.0),
    "noise_scale": (0.1, 0.25, 0.5, 1.0),
    "n_trajectories": (2, 4, 8, 16),
    "silent_groups": ("keep", "mask", "resample"),
    "scale_advantages": (True, False),
}
STEPS = (0, 1, 2, 3, 4, 5)
_MEASURES = ("distances", "relevance", "diversity")
# Fields of phase 2 that its control knows nothing of.
_POLICY = (
    "reward", "action", "scale_advantages", "silent_groups", "kl", "kl_weight", "clip",
    "temperature",
)  # fmt: skip
_DIVERSITY = ("entropy", "coverage", "tail")
_SIGNAL = ("signal", "silent_pull")  # of GRPO's log
_METRICS = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr")

Numbers = dict[str, float]  # of one cell, by metric
Change = Mapping[str, Any]


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


class _Cells:
    """The cells of a study, by seed; each is trained at most once."""

    def __init__(self, job: Job, n_seeds: int, measures: tuple[str, ...] = ()) -> None:
        self.job = dataclasses.replace(
            job, measures=(*_MEASURES, *measures), last_measures=("rows", "diversity")
        )
        self.seeds = [job.train.seed + i for i in range(n_seeds)]
        self.results: dict[tuple[int, str], dict[str, Any]] = {}
        self.job.check(kind.objective for kind in VARIANTS.values())
        self.job.open()

    def _resolve(self, variant: str, change: Change) -> tuple[str, dict[str, Any]]:
        """Find what a cell really is, so that it is the same cell on whatever axis it lies."""
        defaults = {**self.job.model.to_dict(), **self.job.train.to_dict()}
        supervised = VARIANTS[variant].start is None
        ignored = PHASE_2 if supervised else _POLICY if variant == "control" else ()
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
        job = self.job
        part = dataclasses.replace(
            job, out=job.out / f"seed-{seed}", train=job.train.replace(seed=seed)
        )
        shown = "".join(f", {name}={value}" for name, value in change.items())
        self.results[key] = part.cell(
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
        numbers |= {prefix + name: rows["sampled", name] for name in _METRICS}
        numbers[prefix + "catalogue_ndcg@10"] = rows.get(("catalogue", "ndcg@10"), math.nan)
        numbers |= {prefix + key: part["diversity"][key] for key in _DIVERSITY}
    for name in _SIGNAL:  # of the epochs that log it
        logged = [record[name] for record in result["history"] if name in record]
        numbers[name] = sum(logged) / len(logged) if logged else math.nan
    scores = validation_scores(result)
    numbers["kept"] = float(max(scores) > scores[0])  # validation kept an epoch, not the start
    return numbers | {"seconds": result["seconds"]}


def _interval(cells: list[Numbers], metric: str, than: list[Numbers] | None = None) -> Interval:
    """Mean of a metric, or of its difference to other cells, across seeds."""
    values = [numbers[metric] for numbers in cells]
    if than is not None:
        values = [v - numbers[metric] for v, numbers in zip(values, than, strict=True)]
    return across_seeds(values)


def _cell(interval: Interval, sign: str = "") -> str:
    if math.isnan(interval.mean):
        return ""
    text = f"{interval.mean:{sign}.3f}"
    if not math.isnan(interval.low):
        text += f" [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
    return text


def _mean(cells: list[Numbers], metric: str) -> str:
    return _cell(Interval(_interval(cells, metric).mean, math.nan, math.nan, len(cells)))


def _table(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _finish(out: Path, cells: _Cells, title: str, parts: list[str], rows: list[dict]) -> str:
    n = len(cells.seeds)
    spread = "one seed, so no interval" if n == 1 else f"mean [95 % t-interval] over {n} seeds"
    candidates = protocol_titles(_n_negatives(cells.job))["sampled"]
    text = "\n\n".join([f"{title}, test, {candidates}; {spread}.", *parts])
    cells.write(out / "cells.csv")
    write_rows(out / "results.csv", rows)
    with replacing(out / "results.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    return text


def _n_negatives(job: Job) -> int:
    return job.data.test_negatives.shape[1]


# -- phase 2 --------------------------------------------------------------------------------------


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
    cells = _Cells(job, n_seeds)
    for seed in cells.seeds:
        for name, values in axes:
            for value in values:
                for variant in ("rl", "control"):
                    cells.train(seed, variant, {name: value})
    parts, rows = [], []
    for name, values in axes:
        parts.append(f"### {name}\n\n{_axis_table(cells, name, values)}")
        rows += _axis_rows(cells, name, values)
        metrics = ["ndcg@5", "hr@1", "mrr"] + ["entropy", "tail"] * (name == "reward")
        titles = {"rl": "RL", "control": "control", "tcl": "no RL"}
        series = {
            variant: {
                m: [_interval(cells.numbers(variant, {name: v}), "last_" + m) for v in values]
                for m in metrics
            }
            for variant in titles
        }
        plots.intervals(name, values, series, titles, job.out / f"{name}.png")
    legend = _LEGEND.format(n_negatives=_n_negatives(job))
    return _finish(job.out, cells, "Phase 2", [*parts, legend], rows)


_LEGEND = """All but the last two columns are of the weights after the last epoch, so that harm
shows. RL - no RL, RL - control: paired differences in NDCG@5. signal: share of the users whose
trajectories earn differently, so that they have an advantage; silent pull: norm of the gradient of
the weighted KL of all others over that of the policy's objective, both over all epochs. entropy:
of the softmax over the 1 + {n_negatives} candidates, in nats. coverage: share of the items that
stand in at least one user's top 10 of the catalogue; tail: share of the places in these lists that
the 80 % least popular items take. chosen: NDCG@5 of the weights that validation chose; kept: in how
many seeds these were not the start."""


def _with_default(values: tuple[Any, ...], default: Any) -> tuple[Any, ...]:
    if default in values:
        return values
    numeric = all(isinstance(value, (int, float)) for value in values)
    return tuple(sorted((*values, default))) if numeric else (default, *values)


def _axis_table(cells: _Cells, name: str, values: tuple[Any, ...]) -> str:
    shown = ("ndcg@5", "hr@1", "mrr")
    headers = [
        name, *(metric.upper() for metric in shown), "RL - no RL", "control", "RL - control",
        "signal", "silent pull", *_DIVERSITY, "chosen", "kept",
    ]  # fmt: skip

    def row(
        title: str, numbers: list[Numbers], differences: tuple[str, str, str] = ("", "", "")
    ) -> list[str]:
        kept = f"{sum(n['kept'] for n in numbers):.0f} of {len(numbers)}"
        return [
            title,
            *(_cell(_interval(numbers, "last_" + metric)) for metric in shown),
            *differences,
            *(_mean(numbers, name) for name in _SIGNAL),
            *(_mean(numbers, "last_" + name) for name in _DIVERSITY),
            _cell(_interval(numbers, "ndcg@5")),
            kept,
        ]

    start = cells.numbers("tcl", {})
    rows = [[*row("no RL", start)[:-2], "", ""]]
    if name in _POLICY:  # which the control does not depend on
        rows.append(row("control", cells.numbers("control", {})))
    for value in values:
        rl, control = (cells.numbers(variant, {name: value}) for variant in ("rl", "control"))
        differences = (
            _cell(_interval(rl, "last_ndcg@5", start), "+"),
            _cell(_interval(control, "last_ndcg@5")),
            _cell(_interval(rl, "last_ndcg@5", control), "+"),
        )
        rows.append(row(str(value), rl, differences))
    return _table(rows, headers)


def _axis_rows(cells: _Cells, name: str, values: tuple[Any, ...]) -> list[dict[str, Any]]:
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
                interval = _interval(numbers, metric, than)
                key = {"axis": name, "value": value, "series": series, "metric": metric}
                rows.append({**key, **interval._asdict()})
    return rows


# -- the paper's tables and figures ---------------------------------------------------------------

_ABLATION = tuple(VARIANTS)


def run_paper_study(job: Job, n_seeds: int, steps: Sequence[int] = STEPS) -> str:
    """Reproduce the shape of the paper's Table 3, Fig. 4 to 6 and Table 4; return the tables.

    Baselines and Base to +RL with its control; NDCG against the number of reasoning steps with and
    without RL; what a user's own searches are worth to a trained model; distance to the target per
    step; latency of a forward. Writes ``cells.csv``, ``results.csv``,
    ``distances.csv``, ``latency.csv``, ``results.md`` and plots.
    """
    cells = _Cells(job, n_seeds, ("searches",))
    steps = tuple(dict.fromkeys(steps))
    for seed in cells.seeds:
        for variant in _ABLATION:
            cells.train(seed, variant, {})
        for k in steps:
            for variant in ("rl", "control"):
                cells.train(seed, variant, {"steps": k})
    titles = {"tcl": "without RL", "rl": "with RL", "control": "control: L_rank, same noise"}
    series = {
        variant: {
            m: [_interval(cells.numbers(variant, {"steps": k}), m) for k in steps]
            for m in ("ndcg@5", "ndcg@10")
        }
        for variant in titles
    }
    plots.intervals("reasoning steps K", steps, series, titles, job.out / "steps.png")
    distances = _mean_distances(cells)
    plots.target_distances(distances, job.out / "target_distance.png")
    latencies = forward_latency(job, steps)
    plots.latencies(latencies, job.out / "latency.png")
    write_rows(job.out / "latency.csv", latencies)
    write_rows(
        job.out / "distances.csv",
        [
            {"variant": name, "state": state, "step": k + state.startswith("a"), "distance": value}
            for name, result in distances.items()
            for state, values in result["distances"].items()
            for k, value in enumerate(values)
        ],
    )
    parts = [
        "### Ablation (cf. the paper's Table 3)\n\n" + _ablation_table(cells),
        "### Reasoning steps (cf. Fig. 6)\n\n" + _steps_table(cells, steps),
        "### Does search help? NDCG@5 with a user's own searches less that of the same model with "
        "others, users that searched\n\n" + _search_table(cells),
        "### Distance to the target per step (cf. Fig. 4 and 5)\n\n" + _distance_table(distances),
        "### Latency of a forward, 100 candidates (cf. Table 4)\n\n"
        + _latency_table(latencies)
        + "\n\nMedians [95 % interval] of times and of ratios to the first row, turn by turn; they "
        "are this machine's, and differ on others.",
    ]
    return _finish(job.out, cells, "The paper's ablation", parts, _paper_rows(cells, steps))


def _ablation_table(cells: _Cells) -> str:
    headers = ["model", *(m.upper() for m in _METRICS), "NDCG@10, catalogue", "NDCG@5, gain"]
    shown = [*(("sampled", metric) for metric in _METRICS), ("catalogue", "ndcg@10")]
    rows = []
    for result in baseline_results(cells.job.data, **cells.job.ranking).values():
        means = {
            (row["protocol"], row["metric"]): row["mean"]
            for row in result["rows"]
            if row["targets"] == "all"
        }
        rows.append([result["title"], *(f"{means[key]:.3f}" for key in shown), ""])
    before = {"lcr": "base", "tcl": "lcr", "rl": "tcl", "control": "tcl"}
    numbers = {v: cells.numbers(v, {}) for v in _ABLATION}
    for variant, mine in numbers.items():
        row = [VARIANTS[variant].title, *(_cell(_interval(mine, m)) for m in _METRICS)]
        row.append(_cell(_interval(mine, "catalogue_ndcg@10")))
        gain = ""
        if variant in before:
            other = before[variant]
            gain = f"{_cell(_interval(mine, 'ndcg@5', numbers[other]), '+')} over {other}"
        rows.append([*row, gain])
    rows.append([
        "RL - control", *(_cell(_interval(numbers["rl"], m, numbers["control"]), "+")
                          for m in (*_METRICS, "catalogue_ndcg@10")), "",
    ])  # fmt: skip
    return _table(rows, headers)


def _steps_table(cells: _Cells, steps: Sequence[int]) -> str:
    rows = []
    for k in steps:
        no_rl, rl, control = (cells.numbers(v, {"steps": k}) for v in ("tcl", "rl", "control"))
        rows.append(
            [
                str(k),
                *(_cell(_interval(n, "ndcg@5")) for n in (no_rl, rl, control)),
                _cell(_interval(rl, "ndcg@5", no_rl), "+"),
                _cell(_interval(rl, "ndcg@5", control), "+"),
            ]
        )
    headers = ["K", "NDCG@5 without RL", "with RL", "control", "RL - no RL", "RL - control"]
    return _table(rows, headers)


def _search_table(cells: _Cells) -> str:
    """Lay out what a user's own searches are worth to each model of the ablation."""
    groups = ("all", "repeat", "new")
    rows = []
    for variant in _ABLATION:
        results = [cells.results[seed, cells.name(variant, {})] for seed in cells.seeds]
        found = [result["searches"] for result in results if "searches" in result]
        if not found:
            continue  # it reads none
        for than, title in (("others", "those of other users"), ("none", "none")):
            means = [
                {
                    row["targets"]: row["mean"]
                    for row in effects[than]
                    if (row["protocol"], row["metric"]) == ("sampled", "ndcg@5")
                }
                for effects in found
            ]
            shown = (_cell(across_seeds(m[group] for m in means), "+") for group in groups)
            rows.append([f"{VARIANTS[variant].title}, {title}", *shown])
    return _table(rows, ["model", *groups])


def _paper_rows(cells: _Cells, steps: Sequence[int]) -> list[dict[str, Any]]:
    points: list[tuple[str, str, Change]] = [("ablation", v, {}) for v in _ABLATION]
    points += [("steps", v, {"steps": k}) for k in steps for v in ("tcl", "rl", "control")]
    rows = []
    for table, variant, change in points:
        k = 0 if variant == "base" else change.get("steps", cells.job.model.steps)
        numbers = cells.numbers(variant, change)
        for metric in numbers[0]:
            key = {"table": table, "steps": k, "variant": variant, "metric": metric}
            rows.append({**key, **_interval(numbers, metric)._asdict()})
    return rows


def _mean_distances(cells: _Cells) -> dict[str, dict[str, Any]]:
    """Average the distances of the ablation's models over seeds."""
    means = {}
    for variant in _ABLATION:
        name = cells.name(variant, {})
        found = [cells.results[seed, name]["distances"] for seed in cells.seeds]
        means[variant] = {
            "title": VARIANTS[variant].title,
            "distances": {
                state: np.mean([d[state] for d in found], 0).tolist() for state in found[0]
            },
        }
    return means


def _distance_table(distances: dict[str, dict[str, Any]]) -> str:
    titles = {"h": "after cross-attention", "a": "before it"}
    n = max(len(result["distances"]["h_rec"]) for result in distances.values())
    rows = []
    for result in distances.values():
        for state, values in result["distances"].items():
            kind, stream = state.split("_")
            if not values:
                continue
            cells = [""] * (kind == "a") + [f"{value:.3f}" for value in values]
            rows.append([result["title"], stream, titles[kind], *cells])
    return _table(rows, ["model", "stream", "state", *(f"k={k}" for k in range(n))])


def forward_latency(
    job: Job, steps: Sequence[int], users: Sequence[int] = (1, 256), n_rounds: int = 100
) -> list[dict[str, Any]]:
    """Time a forward over 100 candidates of test users, K by K.

    The variants take turns, on several batches, so what disturbs one disturbs all. ``ms`` is a
    median with its 95 % interval, and so is ``ratio``, a turn's time to that of the smallest K.
    """
    data, device = job.data, torch.device(job.device)
    models = {}
    for k in steps:
        torch.manual_seed(0)
        models[k] = attach_text(LCRSER(job.model.replace(steps=k)).to(device), data).eval()
    batcher = make_batcher(data, "test", next(iter(models.values())))
    samples, rng = batcher.samples, np.random.default_rng(0)

    def draw(n: int) -> Batch:
        rows = rng.integers(len(samples), size=n)
        negatives = rng.integers(1, data.n_items + 1, (n, 99))
        return batcher.gather(rows, *with_target(samples.items[rows], negatives)).to(device)

    def run(model: LCRSER, batch: Batch) -> float:
        start = time.perf_counter()
        model(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    rows = []
    with torch.inference_mode():
        for n in users:
            batches = [draw(n) for _ in range(4)]
            times: dict[int, list[float]] = {k: [] for k in steps}
            for turn in range(n_rounds + 2):  # the first two warm up
                for k, model in models.items():
                    seconds = run(model, batches[turn % 4])
                    if turn > 1:
                        times[k].append(seconds)
            for k, mine in times.items():
                ms = _median(np.array(mine) * 1000)
                ratio = _median(np.array(mine) / np.array(times[min(times)]))
                rows.append({
                    "users": n, "steps": k, "ms": ms.mean, "low": ms.low, "high": ms.high,
                    "ratio": ratio.mean, "ratio_low": ratio.low, "ratio_high": ratio.high,
                    "rounds": n_rounds, "backend": _reasoning_backend(models[k]),
                })  # fmt: skip
    return rows


def _median(values: NDArray) -> Interval:
    """Median of repeated times [n] with its 95 % interval: of order statistics, for any law."""
    ordered, n = np.sort(values), len(values)
    reach = 0.98 * math.sqrt(n)  # 1.96 standard deviations of the count below the median
    low, high = max(math.floor(n / 2 - reach), 0), min(math.ceil(n / 2 + reach), n - 1)
    return Interval(float(np.median(values)), float(ordered[low]), float(ordered[high]), n)


def _reasoning_backend(model: LCRSER) -> str:
    lines = dict(line.split(": ", 1) for line in model.backend_report().splitlines())
    return lines["latent_reasoning"].split(" ")[0]


def _latency_table(latencies: list[dict[str, Any]]) -> str:
    users = list(dict.fromkeys(row["users"] for row in latencies))
    by_key = {(row["users"], row["steps"]): row for row in latencies}
    headers = ["K"]
    for n in users:
        headers += [f"{n} user{'s' * (n > 1)}, ms", "ratio"]
    rows = []
    for k in dict.fromkeys(row["steps"] for row in latencies):
        row = [str(k)]
        for n in users:
            found = by_key[n, k]
            row += [
                f"{found['ms']:.2f} [{found['low']:.2f}, {found['high']:.2f}]",
                f"{found['ratio']:.2f}x [{found['ratio_low']:.2f}, {found['ratio_high']:.2f}]",
            ]
        rows.append([*row, found["backend"]])
    return _table(rows, [*headers, "reasoning on"])
