"""Scoring candidates and the whole catalogue: ours, the factored reference, repeated histories.

d = 64, 30 + 30 full histories, the head 256-200-80-1. "repeated history" expands every history once
per candidate before the attention, as the published code of UniSAR and GSERec does; "eager" is the
reference, which never does, and "torch.compile" the same compiled. On a GPU in three precisions;
"captured" and "captured eager" replay CUDA graphs. Peak memory is what a call adds.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import harness
import work
from lcr_fast import ops, reference
from lcr_fast.config import LCRConfig
from lcr_fast.ops import scoring
from lcr_fast.testing import assert_parity, random_weights

D, L = 64, 30
K = 10
WIDTHS = (4 * D, 200, 80, 1)


def repeated_history(search, rec, search_lengths, rec_lengths, candidates, user, weights):
    """Score [B, C] with every history copied to each of its candidates, [B * C, L, D]."""
    B, C = search.shape[0], candidates.shape[1]
    query = candidates.expand(B, C, D).reshape(B * C, 1, D)
    parts = []
    for x, h, lengths in ((1, rec, rec_lengths), (0, search, search_lengths)):
        copies = h.repeat_interleave(C, 0)
        valid = reference.length_mask(lengths, h.shape[1]).repeat_interleave(C, 0)
        logits = (copies * F.linear(query, weights.target_weight[x])).sum(-1)
        alpha = logits.masked_fill(~valid, torch.finfo(logits.dtype).min).softmax(-1)
        parts.append((alpha.unsqueeze(-1) * copies).sum(1))
    x = torch.cat((*parts, query.squeeze(1), user.repeat_interleave(C, 0)), -1)
    for i, (w, b) in enumerate(zip(weights.mlp_weights, weights.mlp_biases, strict=True)):
        x = F.linear(F.relu(x) if i else x, w, b)
    return x.view(B, C)


def make_inputs(B: int, generator: torch.Generator, device: str, dtype: torch.dtype):
    config = LCRConfig(
        n_users=1, dim=D, max_search_len=L, max_rec_len=L, score="mlp", user_embedding=True
    )
    weights = random_weights(config, generator, torch.float32)[2]
    search, rec = (torch.randn(B, L, D, generator=generator) for _ in range(2))
    lengths = torch.full((B,), L)
    user = torch.randn(B, D, generator=generator)
    drawn = (search, rec, lengths, lengths.clone()), user, weights
    return harness.moved(drawn, device=device, dtype=dtype)


@pytest.fixture
def finish(benchmark, race, ceilings, device):
    """Time what a test has prepared, and keep its work and memory."""

    def finish(ours, others, B: int, C: int, precision: str, backward: bool = False) -> None:
        flops = B * (work.aggregation_flops(L, L, C, D) + work.head_flops(C, WIDTHS))
        flops = work.training_flops(flops) if backward else flops
        case = f"{B} x {C:,}" + ", forward and backward" * backward
        benchmark.extra_info |= {
            "case": case + f", {precision}" * (precision != "fp32"),
            "device": device,
            "axes": {"B": B, "C": C, "dtype": precision, "backward": backward},
        }
        race(ours, others, seconds=2.0)
        if benchmark.enabled:
            rate = flops / harness.work_seconds(benchmark) / 1e9
            benchmark.extra_info |= {
                "FLOPs": flops,
                "GFLOP/s": rate,
                "share of matmul rate": rate / ceilings[f"matmul {precision} GFLOP/s"],
                "peak bytes": {"": harness.peak_bytes(ours, device)}
                | {
                    name: harness.peak_bytes(f, device)
                    for name, (f, _) in others.items()
                    if name not in harness.CAPTURED.values()
                },
            }

    return finish


@pytest.mark.benchmark(group="scoring")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(
    ("B", "C"),
    [
        pytest.param(256, 5, marks=pytest.mark.extended),
        pytest.param(64, 100, marks=pytest.mark.compiled),
        pytest.param(8, 1000, marks=pytest.mark.extended),
    ],
    ids=["256-5", "64-100", "8-1,000"],
)
def test_candidates(benchmark, finish, small, compiles, capture, device, B, C, backward, precision):
    generator = torch.Generator().manual_seed(0)
    B, dtype = min(B, 2) if small else B, harness.DTYPES[precision]
    states, user, weights = make_inputs(B, generator, device, dtype)
    candidates = torch.randn(B, C, D, generator=generator).to(device, dtype)
    upstream = torch.randn(B, C, generator=generator).to(device, dtype)
    trained = (*states[:2], candidates, user, weights.target_weight, *weights.mlp_weights)
    for tensor in trained:
        tensor.requires_grad_(backward)

    def run(score):
        scores = score(*states, candidates, user, weights)
        return torch.autograd.grad(scores, trained, upstream) if backward else scores

    functions = {"repeated history": repeated_history, "eager": reference.score}
    if compiles:
        torch.compiler.reset()
        functions["torch.compile"] = torch.compile(reference.score, dynamic=False)
    with harness.multiplying_in(precision):
        with torch.no_grad():
            assert_scores(states, candidates, user, weights, precision)
        calls = {"": ops.score, **functions}
        calls = {name: partial(run, score) for name, score in calls.items()}
        expected, bound = calls["eager"](), harness.rounding_bound(precision, backward)
        for name, replay in capture(calls, [()]).items():
            harness.assert_close(name, replay(), expected, bound)
            calls[name] = replay
        ours = calls.pop("")
        finish(ours, {name: (f, 1.0) for name, f in calls.items()}, B, C, precision, backward)


def assert_scores(states, candidates, user, weights, precision: str) -> None:
    """Hold ours and the repeated history to the exact scores; in other precisions, to eager's."""
    inputs = (*states, candidates, user, weights)
    eager = reference.score(*inputs)
    scores = {"scores": ops.score(*inputs), "repeated": repeated_history(*inputs)}
    if precision == "fp32":
        exact = reference.score(*harness.moved(inputs, dtype=torch.float64))
        for (name, found), factor in zip(scores.items(), (3, 4), strict=True):
            assert_parity(name, found, eager, exact, factor=factor)
    else:
        for name, found in scores.items():
            harness.assert_close(name, found, eager, harness.rounding_bound(precision))


