"""Weights as the kernels take them, and where those of one stream and step stand.

An encoder's layer is a step without cross-attention.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lcr_fast.weights import EncoderWeights, ReasoningWeights


class AttentionWeights(NamedTuple):
    """Of all P sets of weights and both streams, or at those of one."""

    qkv_weight: Any  # [P, 2, 3D, D]
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
    weights: ReasoningWeights | EncoderWeights, prefix: str, dtype: torch.dtype
) -> AttentionWeights:
    qkv, out = (getattr(weights, f"{prefix}{of}_weight").to(dtype) for of in ("qkv", "out"))
    qkv_bias, out_bias = (getattr(weights, f"{prefix}{of}_bias") for of in ("qkv", "out"))
    return AttentionWeights(qkv, qkv_bias, out, out_bias)


def _ffn(weights: ReasoningWeights | EncoderWeights, dtype: torch.dtype) -> FfnWeights:
    return FfnWeights(
        weights.ffn_in_weight.to(dtype),
        weights.ffn_in_bias,
        weights.ffn_out_weight.to(dtype),
        weights.ffn_out_bias,
    )


def layer_weights(weights: EncoderWeights, dtype: torch.dtype) -> LayerWeights:
    """Cast matrices as :func:`step_weights` does."""
    return LayerWeights(
        _attention(weights, "", dtype),
        _ffn(weights, dtype),
        NormWeights(weights.norm_weight, weights.norm_bias),
    )


def step_weights(weights: ReasoningWeights, dtype: torch.dtype) -> StepWeights:
    """Cast matrices, as the dots want them, once: not in every program, in twice the registers."""
    return StepWeights(
        _attention(weights, "self_", dtype),
        _attention(weights, "cross_", dtype),
        _ffn(weights, dtype),
        NormWeights(weights.norm_weight, weights.norm_bias),
    )


@triton.jit
def attention_at(weights, index, D: tl.constexpr):
    """Move to the attention of one stream and step; ``index`` = 2 set + stream."""
    return AttentionWeights(
        weights.qkv_weight + index * (3 * D * D),
        weights.qkv_bias + index * (3 * D),
        weights.out_weight + index * (D * D),
        weights.out_bias + index * D,
    )


@triton.jit
def ffn_at(weights, index, D: tl.constexpr, F: tl.constexpr):
    """Move to the FFN of one stream and step."""
    return FfnWeights(
        weights.in_weight + index * (F * D),
        weights.in_bias + index * F,
        weights.out_weight + index * (D * F),
        weights.out_bias + index * D,
    )


@triton.jit
def norm_at(norms, index, which: tl.constexpr, SHAPE: tl.constexpr):
    """Move to the norm behind one sublayer of a stream and step, from 0."""
    offset = (index * SHAPE.SUBLAYERS + which) * SHAPE.D
    return NormWeights(norms.weight + offset, norms.bias + offset)
