"""What a mini-batch does in each phase: its candidates, its losses and what they log.

Everything random is drawn from keys (seed, phase, epoch, step), never from a running generator, so
that a resumed run needs no random state.
"""

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcr_fast import grpo
from lcr_fast.batch import Batch
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data.batching import Batcher
from lcr_fast.data.negatives import NegativeSampler
from lcr_fast.data.pairs import training_pairs
from lcr_fast.model import LCRSER
from lcr_fast.noise import gumbel_noise
from lcr_fast.objectives import alignment, rank_loss, tcl
from lcr_fast.precision import high
from lcr_fast.reference import Streams
from lcr_fast.training import distributed
from lcr_fast.training.evaluation import with_target
from lcr_fast.training.ranks import weighted_metric
from lcr_fast.training.rows import flat

_LOG = logging.getLogger("lcr_fast")
_ALARM_EVERY = 10  # updates between two comparisons of gradients
_LEAST_SIGNAL = 0.01  # share of users with an advantage below which gradients are chance
_MOST_DRAWS = 8  # batches of users drawn for one whose trajectories earn differently


class Update(NamedTuple):
    """One loss to descend and the numbers to log with it, scalars on the device."""

    loss: Tensor
    logs: dict[str, Tensor]


class Schedule(NamedTuple):
    """The numbers that the phases do not share."""

    learning_rate: float
    epochs: int
    batch_size: int
    epoch_size: int  # samples drawn for an epoch; 0 means all
    decay: bool = False  # does the learning rate fall to 0 at the last epoch?


class Inputs(NamedTuple):
    """What all trajectories of a batch start from and are scored on."""

    h0: Streams
    candidates: Tensor  # [B, C, D] item vectors


class Objective:
    """What the trainer asks of an objective: parameters, batches and updates.

    What the host draws is drawn before the updates, which then read nothing but tensors: so they
    can be captured in a CUDA graph, where :meth:`capture_obstacle` names nothing against it.
    """

    phase: int
    reference: LCRSER | None = None  # a frozen model that belongs to the state, if any
    n_updates = 0  # made so far; the trainer counts

    def __init__(self, model: LCRSER, batcher: Batcher, config: TrainConfig) -> None:
        self.model, self.batcher, self.config = model, batcher, config
        self.share = distributed.current()
        kind = "popularity" if config.negatives == "in_batch" else config.negatives
        self.sampler = NegativeSampler(batcher.data, kind)

    @property
    def schedule(self) -> Schedule:
        raise NotImplementedError

    def low(self, x: Tensor) -> Tensor:
        """Cast states or item vectors to the config's precision; float32 leaves any dtype."""
        return x if self.config.precision == "float32" else x.to(torch.bfloat16)

    def encode(self, model: LCRSER, batch: Batch) -> Streams:
        """Encode both histories, in the config's precision."""
        search, rec = model.encode(batch)
        return self.low(search), self.low(rec)

    def reference_state(self) -> dict[str, Tensor]:
        """Give the tensors of ``reference`` that are not the model's own."""
        return {}

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """List what is trained; the trainer freezes the rest."""
        raise NotImplementedError

    def batch(self, rows: NDArray, rng: np.random.Generator) -> Batch:
        """Assemble samples with fresh negatives, target in column 0."""
        raise NotImplementedError

    def extras(self, seed: int) -> dict[str, Tensor]:
        """Draw what the updates on a batch read beside it: int64 tensors on the CPU, by name."""
        return {}

    def updates(
        self, batch: Batch, seed: int | Tensor, extras: Mapping[str, Tensor]
    ) -> Iterator[Update]:
        """Yield losses to descend, one after the other.

        ``extras`` are those of the seed. They and a seed that is a tensor, int64 [], are on the
        batch's device.
        """
        raise NotImplementedError

    @classmethod
    def capture_obstacle(cls, config: TrainConfig) -> str | None:
        """Say why updates by a config cannot be captured in a CUDA graph, or None."""
        if distributed.current().count > 1:
            return "several processes train, which wait for each other"
        if config.tables == "rows":
            return "with tables=rows the host reads which rows a batch touches"
        return None

    def idle(self) -> str | None:
        """Say why there is nothing that this objective could learn from, or None."""
        return None

    def must_look(self) -> bool:
        """Tell whether the host reads something in the midst of the next batch's updates."""
        return False


def check_deep_supervision(model: LCRConfig, train: TrainConfig) -> None:
    """Raise ValueError where every step is to be supervised and none stands alone."""
    if train.deep_supervision and model.steps and model.cross_memory == "initial":
        raise ValueError("deep_supervision goes step by step, cross_memory=initial does not")


