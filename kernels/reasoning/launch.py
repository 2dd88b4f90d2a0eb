"""Launching latent cross reasoning, forward and backward."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lcr_fast.kernels.core.noise import dropout_arguments
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
from lcr_fast.kernels.reasoning.scratch import add_up, layout, pieces, products, write_gradients
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
    noise_seed: Tensor,
    dropout_threshold: int,
    dropout_seed: Tensor,
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
                *dropout_arguments(dropout_threshold, dropout_seed),
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
    noise_seed: Tensor,
    dropout_threshold: int,
    dropout_seed: Tensor,
    saved_search: Tensor,
    saved_rec: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Launch the backward kernels on pieces of the batch and multiply out the weight gradients.

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
    gradients = ReasoningWeights(*map(torch.empty_like, weights))
    torch._foreach_zero_(list(gradients))
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
    dropout = dropout_arguments(dropout_threshold, dropout_seed)
    scratch_layout = layout(D, F)
    width = scratch_layout.columns.width
    at_once = pieces(B, K, N * sum(sizes) * width, search.dtype, search.device)
    scratch_rows = tuple(  # of all pieces, one after another
        search.new_empty(at_once.steps * at_once.users * N * size, width) for size in sizes
    )
    float32: dict[str, Any] = {"dtype": torch.float32, "device": search.device}
    dkeys = torch.empty((B, N, K, 2, 2, D) if has_pool else (0,), **float32)
    sums: dict[Any, list[Tensor]] = {}  # norms, and matrices by stream and first set of weights
    for start in range(0, B, at_once.users):
        users = slice(start, min(start + at_once.users, B))
        lengths = (search_lengths[users], rec_lengths[users])
        n = len(lengths[0]) * N
        n_recompute = triton.cdiv(n, recompute["SEQUENCES"])
        programs = triton.cdiv(n, differentiate["SEQUENCES"])
        dh, da, dmemory = (
            tuple(torch.empty(n // N, N, size, D, **float32) for size in sizes) for _ in range(3)
        )
        dnorm = torch.empty(programs, K, 2, 3, 2, D, **float32)
        for last in range(K, 0, -at_once.steps):
            first = max(0, last - at_once.steps)
            scratch = tuple(
                rows_of[: (last - first) * n * size].view(last - first, n * size, width)
                for rows_of, size in zip(scratch_rows, sizes, strict=True)
            )
            with on_device(search):
                for x, (state, saved) in enumerate(((search, saved_search), (rec, saved_rec))):
                    launch(
                        recompute_self_kernel, (n_recompute, last - first),
                        state[users], lengths[x], rows[users], self_attention, norms,
                        saved[:, users], scratch[x],
                        n, N, sizes[x], first, int(not shared), x, B * N, noise_scale, noise_seed,
                        *dropout,
                        SLOT=slot[x], NOISE=noise_scale != 0.0,
                        DROPOUT=is_dropping, **recompute,
                    )  # fmt: skip
                for x in (0, 1):
                    launch(
                        recompute_cross_kernel, (n_recompute, last - first),
                        lengths[x], lengths[1 - x], rows[users], cross_attention, scratch[x],
                        scratch[1 - x],
                        n, N, sizes[x], sizes[1 - x], first, int(not shared), x, *dropout,
                        SLOT=slot[x], MEMORY_SLOT=slot[1 - x],
                        DROPOUT=is_dropping, **recompute,
                    )  # fmt: skip
                for k in reversed(range(first, last)):
                    of_step = [of_stream[k - first] for of_stream in scratch]
                    for x, dout in enumerate((dsearch_out, drec_out)):
                        launch(
                            ffn_bwd_kernel, (programs,),
                            dout[users], dpooled[users], dh[x], da[x], lengths[x], lengths[1 - x],
                            rows[users], target_keys[users], ffn, norms, of_step[x], dkeys[users],
                            dnorm, n, N, sizes[x], k, K, int(not shared), x, *dropout,
                            SLOT=slot[x], DROPOUT=is_dropping,
                            POOL=has_pool, **differentiate,
                        )  # fmt: skip
                    for x in (0, 1):
                        launch(
                            cross_bwd_kernel, (programs,),
                            da[x], da[x], dmemory[1 - x], lengths[x], lengths[1 - x],
                            cross_attention, of_step[x], of_step[1 - x],
                            n, N, sizes[x], sizes[1 - x], k, int(not shared), x,
                            SLOT=slot[x], MEMORY_SLOT=slot[1 - x], **differentiate,
                        )  # fmt: skip
                    for x in (0, 1):
                        launch(
                            self_bwd_kernel, (programs,),
                            da[x], dmemory[x], dpooled[users], dh[x], lengths[x], rows[users],
                            target_keys[users], self_attention, norms, of_step[x],
                            dkeys[users], dnorm,
                            n, N, sizes[x], k, K, int(not shared), x, *dropout,
                            SLOT=slot[x], DROPOUT=is_dropping, POOL=has_pool,
                            **differentiate,
                        )  # fmt: skip
            for x in (0, 1):
                made = products(scratch[x], scratch_layout, shared)
                add_up(sums, (x, 0 if shared else first), made)
        dsearch[users] = dh[0].sum(1)
        drec[users] = dh[1].sum(1)
        add_up(sums, "norms", [dnorm.sum((0, 1) if shared else 0).view(-1, 2, 3, 2, D)])
    if has_pool:
        dtarget_keys.copy_(dkeys.sum((1, 2, 3)))
    (dnorms,), n_norms = sums.pop("norms"), 3 if F else 2
    for of_norms, part in ((gradients.norm_weight, 0), (gradients.norm_bias, 1)):
        of_norms[: len(dnorms), :, :n_norms] = dnorms[:, :, :n_norms, part]
    for (x, first), made in sums.items():
        write_gradients(gradients, x, first, made, scratch_layout)
    return dsearch, drec, dtarget_keys, list(gradients)
