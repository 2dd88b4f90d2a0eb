"""The main job: train Base, LCR, +TCL and +RL on one data set, evaluate them side by side.

A folder a model with the rank of every test user, and in the job's folder ``results.csv`` (every
number), ``differences.csv`` (to Base, user by user), ``results.md`` (the tables) and the plots. A
job can be resumed: what is finished is read back.
"""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lcr_fast.config import LCRConfig, TrainConfig, with_defaults
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments import plots
from lcr_fast.experiments.tables import BASE, result_tables, write_results, write_rows, write_tables
from lcr_fast.model import LCRSER
from lcr_fast.storage import load_info, load_json, save_json
from lcr_fast.training import analysis, evaluation
from lcr_fast.training.baselines import TITLES
from lcr_fast.training.diversity import list_diversity
from lcr_fast.training.idle import PHASE_2, Trained, changed, warn_of_idle
from lcr_fast.training.models import OTHER_DATA, attach_text, load_model
from lcr_fast.training.objective import check_deep_supervision
from lcr_fast.training.ranks import RANKS, Ranks, differences
from lcr_fast.training.trainer import (
    CHECKPOINT,
    CHECKPOINT_KIND,
    METRICS,
    MODEL,
    Trainer,
    check_trainable,
    phase_1_fields,
    resume_conflicts,
)

Report = Callable[[str], None]
EVALUATION, JOB = "evaluation.json", "job.json"
EVALUATION_KIND, JOB_KIND = "evaluation", "job"
BASELINES = "baselines"  # a folder of a job
NO_SEARCHES = "nosearch"  # the variant that says what searches are worth