class Supervised(Objective):
    """Phase 1: ranking loss, of every step too, TCL and alignment (:mod:`lcr_fast.objectives`)."""

    phase = 1

    def __init__(self, model: LCRSER, batcher: Batcher, config: TrainConfig) -> None:
        super().__init__(model, batcher, config)
        check_deep_supervision(model.config, config)
        self.pairs = training_pairs(batcher.data)

    @property
    def schedule(self) -> Schedule:
        config = self.config
        n_batches = math.ceil(len(self.batcher) / config.batch_size)
        return Schedule(
            config.learning_rate,
            max(config.epochs, math.ceil(config.min_updates / n_batches)),
            config.batch_size,
            0,
            config.schedule == "linear",
        )

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.model.named_parameters())

    def batch(self, rows: NDArray, rng: np.random.Generator) -> Batch:
        """Assemble samples with fresh negatives, target in column 0."""
        samples = self.batcher.samples
        users, times, targets = samples.users[rows], samples.times[rows], samples.items[rows]
        if self.config.negatives == "in_batch":
            # Another user's target, unless this user has seen it: 0 is padding.
            others = np.broadcast_to(targets, (len(rows), len(rows))).copy()
            seen = self.batcher.data.seen.has(users[:, None], others, times[:, None])
            others[seen | (others == targets[:, None])] = 0
            negatives = others
        else:
            negatives = self.sampler.draw(rng, users, times, targets, self.config.n_negatives)
        return self.batcher.gather(rows, *with_target(targets, negatives))

    def extras(self, seed: int) -> dict[str, Tensor]:
        """Draw pairs to align, of each kind that counts and that the data has."""
        config, pairs = self.config, self.pairs
        rng = np.random.default_rng([seed, 1])

        def draw(*sides: NDArray) -> list[NDArray]:
            rows = rng.integers(len(sides[0]), size=config.align_pairs)
            return [side[rows] for side in sides]

        drawn = {}
        if config.align_queries and len(pairs.queries):
            drawn["queries"], drawn["clicked"] = draw(pairs.queries, pairs.clicked)
            drawn["terms"] = self.batcher.terms(drawn["queries"])
        if config.align_items and len(pairs.items):
            drawn["items"], drawn["following"] = draw(pairs.items, pairs.following)
        return {name: torch.from_numpy(ids.astype(np.int64)) for name, ids in drawn.items()}

    def updates(
        self, batch: Batch, seed: int | Tensor, extras: Mapping[str, Tensor]
    ) -> Iterator[Update]:
        """One update: L = L_rank + lambda L_TCL, and the weighted losses of alignment.

        Deep supervision adds L_rank of the states before the last step, read by the same head.
        """
        config, model = self.config, self.model
        model.train()
        model.dropout_seed = seed
        mine, n = self.share.deal(batch), len(batch)
        target = None
        if config.tcl_weight and model.config.steps:
            target = model.item_vectors(mine.candidates[:, 0])  # [B, D]
        h0 = self.encode(model, mine)
        if config.deep_supervision and model.config.steps:
            by_step = model.reason_by_step(h0, mine, target)
            reasoned = by_step[-1]
            parts = [step.pooled for step in by_step if step.pooled is not None]
            pooled = torch.cat(parts, 1) if parts else None
            earlier = [model.read(h0, h0), *(step.streams for step in by_step[:-1])]
        else:
            reasoned, earlier = model.reason(h0, mine, target), []
            pooled = reasoned.pooled
        scores = self._scores(reasoned.streams, batch)
        loss = rank_loss(scores, batch.target, config.rank_loss)
        logs = {"rank_loss": loss}
        if earlier:
            shares = _step_shares(len(earlier), config.deep_weights)
            losses = [
                share * rank_loss(self._scores(h, batch), batch.target, config.rank_loss)
                for share, h in zip(shares, earlier, strict=True)
            ]
            deep = torch.stack(losses).sum()
            loss = loss + config.deep_supervision * deep
            logs["deep_loss"] = deep
        if target is not None and pooled is not None:
            contrast = tcl(
                self.share.collect(high(pooled), n),
                (batch.search_lengths, batch.rec_lengths),
                self.share.collect(target, n),
                margin=config.tcl_margin,
                kind=config.tcl_distance,
                detach_negative=config.tcl_detach_negative,
            )
            loss = loss + config.tcl_weight * contrast
            logs["tcl"] = contrast
        for name, (weight, part) in self._terms(batch, reasoned.streams, scores, extras).items():
            loss = loss + weight * part
            logs[name] = part
        yield Update(loss, logs)

    def _scores(self, h: Streams, batch: Batch) -> Tensor:
        """Score the batch's candidates, [B, C], from this process's states; at least float32."""
        mine = self.share.deal(batch)
        if self.config.precision == "float32":
            scores = self.model.score(h, mine)
        else:
            vectors = self.low(self.model.item_vectors(mine.candidates))
            scores = high(self.model.score_vectors(h, mine, vectors))
        return self.share.collect(scores, len(batch))

    def _terms(
        self, batch: Batch, streams: Streams, scores: Tensor, extras: Mapping[str, Tensor]
    ) -> dict[str, tuple[float, Tensor]]:
        """Give what the loss holds beside ranking and TCL: weight and loss by name.

        That is the alignment of the pairs that were drawn.
        """
        config, model, share = self.config, self.model, self.share

        def vectors(ids: Tensor) -> Tensor:
            return share.collect(model.item_vectors(share.deal(ids)), len(ids))

        losses = {}
        if "queries" in extras:
            queries, clicked = extras["queries"], extras["clicked"]
            asked = model.query_vectors(share.deal(queries), share.deal(extras["terms"]))
            asked = share.collect(asked, len(queries))
            loss = alignment(asked, vectors(clicked), queries, clicked)
            losses["query_alignment"] = (config.align_queries, loss)
        if "items" in extras:
            items, following = extras["items"], extras["following"]
            loss = alignment(vectors(items), vectors(following), items, following)
            losses["item_alignment"] = (config.align_items, loss)
        return losses


