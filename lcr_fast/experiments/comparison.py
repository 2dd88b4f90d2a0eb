"""The main job: train Base, LCR, +TCL and +RL on one data set, evaluate them side by side.

A folder a model with the rank of every test user, and in the job's folder ``results.csv`` (every
number), ``differences.csv`` (to Base, user by user), ``results.md`` (the tables) and the plots. A
job can be resumed: what is finished is read back.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments import plots
from lcr_fast.model import LCRSER
from lcr_fast.storage import replacing
from lcr_fast.training import evaluation
from lcr_fast.training.baselines import TITLES
from lcr_fast.training.diversity import list_diversity
from lcr_fast.training.ranks import RANKS, Ranks, differences
from lcr_fast.training.trainer import METRICS, MODEL, Trainer

Report = Callable[[str], None]
_EVALUATION, _JOB = "evaluation.json", "job.json"
BASE, BASELINES = "base", "baselines"  # the variant that tables compare to; a folder of a job
PROTOCOL_TITLES = {
    "sampled": "1 target + 99 sampled negatives",
    "impressions": "items shown with the target",
    "catalogue": "whole catalogue, seen items masked",
}


class Variant(NamedTuple):
    """One row of the comparison."""

    title: str
    objective: str
    start: str | None  # the variant whose model is the starting point; None: a fresh one
    steps: bool  # latent reasoning or K = 0
    tcl: bool  # TCL in its own loss

    @property
    def model_changes(self) -> dict[str, Any]:
        """What the variant fixes of the job's LCRConfig."""
        return {} if self.steps else {"steps": 0}

    @property
    def train_changes(self) -> dict[str, Any]:
        """What the variant fixes of the job's TrainConfig."""
        return {} if self.tcl else {"tcl_weight": 0.0}


VARIANTS = {
    "base": Variant("Base (K=0)", "supervised", None, steps=False, tcl=False),
    "lcr": Variant("LCR", "supervised", None, steps=True, tcl=False),
    "tcl": Variant("LCR+TCL", "supervised", None, steps=True, tcl=True),
    "rl": Variant("LCR+TCL+RL", "grpo", "tcl", steps=True, tcl=False),
    "control": Variant("Control: L_rank, same noise", "noisy", "tcl", steps=True, tcl=False),
}


def with_requirements(names: list[str]) -> list[str]:
    """Order variants, and add what they need: RL its start and its control.

    Raises ValueError for an unknown name.
    """
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    wanted = set(names)
    if "rl" in wanted:
        wanted.add("control")
    wanted |= {start for name in wanted if (start := VARIANTS[name].start)}
    return [name for name in VARIANTS if name in wanted]


def fit_config(data: PreparedData, config: LCRConfig) -> LCRConfig:
    """Fill in the sizes that the data determines: ids and text widths."""
    sizes = {
        "n_items": data.n_items,
        "n_users": data.n_users,
        "n_queries": data.n_queries,
        "n_terms": data.n_terms,
    }
    for kind in ("item", "query"):
        vectors = data.arrays.get(f"{kind}_text")
        sizes[f"{kind}_text_dim"] = 0 if vectors is None else vectors.shape[1]
    return config.replace(**sizes)


def attach_text(model: LCRSER, data: PreparedData) -> LCRSER:
    """Give a model the data's frozen text vectors, where its config asks for them."""
    config = model.config
    model.set_text(
        data.arrays.get("item_text") if config.item_text_dim else None,
        data.arrays.get("query_text") if config.query_text_dim else None,
    )
    return model


def load_model(path: Path, data: PreparedData, device: str, backend: str | None = None) -> LCRSER:
    """Load a saved model and check that it is one of this data.

    Raises ValueError where the catalogue is another one.
    """
    model = LCRSER.load(path, device=device, backend=backend)
    if model.config.n_items != data.n_items:
        raise ValueError(
            f"{path}: the model knows {model.config.n_items} items, the data has {data.n_items}"
        )
    return attach_text(model, data)


# What a cell can hold beside its training history and its ranks, and how it is measured.
_MEASURES: dict[str, Callable[[LCRSER, PreparedData], Any]] = {
    "rows": lambda model, data: evaluation.rank_model(model, data).rows(),
    "distances": evaluation.state_distances,
    "relevance": lambda model, data: evaluation.relevance_share(model, data)._asdict(),
    "searches": evaluation.search_effects,
    "diversity": lambda model, data: list_diversity(model, data)._asdict(),
}


