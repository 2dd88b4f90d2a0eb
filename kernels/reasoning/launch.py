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
    BackwardStream,
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


def _launch(
    kernel: Any,
    grid: tuple[int, int],
    slot: tuple[int, int],
    streams: Sequence[BackwardStream],
    scratch: Sequence[Tensor],
    *arguments: Any,
    **compiled: Any,
) -> None:
    """Launch on both streams, one after the other only if their slots differ.

    ``grid`` is of one stream, [programs, steps], and ``scratch`` of these steps.
    """
    streams = [s._replace(scratch=rows) for s, rows in zip(streams, scratch, strict=True)]
    alike = slot[0] == slot[1]
    for first in (0,) if alike else (0, 1):
        launch(
            kernel, (grid[0], 2 if alike else 1, grid[1]), *streams, first, *arguments,
            SLOT=slot[first], MEMORY_SLOT=slot[1 - first], **compiled,
        )  # fmt: skip


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
    set_stride = int(not shared)
    dsearch, drec = torch.empty_like(search), torch.empty_like(rec)
    dtarget_keys = torch.zeros_like(target_keys)
    gradients = ReasoningWeights(*map(torch.empty_like, weights))
    torch._foreach_zero_(list(gradients))
    if B == 0:
        return dsearch, drec, dtarget_keys, list(gradients)

    self_attention, cross_attention, ffn, norms = step_weights(named, search.dtype)
    sizes = (search_size, rec_size)
    slot, of_one_size = slots(*sizes), search_size == rec_size
    recompute, differentiate, across = (
        constants(
            which, D, F, n_heads, sizes, search.dtype, dot_precision(search.dtype),
            gpu_of(search.device),
        )
        for which in ("recompute", "bwd", "cross_bwd")
    )  # fmt: skip
    switches = {"NOISE": noise_scale != 0.0, "DROPOUT": dropout_threshold > 0, "POOL": has_pool}
    dropout = dropout_arguments(dropout_threshold, dropout_seed)
    scratch_layout = layout(D, F)
    width = scratch_layout.columns.width
    at_once = pieces(B, K, N * sum(sizes) * width, search.dtype, search.device)
    scratch_rows = search.new_empty(  # of all pieces, one after another
        at_once.steps * at_once.users * N * sum(sizes), width
    )
    inputs = (
        (search, search_lengths, saved_search, dsearch_out),
        (rec, rec_lengths, saved_rec, drec_out),
    )
    float32: dict[str, Any] = {"dtype": torch.float32, "device": search.device}
    dkeys = torch.empty((B, N, K, 2, 2, D) if has_pool else (0,), **float32)
    sums: dict[Any, list[Tensor]] = {}  # norms, and both streams' matrices by first set of weights
    for start in range(0, B, at_once.users):
        users = slice(start, min(start + at_once.users, B))
        n = (users.stop - users.start) * N
        streams = [
            BackwardStream(
                states[users], lengths[users], saved[:, users], scratch_rows, dout[users],
                *(torch.empty(n // N, N, states.shape[1], D, **float32) for _ in range(3)),
            )
            for states, lengths, saved, dout in inputs
        ]  # fmt: skip
        n_recompute = triton.cdiv(n, recompute["SEQUENCES"])
        programs = triton.cdiv(n, differentiate["SEQUENCES"])
        dnorm = torch.empty(programs, K, 2, 3, 2, D, **float32)
        of_users = (rows[users], target_keys[users], dpooled[users], dkeys[users])
        numbers = (n, N, *sizes, set_stride)
        for last in range(K, 0, -at_once.steps):
            first = max(0, last - at_once.steps)
            n_rows = [(last - first) * n * size for size in sizes]
            of_both = scratch_rows[: sum(n_rows)]
            scratch = [part.view(last - first, -1, width) for part in of_both.split(n_rows)]
            # Programs of the two streams do not meet within a launch. Each writes rows of its own
            # stream, but for cross_bwd's dmemory and columns cross_dk and cross_dv, which stand in
            # the other's and which nothing else of that launch touches. What is read of the other
            # stream (a in cross-attention, dmemory in self_bwd) an earlier launch wrote.
            with on_device(search):
                _launch(
                    recompute_self_kernel, (n_recompute, last - first), slot, streams, scratch,
                    rows[users], self_attention, norms, *numbers, first, B * N,
                    noise_scale, noise_seed, *dropout, **switches, **recompute,
                )  # fmt: skip
                _launch(
                    recompute_cross_kernel, (n_recompute, last - first), slot, streams, scratch,
                    rows[users], cross_attention, *numbers, first, *dropout,
                    **switches, **recompute,
                )  # fmt: skip
                for k in reversed(range(first, last)):
                    of_step = [part[k - first] for part in scratch]
                    _launch(
                        ffn_bwd_kernel, (programs, 1), slot, streams, of_step,
                        *of_users, ffn, norms, dnorm,
                        *numbers, k, K, *dropout, **switches, **differentiate,
                    )  # fmt: skip
                    _launch(
                        cross_bwd_kernel, (triton.cdiv(n, across["SEQUENCES"]), 1), slot, streams,
                        of_step, cross_attention, *numbers, k, **across,
                    )  # fmt: skip
                    _launch(
                        self_bwd_kernel, (programs, 1), slot, streams, of_step,
                        *of_users, self_attention, norms, dnorm,
                        *numbers, k, K, *dropout, **switches, **differentiate,
                    )  # fmt: skip
            factors = [part.unsqueeze(0) for part in scratch]
            if of_one_size:  # one batch of products
                factors = [of_both.view(2, last - first, -1, width)]
            add_up(sums, 0 if shared else first, products(factors, scratch_layout, shared))
        for dx, stream in zip((dsearch, drec), streams, strict=True):
            dx[users] = stream.dh.sum(1) if N > 1 else stream.dh.squeeze(1)
        add_up(sums, "norms", [dnorm.sum((0, 1) if shared else 0).view(-1, 2, 3, 2, D)])
    if has_pool:
        dtarget_keys.copy_(dkeys.sum((1, 2, 3)))
    (dnorms,), n_norms = sums.pop("norms"), 3 if F else 2
    for of_norms, part in ((gradients.norm_weight, 0), (gradients.norm_bias, 1)):
        of_norms[: len(dnorms), :, :n_norms] = dnorms[:, :, :n_norms, part]
    for first, summed in sums.items():
        write_gradients(gradients, slice(0, 2), first, summed, scratch_layout)
    return dsearch, drec, dtarget_keys, list(gradients)
