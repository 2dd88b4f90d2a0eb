"""Encoders and reasoning in C++: instruction sets, threads, processes, widths of no vector.

What every fused backend owes is in tests/test_encode_fused.py and tests/test_reasoning_fused.py.
"""

import subprocess
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcr_fast.ops import ranking
from lcr_fast.ops._extension import extension_error
from lcr_fast.testing import (
    Call,
    EncoderCase,
    ReasoningCase,
    assert_call_parity,
    random_encoder,
    random_reasoning,
    run_encoder,
    run_reasoning,
)

pytestmark = pytest.mark.skipif(
    extension_error() is not None, reason=f"lcr_fast._C is not built: {extension_error()}"
)


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


# Widths and lengths that fill no vector, one, and several.
ENCODERS = {
    "default": EncoderCase(),
    "dropout": EncoderCase(dropout=0.2),
    "three layers, dropout": EncoderCase(n_layers=3, dropout=0.1),
    "D=20 H=5": EncoderCase(dim=20, n_heads=5, ffn_dim=9, search_len=18, n_layers=1),
    "D=6 H=3": EncoderCase(dim=6, n_heads=3, ffn_dim=1, search_len=1, rec_len=1),
    "D=64, 61 events": EncoderCase(dim=64, n_heads=4, ffn_dim=64, search_len=61, n_users=4),
}
REASONING = {
    "D=20 H=5": ReasoningCase(dim=20, n_heads=5, ffn_dim=9, search_len=18, n_users=7),
    "D=6 H=3": ReasoningCase(dim=6, n_heads=3, ffn_dim=1, n_users=5, dropout=0.2),
    "D=40 H=1": ReasoningCase(dim=40, n_heads=1, rec_len=50, n_trajectories=2, n_users=3),
}
# What pairs of bfloat16 can get wrong: odd inner axes, which end in half a pair; queries in several
# blocks; a single event; each width that fills vectors.
PAIRS = {
    "D=32, one event": ReasoningCase(search_len=1, rec_len=1, steps=1),
    "D=32, no FFN": ReasoningCase(ffn_dim=0, search_len=2, rec_len=31, steps=4),
    "D=64, 50 events": ReasoningCase(
        dim=64, ffn_dim=64, search_len=50, rec_len=49, steps=5, share_steps=False
    ),
    "D=128": ReasoningCase(dim=128, n_heads=4, ffn_dim=128, search_len=17, rec_len=33, steps=3),
    "D=33 H=1": ReasoningCase(dim=33, n_heads=1, ffn_dim=35, search_len=16, rec_len=15),
    "D=15 H=5, dropout": ReasoningCase(dim=15, n_heads=5, ffn_dim=1, dropout=0.1),
    "trajectories": ReasoningCase(n_trajectories=3, search_len=13, rec_len=32, steps=3),
}


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_parity(name, dtype):
    call = random_encoder(ENCODERS[name]).to(dtype)
    assert_call_parity(call, "cpp", run_encoder)


@pytest.mark.parametrize("name", [*PAIRS, "D=20 H=5", "D=40 H=1"])
def test_reasoning_parity_in_bfloat16(name):
    call = random_reasoning((REASONING | PAIRS)[name]).to(torch.bfloat16)
    assert_call_parity(call, "cpp")


def test_bfloat16_states_with_float32_weights():
    call = random_reasoning(PAIRS["D=33 H=1"]).to(torch.bfloat16, weights=torch.float32)
    assert_call_parity(call, "cpp")


