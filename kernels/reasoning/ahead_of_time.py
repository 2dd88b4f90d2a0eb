"""What is compiled of the reasoning kernels."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lcr_fast.kernels.gpu import GPUS, Gpu
from lcr_fast.kernels.launch import TYPES, Type, Variant, describe
from lcr_fast.kernels.reasoning.backward import (
    BackwardStream,
    cross_bwd_kernel,
    ffn_bwd_kernel,
    recompute_cross_kernel,
    recompute_self_kernel,
    self_bwd_kernel,
)
from lcr_fast.kernels.reasoning.config import READ_SHARED, constants, slots
from lcr_fast.kernels.reasoning.forward import ForwardStream, latent_reasoning_fwd_kernel
from lcr_fast.kernels.reasoning.scratch import layout
from lcr_fast.kernels.reasoning.weights import (
    AttentionWeights,
    FfnWeights,
    NormWeights,
    StepWeights,
)
from lcr_fast.kernels.weight_gradients import columns_product_kernel
from lcr_fast.kernels.weight_gradients import constants as product_constants
from lcr_fast.kernels.weight_parts import constants as parts_constants
from lcr_fast.kernels.weight_parts import weight_parts_kernel

_INT64 = ("lengths", "user_rows", "noise_seed", "dropout_seed")


def weight_types(dtype: torch.dtype, weights: torch.dtype, precision: str) -> StepWeights:
    """Types of the weights: matrices have the states' dtype, or that of their parts."""
    matrix = "*bf16" if precision.startswith("bf16x") else f"*{TYPES[dtype]}"
    vector = f"*{TYPES[weights]}"
    attention = AttentionWeights(matrix, vector, matrix, vector)
    ffn, norms = FfnWeights(matrix, vector, matrix, vector), NormWeights(vector, vector)
    return StepWeights(attention, attention, ffn, norms)


def argument_types(
    dtype: torch.dtype, weights: torch.dtype, precision: str, stream: Any = BackwardStream
) -> dict[str, Type]:
    """Types of arguments that are not numbers of the states' dtype, nor int32.

    ``stream`` is the NamedTuple that the kernel takes of either stream.
    """
    state, of_step = f"*{TYPES[dtype]}", weight_types(dtype, weights, precision)
    of_stream = {"lengths": "*i64", **dict.fromkeys(("dh", "da", "dmemory"), "*fp32")}
    both = stream(*(of_stream.get(field, state) for field in stream._fields))
    return {
        **{f"{name}_ptr": "*i64" for name in _INT64},
        **dict.fromkeys(("dkeys_ptr", "dnorm_ptr"), "*fp32"),
        **dict.fromkeys(("search", "rec"), both),
        "weights": of_step,
        "attention": of_step.self_attention,
        "ffn": of_step.ffn,
        "norms": of_step.norms,
        **dict.fromkeys(("noise_scale", "dropout_scale"), "fp32"),
    }


class Call(NamedTuple):
    """What decides the compile-time constants of a call."""

    dim: int
    size: int  # events of both streams
    dtype: torch.dtype = torch.bfloat16
    weights: torch.dtype = torch.float32
    precision: str = "ieee"
    n_heads: int = 2
    widening: int = 1  # of the FFN, over the width


TRAIN = {"NOISE": False, "DROPOUT": True, "POOL": True, "SAVE": True}


def make_variant(
    name: str, which: str, kernel: Any, call: Call, switches: dict[str, bool], gpu: Gpu
) -> Variant:
    """Describe what a pass (see :func:`constants`) launches of a kernel for a call."""
    sizes, ffn_dim = (call.size, call.size), call.widening * call.dim
    slot, _ = slots(*sizes)
    compiled = constants(
        which, call.dim, ffn_dim, call.n_heads, sizes, call.dtype, call.precision, gpu
    )
    rows = dict.fromkeys(("SEARCH_SLOT", "REC_SLOT", "SLOT", "MEMORY_SLOT"), slot)
    stream = ForwardStream if kernel is latent_reasoning_fwd_kernel else BackwardStream
    types = argument_types(call.dtype, call.weights, call.precision, stream)
    return describe(name, kernel, call.dtype, types, compiled | rows | switches)


