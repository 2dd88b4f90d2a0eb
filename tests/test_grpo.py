"""Phase 2: rewards, advantages, actions, KL and the clipped objective."""

import itertools
import math

import pytest
import torch

import oracle
from lcr_fast import LCRConfig
from lcr_fast.grpo import (
    choose_actions,
    clip_fraction,
    entropy,
    group_advantages,
    kl_divergence,
    list_log_probability,
    list_rewards,
    policy_objective,
)
from lcr_fast.metrics import parse_reward
from lcr_fast.ops.reasoning import LATENT_REASONING, ReasoningCase
from lcr_fast.testing import random_batch, random_model

REWARDS = ["hr@1", "hr@3", "ndcg@1", "ndcg@4", "mrr"]


def draw_scores(seed=0, ties=False):
    """Scores of 4 trajectories over 6, 3 and 2 candidates, padded with -inf; targets."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    if ties:
        scores = scores.round()
    scores[1, :, 3:] = scores[2, :, 2:] = -math.inf
    return scores, torch.tensor([4, 0, 1])


# -- rewards and advantages -----------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("reward", REWARDS)
def test_rewards_match_the_oracle(reward, ties):
    scores, target = draw_scores(ties=ties)
    rewards = list_rewards(scores, target, reward)
    assert rewards.shape == (3, 4)
    for b, n in itertools.product(range(3), range(4)):
        expected = oracle.reward(scores[b, n].tolist(), int(target[b]), reward)
        assert rewards[b, n].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("reward", "terms"),
    [
        ("0.5*hr@1+0.5*ndcg@4", [(0.5, "hr@1"), (0.5, "ndcg@4")]),
        (" 2 * mrr + hr@3", [(2.0, "mrr"), (1.0, "hr@3")]),
        ("hr@1+hr@1", [(1.0, "hr@1"), (1.0, "hr@1")]),
    ],
)
def test_a_mixture_is_the_weighted_sum_of_its_terms(reward, terms):
    scores, target = draw_scores()
    mixed = list_rewards(scores, target, reward)
    parts = sum(weight * list_rewards(scores, target, name) for weight, name in terms)
    torch.testing.assert_close(mixed, parts)
    assert mixed.any()


@pytest.mark.parametrize("reward", ["hr@1", "ndcg@1"])
def test_a_constant_scorer_earns_nothing(reward):
    assert not list_rewards(torch.zeros(2, 3, 5), torch.tensor([0, 4]), reward).any()


def test_ndcg_of_one_positive_is_the_discount_of_its_rank():
    scores = -torch.arange(6.0).expand(1, 1, 6)
    for place in range(6):
        for k in (1, 3, 6):
            value = list_rewards(scores, torch.tensor([place]), f"ndcg@{k}").item()
            expected = 1 / math.log2(place + 2) if place < k else 0.0
            assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("successes", "positive", "negative"),
    [(1, 2.47417, -0.35345), (2, 1.61984, -0.53995), (4, 0.93524, -0.93524)],
)
def test_advantages_of_eight_binary_rewards(successes, positive, negative):
    rewards = (torch.arange(8) < successes).float()
    advantages = group_advantages(rewards[None])[0]
    torch.testing.assert_close(
        advantages, torch.where(rewards > 0, positive, negative), rtol=0, atol=6e-6
    )


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1 / math.log2(3)])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8])
def test_equal_rewards_and_one_trajectory_have_no_advantage(value, n):
    """Exact zeros, also where the mean of equal rewards is rounded."""
    for scale in (True, False):
        assert not group_advantages(torch.full((2, n), value), scale).any()


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_match_the_oracle_and_sum_to_zero(scale):
    rewards = torch.rand(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards.requires_grad_()
    advantages = group_advantages(rewards, scale)
    for row, given in zip(advantages, rewards, strict=True):
        expected = oracle.advantages(given.tolist(), scale)
        assert row.tolist() == pytest.approx(expected, rel=1e-12)
    assert advantages.sum(-1).abs().max() < 1e-12
    assert group_advantages(torch.tensor([1, 0])).dtype == torch.float32
    assert not advantages.requires_grad


# -- actions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", REWARDS)
def test_deterministic_actions_take_the_reward_of_the_list(reward):
    scores, target = draw_scores()
    rewards = list_rewards(scores, target, reward)
    top1 = choose_actions(scores, target, "top1", reward)
    assert torch.equal(top1.actions.squeeze(-1), scores.argmax(-1))
    chosen = choose_actions(scores, target, "target", reward)
    assert (chosen.actions.squeeze(-1) == target[:, None]).all()
    for rollout in (top1, chosen):
        assert rollout.actions.shape == (3, 4, 1)
        assert torch.equal(rollout.rewards, rewards)


@pytest.mark.parametrize(
    ("reward", "places"),
    [("hr@1", 1), ("ndcg@4", 4), ("hr@9", 6), ("mrr", 6), ("hr@1+0.5*ndcg@3", 3), ("mrr+hr@2", 6)],
)
def test_a_sampled_list_is_rewarded_for_itself(reward, places):
    scores, target = draw_scores()
    actions, rewards = choose_actions(scores, target, "sampled", reward)
    assert actions.shape == (3, 4, places)
    for b, n in itertools.product(range(3), range(4)):
        drawn = actions[b, n].tolist()
        assert len(set(drawn)) == places
        # Whatever exists comes before padding.
        exists = [scores[b, n, i] > -math.inf for i in drawn]
        assert exists == sorted(exists, reverse=True)
        place = drawn.index(int(target[b])) + 1 if int(target[b]) in drawn else math.inf
        own_list = [-drawn.index(i) if i in drawn else -99 for i in range(6)]
        expected = 0.0
        for weight, name in parse_reward(reward) if place < math.inf else ():
            expected += weight * oracle.reward(own_list, int(target[b]), name)
        assert rewards[b, n].item() == pytest.approx(expected, rel=1e-6)


def test_sampled_lists_follow_the_policy():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -1.0, 1.2, -math.inf], dtype=torch.float64)
    n = 40000
    actions, _ = choose_actions(logits.expand(1, n, 4), torch.tensor([0]), "sampled", "ndcg@2")
    seen = torch.bincount(actions[0, :, 0] * 4 + actions[0, :, 1], minlength=16) / n
    total = 0.0
    for places in itertools.permutations(range(3), 2):
        p = math.exp(oracle.list_log_probability(logits.tolist(), places))
        assert abs(seen[places[0] * 4 + places[1]] - p) < 5 * math.sqrt(p * (1 - p) / n)
        total += p
    assert total == pytest.approx(1.0)


def test_unknown_action_and_kl_are_refused():
    scores, target = draw_scores()
    with pytest.raises(ValueError, match="top1, sampled or target, got 'best'"):
        choose_actions(scores, target, "best", "hr@1")
    gumbel = torch.zeros(scores.shape[-1])
    with pytest.raises(ValueError, match=rf"gumbel must be \[.*\], got \[{len(gumbel)}\]"):
        choose_actions(scores, target, "sampled", "hr@1", gumbel)
    with pytest.raises(ValueError, match="exact or k3, got 'k2'"):
        kl_divergence(scores, scores, "k2")


# -- probabilities, KL, objective -----------------------------------------------------------------


def real_scores_of(scores):
    """Leaf with the scores of existing candidates, and the function that pads them again."""
    real = torch.isfinite(scores)

    def pad(values):
        return torch.full_like(scores, -math.inf).masked_scatter(real, values)

    return scores[real].clone().requires_grad_(), pad


@pytest.mark.parametrize("k", [1, 2, 6])
def test_list_log_probability_matches_the_oracle(k):
    scores, _ = draw_scores()
    actions = (scores + torch.rand_like(scores)).argsort(-1, descending=True)[..., :k]
    log_prob = list_log_probability(scores, actions)
    for b, n in itertools.product(range(3), range(4)):
        expected = oracle.list_log_probability(scores[b, n].tolist(), actions[b, n].tolist())
        assert log_prob[b, n].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    values, pad = real_scores_of(scores)
    assert torch.autograd.gradcheck(lambda v: list_log_probability(pad(v), actions), values)


@pytest.mark.parametrize("kind", ["exact", "k3"])
def test_kl_matches_the_oracle(kind):
    scores, _ = draw_scores()
    reference, _ = draw_scores(seed=1)
    actions = scores.argmax(-1, keepdim=True)
    kl = kl_divergence(scores, reference, kind, actions)
    assert (kl > 0).all()
    for b, n in itertools.product(range(3), range(4)):
        p, q, a = scores[b, n].tolist(), reference[b, n].tolist(), actions[b, n].tolist()
        if kind == "exact":
            expected = oracle.kl_exact(p, q)
        else:
            log_probs = (oracle.list_log_probability(s, a) for s in (p, q))
            expected = oracle.kl_k3(*log_probs)
        assert kl[b, n].item() == pytest.approx(expected, rel=1e-10)
    values, pad = real_scores_of(scores)
    assert torch.autograd.gradcheck(
        lambda v: kl_divergence(pad(v), reference, kind, actions), values
    )


def test_the_mean_of_k3_over_actions_is_the_exact_kl():
    scores, _ = draw_scores()
    reference, _ = draw_scores(seed=1)
    scores, reference = scores[:1], reference[:1]
    actions = [torch.full((1, 4, 1), i) for i in range(6)]
    k3 = torch.stack([kl_divergence(scores, reference, "k3", a) for a in actions], -1)
    torch.testing.assert_close(
        (scores.softmax(-1) * k3).sum(-1), kl_divergence(scores, reference, "exact")
    )


@pytest.mark.parametrize("kind", ["exact", "k3"])
def test_kl_and_its_gradient_vanish_where_the_policies_agree(kind):
    scores, _ = draw_scores()
    values, pad = real_scores_of(scores)
    kl = kl_divergence(pad(values), scores, kind, scores.argmax(-1, keepdim=True))
    assert not kl.any()
    (gradient,) = torch.autograd.grad(kl.sum(), values)
    assert gradient.abs().max() < 1e-15


def test_policy_objective_matches_the_oracle():
    generator = torch.Generator().manual_seed(0)
    log_prob, old, advantage = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    value = policy_objective(log_prob, old, advantage, 0.2)
    expected = [
        oracle.policy_objective(*numbers, 0.2)
        for numbers in zip(
            log_prob.flatten().tolist(),
            old.flatten().tolist(),
            advantage.flatten().tolist(),
            strict=True,
        )
    ]
    assert value.item() == pytest.approx(sum(expected) / 30, rel=1e-12)
    leaf = log_prob.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_objective(x, old, advantage, 0.2), leaf)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True)],
)
def test_clipping_stops_a_ratio_that_went_far_enough(ratio, advantage, moves):
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    value = policy_objective(log_prob, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2)
    (gradient,) = torch.autograd.grad(value, log_prob)
    assert gradient.item() == pytest.approx(ratio * advantage if moves else 0.0)


def test_entropy_matches_its_definition():
    scores, _ = draw_scores()
    for b, n in itertools.product(range(3), range(4)):
        p = [x for x in scores[b, n].softmax(-1).tolist() if x]
        expected = -sum(x * math.log(x) for x in p)
        assert entropy(scores)[b, n].item() == pytest.approx(expected, rel=1e-12)
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))


def test_clip_fraction_counts_ratios_outside():
    ratios = torch.tensor([[0.79, 0.81, 1.0], [1.19, 1.21, 3.0]], dtype=torch.float64)
    assert clip_fraction(ratios.log(), torch.zeros(2, 3), 0.2).item() == 0.5


# -- the sign of the update -----------------------------------------------------------------------


def target_update(scores, target, action, reward="hr@1"):
    """D J / d theta, where theta shifts the target's score in every trajectory alike."""
    theta = torch.zeros((), dtype=scores.dtype, requires_grad=True)
    shift = torch.nn.functional.one_hot(target, scores.shape[-1]).unsqueeze(1) * theta
    actions, rewards = choose_actions(scores, target, action, reward)
    log_prob = list_log_probability(scores + shift, actions)
    advantages = group_advantages(rewards).to(scores.dtype)
    value = policy_objective(log_prob, log_prob.detach(), advantages, 0.2)
    return torch.autograd.grad(value, theta)[0].item()


