"""Latent cross reasoning in Triton: launch the kernels, forward and backward.

The kernels are in reasoning_fwd.py and reasoning_bwd.py, their configurations in
reasoning_config.py.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lcr_fast.kernels.gpu import GPUS, Gpu, columns_product, dot_precision, gpu_of, on_device
from lcr_fast.kernels.reasoning_bwd import (
    cross_bwd_kernel,
    ffn_bwd_kernel,
    recompute_cross_kernel,
    recompute_self_kernel,
    scratch_columns,
    self_bwd_kernel,
)
from lcr_fast.kernels.reasoning_config import constants, slots
from lcr_fast.kernels.reasoning_fwd import latent_reasoning_fwd_kernel
from lcr_fast.kernels.variant import LAUNCH_OPTIONS, Variant

_WIDTHS = (32, 64, 128)
_MIN_HEAD = 16  # the least depth of a tensor-core dot
_MAX_SIZE = 128  # events a stream: one slot must fit a tile
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Compute capabilities where float32 operands are read from shared memory. Elsewhere they wait in
# registers; beyond so many numbers in two parts, ptxas spills ten kilobytes a thread.
_READ_SHARED = (9,)
_MOST_IN_REGISTERS = 64 * 64


def obstacle(
    *,
    dim: int,
    n_heads: int,
    ffn_dim: int,
    search_len: int,
    rec_len: int,
    dtype: torch.dtype,
    gpu: Gpu | None = None,
) -> str | None:
    """Say why the kernels cannot serve a case on a GPU, or in the interpreter, or None."""
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
    if gpu is not None and gpu.major not in _READ_SHARED and dot_precision(dtype) == "tf32x3":
        rows = max(dim, *slots(search_len, rec_len))
        if dim == 128 or rows * (dim // n_heads) > _MOST_IN_REGISTERS:
            return (
                f"on compute capability {gpu.major} the two parts of float32 operands do not fit "
                f"registers at width {dim} with {n_heads} heads and {max(search_len, rec_len)} "
                "events; torch.set_float32_matmul_precision('high') or halves do"
            )
    return None


def _matrices_to(dtype: torch.dtype, weights: Sequence[Tensor]) -> list[Tensor]:
    """Cast matrices, as the dots want them, once: not in every program, in twice the registers."""
    return [w.to(dtype) if i < 12 and i % 2 == 0 else w for i, w in enumerate(weights)]


@functools.cache
def _names(kernel: Any) -> frozenset[str]:
    """Arguments and launch options of a kernel."""
    return frozenset((*kernel.arg_names, *LAUNCH_OPTIONS))


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **compiled: Any) -> None:
    """Launch with those of the compile-time arguments that the kernel takes."""
    names = _names(kernel)
    kernel[grid](*arguments, **{n: v for n, v in compiled.items() if n in names})


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
    has_pool = target_keys.ndim == 3
    pooled = search.new_empty((B, N, steps, 2, 2, D) if has_pool else (0,))
    saved_search = search.new_empty(n_saved, B, N, search_size, D)
    saved_rec = rec.new_empty(n_saved, B, N, rec_size, D)
    weights = _matrices_to(search.dtype, weights)
    sizes = (search_size, rec_size)
    compiled = constants(
        "fwd", D, F, n_heads, sizes, search.dtype, dot_precision(search.dtype),
        gpu_of(search.device),
    )  # fmt: skip
    search_slot, rec_slot = slots(*sizes)
    search_spare, rec_spare = search_out, rec_out
    if compiled["PARK"]:
        search_spare, rec_spare = torch.empty_like(search_out), torch.empty_like(rec_out)
    if B * N:
        with on_device(search):
            _launch(
                latent_reasoning_fwd_kernel, (triton.cdiv(B * N, compiled["USERS"]),),
                search, rec, search_lengths, rec_lengths, rows, target_keys, *weights,
                search_out, rec_out, search_spare, rec_spare, pooled, saved_search, saved_rec,
                B * N, N, search_size, rec_size, steps, int(weights[0].shape[0] > 1),
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
    totals: list[Tensor], scratch: Sequence[Tensor], dnorm: Tensor, D: int, F: int
) -> None:
    """Add one chunk's share, from ``scratch`` [P, rows, 16 D + 2 F] of both streams, to ``totals``.

    ``dnorm`` is [P, programs, 2, 3, 2, D].
    """
    P = dnorm.shape[0]
    dy_start = 5 * D + F
    for x in (0, 1):
        own, other = scratch[x], scratch[1 - x]

        def columns(t: Tensor, start: int, size: int) -> Tensor:
            return t[:, :, start : start + size]

        def dy(t: Tensor, start: int, size: int) -> Tensor:
            return t[:, :, dy_start + start : dy_start + start + size]

        def bias(t: Tensor) -> Tensor:
            return t.sum(1, dtype=torch.float32)

        pairs = [  # weight, its bias, rows of both, dY, X
            (0, slice(None), dy(own, 0, 3 * D), columns(own, 0, D)),
            (2, slice(None), dy(own, 3 * D, D), columns(own, D, D)),
            (4, slice(0, D), dy(own, 4 * D, D), columns(own, 2 * D, D)),
            (4, slice(D, 3 * D), dy(other, 5 * D, 2 * D), columns(other, 2 * D, D)),
            (6, slice(None), dy(own, 7 * D, D), columns(own, 3 * D, D)),
        ]
        if F:
            pairs += [
                (8, slice(None), dy(own, 9 * D, F), columns(own, 4 * D, D)),
                (10, slice(None), dy(own, 8 * D, D), columns(own, 5 * D, F)),
            ]
        for weight, out_rows, gradient, operand in pairs:
            totals[weight][:P, x, out_rows] += columns_product(gradient, operand)
            totals[weight + 1][:P, x, out_rows] += bias(gradient)
    n_norms = 3 if F else 2
    norms = dnorm[:, :, :, :n_norms].sum(1)  # [P, 2, n_norms, 2, D]
    totals[12][:P, :, :n_norms] += norms[:, :, :, 0]
    totals[13][:P, :, :n_norms] += norms[:, :, :, 1]


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
    rec_size, N, F, K = rec.shape[1], n_trajectories, weights[8].shape[-2], steps
    has_pool = target_keys.ndim == 3
    shared = weights[0].shape[0] == 1
    dsearch, drec = torch.empty_like(search), torch.empty_like(rec)
    dtarget_keys = torch.zeros_like(target_keys)
    totals = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    if B == 0:
        return (
            dsearch,
            drec,
            dtarget_keys,
            [t.to(w.dtype) for t, w in zip(totals, weights, strict=True)],
        )

    cast = _matrices_to(search.dtype, weights)
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
    C = scratch_columns(D, F)
    user_bytes = N * K * (search_size + rec_size) * C * search.element_size()
    chunk = min(B, max(1, _SCRATCH_BYTES // max(user_bytes, 1)))
    float32: dict[str, Any] = {"dtype": torch.float32, "device": search.device}
    dkeys = torch.empty((B, N, K, 2, 2, D) if has_pool else (0,), **float32)
    for start in range(0, B, chunk):
        users = slice(start, min(start + chunk, B))
        lengths = (search_lengths[users], rec_lengths[users])
        n = len(lengths[0]) * N
        n_recompute = triton.cdiv(n, recompute["USERS"])
        programs = triton.cdiv(n, differentiate["USERS"])
        scratch = tuple(search.new_empty(K, n * size, C) for size in sizes)
        dh, da, dmemory = (
            tuple(torch.empty(n // N, N, size, D, **float32) for size in sizes) for _ in range(3)
        )
        dnorm = torch.empty(programs, K, 2, 3, 2, D, **float32)
        with on_device(search):
            for x, (state, saved) in enumerate(((search, saved_search), (rec, saved_rec))):
                _launch(
                    recompute_self_kernel, (n_recompute, K),
                    state[users], lengths[x], rows[users], *cast, saved[:, users], scratch[x],
                    n, N, sizes[x], int(not shared), x, B * N, noise_scale, noise_seed, *dropout,
                    SLOT=slot[x], NOISE=noise_scale != 0.0,
                    DROPOUT=is_dropping, **recompute,
                )  # fmt: skip
            for x in (0, 1):
                _launch(
                    recompute_cross_kernel, (n_recompute, K),
                    lengths[x], lengths[1 - x], rows[users], *cast, scratch[x], scratch[1 - x],
                    n, N, sizes[x], sizes[1 - x], int(not shared), x, *dropout,
                    SLOT=slot[x], MEMORY_SLOT=slot[1 - x],
                    DROPOUT=is_dropping, **recompute,
                )  # fmt: skip
            for k in reversed(range(K)):
                for x, dout in enumerate((dsearch_out, drec_out)):
                    _launch(
                        ffn_bwd_kernel, (programs,),
                        dout[users], dpooled[users], dh[x], da[x], lengths[x], lengths[1 - x],
                        rows[users], target_keys[users], *cast, scratch[x][k], dkeys[users],
                        dnorm, n, N, sizes[x], k, K, int(not shared), x, *dropout,
                        SLOT=slot[x], DROPOUT=is_dropping,
                        POOL=has_pool, **differentiate,
                    )  # fmt: skip
                for x in (0, 1):
                    _launch(
                        cross_bwd_kernel, (programs,),
                        da[x], da[x], dmemory[1 - x], lengths[x], lengths[1 - x], *cast,
                        scratch[x][k], scratch[1 - x][k],
                        n, N, sizes[x], sizes[1 - x], k, int(not shared), x,
                        SLOT=slot[x], MEMORY_SLOT=slot[1 - x], **differentiate,
                    )  # fmt: skip
                for x in (0, 1):
                    _launch(
                        self_bwd_kernel, (programs,),
                        da[x], dmemory[x], dpooled[users], dh[x], lengths[x], rows[users],
                        target_keys[users], *cast, scratch[x][k], dkeys[users], dnorm,
                        n, N, sizes[x], k, K, int(not shared), x, *dropout,
                        SLOT=slot[x], DROPOUT=is_dropping, POOL=has_pool,
                        **differentiate,
                    )  # fmt: skip
        dsearch[users] = dh[0].sum(1)
        drec[users] = dh[1].sum(1)
        dnorm = dnorm.transpose(0, 1)  # [K, programs, 2, 3, 2, D]
        if shared:
            scratch = tuple(t.view(1, -1, C) for t in scratch)
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


# -- what is compiled -----------------------------------------------------------------------------

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_WEIGHTS = ("self_", "cross_", "ffn_", "norm_")
_LENGTHS = ("search_lengths_ptr", "rec_lengths_ptr", "lengths_ptr", "memory_lengths_ptr")
_FLOAT32 = ("dh_ptr", "da_ptr", "dx2_ptr", "dmemory_ptr", "dkeys_ptr", "dnorm_ptr")
_OWN_TYPES = {
    "rows_ptr": "*i64", **dict.fromkeys(_LENGTHS, "*i64"), **dict.fromkeys(_FLOAT32, "*fp32"),
    "noise_scale": "fp32", "noise_seed": "i64", "dropout_scale": "fp32", "dropout_seed": "i64",
}  # fmt: skip


def _variant(
    name: str, kernel: Any, dtype: torch.dtype, weights: torch.dtype, compiled: dict[str, Any]
) -> Variant:
    def kind(argument: str) -> str:
        if argument in _OWN_TYPES:
            return _OWN_TYPES[argument]
        if argument.endswith("_weight_ptr") and not argument.startswith("norm"):
            return f"*{_TYPES[dtype]}"
        if argument.endswith("_ptr"):
            return f"*{_TYPES[weights if argument.startswith(_WEIGHTS) else dtype]}"
        return "i32"

    chosen = {n: v for n, v in compiled.items() if n in kernel.arg_names}
    signature = {n: kind(n) for n in kernel.arg_names if n not in chosen}
    return Variant(name, kernel, signature, chosen, {n: compiled[n] for n in LAUNCH_OPTIONS})


class _Call(NamedTuple):
    """What decides the compile-time constants of a call."""

    dim: int
    size: int  # events of both streams
    dtype: torch.dtype = torch.bfloat16
    weights: torch.dtype = torch.float32
    precision: str = "ieee"


_CALLS = (
    *(_Call(*shape) for shape in ((32, 20), (64, 30), (64, 50), (64, 128), (128, 50), (128, 128))),
    *(_Call(*shape, torch.float32, precision="tf32") for shape in ((64, 30), (64, 50))),
    *(_Call(*shape, torch.float32, precision="tf32x3") for shape in ((32, 20), (64, 30), (64, 50))),
    _Call(128, 50, torch.float32, precision="tf32x3"),
)


def variants(arch: str) -> Iterator[Variant]:
    """Yield what models with two heads and F = D launch, in training and in rollouts.

    L is the longer history. Training pools every step and drops (``train``), or draws trajectories
    (``rollout``); ``infer`` does neither. Backward is one kernel a stream, and that of the
    cross-attention is the same in both.
    """
    plain = {"NOISE": False, "DROPOUT": False, "POOL": False, "SAVE": False}
    train = {"NOISE": False, "DROPOUT": True, "POOL": True, "SAVE": True}
    rollout = {"NOISE": True, "DROPOUT": False, "POOL": False, "SAVE": True}
    for call in _CALLS:
        dim, dtype = call.dim, call.dtype
        if dim == 128 and call.precision == "tf32x3" and GPUS[arch].major not in _READ_SHARED:
            continue  # it is not served
        sizes = (call.size, call.size)
        slot, _ = slots(*sizes)
        rows = {"SEARCH_SLOT": slot, "REC_SLOT": slot, "SLOT": slot, "MEMORY_SLOT": slot}
        kind = _TYPES[dtype]
        if dtype == torch.float32:
            kind += f"-{call.precision}"
        suffix = f"{kind}-d{dim}-L{call.size}"
        for which, name, kernel, switches in (
            ("fwd", "fwd-infer", latent_reasoning_fwd_kernel, plain),
            ("fwd", "fwd-train", latent_reasoning_fwd_kernel, train),
            ("fwd", "fwd-rollout", latent_reasoning_fwd_kernel, rollout),
            ("recompute", "recompute_self-train", recompute_self_kernel, train),
            ("recompute", "recompute_self-rollout", recompute_self_kernel, rollout),
            ("recompute", "recompute_cross-train", recompute_cross_kernel, train),
            ("recompute", "recompute_cross-rollout", recompute_cross_kernel, rollout),
            ("bwd", "ffn_bwd-train", ffn_bwd_kernel, train),
            ("bwd", "ffn_bwd-rollout", ffn_bwd_kernel, rollout),
            ("bwd", "cross_bwd", cross_bwd_kernel, {}),
            ("bwd", "self_bwd-train", self_bwd_kernel, train),
            ("bwd", "self_bwd-rollout", self_bwd_kernel, rollout),
        ):
            if dtype == torch.float32 and switches is rollout:
                continue  # as in training but for the drawing, which halves show
            compiled = constants(which, dim, dim, 2, sizes, dtype, call.precision, GPUS[arch])
            compiled |= rows | switches
            yield _variant(f"{name}-{suffix}", kernel, dtype, call.weights, compiled)
