"""Launching the encoders, forward and backward.

Streams whose slots have as many rows share their launches; others have their own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lcr_fast.kernels.core.noise import dropout_arguments
from lcr_fast.kernels.encoding.config import SUBLAYERS, constants
from lcr_fast.kernels.encoding.forward import EncoderStream, encode_fwd_kernel
from lcr_fast.kernels.gpu import dot_precision, gpu_of, on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.reasoning.backward import (
    BackwardStream,
    ffn_bwd_kernel,
    recompute_self_kernel,
    self_bwd_kernel,
)
from lcr_fast.kernels.reasoning.config import slots
from lcr_fast.kernels.reasoning.scratch import add_up, layout, pieces, products, write_gradients
from lcr_fast.kernels.reasoning.weights import LayerWeights, layer_weights
from lcr_fast.weights import REC, SEARCH, EncoderWeights


def _launched_together(*streams: Tensor) -> list[slice]:
    """Say which of (search, rec) share a launch; a stream without a number has none."""
    search, rec = slots(*(x.shape[1] for x in streams))
    both = slice(SEARCH, REC + 1)
    groups = [both] if search == rec else [slice(SEARCH, REC), slice(REC, REC + 1)]
    return [group for group in groups if any(x.numel() for x in streams[group])]


def encode_fwd(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    n_heads: int,
    dropout_threshold: int,
    dropout_seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: h^(0) of both streams, [B, L, D]."""
    B, search_size, D = search.shape
    named = EncoderWeights(*weights)
    n_layers, F = named.qkv_weight.shape[0], named.ffn_in_weight.shape[-2]
    outs = torch.empty_like(search), torch.empty_like(rec)
    streams = (
        EncoderStream(search, search_lengths, outs[0]), EncoderStream(rec, rec_lengths, outs[1]),
    )  # fmt: skip
    cast = layer_weights(named, search.dtype)
    for group in _launched_together(search, rec):
        compiled = constants(
            "fwd", D, F, n_heads, streams[group][0].x.shape[1], search.dtype,
            dot_precision(search.dtype), gpu_of(search.device),
        )  # fmt: skip
        programs = triton.cdiv(B, compiled["SEQUENCES"])
        with on_device(search):
            launch(
                encode_fwd_kernel, (programs, group.stop - group.start),
                *streams, group.start, rows, cast, B, search_size, rec.shape[1], n_layers,
                *dropout_arguments(dropout_threshold, dropout_seed),
                DROPOUT=dropout_threshold > 0, SAVE=False, **compiled,
            )  # fmt: skip
    return outs


