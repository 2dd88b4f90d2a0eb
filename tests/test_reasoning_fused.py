"""The fused backends of reasoning against the reference, through the public ops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import tensor_core
from fused_reasoning import (
    BIT_CASES,
    CONFIGS,
    DEFAULT,
    assert_same_bits,
    draw,
    forward,
    large,
    leave_out,
    precisions_of,
    require,
    skipping_what_does_not_fit,
)
from lcr_fast import ops
from lcr_fast.reference import Steps
from lcr_fast.testing import (
    Call,
    ReasoningCase,
    assert_call_parity,
    run_reasoning,
)
from lcr_fast.weights import REC, SEARCH, ReasoningWeights
from where import COMPILED, GPU, HALVES, INTERPRETED

# -- parity ---------------------------------------------------------------------------------------

CASES = {
    "default": DEFAULT,
    # The largest error of a few users is a matter of luck; a GPU affords more of them.
    "D=64 H=4, K=1": ReasoningCase(
        dim=64,
        n_heads=4,
        ffn_dim=64,
        search_len=3,
        rec_len=17,
        steps=1,
        n_users=200 if GPU else 24 if COMPILED else 5,
    ),
    "D=128 H=2, wide FFN": ReasoningCase(
        dim=128, n_heads=2, ffn_dim=160, search_len=2, rec_len=3, steps=2, n_users=64 if GPU else 3
    ),
    "D=128 H=8, no FFN": ReasoningCase(
        dim=128, n_heads=8, ffn_dim=0, search_len=4, rec_len=1, steps=1, n_users=3
    ),
    "one head, narrow FFN": ReasoningCase(n_heads=1, ffn_dim=16, n_users=5),
    "one event": ReasoningCase(search_len=1, rec_len=1, steps=3, n_users=5),
    "128 and 33 events": ReasoningCase(search_len=128, rec_len=33, steps=1, n_users=2),
    "own weights, K=3": ReasoningCase(share_steps=False, steps=3, n_users=5),
    "no FFN": ReasoningCase(ffn_dim=0, n_users=5),
    "nothing pooled": ReasoningCase(pooled=False, n_users=5),
    "dropout": ReasoningCase(dropout=0.3),
    "dropout, own weights, no FFN": ReasoningCase(dropout=0.1, share_steps=False, ffn_dim=0),
    "one trajectory, K=1": ReasoningCase(n_trajectories=1, steps=1),
    "three trajectories": ReasoningCase(n_trajectories=3, n_users=5),
    "three trajectories, K=3, own weights": ReasoningCase(
        n_trajectories=3, steps=3, share_steps=False, n_users=3
    ),
    "large states": ReasoningCase(scale=100.0, n_users=5),
    "states far from 0": ReasoningCase(offset=100.0, out_scale=0.01, n_users=5),
    "infinite padding": ReasoningCase(padding=math.inf, n_users=5),
}
IN_HALF = [
    "default",
    "D=64 H=4, K=1",
    "own weights, K=3",
    "no FFN",
    "dropout",
    "three trajectories",
]
# What the interpreter, which is slow, may leave to the other cases: test_parity has the shape, or
# another case the switch.
REDUNDANT = {
    "one event",
    "D=128 H=8, no FFN",
    "own weights, K=3",
    "no FFN",
    "nothing pooled",
    "three trajectories",
    "large states",
    "infinite padding",
}
ON_A_GPU = {
    "D=64, 50 events, K=5": ReasoningCase(
        dim=64, ffn_dim=64, search_len=50, rec_len=50, steps=5, n_users=300
    ),
    "D=32, 20 events, K=3": ReasoningCase(search_len=20, rec_len=20, steps=3, n_users=1000),
    "D=128, 128 events, K=2": ReasoningCase(
        dim=128, ffn_dim=128, search_len=128, rec_len=128, n_users=70
    ),
    "eight trajectories": ReasoningCase(
        dim=64, ffn_dim=64, search_len=30, rec_len=50, n_users=130, n_trajectories=8
    ),
    "one wide head, 64 and 128 events": ReasoningCase(
        dim=64, n_heads=1, ffn_dim=64, search_len=64, rec_len=128, n_users=40
    ),
    "dropout, 30 events": ReasoningCase(
        dim=64, ffn_dim=64, search_len=30, rec_len=30, steps=3, n_users=257, dropout=0.1
    ),
}


@pytest.mark.parametrize("case", leave_out(CASES, REDUNDANT))
def test_parity(backend, case):
    require(backend, CASES[case])
    call = draw(backend, CASES[case])
    assert_call_parity(call, backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", leave_out(IN_HALF, {*IN_HALF} - {"dropout", "D=64 H=4, K=1"}))
def test_parity_in_half_precision(backend, case, dtype):
    require(backend, CASES[case], dtype)
    call = draw(backend, CASES[case], dtype=dtype)
    assert_call_parity(call, backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_parity_of_half_states_under_float32_weights(backend, dtype):
    require(backend, ReasoningCase(), dtype)
    call = draw(backend, dtype=dtype, weights=torch.float32)
    assert run_reasoning(call, backend)["dffn_in_weight"].dtype == torch.float32
    assert_call_parity(call, backend)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("at_once", "share_steps"),
    [((2, 1), True), ((2, 1), False), ((5, 2), False)],
    ids=["2 users, 1 step, shared", "2 users, 1 step, own", "2 steps, own"],
)
def test_pieces_of_a_batch_add_up(monkeypatch, at_once, share_steps):
    case = ReasoningCase(n_users=5, steps=3, share_steps=share_steps)
    require("triton", case)
    from lcr_fast.kernels.reasoning import launch as kernels
    from lcr_fast.kernels.reasoning.scratch import Pieces

    asked = []

    def pieces(n_users, n_steps, *_):
        asked.append((n_users, n_steps))
        return Pieces(*at_once)

    monkeypatch.setattr(kernels, "pieces", pieces)
    call = draw("triton", case)
    assert_call_parity(call, "triton")
    assert asked == [(5, 3)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rec_len", "expected"), [(5, [2] * 8), (9, [2] * 8), (17, [1] * 16)])
def test_streams_share_their_launches_where_their_slots_agree(
    monkeypatch, rec_len, expected, dtype
):
    """Those of one size also share the products that make their weights' gradients."""
    case = ReasoningCase(n_users=3, search_len=5, rec_len=rec_len, steps=2)
    require("triton", case, dtype)
    from lcr_fast.kernels.reasoning import launch as kernels

    def launch(kernel, grid, *arguments, **compiled):
        if len(grid) == 3:  # [programs, streams, steps], of backward
            launched.append(grid[1])
        launch_kernel(kernel, grid, *arguments, **compiled)

    launched: list[int] = []
    launch_kernel = kernels.launch
    monkeypatch.setattr(kernels, "launch", launch)
    call = draw("triton", case, dtype=dtype)
    assert_call_parity(call, "triton")
    assert launched == expected


