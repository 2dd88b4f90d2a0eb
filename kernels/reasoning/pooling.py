"""Pooling of a stream's states by a target key, forward and backward."""

import triton
import triton.language as tl

from lcr_fast.kernels.core.product import rounded_products
from lcr_fast.kernels.reasoning.sublayers import (
    LOG2_E,
    LOWEST_SCORE,
    add_pairs,
)
from lcr_fast.kernels.reasoning.tile import by_sequence, sequence_at


@triton.jit
def _load_vectors(ptr, offset, exists, D: tl.constexpr):
    """Vectors of the tile's sequences, 0 beyond the last: float32 [SEQUENCES, 1, D]."""
    ptrs = ptr + offset[:, None] + tl.arange(0, D)[None, :]
    return tl.load(ptrs, mask=exists[:, None], other=0.0).to(tl.float32)[:, None, :]


@triton.jit
def _store_vectors(ptr, offset, exists, x, D: tl.constexpr):
    """Store x [SEQUENCES, D] in the tensor's dtype."""
    ptrs = ptr + offset[:, None] + tl.arange(0, D)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _exponentials(state, key, lengths):
    """Compute exp(state_j . key) of each sequence's events, the largest 1: float32 [., SLOT].

    Elsewhere 0. Their sum, where there are events, is at least 1.
    """
    events = tl.arange(0, state.shape[1])[None, :] < lengths[:, None]
    logits = tl.where(events, tl.sum(state * key, 2) * LOG2_E, float("-inf"))
    return tl.exp2(logits - tl.maximum(tl.max(logits, 1), LOWEST_SCORE)[:, None])


@triton.jit
def pool(
    state,  # [M, D]
    lengths,  # [SEQUENCES]
    keys_ptr,  # [B, 2, D], at the stream
    pooled_ptr,  # [sequences, K, 2, 2, D], at the step, state and stream
    pooled_stride,  # from one sequence to the next
    first,  # sequences of the tile's slots: first, first + 1, ..., up to end
    end,
    n_trajectories,
    SEQUENCES: tl.constexpr,
):
    """Store each sequence's pooled state, z = sum_j alpha_j state_j; 0 without an event."""
    D: tl.constexpr = state.shape[1]
    sequence = sequence_at(first, tl.arange(0, SEQUENCES))
    exists = sequence < end
    state = by_sequence(state.to(tl.float32), SEQUENCES)
    user = (sequence // n_trajectories).to(tl.int64)
    key = _load_vectors(keys_ptr, user * (2 * D), exists, D)
    alpha = _exponentials(state, key, lengths)
    alpha = alpha / tl.maximum(tl.sum(alpha, 1), 1.0)[:, None]
    z = tl.sum(rounded_products(alpha[:, :, None], state), 1)
    _store_vectors(pooled_ptr, sequence * pooled_stride, exists, z, D)


@triton.jit
def pool_bwd(
    dstate,  # float32 [M, D], added to
    state,  # [M, D]
    lengths,  # [SEQUENCES]
    keys_ptr,  # [B, 2, D], at the stream
    dpooled_ptr,  # [sequences, K, 2, 2, D], at the step, state and stream
    dkeys_ptr,  # the same shape, float32: a sequence's share of this step and state
    pooled_stride,
    first,
    end,
    n_trajectories,
    SEQUENCES: tl.constexpr,
):
    """Backward of :func:`pool`: dstate with what pooling adds, [M, D].

    With t_j = state_j . dz and s_j = alpha_j (t_j - sum_i alpha_i t_i),

    dstate_j += alpha_j dz + s_j key;   dkey = sum_j s_j state_j
    """
    D: tl.constexpr = state.shape[1]
    sequence = sequence_at(first, tl.arange(0, SEQUENCES))
    exists = sequence < end
    state = by_sequence(state.to(tl.float32), SEQUENCES)
    user = (sequence // n_trajectories).to(tl.int64)
    key = _load_vectors(keys_ptr, user * (2 * D), exists, D)
    dz = _load_vectors(dpooled_ptr, sequence * pooled_stride, exists, D)
    alpha = _exponentials(state, key, lengths)  # [SEQUENCES, SLOT], still to be divided
    t = tl.sum(state * dz, 2)
    total, total_t = tl.reduce((alpha, rounded_products(alpha, t)), 1, add_pairs)
    inverse = 1.0 / tl.maximum(total, 1.0)
    alpha = alpha * inverse[:, None]
    s = alpha * (t - (total_t * inverse)[:, None])
    dkey = tl.sum(rounded_products(s[:, :, None], state), 1)
    _store_vectors(dkeys_ptr, sequence * pooled_stride, exists, dkey, D)
    return dstate + (alpha[:, :, None] * dz + s[:, :, None] * key).reshape(dstate.shape)
