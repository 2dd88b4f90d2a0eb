"""The fused backends of the encoders against the reference, through the public op.

As tests/test_reasoning_fused.py does for reasoning: ``triton`` runs where tests/where.py says.
Inputs carry NaN behind every length, upstream gradients random numbers: neither must matter. The
first users have a full and an empty history, and one event.
"""

import functools
import math

import pytest
import torch
from torch import Tensor

import tensor_core
from fused_reasoning import (
    CONFIGS,
    DEVICES,
    assert_same_bits,
    large,
    leave_out,
    precisions_of,
    skipping_what_does_not_fit,
    take,
)
from lcr_fast.ops import reasoning as op_layer
from lcr_fast.reference import length_mask
from lcr_fast.testing import (
    Call,
    EncoderCase,
    assert_call_parity,
    encode,
    random_encoder,
    run_encoder,
)
from lcr_fast.weights import REC, SEARCH, EncoderWeights
from where import COMPILED, GPU, HALVES, INTERPRETED

DEFAULT = EncoderCase()


STREAMS = ("search", "rec")
OF_USERS = ("search", "rec", "dsearch", "drec")


def require(backend: str, case: EncoderCase = DEFAULT, dtype: torch.dtype = torch.float32) -> None:
    """Skip what the backend says it does not serve."""
    asked = op_layer.EncodeCase(
        DEVICES[backend], dtype, case.dim, case.n_heads, case.ffn_dim, case.search_len, case.rec_len
    )
    if reason := op_layer.ENCODE.obstacles(asked)[backend]:
        pytest.skip(f"{backend}: {reason}")


@pytest.fixture(
    params=[pytest.param(b, marks=[pytest.mark.gpu] if b == "triton" else []) for b in DEVICES]
)
def backend(request) -> str:
    require(request.param)
    return request.param


def draw(backend: str, case: EncoderCase = DEFAULT, dtype=torch.float32, **to) -> Call:
    require(backend, case, dtype)
    return random_encoder(case).to(dtype, device=DEVICES[backend], **to)


def assert_parity(call: Call, backend: str) -> None:
    assert_call_parity(call, backend, run_encoder)


# -- parity ---------------------------------------------------------------------------------------

# The largest error of a few users is a matter of luck; a GPU affords more of them.
FEW = 64 if GPU else 3
CASES = {
    "three layers, dropout": EncoderCase(n_layers=3, n_users=FEW, dropout=0.2),
    "more users, dropout": EncoderCase(n_users=4 * FEW, dropout=0.2),
    "slots that differ, dropout": EncoderCase(search_len=17, n_users=FEW, dropout=0.2),
    "no searches": EncoderCase(search_len=0, n_users=FEW),
    "one event": EncoderCase(search_len=1, rec_len=1, n_users=FEW),
    "one head, 17 events": EncoderCase(
        n_heads=1, n_layers=1, search_len=17, rec_len=17, n_users=FEW
    ),
    "D=64, 33 events": EncoderCase(
        dim=64, n_heads=4, ffn_dim=64, n_layers=1, search_len=33, n_users=FEW
    ),
    "D=64, 50 events, dropout": EncoderCase(
        dim=64, ffn_dim=64, n_layers=1, rec_len=50, n_users=FEW, dropout=0.1
    ),
    "D=128, 128 events": EncoderCase(dim=128, ffn_dim=160, n_layers=1, rec_len=128, n_users=FEW),
    "D=128 H=8, narrow FFN": EncoderCase(dim=128, n_heads=8, ffn_dim=16, n_layers=1, n_users=FEW),
    "infinite padding": EncoderCase(padding=math.inf, n_users=FEW),
}
REDUNDANT = {*CASES} - {
    "three layers, dropout",
    "slots that differ, dropout",
    "no searches",
    "one event",
}
ON_A_GPU = {
    "D=64, 32 events": EncoderCase(
        dim=64, ffn_dim=64, n_layers=1, search_len=32, rec_len=32, n_users=500
    ),
    "D=64, 50 events, dropout": EncoderCase(
        dim=64, ffn_dim=64, search_len=30, rec_len=50, n_users=257, dropout=0.1
    ),
    "D=32, 20 events": EncoderCase(search_len=20, rec_len=30, n_users=1000),
    "D=128, 128 events": EncoderCase(dim=128, ffn_dim=128, search_len=128, rec_len=100, n_users=70),
    "one wide head, 64 events": EncoderCase(
        dim=64, n_heads=1, ffn_dim=64, search_len=64, rec_len=64, n_users=70
    ),
}


