"""Phase-1 losses against the oracle, and the facts about the contrastive loss."""

import math

import pytest
import torch

import oracle
from lcr_fast import LCRConfig, reference
from lcr_fast.objectives import alignment, distance, rank_loss, tcl
from lcr_fast.reference import States
from lcr_fast.testing import random_streams, random_weights
from lcr_fast.weights import REC, SEARCH

CONFIG = LCRConfig(n_items=5, dim=6, n_heads=3, steps=2, max_search_len=3, max_rec_len=5)


def scores_and_targets():
    """Make lists of 6, 2 and 1 candidates, padded with -inf."""
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[1, 2:] = scores[2, 1:] = -math.inf
    return scores, torch.tensor([3, 1, 0])


@pytest.mark.parametrize("kind", ["bce", "softmax", "bpr"])
def test_rank_loss_matches_the_oracle(kind):
    scores, target = scores_and_targets()
    expected = [
        oracle.rank_loss(row, t, kind)
        for row, t in zip(scores.tolist(), target.tolist(), strict=True)
    ]
    assert rank_loss(scores, target, kind).item() == pytest.approx(sum(expected) / 3, rel=1e-12)


@pytest.mark.parametrize("kind", ["bce", "softmax", "bpr"])
def test_gradients_of_rank_loss(kind):
    scores, target = scores_and_targets()
    real = torch.isfinite(scores)

    def loss(values):
        return rank_loss(
            torch.full_like(scores, -math.inf).masked_scatter(real, values), target, kind
        )

    assert torch.autograd.gradcheck(loss, scores[real].requires_grad_())
    padded = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rank_loss(padded, target, kind), padded)
    assert torch.isfinite(gradient).all()
    assert not gradient[~real].any()
    # The positive rises, the negatives fall.
    assert gradient[0, 3] < 0 < gradient[0, [0, 1, 2, 4, 5]].min()


@pytest.mark.parametrize("kind", ["bce", "softmax", "bpr"])
def test_rank_loss_survives_huge_scores(kind):
    scores = torch.tensor([[1e4, -1e4, 1e4]], requires_grad=True)
    loss = rank_loss(scores, torch.tensor([1]), kind)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_losses_refuse_unknown_kinds():
    with pytest.raises(ValueError, match="bce, softmax or bpr, got 'hinge'"):
        rank_loss(*scores_and_targets(), "hinge")
    with pytest.raises(ValueError, match="l2 or cosine, got 'l1'"):
        distance(torch.ones(2), torch.ones(2), "l1")


# -- target-aware contrastive loss --------------------------------------------------------------


def reasoned(n_users=7):
    generator = torch.Generator().manual_seed(0)
    _, step, head = random_weights(CONFIG, generator)
    *streams, n_s, n_r = random_streams(CONFIG, n_users, generator)
    target = torch.randn(n_users, 6, generator=generator, dtype=torch.float64)
    states = reference.latent_reasoning(*streams, n_s, n_r, step, reference.Steps(2, 3))
    states = States(*([tuple(t.detach() for t in pair) for pair in part] for part in states))
    return states, (n_s, n_r), target, head.target_weight.detach()


def tcl_of(states, lengths, target, weight, **options):
    """TCL of whole states, pooled at the target."""
    keys = torch.einsum("xij,bj->bxi", weight, target)
    return tcl(reference.pool_steps(states, *lengths, keys), lengths, target, **options)


@pytest.mark.parametrize("kind", ["l2", "cosine"])
@pytest.mark.parametrize("margin", [0.1, 5.0])
def test_tcl_matches_the_oracle(kind, margin):
    states, lengths, target, weight = reasoned()
    users = []
    for b in range(7):
        after, before = (
            [[list(pair[x][b, : lengths[x][b]].numpy()) for x in (SEARCH, REC)] for pair in part]
            for part in states
        )
        users.append((after, before, target[b].numpy()))
    loss = tcl_of(states, lengths, target, weight, margin=margin, kind=kind)
    expected = oracle.tcl(users, weight.numpy(), margin, kind)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert expected > 0


def states_at(after: float, before: float, length: int = 1):
    """One step whose states lie at these distances from the target e_t = 0, in both streams."""
    lengths = (torch.tensor([length]), torch.tensor([length]))

    def pair(d):
        state = torch.zeros(1, length, 2, dtype=torch.float64)
        state[..., 0] = d
        return state.requires_grad_(), state.clone().detach().requires_grad_()

    h, a = pair(after), pair(before)
    target = torch.zeros(1, 2, dtype=torch.float64)
    return States([h, h], [a]), lengths, target, torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)


