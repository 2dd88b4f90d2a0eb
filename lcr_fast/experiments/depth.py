"""How many steps, what remains without them, and for whom: studies of one set of models.

On the same data a seed trains Base (K = 0), Base for as long as a teacher and its student together,
LCR for each K, LCR with every step supervised, and a student of K = 0. Of the supervised one there
are, besides all K steps, the models that stop after fewer: at a fixed number (after none: trained
with the steps, never stepped) or by a rule that validation chooses.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor

from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments import plots
from lcr_fast.experiments.comparison import VARIANTS, Job
from lcr_fast.experiments.distill import distill
from lcr_fast.experiments.latency import forward_times
from lcr_fast.experiments.tables import BASE, protocol_titles, write_rows
from lcr_fast.model import LCRSER
from lcr_fast.reference.transformer import zero_padding
from lcr_fast.storage import replacing
from lcr_fast.training import adaptive
from lcr_fast.training.adaptive import LIST_RULES, SERVED, TITLES, Choice, Depths
from lcr_fast.training.diversity import tail_items
from lcr_fast.training.evaluation import make_batcher, rank_model, with_target
from lcr_fast.training.models import fit_config, load_model
from lcr_fast.training.ranks import (
    RANKS,
    Difference,
    Ranks,
    samples_digest,
    spread,
    weighted_metric,
)
from lcr_fast.training.trainer import MODEL

METRIC = "ndcg@5"
DEEP_SUPERVISION = 0.3  # where the config has none
LOSS = 0.002  # that an adaptive model may lose on validation
TARGET_STEPS = 0.6  # of those of the best fixed number, that it is to take at most
_CURVE_POINTS = 100
_SEARCH_BINS = ((0, 0), (1, 5), (6, 10), (11, 15), (16, np.inf))
_NOISE_EDGES = (0.0, 1 / 3, 1 / 2, 2 / 3, 1.0)  # shares of the searches read


class SeedModels(NamedTuple):
    """The models of one seed, and what the deep one has after each number of steps."""

    models: dict[str, LCRSER]  # base, long, k1 .. kK, deep, distilled
    valid: Depths  # of deep
    test: Depths
    valid_scores: dict[str, float]  # of the models, METRIC on the validation users


def train_models(job: Job, seed: int) -> SeedModels:
    """Train, or with ``resume`` read back, the models of a seed."""
    job = dataclasses.replace(
        job,
        out=job.out / f"seed-{seed}",
        train=job.train.replace(seed=seed),
        measures=(),
        last_measures=(),
        protocols=("sampled",),
    )
    K, train = job.model.steps, {"tcl_weight": 0.0}
    weight = job.train.deep_supervision or DEEP_SUPERVISION
    cells: dict[str, tuple[str, int, dict[str, Any]]] = {"base": ("Base (K = 0)", 0, train)}
    cells |= {f"k{k}": (f"LCR, K = {k}", k, train) for k in range(1, K + 1)}
    cells["deep"] = (f"LCR, K = {K}, every step supervised", K, {"deep_supervision": weight})
    cells["long"] = ("Base, twice as long", 0, {"epochs": 2 * job.train.epochs})
    for name, (title, steps, changes) in cells.items():
        changes = {"deep_supervision": 0.0, **train, **changes}
        job.cell(name, f"seed {seed}, {title}", "supervised", model={"steps": steps}, train=changes)
    models = {
        name: load_model(job.out / name / MODEL, job.data, job.device, any_data=job.any_data)
        for name in cells
    }
    job.report(f"seed {seed}, student of K = 0:")
    models["distilled"] = distill(
        models["deep"], job.data, job.train.replace(deep_supervision=0.0, **train), 0,
        job.out / "distilled", resume=job.resume, any_data=job.any_data, report=job.report,
    )  # fmt: skip
    scores = {
        name: float(_gains(model, job.data, "valid").mean()) for name, model in models.items()
    }
    depths = {split: adaptive.read_depths(models["deep"], job.data, split) for split in _SPLITS}
    return SeedModels(models, depths["valid"], depths["test"], scores)


_SPLITS = ("valid", "test")


def _gains(model: LCRSER, data: PreparedData, split: str = "test") -> NDArray:
    """Measure every user of a split: [n]."""
    ranks = rank_model(model, data, split, protocols=("sampled",)).by_protocol["sampled"]
    return weighted_metric(ranks, METRIC)


def _best_fixed(seeds: Sequence[SeedModels], K: int) -> str:
    """Name the LCR of a single number of steps that validation likes best, over the seeds."""
    names = ["base", *(f"k{k}" for k in range(1, K + 1))]
    return max(names, key=lambda name: np.mean([s.valid_scores[name] for s in seeds]))


# -- study latency --------------------------------------------------------------------------------


class Stopped(NamedTuple):
    """The deep model, stopped by a rule with thresholds of validation."""

    gains: NDArray  # [seeds, n] of the test users
    steps: float  # mean
    at_random: NDArray  # [seeds, n] expected, as many steps dealt to users at random
    shares: NDArray  # [K + 1] of the users, by steps, means over the seeds
    choices: list[Choice]  # a seed


def _stop(seeds: Sequence[SeedModels], rules: Sequence[str], **goal: float) -> Stopped | None:
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


def _oracle(seeds: Sequence[SeedModels]) -> tuple[NDArray, float]:
    """Stop every test user as soon as its target ranks best: gains [seeds, n], mean steps."""
    gains = [seed.test.gains(METRIC) for seed in seeds]
    steps = [g.argmax(1).mean() for g in gains]
    return np.stack([g.max(1) for g in gains]), float(np.mean(steps))


def run_latency_study(job: Job, n_seeds: int) -> str:
    """Set accuracy against time and steps for fixed, adaptive and distilled depth.

    Writes ``results.csv``, ``rules.csv``, ``latency.csv``, ``results.md`` and plots.
    """
    seeds = _open(job, n_seeds)
    K = job.model.steps
    best = _best_fixed(seeds, K)
    served = _stop(seeds, SERVED, loss=LOSS)
    assert served is not None  # all K steps, fixed, are always within the loss
    gains: dict[str, tuple[str, float, NDArray]] = {}  # title, steps, [seeds, n]

    def add(name: str, title: str, steps: float, values: NDArray) -> None:
        gains[name] = (title, steps, values)

    def of(name: str) -> NDArray:
        return np.stack([_gains(seed.models[name], job.data) for seed in seeds])

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
            **_named("ndcg@5", spread(values)),
            **_named("less_base", spread(values - base)),
            **_named("less_best_fixed", spread(values - fixed)),
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
        _head(job, n_seeds, "Accuracy, steps and time"),
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
    return _write(job.out, parts)


def _timed(seed: SeedModels, K: int) -> dict[str, LCRSER]:
    """Give what is timed: Base, each K, adaptive and distilled of one seed."""
    head = adaptive.fit_confidence(seed.valid)
    choice = adaptive.choose(seed.valid, METRIC, SERVED, loss=LOSS, confidence=head)
    deep = seed.models["deep"]
    stopping = LCRSER(deep.config).to(deep.head.target_weight.device)
    stopping.load_state_dict(deep.state_dict())
    stopping.set_text(deep.item_text, deep.query_text)
    stopping.exits = choice.exits(seed.valid, head)
    names = ["base", *(f"k{k}" for k in range(1, K + 1)), "distilled"]
    return {name: seed.models[name] for name in names} | {"adaptive": stopping.eval()}


_ENDS = ("low", "high", "seeds_low", "seeds_high")


def _named(name: str, found: Difference) -> dict[str, float]:
    return {name: found.mean} | {f"{name}_{end}": getattr(found, end) for end in _ENDS}


def _shown(found: Difference) -> str:
    text = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
    if not np.isnan(found.seeds_low):
        text += f", seeds [{found.seeds_low:+.4f}, {found.seeds_high:+.4f}]"
    return text


def _model_table(
    gains: Mapping[str, tuple[str, float, NDArray]], times: list[dict[str, Any]], best: str
) -> str:
    by_key = {(row["model"], row["users"]): row for row in times}
    users = list(dict.fromkeys(row["users"] for row in times))
    base = gains["base"][2]
    lines = []
    for name, (title, steps, values) in gains.items():
        line = [title, f"{steps:.2f}", f"{values.mean():.4f}"]
        line.append("" if name == "base" else _shown(spread(values - base)))
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
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


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
            found = _stop(seeds, [rule], **asked)
            if found is None:
                continue
            rows.append(
                {
                    "rule": rule,
                    "goal": goal,
                    "steps": found.steps,
                    **_named("less_best_fixed", spread(found.gains - fixed)),
                    **_named("random_less_best_fixed", spread(found.at_random - fixed)),
                    **_named("less_random", spread(found.gains - found.at_random)),
                }
            )
    best, steps = _oracle(seeds)
    nothing = dict.fromkeys(
        f"{name}{end}"
        for name in ("random_less_best_fixed", "less_random")
        for end in ("", *(f"_{end}" for end in _ENDS))
    )
    rows.append({
        "rule": "oracle", "goal": "", "steps": steps,
        **_named("less_best_fixed", spread(best - fixed)), **nothing,
    })  # fmt: skip
    return rows


def _rule_table(rows: list[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any], name: str) -> str:
        if row[name] is None:
            return ""
        ends = {end: row[f"{name}_{end}"] for end in _ENDS}
        return _shown(Difference(mean=row[name], n=0, seeds=0, **ends))

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
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


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


# -- study strata ---------------------------------------------------------------------------------


def user_strata(model: LCRSER, data: PreparedData, split: str = "test") -> dict[str, NDArray]:
    """Sort the users of a split into strata: masks [n] by "kind: stratum".

    Similarity is the cosine of the mean vectors of queries and of items read, the model's and where
    there are any the text's, in thirds of the users who have both; noise the share of the searches
    read that the data knows to be noise.
    """
    samples = data.split(split)
    searches = samples.search_end - data.search_offsets[samples.users]
    found = {"all: all": np.ones(len(samples), dtype=bool)}
    for kind, values in _similarities(model, data, split).items():
        known = values[~np.isnan(values)]
        edges = [-np.inf, *np.quantile(known, [1 / 3, 2 / 3]), np.inf] if len(known) else []
        for name, low, high in zip(("low", "middle", "high"), edges, edges[1:], strict=False):
            found[f"{kind}: {name}"] = (values > low) & (values <= high)
    for low, high in _SEARCH_BINS:
        name = f"{low}" if low == high else f"{low} or more" if high == np.inf else f"{low}-{high}"
        found[f"searches: {name}"] = (searches >= low) & (searches <= high)
    noise = _noise_share(model, data, split)
    for low, high in itertools.pairwise(_NOISE_EDGES):
        found[f"noise: to {high:.0%}"] = (noise > (low or -1)) & (noise <= high)
    repeat, tail = np.array(samples.repeat), tail_items(data)[samples.items]
    found |= {"target: repeat": repeat, "target: new": ~repeat}
    found |= {"target: head item": ~tail, "target: tail item": tail}
    return {name: member for name, member in found.items() if member.any()}


@torch.inference_mode()
def _similarities(model: LCRSER, data: PreparedData, split: str) -> dict[str, NDArray]:
    """Cosine of both histories' mean vectors, NaN without one of them: [n] by kind."""
    batcher = make_batcher(data, split, model)
    found: dict[str, list[NDArray]] = {}
    for start in range(0, len(batcher), 256):
        rows = np.arange(start, min(start + 256, len(batcher)))
        batch = batcher.gather(rows, *with_target(batcher.samples.items[rows], None))
        batch = batch.to(model.head.target_weight.device)
        queries = model.query_vectors(batch.search_queries, batch.search_terms)
        kinds = {"similarity": (queries, model.item_vectors(batch.rec_items))}
        texts = model.query_text, model.item_text
        if isinstance(texts[0], Tensor) and isinstance(texts[1], Tensor):
            kinds["text similarity"] = texts[0][batch.search_queries], texts[1][batch.rec_items]
        for kind, (asked, events) in kinds.items():
            cosine = torch.nn.functional.cosine_similarity(
                zero_padding(asked.double(), batch.search_lengths).sum(1),
                zero_padding(events.double(), batch.rec_lengths).sum(1),
            )
            both = (batch.search_lengths > 0) & (batch.rec_lengths > 0)
            found.setdefault(kind, []).append(cosine.where(both, torch.nan).cpu().numpy())
    return {kind: np.concatenate(parts) for kind, parts in found.items()}


