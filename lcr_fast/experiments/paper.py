"""Study of the paper's tables and figures: ablation, reasoning steps, distances, latency."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lcr_fast.experiments import plots
from lcr_fast.experiments.cells import METRICS, Cells, Change, finish, interval_of, text_of
from lcr_fast.experiments.comparison import VARIANTS, Job, baseline_results
from lcr_fast.experiments.tables import markdown, write_rows
from lcr_fast.experiments.timing import Draws, forward_seconds, median
from lcr_fast.model import LCRSER
from lcr_fast.training.models import attach_text
from lcr_fast.training.ranks import across_seeds

STEPS = (0, 1, 2, 3, 4, 5)
_ABLATION = tuple(VARIANTS)


def run_paper_study(job: Job, n_seeds: int, steps: Sequence[int] = STEPS) -> str:
    """Reproduce the shape of the paper's Table 3, Fig. 4 to 6 and Table 4; return the tables.

    Baselines and Base to +RL with its control; NDCG against the number of reasoning steps with and
    without RL; what a user's own searches are worth to a trained model; distance to the target per
    step; latency of a forward. Writes ``cells.csv``, ``results.csv``,
    ``distances.csv``, ``latency.csv``, ``results.md`` and plots.
    """
    steps = tuple(dict.fromkeys(steps))
    cells = Cells(job, n_seeds, [{"steps": k} for k in steps], ("searches",))
    for seed in cells.seeds:
        for variant in _ABLATION:
            cells.train(seed, variant, {})
        for k in steps:
            for variant in ("rl", "control"):
                cells.train(seed, variant, {"steps": k})
    titles = {"tcl": "without RL", "rl": "with RL", "control": "control: L_rank, same noise"}
    series = {
        variant: {
            m: [interval_of(cells.numbers(variant, {"steps": k}), m) for k in steps]
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
    rows = [
        {"variant": name, "state": state, "step": k + state.startswith("a"), "distance": value}
        for name, result in distances.items()
        for state, values in result["distances"].items()
        for k, value in enumerate(values)
    ]
    if rows:  # none where no user has events in both streams
        write_rows(job.out / "distances.csv", rows)
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
    return finish(job.out, cells, "The paper's ablation", parts, _paper_rows(cells, steps))


def _ablation_table(cells: Cells) -> str:
    headers = ["model", *(m.upper() for m in METRICS), "NDCG@10, catalogue", "NDCG@5, gain"]
    shown = [*(("sampled", metric) for metric in METRICS), ("catalogue", "ndcg@10")]
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
        row = [VARIANTS[variant].title, *(text_of(interval_of(mine, m)) for m in METRICS)]
        row.append(text_of(interval_of(mine, "catalogue_ndcg@10")))
        gain = ""
        if variant in before:
            other = before[variant]
            gain = f"{text_of(interval_of(mine, 'ndcg@5', numbers[other]), '+')} over {other}"
        rows.append([*row, gain])
    rows.append([
        "RL - control", *(text_of(interval_of(numbers["rl"], m, numbers["control"]), "+")
                          for m in (*METRICS, "catalogue_ndcg@10")), "",
    ])  # fmt: skip
    return markdown(rows, headers)


def _steps_table(cells: Cells, steps: Sequence[int]) -> str:
    rows = []
    for k in steps:
        no_rl, rl, control = (cells.numbers(v, {"steps": k}) for v in ("tcl", "rl", "control"))
        rows.append(
            [
                str(k),
                *(text_of(interval_of(n, "ndcg@5")) for n in (no_rl, rl, control)),
                text_of(interval_of(rl, "ndcg@5", no_rl), "+"),
                text_of(interval_of(rl, "ndcg@5", control), "+"),
            ]
        )
    headers = ["K", "NDCG@5 without RL", "with RL", "control", "RL - no RL", "RL - control"]
    return markdown(rows, headers)


def _search_table(cells: Cells) -> str:
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
            shown = (text_of(across_seeds(m[group] for m in means), "+") for group in groups)
            rows.append([f"{VARIANTS[variant].title}, {title}", *shown])
    return markdown(rows, ["model", *groups])


def _paper_rows(cells: Cells, steps: Sequence[int]) -> list[dict[str, Any]]:
    points: list[tuple[str, str, Change]] = [("ablation", v, {}) for v in _ABLATION]
    points += [("steps", v, {"steps": k}) for k in steps for v in ("tcl", "rl", "control")]
    rows = []
    for table, variant, change in points:
        k = 0 if variant == "base" else change.get("steps", cells.job.model.steps)
        numbers = cells.numbers(variant, change)
        for metric in numbers[0]:
            key = {"table": table, "steps": k, "variant": variant, "metric": metric}
            rows.append({**key, **interval_of(numbers, metric)._asdict()})
    return rows


def _mean_distances(cells: Cells) -> dict[str, dict[str, Any]]:
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
    return markdown(rows, ["model", "stream", "state", *(f"k={k}" for k in range(n))])


def forward_latency(
    job: Job, steps: Sequence[int], users: Sequence[int] = (1, 256), n_rounds: int = 100
) -> list[dict[str, Any]]:
    """Time a forward over 100 candidates of test users, K by K.

    The variants take turns, on several batches, so what disturbs one disturbs all. ``ms`` is a
    median with its 95 % interval, and so is ``ratio``, a turn's time to that of the smallest K.
    """
    data = job.data
    models = {}
    for k in steps:
        torch.manual_seed(0)
        models[k] = attach_text(LCRSER(job.model.replace(steps=k)).to(job.device), data).eval()
    draw = Draws(data, next(iter(models.values())))
    rows = []
    with torch.inference_mode():
        for n in users:
            batches = [draw(n) for _ in range(4)]
            times: dict[int, list[float]] = {k: [] for k in steps}
            for turn in range(n_rounds + 2):  # the first two warm up
                for k, model in models.items():
                    seconds = forward_seconds(model, batches[turn % 4])
                    if turn > 1:
                        times[k].append(seconds)
            for k, mine in times.items():
                ms = median(np.array(mine) * 1000)
                ratio = median(np.array(mine) / np.array(times[min(times)]))
                rows.append({
                    "users": n, "steps": k, "ms": ms.mean, "low": ms.low, "high": ms.high,
                    "ratio": ratio.mean, "ratio_low": ratio.low, "ratio_high": ratio.high,
                    "rounds": n_rounds, "backend": _reasoning_backend(models[k]),
                })  # fmt: skip
    return rows


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
    return markdown(rows, [*headers, "reasoning on"])
