"""Attention, sublayers and the encoders: what both streams are read with, and reasoning is made of.

Histories are right-padded, so a length is a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lcr_fast.weights import REC, SEARCH, EncoderWeights, ReasoningWeights

EPS = 1e-5  # of every LayerNorm

Streams = tuple[Tensor, Tensor]  # (search, recommendation)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """Mark valid positions: lengths [...] -> bool [..., size]."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    return x.masked_fill(~length_mask(lengths, x.shape[-2]).unsqueeze(-1), 0.0)


def key_bias(lengths: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Give 0 to valid keys and half the lowest finite number to padding: [...] -> [..., 1, size].

    Not -inf: a history without events must have finite attention and gradients. Its softmax is
    uniform over zero vectors, which aggregation turns into 0 and reasoning gates away. Half, as
    float16 has no room for a logit of -20 beside the lowest.
    """
    bias = torch.zeros((*lengths.shape, 1, size), dtype=dtype, device=lengths.device)
    return bias.masked_fill(~length_mask(lengths, size).unsqueeze(-2), torch.finfo(dtype).min / 2)


def _project_heads(
    query: Tensor,  # [..., Lq, D]
    memory: Tensor,  # [..., Lk, D]
    qkv_weight: Tensor,  # [3D, D]
    qkv_bias: Tensor,  # [3D]
    n_heads: int,
) -> list[Tensor]:
    """Project to queries [..., H, Lq, D/H], keys and values [..., H, Lk, D/H]."""
    dim = query.shape[-1]
    if query is memory:
        q, k, v = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        q = F.linear(query, qkv_weight[:dim], qkv_bias[:dim])
        k, v = F.linear(memory, qkv_weight[dim:], qkv_bias[dim:]).chunk(2, -1)
    return [x.unflatten(-1, (n_heads, -1)).transpose(-2, -3) for x in (q, k, v)]


def attention(
    query: Tensor,  # [..., Lq, D]
    memory: Tensor,  # [..., Lk, D]
    memory_lengths: Tensor,  # [...]
    qkv_weight: Tensor,  # [3D, D] rows: queries, keys, values
    qkv_bias: Tensor,  # [3D]
    out_weight: Tensor,  # [D, D]
    out_bias: Tensor,  # [D]
    n_heads: int,
) -> Tensor:
    """Attend from ``query`` to ``memory``; self-attention where they are the same tensor.

    head_h = softmax(Q_h K_h^T / sqrt(D/H)) V_h over the valid keys; the heads are concatenated
    and projected. Returns [..., Lq, D], finite but meaningless where the memory has no event.
    """
    q, k, v = _project_heads(query, memory, qkv_weight, qkv_bias, n_heads)
    bias = key_bias(memory_lengths, memory.shape[-2], q.dtype).unsqueeze(-3)  # [..., 1, 1, Lk]
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [..., H, Lq, D/H]
    return F.linear(heads.transpose(-2, -3).flatten(-2), out_weight, out_bias)


def attention_probabilities(
    query: Tensor,  # [..., Lq, D]
    memory: Tensor,  # [..., Lk, D]
    memory_lengths: Tensor,  # [...]
    qkv_weight: Tensor,  # [3D, D]
    qkv_bias: Tensor,  # [3D]
    n_heads: int,
) -> Tensor:
    """Where :func:`attention` looks: softmax(Q K^T / sqrt(D/H)), [..., H, Lq, Lk]; for analysis."""
    q, k, _ = _project_heads(query, memory, qkv_weight, qkv_bias, n_heads)
    bias = key_bias(memory_lengths, memory.shape[-2], q.dtype).unsqueeze(-3)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1)


def ffn(x: Tensor, weights: EncoderWeights | ReasoningWeights) -> Tensor:
    hidden = F.relu(F.linear(x, weights.ffn_in_weight, weights.ffn_in_bias))
    return F.linear(hidden, weights.ffn_out_weight, weights.ffn_out_bias)


def add_norm(
    x: Tensor, update: Tensor, mask: Tensor | None, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    """LN(x + dropout(update)): the end of every sublayer (post-norm)."""
    x = x + (update if mask is None else update * mask.to(update.dtype))
    return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def unpack(weights, dtype: torch.dtype):
    """Split packed weights: entry [i][x] holds layer or step i of stream x, without those axes."""
    if not weights[0].shape[0]:  # an exported program that takes nothing apart cannot be read back
        return []
    first_axis = [w.to(dtype).unbind(0) for w in weights]
    slices = [[w.unbind(0) for w in layer] for layer in zip(*first_axis, strict=True)]
    return [[type(weights)(*(w[x] for w in layer)) for x in (SEARCH, REC)] for layer in slices]


def encode(
    x: Tensor,  # [..., L, D]
    lengths: Tensor,  # [...]
    weights: EncoderWeights,
    stream: int,
    *,
    n_heads: int,
    masks: Tensor | None = None,  # [2 n_layers, ..., L, D]
) -> Tensor:
    """Encode one stream with its own post-norm Transformer (paper: separate Transformers).

        h <- LN(x + MSA(x));   h <- LN(h + FFN(h))

    Bidirectional, ReLU, dropout on each sublayer's output (our reading).
    Returns h^(0) [..., L, D] in x's dtype.
    """
    acc = accumulator(x)
    h = zero_padding(x.to(acc), lengths)
    for i, layer in enumerate(unpack(weights, acc)):
        w = layer[stream]
        mask_msa, mask_ffn = (None, None) if masks is None else masks[2 * i : 2 * i + 2]
        attended = attention(
            h, h, lengths, w.qkv_weight, w.qkv_bias, w.out_weight, w.out_bias, n_heads
        )
        h = add_norm(h, attended, mask_msa, w.norm_weight[0], w.norm_bias[0])
        h = add_norm(h, ffn(h, w), mask_ffn, w.norm_weight[1], w.norm_bias[1])
    return zero_padding(h, lengths).to(x.dtype)
