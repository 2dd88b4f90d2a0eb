"""The training loop of every phase: early stopping, logs, atomic checkpoints, exact resume."""

import contextlib
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lcr_fast.capture import CudaGraph, Graph
from lcr_fast.config import LCRConfig, TrainConfig, with_defaults
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.profiling import range_
from lcr_fast.storage import load_tensors, replacing, save_tensors
from lcr_fast.training.captured import CapturedStep, Logged
from lcr_fast.training.distillation import Distilled
from lcr_fast.training.evaluation import chance_level, make_batcher, validation_score
from lcr_fast.training.identity import assign, count_unknown
from lcr_fast.training.idle import PHASE_2, Trained, own_options, warn_of_idle
from lcr_fast.training.inputs import Epoch, StepInputs, assemble
from lcr_fast.training.models import OTHER_DATA
from lcr_fast.training.objective import OBJECTIVES, Objective, warn_if_sinking
from lcr_fast.training.rows import RowAdamW, clip_gradients, merge_gradients, use_rows

_LOG = logging.getLogger("lcr_fast")
CHECKPOINT_KIND = "checkpoint"
VALIDATION = "valid_"  # how the name of the validation metric begins in a record of the history
_CHECKPOINT_SECONDS = 30.0  # between two checkpoints inside an epoch
_READOUTS = (0.0, 0.25, 0.5, 0.75, 1.0)
CHECKPOINT, MODEL, METRICS = "checkpoint.safetensors", "model.safetensors", "metrics.jsonl"
DISTILL = "distill"  # the objective that has a teacher
_CHECK_BLOCK = 4096  # samples whose seen items are counted at a time
# Fields that say how to compute, not what.
_HOW = ("capture", "workers")
# Fields that say nothing but when to stop, by phase.
_LIMITS = {1: ("epochs", "min_updates", "patience"), 2: ("rl_epochs", "patience")}


def _class_of(objective: str) -> type[Objective]:
    return Distilled if objective == DISTILL else OBJECTIVES[objective]


def phase_of(objective: str) -> int:
    """Tell the phase of an objective by its name; distillation counts as phase 1."""
    return _class_of(objective).phase


def check_trainable(data: PreparedData, config: TrainConfig, objectives: Iterable[str]) -> None:
    """Raise ValueError where training would fail, or choose its model blindly, later on."""
    objectives, samples = list(objectives), data.split("train")
    if not len(samples):
        raise ValueError("the data has no training samples")
    if not len(data.split("valid")):
        raise ValueError(
            "the data has no validation samples, by which the best epoch is chosen: prepare it "
            "from users with three targets or more, or with --split time"
        )
    chance_level(make_batcher(data, "valid", None), config.valid_metric)
    phases = {phase_of(name) for name in objectives}
    left, user = _fewest_unseen(data)
    if 1 in phases and config.negatives == "in_batch":
        if config.batch_size < 2:
            raise ValueError("negatives=in_batch needs a batch_size of at least 2, got 1")
    elif 1 in phases and not left:
        raise ValueError(
            f"user {user!r} has seen all {data.n_items} items before a target, so nothing is left "
            "to be a negative; prepare the data without that user"
        )
    if 2 in phases and config.rl_negatives > left:
        raise ValueError(
            f"rl_negatives must be at most {left} for this data, whose user {user!r} has no more "
            f"unseen items before a target, got {config.rl_negatives}"
        )
    for name in objectives if config.capture else ():
        if (obstacle := _class_of(name).capture_obstacle(config)) is not None:
            raise ValueError(f"capture=True cannot serve {name}: {obstacle}")


