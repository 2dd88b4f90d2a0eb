"""The reasoning as an op of torch, and the choice of its backend."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fused_reasoning import (
    BIT_CASES,
    DEFAULT,
    DEVICES,
    assert_same_bits,
    draw,
    forward,
    leave_out,
    require,
)
from lcr_fast import noise, ops
from lcr_fast.ops import _dispatch
from lcr_fast.ops.noise import Dropout, Noise
from lcr_fast.reference import Steps
from lcr_fast.testing import Call, ReasoningCase
from lcr_fast.weights import ReasoningWeights

# -- torch ----------------------------------------------------------------------------------------


def op_arguments(call: Call) -> tuple[list, list]:
    """Split a call into what the registered ops take before ``steps``, and the rest."""
    inputs = call.inputs
    weights = [inputs[name] for name in ReasoningWeights._fields]
    keys = inputs.get("target_keys", inputs["search"].new_empty(0))
    n = max(call.case.n_trajectories, 1)
    scale = call.case.noise_scale if call.case.n_trajectories else 0.0
    threshold = noise.dropout_threshold(call.case.dropout)
    tensors = [inputs["search"], inputs["rec"], *call.lengths, call.rows, keys, weights]
    noise_seed, dropout_seed = (torch.tensor(s, device=call.rows.device) for s in (5, 6))
    numbers = [call.case.steps, call.case.n_heads, n, scale, noise_seed, threshold, dropout_seed]
    return tensors, numbers


@pytest.mark.parametrize("case", leave_out(["dropout", "trajectories"], {"trajectories"}))
def test_opcheck(backend, case):
    name = {"triton": "triton", "cpp": "cpu"}[backend]
    forward_op = getattr(torch.ops.lcr_fast, f"{name}_latent_reasoning_fwd").default
    backward_op = getattr(torch.ops.lcr_fast, f"{name}_latent_reasoning_bwd").default
    small = {"n_users": 2, "search_len": 2, "rec_len": 3, "steps": 1}
    case = BIT_CASES[case]._replace(**small, padding=0.0)
    tensors, scalars = op_arguments(draw(backend, case))
    torch.library.opcheck(forward_op, (*tensors, *scalars, True))
    # Compiled it is as with them.
    quick = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, (*tensors, *scalars, False), test_utils=quick)
    *results, saved_search, saved_rec = forward_op(*tensors, *scalars, True)
    upstream = [torch.randn_like(t) for t in results]
    torch.library.opcheck(backward_op, (*upstream, *tensors, *scalars, saved_search, saved_rec))


@pytest.mark.parametrize("rollout", leave_out([False, True], {True}))
def test_compiles_without_graph_breaks(backend, rollout):
    case = ReasoningCase(n_users=3, search_len=2, rec_len=3, n_trajectories=2 * rollout)
    call = draw(backend, case)
    names = list(call.inputs)

    def run(*inputs):
        given = dict(zip(names, inputs, strict=True))
        weights = ReasoningWeights(*(given[name] for name in ReasoningWeights._fields))
        streams = (given["search"], given["rec"], *call.lengths)
        if rollout:
            options = {"noise": Noise(2, 0.5, 3, call.rows)}
        else:
            options = {"target_keys": given["target_keys"], "dropout": Dropout(0.1, 7, call.rows)}
        reasoned = ops.latent_reasoning(
            *streams, weights, Steps(case.steps, case.n_heads), backend=backend, **options
        )
        return [t for t in reasoned if t is not None]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = []
    for function in (run, compiled):
        leaves = [t.detach().clone().requires_grad_() for t in call.inputs.values()]
        results = function(*leaves)
        upstream = list(call.upstream.values())
        gradients = torch.autograd.grad(results, leaves, upstream, allow_unused=True)
        found.append([*results, *(g for g in gradients if g is not None)])
    for eager, traced in zip(*found, strict=True):
        assert torch.equal(eager, traced)


def saved_bytes(call: Call, backend: str) -> int:
    """Count the storages that a forward keeps for its backward, the weights' left out."""
    weights = [call.inputs[name] for name in ReasoningWeights._fields]
    known = {t.untyped_storage()._cdata for t in weights}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
            alive.append(t)  # else its address could be used again
        return t

    alive: list[Tensor] = []
    for t in call.inputs.values():
        t.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(call, backend)
    return sum(kept.values())


