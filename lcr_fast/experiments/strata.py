"""Study of who gains from the steps: by kind of user and target, and on other worlds."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments import plots
from lcr_fast.experiments.comparison import VARIANTS, Job
from lcr_fast.experiments.depth import (
    LOSS,
    METRIC,
    best_fixed,
    gains_of,
    heading,
    named,
    open_seeds,
    shown,
    stop_by,
)
from lcr_fast.experiments.tables import BASE, markdown, write_rows, write_tables
from lcr_fast.model import LCRSER
from lcr_fast.reference.transformer import zero_padding
from lcr_fast.training.adaptive import SERVED
from lcr_fast.training.diversity import tail_items
from lcr_fast.training.evaluation import make_batcher, sample_batches
from lcr_fast.training.models import fit_config, load_model
from lcr_fast.training.ranks import RANKS, Ranks, samples_digest, spread, weighted_metric
from lcr_fast.training.trainer import MODEL

_SEARCH_BINS = ((0, 0), (1, 5), (6, 10), (11, 15), (16, np.inf))
_NOISE_EDGES = (0.0, 1 / 3, 1 / 2, 2 / 3, 1.0)  # shares of the searches read


def user_strata(model: LCRSER, data: PreparedData, split: str = "test") -> dict[str, NDArray]:
    """Sort the users of a split into strata: masks [n] by "kind: stratum".

    Similarity is the cosine of the mean vectors of queries and of items read, the model's and where
    there are any the text's, in thirds of the users who have both; noise the share of the searches
    read that the data knows to be noise.
    """
    samples = data.split(split)
    _, searches = data.history_lengths(split)
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
    found: dict[str, list[NDArray]] = {}
    for batch in sample_batches(model, make_batcher(data, split, model)):
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
    seeds = open_seeds(job, n_seeds)
    best = best_fixed(seeds, job.model.steps)
    served = stop_by(seeds, SERVED, loss=LOSS)
    assert served is not None
    mean = {
        name: np.stack([gains_of(seed.models[name], job.data) for seed in seeds])
        for name in ("base", best, "distilled")
    }
    base = mean["base"]
    gains = {"lcr": mean[best], "distilled": mean["distilled"], "adaptive": served.gains}
    strata = user_strata(seeds[0].models["base"], job.data)
    title = best.replace("k", "K = ") if best != "base" else "K = 0"
    parts = [
        heading(job, n_seeds, "Who gains"),
        f"LCR is that of {title}, which validation likes best.",
        _strata_part(strata, base, gains, _COMPARED, job.out),
    ]
    if worlds:
        parts.append("### Other worlds\n\n" + _worlds_part(job, n_seeds, worlds))
    return write_tables(job.out, parts)


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
            rows.append({**row, **named("less_base", less)})
            line.append(shown(less))
        lines.append(line)
    write_rows(out / "strata.csv", rows)
    plots.strata(rows, titles, out / "strata.png")
    headers = ["stratum", "users", "Base", *(f"{titles[name]} - Base" for name in gains)]
    return markdown(lines, headers)


def run_strata_of_runs(
    runs: Sequence[Path], out: Path, data: PreparedData | None = None, *, any_data: bool = False
) -> str:
    """Say who gains in finished runs of ``lcr-fast train``, a seed each.

    Base is compared to the others of the ablation that all runs have. ``data`` is that of the runs;
    by default each has its own beside it. Users of different data are pooled; a user of several
    runs on the same data counts once, with the mean over these. Strata are those of the Base model
    of the first run on a user's data. Raises ValueError where a run has no Base, or nothing to
    compare it to.
    """
    names = [
        name
        for name in (BASE, "lcr", "tcl", "rl")
        if all((run / name / RANKS).is_file() for run in runs)
    ]
    if names[:1] != [BASE] or len(names) < 2:
        raise ValueError("every run must hold Base and one other model of the ablation")
    strata_of: dict[str, dict[str, NDArray]] = {}  # by the samples that runs share
    measured: dict[str, list[NDArray]] = {}  # a run's [models, n]
    for run in runs:
        mine = data or PreparedData.open(run / "data")
        ranks = {name: Ranks.load(run / name / RANKS) for name in names}
        samples = samples_digest(mine, "test")
        if any(r.samples != samples for r in ranks.values()):
            raise ValueError(f"{run}: its ranks are of other samples")
        if samples not in strata_of:
            model = load_model(run / BASE / MODEL, mine, "cpu", any_data=any_data)
            strata_of[samples] = user_strata(model, mine)
        gains = [weighted_metric(r.by_protocol["sampled"], METRIC) for r in ranks.values()]
        measured.setdefault(samples, []).append(np.stack(gains))
    if len(measured) == 1:
        ((samples, found),) = measured.items()
        by_model, strata = np.stack(found, 1), strata_of[samples]  # [models, seeds, n]
    else:
        # Users of different data are no seeds of the same users: one row of all.
        by_model = np.concatenate([np.mean(found, 0) for found in measured.values()], 1)[:, None]
        strata = {
            name: np.concatenate(
                [
                    of.get(name, np.zeros(of["all: all"].shape, dtype=bool))
                    for of in strata_of.values()
                ]
            )
            for name in dict.fromkeys(itertools.chain(*strata_of.values()))
        }
    all_gains = dict(zip(names, by_model, strict=True))
    titles = {name: VARIANTS[name].title for name in names[1:]}
    table = _strata_part(strata, all_gains.pop(BASE), all_gains, titles, out)
    head = f"Who gains: test NDCG@5 of {len(runs)} run{'s' * (len(runs) > 1)}, "
    head += "users pooled, " if len(measured) == len(runs) else "each user once, "
    return write_tables(out, [head + "[95 % bootstrap interval over users].", table])


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
        for seed in job.seeds(n_seeds):
            part = mine.of_seed(seed)
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
        rows.append({"world": name, "base": float(base.mean()), **named("less_base", less)})
        lines.append([name, f"{base.mean():.4f}", shown(less)])
    write_rows(job.out / "worlds.csv", rows)
    plots.worlds(rows, job.out / "worlds.png")
    return markdown(lines, ["world", "Base", f"LCR (K = {job.model.steps}) - Base"])


def _world_data(world: synthetic.World, folder: Path, resume: bool) -> PreparedData:
    if resume and folder.is_dir():
        return PreparedData.open(folder)
    return prepare(synthetic.generate(world), folder, seed=world.seed)
