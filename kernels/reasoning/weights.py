"""Weights as the kernels take them, and where those of one stream and step stand.

An encoder's layer is a step without cross-attention.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.core.product import n_parts, parts
from lcr_fast.kernels.gpu import dot_precision, on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.weights import EncoderWeights, ReasoningWeights


class AttentionWeights(NamedTuple):
    """Of all P sets of weights and both streams, or at those of one."""

    qkv_weight: Any  # [P, 2, 3D, D], or of float32 [P, 2, parts, 3D, D]
    qkv_bias: Any  # [P, 2, 3D]
    out_weight: Any  # [P, 2, D, D]
    out_bias: Any  # [P, 2, D]


class FfnWeights(NamedTuple):
    """Of all P sets of weights and both streams, or at those of one."""

    in_weight: Any  # [P, 2, F, D]
    in_bias: Any  # [P, 2, F]
    out_weight: Any  # [P, 2, D, F]
    out_bias: Any  # [P, 2, D]


class NormWeights(NamedTuple):
    """Of all P sets of weights, both streams and every sublayer, or at those of one."""

    weight: Any  # [P, 2, SUBLAYERS, D]
    bias: Any  # [P, 2, SUBLAYERS, D]


class StepWeights(NamedTuple):
    """All of them; a kernel that reads fewer takes fewer."""

    self_attention: AttentionWeights
    cross_attention: AttentionWeights
    ffn: FfnWeights
    norms: NormWeights


class LayerWeights(NamedTuple):
    """Those of an encoder."""

    attention: AttentionWeights
    ffn: FfnWeights
    norms: NormWeights


@triton.jit
def _split_block(
    matrix_ptr, parts_ptr, first, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    at = first + tl.arange(0, BLOCK)
    made = parts(tl.load(matrix_ptr + at), PARTS)
    for part in tl.static_range(PARTS):
        tl.store(parts_ptr + part * SIZE + at, made[part])


@kernel()
def split_weights_kernel(
    matrices,  # pointers, float32 [sets, SIZES[i]]
    parts_ptr,  # bfloat16 [sets, PARTS, SIZES[i]] of each matrix, one behind the other
    SIZES: tl.constexpr,  # multiples of BLOCK
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK numbers of one set of weights, whichever matrix they are of."""
    first, member = tl.program_id(0) * BLOCK, tl.program_id(1)
    begin = 0
    for i in tl.static_range(len(SIZES)):
        if (first >= begin) & (first < begin + SIZES[i]):
            _split_block(
                matrices[i] + member * SIZES[i],
                parts_ptr + PARTS * (begin * tl.num_programs(1) + member * SIZES[i]),
                first - begin, SIZES[i], PARTS, BLOCK,
            )  # fmt: skip
        begin += SIZES[i]


def split_constants(sizes: tuple[int, ...], n: int) -> dict[str, Any]:
    """Compile-time arguments and launch options to split matrices of so many numbers in n parts.

    Each has a multiple of 32 x 16.
    """
    return {"SIZES": sizes, "PARTS": n, "BLOCK": 512, "num_warps": 4}


def for_products(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Make of matrices [P, 2, out, in] what products take, once for all programs of a call.

    Halves are cast: a cast in a program takes it twice the registers. float32 is split into its
    parts, [P, 2, parts, out, in], left flat: a view costs the host more than a kernel's argument.
    """
    n = n_parts.fn(dot_precision(dtype))
    if n == 1:
        return [matrix.to(dtype) for matrix in matrices]
    matrices = [matrix.float().contiguous() for matrix in matrices]
    sets, sizes = matrices[0].shape[:2].numel(), tuple(m.shape[2:].numel() for m in matrices)
    made = matrices[0].new_empty(n * sets * sum(sizes), dtype=torch.bfloat16)
    compiled = split_constants(sizes, n)
    with on_device(made):
        launch(
            split_weights_kernel, (sum(sizes) // compiled["BLOCK"], sets), tuple(matrices), made,
            **compiled,
        )  # fmt: skip
    return list(made.split([n * sets * size for size in sizes]))


def _attention(
    weights: ReasoningWeights | EncoderWeights, prefix: str, qkv: Tensor, out: Tensor
) -> AttentionWeights:
    qkv_bias, out_bias = (getattr(weights, f"{prefix}{of}_bias") for of in ("qkv", "out"))
    return AttentionWeights(qkv, qkv_bias, out, out_bias)


def _ffn(weights: ReasoningWeights | EncoderWeights, into: Tensor, out: Tensor) -> FfnWeights:
    return FfnWeights(into, weights.ffn_in_bias, out, weights.ffn_out_bias)


def layer_weights(weights: EncoderWeights, dtype: torch.dtype) -> LayerWeights:
    """Prepare the weights of an encoder for its kernels."""
    qkv, out, *ffn = for_products(
        (weights.qkv_weight, weights.out_weight, weights.ffn_in_weight, weights.ffn_out_weight),
        dtype,
    )
    norms = NormWeights(weights.norm_weight, weights.norm_bias)
    return LayerWeights(_attention(weights, "", qkv, out), _ffn(weights, *ffn), norms)


def step_weights(weights: ReasoningWeights, dtype: torch.dtype) -> StepWeights:
    """Prepare the weights of reasoning for its kernels."""
    self_qkv, self_out, cross_qkv, cross_out, *ffn = for_products(
        (
            weights.self_qkv_weight, weights.self_out_weight,
            weights.cross_qkv_weight, weights.cross_out_weight,
            weights.ffn_in_weight, weights.ffn_out_weight,
        ),
        dtype,
    )  # fmt: skip
    return StepWeights(
        _attention(weights, "self_", self_qkv, self_out),
        _attention(weights, "cross_", cross_qkv, cross_out),
        _ffn(weights, *ffn),
        NormWeights(weights.norm_weight, weights.norm_bias),
    )


@triton.jit
def attention_at(weights, index, SHAPE: tl.constexpr):
    """Move to the attention of one stream and step; ``index`` = 2 set + stream."""
    D: tl.constexpr = SHAPE.D
    MATRIX: tl.constexpr = n_parts(SHAPE.PRECISION) * D * D
    return AttentionWeights(
        weights.qkv_weight + index * (3 * MATRIX),
        weights.qkv_bias + index * (3 * D),
        weights.out_weight + index * MATRIX,
        weights.out_bias + index * D,
    )


@triton.jit
def ffn_at(weights, index, SHAPE: tl.constexpr):
    """Move to the FFN of one stream and step."""
    D: tl.constexpr = SHAPE.D
    F: tl.constexpr = SHAPE.F
    MATRIX: tl.constexpr = n_parts(SHAPE.PRECISION) * F * D
    return FfnWeights(
        weights.in_weight + index * MATRIX,
        weights.in_bias + index * F,
        weights.out_weight + index * MATRIX,
        weights.out_bias + index * D,
    )


@triton.jit
def norm_at(norms, index, which: tl.constexpr, SHAPE: tl.constexpr):
    """Move to the norm behind one sublayer of a stream and step, from 0."""
    offset = (index * SHAPE.SUBLAYERS + which) * SHAPE.D
    return NormWeights(norms.weight + offset, norms.bias + offset)