@pytest.mark.parametrize("n_trajectories", [0, 8])
def test_a_fifteenth_of_the_bytes_is_saved_for_backward(backend, n_trajectories):
    """Weights apart, on fake tensors: nothing is computed, so the call can be a real one.

    K=5 steps of D=64 on 50 + 50 events. Kept are the inputs of the steps; of a rollout h^(0) once
    a user, and neither its copies nor the noise.
    """
    case = ReasoningCase(
        dim=64, ffn_dim=64, search_len=50, rec_len=50, steps=5, n_users=64, pooled=False,
        n_trajectories=n_trajectories,
    )  # fmt: skip
    require(backend, case)
    call = draw(backend, case)
    with FakeTensorMode() as mode:
        fake = call._replace(
            inputs={name: mode.from_tensor(t) for name, t in call.inputs.items()},
            lengths=tuple(mode.from_tensor(n) for n in call.lengths),
            rows=mode.from_tensor(call.rows),
        )
        fused, eager = saved_bytes(fake, backend), saved_bytes(fake, "reference")
    of_a_step = 64 * 2 * 50 * 64 * 4  # float32
    assert fused < 1.01 * of_a_step * (1 + 4 * max(1, n_trajectories))
    assert eager >= 15 * fused


# -- dispatch -------------------------------------------------------------------------------------

OUTSIDE = {
    "double": ({}, torch.float64, {}),
    "step embedding": ({}, torch.float32, {"embedding": torch.zeros(2, 2, 32)}),
    "update": ({}, torch.float32, {"update": "rec_first"}),
    "memory": ({}, torch.float32, {"cross_memory": "initial"}),
}
REASONS = {
    "double": "float64",
    "step embedding": "step embedding",
    "update": "update='rec_first'",
    "memory": "cross_memory='initial'",
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_outside_the_envelope_a_backend_says_why(backend, what):
    changes, dtype, options = OUTSIDE[what]
    call = draw(backend, ReasoningCase(**changes), dtype=dtype)
    options = {
        k: v.to(DEVICES[backend]) if isinstance(v, Tensor) else v for k, v in options.items()
    }
    with pytest.raises(ValueError, match=f"'{backend}' cannot serve .*{REASONS[what]}.*reference"):
        forward(call, backend, **options)


def test_auto_says_once_that_the_reference_serves(backend, caplog):
    _dispatch.say_once.cache_clear()
    call = draw(backend)
    for _ in range(2):
        reasoned = forward(call, "auto", update="rec_first")
    expected = forward(call, "reference", update="rec_first")
    assert torch.equal(reasoned.rec, expected.rec)
    (record,) = caplog.records
    fused = "triton" if DEVICES[backend] == "cuda" else "cpp"
    assert record.levelname == "WARNING"
    assert f"runs on the reference backend, not {fused}" in record.message
    assert "rec_first" in record.message


def test_auto_takes_the_fused_backend_of_the_device(backend, caplog):
    _dispatch.say_once.cache_clear()
    fused = "triton" if DEVICES[backend] == "cuda" else "cpp"
    require(fused, DEFAULT)
    call = draw(backend)
    assert_same_bits(forward(call, "auto")._asdict(), forward(call, fused)._asdict())
    assert not caplog.records


def test_trajectories_may_be_given_as_states(backend, dots_in_order):
    """[B, N, L, D] states with lengths [B, 1] are B N users."""
    call = draw(backend, ReasoningCase(pooled=False))
    given = {
        name: torch.stack((call.inputs[name], 2 * call.inputs[name]), 1)
        for name in ("search", "rec")
    }
    both = call._replace(
        inputs=call.inputs | given, lengths=tuple(n.unsqueeze(1) for n in call.lengths)
    )
    reasoned = forward(both, backend)
    assert torch.equal(reasoned.rec[:, 0], forward(call, backend).rec)
    doubled = {name: 2 * call.inputs[name] for name in given}
    again = forward(call._replace(inputs=call.inputs | doubled), backend)
    assert torch.equal(reasoned.search[:, 1], again.search)