@pytest.mark.benchmark(group="catalogue")
@pytest.mark.parametrize("B", [1, 32])
@pytest.mark.parametrize(
    "n_items",
    [
        pytest.param(10_000, marks=pytest.mark.extended),
        pytest.param(100_000, marks=pytest.mark.compiled),
        pytest.param(1_000_000, marks=pytest.mark.extended),
    ],
    ids=lambda n: f"{n:,}",
)
@torch.no_grad()
def test_catalogue(benchmark, finish, small, compiles, device, n_items, B, precision):
    """Top-k of every item. The others are given as many of the items as take about a second."""
    generator = torch.Generator().manual_seed(0)
    B, n_items = (min(B, 2), min(n_items, 2048)) if small else (B, n_items)
    dtype = harness.DTYPES[precision]
    states, user, weights = make_inputs(B, generator, device, dtype)
    items = torch.randn(n_items + 1, D, generator=generator).to(device, dtype)
    exclude = torch.zeros(B, 0, dtype=torch.int64, device=device)
    budget = 10_000_000 if device == "cuda" else 300_000  # pairs

    def blocks(score, rows):
        """Score block by block of 1,024 items and keep the k best, as a plain program would."""
        top = torch.full((B, K), -torch.inf, device=device, dtype=dtype)
        for start in range(1, len(rows), 1024):
            block = rows[start : start + 1024].unsqueeze(0)
            top = torch.cat((top, score(*states, block, user, weights)), 1).topk(K).values
        return top

    functions = {"repeated history": (repeated_history, 0.1), "eager": (reference.score, 1.0)}
    if compiles:
        torch.compiler.reset()
        functions["torch.compile"] = (torch.compile(reference.score, dynamic=False), 1.0)
    others = {}
    for name, (score, share) in functions.items():
        n = min(n_items, max(1024, int(budget * share) // B // 1024 * 1024))
        others[name] = (partial(blocks, score, items[: n + 1]), n / n_items)

    def ours(rows=items):
        return scoring.score_topk(*states, rows, user, weights, K, exclude=exclude)

    with harness.multiplying_in(precision):
        found = ours(items[:5000])
        expected = reference.score_topk(*states, items[:5000], user, weights, K, exclude)
        if precision == "fp32":
            torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
        else:
            harness.assert_close(
                "top scores", found[1], expected[1], harness.rounding_bound(precision)
            )
        finish(ours, others, B, n_items, precision)
