"""How many steps each user needs: rules for leaving early, and thresholds chosen by validation.

A rule scores every user after 0, 1, ... steps; a user leaves at the first score that reaches the
threshold. ``SERVED`` rules look at states alone and are linear, so that the reasoning itself can
apply them (:class:`lcr_fast.reference.Exits`). ``LIST_RULES`` look at the ranking of candidates
after each step, which costs more than the step that they might save: for comparison only.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.ops.ranking import target_rank
from lcr_fast.reference import Exits, exit_features
from lcr_fast.training.evaluation import make_batcher, sample_batches, selecting_gains
from lcr_fast.training.ranks import weighted_metric

SERVED = ("fixed", "change", "curvature", "confidence")
LIST_RULES = ("overlap", "kl", "entropy")
TITLES = {
    "fixed": "fixed number of steps",
    "change": "change of the mean state",
    "curvature": "second-order change of the mean state",
    "confidence": "confidence head",
    "overlap": "overlap of the top 5 with those before the last step",
    "kl": "KL of the list from that before the last step",
    "entropy": "entropy of the list",
}
NEVER = -3e38  # as a score: finite, so that files and sums can hold it
_TOP = 5  # places that "does another step change the list?" asks about
_THRESHOLDS = 200
_PENALTY = 1.0  # of the confidence head's squared weights, features having variance 1
_NEWTON = 25


class Depths(NamedTuple):
    """What a split's users have after 0..K steps."""

    ranks: NDArray[np.int64]  # [n, K + 1] of the target among its stored negatives
    features: NDArray[np.float32]  # [n, K, 2D + 2] before the last step, see exit_features
    stays: NDArray[np.float64]  # [n, K] share of the top 5 that another step leaves there
    kl: NDArray[np.float64]  # [n, K] KL of the list after another step from the one before it
    entropy: NDArray[np.float64]  # [n, K + 1] of the list, in nats

    @property
    def n_steps(self) -> int:
        return self.kl.shape[1]

    def gains(self, metric: str) -> NDArray:
        """Measure every user after 0..K steps: [n, K + 1]."""
        measured = weighted_metric(self.ranks.reshape(-1), metric)
        return measured.reshape(self.ranks.shape)