@dataclass(frozen=True)
class Job:
    """One data set, one pair of configs and one folder: what all models of a job share.

    A cell is a model that is trained and evaluated in a folder of its own.
    """

    data: PreparedData
    model: LCRConfig
    train: TrainConfig
    out: Path
    device: str = "cpu"
    resume: bool = False
    report: Report = lambda line: None
    measures: tuple[str, ...] = ("distances", "relevance", "searches")
    last_measures: tuple[str, ...] = ()  # of phase 2's last weights too, whatever validation keeps

    def open(self) -> None:
        """Note down the configs, or raise ValueError where a job with others is resumed."""
        job = {"model": self.model.to_dict(), "train": self.train.to_dict()}
        if self.resume and (self.out / _JOB).is_file():
            _check_same_job(self.out / _JOB, job)
        with replacing(self.out / _JOB) as path:
            path.write_text(json.dumps(job, indent=2), encoding="utf-8")

    def cell(
        self,
        name: str,
        title: str,
        objective: str,
        *,
        start: str | None = None,
        model: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Train from the cell ``start`` or from scratch, evaluate, and return all results.

        ``model`` and ``train`` change the job's configs. With ``resume`` what is finished is read
        back. The result holds ``ranks``, :class:`~lcr_fast.training.ranks.Ranks` of the test users,
        and what they are worth as ``rows``.
        """
        self.report(f"{title}:")
        last = set(self.last_measures) if objective != "supervised" else set()
        folder = self.out / name
        if self.resume and (folder / _EVALUATION).is_file() and (folder / RANKS).is_file():
            result = json.loads((folder / _EVALUATION).read_text(encoding="utf-8"))
            if result.keys() >= set(self.measures) and result["last"].keys() >= last:
                self.report("  already evaluated")
                return result | {"ranks": Ranks.load(folder / RANKS)}
        training = self.train.replace(**train or {})
        if start:
            network = load_model(self.out / start / MODEL, self.data, self.device)
        else:
            torch.manual_seed(training.seed)
            network = LCRSER(self.model.replace(**model or {})).to(self.device)
            network = attach_text(network, self.data)
        trainer = Trainer(
            network, self.data, training, objective, folder, resume=self.resume, report=self.report
        )
        network = trainer.train()
        measured_last = {name: _MEASURES[name](network, self.data) for name in sorted(last)}
        network = trainer.run()
        ranks = evaluation.rank_model(network, self.data)
        ranks.save(folder / RANKS)
        result = {
            "title": title,
            "seconds": trainer.progress.seconds,
            "history": trainer.progress.history,
            "rows": ranks.rows(),
            **{name: _MEASURES[name](network, self.data) for name in self.measures},
            "last": measured_last,
        }
        with replacing(folder / _EVALUATION) as path:
            path.write_text(json.dumps(result), encoding="utf-8")
        self.report(f"  {folder / MODEL}, {folder / METRICS}")
        return result | {"ranks": ranks}


def baseline_results(data: PreparedData) -> dict[str, dict[str, Any]]:
    """Evaluate every baseline on the test users: results as those of :meth:`Job.cell`, by name."""
    return {
        name: {"title": TITLES[name], "ranks": ranks, "rows": ranks.rows()}
        for name, ranks in evaluation.rank_baselines(data).items()
    }


def run_comparison(job: Job, variants: list[str]) -> str:
    """Train, evaluate and compare; write the results to the job's folder, return the tables."""
    results = baseline_results(job.data)
    job.open()
    for name, result in results.items():
        result["ranks"].save(job.out / BASELINES / name / RANKS)
    for name in with_requirements(variants):
        variant = VARIANTS[name]
        results[name] = job.cell(
            name, variant.title, variant.objective, start=variant.start,
            model=variant.model_changes, train=variant.train_changes,
        )  # fmt: skip
    changes = _differences(results)
    tables = "\n\n".join(result_tables(results, changes))
    write_results(job.out / "results.csv", results)
    if changes:
        write_rows(job.out / "differences.csv", [
            {"model": name, "than": BASE, **row} for name, rows in changes.items() for row in rows
        ])  # fmt: skip
    with replacing(job.out / "results.md") as path:
        path.write_text(tables + "\n", encoding="utf-8")
    models = {name: result for name, result in results.items() if name in VARIANTS}
    plots.learning_curves(models, job.out / "learning_curves.png")
    plots.target_distances(models, job.out / "target_distance.png")
    plots.metric_bars(results, job.out / "metrics.png")
    return tables


def _check_same_job(path: Path, job: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError where a job is resumed with other configs: no table may mix two of them."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(job))
    changed = [
        key
        for section, values in ours.items()
        for key, value in values.items()
        if saved[section].get(key) != value
    ]
    if changed:
        raise ValueError(f"{path}: cannot resume, the config differs in {', '.join(changed)}")


def _value(result: dict[str, Any], protocol: str, targets: str, metric: str) -> dict | None:
    key = {"protocol": protocol, "targets": targets, "metric": metric}
    return next((r for r in result["rows"] if all(r[k] == v for k, v in key.items())), None)


def _cell(row: dict | None, interval: bool = False, sign: str = "") -> str:
    if row is None or not row["n"]:
        return ""
    text = f"{row['mean']:{sign}.3f}"
    if interval:
        text += f" [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"
    if row.get("seeds", 1) > 1:
        text += f", seeds [{row['seeds_low']:{sign}.3f}, {row['seeds_high']:{sign}.3f}]"
    return text


def _differences(results: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Compare every other row of the tables to Base, user by user; nothing where Base is not."""
    if BASE not in results:
        return {}
    base = results[BASE]["ranks"]
    return {
        name: differences([(result["ranks"], base)])
        for name, result in results.items()
        if name != BASE
    }


def result_tables(
    results: dict[str, dict[str, Any]], changes: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """Lay out results as Markdown: the main metrics, then NDCG@5 by protocol and kind of target.

    ``changes`` are the rows of :func:`~lcr_fast.training.ranks.differences` to Base, by model.
    """
    protocols = {r["protocol"] for r in next(iter(results.values()))["rows"]}
    tables = [_main_table(results)]
    compared = {
        name: {"title": results[name]["title"], "rows": rows} for name, rows in changes.items()
    }
    for protocol, title in PROTOCOL_TITLES.items():
        if protocol in protocols:
            tables.append(f"NDCG@5, {title}:\n\n" + strata_table(results, protocol))
            if compared:
                tables.append(
                    f"NDCG@5 less that of {results[BASE]['title']}, user by user, {title}:\n\n"
                    + strata_table(compared, protocol, sign="+")
                )
    return tables + _search_tables(results)


def _search_tables(results: dict[str, dict[str, Any]]) -> list[str]:
    """Lay out what a user's own searches are worth to every model, a table a protocol."""
    effects = {
        f"{name}-{than}": {"title": f"{result['title']}, {title}", "rows": result["searches"][than]}
        for name, result in results.items()
        if "searches" in result
        for than, title in (("others", "those of other users"), ("none", "none"))
    }
    protocols = {row["protocol"] for effect in effects.values() for row in effect["rows"]}
    return [
        "NDCG@5 with a user's own searches less that of the same model with others, users that "
        f"searched, {title}:\n\n" + strata_table(effects, protocol, sign="+")
        for protocol, title in PROTOCOL_TITLES.items()
        if protocol in protocols
    ]


def _main_table(results: dict[str, dict[str, Any]]) -> str:
    columns = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr")
    headers = ["model", *(name.upper() for name in columns), "NDCG@10, catalogue"]
    trained = any("seconds" in result for result in results.values())
    if trained:
        headers.append("seconds")
    chance = [r["relevance"]["chance"] for r in results.values() if "relevance" in r]
    with_truth = bool(chance) and chance[0] == chance[0]
    if with_truth:
        headers += [
            f"attention on relevant searches: of the target (chance {chance[0]:.3f})",
            "of the recommendation stream",
        ]
    rows = []
    for result in results.values():
        row = [result["title"]]
        row += [
            _cell(_value(result, "sampled", "all", name), interval=name == "ndcg@5")
            for name in columns
        ]
        row.append(_cell(_value(result, "catalogue", "all", "ndcg@10")))
        if trained:
            row.append(f"{result['seconds']:.0f}" if "seconds" in result else "")
        if with_truth:
            shares = result.get("relevance", {})
            for name in ("target", "cross"):
                share = shares.get(name, float("nan"))
                row.append(f"{share:.3f}" if share == share else "")
        rows.append(row)
    n = next(iter(results.values()))["rows"][0]["n"]
    title = f"Test, {n:,} users, 1 target + 99 sampled negatives, [95 % bootstrap interval]:\n\n"
    return title + tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def strata_table(
    results: dict[str, dict[str, Any]], protocol: str, *, metric: str = "ndcg@5", sign: str = ""
) -> str:
    """Lay out one metric by model and kind of target, with intervals."""
    groups = ("all", "repeat", "new", "covered", "uncovered")
    counts = {
        group: (_value(next(iter(results.values())), protocol, group, metric) or {}).get("n", 0)
        for group in groups
    }
    shown = [group for group in groups if counts[group]]
    headers = ["model", *(f"{group} (n={counts[group]:,})" for group in shown)]
    rows = [
        [
            result["title"],
            *(_cell(_value(result, protocol, group, metric), True, sign) for group in shown),
        ]
        for result in results.values()
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def write_results(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write every number of the results as CSV, atomically."""
    write_rows(
        path, [{"model": n, **row} for n, result in results.items() for row in result["rows"]]
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write dictionaries with the same keys as CSV, atomically."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
