"""Latent cross reasoning: K steps of both streams in one program, forward and backward.

One program takes a tile of whole users (slots of one power-of-two size, see blocks.py) through all
K steps. For each stream x with the other stream x', g = 1 if x' has an event, else 0, and dropout
masks m:

    x1 = h_x + m1 MSA_x(h_x)                    a_x = LN1(x1)
    x2 = a_x + g m2 MCA_x(Q = a_x, K = V = a_x')   c_x = LN2(x2)
    x3 = c_x + m3 FFN_x(c_x)                    h_x <- LN3(x3)

h^(0) is read once, h^(K) written once; noise is added where h^(0) is read and dropout masks are
drawn where they act (lcr_fast/noise.py). Nothing else touches device memory but the weights, the
pooled vectors of TCL if asked for, and in training the input of every step after the first.

States between sublayers have the tensors' dtype, which is also that of the dots' operands; dots
accumulate in float32, softmax, LayerNorm and all sums are float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.blocks import (
    attention,
    dropout_keep,
    ffn,
    key_slots,
    layer_norm,
    locate_rows,
    normal_noise,
    pool,
    row_slots,
    tile_offsets,
)

# Dropout sites, as in lcr_fast/ops/noise.py: step k has three a stream.
_REASONING_SITES = tl.constexpr(1 << 13)
_STREAM_SITES = tl.constexpr(1 << 12)

_SEARCH = tl.constexpr(0)
_REC = tl.constexpr(1)

# -- pieces of a step -----------------------------------------------------------------------------


@triton.jit
def _self_weights(weights, index, D: tl.constexpr):
    """Pointers to the self-attention of one stream and step; ``index`` = 2 set + stream."""
    return (
        weights[0] + index * (3 * D * D), weights[1] + index * (3 * D),
        weights[2] + index * (D * D), weights[3] + index * D,
    )  # fmt: skip


@triton.jit
def _cross_weights(weights, index, D: tl.constexpr):
    return (
        weights[4] + index * (3 * D * D), weights[5] + index * (3 * D),
        weights[6] + index * (D * D), weights[7] + index * D,
    )  # fmt: skip


@triton.jit
def _ffn_weights(weights, index, D: tl.constexpr, F: tl.constexpr):
    return (
        weights[8] + index * (F * D), weights[9] + index * F,
        weights[10] + index * (D * F), weights[11] + index * D,
    )  # fmt: skip


@triton.jit
def _norm_weights(weights, index, which: tl.constexpr, D: tl.constexpr):
    offset = (index * 3 + which) * D
    return weights[12] + offset, weights[13] + offset


@triton.jit
def _apply_dropout(
    update, user_row, position, k, stream: tl.constexpr, place: tl.constexpr, dropout,
    D: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Drop from a sublayer's output; ``place`` is 0 for MSA, 1 for MCA, 2 for FFN."""
    if DROPOUT:
        threshold, seed, scale = dropout
        site = _REASONING_SITES + stream * _STREAM_SITES + 3 * k + place
        keep = dropout_keep(user_row, position, site, threshold, seed, D)
        update = tl.where(keep, update * scale, 0.0)
    return update


