"""The main job: train Base, LCR, +TCL and +RL on one data set, evaluate them side by side.

A folder a model with the rank of every test user, and in the job's folder ``results.csv`` (every
number), ``differences.csv`` (to Base, user by user), ``results.md`` (the tables) and the plots. A
job can be resumed: what is finished is read back.
"""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate

from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments import plots
from lcr_fast.model import LCRSER
from lcr_fast.storage import load_info, load_json, replacing, save_json
from lcr_fast.training import evaluation
from lcr_fast.training.baselines import TITLES
from lcr_fast.training.diversity import list_diversity
from lcr_fast.training.identity import is_of
from lcr_fast.training.ranks import RANKS, Ranks, differences
from lcr_fast.training.trainer import (
    CHECKPOINT,
    CHECKPOINT_KIND,
    METRICS,
    MODEL,
    OTHER_DATA,
    PHASE_2,
    Trainer,
    check_trainable,
    phase_1_fields,
    resume_conflicts,
)

Report = Callable[[str], None]
_EVALUATION, _JOB = "evaluation.json", "job.json"
_EVALUATION_KIND, _JOB_KIND = "evaluation", "job"
BASE, BASELINES = "base", "baselines"  # the variant that tables compare to; a folder of a job
NO_SEARCHES = "nosearch"  # the variant that says what searches are worth