class Variant(NamedTuple):
    """One row of the comparison."""

    title: str
    objective: str
    start: str | None  # the variant whose model is the starting point; None: a fresh one
    steps: bool  # latent reasoning or K = 0
    tcl: bool  # TCL in its own loss
    searches: bool = True  # reads searches and learns from them

    @property
    def model_changes(self) -> dict[str, Any]:
        """What the variant fixes of the job's LCRConfig."""
        steps = {} if self.steps else {"steps": 0}
        return steps if self.searches else {**steps, "max_search_len": 0}

    @property
    def train_changes(self) -> dict[str, Any]:
        """What the variant fixes of the job's TrainConfig."""
        tcl = {} if self.tcl else {"tcl_weight": 0.0}
        return tcl if self.searches else {**tcl, "align_queries": 0.0}

    @property
    def trained(self) -> Trained:
        """How it is trained, and all that it fixes."""
        return Trained(self.objective, self.model_changes | self.train_changes)


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
    given: Collection[str] | None = None  # options that were set; None: those that are no default
    protocols: Sequence[str] = evaluation.PROTOCOLS
    catalogue_users: int | None = None  # as evaluation.catalogue_rows takes it
    report: Report = lambda line: None
    measures: tuple[str, ...] = ("distances", "relevance", "searches")
    last_measures: tuple[str, ...] = ()  # of phase 2's last weights too, whatever validation keeps

    @property
    def ranking(self) -> dict[str, Any]:
        """How test users are ranked: options of :func:`evaluation.rank_split`."""
        return {"protocols": list(self.protocols), "catalogue_users": self.catalogue_users}

    @property
    def n_negatives(self) -> int:
        """How many stored negatives a test target has."""
        return self.data.test_negatives.shape[1]

    def of_seed(self, seed: int, **changes: Any) -> "Job":
        """Return the job of another seed, in a folder of its own in this one's."""
        train = self.train.replace(seed=seed)
        return replace(self, out=self.out / f"seed-{seed}", train=train, **changes)

    def seeds(self, n: int) -> range:
        """Return n seeds, from the config's on."""
        return range(self.train.seed, self.train.seed + n)

    def check(self, trained: Iterable[Trained]) -> None:
        """Raise ValueError, before anything is written, where training or evaluation would fail.

        Warns of options that act on none of the models.
        """
        trained = list(trained)
        if not len(self.data.split("test")):
            raise ValueError("the data has no test samples")
        evaluation.catalogue_rows(self.data, "test", self.catalogue_users)
        evaluation.check_protocols(self.data, "test", self.protocols)
        check_trainable(self.data, self.train, [each.objective for each in trained])
        check_deep_supervision(self.model, self.train)
        if self.train.capture and torch.device(self.device).type != "cuda":
            raise ValueError(f"capture=True needs a GPU, the device is {self.device}")
        given = changed(self.model, self.train) if self.given is None else self.given
        warn_of_idle(self.model, self.train, trained, given)

    def open(self) -> None:
        """Note down data and configs, or raise ValueError where a job with others is resumed."""
        job = {
            "data": self.data.manifest.get("fingerprint"),
            "model": self.model.to_dict(),
            "train": self.train.to_dict(),
        }
        path = self.out / JOB
        if self.resume and path.is_file():
            self._check_same_job(load_json(path, JOB_KIND), job)
        save_json(path, JOB_KIND, job)

    def _check_same_job(self, saved: dict[str, Any], job: dict[str, Any]) -> None:
        """Raise ValueError where what was trained would not be what the configs say now.

        No table may mix two data sets, nor two configs. What has not begun may change.
        """
        if not self.any_data and saved["data"] != job["data"]:
            raise ValueError(f"{self.out}: cannot resume, {OTHER_DATA}")
        configs = {"model": LCRConfig, "train": TrainConfig}
        before = {name: with_defaults(config, saved[name]) for name, config in configs.items()}
        checkpoints = sorted(self.out.rglob(CHECKPOINT))
        runs = [load_info(path, CHECKPOINT_KIND) for path in checkpoints]
        changed = {
            section: [f for f, value in _plain(job[section]).items() if values.get(f) != value]
            for section, values in before.items()
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
            raise ValueError(f"{self.out / JOB}: cannot resume, the config differs in {names}")
        changes = ", ".join(f"{f} {before['train'].get(f)} -> {value}" for f, value in now.items())
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
    ) -> dict[str, Any]:
        """Train from the cell ``start`` or from scratch, evaluate, and return all results.

        ``model`` and ``train`` change the job's configs. With ``resume`` what is finished is read
        back. The result holds ``ranks``, :class:`~lcr_fast.training.ranks.Ranks` of the test users,
        and what they are worth as ``rows``.
        """
        self.report(f"{title}:")
        config = self.model.replace(**model or {})
        measures = [m for m in self.measures if m != "searches" or config.max_search_len]
        last = set(self.last_measures) if objective != "supervised" else set()
        folder = self.out / name
        training = self.train.replace(**train or {})
        values = training.to_dict()
        of = {
            "data": self.data.manifest.get("fingerprint"),
            "train": phase_1_fields(values) if objective == "supervised" else values,
            "ranking": self.ranking,
        }
        if self.resume and (folder / EVALUATION).is_file() and (folder / RANKS).is_file():
            result = load_json(folder / EVALUATION, EVALUATION_KIND)
            if not self.any_data and result["of"]["data"] != of["data"]:
                raise ValueError(f"{folder / EVALUATION}: cannot resume, {OTHER_DATA}")
            complete = result.keys() >= {"readout", *measures} and result["last"].keys() >= last
            if complete and result["of"] == _plain(of) | {"data": result["of"]["data"]}:
                self.report("  already evaluated")
                return result | {"ranks": Ranks.load(folder / RANKS)}
        if start:
            network = load_model(
                self.out / start / MODEL, self.data, self.device, any_data=self.any_data
            )
        else:
            torch.manual_seed(training.seed)
            network = LCRSER(config).to(self.device)
            network = attach_text(network, self.data)
        trainer = Trainer(
            network, self.data, training, objective, folder,
            resume=self.resume, any_data=self.any_data, report=self.report, given=(),
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
            "readout": network.config.readout,
            "rows": ranks.rows(),
            **{name: _MEASURES[name](network, self) for name in measures},
            "last": measured_last,
            "of": of,
        }
        save_json(folder / EVALUATION, EVALUATION_KIND, result)
        self.report(f"  {folder / MODEL}, {folder / METRICS}")
        return result | {"ranks": ranks}


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Give a dictionary as JSON reads it back: a tuple in it as a list."""
    return json.loads(json.dumps(value))


# What a cell can hold beside its training history and its ranks, and how it is measured.
_MEASURES: dict[str, Callable[[LCRSER, Job], Any]] = {
    "rows": lambda model, job: evaluation.rank_model(model, job.data, **job.ranking).rows(),
    "distances": lambda model, job: analysis.state_distances(model, job.data),
    "relevance": lambda model, job: analysis.relevance_share(model, job.data)._asdict(),
    "searches": lambda model, job: analysis.search_effects(
        model, job.data, protocols=job.protocols
    ),
    "diversity": lambda model, job: list_diversity(model, job.data)._asdict(),
    "test_ranks": lambda model, job: (
        evaluation.rank_model(model, job.data, protocols=("sampled",))
        .by_protocol["sampled"]
        .tolist()
    ),
}


def baseline_results(data: PreparedData, **ranking: Any) -> dict[str, dict[str, Any]]:
    """Evaluate every baseline on the test users: results as those of :meth:`Job.cell`, by name.

    ``ranking`` are options of :func:`evaluation.rank_split`.
    """
    evaluation.check_protocols(data, "test", ranking.get("protocols", evaluation.PROTOCOLS))
    return {
        name: {"title": TITLES[name], "ranks": ranks, "rows": ranks.rows()}
        for name, ranks in evaluation.rank_baselines(data, **ranking).items()
    }


def run_comparison(job: Job, variants: list[str]) -> str:
    """Train, evaluate and compare; write the results to the job's folder, return the tables."""
    cells = {name: VARIANTS[name] for name in with_requirements(variants)}
    job.check(variant.trained for variant in cells.values())
    job.open()
    results = baseline_results(job.data, **job.ranking)
    for name, result in results.items():
        result["ranks"].save(job.out / BASELINES / name / RANKS)
    for name, variant in cells.items():
        results[name] = job.cell(
            name,
            variant.title,
            variant.objective,
            start=variant.start,
            model=variant.model_changes,
            train=variant.train_changes,
        )
    if NO_SEARCHES in results and "searches" in results.get("lcr", {}):
        searched = analysis.searched(job.data, "test")
        pair = [results[name]["ranks"].restricted(searched) for name in ("lcr", NO_SEARCHES)]
        effects = results["lcr"]["searches"]
        protocols = {row["protocol"] for row in effects["none"]}  # the catalogue is none of them
        effects["training"] = [
            row for row in differences([(pair[0], pair[1])]) if row["protocol"] in protocols
        ]
    changes = _differences(results)
    write_results(job.out / "results.csv", results)
    if changes:
        write_rows(job.out / "differences.csv", [
            {"model": name, "than": BASE, **row} for name, rows in changes.items() for row in rows
        ])  # fmt: skip
    tables = write_tables(job.out, result_tables(results, changes))
    models = {name: result for name, result in results.items() if name in VARIANTS}
    plots.learning_curves(models, job.out / "learning_curves.png")
    plots.target_distances(models, job.out / "target_distance.png")
    plots.metric_bars(results, job.out / "metrics.png")
    return tables


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