def users_whose_reward_rises_with_p(n_users, n_trajectories=8, n_candidates=5):
    """Noise on the target's score alone decides each list."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.zeros(n_users, n_trajectories, n_candidates, dtype=torch.float64)
    scores[..., 1:] -= 0.1 * torch.arange(n_candidates - 1)
    scores[..., 0] = torch.randn(n_users, n_trajectories, generator=generator, dtype=torch.float64)
    return scores, torch.zeros(n_users, dtype=torch.int64)


@pytest.mark.parametrize("reward", ["hr@1", "ndcg@5", "mrr"])
def test_action_target_pushes_the_target_down(reward):
    """Sum of A is 0, so the shift is worth -Cov(A, p), whatever the candidates are."""
    scores, target = users_whose_reward_rises_with_p(50)
    update = target_update(scores, target, "target", reward)
    advantages = group_advantages(list_rewards(scores, target, reward)).double()
    p = scores.softmax(-1)[..., 0]
    assert update == pytest.approx(-(advantages * p).mean().item(), abs=1e-6)
    assert update < -0.05
    # The mean of log p(target) itself would rise with theta.
    assert (1 - p).mean() > 0


@pytest.mark.parametrize("reward", ["hr@1", "ndcg@5", "mrr"])
def test_actions_top1_and_sampled_lift_the_target(reward):
    torch.manual_seed(0)
    scores, target = users_whose_reward_rises_with_p(3000)
    for action in ("top1", "sampled"):
        assert target_update(scores, target, action, reward) > 0.05, action


@pytest.mark.parametrize(("reward", "k"), [("hr@1", 1), ("ndcg@2", 2), ("mrr", 4)])
def test_sampled_actions_give_the_gradient_of_the_expected_reward(reward, k):
    """E[ r grad log pi ] over draws is the gradient of E[r] over all lists."""
    torch.manual_seed(0)
    n, target = 100000, 2
    theta = torch.tensor([0.3, -0.5, 0.2, 0.9], dtype=torch.float64, requires_grad=True)

    expected = torch.zeros((), dtype=torch.float64)
    for places in itertools.permutations(range(4)):
        own_list = [-places.index(i) for i in range(4)]
        log_prob = list_log_probability(theta[None, None], torch.tensor(places)[None, None])
        expected = expected + log_prob.exp() * oracle.reward(own_list, target, reward)
    (exact,) = torch.autograd.grad(expected.sum(), theta)

    scores = theta.expand(1, n, 4)
    actions, rewards = choose_actions(scores, torch.tensor([target]), "sampled", reward)
    assert actions.shape[-1] == k
    rewards = rewards.double() - rewards.double().mean()  # a baseline changes the variance only
    surrogate = (rewards * list_log_probability(scores, actions)).mean()
    (estimate,) = torch.autograd.grad(surrogate, theta)
    assert (estimate - exact).abs().max() < 5 / math.sqrt(n)
    assert exact[target] > 0.1


# -- on the model ---------------------------------------------------------------------------------

CONFIG = LCRConfig(
    n_items=9, n_users=3, n_terms=5, dim=4, n_heads=2, ffn_dim=3, steps=2, max_search_len=2,
    max_rec_len=3, max_clicks=2, mlp_hidden=(4, 3), user_embedding=True,
)  # fmt: skip
# What the fused backends serve; small, as an interpreter may run it.
FUSED = CONFIG.replace(dim=32, ffn_dim=32, steps=1, mlp_hidden=(16, 16))


class RolloutCase:
    """Scores [B, N, C] of noisy trajectories of one model and batch, empty streams included."""

    def __init__(self, backend: str, device: str = "cpu") -> None:
        exact = backend == "reference"
        self.config = (CONFIG if exact else FUSED).replace(backend=backend)
        self.dtype = torch.float64 if exact else torch.float32
        self.tolerance = 1e-13 if exact else 1e-6
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.model = self.make_model(generator)
        batch = random_batch(self.config, 6 if exact else 4, 5, generator)
        batch.candidates[2, 3:] = 0
        self.batch = batch.replace(target=batch.target.clamp(max=2)).to(device)

    def make_model(self, generator):
        return random_model(self.config, generator, self.dtype).to(self.device)

    def __call__(self, noise_scale, n=3, model=None):
        model = model or self.model
        h0 = model.encode(self.batch)
        reasoned = model.rollout(h0, self.batch, n, noise_scale, seed=3)
        return model.score(reasoned.streams, self.batch)

    def assert_no_gradient(self, value):
        gradients = torch.autograd.grad(value, list(self.model.parameters()))
        assert max(g.abs().max() for g in gradients if g.numel()) <= self.tolerance


@pytest.fixture(params=["reference", "cpp", pytest.param("triton", marks=pytest.mark.gpu)])
def any_rollout(request):
    """Run on every backend that this machine has, in float32 where it is a fused one."""
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    if request.param != "reference":
        case = ReasoningCase(
            device, torch.float32, FUSED.dim, FUSED.n_heads, FUSED.ffn_width, FUSED.max_search_len,
            FUSED.max_rec_len,
        )  # fmt: skip
        if reason := LATENT_REASONING.obstacles(case)[request.param]:
            pytest.skip(f"{request.param}: {reason}")
    return RolloutCase(request.param, device)


def objective(scores, reference_scores, target, action):
    """Clipped surrogate and KL at theta = theta_old; and the rewards."""
    actions, rewards = choose_actions(scores, target, action, "ndcg@5")
    log_prob = list_log_probability(scores, actions)
    surrogate = policy_objective(log_prob, log_prob.detach(), group_advantages(rewards), 0.2)
    kl = kl_divergence(scores, reference_scores, "exact").mean()
    return surrogate, kl, rewards


@pytest.mark.parametrize("action", ["top1", "target"])
def test_without_noise_trajectories_are_one_and_nothing_moves(any_rollout, action):
    scores = any_rollout(0.0)
    first = scores[:, :1].expand_as(scores)
    torch.testing.assert_close(scores, first, rtol=1e-6, atol=any_rollout.tolerance)
    surrogate, kl, rewards = objective(scores, scores.detach(), any_rollout.batch.target, action)
    assert not group_advantages(rewards).any()
    any_rollout.assert_no_gradient(surrogate - kl)


def test_noise_makes_trajectories_differ_but_for_users_without_events(any_rollout):
    scores = any_rollout(1.0)
    spread = (scores.amax(1) - scores.amin(1)).nan_to_num().amax(-1)
    batch = any_rollout.batch
    empty = (batch.search_lengths == 0) & (batch.rec_lengths == 0)
    assert empty.any()
    assert not spread[empty].any()
    assert (spread[~empty] > 1e-3).all()


def test_at_the_reference_policy_kl_and_its_gradient_vanish(any_rollout):
    """Policy and frozen copy share the noise, so the copy's scores are the policy's."""
    scores = any_rollout(0.5)
    frozen = any_rollout.make_model(torch.Generator().manual_seed(1))
    frozen.load_state_dict(any_rollout.model.state_dict())
    reference_scores = any_rollout(0.5, model=frozen).detach()
    _, kl, _ = objective(scores, reference_scores, any_rollout.batch.target, "top1")
    assert kl.item() == 0.0
    any_rollout.assert_no_gradient(kl)


@pytest.mark.parametrize("action", ["top1", "sampled", "target"])
def test_one_trajectory_is_defined_and_moves_nothing(any_rollout, action):
    scores = any_rollout(0.5, n=1)
    surrogate, _, _ = objective(scores, scores.detach(), any_rollout.batch.target, action)
    assert surrogate.item() == 0.0
    any_rollout.assert_no_gradient(surrogate)