@pytest.mark.parametrize("case", leave_out(CASES, REDUNDANT))
def test_parity(backend, case):
    assert_parity(draw(backend, CASES[case]), backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("weights", leave_out([None, torch.float32], {None}), ids=str)
def test_parity_in_half_precision(backend, dtype, weights):
    case = CASES["more users, dropout"]._replace(n_layers=1)
    call = draw(backend, case, dtype, weights=weights)
    assert run_encoder(call, backend)["dnorm_bias"].dtype == (weights or dtype)
    assert_parity(call, backend)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU, or its emulation")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", ON_A_GPU)
def test_parity_of_large_calls(case, dtype):
    assert_parity(draw("triton", large(ON_A_GPU[case]), dtype), "triton")


@pytest.mark.full
@pytest.mark.skipif(not INTERPRETED, reason="a GPU has tensor cores")
def test_parity_with_the_rounding_of_tensor_cores(monkeypatch):
    call = draw("triton", CASES["three layers, dropout"])
    with tensor_core.multiplying(monkeypatch, "highest"):
        assert_parity(call, "triton")


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_in_every_configuration(monkeypatch, name):
    config, _ = CONFIGS[name]
    require("triton")
    from lcr_fast.kernels.reasoning import config as reasoning_config

    monkeypatch.setattr(reasoning_config, "config", lambda *_: reasoning_config.Config(**config))
    case = EncoderCase(dim=128, ffn_dim=32, n_users=FEW, dropout=0.2)
    with skipping_what_does_not_fit():
        assert_parity(draw("triton", case), "triton")


@pytest.mark.gpu
@pytest.mark.skipif(bool(COMPILED), reason="the reference on a CPU knows no TF32")
def test_parity_where_tf32_is_allowed(monkeypatch, tf32_allowed):
    require("triton")
    from lcr_fast.kernels.encoding import launch as kernels

    precisions = precisions_of(monkeypatch, kernels)
    # With few ReLUs: one in some hundreds is so near to 0 that rounding to TF32 may decide it.
    case = EncoderCase(ffn_dim=16, n_layers=1, search_len=2, rec_len=3, n_users=FEW)
    assert_parity(draw("triton", case), "triton")
    assert precisions == ["bf16x3"] * 3  # forward, recomputation, backward


@pytest.mark.gpu
def test_pieces_of_a_batch_add_up(monkeypatch):
    require("triton")
    from lcr_fast.kernels.encoding import launch as kernels
    from lcr_fast.kernels.reasoning.scratch import Pieces

    asked = []

    def pieces(n_users, *_):
        asked.append(n_users)
        return Pieces(FEW, 1)

    monkeypatch.setattr(kernels, "pieces", pieces)
    assert_parity(draw("triton", EncoderCase(n_layers=1, n_users=FEW + 2)), "triton")
    assert asked == [FEW + 2]


# -- bits -----------------------------------------------------------------------------------------


BIT_CASE = EncoderCase(dropout=0.2)


@pytest.fixture
def call(backend, dots_in_order) -> Call:
    return draw(backend, BIT_CASE)


@functools.cache
def results_of(backend: str) -> dict[str, Tensor]:
    """Results of an unchanged ``call``, computed once."""
    return run_encoder(draw(backend, BIT_CASE), backend)


def test_padding_and_its_upstream_gradient_change_no_bit(backend, call):
    padding = {
        name: ~length_mask(n, call.inputs[name].shape[1]).unsqueeze(-1)
        for name, n in zip(STREAMS, call.lengths, strict=True)
    }
    other = call._replace(
        inputs=call.inputs
        | {name: call.inputs[name].masked_fill(mask, 3.0) for name, mask in padding.items()},
        upstream={n: t.masked_fill(padding[n], torch.nan) for n, t in call.upstream.items()},
    )
    results = results_of(backend)
    assert_same_bits(results, run_encoder(other, backend))
    for name, mask in padding.items():
        assert not results[name].masked_fill(~mask, 0.0).any()
        assert not results[f"d{name}"].masked_fill(~mask, 0.0).any()


def test_a_user_alone_and_any_split_of_a_batch_give_the_same_bits(backend, call):
    whole = results_of(backend)
    for users in (slice(0, 1), slice(1, 6)):
        results = run_encoder(take(call, users), backend)
        for name in OF_USERS:
            assert torch.equal(results[name], whole[name][users]), name


