"""Phase-2 objective: GRPO over noisy latent trajectories, as small pure functions.

Shapes: scores [B, N, C] of N trajectories over a user's C candidates, target int64 [B]. The
policy is pi(i | u, n) = softmax_i(y(i; n) / tau); -inf scores (padding) have probability 0.
Probabilities are in float32 at least, of scores in halves too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcr_fast.metrics import parse_metric, parse_reward
from lcr_fast.ops.ranking import group_advantages, ranking_metrics
from lcr_fast.precision import high
from lcr_fast.profiling import ranged

__all__ = [
    "Rollout", "choose_actions", "clip_fraction", "entropy", "group_advantages", "kl_divergence",
    "list_log_probability", "list_rewards", "policy_objective",
]  # fmt: skip


class Rollout(NamedTuple):
    """What the policy did on N trajectories of B users."""

    actions: Tensor  # int64 [B, N, k], the places of its list that count
    rewards: Tensor  # float32 [B, N]


def list_rewards(scores: Tensor, target: Tensor, reward: str) -> Tensor:
    """Reward every trajectory's list, [B, N]: a metric or a weighted sum of several.

    ``reward`` as in :func:`lcr_fast.metrics.parse_reward`; ties count against the target.
    """
    terms = parse_reward(reward)
    values = ranking_metrics(scores, target.unsqueeze(-1), metrics=[name for _, name in terms])
    return torch.stack([weight * values[name] for weight, name in terms]).sum(0)


@ranged("reward")
def choose_actions(
    scores: Tensor,
    target: Tensor,
    action: str,
    reward: str,
    gumbel: Tensor | None = None,
) -> Rollout:
    """Act on every trajectory and collect the reward (paper: ranking metrics as reward).

    - ``top1``: a_n = argmax y(.; n); the reward is that of the deterministic list. On equal scores
      argmax may be any of them, while ties count against the target in the reward.
    - ``sampled``: a list drawn from the policy (Plackett-Luce: sort scores with Gumbel noise), its
      first k places for hr@k and ndcg@k (the largest k of a sum), all of it for mrr; the reward
      is the draw's own. The noise is ``gumbel`` [B, N, C], or else of torch's generator.
    - ``target``: a_n = the target with the reward of the deterministic list, as LARES and LatentR3
      do. For comparison only: with a group baseline it pushes the target down wherever the reward
      rises with p(target).

    Our reading. ``scores`` must hold the temperature already. No gradient. Raises ValueError for
    another action, and for noise of another shape.
    """
    scores = scores.detach()
    if action == "sampled":
        n_candidates = scores.shape[-1]
        cut = max(parse_metric(name)[1] or n_candidates for _, name in parse_reward(reward))
        if gumbel is None:
            gumbel = -torch.empty_like(scores).exponential_().log()
        elif gumbel.shape != scores.shape:
            raise ValueError(f"gumbel must be {list(scores.shape)}, got {list(gumbel.shape)}")
        perturbed = scores + gumbel
        actions = perturbed.topk(min(cut, n_candidates), -1).indices
        return Rollout(actions, list_rewards(perturbed, target, reward))
    rewards = list_rewards(scores, target, reward)
    if action == "top1":
        return Rollout(scores.argmax(-1, keepdim=True), rewards)
    if action == "target":
        n = scores.shape[1]
        return Rollout(target[:, None, None].expand(-1, n, 1), rewards)
    raise ValueError(f"action must be top1, sampled or target, got {action!r}")


@ranged("loss")
def list_log_probability(scores: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of a list's first k places under the policy: [B, N, C], [B, N, k] -> [B, N].

    sum_j [ s(a_j) - logsumexp(s over what a_1 .. a_{j-1} leave) ], the Plackett-Luce model; for
    k = 1 it is log softmax(s)[a]. Places taken by padding (score -inf) count 0.
    """
    scores = high(scores)
    floor = torch.finfo(scores.dtype).min / 2
    chosen = scores.gather(-1, actions)  # [B, N, k]
    padding = torch.isneginf(chosen)
    # A finite floor: logsumexp over nothing would be -inf with a NaN gradient.
    rest = scores.scatter(-1, actions, -torch.inf).clamp(min=floor).logsumexp(-1, keepdim=True)
    taken = chosen.clamp(min=floor).flip(-1)
    left = torch.cat((rest, taken), -1).logcumsumexp(-1)[..., 1:].flip(-1)  # [B, N, k]
    return (chosen - left).masked_fill(padding, 0.0).sum(-1)


@ranged("loss")
def kl_divergence(
    scores: Tensor, reference_scores: Tensor, kind: str, actions: Tensor | None = None
) -> Tensor:
    """KL(pi || pi_ref) of every trajectory, [B, N].

    ``exact``: sum_i pi(i) (log pi(i) - log pi_ref(i)), 0 with zero gradient where the two agree.
    ``k3``: r - log r - 1 with r = pi_ref(a) / pi(a) at the given ``actions``.
    """
    if kind == "k3":
        if actions is None:
            raise ValueError("kind='k3' needs the actions")
        log_ratio = list_log_probability(reference_scores, actions) - list_log_probability(
            scores, actions
        )
        return log_ratio.exp() - log_ratio - 1
    if kind != "exact":
        raise ValueError(f"kind must be exact or k3, got {kind!r}")
    log_p, log_ref = (high(s).log_softmax(-1) for s in (scores, reference_scores))
    # -inf - -inf is not a number; such a candidate has probability 0.
    difference = (log_p - log_ref).masked_fill(torch.isneginf(scores), 0.0)
    return (log_p.exp() * difference).sum(-1)


@ranged("loss")
def policy_objective(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip: float
) -> Tensor:
    """Return the clipped surrogate mean[ min(rho A, clip(rho, 1 - eps, 1 + eps) A) ], to maximise.

    All [B, N]; rho = exp(log_prob - old_log_prob).
    """
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.minimum(ratio * advantages, clipped * advantages).mean()


def clip_fraction(log_prob: Tensor, old_log_prob: Tensor, clip: float) -> Tensor:
    """Share of ratios rho outside [1 - eps, 1 + eps], a scalar."""
    ratio = (log_prob - old_log_prob).exp()
    return ((ratio - 1).abs() > clip).float().mean()


def entropy(scores: Tensor) -> Tensor:
    """Entropy of softmax(scores) in nats over the last axis: 0 for a policy that never doubts."""
    log_p = high(scores).log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(torch.isneginf(log_p), 0.0)).sum(-1)