@pytest.mark.parametrize(("margin", "loss"), [(0.1, 0.0), (0.5, 0.0), (0.7, 0.2)])
def test_tcl_is_a_hinge_on_the_difference_of_distances(margin, loss):
    states, *rest = states_at(1.0, 1.5)
    assert tcl_of(states, *rest, margin=margin).item() == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_equal_states_give_the_margin_without_gradient(kind):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    lengths = (torch.tensor([3, 2]), torch.tensor([1, 3]))
    pair = (states, states)
    loss = tcl_of(States([pair, pair], [pair]), lengths, target, weight, margin=0.1, kind=kind)
    assert loss.item() == pytest.approx(0.1, abs=1e-15)
    for gradient in torch.autograd.grad(loss, (states, weight, target)):
        assert gradient.abs().max() < 1e-15


def test_a_state_at_the_target_has_a_finite_gradient():
    states, *rest = states_at(0.0, 0.0)
    loss = tcl_of(states, *rest, margin=0.1)
    leaves = (*states.h[1], *states.a[0])
    assert loss.item() == pytest.approx(0.1)
    for gradient in torch.autograd.grad(loss, leaves):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["l2", "cosine"])
@pytest.mark.parametrize("detach", [False, True])
def test_detach_negative_stops_the_gradient_of_the_negative_only(kind, detach):
    states, lengths, target, weight = reasoned()
    states = States(
        *([tuple(t.requires_grad_() for t in pair) for pair in part] for part in states)
    )
    loss = tcl_of(states, lengths, target, weight, margin=9.0, kind=kind, detach_negative=detach)
    after = torch.autograd.grad(loss, states.h[1], retain_graph=True)
    assert all(g.any() for g in after)
    before = torch.autograd.grad(loss, states.a[0], allow_unused=True)
    assert all((g is None or not g.any()) == detach for g in before)
    plain = tcl_of(states, lengths, target, weight, margin=9.0, kind=kind)
    assert loss.item() == plain.item()


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_gradients_of_tcl_with_empty_streams(kind):
    states, lengths, target, weight = reasoned(5)
    flat = [t for pair in (*states.h[1:], *states.a) for t in pair]

    def loss(target, weight, *flat):
        pairs = [tuple(flat[i : i + 2]) for i in range(0, 8, 2)]
        rebuilt = States([states.h[0], *pairs[:2]], pairs[2:])
        return tcl_of(rebuilt, lengths, target, weight, margin=0.3, kind=kind)

    leaves = [t.clone().requires_grad_() for t in (target, weight, *flat)]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    for gradient in torch.autograd.grad(loss(*leaves), leaves):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("user", [1, 2, 3])
def test_a_user_with_an_empty_stream_gives_tcl_no_gradient(user, detach):
    """Nothing was exchanged there: after and before differ by LN2 and the FFN alone."""
    states, lengths, target, weight = reasoned()
    one = slice(user, user + 1)
    states = States(
        *([tuple(t[one].requires_grad_() for t in pair) for pair in part] for part in states)
    )
    lengths = tuple(n[one] for n in lengths)
    target = target[one].clone().requires_grad_()
    loss = tcl_of(states, lengths, target, weight, margin=5.0, detach_negative=detach)
    # The stream without events is at the same distance, |e_t|, before and after.
    assert loss.item() == (5.0 if any(lengths) else 0.0)
    leaves = [target, *(t for pair in (*states.h[1:], *states.a) for t in pair)]
    for gradient in torch.autograd.grad(loss, leaves, allow_unused=True):
        assert gradient is None or not gradient.any()


def test_tcl_of_halves_is_in_float32():
    pooled, target = (torch.randn(4, *size, dtype=torch.bfloat16) for size in ((2, 2, 2, 6), (6,)))
    lengths = (torch.ones(4), torch.ones(4))
    loss = tcl(pooled, lengths, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, tcl(pooled.float(), lengths, target.float()))


def test_tcl_without_steps_is_zero():
    states, lengths, target, weight = reasoned()
    assert tcl_of(States(states.h[:1], []), lengths, target, weight).item() == 0.0


# -- alignment ------------------------------------------------------------------------------------


def test_alignment_matches_a_loop():
    """Pairs that share a side with pair i are no negatives of it."""
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(5, 6, generator=g, dtype=torch.float64) for _ in range(2))
    left_ids, right_ids = [1, 2, 1, 3, 4], [7, 8, 9, 8, 6]
    total = 0.0
    for i in range(5):
        logits = {
            j: math.sqrt(6) * float(left[i] @ right[j])
            for j in range(5)
            if j == i or (left_ids[i] != left_ids[j] and right_ids[i] != right_ids[j])
        }
        total += math.log(sum(map(math.exp, logits.values()))) - logits[i]
    got = alignment(left, right, torch.tensor(left_ids), torch.tensor(right_ids))
    assert got.item() == pytest.approx(total / 5, rel=1e-12)


def test_a_pair_without_negatives_has_no_gradient():
    left, right = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    ids = torch.tensor([5, 5, 5])
    loss = alignment(left, right, ids, torch.arange(3))
    gradients = torch.autograd.grad(loss, (left, right))
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients)