@triton.jit
def _load_initial(
    x_ptr, rows, size, n_trajectories, user_row, stream: tl.constexpr, noise,
    D: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """h^(0) + noise_scale eps on valid positions, 0 elsewhere, in the tensor's dtype: [M, D]."""
    sequence, position, length, _ = rows
    valid = (position < length)[:, None]
    user = sequence // n_trajectories
    h = tl.load(x_ptr + tile_offsets(user, position, size, D), mask=valid, other=0.0)
    if NOISE:
        scale, seed = noise
        trajectory_stream = 2 * (sequence % n_trajectories) + stream
        eps = normal_noise(user_row, position, trajectory_stream, seed, D)
        h = tl.where(valid, h.to(tl.float32) + scale * eps, 0.0)
    return h.to(x_ptr.dtype.element_ty)


@triton.jit
def _store_state(out_ptr, state, rows, size, D: tl.constexpr):
    sequence, position, _, stored = rows
    offsets = tile_offsets(sequence, position, size, D)
    tl.store(out_ptr + offsets, state.to(out_ptr.dtype.element_ty), mask=stored[:, None])


@triton.jit
def _self_sublayer(
    h, rows, user_row, k, index, stream: tl.constexpr, weights, dropout,
    D: tl.constexpr, H: tl.constexpr, SLOT: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a = LN1(h + MSA(h)), 0 at padding: [M, D]."""
    _, position, length, _ = rows
    update = attention(
        h, h, row_slots(h.shape[0], SLOT), key_slots(position, length, SLOT),
        _self_weights(weights, index, D), D, H, PRECISION,
    )  # fmt: skip
    update = _apply_dropout(update, user_row, position, k, stream, 0, dropout, D, DROPOUT)
    norm_weight_ptr, norm_bias_ptr = _norm_weights(weights, index, 0, D)
    a = layer_norm(h.to(tl.float32) + update, norm_weight_ptr, norm_bias_ptr, D)
    return tl.where((position < length)[:, None], a, 0.0).to(h.dtype)


@triton.jit
def _cross_sublayers(
    a, memory, rows, memory_rows, memory_length, user_row, k, index, stream: tl.constexpr,
    weights, dropout,
    D: tl.constexpr, F: tl.constexpr, H: tl.constexpr, SLOT: tl.constexpr,
    MEMORY_SLOT: tl.constexpr, BLOCK_F: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """c = LN2(a + g MCA(a, memory)); h = LN3(c + FFN(c)), 0 at padding: [M, D].

    ``memory_length`` [M] is the length of the other stream of each row's user.
    """
    _, position, length, _ = rows
    _, memory_position, memory_own_length, _ = memory_rows
    update = attention(
        a, memory, row_slots(a.shape[0], SLOT),
        key_slots(memory_position, memory_own_length, MEMORY_SLOT),
        _cross_weights(weights, index, D), D, H, PRECISION,
    )  # fmt: skip
    update = tl.where((memory_length > 0)[:, None], update, 0.0)
    update = _apply_dropout(update, user_row, position, k, stream, 1, dropout, D, DROPOUT)
    norm_weight_ptr, norm_bias_ptr = _norm_weights(weights, index, 1, D)
    c = layer_norm(a.to(tl.float32) + update, norm_weight_ptr, norm_bias_ptr, D)
    if F > 0:
        x = c.to(a.dtype)
        update = ffn(x, _ffn_weights(weights, index, D, F), D, F, BLOCK_F, PRECISION)
        update = _apply_dropout(update, user_row, position, k, stream, 2, dropout, D, DROPOUT)
        norm_weight_ptr, norm_bias_ptr = _norm_weights(weights, index, 2, D)
        c = layer_norm(x.to(tl.float32) + update, norm_weight_ptr, norm_bias_ptr, D)
    return tl.where((position < length)[:, None], c, 0.0).to(a.dtype)


# -- forward --------------------------------------------------------------------------------------

_RUNTIME_SIZES = [
    "n_sequences", "n_trajectories", "search_size", "rec_size", "steps", "set_stride",
    "noise_seed", "dropout_threshold", "dropout_seed",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def _latent_reasoning_fwd_kernel(
    search_ptr, rec_ptr,  # [B, L_s, D], [B, L_r, D]
    search_lengths_ptr, rec_lengths_ptr, rows_ptr,  # [B]
    keys_ptr,  # [B, 2, D]
    self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
    cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
    ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
    norm_weight_ptr, norm_bias_ptr,
    search_out_ptr, rec_out_ptr,  # [B, N, L_s, D], [B, N, L_r, D]
    pooled_ptr,  # [B, N, K, 2, 2, D]
    saved_search_ptr, saved_rec_ptr,  # [K-1, B, N, L_s, D], [K-1, B, N, L_r, D]
    n_sequences, n_trajectories, search_size, rec_size, steps,
    set_stride,  # sets of weights from one step to the next: 0 if the steps share theirs
    noise_scale, noise_seed: tl.int64,
    dropout_threshold, dropout_scale, dropout_seed: tl.int64,
    D: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    SEARCH_SLOT: tl.constexpr, REC_SLOT: tl.constexpr, USERS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    NOISE: tl.constexpr, DROPOUT: tl.constexpr, POOL: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    M_S: tl.constexpr = USERS * SEARCH_SLOT
    M_R: tl.constexpr = USERS * REC_SLOT
    weights = (
        self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
        cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
        ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
        norm_weight_ptr, norm_bias_ptr,
    )  # fmt: skip
    noise = (noise_scale, noise_seed)
    dropout = (dropout_threshold, dropout_seed, dropout_scale)

    rows_s = locate_rows(
        tile, search_lengths_ptr, n_sequences, n_trajectories, search_size, M_S, SEARCH_SLOT
    )
    rows_r = locate_rows(
        tile, rec_lengths_ptr, n_sequences, n_trajectories, rec_size, M_R, REC_SLOT
    )
    user_s = rows_s[0] // n_trajectories
    user_r = rows_r[0] // n_trajectories
    exists_s = rows_s[0] < n_sequences
    exists_r = rows_r[0] < n_sequences
    # The other stream's length, for the gate.
    other_s = tl.load(rec_lengths_ptr + user_s, mask=exists_s, other=0)
    other_r = tl.load(search_lengths_ptr + user_r, mask=exists_r, other=0)
    user_row_s = user_s
    user_row_r = user_r
    if NOISE or DROPOUT:
        user_row_s = tl.load(rows_ptr + user_s, mask=exists_s, other=0)
        user_row_r = tl.load(rows_ptr + user_r, mask=exists_r, other=0)

    h_s = _load_initial(
        search_ptr, rows_s, search_size, n_trajectories, user_row_s, _SEARCH, noise, D, NOISE
    )  # [M_S, D]
    h_r = _load_initial(
        rec_ptr, rows_r, rec_size, n_trajectories, user_row_r, _REC, noise, D, NOISE
    )  # [M_R, D]

    for k in range(steps):
        # Addresses depend on k, so that no weight is kept on chip across the steps.
        index = 2 * k * set_stride
        a_s = _self_sublayer(
            h_s, rows_s, user_row_s, k, index, _SEARCH, weights, dropout,
            D, H, SEARCH_SLOT, DROPOUT, PRECISION,
        )  # fmt: skip
        a_r = _self_sublayer(
            h_r, rows_r, user_row_r, k, index + 1, _REC, weights, dropout,
            D, H, REC_SLOT, DROPOUT, PRECISION,
        )  # fmt: skip
        h_s = _cross_sublayers(
            a_s, a_r, rows_s, rows_r, other_s, user_row_s, k, index, _SEARCH, weights, dropout,
            D, F, H, SEARCH_SLOT, REC_SLOT, BLOCK_F, DROPOUT, PRECISION,
        )  # fmt: skip
        h_r = _cross_sublayers(
            a_r, a_s, rows_r, rows_s, other_r, user_row_r, k, index + 1, _REC, weights, dropout,
            D, F, H, REC_SLOT, SEARCH_SLOT, BLOCK_F, DROPOUT, PRECISION,
        )  # fmt: skip
        if POOL:
            stride = steps.to(tl.int64) * (4 * D)
            step_ptr = pooled_ptr + k * (4 * D)
            pool(
                a_s, keys_ptr, step_ptr, stride, rows_s,
                n_sequences, n_trajectories, tile, D, SEARCH_SLOT,
            )  # fmt: skip
            pool(
                a_r, keys_ptr + D, step_ptr + D, stride, rows_r,
                n_sequences, n_trajectories, tile, D, REC_SLOT,
            )  # fmt: skip
            pool(
                h_s, keys_ptr, step_ptr + 2 * D, stride, rows_s,
                n_sequences, n_trajectories, tile, D, SEARCH_SLOT,
            )  # fmt: skip
            pool(
                h_r, keys_ptr + D, step_ptr + 3 * D, stride, rows_r,
                n_sequences, n_trajectories, tile, D, REC_SLOT,
            )  # fmt: skip
        if SAVE:
            if k + 1 < steps:
                saved_s = n_sequences.to(tl.int64) * search_size * D * k
                saved_r = n_sequences.to(tl.int64) * rec_size * D * k
                _store_state(saved_search_ptr + saved_s, h_s, rows_s, search_size, D)
                _store_state(saved_rec_ptr + saved_r, h_r, rows_r, rec_size, D)

    _store_state(search_out_ptr, h_s, rows_s, search_size, D)
    _store_state(rec_out_ptr, h_r, rows_r, rec_size, D)


# -- configuration --------------------------------------------------------------------------------

_WIDTHS = (32, 64, 128)
_MIN_HEAD = 16  # the least depth of a tensor-core dot
_MAX_SIZE = 128  # events a stream: one slot must fit a tile
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def obstacle(
    *, dim: int, n_heads: int, ffn_dim: int, search_len: int, rec_len: int, dtype: torch.dtype
) -> str | None:
    """Say why the kernels cannot serve a case, or None."""
    if dtype not in _DTYPES:
        return f"it computes float32, float16 and bfloat16, not {dtype}"
    if dim not in _WIDTHS:
        return f"it needs a width of 32, 64 or 128, got {dim}"
    if n_heads < 1 or dim % n_heads or dim // n_heads < _MIN_HEAD:
        return f"it needs heads at least {_MIN_HEAD} wide, got {n_heads} heads of width {dim}"
    if ffn_dim % 16:
        return f"it needs an FFN width that is a multiple of 16, got {ffn_dim}"
    if max(search_len, rec_len) > _MAX_SIZE:
        return f"it holds {_MAX_SIZE} events a stream, got {max(search_len, rec_len)}"
    return None


def _slot(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _config(D: int, slot_s: int, slot_r: int, dtype: torch.dtype) -> dict[str, Any]:
    rows = max(slot_s, slot_r)
    return {"USERS": max(1, 32 // rows), "num_warps": 4 if rows <= 32 else 8, "num_stages": 1}


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def _on_device(x: Tensor) -> AbstractContextManager:
    """Make x's GPU current: Triton launches on the current device, not on the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def latent_reasoning_fwd(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    rows: Tensor,
    target_keys: Tensor,
    weights: Sequence[Tensor],
    steps: int,
    n_heads: int,
    n_trajectories: int,
    noise_scale: float,
    noise_seed: int,
    dropout_threshold: int,
    dropout_seed: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel.

    Returns h^(K) of both streams [B, N, L, D], the pooled vectors [B, N, K, 2, 2, D] (or [0]) and
    h^(1) .. h^(K-1) of both streams [K-1, B, N, L, D] (or [0, B, N, L, D]).
    """
    B, search_size, D = search.shape
    rec_size, N, F = rec.shape[1], n_trajectories, weights[8].shape[-2]
    n_saved = steps - 1 if save_states else 0
    search_out = search.new_empty(B, N, search_size, D)
    rec_out = rec.new_empty(B, N, rec_size, D)
    pooled = search.new_empty((B, N, steps, 2, 2, D) if target_keys.numel() else (0,))
    saved_search = search.new_empty(n_saved, B, N, search_size, D)
    saved_rec = rec.new_empty(n_saved, B, N, rec_size, D)
    slot_s, slot_r = _slot(search_size), _slot(rec_size)
    config = _config(D, slot_s, slot_r, search.dtype)
    if B * N:
        with _on_device(search):
            _latent_reasoning_fwd_kernel[(triton.cdiv(B * N, config["USERS"]),)](
                search, rec, search_lengths, rec_lengths, rows, target_keys, *weights,
                search_out, rec_out, pooled, saved_search, saved_rec,
                B * N, N, search_size, rec_size, steps, int(weights[0].shape[0] > 1),
                noise_scale, noise_seed,
                dropout_threshold, 65536.0 / (65536 - dropout_threshold), dropout_seed,
                D=D, F=F, H=n_heads, SEARCH_SLOT=slot_s, REC_SLOT=slot_r,
                BLOCK_F=32 if F % 32 == 0 else 16,
                NOISE=noise_scale != 0.0, DROPOUT=dropout_threshold > 0,
                POOL=target_keys.numel() > 0, SAVE=save_states,
                PRECISION=_precision(search.dtype), **config,
            )  # fmt: skip
    return search_out, rec_out, pooled, saved_search, saved_rec