_DEFAULTS = (  # width and events of the default model
    Call(64, 30),
    Call(64, 30, torch.float32, precision="bf16x3"),
    Call(64, 30, torch.float32, precision="bf16x6"),
)
_CALLS = (
    *_DEFAULTS,
    *(Call(*shape) for shape in ((32, 20), (64, 50), (64, 128), (128, 50), (128, 128))),
    Call(64, 50, torch.float32, precision="bf16x3"),
    *(
        Call(*shape, torch.float32, precision="bf16x6")
        for shape in ((32, 20), (64, 50), (64, 128), (128, 50), (128, 128))
    ),
)


def variants(arch: str) -> Iterator[Variant]:
    """Yield what models with two heads and F = D launch, in training and in rollouts.

    L is the longer history. Training pools every step and drops (``train``), or draws trajectories
    (``rollout``, listed for the default model: the drawing is one and the same code at all sizes);
    ``infer`` does neither. Where not all kernels are listed, those are that hold most: all are of
    sm_90, whose wgmma ptxas may get wrong, in halves and in float32 of the default model.
    """
    plain = {"NOISE": False, "DROPOUT": False, "POOL": False, "SAVE": False}
    rollout = {"NOISE": True, "DROPOUT": False, "POOL": False, "SAVE": True}
    for call in _CALLS:
        dim, dtype = call.dim, call.dtype
        if dim == 128 and call.precision == "bf16x6" and GPUS[arch].major not in READ_SHARED:
            continue  # it is not served
        if arch != "sm_90" and (dim == 32 or (dtype == torch.float32 and call.size < 50)):
            continue  # wider and longer ones take more
        kind = TYPES[dtype]
        if dtype == torch.float32:
            kind += f"-{call.precision}"
        suffix = f"{kind}-d{dim}-L{call.size}"
        launched = [
            ("fwd", "fwd-train", latent_reasoning_fwd_kernel, TRAIN),
            ("bwd", "self_bwd-train", self_bwd_kernel, TRAIN),
        ]
        if call.size > 64 and dtype == torch.float32:
            launched.append(("recompute", "recompute_cross-train", recompute_cross_kernel, TRAIN))
        if arch == "sm_90" and (call in _DEFAULTS or dtype != torch.float32):
            launched += [
                ("fwd", "fwd-infer", latent_reasoning_fwd_kernel, plain),
                ("recompute", "recompute_self-train", recompute_self_kernel, TRAIN),
                ("recompute", "recompute_cross-train", recompute_cross_kernel, TRAIN),
                ("bwd", "ffn_bwd-train", ffn_bwd_kernel, TRAIN),
                ("cross_bwd", "cross_bwd", cross_bwd_kernel, {}),
            ]
        if arch == "sm_90" and call == _DEFAULTS[0]:
            launched += [
                ("fwd", "fwd-rollout", latent_reasoning_fwd_kernel, rollout),
                ("recompute", "recompute_self-rollout", recompute_self_kernel, rollout),
                ("bwd", "ffn_bwd-rollout", ffn_bwd_kernel, rollout),
                ("bwd", "self_bwd-rollout", self_bwd_kernel, rollout),
            ]
        for which, name, kernel, switches in launched:
            yield make_variant(f"{name}-{suffix}", which, kernel, call, switches, GPUS[arch])
    for dim, precision in ((64, "bf16x3"), (64, "bf16x6"), (128, "bf16x6")):
        of = layout(dim, dim)
        compiled = product_constants(
            of.matrix_columns, of.columns.width, of.columns.width, precision
        )
        name = f"columns_product-fp32-{precision}-d{dim}"
        yield describe(name, columns_product_kernel, torch.float32, {}, compiled)
    D = 64
    sizes = (3 * D * D, D * D) * 2 + (D * D,) * 2
    types: dict[str, Type] = {"matrices": ("*fp32",) * len(sizes)}
    for precision in ("ieee", "bf16x3", "bf16x6"):
        yield describe(
            f"weight_parts-{precision}", weight_parts_kernel, torch.bfloat16, types,
            parts_constants(sizes, precision),
        )  # fmt: skip
