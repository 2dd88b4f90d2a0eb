"""Scoring candidates and the whole catalogue: ours, the factored reference, repeated histories.

d = 64, 30 + 30 full histories, the head 256-200-80-1. "repeated history" expands every history once
per candidate before the attention, as the published code of UniSAR and GSERec does; "eager" is the
reference, which never does, and "torch.compile" the same compiled. Peak memory is what a call adds.
"""

import ctypes
import resource
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lcr_fast import ops, reference
from lcr_fast.config import LCRConfig
from lcr_fast.ops import scoring
from lcr_fast.testing import assert_parity, random_weights

D, L = 64, 30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = "triton" if DEVICE == "cuda" else "cpp"
K = 10


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


def make_inputs(B: int, generator: torch.Generator):
    config = LCRConfig(n_items=1, n_users=1, dim=D, max_search_len=L, max_rec_len=L)
    weights = random_weights(config, generator, torch.float32)[2]
    weights = type(weights)(
        weights.target_weight.detach().to(DEVICE),
        tuple(w.detach().to(DEVICE) for w in weights.mlp_weights),
        tuple(b.detach().to(DEVICE) for b in weights.mlp_biases),
    )
    search, rec = (torch.randn(B, L, D, generator=generator).to(DEVICE) for _ in range(2))
    lengths = torch.full((B,), L, device=DEVICE)
    user = torch.randn(B, D, generator=generator).to(DEVICE)
    return (search, rec, lengths, lengths.clone()), user, weights


def peak_bytes(function) -> int:
    """Memory that one call adds at its peak."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    resets = Path("/proc/self/clear_refs")
    if not resets.exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # else a call lives on what others have freed
    resets.write_text("5")  # forget the peak so far
    before = _resident()
    function()
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def synchronised(function):
    def call():
        result = function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return call


def finish(benchmark, race, ours, others, case, flops) -> None:
    peaks = {"ours": peak_bytes(ours)} | {name: peak_bytes(f) for name, (f, _) in others.items()}
    benchmark.extra_info |= {
        "case": case, "threads": torch.get_num_threads(), "device": DEVICE, "FLOP": flops,
        "peak bytes": peaks,
    }  # fmt: skip
    race(ours, others)


@pytest.mark.benchmark(group="scoring")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(("B", "C"), [(256, 5), (64, 100), (8, 1000)], ids=lambda n: f"{n:,}")
def test_candidates(benchmark, race, B, C, backward):
    generator = torch.Generator().manual_seed(0)
    states, user, weights = make_inputs(B, generator)
    candidates = torch.randn(B, C, D, generator=generator).to(DEVICE)
    upstream = torch.randn(B, C, generator=generator).to(DEVICE)
    trained = (*states[:2], candidates, user, weights.target_weight, *weights.mlp_weights)
    for tensor in trained:
        tensor.requires_grad_(backward)

    def run(score):
        scores = score(*states, candidates, user, weights)
        return torch.autograd.grad(scores, trained, upstream) if backward else scores

    compiled = torch.compile(reference.score, dynamic=False)
    ours = synchronised(lambda: run(lambda *args: ops.score(*args, backend=FUSED)))
    others = {
        "repeated history": (synchronised(lambda: run(repeated_history)), 1.0),
        "eager": (synchronised(lambda: run(reference.score)), 1.0),
        "torch.compile": (synchronised(lambda: run(compiled)), 1.0),
    }
    exact_weights = type(weights)(
        weights.target_weight.double(), *(tuple(t.double() for t in g) for g in weights[1:])
    )
    arguments = [t.double() for t in (*states[:2], candidates, user)]
    with torch.no_grad():
        exact = reference.score(*arguments[:2], *states[2:], *arguments[2:], exact_weights)
        eager = reference.score(*states, candidates, user, weights)
        fused = ops.score(*states, candidates, user, weights, backend=FUSED)
        assert_parity("scores", fused, eager, exact, factor=3)
        assert_parity("repeated", repeated_history(*states, candidates, user, weights), eager,
                      exact, factor=4)  # fmt: skip
    per_pair = 2 * (4 * L * D + 2 * D * D + 4 * D * 200 + 200 * 80 + 80)
    case = f"{B} x {C:,}, {'forward and backward' if backward else 'forward'}"
    finish(benchmark, race, ours, others, case, B * C * per_pair * (3 if backward else 1))


@pytest.mark.benchmark(group="catalogue")
@pytest.mark.parametrize("B", [1, 32])
@pytest.mark.parametrize("n_items", [10_000, 100_000, 1_000_000], ids=lambda n: f"{n:,}")
@torch.no_grad()
def test_catalogue(benchmark, race, n_items, B):
    """Top-k of every item. The others are given as many of the items as take about a second."""
    generator = torch.Generator().manual_seed(0)
    states, user, weights = make_inputs(B, generator)
    items = torch.randn(n_items + 1, D, generator=generator).to(DEVICE)
    exclude = torch.zeros(B, 0, dtype=torch.int64, device=DEVICE)
    budget = 10_000_000 if DEVICE == "cuda" else 300_000  # pairs

    def blocks(score, rows):
        """Score block by block of 1,024 items and keep the k best, as a plain program would."""
        top = torch.full((B, K), -torch.inf, device=DEVICE)
        for start in range(1, len(rows), 1024):
            block = rows[start : start + 1024].unsqueeze(0)
            top = torch.cat((top, score(*states, block, user, weights)), 1).topk(K).values
        return top

    others = {}
    for name, share in (("repeated history", 0.1), ("eager", 1.0), ("torch.compile", 1.0)):
        n = min(n_items, max(1024, int(budget * share) // B // 1024 * 1024))
        rows = items[: n + 1]
        score = {
            "repeated history": repeated_history,
            "eager": reference.score,
            "torch.compile": torch.compile(reference.score, dynamic=False),
        }[name]
        others[name] = (synchronised(lambda score=score, rows=rows: blocks(score, rows)),
                        n / n_items)  # fmt: skip
    ours = synchronised(
        lambda: scoring.score_topk(*states, items, user, weights, K, exclude=exclude, backend=FUSED)
    )
    part = items[:5000]
    found = scoring.score_topk(*states, part, user, weights, K, exclude=exclude, backend=FUSED)
    expected = reference.score_topk(*states, part, user, weights, K, exclude)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    per_pair = 2 * (2 * L * D + 2 * L * 200 + 200 * 80 + 80)
    finish(benchmark, race, ours, others, f"{B} x {n_items:,}", B * n_items * per_pair)
