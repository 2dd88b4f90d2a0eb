"""How many kernels and operations of torch an op of this package launches, counted without a GPU.

    python tools/launch_counts.py [--users 256 1024]

Launchers run on tensors without numbers (torch's meta device), and what they would launch is
counted: kernels of ours, and operations of torch, without those that only view or allocate. The
shapes are the defaults' (docs/switches.md) with K = 5. A GPU's memory decides how many steps of a
large batch backward takes at a time: ``--memory`` is that of the GPU, in GiB.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from lcr_fast.config import LCRConfig
from lcr_fast.kernels import encoding, lookup, reasoning, scoring, weight_gradients
from lcr_fast.kernels import launch as launching
from lcr_fast.kernels.reasoning import scratch
from lcr_fast.model import LCRSER

K, L, C, TERMS, CLICKS, HEADS = 5, 30, 100, 4, 5, 2
DTYPES = {"float32": torch.float32, "halves": torch.bfloat16}
_THRESHOLD = 6554  # of 65,536: dropout of 0.1


class Counts(NamedTuple):
    """What a call launches."""

    kernels: int
    operations: int


class _Operations(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.n += not (func.is_view or "empty" in name or name == "_unsafe_view")
        return func(*args, **(kwargs or {}))


def _launchers() -> list[Any]:
    """List the modules that have imported :func:`lcr_fast.kernels.launch.launch`."""
    modules = [m for name, m in sys.modules.items() if name.startswith("lcr_fast.kernels.")]
    return [m for m in modules if getattr(m, "launch", None) is launching.launch]


def _half_product(dy: Tensor, x: Tensor) -> Tensor:
    """One operation, as on a GPU."""
    return torch.matmul(dy.transpose(-1, -2), x).new_empty(
        *dy.shape[:-2], dy.shape[-1], x.shape[-1], dtype=torch.float32
    )


def count(call: Callable[[], Any], memory: int) -> Counts:
    """Count what a launcher launches on a GPU of so many bytes."""
    kernels = 0

    def launch(*arguments: Any, **compiled: Any) -> None:
        nonlocal kernels
        kernels += 1

    with contextlib.ExitStack() as patches:
        for module in _launchers():
            patches.enter_context(mock.patch.object(module, "launch", launch))
        for module in (scratch, weight_gradients):
            patches.enter_context(mock.patch.object(module, "half_product", _half_product))
        patches.enter_context(mock.patch.object(scratch, "_INTERPRETER_MEMORY", memory))
        patches.enter_context(knobs.runtime.scope())
        knobs.runtime.interpret = False  # there weights are not split
        operations = patches.enter_context(_Operations())
        call()
    return Counts(kernels, operations.n)


def calls(n_users: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Give a call of every launcher in training, by name; weights are float32."""

    def numbers(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def integers(*shape: int) -> Tensor:
        return numbers(*shape, of=torch.int64)

    with torch.device("meta"):
        model = LCRSER(LCRConfig(n_items=1000, n_terms=500, steps=K))
    D, B = model.config.dim, n_users
    states, one = numbers(B, L, D), numbers(B, 1, L, D)
    streams = (states, states, integers(B), integers(B))
    dropout = (_THRESHOLD, integers())
    encoder = (*streams, integers(B), list(model.encoder.weights()), HEADS, *dropout)
    steps = (
        *streams, integers(B), numbers(B, 2, D), list(model.reasoning.weights()), K, HEADS, 1,
        0.0, integers(), *dropout,
    )  # fmt: skip
    pooled, saved = numbers(B, 1, K, 2, 2, D), numbers(K - 1, B, 1, L, D)
    head = model.head.weights()
    items = model.item_embedding.weight
    scores = (
        one, one, integers(B), integers(B), items, integers(B, C), numbers(0), head.target_weight,
        list(head.mlp_weights), list(head.mlp_biases), integers(B), *dropout, True,
    )  # fmt: skip
    events = (
        integers(B, L, TERMS), integers(B, L, CLICKS), integers(B, L), model.query_embedding.weight,
        items, model.search_position, model.rec_position, CLICKS,
    )  # fmt: skip
    tables = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in events]
    seen = (
        integers(B, C), integers(B, L, CLICKS), integers(B), integers(B, L), integers(B),
        numbers(2), 1.0, CLICKS,
    )  # fmt: skip
    of_scores = numbers(B, 1, C)
    return {
        "embed": lambda: lookup.embed_fwd(*tables),
        "embed, backward": lambda: lookup.embed_bwd(states, states, *tables),
        "encode": lambda: encoding.encode_fwd(*encoder),
        "encode, backward": lambda: encoding.encode_bwd(states, states, *encoder),
        "reason": lambda: reasoning.latent_reasoning_fwd(*steps, True),
        "reason, backward": lambda: reasoning.latent_reasoning_bwd(
            one, one, pooled, *steps, saved, saved
        ),
        "score": lambda: scoring.score_fwd(*scores),
        "score, backward": lambda: scoring.score_bwd(of_scores, *scores),
        "bonus of seen items": lambda: lookup.seen_bonus_fwd(of_scores, *seen),
        "bonus of seen items, backward": lambda: lookup.seen_bonus_bwd(of_scores, of_scores, *seen),
    }


def main(argv: list[str] | None = None) -> int:
    """Print a table: kernels + operations of torch of each call."""
    parser = argparse.ArgumentParser(
        prog="python tools/launch_counts.py",
        description="Count the kernels and operations of torch that an op launches.",
    )
    parser.add_argument("--users", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--memory", type=int, default=140, help="GiB of the GPU; default: 140")
    args = parser.parse_args(argv)
    columns = [(n, name) for n in args.users for name in DTYPES]
    found = {
        column: {
            name: count(call, args.memory << 30)
            for name, call in calls(column[0], DTYPES[column[1]]).items()
        }
        for column in columns
    }
    sys.stdout.write(f"| | {' | '.join(f'B = {n}, {name}' for n, name in columns)} |\n")
    sys.stdout.write(f"|---|{'---|' * len(columns)}\n")
    for name in next(iter(found.values())):
        cells = (f"{of[name].kernels} + {of[name].operations}" for of in found.values())
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
