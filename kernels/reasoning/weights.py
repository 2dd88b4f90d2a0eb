"""Weights as the kernels take them, and where those of one stream and step stand.

An encoder's layer is a step without cross-attention.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.core.product import n_parts
from lcr_fast.kernels.weight_parts import for_products
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