def _noise_share(model: LCRSER, data: PreparedData, split: str) -> NDArray:
    """Share of noise among the searches that are read, NaN where it is unknown: [n]."""
    batcher = make_batcher(data, split, model)
    truth = batcher.relevant(np.arange(len(batcher)), model.config.max_search_len)
    n = (truth >= 0).sum(1)
    return np.where(n > 0, (truth == 0).sum(1) / np.maximum(n, 1), np.nan)


_COMPARED = {"lcr": "LCR", "distilled": "distilled", "adaptive": "adaptive"}


def run_strata_study(job: Job, n_seeds: int, worlds: Sequence[synthetic.World] = ()) -> str:
    """Say who gains: differences to Base by kind of user and target, and on other worlds.

    Of each of the ``worlds`` Base and LCR alone are trained. Writes ``strata.csv``, ``worlds.csv``,
    ``results.md`` and plots.
    """
    seeds = _open(job, n_seeds)
    best = _best_fixed(seeds, job.model.steps)
    served = _stop(seeds, SERVED, loss=LOSS)
    assert served is not None
    mean = {
        name: np.stack([_gains(seed.models[name], job.data) for seed in seeds])
        for name in ("base", best, "distilled")
    }
    base = mean["base"]
    gains = {"lcr": mean[best], "distilled": mean["distilled"], "adaptive": served.gains}
    strata = user_strata(seeds[0].models["base"], job.data)
    title = best.replace("k", "K = ") if best != "base" else "K = 0"
    parts = [
        _head(job, n_seeds, "Who gains"),
        f"LCR is that of {title}, which validation likes best.",
        _strata_part(strata, base, gains, _COMPARED, job.out),
    ]
    if worlds:
        parts.append("### Other worlds\n\n" + _worlds_part(job, n_seeds, worlds))
    return _write(job.out, parts)