def _step_shares(n: int, kind: str) -> list[float]:
    """Share out 1 over the losses of h^(0) to h^(n-1)."""
    weights = [1.0] * n if kind == "uniform" else [k + 1.0 for k in range(n)]
    return [weight / sum(weights) for weight in weights]


class _Trajectories(Objective):
    """What phase 2 and its control share: fresh candidates, frozen parts, noisy trajectories."""

    phase = 2

    def idle(self) -> str | None:
        if self.config.noise_scale == 0:
            return "with noise_scale 0 the trajectories of a user are all alike"
        if self.model.config.steps and self.model.config.readout == 0:
            return (
                "the model reads h^(0) alone (readout 0), which has no noise, so the trajectories "
                "of a user are all alike"
            )
        return None

    @property
    def schedule(self) -> Schedule:
        config = self.config
        return Schedule(
            config.rl_learning_rate, config.rl_epochs, config.rl_batch_size, config.rl_epoch_size
        )

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """List what is trained: reasoning and head, or everything.

        With the former neither encoder nor item vectors are in the graph.
        """
        return self._own(self.model)

    def _own(self, model: LCRSER) -> list[tuple[str, torch.nn.Parameter]]:
        """List the parameters of a model that phase 2 trains, and so each policy has its own."""
        named = model.named_parameters()
        if not self.frozen_encoder:
            return list(named)
        trained = ("reasoning.", "step_embedding", "head.")
        return [(name, p) for name, p in named if name.startswith(trained)]

    @property
    def frozen_encoder(self) -> bool:
        return self.config.rl_trainable == "reasoning"

    def batch(self, rows: NDArray, rng: np.random.Generator) -> Batch:
        """Assemble samples with fresh distinct negatives, target in column 0."""
        samples = self.batcher.samples
        users, times, targets = samples.users[rows], samples.times[rows], samples.items[rows]
        n = min(self.config.rl_negatives, self.batcher.data.n_items - 1)
        negatives = self.sampler.draw(rng, users, times, targets, n, distinct=True)
        return self.batcher.gather(rows, *with_target(targets, negatives))

    def inputs(self, model: LCRSER, batch: Batch) -> Inputs:
        """Compute what no trajectory of this process's users changes, dropout off.

        That is h^(0) and the candidates' vectors.
        """
        model.eval()
        batch = self.share.deal(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_encoder):
            vectors = self.low(model.item_vectors(batch.candidates))
            return Inputs(self.encode(model, batch), vectors)

    def scores(self, model: LCRSER, batch: Batch, inputs: Inputs, seed: int | Tensor) -> Tensor:
        """Score the candidates on N noisy trajectories, dropout off: float32 [B, N, C]."""
        model.eval()
        config, mine = self.config, self.share.deal(batch)
        reasoned = model.rollout(inputs.h0, mine, config.n_trajectories, config.noise_scale, seed)
        scores = high(model.score_vectors(reasoned.streams, mine, inputs.candidates))
        return self.share.collect(scores, len(batch))