def protocol_titles(n_negatives: int | str) -> dict[str, str]:
    """Say what each protocol ranks a target among, in the order of the tables."""
    return {
        "sampled": f"1 target + {n_negatives} sampled negatives",
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
    searches: bool = True  # trained and evaluated with searches to read

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
    NO_SEARCHES: Variant(
        "LCR, no searches", "supervised", None, steps=True, tcl=False, searches=False
    ),
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
    """Give a model the data's frozen text vectors of its ids, where its config asks for them."""
    config = model.config
    rows = {"item_text": config.n_items + 1, "query_text": config.n_queries + 1}
    model.set_text(**{
        name: data.arrays[name][:n]
        for name, n in rows.items()
        if getattr(config, f"{name}_dim") and name in data.arrays
    })  # fmt: skip
    return model


def load_model(
    path: Path,
    data: PreparedData,
    device: str,
    backend: str | None = None,
    *,
    any_data: bool = False,
) -> LCRSER:
    """Load a saved model and check that it is one of this data, or that the data continues its.

    Raises ValueError where the catalogue is another one, and without ``any_data`` where anything
    else of the data differs from what the model was trained on. Data that was prepared with the
    model's vocabulary may have more of everything (see ``identity``).
    """
    model = LCRSER.load(path, device=device, backend=backend)
    if not is_of(model, data):
        if model.config.n_items != data.n_items:
            raise ValueError(
                f"{path}: the model knows {model.config.n_items} items, the data has "
                f"{data.n_items}, and its ids do not go on with the model's (prepare --vocabulary)"
            )
        if not any_data:
            known = OTHER_DATA if model.data_fingerprint else "it does not say of which data it is"
            raise ValueError(f"{path}: {known}")
    return attach_text(model, data)


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
    any_data: bool = False  # resume although the folder's models are of other data
    protocols: Sequence[str] = evaluation.PROTOCOLS
    catalogue_users: int | None = None  # as evaluation.catalogue_rows takes it
    report: Report = lambda line: None
    measures: tuple[str, ...] = ("distances", "relevance", "searches")
    last_measures: tuple[str, ...] = ()  # of phase 2's last weights too, whatever validation keeps

    @property
    def ranking(self) -> dict[str, Any]:
        """How test users are ranked: options of :func:`evaluation.rank_split`."""
        return {"protocols": list(self.protocols), "catalogue_users": self.catalogue_users}

    def check(self, objectives: Iterable[str]) -> None:
        """Raise ValueError, before anything is written, where training or evaluation would fail."""
        if not len(self.data.split("test")):
            raise ValueError("the data has no test samples")
        evaluation.catalogue_rows(self.data, "test", self.catalogue_users)
        check_trainable(self.data, self.train, objectives)

    def open(self) -> None:
        """Note down data and configs, or raise ValueError where a job with others is resumed."""
        job = {
            "data": self.data.manifest.get("fingerprint"),
            "model": self.model.to_dict(),
            "train": self.train.to_dict(),
        }
        path = self.out / _JOB
        if self.resume and path.is_file():
            self._check_same_job(load_json(path, _JOB_KIND), job)
        save_json(path, _JOB_KIND, job)

    def _check_same_job(self, saved: dict[str, Any], job: dict[str, Any]) -> None:
        """Raise ValueError where what was trained would not be what the configs say now.

        No table may mix two data sets, nor two configs. What has not begun may change.
        """
        if not self.any_data and saved["data"] != job["data"]:
            raise ValueError(f"{self.out}: cannot resume, {OTHER_DATA}")
        checkpoints = sorted(self.out.rglob(CHECKPOINT))
        runs = [load_info(path, CHECKPOINT_KIND) for path in checkpoints]
        changed = {
            section: [
                f for f, value in _plain(job[section]).items() if saved[section].get(f) != value
            ]
            for section in ("model", "train")
        }
        if not runs or not (changed["model"] or changed["train"]):
            return
        in_phase_2 = any(info["objective"] != "supervised" for info in runs)
        now = {f: _plain(job["train"])[f] for f in changed["train"]}
        refused = [*changed["model"]]
        # Phase 2 starts from what phase 1 came to, so that is final then.
        refused += [f for f in now if in_phase_2 and f not in PHASE_2]
        refused += [f for info in runs for f in resume_conflicts(info, {**info["train"], **now})]
        if refused:
            names = ", ".join(dict.fromkeys(refused))
            raise ValueError(f"{self.out / _JOB}: cannot resume, the config differs in {names}")
        changes = ", ".join(f"{f} {saved['train'].get(f)} -> {value}" for f, value in now.items())
        kept = ", ".join(str(path.parent.relative_to(self.out)) for path in checkpoints)
        self.report(f"resuming with {changes}; kept and gone on from: {kept}")

    def cell(
        self,
        name: str,
        title: str,
        objective: str,
        *,
        start: str | None = None,
        model: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        searches: bool = True,
    ) -> dict[str, Any]:
        """Train from the cell ``start`` or from scratch, evaluate, and return all results.

        ``model`` and ``train`` change the job's configs; without ``searches`` there are none to
        read. With ``resume`` what is finished is read
        back. The result holds ``ranks``, :class:`~lcr_fast.training.ranks.Ranks` of the test users,
        and what they are worth as ``rows``.
        """
        if not searches:
            without = replace(
                self, data=self.data.without_searches(),
                measures=tuple(name for name in self.measures if name != "searches"),
            )  # fmt: skip
            return without.cell(name, title, objective, start=start, model=model, train=train)
        self.report(f"{title}:")
        last = set(self.last_measures) if objective != "supervised" else set()
        folder = self.out / name
        training = self.train.replace(**train or {})
        values = training.to_dict()
        of = {
            "data": self.data.manifest.get("fingerprint"),
            "train": phase_1_fields(values) if objective == "supervised" else values,
            "ranking": self.ranking,
        }
        if self.resume and (folder / _EVALUATION).is_file() and (folder / RANKS).is_file():
            result = load_json(folder / _EVALUATION, _EVALUATION_KIND)
            if not self.any_data and result["of"]["data"] != of["data"]:
                raise ValueError(f"{folder / _EVALUATION}: cannot resume, {OTHER_DATA}")
            complete = result.keys() >= set(self.measures) and result["last"].keys() >= last
            if complete and result["of"] == _plain(of) | {"data": result["of"]["data"]}:
                self.report("  already evaluated")
                return result | {"ranks": Ranks.load(folder / RANKS)}
        if start:
            network = load_model(
                self.out / start / MODEL, self.data, self.device, any_data=self.any_data
            )
        else:
            torch.manual_seed(training.seed)
            network = LCRSER(self.model.replace(**model or {})).to(self.device)
            network = attach_text(network, self.data)
        trainer = Trainer(
            network, self.data, training, objective, folder,
            resume=self.resume, any_data=self.any_data, report=self.report,
        )  # fmt: skip
        network = trainer.train()
        measured_last = {name: _MEASURES[name](network, self) for name in sorted(last)}
        network = trainer.run()
        ranks = evaluation.rank_model(network, self.data, **self.ranking)
        ranks.save(folder / RANKS)
        result = {
            "title": title,
            "seconds": trainer.progress.seconds,
            "history": trainer.progress.history,
            "rows": ranks.rows(),
            **{name: _MEASURES[name](network, self) for name in self.measures},
            "last": measured_last,
            "of": of,
        }
        save_json(folder / _EVALUATION, _EVALUATION_KIND, result)
        self.report(f"  {folder / MODEL}, {folder / METRICS}")
        return result | {"ranks": ranks}


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Give a dictionary as JSON reads it back: a tuple in it as a list."""
    return json.loads(json.dumps(value))


# What a cell can hold beside its training history and its ranks, and how it is measured.
_MEASURES: dict[str, Callable[[LCRSER, Job], Any]] = {
    "rows": lambda model, job: evaluation.rank_model(model, job.data, **job.ranking).rows(),
    "distances": lambda model, job: evaluation.state_distances(model, job.data),
    "relevance": lambda model, job: evaluation.relevance_share(model, job.data)._asdict(),
    "searches": lambda model, job: evaluation.search_effects(
        model, job.data, protocols=job.protocols
    ),
    "diversity": lambda model, job: list_diversity(model, job.data)._asdict(),
}


def baseline_results(data: PreparedData, **ranking: Any) -> dict[str, dict[str, Any]]:
    """Evaluate every baseline on the test users: results as those of :meth:`Job.cell`, by name.

    ``ranking`` are options of :func:`evaluation.rank_split`.
    """
    return {
        name: {"title": TITLES[name], "ranks": ranks, "rows": ranks.rows()}
        for name, ranks in evaluation.rank_baselines(data, **ranking).items()
    }


def run_comparison(job: Job, variants: list[str]) -> str:
    """Train, evaluate and compare; write the results to the job's folder, return the tables."""
    cells = {name: VARIANTS[name] for name in with_requirements(variants)}
    job.check(variant.objective for variant in cells.values())
    job.open()
    results = baseline_results(job.data, **job.ranking)
    for name, result in results.items():
        result["ranks"].save(job.out / BASELINES / name / RANKS)
    for name, variant in cells.items():
        results[name] = job.cell(
            name, variant.title, variant.objective, start=variant.start,
            model=variant.model_changes, train=variant.train_changes, searches=variant.searches,
        )  # fmt: skip
    if NO_SEARCHES in results and "searches" in results.get("lcr", {}):
        searched = evaluation.searched(job.data, "test")
        pair = [results[name]["ranks"].restricted(searched) for name in ("lcr", NO_SEARCHES)]
        effects = results["lcr"]["searches"]
        protocols = {row["protocol"] for row in effects["none"]}  # the catalogue is none of them
        effects["training"] = [
            row for row in differences([(pair[0], pair[1])]) if row["protocol"] in protocols
        ]
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


def _value(result: dict[str, Any], protocol: str, targets: str, metric: str) -> dict | None:
    key = {"protocol": protocol, "targets": targets, "metric": metric}
    return next((r for r in result["rows"] if all(r[k] == v for k, v in key.items())), None)


def _count(result: dict[str, Any], protocol: str) -> int:
    return (_value(result, protocol, "all", "mrr") or {}).get("n", 0)


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
    ranks = next(iter(results.values()))["ranks"]
    titles = {
        protocol: _of_some(title, ranks, protocol)
        for protocol, title in protocol_titles(ranks.n_negatives).items()
        if protocol in ranks.by_protocol
    }
    tables = [_main_table(results, titles)]
    compared = {
        name: {"title": results[name]["title"], "rows": rows} for name, rows in changes.items()
    }
    for protocol, title in titles.items():
        tables.append(f"NDCG@5, {title}:\n\n" + strata_table(results, protocol))
        if compared:
            tables.append(
                f"NDCG@5 less that of {results[BASE]['title']}, user by user, {title}:\n\n"
                + strata_table(compared, protocol, sign="+")
            )
    return tables + _search_tables(results, titles)


def _of_some(title: str, ranks: Ranks, protocol: str) -> str:
    """Add to a title how many users it is about, where the catalogue is not ranked for all."""
    n, n_all = int((ranks.by_protocol[protocol] > 0).sum()), len(ranks.by_protocol[protocol])
    some = protocol == "catalogue" and n < n_all
    return f"{title}, {n:,} of {n_all:,} users, the same for every model" if some else title


def _search_tables(results: dict[str, dict[str, Any]], titles: dict[str, str]) -> list[str]:
    """Lay out what a user's own searches are worth to every model, a table a protocol."""
    effects = {
        f"{name}-{than}": {"title": f"{result['title']}, {title}", "rows": result["searches"][than]}
        for name, result in results.items()
        if "searches" in result
        for than, title in (
            ("others", "those of other users"), ("none", "none"), ("training", "none, as trained"),
        )
        if than in result["searches"]
    }  # fmt: skip
    protocols = {row["protocol"] for effect in effects.values() for row in effect["rows"]}
    return [
        "NDCG@5 with a user's own searches less that of the same model with others, users that "
        f"searched, {title}:\n\n" + strata_table(effects, protocol, sign="+")
        for protocol, title in titles.items()
        if protocol in protocols
    ]


def _main_table(results: dict[str, dict[str, Any]], titles: dict[str, str]) -> str:
    columns = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr")
    main, first = next(iter(titles)), next(iter(results.values()))
    headers = ["model", *(name.upper() for name in columns)]
    ranked = (first["ranks"].by_protocol.get("catalogue", np.ones(1)) > 0).all()
    with_catalogue = main != "catalogue" and "catalogue" in titles
    if with_catalogue:
        n = _count(first, "catalogue")
        headers.append("NDCG@10, catalogue" if ranked else f"NDCG@10, catalogue (n={n:,})")
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
            _cell(_value(result, main, "all", name), interval=name == "ndcg@5") for name in columns
        ]
        if with_catalogue:
            row.append(_cell(_value(result, "catalogue", "all", "ndcg@10"), interval=not ranked))
        if trained:
            row.append(f"{result['seconds']:.0f}" if "seconds" in result else "")
        if with_truth:
            shares = result.get("relevance", {})
            for name in ("target", "cross"):
                share = shares.get(name, float("nan"))
                row.append(f"{share:.3f}" if share == share else "")
        rows.append(row)
    title = f"Test, {_count(first, main):,} users, {titles[main]}, [95 % bootstrap interval]:\n\n"
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