def encode_bwd(
    dsearch_out: Tensor,
    drec_out: Tensor,
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    n_heads: int,
    dropout_threshold: int,
    dropout_seed: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Launch the backward kernels on pieces of the batch and multiply out the weight gradients.

    Nothing was saved: where there are more layers than one, their inputs are made again first.
    Returns the gradients of both streams [B, L, D] and of the 10 weights, all in their dtypes.
    """
    named = EncoderWeights(*weights)
    dsearch, drec = torch.empty_like(search), torch.empty_like(rec)
    gradients = EncoderWeights(*map(torch.empty_like, weights))
    if search.numel() == 0 or rec.numel() == 0:
        torch._foreach_zero_(list(gradients))
    inputs: list[Sequence[Tensor]] = [
        (search, search_lengths, dsearch_out, dsearch),
        (rec, rec_lengths, drec_out, drec),
    ]
    cast = layer_weights(named, search.dtype)
    dropout = dropout_arguments(dropout_threshold, dropout_seed)
    for group in _launched_together(search, rec):
        _backward(inputs[group], group, rows, cast, gradients, n_heads, dropout)
    return dsearch, drec, list(gradients)


def _backward(
    streams: Sequence[Sequence[Tensor]],
    group: slice,
    rows: Tensor,
    weights: LayerWeights,
    gradients: EncoderWeights,
    n_heads: int,
    dropout: tuple[Any, ...],
) -> None:
    """Differentiate both streams together, or one; ``group`` says which.

    Of each come its states, lengths and upstream gradient, and where the states' gradient goes.
    """
    x, sizes = streams[0][0], [states.shape[1] for states, *_ in streams]
    B, (n_layers, _, F, D) = len(x), gradients.ffn_in_weight.shape
    recompute, differentiate = (
        constants(which, D, F, n_heads, sizes[0], x.dtype, dot_precision(x.dtype), gpu_of(x.device))
        for which in ("fwd", "bwd")
    )
    of_training = {"DROPOUT": dropout[0] > 0, "NOISE": False, "POOL": False, "SAVE": True}
    scratch_layout = layout(D, F, SUBLAYERS)
    width = scratch_layout.columns.width
    at_once = pieces(B, 1, n_layers * sum(sizes) * width, x.dtype, x.device).users
    scratch_rows = x.new_empty(n_layers * at_once * sum(sizes), width)  # of all pieces
    float32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    absent = x.new_empty(0)  # what reasoning alone has
    sums: dict[Any, list[Tensor]] = {}
    for start in range(0, B, at_once):
        users = slice(start, min(start + at_once, B))
        n = users.stop - users.start
        n_recompute = triton.cdiv(n, recompute["SEQUENCES"])
        n_programs = triton.cdiv(n, differentiate["SEQUENCES"])
        n_rows = [n_layers * n * size for size in sizes]
        scratch = scratch_rows[: sum(n_rows)]
        here = [
            BackwardStream(
                states[users], lengths[users], x.new_empty(n_layers - 1, n, size, D),
                part.view(n_layers, n * size, width), dout[users],
                torch.empty(n, size, D, **float32), torch.empty(n, size, D, **float32), absent,
            )
            for (states, lengths, dout, _), part, size in zip(
                streams, scratch.split(n_rows), sizes, strict=True
            )
        ]  # fmt: skip
        dnorm = torch.empty(n_programs, n_layers, 2, SUBLAYERS, 2, D, **float32)
        numbers = (n, 1, sizes[0], sizes[-1], 1)
        with on_device(x):
            if n_layers > 1:
                made = [EncoderStream(s.states, s.lengths, s.saved) for s in here]
                launch(
                    encode_fwd_kernel, (n_recompute, len(here)),
                    made[0], made[-1], group.start, rows[users], weights, n, sizes[0], sizes[-1],
                    n_layers - 1, *dropout, **of_training, **recompute,
                )  # fmt: skip
            launch(
                recompute_self_kernel, (n_recompute, len(here), n_layers),
                here[0], here[-1], group.start, rows[users], weights.attention, weights.norms,
                *numbers, 0, n, 0.0, absent, *dropout, **of_training, **recompute,
            )  # fmt: skip
            for i in reversed(range(n_layers)):
                of_layer = [s._replace(scratch=s.scratch[i]) for s in here]
                arguments = (of_layer[0], of_layer[-1], group.start, rows[users], *[absent] * 3)
                launch(
                    ffn_bwd_kernel, (n_programs, len(here)),
                    *arguments, weights.ffn, weights.norms, dnorm, *numbers, i, n_layers, *dropout,
                    **of_training, **differentiate,
                )  # fmt: skip
                launch(
                    self_bwd_kernel, (n_programs, len(here)),
                    *arguments, weights.attention, weights.norms, dnorm, *numbers, i, n_layers,
                    *dropout, **of_training, **differentiate,
                )  # fmt: skip
        for (*_, dstates), stream in zip(streams, here, strict=True):
            dstates[users] = stream.dh
        add_up(sums, "norms", [dnorm[:, :, group].sum(0)])
        factors = [stream.scratch.unsqueeze(0) for stream in here]
        if sizes[0] == sizes[-1]:  # one batch of products
            factors = [scratch.view(len(here), n_layers, -1, width)]
        add_up(sums, "matrices", products(factors, scratch_layout, shared=False))
    (dnorms,) = sums["norms"]
    gradients.norm_weight[:, group], gradients.norm_bias[:, group] = dnorms.unbind(3)
    write_gradients(gradients, group, 0, sums["matrices"], scratch_layout)