@functools.lru_cache(maxsize=1)  # one model after the other is trained on the same data
def _fewest_unseen(data: PreparedData) -> tuple[int, str]:
    """Find the training sample with the fewest items left to be negatives: how many, whose."""
    samples = data.split("train")
    counts = []
    for start in range(0, len(samples), _CHECK_BLOCK):
        rows = slice(start, start + _CHECK_BLOCK)
        users, items, times = samples.users[rows], samples.items[rows], samples.times[rows]
        offsets, _ = data.seen.before(users, times)
        counts.append(np.diff(offsets) + ~data.seen.has(users, items, times))  # and the target
    taken = np.concatenate(counts)
    most = int(taken.argmax())
    return data.n_items - int(taken[most]), data.users[int(samples.users[most])]


def phase_1_fields(train: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a config's values what phase 1 does not read."""
    return {name: value for name, value in train.items() if name not in PHASE_2}


def resume_conflicts(info: dict[str, Any], train: dict[str, Any]) -> list[str]:
    """Name the fields whose new values contradict what a run has done already.

    ``info`` is that of its checkpoint, ``train`` its config's new values. When to stop may change,
    as long as it lies ahead and no learning rate depends on it.
    """
    phase = phase_of(info["objective"])
    saved, progress = with_defaults(TrainConfig, info["train"]), Progress(**info["progress"])
    if phase == 1:
        saved, train = phase_1_fields(saved), phase_1_fields(train)
    fields = sorted((saved.keys() | train.keys()) - set(_HOW))
    changed = [f for f in fields if saved.get(f) != train.get(f)]
    falling = phase == 1 and saved["schedule"] != "constant" and (progress.epoch or progress.step)
    limits = ("patience",) if falling else _LIMITS[phase]
    conflicts = [name for name in changed if name not in limits]
    limit = "epochs" if phase == 1 else "rl_epochs"
    if limit in changed and not (phase == 1 and train["min_updates"]):
        done = progress.epoch + (progress.step > 0)
        conflicts += [limit] * (train[limit] < done and limit not in conflicts)
    return conflicts


@dataclass
class Progress:
    """Where a run stands; with the tensors of a checkpoint, all that a resume needs."""

    epoch: int = 0  # epochs completed
    step: int = 0  # steps completed in the current one
    best: float = -1.0  # best validation score
    stale: int = 0  # epochs since, once the best is above chance
    seconds: float = 0.0
    finished: bool = False
    readout: float | None = None  # chosen by validation at the end
    sums: dict[str, list[float]] = field(default_factory=dict)  # name -> [sum, count]
    history: list[dict[str, float]] = field(default_factory=list)  # one record an epoch


class Trainer:
    """Train a model on prepared data by one objective.

    ``objective`` is ``supervised`` (phase 1), ``distill`` (phase 1 beside a ``teacher``), ``grpo``
    (phase 2) or ``noisy`` (phase 2's control).
    The folder ``out`` receives the best model by the config's ``valid_metric``
    (``model.safetensors``), a checkpoint, and one JSON line an epoch in ``metrics.jsonl``; a
    TensorBoard log too where TensorBoard is installed. Files are replaced atomically, so a killed
    run leaves the last good ones. With ``resume`` a run continues from its checkpoint, bit for bit
    on CPU with the same number of threads (on which sums of torch's own ops may depend). It may go
    on for longer than it was to: what the config says of when to stop may change.

    Parameters that require no gradient when the model is given are not trained, nor are those that
    the objective leaves out; at the end each requires one as it did before.

    With the config's ``capture`` a step on a GPU is replayed as a CUDA graph, which ``graph`` makes
    (:mod:`lcr_fast.training.captured`), by torch's fused AdamW.

    It warns of options that were set and cannot act (:mod:`lcr_fast.training.idle`): of ``given``,
    by default those that differ from their defaults.

    Raises ValueError where the data cannot be trained on, where nothing is left to train or row 0
    of a table is not 0 (:meth:`LCRSER.check_padding`), and on a checkpoint of another run or,
    without ``any_data``, of other data.
    """

    def __init__(
        self,
        model: LCRSER,
        data: PreparedData,
        config: TrainConfig,
        objective: str,
        out: str | Path,
        *,
        resume: bool = False,
        any_data: bool = False,
        teacher: LCRSER | None = None,
        report: Callable[[str], None] = lambda line: None,
        graph: Callable[[], Graph] | None = None,
        given: Collection[str] | None = None,
    ) -> None:
        self.model, self.config, self.out, self.report = model, config, Path(out), report
        self._given = model.config  # the readout may change
        self.name = objective
        self.metric = VALIDATION + config.valid_metric
        check_trainable(data, config, [objective])
        if unknown := count_unknown(model.config, data):
            counts = ", ".join(f"{n:,} {kind}" for kind, n in unknown.items())
            raise ValueError(f"the model has no row for {counts} of the data: extend it first")
        model.check_padding()
        assign(model, data)
        model.exits = None  # they were chosen for the weights that now change
        # A graph has one shape: that of the longest histories.
        self.batcher = make_batcher(data, "train", model, trim=not config.capture)
        self.validation = make_batcher(data, "valid", model)
        self.chance = chance_level(self.validation, config.valid_metric)
        use_rows(model, config.tables == "rows")
        self.objective: Objective
        if teacher is None:
            self.objective = OBJECTIVES[objective](model, self.batcher, config)
        else:
            self.objective = Distilled(model, self.batcher, config, teacher)
        self.schedule = self.objective.schedule
        if (reason := self.objective.idle()) is not None:
            _LOG.warning("%s: %s", objective, reason)
        given = own_options(model.config, config, objective) if given is None else given
        warn_of_idle(model.config, config, [Trained(objective)], given)
        self._device = model.head.target_weight.device
        self._graph = self._chosen_graph(graph)
        self._captured: CapturedStep | None = None
        #: Whether each parameter was to be trained on entry: so it is left at the end.
        self._given_flags = {name: p.requires_grad for name, p in model.named_parameters()}
        trained = [(name, p) for name, p in self.objective.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"no parameter that {objective} trains requires a gradient")
        self.optimizer, self._names = make_optimizer(
            trained, self.schedule.learning_rate, config.weight_decay, self._graph is not None
        )
        self._trained = {name for name, _ in trained}
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.out.mkdir(parents=True, exist_ok=True)
        if resume and (self.out / CHECKPOINT).is_file():
            self._load(any_data)

    def _chosen_graph(self, graph: Callable[[], Graph] | None) -> Callable[[], Graph] | None:
        """Give what makes a graph, where steps are to be captured."""
        if not self.config.capture:
            return None
        if graph is None and self._device.type != "cuda":
            raise ValueError(f"capture=True needs a model on a GPU, this one is on {self._device}")
        return graph or functools.partial(CudaGraph, self._device)

    def run(self) -> LCRSER:
        """Train to the end, restore the best weights into the model and return it."""
        self.train()
        self.model.load_state_dict(self.best)
        return self.model

    def train(self) -> LCRSER:
        """Train to the end and return the model with its last weights, not its best."""
        progress = self.progress
        if not progress.finished:
            try:
                self._require_gradients({name: name in self._trained for name in self._given_flags})
                with self._diverging():
                    self._start()
                    while self._goes_on():
                        self._epoch()
            finally:
                self._require_gradients(self._given_flags)
            self._explain_end(self._is_stale())
            if self.objective.phase == 1 and self.config.select_readout and self.model.config.steps:
                self._select_readout()
            progress.finished = True
            self._save()
        if progress.readout is not None:
            self._read(progress.readout)
        use_rows(self.model, False)
        return self.model.eval()

    @contextlib.contextmanager
    def _diverging(self) -> Iterator[None]:
        """Say that training diverged where an error comes of that: of what is no number."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            why = str(error)
            if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
                why = "the weights hold NaN or infinities"
            elif "NaN" not in why:  # as the scores do whose sums overflow
                raise
            raise FloatingPointError(
                f"training diverged after {self.progress.epoch} epochs and {self.progress.step} "
                f"steps: {why}; the last checkpoint is kept"
            ) from error

    def _require_gradients(self, flags: Mapping[str, bool]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(flags[name])

    def _goes_on(self) -> bool:
        return self.progress.epoch < self.schedule.epochs and not self._is_stale()

    def _is_stale(self) -> bool:
        return self.progress.stale >= max(self.config.patience, 1)

    def _select_readout(self) -> None:
        """Let validation say how much of h^(K) is read: steps that only harm are left out."""
        model, found = self.model, {}
        last = {name: t.clone() for name, t in model.state_dict().items()}
        model.load_state_dict(self.best)
        for share in _READOUTS:
            self._read(share)
            found[share] = self._score()
        best = max(found, key=lambda share: (found[share], share))
        self._read(best)
        self.progress.readout = best
        model.save(self.out / MODEL)
        model.load_state_dict(last)
        shown = ", ".join(f"{share:g}: {score:.4f}" for share, score in found.items())
        metric = self.config.valid_metric
        self.report(f"  readout {best:g}, the share of h^(K), by validation {metric} ({shown})")

    def _read(self, share: float) -> None:
        self.model.config = self.model.config.replace(readout=share)

    def _explain_end(self, stale: bool) -> None:
        progress = self.progress
        if stale:
            why = f"validation is no better since {progress.stale} epochs"
        else:
            why = f"the limit of {self.schedule.epochs} epochs"
        self.report(f"  {self.name} stopped after epoch {progress.epoch}: {why}")
        scores = [record[self.metric] for record in progress.history]
        if progress.best <= self.chance:
            _LOG.warning(
                "%s: validation %s never rose above chance (%.4f, at most %.4f without "
                "knowledge): train longer or with a higher learning rate",
                self.name,
                self.config.valid_metric.upper(),
                progress.best,
                self.chance,
            )
        elif not stale and len(scores) > 1 and scores[-1] == max(scores) > scores[-2]:
            _LOG.warning(
                "%s: validation was still rising at the limit of %d epochs: allow more",
                self.name,
                self.schedule.epochs,
            )

    def _start(self) -> None:
        """Count the starting model as epoch 0: a phase that only harms keeps what it was given."""
        if not self.best:
            self._validate({})

    def _epoch(self) -> None:
        progress = self.progress
        key = (self.config.seed, self.objective.phase, progress.epoch)
        epoch = Epoch(self.objective, key)
        n_steps = len(epoch)
        last_save = clock = time.monotonic()
        bar = tqdm(
            total=n_steps,
            initial=progress.step,
            desc=f"{self.name} epoch {progress.epoch + 1}/{self.schedule.epochs}",
            leave=False,
            disable=not sys.stderr.isatty(),
        )
        with bar:
            for inputs in epoch.steps(progress.step, self.config.workers):
                if self.schedule.decay:
                    self._decay((progress.epoch + progress.step / n_steps) / self.schedule.epochs)
                self.take(inputs)
                progress.step += 1
                bar.update()
                now = time.monotonic()
                progress.seconds += now - clock
                clock = now
                if now - last_save > _CHECKPOINT_SECONDS:
                    self._save()
                    last_save = time.monotonic()
        progress.epoch += 1
        progress.step = 0
        means = {name: total / count for name, (total, count) in progress.sums.items()}
        progress.sums = {}
        warn_if_sinking(means, self.config.action)
        self._validate(means)

    def _decay(self, done: float) -> None:
        """Lower the learning rate in proportion to the part of the run that is done."""
        rate = self.schedule.learning_rate * (1 - done)
        for group in self.optimizer.param_groups:
            if self._graph is None:
                group["lr"] = rate
            else:
                group["lr"].fill_(rate)

    def step(self, rows: NDArray, rng: np.random.Generator) -> float:
        """Make the updates of one mini-batch of samples; return the last loss."""
        return self.take(assemble(self.objective, rows, rng))

    def take(self, inputs: StepInputs) -> float:
        """Make the updates of a mini-batch and log them; return the last loss.

        The tensors of ``inputs`` are on the CPU.
        """
        logs = {}
        for logged in self._launch_or_replay(inputs):
            logs = dict(zip(logged.names, logged.values.tolist(), strict=True))
            self._require_finite(logs["loss"])
            self._add(logs)
            self.objective.n_updates += 1
        return logs["loss"]

    def _launch_or_replay(self, inputs: StepInputs) -> list[Logged]:
        """Make the updates of a batch, by replaying them where that was asked for.

        The last batch of an epoch may be smaller; it is launched, as all are whose updates the
        host looks into.
        """
        if self._graph is None:
            return self._updates(inputs.to(self._device))
        if self._captured is None and len(inputs.batch) == self.schedule.batch_size:
            self._captured = CapturedStep(self._updates, inputs, self._device, self._graph())
        if self._captured is None or self.objective.must_look() or not self._captured.fits(inputs):
            return self._updates(inputs.to(self._device))
        return self._captured(inputs)

    def _updates(self, inputs: StepInputs) -> list[Logged]:
        """Make the updates of a batch that is on the device."""
        made = []
        for loss, logs in self.objective.updates(*inputs):
            self._update(loss)
            values = [value.detach().double() for value in (loss, *logs.values())]
            made.append(Logged(("loss", *logs), torch.stack(values)))
        return made

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} in epoch {self.progress.epoch + 1}, step "
                f"{self.progress.step + 1}; the last checkpoint is kept"
            )

    def _update(self, loss: Tensor) -> None:
        """Descend a loss; where it is not finite, weights stay as they are."""
        self.optimizer.zero_grad(set_to_none=True)
        with range_("backward"):
            loss.backward()
        with range_("optimizer"):
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.objective.share.sum_gradients(parameters)
            merge_gradients(parameters)
            if self.config.grad_clip:
                clip_gradients(parameters, self.config.grad_clip)
            if self._graph is None:
                # Waits for the device, and so stands behind all that can be launched before.
                self._require_finite(loss.item())
            else:
                self.optimizer.found_inf = (~loss.isfinite()).float()
            self.optimizer.step()

    def _add(self, logs: dict[str, float]) -> None:
        for name, value in logs.items():
            total, count = self.progress.sums.get(name, (0.0, 0))
            self.progress.sums[name] = [total + value, count + 1]

    def _score(self) -> float:
        return validation_score(
            self.model, self.validation, self.config.valid_metric, self.model.config.backend
        )

    def _validate(self, means: dict[str, float]) -> None:
        progress = self.progress
        clock = time.monotonic()
        score = self._score()
        if score > progress.best:
            progress.best, progress.stale = score, 0
            self.best = {n: t.detach().clone() for n, t in self.model.state_dict().items()}
            self.model.save(self.out / MODEL)
        else:
            # Before there is anything to lose, a plateau is no reason to stop.
            progress.stale += progress.best > self.chance
        progress.seconds += time.monotonic() - clock
        record = {"epoch": progress.epoch, **means, self.metric: score}
        progress.history.append({**record, "seconds": round(progress.seconds, 3)})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in list(record.items())[1:])
        self.report(f"  {self.name} epoch {progress.epoch}: {shown}")
        # In this order: a run killed in between logs the epoch again.
        self._log()
        self._save()

    def _log(self) -> None:
        """Rewrite the metrics log, so that it agrees with the checkpoint that follows."""
        with replacing(self.out / METRICS) as path:
            lines = (json.dumps(record) + "\n" for record in self.progress.history)
            path.write_text("".join(lines), encoding="utf-8")
        if self.objective.share.rank:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        record = self.progress.history[-1]
        with SummaryWriter(str(self.out / "tensorboard")) as writer:
            for name, value in record.items():
                if name != "epoch":
                    writer.add_scalar(f"{self.name}/{name}", value, record["epoch"])

    def _save(self) -> None:
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"adam.{self._names[index]}.{key}"] = torch.as_tensor(value)
        frozen = self.objective.reference_state()
        tensors |= {f"reference.{name}": t for name, t in frozen.items()}
        info = {
            "objective": self.name,
            "data": self.model.data_fingerprint,
            "model": self._given.to_dict(),
            "train": self.config.to_dict(),
            "frozen": sorted(name for name, wanted in self._given_flags.items() if not wanted),
            "progress": asdict(self.progress),
            "n_updates": self.objective.n_updates,
        }
        save_tensors(self.out / CHECKPOINT, CHECKPOINT_KIND, tensors, info)

    def _load(self, any_data: bool) -> None:
        path = self.out / CHECKPOINT
        tensors, info = load_tensors(path, CHECKPOINT_KIND)
        if info["objective"] != self.name:
            raise ValueError(
                f"{path}: cannot resume {self.name}, the checkpoint is of {info['objective']}"
            )
        if not any_data and info["data"] != self.model.data_fingerprint:
            raise ValueError(f"{path}: cannot resume, {OTHER_DATA}")
        saved = with_defaults(LCRConfig, info["model"])
        ours = json.loads(self._given.to_json())
        changed = {"model": [f for f in sorted(ours) if saved.get(f) != ours[f]]}
        changed["train"] = resume_conflicts(info, json.loads(self.config.to_json()))
        for key, names in changed.items():
            if names:
                raise ValueError(
                    f"{path}: cannot resume, the {key} config differs in {', '.join(names)}"
                )

        differing = set(info.get("frozen", ())) ^ {
            n for n, on in self._given_flags.items() if not on
        }
        if differing:
            raise ValueError(
                f"{path}: cannot resume, {', '.join(sorted(differing))} did not require a gradient "
                "then or does not now"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.best = part("best.")
        if self.objective.reference is not None:
            # The rest of it is the model's own.
            self.objective.reference.load_state_dict(part("reference."), strict=False)
        self.objective.n_updates = info["n_updates"]
        # AdamW moves the moments to its parameters' device by itself.
        state = {index: part(f"adam.{name}.") for index, name in enumerate(self._names)}
        state = {index: moments for index, moments in state.items() if moments}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.progress = Progress(**info["progress"])
        self.progress.finished &= not self._goes_on()


def validation_scores(result: Mapping[str, Any]) -> list[float]:
    """List what validation said of the start and after each epoch, from a result's ``history``."""
    return [
        next(value for name, value in record.items() if name.startswith(VALIDATION))
        for record in result["history"]
    ]


def make_optimizer(
    parameters: list[tuple[str, torch.nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
    captured: bool = False,
) -> tuple[RowAdamW, list[str]]:
    """AdamW with decay on dense weights only, and the parameters' names in its numbering.

    ``captured``: its steps can be, so that what changes from one to the next is in tensors.

    Embedding rows that no batch touches would shrink towards each other until their scores tie;
    positions, norms, biases and bonuses have nothing to gain from decay.
    """
    spared = ("embedding", "position", "bias", "norm", "bonus")
    dense = [(n, p) for n, p in parameters if not any(part in n for part in spared)]
    rest = [(n, p) for n, p in parameters if any(part in n for part in spared)]
    groups = [
        {"params": [p for _, p in dense], "weight_decay": weight_decay},
        {"params": [p for _, p in rest], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": learning_rate}
    if captured:
        rate = torch.tensor(learning_rate, device=parameters[0][1].device)
        options = {"lr": rate, "fused": True, "capturable": True}
    optimizer = RowAdamW(groups, **options)
    return optimizer, [name for name, _ in dense + rest]