def _strata_part(
    strata: Mapping[str, NDArray],
    base: NDArray,
    gains: Mapping[str, NDArray],
    titles: Mapping[str, str],
    out: Path,
) -> str:
    """Write differences to Base by stratum, rows and plot; return their table.

    ``base`` and ``gains`` are [seeds, n], ``strata`` masks [n].
    """
    rows, lines = [], []
    for name, member in strata.items():
        n, of_base = int(member.sum()), float(base[:, member].mean())
        line = [name, f"{n:,}", f"{of_base:.4f}"]
        for model, values in gains.items():
            less = spread((values - base)[:, member])
            row = {"stratum": name, "n": n, "base": of_base, "model": model}
            rows.append({**row, **_named("less_base", less)})
            line.append(_shown(less))
        lines.append(line)
    write_rows(out / "strata.csv", rows)
    plots.strata(rows, titles, out / "strata.png")
    headers = ["stratum", "users", "Base", *(f"{titles[name]} - Base" for name in gains)]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def run_strata_of_runs(
    runs: Sequence[Path], out: Path, data: PreparedData | None = None, *, any_data: bool = False
) -> str:
    """Say who gains in finished runs of ``lcr-fast train``, a seed each, whose users are pooled.

    Base is compared to the others of the ablation that all runs have. ``data`` is that of the runs;
    by default each has its own beside it. Strata are those of a run's Base model. Raises ValueError
    where a run has no Base, or nothing to compare it to.
    """
    names = [
        name
        for name in (BASE, "lcr", "tcl", "rl")
        if all((run / name / RANKS).is_file() for run in runs)
    ]
    if names[:1] != [BASE] or len(names) < 2:
        raise ValueError("every run must hold Base and one other model of the ablation")
    parts: list[tuple[dict[str, NDArray], dict[str, NDArray]]] = []
    for run in runs:
        mine = data or PreparedData.open(run / "data")
        model = load_model(run / BASE / MODEL, mine, "cpu", any_data=any_data)
        ranks = {name: Ranks.load(run / name / RANKS) for name in names}
        if any(r.samples != samples_digest(mine, "test") for r in ranks.values()):
            raise ValueError(f"{run}: its ranks are of other samples")
        gains = {
            name: weighted_metric(r.by_protocol["sampled"], METRIC) for name, r in ranks.items()
        }
        parts.append((user_strata(model, mine), gains))
    # Users of different data are no seeds of the same users: one row of all.
    gains = {name: np.concatenate([part[1][name] for part in parts])[None] for name in names}
    none = {run: np.zeros(len(part[1][BASE]), dtype=bool) for run, part in enumerate(parts)}
    strata = {
        name: np.concatenate([part[0].get(name, none[run]) for run, part in enumerate(parts)])
        for name in dict.fromkeys(name for part in parts for name in part[0])
    }
    titles = {name: VARIANTS[name].title for name in names[1:]}
    table = _strata_part(strata, gains.pop(BASE), gains, titles, out)
    head = f"Who gains: test NDCG@5 of {len(runs)} run{'s' * (len(runs) > 1)}, users pooled, "
    return _write(out, [head + "[95 % bootstrap interval over users].", table])


