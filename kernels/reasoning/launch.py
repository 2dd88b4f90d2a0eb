"""Launching latent cross reasoning, forward and backward."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lcr_fast.kernels.gpu import dot_precision, gpu_of, on_device
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
from lcr_fast.kernels.reasoning.scratch import chunk_users, layout, products, write_gradients
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
    if B * N:
        with on_device(search):
            launch(
                latent_reasoning_fwd_kernel, (triton.cdiv(B * N, compiled["SEQUENCES"]),),
                ForwardStream(search, search_lengths, search_out, saved_search),
                ForwardStream(rec, rec_lengths, rec_out, saved_rec),
                rows, target_keys, step_weights(named, search.dtype), pooled,
                B * N, N, search_size, rec_size, steps, int(named.norm_weight.shape[0] > 1),
                noise_scale, noise_seed,
                dropout_threshold, 65536.0 / (65536 - dropout_threshold), dropout_seed,
                SEARCH_SLOT=search_slot, REC_SLOT=rec_slot,
                NOISE=noise_scale != 0.0, DROPOUT=dropout_threshold > 0,
                POOL=has_pool, SAVE=save_states, **compiled,
            )  # fmt: skip
    return search_out, rec_out, pooled, saved_search, saved_rec


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
    gradients = ReasoningWeights(*map(torch.zeros_like, weights))
    if B == 0:
        return dsearch, drec, dtarget_keys, list(gradients)

    self_attention, cross_attention, ffn, norms = step_weights(named, search.dtype)
    sizes = (search_size, rec_size)
    slot = slots(*sizes)
    recompute, differentiate = (
        constants(
            which, D, F, n_heads, sizes, search.dtype, dot_precision(search.dtype),
            gpu_of(search.device),
        )
        for which in ("fwd", "bwd")
    )  # fmt: skip
    is_dropping = dropout_threshold > 0
    dropout = (dropout_threshold, 65536.0 / (65536 - dropout_threshold), dropout_seed)
    scratch_layout = layout(D, F)
    width = scratch_layout.columns.width
    user_bytes = N * K * (search_size + rec_size) * width * search.element_size()
    chunk = chunk_users(B, user_bytes, search.device)
    float32: dict[str, Any] = {"dtype": torch.float32, "device": search.device}
    dkeys = torch.empty((B, N, K, 2, 2, D) if has_pool else (0,), **float32)
    sums: list[Tensor] = []
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
        of_chunk = [
            dnorm.sum((0, 1) if shared else 0).view(-1, 2, 3, 2, D),
            *(product for x in (0, 1) for product in products(scratch[x], scratch_layout, shared)),
        ]
        sums = [a + b for a, b in zip(sums, of_chunk, strict=True)] if sums else of_chunk
    if has_pool:
        dtarget_keys.copy_(dkeys.sum((1, 2, 3)))
    dnorms, n_norms = sums[0], 3 if F else 2
    for of_norms, part in ((gradients.norm_weight, 0), (gradients.norm_bias, 1)):
        of_norms[: len(dnorms), :, :n_norms] = dnorms[:, :, :n_norms, part]
    n_products = (len(sums) - 1) // 2
    write_gradients(gradients, 0, sums[1 : 1 + n_products], scratch_layout)
    write_gradients(gradients, 1, sums[1 + n_products :], scratch_layout)
    return dsearch, drec, dtarget_keys, list(gradients)