@pytest.mark.parametrize(
    ("n_users", "n_steps", "expected"),
    [(1, 5, (1, 5)), (25, 5, (25, 3)), (100, 5, (100, 1)), (101, 5, (52, 1)), (260, 5, (88, 1))],
)
def test_pieces_fit_scratch_and_are_even(monkeypatch, n_users, n_steps, expected):
    from lcr_fast.kernels.reasoning import scratch

    def pieces(dtype):
        return scratch.pieces(n_users, n_steps, 7, dtype, torch.device("cpu"))

    monkeypatch.setattr(scratch, "_MOST_NUMBERS", 100 * 7)
    assert pieces(torch.float32) == pieces(torch.float16) == expected
    monkeypatch.setattr(scratch, "_INTERPRETER_MEMORY", 128 * 2 * 100 * 7)
    assert pieces(torch.float16) == expected
    few = pieces(torch.float32)
    assert few.users * few.steps <= 50


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU, or its emulation")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", ON_A_GPU)
def test_parity_of_large_calls(case, dtype):
    require("triton", ON_A_GPU[case], dtype)
    call = draw("triton", large(ON_A_GPU[case]), dtype=dtype)
    assert_call_parity(call, "triton")


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has tensor cores")
@pytest.mark.parametrize(
    "case",
    ["dropout", pytest.param("three trajectories", marks=pytest.mark.full), "states far from 0"],
)
def test_parity_with_the_rounding_of_tensor_cores(monkeypatch, case):
    require("triton", CASES[case])
    call = draw("triton", CASES[case])
    with tensor_core.multiplying(monkeypatch, "highest"):
        assert_call_parity(call, "triton")