class NoisySupervised(_Trajectories):
    """Control of phase 2: the same noisy trajectories under the ranking loss L_rank alone.

    The like-for-like comparison: GRPO has no TCL term, so the control has none either, whatever
    ``tcl_weight`` phase 1 had.
    """

    def updates(
        self, batch: Batch, seed: int | Tensor, extras: Mapping[str, Tensor]
    ) -> Iterator[Update]:
        inputs = None
        for _ in range(self.config.inner_epochs):
            if inputs is None or not self.frozen_encoder:
                inputs = self.inputs(self.model, batch)
            scores = self.scores(self.model, batch, inputs, seed).flatten(0, 1)  # [B * N, C]
            target = batch.target.repeat_interleave(self.config.n_trajectories)
            loss = rank_loss(scores, target, self.config.rank_loss)
            yield Update(loss, {"rank_loss": loss})


class Grpo(_Trajectories):
    """Phase 2: GRPO over noisy latent trajectories (:mod:`lcr_fast.grpo`).

    The frozen copy of the model at construction is the reference policy. Policy, old and reference
    policies share the noise of a batch, and where the encoder is frozen its output too.
    """

    def __init__(self, model: LCRSER, batcher: Batcher, config: TrainConfig) -> None:
        super().__init__(model, batcher, config)
        trained = {id(p) for _, p in self.parameters()}
        # What is not trained is not copied: embeddings, and text vectors that may fill the memory.
        kept = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in trained}
        self.reference: LCRSER = copy.deepcopy(model, kept)
        for _, parameter in self._own(self.reference):
            parameter.requires_grad_(False)

    def idle(self) -> str | None:
        if (reason := super().idle()) is not None:
            return reason
        config = self.config
        if config.n_trajectories == 1:
            return "with n_trajectories 1 a user's trajectory has no other to earn more than"
        n = 1 + min(config.rl_negatives, self.batcher.data.n_items - 1)
        if not np.ptp(weighted_metric(np.arange(1, n + 1), config.reward)):
            return f"the reward {config.reward} is the same for every list of {n} candidates"
        return None

    def reference_state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._own(self.reference)}

    @classmethod
    def capture_obstacle(cls, config: TrainConfig) -> str | None:
        if (obstacle := super().capture_obstacle(config)) is not None:
            return obstacle
        if config.silent_groups == "resample":
            return "with silent_groups=resample the host reads who is to be drawn anew"
        return None

    def _alarms(self) -> list[bool]:
        """Tell in which of the next batch's updates gradients are compared."""
        first = self.n_updates
        return [(first + i) % _ALARM_EVERY == 0 for i in range(self.config.inner_epochs)]

    def must_look(self) -> bool:
        return any(self._alarms())

    def updates(
        self, batch: Batch, seed: int | Tensor, extras: Mapping[str, Tensor]
    ) -> Iterator[Update]:
        """Roll out once, then update ``inner_epochs`` times on it."""
        config = self.config
        if config.silent_groups == "resample":
            batch, n_drawn = self._with_signal(batch, int(seed))
        with torch.no_grad():
            inputs = self.inputs(self.reference, batch)
            reference_scores = self.scores(self.reference, batch, inputs, seed) / config.temperature
        rollout, old = None, None
        for is_compared in self._alarms():
            if not self.frozen_encoder:
                inputs = self.inputs(self.model, batch)
            scores = self.scores(self.model, batch, inputs, seed) / config.temperature  # [B, N, C]
            if rollout is None:
                rollout, advantages = self._act(scores, batch, seed)  # ..., [B, N]
                silent = (advantages == 0).all(-1, keepdim=True)  # [B, 1]
            log_prob = grpo.list_log_probability(scores, rollout.actions)  # [B, N]
            if old is None:
                old = log_prob.detach()
            surrogate = grpo.policy_objective(log_prob, old, advantages, config.clip)
            kls = grpo.kl_divergence(scores, reference_scores, config.kl, rollout.actions)  # [B, N]
            if config.silent_groups != "keep":
                kls = kls.masked_fill(silent, 0.0)
            kl = kls.mean()
            measured: dict[str, Tensor] = {
                "reward": rollout.rewards.mean(),
                "signal": 1 - silent.float().mean(),
                "kl": kl,
                "surrogate": surrogate,
                "entropy": grpo.entropy(scores.detach()).mean(),
                "clipped": grpo.clip_fraction(log_prob.detach(), old, config.clip),
            }
            if config.silent_groups == "resample":
                measured["drawn"] = kl.new_tensor(n_drawn / len(batch))
            if is_compared:
                places = batch.target[:, None, None].expand(*scores.shape[:2], 1)
                log_target = grpo.list_log_probability(scores, places).mean()
                silent_kl = config.kl_weight * (kls * silent).mean()
                measured |= self._compare(surrogate, log_target, silent_kl)
            yield Update(config.kl_weight * kl - surrogate, measured)

    def _act(self, scores: Tensor, batch: Batch, seed: int | Tensor) -> tuple[grpo.Rollout, Tensor]:
        """Act on scores [B, N, C] over the temperature: actions and rewards, advantages [B, N]."""
        config, gumbel = self.config, None
        if config.action == "sampled":
            _, N, C = scores.shape
            gumbel = gumbel_noise(batch.row, seed, N, C, scores.dtype)
        rollout = grpo.choose_actions(scores, batch.target, config.action, config.reward, gumbel)
        return rollout, grpo.group_advantages(rollout.rewards, config.scale_advantages)

    @torch.no_grad()
    def _with_signal(self, batch: Batch, seed: int) -> tuple[Batch, int]:
        """Put users whose rewards differ in the place of those whose do not (DAPO, 2503.14476).

        At most ``_MOST_DRAWS`` times as many users as a batch holds are drawn, each at most once;
        silent ones that are left stay. Returns the number drawn too, those given included.
        """
        rng = np.random.default_rng([seed, 2])

        def silent(users: Batch) -> NDArray[np.bool_]:
            scores = self.scores(self.model, users, self.inputs(self.model, users), seed)
            _, advantages = self._act(scores / self.config.temperature, users, seed)
            return (advantages == 0).all(-1).cpu().numpy()

        chosen = [t.cpu().numpy().copy() for t in (batch.row, batch.candidates, batch.target)]
        size, n_users = len(batch), len(self.batcher)
        others = rng.choice(n_users, min(n_users, _MOST_DRAWS * size), replace=False)
        others = others[~np.isin(others, chosen[0])][: (_MOST_DRAWS - 1) * size]
        left = np.flatnonzero(silent(batch))  # places to fill
        n_drawn, n_silent = size, len(left)
        for start in range(0, len(others), size):
            if not len(left):
                break
            drawn = self.batch(others[start : start + size], rng)
            n_drawn += len(drawn)
            found = np.flatnonzero(~silent(drawn.to(batch.device)))[: len(left)]
            places, left = left[: len(found)], left[len(found) :]
            for array, new in zip(chosen, (drawn.row, drawn.candidates, drawn.target), strict=True):
                array[places] = new.numpy()[found]
        if len(left) == n_silent:
            return batch, n_drawn
        return self.batcher.gather(*chosen).to(batch.device), n_drawn

    def _compare(
        self, surrogate: Tensor, log_target: Tensor, silent_kl: Tensor
    ) -> dict[str, Tensor]:
        """Compare the policy's gradient with others.

        ``target_cosine``: its cosine with that of mean log p(target). ``silent_pull``: the norm of
        the gradient of the silent groups' share of the weighted KL, over the policy's own. Neither
        where the policy has no gradient.
        """
        parameters = [p for _, p in self.parameters() if p.requires_grad]
        gradients = [
            torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            for value in (surrogate, log_target, silent_kl)
        ]
        by_parameter = [
            flat([self.share.total(gradient) for gradient in some], parameter)
            for parameter, *some in zip(parameters, *gradients, strict=True)
        ]
        policy, target, silent = (torch.cat(parts) for parts in zip(*by_parameter, strict=True))
        norm = policy.norm()
        if not norm > 0:
            return {}
        logs = {"silent_pull": silent.norm() / norm}
        if target.norm() > 0:
            logs["target_cosine"] = policy @ target / (norm * target.norm())
        return logs


OBJECTIVES: dict[str, type[Objective]] = {
    "supervised": Supervised,
    "grpo": Grpo,
    "noisy": NoisySupervised,
}


def warn_if_sinking(logs: dict[str, float], action: str) -> None:
    """Warn while the policy gradient, on average, lowers the target's probability.

    ``logs`` are an epoch's means. Of next to no users with an advantage the mean says nothing.
    """
    cosine = logs.get("target_cosine")
    if cosine is not None and cosine < 0 and logs["signal"] >= _LEAST_SIGNAL:
        _LOG.warning(
            "the policy gradient lowers the target's probability: its cosine with the gradient of "
            "mean log p(target) is %.3f; consider %sa larger kl_weight",
            cosine,
            "" if action == "top1" else "action=top1 or ",
        )