def test_a_stream_has_the_same_bits_whatever_the_other_is_padded_to(backend, call):
    """Their launches are one if their slots have as many rows, and two otherwise."""
    padded = torch.nn.functional.pad(call.inputs["search"], (0, 0, 0, 20))
    upstream = torch.nn.functional.pad(call.upstream["search"], (0, 0, 0, 20))
    longer = call._replace(
        inputs=call.inputs | {"search": padded}, upstream=call.upstream | {"search": upstream}
    )
    results, expected = run_encoder(longer, backend), results_of(backend)
    assert torch.equal(results["rec"], expected["rec"])
    assert torch.equal(results["drec"], expected["drec"])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU, or its emulation")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", ["D=64, 32 events", "D=64, 50 events, dropout"])
def test_no_bit_depends_on_the_slot(case, dtype):
    call = draw("triton", ON_A_GPU[case]._replace(n_users=9), dtype)
    whole = run_encoder(call, "triton")
    for users in (slice(0, 1), slice(5, 6), slice(3, 9)):
        results = run_encoder(take(call, users), "triton")
        for name in OF_USERS:
            assert torch.equal(results[name], whole[name][users]), name


@pytest.mark.full("triton")
def test_strided_inputs_and_int32_lengths_give_the_same_bits(backend, call):
    def spread(t: Tensor) -> Tensor:
        return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]

    strided = call._replace(
        inputs={name: spread(t) for name, t in call.inputs.items()},
        lengths=tuple(n.int().repeat_interleave(2)[::2] for n in call.lengths),
        rows=call.rows.repeat_interleave(2)[::2],
        upstream={name: spread(t.mT).mT for name, t in call.upstream.items()},
    )
    assert_same_bits(results_of(backend), run_encoder(strided, backend))


@pytest.mark.full("triton")
def test_every_element_is_written_and_two_runs_give_the_same_bits(backend, call):
    """Memory that torch.empty hands out holds NaN in the second."""
    expected = results_of(backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert_same_bits(expected, run_encoder(call, backend))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.full("triton")
def test_only_some_inputs_need_gradients(backend, call):
    wanted = ("rec", "qkv_bias")
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in call.inputs.items()}
    rec = encode(call._replace(inputs=leaves), backend)[REC]
    dx, dbias = torch.autograd.grad(rec, [leaves[n] for n in wanted], call.upstream["rec"])
    complete = results_of(backend)
    assert torch.equal(dx, complete["drec"])
    assert torch.equal(dbias[:, REC], complete["dqkv_bias"][:, REC])
    assert not dbias[:, SEARCH].any()
    with torch.no_grad():
        assert torch.equal(encode(call, backend)[SEARCH], complete["search"])


def test_rows_name_the_dropout(backend, call):
    """Whatever their place in the batch; another row draws other masks."""
    first = {name: call.inputs[name][:1].expand(3, -1, -1) for name in STREAMS}
    repeated = take(call, slice(0, 3))._replace(
        inputs=call.inputs | first,
        lengths=tuple(n[[0, 0, 0]] for n in call.lengths),
        rows=call.rows[[0, 1, 0]],
    )
    for out in encode(repeated, backend):
        assert torch.equal(out[0], out[2])
        assert not torch.equal(out[0], out[1])


# -- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 7])
def test_an_empty_batch(backend, length):
    call = draw(backend)
    empty = take(call, slice(0, 0 if length else 2))
    empty = empty._replace(
        inputs=empty.inputs | {name: empty.inputs[name][:, :length] for name in STREAMS},
        lengths=tuple(n * 0 for n in empty.lengths),
        upstream={name: t[:, :length] for name, t in empty.upstream.items()},
    )
    expected = run_encoder(empty, "reference")
    for name, t in run_encoder(empty, backend).items():
        assert t.shape == expected[name].shape
        assert not t.any()


def test_states_may_have_more_axes(backend, dots_in_order):
    call = draw(backend)
    twice = {name: torch.stack((x, 2 * x), 1) for name in STREAMS for x in [call.inputs[name]]}
    both = call._replace(
        inputs=call.inputs | twice, lengths=tuple(n[:, None] for n in call.lengths)
    )
    for stacked, alone in zip(encode(both, backend), encode(call, backend), strict=True):
        assert torch.equal(stacked[:, 0], alone)


def test_extra_padding_changes_nothing(backend):
    call = draw(backend)
    rec = torch.nn.functional.pad(call.inputs["rec"], (0, 0, 0, 13), value=math.nan)
    longer = encode(call._replace(inputs=call.inputs | {"rec": rec}), backend)[REC]
    assert not longer[:, 7:].any()
    torch.testing.assert_close(longer[:, :7], encode(call, backend)[REC], rtol=1e-4, atol=1e-5)


