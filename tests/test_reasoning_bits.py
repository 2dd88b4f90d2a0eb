"""Bits of the fused reasoning: the same from run to run, whatever the batch, layout and threads."""

import functools
import math

import pytest
import torch
from torch import Tensor

from fused_reasoning import BIT_CASES, DEFAULT, assert_same_bits, draw, forward, require, take
from lcr_fast.reference import length_mask
from lcr_fast.testing import Call, ReasoningCase, run_reasoning


@pytest.fixture(params=BIT_CASES)
def bit_call(request, backend, dots_in_order) -> Call:
    return draw(backend, BIT_CASES[request.param])


@functools.cache
def _results(backend: str, name: str) -> dict[str, Tensor]:
    return run_reasoning(draw(backend, BIT_CASES[name]), backend)


def results_of(backend: str, call: Call) -> dict[str, Tensor]:
    """Results of an unchanged ``bit_call``, computed once."""
    return _results(backend, next(name for name, case in BIT_CASES.items() if case == call.case))


@pytest.mark.full("triton")
def test_two_runs_give_the_same_bits(backend, bit_call):
    assert_same_bits(results_of(backend, bit_call), run_reasoning(bit_call, backend))


def test_a_user_alone_and_any_split_of_a_batch_give_the_same_bits(backend, bit_call):
    whole = results_of(backend, bit_call)
    n = bit_call.case.n_users
    for users in (slice(0, 1), slice(1, n)):
        part = run_reasoning(take(bit_call, users), backend)
        for name in ("search", "rec", "pooled", "dsearch", "drec", "dtarget_keys"):
            if name in whole:
                assert torch.equal(part[name], whole[name][users]), name


def test_padding_and_its_upstream_gradient_change_no_bit(backend, bit_call):
    def fill(tensors: dict[str, Tensor], value: float) -> dict[str, Tensor]:
        filled = dict(tensors)
        for name, lengths in zip(("search", "rec"), bit_call.lengths, strict=True):
            t = tensors[name]
            valid = length_mask(lengths, t.shape[-2])  # [B, L]
            valid = valid.view(len(t), *[1] * (t.ndim - 3), -1, 1)
            filled[name] = t.masked_fill(~valid, value)
        return filled

    other = bit_call._replace(
        inputs=fill(bit_call.inputs, 3.0), upstream=fill(bit_call.upstream, math.nan)
    )
    assert_same_bits(results_of(backend, bit_call), run_reasoning(other, backend))


def test_strided_inputs_give_the_bits_of_contiguous_ones(backend, bit_call):
    def spread(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), math.nan, dtype=t.dtype, device=t.device)
        wide[..., 0] = t
        return wide[..., 0]

    strided = bit_call._replace(
        inputs={name: spread(t) for name, t in bit_call.inputs.items()},
        upstream={name: spread(t.mT).mT for name, t in bit_call.upstream.items()},
        lengths=tuple(n.repeat_interleave(2)[::2] for n in bit_call.lengths),
        rows=bit_call.rows.repeat_interleave(2)[::2],
    )
    assert not any(t.is_contiguous() for t in strided.inputs.values())
    assert_same_bits(results_of(backend, bit_call), run_reasoning(strided, backend))


def test_every_element_is_written(backend, bit_call):
    """Memory that torch.empty hands out holds NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = run_reasoning(bit_call, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(results_of(backend, bit_call), poisoned)


def test_results_without_gradients_have_the_same_bits(backend):
    call = draw(backend)
    results = run_reasoning(call, backend)
    with torch.no_grad():
        assert_same_bits(forward(call, backend)._asdict(), {k: results[k] for k in call.upstream})


def test_the_number_of_threads_changes_no_bit():
    require("cpp", DEFAULT)
    call = draw("cpp", ReasoningCase(n_users=40, search_len=20, rec_len=11))
    alone = run_reasoning(call, "cpp")
    torch.set_num_threads(3)
    try:
        assert_same_bits(alone, run_reasoning(call, "cpp"))
    finally:
        torch.set_num_threads(1)
