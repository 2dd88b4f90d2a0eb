"""Pooling of a stream's states by a target key, forward and backward."""

import triton
import triton.language as tl

from lcr_fast.kernels.reasoning.sublayers import LOG2_E, LOWEST_SCORE


@triton.jit
def _pool_weights(state, key, events):
    """Compute softmax_j(state_j . key) over the rows that are ``events``, else 0: float32 [M]."""
    logits = tl.where(events, tl.sum(state * key[None, :], 1) * LOG2_E, float("-inf"))
    alpha = tl.exp2(logits - tl.maximum(tl.max(logits, 0), LOWEST_SCORE))
    return alpha / tl.maximum(tl.sum(alpha, 0), 1.0)


@triton.jit
def pool(
    state,  # [M, D]
    event_slot,  # [M] slot of each event, -1 at padding
    keys_ptr,  # [B, 2, D], at the stream
    pooled_ptr,  # [sequences, K, 2, 2, D], at the step, state and stream
    pooled_stride,  # from one sequence to the next
    first,  # sequences of the tile's slots: first, first + 1, ..., up to end
    end,
    n_trajectories,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Store each sequence's pooled state, z = sum_j alpha_j state_j; 0 without an event."""
    column = tl.arange(0, D)
    state = state.to(tl.float32)
    for slot in tl.range(0, SLOTS, disable_licm=True):
        sequence = first + slot
        exists = sequence < end
        key_offset = (sequence // n_trajectories) * (2 * D) + column
        key = tl.load(keys_ptr + key_offset, mask=exists, other=0.0).to(tl.float32)
        alpha = _pool_weights(state, key, event_slot == slot)
        z = tl.sum(alpha[:, None] * state, 0)  # [D]
        z_ptr = pooled_ptr + sequence * pooled_stride + column
        tl.store(z_ptr, z.to(pooled_ptr.dtype.element_ty), mask=exists)


@triton.jit
def pool_bwd(
    dstate,  # float32 [M, D], added to
    state,  # [M, D]
    event_slot,  # [M]
    keys_ptr,  # [B, 2, D], at the stream
    dpooled_ptr,  # [sequences, K, 2, 2, D], at the step, state and stream
    dkeys_ptr,  # the same shape, float32: a sequence's share of this step and state
    pooled_stride,
    first,
    end,
    n_trajectories,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Backward of :func:`pool`.

    With t_j = state_j . dz and s_j = alpha_j (t_j - sum_i alpha_i t_i),

    dstate_j += alpha_j dz + s_j key;   dkey = sum_j s_j state_j
    """
    column = tl.arange(0, D)
    state = state.to(tl.float32)
    for slot in tl.range(0, SLOTS, disable_licm=True):
        sequence = first + slot
        exists = sequence < end
        key_offset = (sequence // n_trajectories) * (2 * D) + column
        key = tl.load(keys_ptr + key_offset, mask=exists, other=0.0).to(tl.float32)
        offset = sequence * pooled_stride + column
        dz = tl.load(dpooled_ptr + offset, mask=exists, other=0.0).to(tl.float32)
        alpha = _pool_weights(state, key, event_slot == slot)  # [M]
        t = tl.sum(state * dz[None, :], 1)
        s = alpha * (t - tl.sum(alpha * t, 0))
        dstate += alpha[:, None] * dz[None, :] + s[:, None] * key[None, :]
        tl.store(dkeys_ptr + offset, tl.sum(s[:, None] * state, 0), mask=exists)
    return dstate