@torch.inference_mode()
def read_depths(model: LCRSER, data: PreparedData, split: str = "valid") -> Depths:
    """Rank a split's targets after every number of steps, the model's readout being what it is.

    Users whose target the model does not know are left out.
    """
    model.eval()
    batcher = make_batcher(data, split, model)
    samples = batcher.samples
    known = np.flatnonzero(samples.items > 0)
    if not len(known) or samples.negatives is None:
        raise ValueError(f"the data has no {split} targets that the model can rank")
    parts: list[list[NDArray]] = []
    for batch in sample_batches(model, batcher, known, negatives=True):
        states = model.states(batch)
        h0 = states.h[0]
        lists = [model.score(model.read(h0, h), batch).float() for h in states.h]
        excluded = batch.candidates == 0
        ranks = [target_rank(scores, batch.target, excluded=excluded) for scores in lists]
        features = exit_features(states.h[:-1], batch.search_lengths, batch.rec_lengths)
        scores = torch.stack(lists, 1).double()  # [b, K + 1, C]
        logs = scores.log_softmax(-1)
        p = logs.exp()
        parts.append(
            [
                t.cpu().numpy()
                for t in (
                    torch.stack(ranks, 1),
                    features.float(),
                    _stays(scores),
                    (p[:, 1:] * (logs[:, 1:] - logs[:, :-1]).nan_to_num()).sum(-1),
                    -(p * logs.clamp(min=-1e9)).sum(-1),
                )
            ]
        )
    return Depths(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _stays(scores: Tensor) -> Tensor:
    """Share of each list's top that the next list has too: [b, K + 1, C] -> [b, K]."""
    top = torch.zeros_like(scores).scatter(-1, scores.topk(min(_TOP, scores.shape[-1])).indices, 1)
    return (top[:, 1:] * top[:, :-1]).sum(-1) / top[:, 1:].sum(-1)


def rule_scores(rule: str, depths: Depths, confidence: Exits | None = None) -> NDArray:
    """Score leaving after 0 to K - 1 steps, the higher the sooner: [n, K]; NEVER where it cannot.

    ``fixed`` has no score. ``confidence`` needs the head that :func:`fit_confidence` gives.
    """
    scores = np.full(depths.kl.shape, NEVER)
    if rule == "change":
        scores[:, 1:] = -depths.features[:, 1:, -2]
    elif rule == "curvature":
        scores[:, 2:] = -depths.features[:, 2:, -1]
    elif rule == "confidence":
        assert confidence is not None
        scores = depths.features @ confidence.weight.numpy() + confidence.bias.numpy()
    elif rule == "overlap":
        scores[:, 1:] = depths.stays[:, :-1]
    elif rule == "kl":
        scores[:, 1:] = -depths.kl[:, :-1]
    elif rule == "entropy":
        scores = -depths.entropy[:, :-1]
    else:
        raise ValueError(f"rule must be one of {', '.join(TITLES)}, got {rule!r}")
    return scores


def fit_confidence(depths: Depths) -> Exits:
    """Fit the head that says how much of the top 5 another step leaves as it is.

    A logistic regression on :func:`~lcr_fast.reference.exit_features` with an intercept for each
    number of steps, by Newton's method, of the mean cross-entropy with a small penalty. It needs
    no target. Its logit is the score of leaving.
    """
    n, K, F = depths.features.shape
    x = depths.features.astype(np.float64).reshape(n * K, F)
    scale = x.std(0)
    scale[scale == 0] = 1.0
    place = np.tile(np.eye(K), (n, 1))
    design = np.concatenate((x / scale, place), 1)
    y = depths.stays.reshape(n * K)
    weight = np.zeros(F + K)
    penalty = np.concatenate((np.full(F, _PENALTY), np.full(K, 1e-6)))
    for _ in range(_NEWTON):
        p = 1 / (1 + np.exp(-np.clip(design @ weight, -30, 30)))
        gradient = design.T @ (p - y) + penalty * weight
        hessian = (design * (p * (1 - p))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        weight -= step
        if np.abs(step).max() < 1e-9:
            break
    return Exits(
        torch.from_numpy(weight[:F] / scale).float(),
        torch.from_numpy(weight[F:]).float(),
        "confidence",
    )


def leave_at(scores: NDArray, threshold: float) -> NDArray[np.int64]:
    """Count each user's steps: the first k whose score reaches the threshold, or K: [n]."""
    return np.cumprod(scores < threshold, 1).sum(1)


class Choice(NamedTuple):
    """A rule with its threshold, and what validation says of it."""

    rule: str
    threshold: float  # of the scores; the number of steps where that is fixed
    steps: float  # mean
    gain: float  # mean of the metric

    def taken(self, depths: Depths, confidence: Exits | None = None) -> NDArray[np.int64]:
        """Count the steps of each user of a split: [n]."""
        if self.rule == "fixed":
            return np.full(len(depths.kl), int(self.threshold))
        return leave_at(rule_scores(self.rule, depths, confidence), self.threshold)

    def exits(self, depths: Depths, confidence: Exits | None = None) -> Exits:
        """Make the rule one that the reasoning can apply; for those of ``SERVED``."""
        K, F = depths.features.shape[1:]
        weight, bias = torch.zeros(F), torch.full((K,), NEVER)
        if self.rule == "fixed":
            bias[int(self.threshold) :] = 0.0
        elif self.rule == "confidence":
            assert confidence is not None
            weight, bias = confidence.weight, confidence.bias - self.threshold
        else:
            first = {"change": 1, "curvature": 2}[self.rule]
            weight[-3 + first] = -1.0
            bias[first:] = -self.threshold
        return Exits(weight, bias, self.rule)


def curve(rule: str, depths: Depths, metric: str, confidence: Exits | None = None) -> list[Choice]:
    """Try thresholds of a rule: from leaving as soon as it may to all K steps."""
    gains = depths.gains(metric)
    if rule == "fixed":
        return [
            Choice(rule, k, float(k), float(gains[:, k].mean())) for k in range(depths.n_steps + 1)
        ]
    scores = rule_scores(rule, depths, confidence)
    values = np.unique(scores[scores > NEVER])
    if not len(values):
        return []
    places = np.unique(np.linspace(0, len(values) - 1, _THRESHOLDS).astype(int))
    found = []
    for threshold in (*values[places], values[-1] + 1.0):
        taken = leave_at(scores, threshold)
        gain = np.take_along_axis(gains, taken[:, None], 1).mean()
        found.append(Choice(rule, float(threshold), float(taken.mean()), float(gain)))
    return found


def choose(
    depths: Depths,
    metric: str,
    rules: Iterable[str],
    *,
    loss: float | None = None,
    steps: float | None = None,
    confidence: Exits | None = None,
) -> Choice:
    """Choose a rule and its threshold on a split, the validation's.

    With ``loss`` the fewest mean steps among those that lose no more than that to the best fixed
    number of steps; with ``steps`` the best among those that take no more on average.
    """
    found = [c for rule in rules for c in curve(rule, depths, metric, confidence)]
    if loss is not None:
        floor = max(c.gain for c in curve("fixed", depths, metric)) - loss
        return min((c for c in found if c.gain >= floor), key=lambda c: (c.steps, -c.gain))
    assert steps is not None
    return max((c for c in found if c.steps <= steps), key=lambda c: (c.gain, -c.steps))


def adapt(
    model: LCRSER,
    data: PreparedData,
    rules: Iterable[str] = SERVED,
    *,
    metric: str = "ndcg@5",
    loss: float | None = None,
    steps: float | None = None,
) -> str:
    """Give a model the exits that validation chooses, as :func:`choose` says; tell which.

    Raises ValueError where there are no steps to leave out, where they do not stand alone, for a
    metric by which nothing can be chosen, and for a goal that nothing reaches.
    """
    K = model.config.steps
    if not K:
        raise ValueError("the model has no steps (K = 0)")
    if model.config.cross_memory == "initial":
        raise ValueError("cross_memory=initial reads h^(0) in every step: none stands alone")
    selecting_gains(make_batcher(data, "valid", None), metric)
    if loss is not None and not loss >= 0:
        raise ValueError(f"the loss must be at least 0, got {loss}")
    if steps is not None and not steps >= 0:
        raise ValueError(f"the mean steps must be at least 0, got {steps}")
    model.exits = None
    depths = read_depths(model, data)
    confidence = fit_confidence(depths)
    rules = tuple(rules)
    fixed = curve("fixed", depths, metric)
    try:
        choice = choose(depths, metric, rules, loss=loss, steps=steps, confidence=confidence)
    except ValueError:
        raise ValueError(f"no threshold of {', '.join(rules)} reaches that") from None
    model.exits = choice.exits(depths, confidence)
    name, best = metric.upper(), max(c.gain for c in fixed)
    shown = ", ".join(f"{c.gain:.4f}" for c in fixed)
    return (
        f"validation {name} after k = 0..{K} steps: {shown}\n{TITLES[choice.rule]}: {name} "
        f"{choice.gain:.4f} with {choice.steps:.2f} steps on average, best fixed {best:.4f}"
    )


class StepCount:
    """Counts steps: what a model's ``on_steps`` is told."""

    def __init__(self, n_steps: int) -> None:
        self.counts = np.zeros(n_steps + 1, dtype=np.int64)

    def __call__(self, taken: Tensor) -> None:
        self.counts += np.bincount(taken.cpu().numpy(), minlength=len(self.counts))

    def describe(self) -> str:
        """Say in one line how many steps users took; "" where there was none."""
        n = int(self.counts.sum())
        if not n:
            return ""
        steps = np.arange(len(self.counts))
        p95 = int(np.searchsorted(self.counts.cumsum(), 0.95 * n))
        shares = ", ".join(f"{k}: {c / n:.1%}" for k, c in zip(steps, self.counts, strict=True))
        return f"steps: mean {self.counts @ steps / n:.2f}, p95 {p95}; {shares}"
