"""float32 in parts, which the interpreter does without, made of numbers that it can multiply."""

import pytest
import torch

from where import INTERPRETED

pytest.importorskip("triton")

import triton
import triton.language as tl

from fused_reasoning import DEFAULT, draw
from lcr_fast import ops
from lcr_fast.kernels import weight_parts
from lcr_fast.kernels.core import product
from lcr_fast.kernels.reasoning import weights
from lcr_fast.kernels.scoring import call as scoring_call
from lcr_fast.kernels.scoring import head as scoring_head
from lcr_fast.testing import (
    EncoderCase,
    ReasoningCase,
    assert_call_parity,
    random_encoder,
    run_encoder,
    run_reasoning,
    tf32,
)
from scoring_cases import Case, all_scores, assert_matches, catalogue_case

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU has the parts themselves")
PARTS = {"bf16x6": 3, "bf16x3": 2}
CASES = {
    "default": DEFAULT,
    "own weights, no FFN": ReasoningCase(steps=3, share_steps=False, n_users=3, ffn_dim=0),
    "trajectories, dropout": ReasoningCase(n_trajectories=2, dropout=0.3, n_users=2),
    "slots of two sizes": ReasoningCase(search_len=3, rec_len=17, n_users=2, steps=1),
}


@triton.jit
def _cut(x):
    """Keep the 8 bits of a significand that bfloat16 has."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def float32_parts(x, PARTS: tl.constexpr):
    """Like ``parts``, in float32: the interpreter does not multiply bfloat16."""
    first = _cut(x)
    second = _cut(x - first)
    return (first, second, x - first - second) if PARTS == 3 else (first, second)


class _Torch:
    """torch, but for the dtype that parts are kept in."""

    bfloat16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Let the kernels multiply parts; returns the precisions that they were told."""
    asked = []

    def n_parts(precision: str) -> int:
        asked.append(precision)
        return PARTS.get(precision.removesuffix(" cut"), 1)

    n_parts.fn = n_parts
    for module in (product, weights, weight_parts, scoring_head, scoring_call):
        monkeypatch.setattr(module, "n_parts", n_parts)
    monkeypatch.setattr(product, "parts", float32_parts)
    for module in (weight_parts, scoring_call):
        monkeypatch.setattr(module, "torch", _Torch())
    return asked


@pytest.mark.parametrize("name", CASES)
def test_reasoning_by_parts_is_the_reference(asked, name):
    assert_call_parity(draw("triton", CASES[name]), "triton")
    assert set(asked) == {"bf16x6"}


def test_encoders_by_parts_are_the_reference(asked):
    call = random_encoder(EncoderCase(n_users=3)).to(torch.float32)
    assert_call_parity(call, "triton", run_encoder)
    assert set(asked) == {"bf16x6"}


SIZES = {"max_search_len": 5, "max_rec_len": 37, "mlp_hidden": (40, 24)}


@pytest.mark.parametrize("head", ["mlp", "mlp and dot", "dot"])
def test_scoring_by_parts_is_the_reference(asked, head):
    assert_matches(Case(head, n_candidates=19, trajectories=3, **SIZES), "triton")
    assert set(asked) == {"bf16x6"}


@pytest.mark.parametrize("head", ["mlp", "mlp and dot"])
def test_scoring_by_two_parts_has_sixteen_bits(asked, head):
    case = Case(head, n_candidates=19, trajectories=3, **SIZES)
    with tf32(True):
        found = case.run("triton")
    exact = case.run("reference", torch.float64)
    for name in exact:
        error = (found[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 2e-4, name
    assert set(asked) == {"bf16x3"}


def test_the_catalogue_by_parts_is_a_full_sort(asked):
    case = catalogue_case(40, mlp_hidden=(40, 24))
    ids, scores = case.catalogue(ops.score_topk, 5, backend="triton")
    best = all_scores(case, "reference")[:, 1:].topk(5)
    assert torch.equal(ids, best.indices + 1)
    torch.testing.assert_close(scores, best.values, rtol=1e-5, atol=1e-5)
    assert set(asked) == {"bf16x6"}


def test_cut_products_take_the_sum_of_the_parts(asked, monkeypatch):
    from lcr_fast.kernels.reasoning import config

    chosen = config.Config(num_warps=4, parked=True, cut=True, rows=32)
    monkeypatch.setattr(config, "config", lambda *_: chosen)
    assert_call_parity(draw("triton", ReasoningCase(dim=128, ffn_dim=32, n_users=2)), "triton")
    assert set(asked) >= {"bf16x6 cut"}


def test_two_parts_have_sixteen_bits(asked):
    call = draw("triton", DEFAULT)
    with tf32(True):
        found = run_reasoning(call, "triton")
    exact = run_reasoning(call.to(torch.float64), "reference")
    error = max((found[name].double() - exact[name]).abs().max() for name in ("search", "rec"))
    assert 1e-5 < error < 2e-3
    assert set(asked) == {"bf16x3"}