@pytest.mark.parametrize("name", ["ffn_in_weight", "ffn_in_bias"])
def test_a_nan_before_a_relu_is_not_dropped(backend, name, monkeypatch):
    """As the maximum of a GPU would, unlike that of Triton's interpreter."""
    if backend == "triton" and INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        def maximum(self, a, b):
            return self.binary_op(a, b, np.fmax)

        monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", maximum)
    call = draw(backend, ReasoningCase(steps=1, n_users=4))
    call.inputs[name].view(-1)[0] = math.nan  # of the search stream
    found = forward(call, backend)
    for x, length in zip(found.search, call.lengths[SEARCH], strict=True):
        assert x[:length].isnan().all()


# Configurations of the Triton kernels, and a case.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str
)
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_in_every_configuration(monkeypatch, name, dtype):
    config, case = CONFIGS[name]
    case = CASES[case] if GPU else CASES[case]._replace(n_users=3)
    require("triton", case, dtype)
    from lcr_fast.kernels.reasoning import config as reasoning_config

    asked = []

    def chosen(which, *_):
        asked.append(which)
        return reasoning_config.Config(**config)

    monkeypatch.setattr(reasoning_config, "config", chosen)
    call = draw("triton", case, dtype=dtype)
    with skipping_what_does_not_fit():
        assert_call_parity(call, "triton")
    assert set(asked) == {"fwd", "recompute", "bwd", "cross_bwd"}


@pytest.mark.gpu
@pytest.mark.skipif(bool(COMPILED), reason="the reference on a CPU knows no TF32")
def test_parity_where_tf32_is_allowed(monkeypatch, tf32_allowed):
    require("triton", DEFAULT)
    from lcr_fast.kernels.reasoning import launch as kernels

    precisions = precisions_of(monkeypatch, kernels)
    # With few ReLUs: one in some hundreds is so near to 0 that rounding to TF32 may decide it.
    case = ReasoningCase(ffn_dim=16, search_len=2, rec_len=3, n_users=64 if GPU else 3, dropout=0.3)
    assert_call_parity(draw("triton", case), "triton")
    assert precisions == ["bf16x3"] * 4  # forward, recomputation, backward, its cross-attention


@pytest.mark.parametrize("case", ["dropout", "three trajectories"])
def test_an_empty_batch(backend, case):
    call = draw(backend, CASES[case]._replace(n_users=0))
    results, expected = run_reasoning(call, backend), run_reasoning(call, "reference")
    for name, t in expected.items():
        assert results[name].shape == t.shape, name
        assert results[name].dtype == t.dtype, name
        assert not results[name].any(), name


@pytest.mark.parametrize("inputs", [["search"], ["target_keys"], ["self_qkv_weight", "norm_bias"]])
def test_only_some_inputs_need_gradients(backend, inputs):
    call = draw(backend, ReasoningCase(n_users=3, steps=1))
    leaves = {name: t.clone().requires_grad_(name in inputs) for name, t in call.inputs.items()}
    reasoned = forward(call._replace(inputs=leaves), backend)
    # Final states do not depend on keys, but a fused op makes all its results at once.
    moving = [name for name, t in reasoned._asdict().items() if t.requires_grad]
    gradients = torch.autograd.grad(
        [getattr(reasoned, name) for name in moving],
        [leaves[name] for name in inputs],
        [call.upstream[name] for name in moving],
    )
    complete = run_reasoning(call, backend)
    for name, gradient in zip(inputs, gradients, strict=True):
        assert torch.equal(gradient, complete[f"d{name}"]), name


# -- facts of the method --------------------------------------------------------------------------


