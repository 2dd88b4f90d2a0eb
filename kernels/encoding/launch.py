"""Launching the encoders, forward and backward."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lcr_fast.kernels.core.noise import dropout_arguments
from lcr_fast.kernels.encoding.config import SUBLAYERS, constants
from lcr_fast.kernels.encoding.forward import encode_fwd_kernel
from lcr_fast.kernels.gpu import dot_precision, gpu_of, on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.reasoning.backward import (
    BackwardStream,
    ffn_bwd_kernel,
    recompute_self_kernel,
    self_bwd_kernel,
)
from lcr_fast.kernels.reasoning.scratch import add_up, layout, pieces, products, write_gradients
from lcr_fast.kernels.reasoning.weights import layer_weights
from lcr_fast.weights import EncoderWeights


def encode_fwd(
    x: Tensor,
    lengths: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    stream: int,
    n_heads: int,
    dropout_threshold: int,
    dropout_seed: Tensor,
) -> Tensor:
    """Launch the forward kernel: h^(0) of one stream, [B, L, D]."""
    B, size, D = x.shape
    named = EncoderWeights(*weights)
    n_layers, F = named.qkv_weight.shape[0], named.ffn_in_weight.shape[-2]
    out = torch.empty_like(x)
    compiled = constants(
        "fwd", D, F, n_heads, size, x.dtype, dot_precision(x.dtype), gpu_of(x.device)
    )
    if out.numel():
        with on_device(x):
            launch(
                encode_fwd_kernel, (triton.cdiv(B, compiled["SEQUENCES"]),),
                x, lengths, rows, layer_weights(named, x.dtype), out, B, size, n_layers, stream,
                *dropout_arguments(dropout_threshold, dropout_seed),
                DROPOUT=dropout_threshold > 0, SAVE=False, **compiled,
            )  # fmt: skip
    return out


def encode_bwd(
    dout: Tensor,
    x: Tensor,
    lengths: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    stream: int,
    n_heads: int,
    dropout_threshold: int,
    dropout_seed: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Launch the backward kernels on pieces of the batch and multiply out the weight gradients.

    Nothing was saved: where there are more layers than one, their inputs are made again first.
    Returns the gradients of x [B, L, D] and of the 10 weights, all in their dtypes.
    """
    B, size, D = x.shape
    named = EncoderWeights(*weights)
    n_layers, F = named.qkv_weight.shape[0], named.ffn_in_weight.shape[-2]
    dx = torch.empty_like(x)
    gradients = EncoderWeights(*map(torch.empty_like, weights))
    torch._foreach_zero_(list(gradients))  # the other stream's, by one kernel for all
    if x.numel() == 0:
        return dx, list(gradients)

    cast = layer_weights(named, x.dtype)
    recompute, differentiate = (
        constants(which, D, F, n_heads, size, x.dtype, dot_precision(x.dtype), gpu_of(x.device))
        for which in ("fwd", "bwd")
    )
    dropout = dropout_arguments(dropout_threshold, dropout_seed)
    of_training = {"DROPOUT": dropout_threshold > 0, "NOISE": False, "POOL": False, "SAVE": True}
    scratch_layout = layout(D, F, SUBLAYERS)
    width = scratch_layout.columns.width
    users_at_once = pieces(B, 1, n_layers * size * width, x.dtype, x.device).users
    scratch_rows = x.new_empty(n_layers * users_at_once * size, width)  # of all pieces
    float32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    absent = x.new_empty(0)  # another stream, and what reasoning alone has
    sums: dict[Any, list[Tensor]] = {}
    for start in range(0, B, users_at_once):
        users = slice(start, min(start + users_at_once, B))
        n = users.stop - users.start
        of_users = (lengths[users], rows[users])
        n_recompute = triton.cdiv(n, recompute["SEQUENCES"])
        n_programs = triton.cdiv(n, differentiate["SEQUENCES"])
        saved = x.new_empty(n_layers - 1, n, size, D)
        scratch = scratch_rows[: n_layers * n * size].view(n_layers, n * size, width)
        dh, da = (torch.empty(n, size, D, **float32) for _ in range(2))
        dnorm = torch.empty(n_programs, n_layers, 2, SUBLAYERS, 2, D, **float32)
        alone = BackwardStream(x[users], of_users[0], saved, scratch, dout[users], dh, da, absent)
        numbers = (n, 1, size, size, 1)
        with on_device(x):
            if n_layers > 1:
                launch(
                    encode_fwd_kernel, (n_recompute,),
                    x[users], *of_users, cast, saved, n, size, n_layers - 1, stream, *dropout,
                    **of_training, **recompute,
                )  # fmt: skip
            launch(
                recompute_self_kernel, (n_recompute, 1, n_layers),
                alone, alone, stream, of_users[1], cast.attention, cast.norms, *numbers, 0, n,
                0.0, absent, *dropout, **of_training, **recompute,
            )  # fmt: skip
            for i in reversed(range(n_layers)):
                of_layer = alone._replace(scratch=scratch[i])
                arguments = (of_layer, of_layer, stream, of_users[1], absent, absent, absent)
                launch(
                    ffn_bwd_kernel, (n_programs, 1),
                    *arguments, cast.ffn, cast.norms, dnorm, *numbers, i, n_layers, *dropout,
                    **of_training, **differentiate,
                )  # fmt: skip
                launch(
                    self_bwd_kernel, (n_programs, 1),
                    *arguments, cast.attention, cast.norms, dnorm, *numbers, i, n_layers, *dropout,
                    **of_training, **differentiate,
                )  # fmt: skip
        dx[users] = dh
        add_up(sums, "norms", [dnorm[:, :, stream].sum(0)])
        add_up(sums, "matrices", products(scratch.unsqueeze(0), scratch_layout, shared=False))
    (dnorms,) = sums["norms"]
    gradients.norm_weight[:, stream], gradients.norm_bias[:, stream] = dnorms.unbind(2)
    of_stream = slice(stream, stream + 1)
    write_gradients(gradients, of_stream, 0, sums["matrices"], scratch_layout)
    return dx, list(gradients)
