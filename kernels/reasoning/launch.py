"""Launching latent cross reasoning, forward and backward."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lcr_fast.kernels.gpu import columns_product, dot_precision, gpu_of, on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.reasoning.backward import (
    cross_bwd_kernel,
    ffn_bwd_kernel,
    recompute_cross_kernel,
    recompute_self_kernel,
    self_bwd_kernel,
)
from lcr_fast.kernels.reasoning.config import constants, slots
from lcr_fast.kernels.reasoning.forward import ForwardStream, latent_reasoning_fwd_kernel
from lcr_fast.kernels.reasoning.scratch import scratch_columns
from lcr_fast.kernels.reasoning.weights import step_weights
from lcr_fast.weights import ReasoningWeights


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
    named = ReasoningWeights(*weights)
    rec_size, N, F = rec.shape[1], n_trajectories, named.ffn_in_weight.shape[-2]
    n_saved = steps - 1 if save_states else 0
    search_out = search.new_empty(B, N, search_size, D)
    rec_out = rec.new_empty(B, N, rec_size, D)
    has_pool = target_keys.ndim == 3
    pooled = search.new_empty((B, N, steps, 2, 2, D) if has_pool else (0,))
    saved_search = search.new_empty(n_saved, B, N, search_size, D)
    saved_rec = rec.new_empty(n_saved, B, N, rec_size, D)
    sizes = (search_size, rec_size)
    compiled = constants(
        "fwd", D, F, n_heads, sizes, search.dtype, dot_precision(search.dtype),
        gpu_of(search.device),
    )  # fmt: skip
    search_slot, rec_slot = slots(*sizes)
    search_parked, rec_parked = search_out, rec_out
    if compiled["PARK"]:
        search_parked, rec_parked = torch.empty_like(search_out), torch.empty_like(rec_out)
    if B * N:
        with on_device(search):
            launch(
                latent_reasoning_fwd_kernel, (triton.cdiv(B * N, compiled["SEQUENCES"]),),
                ForwardStream(search, search_lengths, search_out, search_parked, saved_search),
                ForwardStream(rec, rec_lengths, rec_out, rec_parked, saved_rec),
                rows, target_keys, step_weights(named, search.dtype), pooled,
                B * N, N, search_size, rec_size, steps, int(named.norm_weight.shape[0] > 1),
                noise_scale, noise_seed,
                dropout_threshold, 65536.0 / (65536 - dropout_threshold), dropout_seed,
                SEARCH_SLOT=search_slot, REC_SLOT=rec_slot,
                NOISE=noise_scale != 0.0, DROPOUT=dropout_threshold > 0,
                POOL=has_pool, SAVE=save_states, **compiled,
            )  # fmt: skip
    return search_out, rec_out, pooled, saved_search, saved_rec


# Weight gradients are products over all rows of a chunk of users, so a chunk should be long; this
# bounds what it costs. At D = 64, L = 50 + 50, K = 5 it holds about 500 users in half precision.
_SCRATCH_BYTES = 1 << 29


def _add_weight_gradients(
    totals: ReasoningWeights, scratch: Sequence[Tensor], dnorm: Tensor, D: int, F: int
) -> None:
    """Add one chunk's share, from ``scratch`` [P, rows, columns] of both streams, to ``totals``.

    ``dnorm`` is [P, programs, 2, 3, 2, D].
    """
    P, C = dnorm.shape[0], scratch_columns(D, F)
    for x in (0, 1):
        own, other = scratch[x], scratch[1 - x]

        def add(
            weight: Tensor, bias: Tensor, dy: Tensor, operand: Tensor, x: int = x, first: int = 0
        ) -> None:
            """Add dY^T X, and the sum of dY, to the rows of a weight from ``first`` on."""
            out = slice(first, first + dy.shape[-1])
            weight[:P, x, out] += columns_product(dy, operand)
            bias[:P, x, out] += dy.sum(1, dtype=torch.float32)

        add(
            totals.self_qkv_weight, totals.self_qkv_bias,
            own[..., C.self_dq : C.self_dq + 3 * D], own[..., C.h : C.h + D],
        )  # fmt: skip
        add(
            totals.self_out_weight, totals.self_out_bias,
            own[..., C.self_dy : C.self_dy + D], own[..., C.self_heads : C.self_heads + D],
        )  # fmt: skip
        add(
            totals.cross_qkv_weight, totals.cross_qkv_bias,
            own[..., C.cross_dq : C.cross_dq + D], own[..., C.a : C.a + D],
        )  # fmt: skip
        add(
            totals.cross_qkv_weight, totals.cross_qkv_bias,
            other[..., C.cross_dk : C.cross_dk + 2 * D], other[..., C.a : C.a + D], first=D,
        )  # fmt: skip
        add(
            totals.cross_out_weight, totals.cross_out_bias,
            own[..., C.cross_dy : C.cross_dy + D], own[..., C.cross_heads : C.cross_heads + D],
        )  # fmt: skip
        if F:
            add(
                totals.ffn_in_weight, totals.ffn_in_bias,
                own[..., C.dhidden : C.dhidden + F], own[..., C.c : C.c + D],
            )  # fmt: skip
            add(
                totals.ffn_out_weight, totals.ffn_out_bias,
                own[..., C.ffn_dy : C.ffn_dy + D], own[..., C.hidden : C.hidden + F],
            )  # fmt: skip
    n_norms = 3 if F else 2
    norms = dnorm[:, :, :, :n_norms].sum(1)  # [P, 2, n_norms, 2, D]
    totals.norm_weight[:P, :, :n_norms] += norms[:, :, :, 0]
    totals.norm_bias[:P, :, :n_norms] += norms[:, :, :, 1]


def latent_reasoning_bwd(
    dsearch_out: Tensor,
    drec_out: Tensor,
    dpooled: Tensor,
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
    saved_search: Tensor,
    saved_rec: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Launch the backward kernels on chunks of users and multiply out the weight gradients.

    Returns the gradients of both streams [B, L, D] summed over the trajectories, of the target keys
    [B, 2, D] (or [0]) and of the 14 weights in their dtypes.
    """
    B, search_size, D = search.shape
    named = ReasoningWeights(*weights)
    rec_size, N, F, K = rec.shape[1], n_trajectories, named.ffn_in_weight.shape[-2], steps
    has_pool = target_keys.ndim == 3
    shared = named.norm_weight.shape[0] == 1
    dsearch, drec = torch.empty_like(search), torch.empty_like(rec)
    dtarget_keys = torch.zeros_like(target_keys)
    totals = ReasoningWeights(*(torch.zeros_like(w, dtype=torch.float32) for w in weights))
    if B == 0:
        return (
            dsearch,
            drec,
            dtarget_keys,
            [t.to(w.dtype) for t, w in zip(totals, weights, strict=True)],
        )

    self_attention, cross_attention, ffn, norms = step_weights(named, search.dtype)
    sizes = (search_size, rec_size)
    slot = slots(*sizes)
    recompute, differentiate = (
        constants(
            which, D, F, n_heads, sizes, search.dtype, dot_precision(search.dtype),
            gpu_of(search.device),
        )
        for which in ("recompute", "bwd")
    )  # fmt: skip
    is_dropping = dropout_threshold > 0
    dropout = (dropout_threshold, 65536.0 / (65536 - dropout_threshold), dropout_seed)
    width = scratch_columns(D, F).width
    user_bytes = N * K * (search_size + rec_size) * width * search.element_size()
    chunk = min(B, max(1, _SCRATCH_BYTES // max(user_bytes, 1)))
    float32: dict[str, Any] = {"dtype": torch.float32, "device": search.device}
    dkeys = torch.empty((B, N, K, 2, 2, D) if has_pool else (0,), **float32)
    for start in range(0, B, chunk):
        users = slice(start, min(start + chunk, B))
        lengths = (search_lengths[users], rec_lengths[users])
        n = len(lengths[0]) * N
        n_recompute = triton.cdiv(n, recompute["SEQUENCES"])
        programs = triton.cdiv(n, differentiate["SEQUENCES"])
        scratch = tuple(search.new_empty(K, n * size, width) for size in sizes)
        dh, da, dmemory = (
            tuple(torch.empty(n // N, N, size, D, **float32) for size in sizes) for _ in range(3)
        )
        dnorm = torch.empty(programs, K, 2, 3, 2, D, **float32)
        with on_device(search):
            for x, (state, saved) in enumerate(((search, saved_search), (rec, saved_rec))):
                launch(
                    recompute_self_kernel, (n_recompute, K),
                    state[users], lengths[x], rows[users], self_attention, norms,
                    saved[:, users], scratch[x],
                    n, N, sizes[x], int(not shared), x, B * N, noise_scale, noise_seed, *dropout,
                    SLOT=slot[x], NOISE=noise_scale != 0.0,
                    DROPOUT=is_dropping, **recompute,
                )  # fmt: skip
            for x in (0, 1):
                launch(
                    recompute_cross_kernel, (n_recompute, K),
                    lengths[x], lengths[1 - x], rows[users], cross_attention, scratch[x],
                    scratch[1 - x],
                    n, N, sizes[x], sizes[1 - x], int(not shared), x, *dropout,
                    SLOT=slot[x], MEMORY_SLOT=slot[1 - x],
                    DROPOUT=is_dropping, **recompute,
                )  # fmt: skip
            for k in reversed(range(K)):
                for x, dout in enumerate((dsearch_out, drec_out)):
                    launch(
                        ffn_bwd_kernel, (programs,),
                        dout[users], dpooled[users], dh[x], da[x], lengths[x], lengths[1 - x],
                        rows[users], target_keys[users], ffn, norms, scratch[x][k], dkeys[users],
                        dnorm, n, N, sizes[x], k, K, int(not shared), x, *dropout,
                        SLOT=slot[x], DROPOUT=is_dropping,
                        POOL=has_pool, **differentiate,
                    )  # fmt: skip
                for x in (0, 1):
                    launch(
                        cross_bwd_kernel, (programs,),
                        da[x], da[x], dmemory[1 - x], lengths[x], lengths[1 - x], cross_attention,
                        scratch[x][k], scratch[1 - x][k],
                        n, N, sizes[x], sizes[1 - x], k, int(not shared), x,
                        SLOT=slot[x], MEMORY_SLOT=slot[1 - x], **differentiate,
                    )  # fmt: skip
                for x in (0, 1):
                    launch(
                        self_bwd_kernel, (programs,),
                        da[x], dmemory[x], dpooled[users], dh[x], lengths[x], rows[users],
                        target_keys[users], self_attention, norms, scratch[x][k],
                        dkeys[users], dnorm,
                        n, N, sizes[x], k, K, int(not shared), x, *dropout,
                        SLOT=slot[x], DROPOUT=is_dropping, POOL=has_pool,
                        **differentiate,
                    )  # fmt: skip
        dsearch[users] = dh[0].sum(1)
        drec[users] = dh[1].sum(1)
        dnorm = dnorm.transpose(0, 1)  # [K, programs, 2, 3, 2, D]
        if shared:
            scratch = tuple(t.view(1, -1, width) for t in scratch)
            dnorm = dnorm.reshape(1, -1, 2, 3, 2, D)
        _add_weight_gradients(totals, scratch, dnorm, D, F)
    if has_pool:
        dtarget_keys.copy_(dkeys.sum((1, 2, 3)))
    return (
        dsearch,
        drec,
        dtarget_keys,
        [t.to(w.dtype) for t, w in zip(totals, weights, strict=True)],
    )
