"""Calls of the fused reasoning, and what its tests share.

``cpp`` runs on the CPU. ``triton`` runs where tests/where.py says: without a GPU a program is slow,
so shapes are small there, and larger on a GPU.

Inputs carry NaN behind every length, upstream gradients random numbers: neither must matter. The
first users of a call are the corners, among them each empty stream.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lcr_fast import ops
from lcr_fast.ops import reasoning as op_layer
from lcr_fast.reference import Steps
from lcr_fast.testing import (
    Call,
    ReasoningCase,
    random_reasoning,
)
from lcr_fast.weights import ReasoningWeights
from where import COMPILED, DEVICE, GPU

DEVICES = {"triton": DEVICE, "cpp": "cpu"}
DEFAULT = ReasoningCase()
BIT_CASES = {
    "dropout": ReasoningCase(dropout=0.2, n_users=6 if GPU else 4),
    "trajectories": ReasoningCase(n_trajectories=2, n_users=4 if GPU else 3),
}
CONFIGS = {
    "one sequence a tile": ({"num_warps": 4, "rows": 16}, "dropout"),
    "one head at a time": ({"num_warps": 4, "block_heads": 16}, "dropout"),
    "every operand is parked": ({"num_warps": 4, "parked": True, "rows": 32}, "dropout"),
    "products in pieces": (
        {"num_warps": 8, "parked": True, "block_f": 16, "cut": True},
        "D=128 H=2, wide FFN",
    ),
}


def obstacle(backend: str, case: ReasoningCase, dtype: torch.dtype) -> str | None:
    asked = op_layer.ReasoningCase(
        DEVICES[backend], dtype, case.dim, case.n_heads, case.ffn_dim, case.search_len, case.rec_len
    )
    return op_layer.LATENT_REASONING.obstacles(asked)[backend]


@contextlib.contextmanager
def skipping_what_does_not_fit() -> Iterator[None]:
    """Skip a configuration that takes more tensor memory than the GPU has, which none is given."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "OutOfResources" or "tensor memory" not in str(error):
            raise
        pytest.skip(str(error))


def require(backend: str, case: ReasoningCase, dtype: torch.dtype = torch.float32) -> None:
    """Skip what the backend says it does not serve."""
    if reason := obstacle(backend, case, dtype):
        pytest.skip(f"{backend}: {reason}")


def draw(
    backend: str, case: ReasoningCase = DEFAULT, seed: int = 0, dtype=torch.float32, **to
) -> Call:
    return random_reasoning(case, seed).to(dtype, device=DEVICES[backend], **to)


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


def large(case):
    """Return a large case, or where a GPU is emulated, as many of its users as that affords."""
    return case._replace(n_users=min(case.n_users, 5)) if COMPILED else case


def leave_out(cases: Iterable, redundant: Collection) -> list:
    """Parametrise with ``cases``, on Triton without the redundant ones unless all tests run."""
    full = pytest.mark.full("triton")
    return [pytest.param(case, marks=[full] if case in redundant else []) for case in cases]


def precisions_of(monkeypatch, kernels: ModuleType) -> list[str]:
    """Note how what a module of launchers compiles multiplies, in the order of its launches."""
    precisions = []
    constants = kernels.constants

    def noting(*of_call):
        compiled = constants(*of_call)
        precisions.append(compiled["SHAPE"].PRECISION)
        return compiled

    monkeypatch.setattr(kernels, "constants", noting)
    return precisions


def forward(call: Call, backend: str, **switches) -> op_layer.Reasoned:
    """Run a call of latent_reasoning as it stands."""
    weights = ReasoningWeights(*(call.inputs[name] for name in ReasoningWeights._fields))
    return ops.latent_reasoning(
        call.inputs["search"],
        call.inputs["rec"],
        *call.lengths,
        weights,
        Steps(call.case.steps, call.case.n_heads, **switches),
        backend=backend,
        target_keys=call.inputs.get("target_keys"),
    )


def take(call: Call, users: slice) -> Call:
    """Keep some users of a call."""
    of_users = {"search", "rec", "target_keys"}
    return call._replace(
        inputs={name: t[users] if name in of_users else t for name, t in call.inputs.items()},
        lengths=tuple(n[users] for n in call.lengths),
        rows=call.rows[users],
        upstream={name: t[users] for name, t in call.upstream.items()},
    )