@st.composite
def reasoning_cases(draw) -> ReasoningCase:
    n_heads = draw(st.integers(1, 4))
    smallest = -(-8 // n_heads)  # LayerNorm over less amplifies every rounding error
    return ReasoningCase(
        dim=n_heads * draw(st.integers(smallest, 24)),
        n_heads=n_heads,
        ffn_dim=draw(st.sampled_from((0, 1, 15, 32, 50))),
        search_len=draw(st.integers(1, 50)),
        rec_len=draw(st.integers(1, 50)),
        n_users=draw(st.integers(1, 6)),
        steps=draw(st.integers(1, 5)),
        share_steps=draw(st.booleans()),
        pooled=draw(st.booleans()),
        n_trajectories=draw(st.integers(0, 2)),
    )


@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(reasoning_cases(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_reasoning_parity_of_any_shape(case, dtype):
    """A larger factor: where a tensor has one element, its error is luck."""
    call = random_reasoning(case).to(dtype)
    assert_call_parity(call, "cpp", factor=8.0)


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_parity_of_widths_that_fill_no_vector(name):
    call = random_reasoning(REASONING[name]).to(torch.float32)
    assert_call_parity(call, "cpp")


def test_a_user_alone_has_the_same_bits_in_bfloat16():
    whole = random_reasoning(PAIRS["D=33 H=1"]).to(torch.bfloat16)
    expected = run_reasoning(whole, "cpp")
    users = slice(4, 5)
    of_users = ("search", "rec", "target_keys")
    alone = whole._replace(
        inputs={k: t[users] if k in of_users else t for k, t in whole.inputs.items()},
        lengths=tuple(n[users] for n in whole.lengths),
        rows=whole.rows[users],
        upstream={name: t[users] for name, t in whole.upstream.items()},
    )
    results = run_reasoning(alone, "cpp")
    for name in ("pooled", *of_users[:2], *(f"d{name}" for name in of_users)):
        assert torch.equal(results[name], expected[name][users]), name


# -- NaN ------------------------------------------------------------------------------------------

# Its low bits must not matter either.
NAN = torch.tensor(0x7FC00155, dtype=torch.int32).view(torch.float32)


def nan_query(bias: Tensor) -> None:
    bias[..., 0] = NAN


def overflow_to(sign: float) -> Callable[[Tensor], None]:
    """Return what makes each logit an infinity of this sign."""

    def damage(bias: Tensor) -> None:
        width = bias.shape[-1] // 3
        bias[..., :width] = 1e25
        bias[..., width : 2 * width] = sign * 1e25

    return damage


LOGITS = {
    "a NaN in the queries": nan_query,
    "logits of inf": overflow_to(1.0),
    "logits of -inf alone": overflow_to(-1.0),
}


def assert_nan_of_the_reference(run: Callable, call: Call, name: str, damage: Callable) -> None:
    results = []
    # To torch's attention -inf alone is a mask of everything; to us it is one more overflow.
    of_reference = LOGITS["logits of inf"] if damage is LOGITS["logits of -inf alone"] else damage
    for backend, do in (("cpp", damage), ("reference", of_reference)):
        inputs = call.inputs | {name: call.inputs[name].clone()}
        do(inputs[name])
        lengths = tuple(n.clamp(min=1) for n in call.lengths)  # each attends to the other
        results.append(run(call._replace(inputs=inputs, lengths=lengths), backend))
    found, expected = results
    assert any(t.isnan().any() for t in expected.values())
    for result, t in expected.items():
        assert torch.equal(found[result].isnan(), t.isnan()), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logits", LOGITS)
def test_logits_that_are_no_numbers_give_nan(logits, dtype):
    encoder = random_encoder(EncoderCase()).to(dtype)
    assert_nan_of_the_reference(run_encoder, encoder, "qkv_bias", LOGITS[logits])
    reasoning = random_reasoning(ReasoningCase()).to(dtype)
    for name in ("self_qkv_bias", "cross_qkv_bias"):
        assert_nan_of_the_reference(run_reasoning, reasoning, name, LOGITS[logits])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_target_key_of_nan_pools_to_nan(dtype):
    call = random_reasoning(ReasoningCase()).to(dtype)
    assert_nan_of_the_reference(
        run_reasoning, call, "target_keys", lambda keys: keys[0, 1, :1].copy_(NAN)
    )


# -- threads and processes ------------------------------------------------------------------------


def test_two_threads_give_the_bits_of_one():
    """Two streams of a single user, and several users."""
    call = random_encoder(ENCODERS["dropout"]).to(torch.float32)
    calls = [
        random_reasoning(ReasoningCase(n_users=n)).to(dtype)
        for n in (1, 9)
        for dtype in (torch.float32, torch.bfloat16)
    ]

    def run() -> list[dict[str, Tensor]]:
        return [run_encoder(call, "cpp"), *(run_reasoning(c, "cpp") for c in calls)]

    alone = run()
    torch.set_num_threads(2)
    try:
        both = run()
    finally:
        torch.set_num_threads(1)
    for first, second in zip(alone, both, strict=True):
        assert_same_bits(first, second)


def test_a_call_leaves_nothing_behind_in_the_scratch():
    """Threads keep their scratch: what NaN a call leaves there must not matter to the next."""
    large = random_reasoning(ReasoningCase(dim=64, ffn_dim=64, search_len=40, rec_len=50))
    nan = {name: torch.full_like(t, torch.nan) for name, t in large.inputs.items()}
    large = large._replace(inputs=nan).to(torch.float32)
    calls = [
        *((run_reasoning, random_reasoning(case).to(torch.float32)) for case in REASONING.values()),
        *((run_encoder, random_encoder(case).to(torch.float32)) for case in ENCODERS.values()),
        *((run_reasoning, random_reasoning(case).to(torch.bfloat16)) for case in PAIRS.values()),
    ]
    for run, call in calls:
        expected = run(call, "cpp")
        assert run_reasoning(large, "cpp")["search"].isnan().any()
        assert_same_bits(expected, run(call, "cpp"))


FORKED = """
import os
import torch
import test_cpu_reasoning as t

torch.set_num_threads(2)
call = t.random_reasoning(t.ReasoningCase()).to(torch.float32)
encoder = t.random_encoder(t.EncoderCase()).to(torch.float32)
results = t.run_reasoning(call, "cpp"), t.run_encoder(encoder, "cpp")
child = os.fork()
if child == 0:  # as a worker of a DataLoader starts
    torch.set_num_threads(1)
    t.assert_same_bits(results[0], t.run_reasoning(call, "cpp"))
    t.assert_same_bits(results[1], t.run_encoder(encoder, "cpp"))
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_after_a_fork(run_code):
    done = run_code(FORKED)
    assert done.returncode == 0, done.stderr


def skip_without(level: str, done: subprocess.CompletedProcess) -> None:
    if "instructions that this CPU does not have" in done.stderr:
        pytest.skip(f"this CPU has no {level}")


LEVEL = """
import torch
import test_cpu_reasoning as t
from lcr_fast.ops import ranking
assert ranking.cpu_level() == {level!r}
for name in t.ENCODERS:
    t.test_encoder_parity(name, torch.float32)
for name in t.REASONING:
    t.test_reasoning_parity_of_widths_that_fill_no_vector(name)
for name in ("D=33 H=1", "trajectories"):
    t.test_reasoning_parity_in_bfloat16(name)
t.test_encoder_parity("D=20 H=5", torch.bfloat16)
for dtype in (torch.float32, torch.bfloat16):
    for logits in t.LOGITS:
        t.test_logits_that_are_no_numbers_give_nan(logits, dtype)
    t.test_a_target_key_of_nan_pools_to_nan(dtype)
t.test_a_call_leaves_nothing_behind_in_the_scratch()
"""


@pytest.mark.parametrize("level", ranking.CPU_LEVELS)
def test_every_instruction_set(run_code, level):
    if level == ranking.cpu_level():
        pytest.skip("all other tests run with these")
    done = run_code(LEVEL.format(level=level), LCR_FAST_CPU=level)
    skip_without(level, done)
    assert done.returncode == 0, done.stderr


BITS = """
import hashlib
import torch
import test_cpu_reasoning as t
for dtype in (torch.float32, torch.float16):
    for case in (t.REASONING | t.PAIRS).values():
        results = t.run_reasoning(t.random_reasoning(case).to(dtype), "cpp")
        flat = torch.cat([x.flatten() for x in results.values()])
        print(hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest())
"""


def test_only_bfloat16_depends_on_its_instructions(run_code):
    found = []
    for level in ("avx512", "avx512bf16"):
        done = run_code(BITS, LCR_FAST_CPU=level)
        skip_without(level, done)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1] != ""