# -- torch ----------------------------------------------------------------------------------------


def test_opcheck(backend):
    case = EncoderCase(n_layers=1, search_len=1, rec_len=2, n_users=2, padding=0.0)
    call = draw(backend, case)
    weights = [call.inputs[name] for name in EncoderWeights._fields]
    seed = torch.tensor(7, device=call.rows.device)
    streams = [call.inputs[name] for name in STREAMS]
    arguments = (*streams, *call.lengths, call.rows, weights, 2, 6554, seed)
    prefix = {"triton": "triton", "cpp": "cpu"}[backend]
    forward, backward = (
        getattr(torch.ops.lcr_fast, f"{prefix}_encode_{name}").default for name in ("fwd", "bwd")
    )
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(backward, (*call.upstream.values(), *arguments))


@pytest.mark.full("triton")
def test_compiles_without_graph_breaks(backend):
    case = EncoderCase(n_layers=1, n_users=3, search_len=2, rec_len=3, dropout=0.2)
    call = draw(backend, case)

    def run(*values):
        return encode(call._replace(inputs=dict(zip(call.inputs, values, strict=True))), backend)

    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in call.inputs.values()]
        out = function(*leaves)
        found.append([*out, *torch.autograd.grad(out, leaves, list(call.upstream.values()))])
    for eager, traced in zip(*found, strict=True):
        assert torch.equal(eager, traced)


def test_only_the_inputs_are_saved_for_backward(backend, call):
    leaves = {name: t.detach().requires_grad_() for name, t in call.inputs.items()}
    known = {t.untyped_storage()._cdata for t in (*leaves.values(), *call.lengths, call.rows)}

    def pack(t: Tensor) -> Tensor:
        assert t.untyped_storage()._cdata in known or t.shape == ()  # the seed
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        encode(call._replace(inputs=leaves), backend)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_training_step_replays_the_same_bits(dtype):
    case = EncoderCase(dim=64, ffn_dim=64, search_len=20, rec_len=30, n_users=100, dropout=0.1)
    call = draw("triton", case, dtype)
    expected = run_encoder(call, "triton")  # which compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_encoder(call, "triton")
    for t in results.values():
        t.fill_(torch.nan)
    graph.replay()
    assert_same_bits(expected, results)


# -- dispatch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dim": 48}, "it needs a width of 32, 64 or 128, got 48"),
        ({"n_heads": 4}, "it needs heads at least 16 wide, got 4 heads of width 32"),
        ({"ffn_dim": 40}, "it needs an FFN width that is a multiple of 16, got 40"),
        ({"rec_len": 129}, "it holds 128 events a stream, got 129"),
        ({"dtype": torch.float64}, "it computes float32, float16 and bfloat16, not torch.float64"),
    ],
    ids=str,
)
def test_outside_the_envelope_triton_says_why(changes, reason):
    require("triton")
    case = EncoderCase()._replace(**{k: v for k, v in changes.items() if k != "dtype"})
    call = random_encoder(case).to(changes.get("dtype", torch.float32), device=DEVICES["triton"])
    with pytest.raises(ValueError, match=f"'triton' cannot serve encode: {reason}"):
        encode(call, "triton")


def test_a_layer_without_an_ffn_is_not_served():
    require("triton")
    asked = op_layer.EncodeCase(DEVICES["triton"], torch.float32, 32, 2, 0, 5, 7)
    assert op_layer.ENCODE.obstacles(asked)["triton"] == "it needs an FFN in every layer"


def test_cpp_checks_lengths_and_dtypes():
    call = draw("cpp")
    longer = (call.lengths[SEARCH], call.lengths[REC] + 1)
    with pytest.raises(RuntimeError, match=r"rec_lengths\[0\] is 8, expected 0 to 7"):
        encode(call._replace(lengths=longer), "cpp")
    with pytest.raises(ValueError, match="cannot serve encode: it serves float32 and halves"):
        encode(call.to(torch.float64), "cpp")


def test_auto_takes_the_fused_backend_of_the_device(backend):
    fused = "triton" if DEVICES[backend] == "cuda" else "cpp"
    require(fused)
    call = draw(backend)
    for chosen, asked in zip(encode(call, "auto"), encode(call, fused), strict=True):
        assert torch.equal(chosen, asked)
    on_a_gpu = op_layer.EncodeCase("cuda", torch.float32, 32, 2, 48, 5, 7)
    assert next(iter(op_layer.ENCODE.obstacles(on_a_gpu))) == "triton"