def test_extra_padding_changes_nothing(backend):
    call = draw(backend)
    longer = {
        name: torch.nn.functional.pad(call.inputs[name], (0, 0, 0, extra), value=math.nan)
        for name, extra in (("search", 4), ("rec", 30))
    }
    a, b = forward(call, backend), forward(call._replace(inputs=call.inputs | longer), backend)
    for x, y in zip(a, b, strict=True):
        if x.ndim == 3:
            assert not y[:, x.shape[1] :].any()
            y = y[:, : x.shape[1]]
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def run_by_step(call: Call, backend: str) -> dict[str, Tensor]:
    """Run one step after the other, as deep supervision does: every state has its own gradient."""
    case = call.case
    leaves = {name: t.detach().requires_grad_() for name, t in call.inputs.items()}
    weights = ReasoningWeights(*(leaves[name] for name in ReasoningWeights._fields))
    steps, h = Steps(case.steps, case.n_heads), (leaves["search"], leaves["rec"])
    results, upstream = {}, []
    for k in range(case.steps):
        reasoned = ops.latent_reasoning(
            *h, *call.lengths, weights.step(k), steps.step(k),
            target_keys=leaves["target_keys"], backend=backend,
        )  # fmt: skip
        h = reasoned.streams
        named = {"search": h[SEARCH], "rec": h[REC], "pooled": reasoned.pooled}
        results |= {f"{name} after {k + 1}": t for name, t in named.items()}
        upstream += [call.upstream["search"], call.upstream["rec"]]
        upstream.append(call.upstream["pooled"][:, k : k + 1])
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), upstream)
    found = {name: t.detach() for name, t in results.items()}
    return found | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("share_steps", [True, False])
def test_parity_where_every_state_is_supervised(backend, share_steps):
    call = draw(backend, ReasoningCase(share_steps=share_steps))
    assert_call_parity(call, backend, run_by_step)


def test_without_steps_the_states_are_the_encoders(backend):
    call = draw(backend, ReasoningCase(steps=0, pooled=False))
    reasoned = forward(call, backend)
    for x in (SEARCH, REC):
        expected = call.inputs[("search", "rec")[x]].nan_to_num(0.0)
        assert torch.equal(reasoned.streams[x], expected)


@pytest.mark.parametrize("empty", [SEARCH, REC])
def test_an_empty_stream_leaves_the_other_without_cross_attention(backend, empty):
    """No weight of the cross-attention changes a bit, and none gets a gradient."""
    call = draw(backend, ReasoningCase(n_users=4))
    lengths = list(call.lengths)
    lengths[empty] = torch.zeros_like(lengths[empty])
    call = call._replace(lengths=tuple(lengths))
    others = {name: t + 1 if "cross" in name else t for name, t in call.inputs.items()}
    a, b = run_reasoning(call, backend), run_reasoning(call._replace(inputs=others), backend)
    assert_same_bits(a, b)
    name = ("search", "rec")[empty]
    for result in (name, f"d{name}", *(f"d{n}" for n in call.inputs if "cross" in n)):
        assert not a[result].any(), result
    assert not a["pooled"][..., empty, :].any()
    assert not a["dtarget_keys"][:, empty].any()
    assert a["drec" if empty == SEARCH else "dsearch"].any()


@pytest.mark.parametrize("noise_scale", leave_out([0.0, 0.5], {0.5}))
def test_trajectories_differ_only_by_their_noise(backend, dots_in_order, noise_scale):
    call = draw(backend, ReasoningCase(n_trajectories=3, steps=1, noise_scale=noise_scale))
    results = run_reasoning(call, backend)
    for name, lengths in zip(("search", "rec"), call.lengths, strict=True):
        some = results[name][lengths > 0]
        for n in (1, 2):
            assert torch.equal(some[:, n], some[:, 0]) == (noise_scale == 0.0)
    if noise_scale == 0.0:
        plain = call._replace(case=call.case._replace(n_trajectories=0))
        with torch.no_grad():
            assert torch.equal(forward(plain, backend).rec, results["rec"][:, 0])


def test_rows_name_the_noise_and_the_dropout(backend):
    """Whatever their place in the batch; other rows or seeds draw other numbers."""
    for case in BIT_CASES.values():
        call = draw(backend, case._replace(n_users=3, steps=1))
        first = {"search": call.inputs["search"][:1], "rec": call.inputs["rec"][:1]}
        same = {name: t.expand(3, -1, -1).clone() for name, t in first.items()}
        lengths = tuple(n[:1].expand(3).clone() for n in call.lengths)
        keys = {k: t[:1].expand_as(t) for k, t in call.inputs.items() if k == "target_keys"}
        rows = call.rows[[0, 1, 0]]
        repeated = call._replace(inputs=call.inputs | same | keys, lengths=lengths, rows=rows)
        search = run_reasoning(repeated, backend)["search"]
        assert torch.equal(search[0], search[2])
        assert not torch.equal(search[0], search[1])
