"""Study of accuracy against steps and time: fixed, adaptive and distilled depth."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcr_fast.experiments import plots
from lcr_fast.experiments.comparison import Job
from lcr_fast.experiments.depth import (
    ENDS,
    LOSS,
    METRIC,
    SeedModels,
    Stopped,
    best_fixed,
    gains_of,
    heading,
    named,
    open_seeds,
    shown,
    stop_by,
)
from lcr_fast.experiments.tables import markdown, write_rows, write_tables
from lcr_fast.experiments.timing import forward_times
from lcr_fast.model import LCRSER
from lcr_fast.training import adaptive
from lcr_fast.training.adaptive import LIST_RULES, SERVED, TITLES
from lcr_fast.training.ranks import Difference, spread

TARGET_STEPS = 0.6  # of those of the best fixed number, that it is to take at most
_CURVE_POINTS = 100


def _oracle(seeds: Sequence[SeedModels]) -> tuple[NDArray, float]:
    """Stop every test user as soon as its target ranks best: gains [seeds, n], mean steps."""
    gains = [seed.test.gains(METRIC) for seed in seeds]
    steps = [g.argmax(1).mean() for g in gains]
    return np.stack([g.max(1) for g in gains]), float(np.mean(steps))


def run_latency_study(job: Job, n_seeds: int) -> str:
    """Set accuracy against time and steps for fixed, adaptive and distilled depth.

    Writes ``results.csv``, ``rules.csv``, ``latency.csv``, ``results.md`` and plots.
    """
    seeds = open_seeds(job, n_seeds)
    K = job.model.steps
    best = best_fixed(seeds, K)
    served = stop_by(seeds, SERVED, loss=LOSS)
    assert served is not None  # all K steps, fixed, are always within the loss
    gains: dict[str, tuple[str, float, NDArray]] = {}  # title, steps, [seeds, n]

    def add(name: str, title: str, steps: float, values: NDArray) -> None:
        gains[name] = (title, steps, values)

    def of(name: str) -> NDArray:
        return np.stack([gains_of(seed.models[name], job.data) for seed in seeds])

    add("base", "Base (K = 0)", 0, of("base"))
    add("long", "Base, twice as long", 0, of("long"))
    for k in range(1, K + 1):
        add(f"k{k}", f"LCR, K = {k}", k, of(f"k{k}"))
    deep = np.stack([seed.test.gains(METRIC) for seed in seeds])  # [seeds, n, K + 1]
    for k in range(K + 1):
        add(f"deep{k}", f"every step supervised, read after {k}", k, deep[..., k])
    add("adaptive", "every step supervised, adaptive", served.steps, served.gains)
    add("distilled", "distilled into K = 0", 0, of("distilled"))
    times = forward_times(_timed(seeds[0], K), job.data)
    write_rows(job.out / "latency.csv", times)
    base, fixed = gains["base"][2], gains[best][2]
    rows = [
        {
            "model": name,
            "steps": steps,
            **named("ndcg@5", spread(values)),
            **named("less_base", spread(values - base)),
            **named("less_best_fixed", spread(values - fixed)),
        }
        for name, (_, steps, values) in gains.items()
    ]
    write_rows(job.out / "results.csv", rows)
    points = {name: (title, spread(values)) for name, (title, _, values) in gains.items()}
    plots.pareto(points, times, job.out / "pareto.png")
    rules = _rule_rows(seeds, fixed, TARGET_STEPS * gains[best][1])
    write_rows(job.out / "rules.csv", rules)
    plots.rule_curves(_curves(seeds), deep.mean((0, 1)), job.out / "rules.png")
    kept = gains["distilled"][2].mean() - base.mean(), fixed.mean() - base.mean()
    parts = [
        heading(job, n_seeds, "Accuracy, steps and time"),
        "### Models\n\n" + _model_table(gains, times, best),
        f"The best fixed number of steps by validation is that of {gains[best][0]}. Distilled "
        f"keeps {kept[0]:+.4f} of its {kept[1]:+.4f} over Base. Times are of one forward over 100 "
        f"candidates on this machine, seed {job.train.seed}, in turns: the median [95 % interval], "
        "and in the last column the mean over batches of the fastest turn, against that of the "
        "best fixed number.",
        f"### Rules for leaving early\n\nThresholds lose at most {LOSS} to the best fixed reading "
        "of the same model on validation, or take at most "
        f"{TARGET_STEPS:.0%} of the best fixed number's steps. Overlap, KL and entropy look at "
        "lists and are for comparison only. Differences are to the best fixed number.\n\n"
        + _rule_table(rules),
        _adaptive_line(served),
    ]
    return write_tables(job.out, parts)


def _timed(seed: SeedModels, K: int) -> dict[str, LCRSER]:
    """Give what is timed: Base, each K, adaptive and distilled of one seed."""
    head = adaptive.fit_confidence(seed.valid)
    choice = adaptive.choose(seed.valid, METRIC, SERVED, loss=LOSS, confidence=head)
    deep = seed.models["deep"]
    stopping = copy.copy(deep)  # the same tensors
    stopping.exits = choice.exits(seed.valid, head)
    names = ["base", *(f"k{k}" for k in range(1, K + 1)), "distilled"]
    return {name: seed.models[name] for name in names} | {"adaptive": stopping.eval()}


def _model_table(
    gains: Mapping[str, tuple[str, float, NDArray]], times: list[dict[str, Any]], best: str
) -> str:
    by_key = {(row["model"], row["users"]): row for row in times}
    users = list(dict.fromkeys(row["users"] for row in times))
    base = gains["base"][2]
    lines = []
    for name, (title, steps, values) in gains.items():
        line = [title, f"{steps:.2f}", f"{values.mean():.4f}"]
        line.append("" if name == "base" else shown(spread(values - base)))
        for n in users:
            row = by_key.get((name, n))
            if row is None:
                line += ["", ""]
                continue
            ratio = row["mean_ms"] / by_key[best, n]["mean_ms"]
            line += [f"{row['ms']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", f"{ratio:.2f}x"]
        lines.append(line)
    headers = ["model", "steps", "NDCG@5", "less Base"]
    for n in users:
        headers += [f"{n} user{'s' * (n > 1)}, ms", "mean"]
    return markdown(lines, headers)


def _rule_rows(seeds: Sequence[SeedModels], fixed: NDArray, most: float) -> list[dict[str, Any]]:
    """Measure every rule with either goal against the best fixed number, and the oracle.

    The goals are to lose ``LOSS`` at most, and to take ``most`` steps on average.
    """
    rows = []
    goals: tuple[tuple[str, dict[str, float]], ...] = (
        (f"loss {LOSS}", {"loss": LOSS}),
        (f"steps {most:.1f}", {"steps": most}),
    )
    for rule in (*SERVED, *LIST_RULES):
        for goal, asked in goals:
            found = stop_by(seeds, [rule], **asked)
            if found is None:
                continue
            rows.append(
                {
                    "rule": rule,
                    "goal": goal,
                    "steps": found.steps,
                    **named("less_best_fixed", spread(found.gains - fixed)),
                    **named("random_less_best_fixed", spread(found.at_random - fixed)),
                    **named("less_random", spread(found.gains - found.at_random)),
                }
            )
    best, steps = _oracle(seeds)
    nothing = dict.fromkeys(
        f"{name}{end}"
        for name in ("random_less_best_fixed", "less_random")
        for end in ("", *(f"_{end}" for end in ENDS))
    )
    rows.append({
        "rule": "oracle", "goal": "", "steps": steps,
        **named("less_best_fixed", spread(best - fixed)), **nothing,
    })  # fmt: skip
    return rows


def _rule_table(rows: list[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any], name: str) -> str:
        if row[name] is None:
            return ""
        ends = {end: row[f"{name}_{end}"] for end in ENDS}
        return shown(Difference(mean=row[name], n=0, seeds=0, **ends))

    compared = ("less_best_fixed", "random_less_best_fixed", "less_random")
    lines = [
        [
            TITLES.get(row["rule"], row["rule"]),
            row["goal"],
            f"{row['steps']:.2f}",
            *(cell(row, name) for name in compared),
        ]
        for row in rows
    ]
    headers = ["rule", "goal", "steps", "NDCG@5", "as many at random", "rule - random"]
    return markdown(lines, headers)


def _adaptive_line(found: Stopped) -> str:
    rules = ", ".join(f"{c.rule} ({c.threshold:.4g})" for c in found.choices)
    shares = ", ".join(f"{k}: {share:.1%}" for k, share in enumerate(found.shares))
    p95 = int(np.searchsorted(found.shares.cumsum(), 0.95))
    return (
        f"Adaptive, by seed: {rules}. Steps of the test users: mean {found.steps:.2f}, p95 {p95}; "
        f"{shares}."
    )


def _curves(seeds: Sequence[SeedModels]) -> dict[str, list[tuple[float, float]]]:
    """Trace every rule over its thresholds on the test users: (steps, metric).

    Where there are several seeds, the metric is their mean at as many steps, between thresholds
    along a straight line.
    """
    heads = [adaptive.fit_confidence(seed.valid) for seed in seeds]
    found = {}
    for rule in (*SERVED[1:], *LIST_RULES):
        traced = [
            np.array(sorted((c.steps, c.gain) for c in curve))
            for seed, head in zip(seeds, heads, strict=True)
            if (curve := adaptive.curve(rule, seed.test, METRIC, head))
        ]
        if len(traced) == 1:
            found[TITLES[rule]] = [(float(steps), float(gain)) for steps, gain in traced[0]]
        elif traced:
            fewest, most = max(t[0, 0] for t in traced), min(t[-1, 0] for t in traced)
            at = np.linspace(fewest, most, _CURVE_POINTS)
            mean = np.mean([np.interp(at, *t.T) for t in traced], 0)
            found[TITLES[rule]] = list(zip(at.tolist(), mean.tolist(), strict=True))
    return found