def _worlds_part(job: Job, n_seeds: int, worlds: Sequence[synthetic.World]) -> str:
    """Train Base and LCR on each world; write its rows and plot, return its table."""
    rows, lines = [], []
    for world in worlds:
        name = "disjoint" if world.disjoint else f"noise {world.noise:g}"
        out = job.out / "worlds" / name.replace(" ", "-")
        data = _world_data(world, out / "data", job.resume)
        mine = dataclasses.replace(
            job,
            data=data,
            model=fit_config(data, job.model),
            out=out,
            measures=(),
            protocols=("sampled",),
        )
        differences = []
        for seed in (job.train.seed + i for i in range(n_seeds)):
            part = dataclasses.replace(
                mine, out=out / f"seed-{seed}", train=job.train.replace(seed=seed)
            )
            gains = [
                weighted_metric(
                    part.cell(
                        cell, f"{name}, seed {seed}, {title}", "supervised",
                        model={"steps": steps},
                        train={"tcl_weight": 0.0, "deep_supervision": 0.0},
                    )["ranks"].by_protocol["sampled"], METRIC,
                )
                for cell, title, steps in (
                    ("base", "Base", 0), ("lcr", "LCR", job.model.steps),
                )
            ]  # fmt: skip
            differences.append((gains[0], gains[1] - gains[0]))
        base, values = (np.stack(part) for part in zip(*differences, strict=True))
        less = spread(values)
        rows.append({"world": name, "base": float(base.mean()), **_named("less_base", less)})
        lines.append([name, f"{base.mean():.4f}", _shown(less)])
    write_rows(job.out / "worlds.csv", rows)
    plots.worlds(rows, job.out / "worlds.png")
    return tabulate(
        lines,
        ["world", "Base", f"LCR (K = {job.model.steps}) - Base"],
        tablefmt="github",
        disable_numparse=True,
    )


def _world_data(world: synthetic.World, folder: Path, resume: bool) -> PreparedData:
    if resume and folder.is_dir():
        return PreparedData.open(folder)
    return prepare(synthetic.generate(world), folder, seed=world.seed)


# -- both -----------------------------------------------------------------------------------------


def _open(job: Job, n_seeds: int) -> list[SeedModels]:
    if not job.model.steps:
        raise ValueError("a study of depth needs steps of at least 1")
    job.check(["supervised"])
    job.open()
    return [train_models(job, job.train.seed + i) for i in range(n_seeds)]


def _head(job: Job, n_seeds: int, title: str) -> str:
    n = job.data.test_negatives.shape[1]
    seeds = "one seed" if n_seeds == 1 else f"each user's mean over {n_seeds} seeds"
    by_seed = "" if n_seeds == 1 else ", seeds [Student's t over the seeds' means]"
    return (
        f"{title}: test NDCG@5, {protocol_titles(n)['sampled']}; {seeds}, "
        f"[95 % bootstrap interval over users]{by_seed}."
    )


def _write(out: Path, parts: list[str]) -> str:
    text = "\n\n".join(parts)
    with replacing(out / "results.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    return text
