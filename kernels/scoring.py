"""Target-aware aggregation and head, forward and backward.

For candidate i of a user, its vector e, streams x (search s, recommendation r) with states h_j:

    k_x = W_x e;   p_xj = softmax_j( k_x . h_j );   z_x = sum_j p_xj h_j     (0 without an event)
    mlp: t1 = W1 [z_r; z_s; e; u] + b1;   t2 = W2 m1 relu(t1) + b2;   y = w3 . m2 relu(t2) + b3
    dot: y = (z_r + z_s) . e                                  m1, m2: dropout, 0 or 1 / (1 - rate)
    mlp_dot: the sum of both y

Forward: one program scores one tile of candidates of one user, for a run of trajectories, which
share k_x. Events and hidden units are read in blocks, the softmax is the running one, and of the
hidden layer no more than one block of columns exists at a time. Nothing is stored but y.

Backward, with g = dy and everything recomputed:

    dt2 = g w3 m2 [t2 > 0];   dt1 = W2^T dt2 m1 [t1 > 0];   [dz_r; dz_s; de; du] = W1^T dt1
    dot: dz_x += g e;   de += g (z_r + z_s)
    dl_xj = p_xj (dz_x . h_j - dz_x . z_x);   dk_x = sum_j dl_xj h_j;   de += W_x^T dk_x
    dh_j = sum_i p_xj dz_x + dl_xj k_x
    dW1 = dt1 [z_r; z_s; e; u]^T;   dW2 = dt2 (m1 relu(t1))^T;   dW_x = dk_x e^T

in four kernels, for as many users at a time as :data:`SCRATCH_BYTES` allows: the head's rows
(dt1, dt2, dz; one program a tile), the candidates (dk, de; one program a tile, over all
trajectories), the states (dh; one program a block of events, over all candidates) and the users
(du). The weights' gradients are products over all rows, which torch multiplies.

Sums are float32; products take the states' dtype (float32 as
``torch.get_float32_matmul_precision()`` says), to which weights and vectors are cast as they are
read. No atomics: each program writes its own partial sums, which are added in a fixed order.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.gpu import GPUS, Gpu, columns_product, dot_precision, gpu_of, on_device
from lcr_fast.kernels.products import product
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.target import (
    attend,
    dropout_tile,
    first_layer,
    head,
    load_events,
    load_vectors,
    relu,
    second_layer,
    second_layer_weights,
    target_keys,
)
from lcr_fast.kernels.variant import LAUNCH_OPTIONS, Variant

DIMS = (32, 64, 128)  # widths of a vector: one tile holds whole vectors
MAX_HIDDEN = (512, 128)  # widths of the hidden layers; the second is whole in one tile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_HEAD_SITES = 1 << 14  # of lcr_fast.ops.noise; a kernel knows nothing of the ops


def obstacle(dim: int, dtype: torch.dtype, hidden: tuple[int, ...]) -> str | None:
    """Say in one sentence why these kernels cannot serve a call, or None.

    ``hidden`` holds the widths of the hidden layers; it is empty for the dot product.
    """
    if dtype not in DTYPES:
        return f"the states must be float32, float16 or bfloat16, not {dtype}"
    if dim not in DIMS:
        return f"the width must be one of {', '.join(map(str, DIMS))}, not {dim}"
    if len(hidden) not in (0, 2) or any(h > m for h, m in zip(hidden, MAX_HIDDEN, strict=False)):
        return (
            f"the head must have two hidden layers of at most {MAX_HIDDEN[0]} and {MAX_HIDDEN[1]} "
            f"units, or none, not {list(hidden)}"
        )
    return None


# -- forward --------------------------------------------------------------------------------------


@kernel(do_not_specialize=["n_run", "threshold", "seed"])
def _score_fwd_kernel(
    search_ptr, rec_ptr, search_lengths_ptr, rec_lengths_ptr,  # [B, N, L, D] x 2, [B] x 2
    items_ptr, ids_ptr, user_ptr,  # [T, D], [B or 1, C], [B, D]
    target_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
    rows_ptr,  # [B]
    scores_ptr,  # [B, N, C]
    search_size, rec_size, ids_stride, n_trajectories, n_candidates,
    n_run,  # trajectories of a program
    threshold, scale, seed,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, DOT: tl.constexpr, SITE: tl.constexpr,
    HAS_USER: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    CANDIDATES: tl.constexpr, EVENTS: tl.constexpr, H1_BLOCK: tl.constexpr, H2_TILE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_candidates, CANDIDATES)
    n_runs = tl.cdiv(n_trajectories, n_run)
    pid = tl.program_id(0).to(tl.int64)
    tile, run, b = pid % n_tiles, pid // n_tiles % n_runs, pid // n_tiles // n_runs
    c = tile.to(tl.int32) * CANDIDATES + tl.arange(0, CANDIDATES)
    DTYPE: tl.constexpr = search_ptr.dtype.element_ty

    search_length = tl.load(search_lengths_ptr + b).to(tl.int32)
    rec_length = tl.load(rec_lengths_ptr + b).to(tl.int32)
    row = tl.load(rows_ptr + b) if DROPOUT else b
    inside = c < n_candidates
    ids = tl.load(ids_ptr + b * ids_stride + c, mask=inside, other=0)
    e = load_vectors(items_ptr, ids, inside, 0, D, D, DTYPE)  # [P, D]
    keys_s = target_keys(items_ptr, ids, inside, target_weight_ptr, D, KEY_BLOCK, DTYPE, PRECISION)
    keys_r = target_keys(
        items_ptr, ids, inside, target_weight_ptr + D * D, D, KEY_BLOCK, DTYPE, PRECISION
    )

    for n in range(run * n_run, tl.minimum((run + 1) * n_run, n_trajectories)):
        bn = b * n_trajectories + n
        z_s, _, _ = attend(
            keys_s, search_ptr + bn * search_size * D, search_length, D, EVENTS, PRECISION
        )
        z_r, _, _ = attend(keys_r, rec_ptr + bn * rec_size * D, rec_length, D, EVENTS, PRECISION)
        y = head(
            z_r, z_s, e, user_ptr + b * D, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
            seed, row, c, threshold, scale,
            D, H1, H2, DOT, H1_BLOCK, H2_TILE, SITE, HAS_USER, DROPOUT, PRECISION,
        )  # fmt: skip
        tl.store(
            scores_ptr + bn * n_candidates + c,
            y.to(scores_ptr.dtype.element_ty),
            mask=inside,
        )


class _Head(NamedTuple):
    """The head's tensors as the kernels read them; any pointer stands for an absent one."""

    w1: Tensor  # [H1, 3D (+ D)]
    b1: Tensor  # [H1]
    w2: Tensor  # [H2, H1]
    b2: Tensor  # [H2]
    w3: Tensor  # [1, H2]
    b3: Tensor  # [1]


def _head_tensors(mlp_weights: list[Tensor], mlp_biases: list[Tensor], absent: Tensor) -> _Head:
    if not mlp_weights:
        return _Head(*[absent] * 6)
    (w1, w2, w3), (b1, b2, b3) = mlp_weights, mlp_biases
    return _Head(*(t.contiguous() for t in (w1, b1, w2, b2, w3, b3)))


def _constants(
    dim: int, dtype: torch.dtype, user: Tensor, mlp_weights: list[Tensor], threshold: int, dot: bool
) -> dict[str, Any]:
    """Compile-time constants that describe the call, not its launch."""
    h1, h2 = (w.shape[0] for w in mlp_weights[:2]) if mlp_weights else (0, 0)
    return {
        "D": dim,
        "H1": h1,
        "H2": h2,
        "DOT": dot or h1 == 0,
        "H2_TILE": max(16, triton.next_power_of_2(h2)),
        "SITE": _HEAD_SITES,
        "HAS_USER": user.numel() > 0 and h1 > 0,
        "DROPOUT": threshold > 0 and h1 > 0,
        "PRECISION": dot_precision(dtype),
        "KEY_BLOCK": 32 if dim == 128 and dtype == torch.float32 else dim,
    }


class _Tiles(NamedTuple):
    """What one program holds at a time, at most."""

    candidates: int
    events: int
    hidden: int  # units of the first hidden layer
    warps: int
    stages: int = 2  # of loops over events and hidden units


# By kernel and by how products are made, for widths 32, 64, 128. Those of half and tf32x3 at width
# 64 were timed on an H200 (docs/fused-kernel.md): tiles of 64 rows fill wgmma, and a second stage,
# which doubles the operands in shared memory, costs tf32x3 more than it hides. The others follow
# them as far as registers and shared memory go (docs/kernel-resources.md).
_TILES = {
    ("score_fwd", "half"): ((64, 32, 32, 4), (64, 32, 32, 4), (32, 32, 16, 4)),
    ("score_fwd", "tf32"): ((32, 32, 16, 4), (32, 32, 32, 4), (16, 32, 16, 4)),
    ("score_fwd", "tf32x3"): ((64, 32, 32, 4, 1), (64, 32, 32, 4, 1), (16, 32, 16, 4, 1)),
    ("catalogue", "half"): ((64, 32, 32, 4), (64, 32, 32, 4), (32, 32, 16, 4)),
    ("catalogue", "tf32"): ((32, 32, 32, 4), (32, 32, 32, 4), (16, 16, 16, 4)),
    ("catalogue", "tf32x3"): ((32, 32, 32, 4, 1), (32, 32, 32, 4, 1), (16, 32, 16, 4, 1)),
    ("head_bwd", "half"): ((32, 16, 16, 4), (32, 32, 32, 4), (32, 32, 16, 8)),
    ("head_bwd", "tf32"): ((32, 32, 16, 4), (32, 32, 32, 4), (16, 32, 16, 8)),
    ("head_bwd", "tf32x3"): ((32, 32, 32, 4), (32, 32, 32, 4), (16, 32, 16, 4, 1)),
    ("attention_bwd", "half"): ((32, 32, 0, 4), (32, 32, 0, 4), (16, 32, 0, 4)),
    ("attention_bwd", "tf32"): ((32, 32, 0, 4), (32, 32, 0, 4), (16, 32, 0, 8)),
    ("attention_bwd", "tf32x3"): ((32, 32, 0, 4), (32, 32, 0, 4), (16, 32, 0, 8, 1)),
}


# For GPUs with less shared memory than the 163 KiB of compute capability 8.0, such as 8.6 and 8.9.
_SMALL_TILES = _Tiles(candidates=16, events=32, hidden=16, warps=4, stages=1)


def _config(
    kernel: str, dim: int, n_candidates: int, n_events: int, dtype: torch.dtype, precision: str,
    gpu: Gpu,
) -> dict[str, int]:  # fmt: skip
    """Choose tiles and launch options of a kernel, by the first half of a key of the table."""
    products = precision if dtype == torch.float32 else "half"
    tiles = _Tiles(*_TILES[kernel, products][DIMS.index(dim)])
    if gpu.shared < GPUS["sm_80"].shared:
        tiles = _SMALL_TILES
    config = {
        "ITEMS" if kernel == "catalogue" else "CANDIDATES": _block(n_candidates, tiles.candidates),
        "EVENTS": _block(n_events, tiles.events),
        "H1_BLOCK": tiles.hidden,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    if kernel == "attention_bwd":  # it does not read the head
        del config["H1_BLOCK"]
    return config


def _block(size: int, largest: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), largest)


# Programs that fill a large GPU a few times over (an H200 has 132 multiprocessors). A launch with
# fewer gives each trajectory a program of its own.
_PROGRAMS = 1024


def score_fwd(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    ids: Tensor,
    user: Tensor,
    target_weight: Tensor,
    mlp_weights: list[Tensor],
    mlp_biases: list[Tensor],
    dropout_rows: Tensor,
    dropout_threshold: int,
    dropout_seed: int,
    dot: bool,
) -> Tensor:
    """Score the items ``ids`` [B, C], or [1, C] for all users: [B, N, C] in the states' dtype.

    search [B, N, L_s, D], rec [B, N, L_r, D], lengths [B], items [T, D], user [B, D] or empty.
    Dropout, of a threshold in units of 2^-16, needs N = 1 and ``dropout_rows`` int64 [B]. ``dot``
    adds the dot product to the MLP; without an MLP it is the score anyway.
    """
    n_users, n_trajectories, _, dim = search.shape
    n_candidates = ids.shape[1]
    scores = search.new_empty(n_users, n_trajectories, n_candidates)
    if not scores.numel():
        return scores
    search, rec, ids = search.contiguous(), rec.contiguous(), ids.contiguous()
    constants = _constants(dim, search.dtype, user, mlp_weights, dropout_threshold, dot)
    config = _config(
        "score_fwd", dim, n_candidates, max(search.shape[2], rec.shape[2]), search.dtype,
        constants["PRECISION"], gpu_of(search.device),
    )  # fmt: skip
    n_tiles = triton.cdiv(n_candidates, config["CANDIDATES"])
    n_run = n_trajectories if n_users * n_tiles >= _PROGRAMS else 1
    grid = (n_users * n_tiles * triton.cdiv(n_trajectories, n_run),)
    with on_device(search):
        _score_fwd_kernel[grid](
            search, rec, search_lengths.contiguous(), rec_lengths.contiguous(),
            items.contiguous(), ids, user.contiguous(), target_weight.contiguous(),
            *_head_tensors(mlp_weights, mlp_biases, target_weight), dropout_rows.contiguous(),
            scores, search.shape[2], rec.shape[2], n_candidates if ids.shape[0] > 1 else 0,
            n_trajectories, n_candidates, n_run,
            dropout_threshold, 65536 / (65536 - dropout_threshold), dropout_seed,
            **constants, **config,
        )  # fmt: skip
    return scores


# -- backward -------------------------------------------------------------------------------------


@triton.jit
def _store_tile(
    ptr, rows, columns, stride, values, row_mask, n_columns: tl.constexpr
):  # values [P, columns]
    tl.store(
        ptr + rows[:, None] * stride + columns[None, :],
        values.to(ptr.dtype.element_ty),
        mask=row_mask[:, None] & (columns < n_columns)[None, :],
    )


@kernel(do_not_specialize=["first_user", "threshold", "seed"])
def _head_bwd_kernel(
    search_ptr, rec_ptr, search_lengths_ptr, rec_lengths_ptr,  # [B, N, L, D] x 2, [B] x 2
    items_ptr, ids_ptr, user_ptr,  # [T, D], [B or 1, C], [B, D]
    target_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
    rows_ptr,  # [B]
    dscores_ptr,  # [B, N, C]
    # Rows R = users of the chunk x N x C.
    inputs_ptr, dinputs_ptr,  # [R, 3D] x 2: z_r, z_s, e
    hidden_ptr, dt1_ptr, dt2_ptr,  # [R, H1] x 2, [R, H2]
    softmax_ptr,  # [2, 3, R] of each stream: maximum, inverse sum, dz . z
    sums_ptr,  # [programs, H1 + 2 H2] sums over the tile: dt1, dt2, dy relu(t2)
    search_size, rec_size, ids_stride, n_trajectories, n_candidates,
    n_rows, first_user, threshold, scale, seed,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, DOT: tl.constexpr, SITE: tl.constexpr,
    HAS_USER: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    CANDIDATES: tl.constexpr, EVENTS: tl.constexpr, H1_BLOCK: tl.constexpr, H2_TILE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_candidates, CANDIDATES)
    pid = tl.program_id(0).to(tl.int64)
    tile, bn_local = pid % n_tiles, pid // n_tiles
    b = first_user + bn_local // n_trajectories
    bn = b * n_trajectories + bn_local % n_trajectories
    c = tile.to(tl.int32) * CANDIDATES + tl.arange(0, CANDIDATES)
    inside = c < n_candidates
    # Offsets of a tile are 32-bit, on a scalar base: 64-bit ones take twice the registers.
    row_0 = bn_local * n_candidates + tile * CANDIDATES
    r = tl.arange(0, CANDIDATES)
    softmax_ptr += row_0
    inputs_ptr += row_0 * (3 * D)
    dinputs_ptr += row_0 * (3 * D)
    axis = tl.arange(0, D)
    DTYPE: tl.constexpr = search_ptr.dtype.element_ty

    search_length = tl.load(search_lengths_ptr + b).to(tl.int32)
    rec_length = tl.load(rec_lengths_ptr + b).to(tl.int32)
    ids = tl.load(ids_ptr + b * ids_stride + c, mask=inside, other=0)
    e = load_vectors(items_ptr, ids, inside, 0, D, D, DTYPE)  # [P, D]
    keys = target_keys(items_ptr, ids, inside, target_weight_ptr, D, KEY_BLOCK, DTYPE, PRECISION)
    z, top, inverse = attend(
        keys, search_ptr + bn * search_size * D, search_length, D, EVENTS, PRECISION
    )
    z_s = z.to(DTYPE)
    tl.store(softmax_ptr + r, top, mask=inside)
    tl.store(softmax_ptr + n_rows + r, inverse, mask=inside)
    keys = target_keys(
        items_ptr, ids, inside, target_weight_ptr + D * D, D, KEY_BLOCK, DTYPE, PRECISION
    )
    z, top, inverse = attend(keys, rec_ptr + bn * rec_size * D, rec_length, D, EVENTS, PRECISION)
    z_r = z.to(DTYPE)
    rec_softmax_ptr = softmax_ptr + 3 * n_rows
    tl.store(rec_softmax_ptr + r, top, mask=inside)
    tl.store(rec_softmax_ptr + n_rows + r, inverse, mask=inside)

    dy = tl.load(dscores_ptr + bn * n_candidates + c, mask=inside, other=0.0).to(tl.float32)
    dz_r = tl.zeros([CANDIDATES, D], tl.float32)
    dz_s = tl.zeros([CANDIDATES, D], tl.float32)
    de = tl.zeros([CANDIDATES, D], tl.float32)
    if H1 > 0:
        row = tl.load(rows_ptr + b) if DROPOUT else b
        _store_tile(inputs_ptr, r, axis, 3 * D, z_r, inside, D)
        _store_tile(inputs_ptr + D, r, axis, 3 * D, z_s, inside, D)
        _store_tile(inputs_ptr + 2 * D, r, axis, 3 * D, e, inside, D)
        t2 = second_layer(
            z_r, z_s, e, user_ptr + b * D, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
            seed, row, c, threshold, scale,
            D, H1, H2, H1_BLOCK, H2_TILE, SITE, HAS_USER, DROPOUT, PRECISION,
        )  # fmt: skip
        outputs = tl.arange(0, H2_TILE)
        w3 = tl.load(w3_ptr + outputs, mask=outputs < H2, other=0.0).to(tl.float32)
        x2 = relu(t2)
        dt2 = tl.where(t2 > 0, dy[:, None] * w3[None, :], 0.0)
        if DROPOUT:
            keep2 = dropout_tile(seed, row, SITE + 1, c, 0, H2_TILE) >= threshold
            x2 = tl.where(keep2, x2 * scale, 0.0)
            dt2 = tl.where(keep2, dt2 * scale, 0.0)
        my_sums_ptr = sums_ptr + pid * (H1 + 2 * H2)
        tl.store(my_sums_ptr + H1 + outputs, tl.sum(dt2, 0), mask=outputs < H2)
        tl.store(my_sums_ptr + H1 + H2 + outputs, tl.sum(dy[:, None] * x2, 0), mask=outputs < H2)
        _store_tile(dt2_ptr + row_0 * H2, r, outputs, H2, dt2, inside, H2)
        dt2 = dt2.to(DTYPE)

        for first in range(0, H1, H1_BLOCK):
            units = first + tl.arange(0, H1_BLOCK)
            t1, w_r, w_s, w_e = first_layer(
                z_r, z_s, e, user_ptr + b * D, w1_ptr, b1_ptr, units, D, H1, HAS_USER, PRECISION
            )
            w2 = second_layer_weights(w2_ptr, units, H1, H2, H2_TILE).to(DTYPE)
            dt1 = product(dt2, w2, PRECISION)  # [P, BLOCK]
            dt1 = tl.where(t1 > 0, dt1, 0.0)
            x1 = relu(t1)
            if DROPOUT:
                keep = dropout_tile(seed, row, SITE, c, first, H1_BLOCK) >= threshold
                x1 = tl.where(keep, x1 * scale, 0.0)
                dt1 = tl.where(keep, dt1 * scale, 0.0)
            _store_tile(hidden_ptr + row_0 * H1, r, units, H1, x1, inside, H1)
            _store_tile(dt1_ptr + row_0 * H1, r, units, H1, dt1, inside, H1)
            tl.store(my_sums_ptr + units, tl.sum(dt1, 0), mask=units < H1)
            dt1 = dt1.to(DTYPE)
            dz_r = product(dt1, w_r, PRECISION, dz_r)
            dz_s = product(dt1, w_s, PRECISION, dz_s)
            de = product(dt1, w_e, PRECISION, de)
    if DOT:  # last: tensor cores truncate what they add to, with every block
        dz = dy[:, None] * e.to(tl.float32)
        dz_r += dz
        dz_s += dz
        de += dy[:, None] * (z_s.to(tl.float32) + z_r.to(tl.float32))

    dz_r, dz_s = dz_r.to(DTYPE), dz_s.to(DTYPE)
    _store_tile(dinputs_ptr, r, axis, 3 * D, dz_r, inside, D)
    _store_tile(dinputs_ptr + D, r, axis, 3 * D, dz_s, inside, D)
    _store_tile(dinputs_ptr + 2 * D, r, axis, 3 * D, de, inside, D)
    # From the rounded dz, which is what the next kernels multiply with the states.
    mean = tl.sum(dz_s.to(tl.float32) * z_s.to(tl.float32), 1)
    tl.store(softmax_ptr + 2 * n_rows + r, mean, mask=inside)
    mean = tl.sum(dz_r.to(tl.float32) * z_r.to(tl.float32), 1)
    tl.store(rec_softmax_ptr + 2 * n_rows + r, mean, mask=inside)


@triton.jit
def _softmax_rows(softmax_ptr, r, n_rows, inside):
    """Load what :func:`_head_bwd_kernel` kept of a softmax: maximum, inverse sum, dz . z; [P]."""
    top = tl.load(softmax_ptr + r, mask=inside, other=0.0)
    inverse = tl.load(softmax_ptr + n_rows + r, mask=inside, other=0.0)
    mean = tl.load(softmax_ptr + 2 * n_rows + r, mask=inside, other=0.0)
    return top, inverse, mean


@triton.jit
def _dkeys(
    e, states_ptr, length, weight_ptr, candidates_ptr, dkeys_ptr, dz_ptr, softmax_ptr,
    c, size, n_trajectories, n_candidates, n_rows,
    D: tl.constexpr, EVENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store k and dk of one stream, dk summed over the trajectories; return W^T dk, [P, D].

    Pointers are to the tile's first row, of the first trajectory.
    """
    DTYPE: tl.constexpr = e.dtype
    axis = tl.arange(0, D)
    inside = c < n_candidates
    i = tl.arange(0, e.shape[0])
    weight = tl.load(weight_ptr + axis[:, None] * D + axis[None, :]).to(DTYPE)
    keys = product(e, tl.trans(weight), PRECISION).to(DTYPE)
    _store_tile(candidates_ptr, i, axis, 3 * D, keys, inside, D)
    dkeys = tl.zeros([e.shape[0], D], tl.float32)
    for n in range(0, n_trajectories):
        row_0 = tl.cast(n, tl.int64) * n_candidates
        top, inverse, mean = _softmax_rows(softmax_ptr + row_0, i, n_rows, inside)
        dz_ptrs = dz_ptr + row_0 * (3 * D) + (i[:, None] * (3 * D) + axis[None, :])
        dz = tl.load(dz_ptrs, mask=inside[:, None], other=0.0)
        for first in range(0, length, EVENTS):
            events = first + tl.arange(0, EVENTS)
            h = load_events(
                states_ptr + tl.cast(n, tl.int64) * size * D, events, length, D
            )  # [EVENTS, D]
            logits = product(keys, tl.trans(h), PRECISION)  # [P, EVENTS]
            p = tl.exp(logits - top[:, None]) * inverse[:, None]
            p = tl.where((events < length)[None, :], p, 0.0)
            dp = product(dz, tl.trans(h), PRECISION)
            dl = p * (dp - mean[:, None])
            dkeys = product(dl.to(DTYPE), h, PRECISION, dkeys)
    dkeys = dkeys.to(DTYPE)
    _store_tile(dkeys_ptr, i, axis, 2 * D, dkeys, inside, D)
    return product(dkeys, weight, PRECISION)


@kernel(do_not_specialize=["first_user"])
def _candidate_bwd_kernel(
    search_ptr, rec_ptr, search_lengths_ptr, rec_lengths_ptr,  # [B, N, L, D] x 2, [B] x 2
    items_ptr, ids_ptr, target_weight_ptr,  # [T, D], [B or 1, C], [2, D, D]
    dinputs_ptr, softmax_ptr,  # [R, 3D], [2, 3, R]
    candidates_ptr, dkeys_ptr,  # users of the chunk x C rows: [.., 3D] k_s, k_r, e; [.., 2D]
    ditems_ptr,  # [B, C, D]
    search_size, rec_size, ids_stride, n_trajectories, n_candidates, n_rows, first_user,
    D: tl.constexpr, PRECISION: tl.constexpr, CANDIDATES: tl.constexpr, EVENTS: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_candidates, CANDIDATES)
    pid = tl.program_id(0).to(tl.int64)
    tile, b_local = pid % n_tiles, pid // n_tiles
    b = first_user + b_local
    c = tile.to(tl.int32) * CANDIDATES + tl.arange(0, CANDIDATES)
    inside = c < n_candidates
    first = tile * CANDIDATES
    i = tl.arange(0, CANDIDATES)
    row_0 = b_local * n_trajectories * n_candidates + first  # of the first trajectory
    softmax_ptr += row_0
    dinputs_ptr += row_0 * (3 * D)
    candidates_ptr += (b_local * n_candidates + first) * (3 * D)
    dkeys_ptr += (b_local * n_candidates + first) * (2 * D)
    axis = tl.arange(0, D)
    DTYPE: tl.constexpr = search_ptr.dtype.element_ty

    ids = tl.load(ids_ptr + b * ids_stride + c, mask=inside, other=0)
    e = load_vectors(items_ptr, ids, inside, 0, D, D, DTYPE)  # [P, D]
    _store_tile(candidates_ptr + 2 * D, i, axis, 3 * D, e, inside, D)
    de = _dkeys(
        e, search_ptr + b * n_trajectories * search_size * D,
        tl.load(search_lengths_ptr + b).to(tl.int32), target_weight_ptr, candidates_ptr,
        dkeys_ptr, dinputs_ptr + D, softmax_ptr, c, search_size, n_trajectories,
        n_candidates, n_rows, D, EVENTS, PRECISION,
    )  # fmt: skip
    de += _dkeys(
        e, rec_ptr + b * n_trajectories * rec_size * D,
        tl.load(rec_lengths_ptr + b).to(tl.int32), target_weight_ptr + D * D, candidates_ptr + D,
        dkeys_ptr + D, dinputs_ptr, softmax_ptr + 3 * n_rows, c, rec_size, n_trajectories,
        n_candidates, n_rows, D, EVENTS, PRECISION,
    )  # fmt: skip
    for n in range(0, n_trajectories):
        de_ptr = dinputs_ptr + tl.cast(n, tl.int64) * n_candidates * (3 * D) + 2 * D
        de_ptrs = de_ptr + (i[:, None] * (3 * D) + axis[None, :])
        de += tl.load(de_ptrs, mask=inside[:, None], other=0.0).to(tl.float32)
    _store_tile(ditems_ptr + (b * n_candidates + first) * D, i, axis, D, de, inside, D)


@kernel(do_not_specialize=["first_user"])
def _state_bwd_kernel(
    states_ptr, lengths_ptr,  # [B, N, L, D], [B]
    candidates_ptr, dz_ptr, softmax_ptr,  # of this stream: k [.., 3D], dz [R, 3D], [3, R]
    dstates_ptr,  # [B, N, L, D]
    size, n_trajectories, n_candidates, n_rows, first_user,
    D: tl.constexpr, PRECISION: tl.constexpr, CANDIDATES: tl.constexpr, EVENTS: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(size, EVENTS)
    pid = tl.program_id(0).to(tl.int64)
    block, bn_local = pid % n_blocks, pid // n_blocks
    b_local = bn_local // n_trajectories
    bn = first_user * n_trajectories + bn_local
    length = tl.load(lengths_ptr + first_user + b_local).to(tl.int32)
    first_event = block.to(tl.int32) * EVENTS
    events = first_event + tl.arange(0, EVENTS)
    valid = events < length
    axis = tl.arange(0, D)
    i = tl.arange(0, CANDIDATES)
    tile_offsets = i[:, None] * (3 * D) + axis[None, :]

    h = load_events(states_ptr + bn * size * D, events, length, D)  # [EVENTS, D]
    dh = tl.zeros([EVENTS, D], tl.float32)
    for first in range(0, tl.where(first_event < length, n_candidates, 0), CANDIDATES):
        inside = first + i < n_candidates
        keys_ptr = candidates_ptr + (b_local * n_candidates + first) * (3 * D)
        row_0 = bn_local * n_candidates + first
        keys = tl.load(keys_ptr + tile_offsets, mask=inside[:, None], other=0.0)  # [P, D]
        dz = tl.load(
            dz_ptr + row_0 * (3 * D) + tile_offsets, mask=inside[:, None], other=0.0
        )  # [P, D]
        top, inverse, mean = _softmax_rows(softmax_ptr + row_0, i, n_rows, inside)
        logits = product(h, tl.trans(keys), PRECISION)  # [EVENTS, P]
        p = tl.where(valid[:, None], tl.exp(logits - top[None, :]) * inverse[None, :], 0.0)
        dp = product(h, tl.trans(dz), PRECISION)
        dl = p * (dp - mean[None, :])
        dh = product(p.to(h.dtype), dz, PRECISION, dh)
        dh = product(dl.to(h.dtype), keys, PRECISION, dh)
    dh = tl.where(valid[:, None], dh, 0.0)
    _store_tile(dstates_ptr + bn * size * D, events, axis, D, dh, events < size, D)


@kernel(do_not_specialize=["first_user"])
def _user_bwd_kernel(
    w1_ptr, sums_ptr,  # [H1, 4D], [programs of the head, H1 + 2 H2]
    dt1_ptr, duser_ptr,  # [B, H1] float32 sum of dt1 over a user's rows, [B, D]
    n_sums, first_user,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H1_BLOCK: tl.constexpr,
):  # fmt: skip
    b_local = tl.program_id(0).to(tl.int64)
    b = first_user + b_local
    axis = tl.arange(0, D)
    du = tl.zeros([D], tl.float32)
    for first in range(0, H1, H1_BLOCK):
        units = first + tl.arange(0, H1_BLOCK)
        dt1 = tl.zeros([H1_BLOCK], tl.float32)
        for k in range(0, n_sums):
            my_sums_ptr = sums_ptr + (b_local * n_sums + k) * (H1 + 2 * H2)
            dt1 += tl.load(my_sums_ptr + units, mask=units < H1, other=0.0)
        tl.store(dt1_ptr + b * H1 + units, dt1, mask=units < H1)
        w_u = tl.load(
            w1_ptr + units[:, None] * (4 * D) + 3 * D + axis[None, :],
            mask=(units < H1)[:, None],
            other=0.0,
        ).to(tl.float32)
        du += tl.sum(w_u * dt1[:, None], 0)
    tl.store(duser_ptr + b * D + axis, du.to(duser_ptr.dtype.element_ty))


# Most bytes of intermediate rows that a backward holds at once (but at least one user's).
SCRATCH_BYTES = 256 << 20
_USER_CONFIG = {"H1_BLOCK": 32, "num_warps": 4, "num_stages": 1}


def score_bwd(
    dscores: Tensor,
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    ids: Tensor,
    user: Tensor,
    target_weight: Tensor,
    mlp_weights: list[Tensor],
    mlp_biases: list[Tensor],
    dropout_rows: Tensor,
    dropout_threshold: int,
    dropout_seed: int,
    dot: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Differentiate :func:`score_fwd`, for dscores [B, N, C].

    Returns dsearch, drec, the gradient of each candidate's vector [B, C, D] (summed over the
    trajectories), duser (0 for the dot product), dtarget_weight, and lists like the MLP's, each in
    its tensor's dtype.
    """
    n_users, n_trajectories, n_search, dim = search.shape
    n_rec, n_candidates, dtype = rec.shape[2], ids.shape[1], search.dtype
    search, rec, search_lengths, rec_lengths, items, ids, user, target_weight, dscores, rows = (
        t.contiguous()
        for t in (
            search, rec, search_lengths, rec_lengths, items, ids, user, target_weight, dscores,
            dropout_rows,
        )
    )  # fmt: skip
    head = _head_tensors(mlp_weights, mlp_biases, target_weight)
    constants = _constants(dim, dtype, user, mlp_weights, dropout_threshold, dot)
    h1, h2, precision = constants["H1"], constants["H2"], constants["PRECISION"]
    sizes = (dim, n_candidates, max(n_search, n_rec), dtype, precision, gpu_of(search.device))
    head_config = _config("head_bwd", *sizes)
    config = {"D": dim, "PRECISION": precision, **_config("attention_bwd", *sizes)}
    n_sums = n_trajectories * triton.cdiv(n_candidates, head_config["CANDIDATES"])  # a user

    dsearch, drec = torch.zeros_like(search), torch.zeros_like(rec)
    ditems = items.new_zeros(n_users, n_candidates, dim)
    duser = torch.zeros_like(user)
    dtarget_weight = target_weight.new_zeros(2 * dim, dim, dtype=torch.float32)
    dmlp_weights, dmlp_biases = (
        [torch.zeros_like(t, dtype=torch.float32) for t in tensors]
        for tensors in (mlp_weights, mlp_biases)
    )
    dt1_sums = user.new_zeros(n_users if constants["HAS_USER"] else 0, h1, dtype=torch.float32)

    rows_bytes = (6 * dim + 2 * h1 + h2) * search.element_size() + 6 * 4
    user_bytes = (
        n_trajectories * n_candidates * rows_bytes
        + n_candidates * 5 * dim * search.element_size()
        + n_sums * (h1 + 2 * h2) * 4
    )
    n_chunk = max(1, SCRATCH_BYTES // max(user_bytes, 1))
    for first in range(0, n_users if dscores.numel() else 0, n_chunk):
        users = min(n_chunk, n_users - first)
        n_rows = users * n_trajectories * n_candidates
        inputs = search.new_empty(n_rows if h1 else 0, 3 * dim)
        dinputs = search.new_empty(n_rows, 3 * dim)
        hidden, dt1 = search.new_empty(2, n_rows, h1)
        dt2 = search.new_empty(n_rows, h2)
        softmax = search.new_empty(2, 3, n_rows, dtype=torch.float32)
        sums = search.new_empty(users * n_sums, h1 + 2 * h2, dtype=torch.float32)
        candidates = search.new_empty(users * n_candidates, 3 * dim)
        dkeys = search.new_empty(users * n_candidates, 2 * dim)
        ids_stride = n_candidates if ids.shape[0] > 1 else 0
        with on_device(search):
            _head_bwd_kernel[(users * n_sums,)](
                search, rec, search_lengths, rec_lengths, items, ids, user, target_weight, *head,
                rows, dscores, inputs, dinputs, hidden, dt1, dt2, softmax, sums,
                n_search, n_rec, ids_stride, n_trajectories, n_candidates, n_rows, first,
                dropout_threshold, 65536 / (65536 - dropout_threshold), dropout_seed,
                **constants, **head_config,
            )  # fmt: skip
            _candidate_bwd_kernel[(users * triton.cdiv(n_candidates, config["CANDIDATES"]),)](
                search, rec, search_lengths, rec_lengths, items, ids, target_weight,
                dinputs, softmax, candidates, dkeys, ditems,
                n_search, n_rec, ids_stride, n_trajectories, n_candidates, n_rows, first, **config,
            )  # fmt: skip
            for x, (states, lengths, dstates) in enumerate(
                ((search, search_lengths, dsearch), (rec, rec_lengths, drec))
            ):
                size = states.shape[2]
                n_programs = users * n_trajectories * triton.cdiv(size, config["EVENTS"])
                _state_bwd_kernel[(n_programs,)](
                    states, lengths, candidates[:, x * dim :], dinputs[:, (1 - x) * dim :],
                    softmax[x], dstates, size, n_trajectories, n_candidates, n_rows, first,
                    **config,
                )  # fmt: skip
            dtarget_weight += columns_product(dkeys, candidates[:, 2 * dim :])
            if h1:
                dmlp_weights[0][:, : 3 * dim] += columns_product(dt1, inputs)
                dmlp_weights[1] += columns_product(dt2, hidden)
                for total, part in zip(
                    (dmlp_biases[0], dmlp_biases[1], dmlp_weights[2][0]),
                    sums.sum(0).split((h1, h2, h2)),
                    strict=True,
                ):
                    total += part
            if constants["HAS_USER"]:
                _user_bwd_kernel[(users,)](
                    head.w1, sums, dt1_sums, duser, n_sums, first,
                    D=dim, H1=h1, H2=h2, **_USER_CONFIG,
                )  # fmt: skip
    if dscores.numel() and h1:
        dmlp_biases[2] += dscores.sum(dtype=torch.float32)
        if constants["HAS_USER"]:
            dmlp_weights[0][:, 3 * dim :] = columns_product(dt1_sums.to(dtype), user.to(dtype))
    return (
        dsearch, drec, ditems, duser,
        dtarget_weight.view_as(target_weight).to(target_weight.dtype),
        [d.to(w.dtype) for d, w in zip(dmlp_weights, mlp_weights, strict=True)],
        [d.to(b.dtype) for d, b in zip(dmlp_biases, mlp_biases, strict=True)],
    )  # fmt: skip


# -- the whole catalogue --------------------------------------------------------------------------

_ID_BITS = tl.constexpr(0x7FFFFFFF)
_NAN_BITS = tl.constexpr(0x7FC00000)
_NO_KEY = tl.constexpr(-(1 << 63))  # below the key of every score
_HIGHEST_KEY = tl.constexpr((1 << 63) - 1)
_LOWEST_KEY = -(((1 << 31) - 1) << 32)  # at or below the key of every score


@triton.jit
def _score_items(
    ids, valid,  # [P]
    items_ptr, search_ptr, search_length, rec_ptr, rec_length, user_ptr,  # of one user
    target_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, DOT: tl.constexpr, HAS_USER: tl.constexpr,
    PRECISION: tl.constexpr, EVENTS: tl.constexpr, H1_BLOCK: tl.constexpr, H2_TILE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Score a tile of items as :func:`score_fwd` returns it, in the states' dtype: [P]."""
    DTYPE: tl.constexpr = search_ptr.dtype.element_ty
    e = load_vectors(items_ptr, ids, valid, 0, D, D, DTYPE)  # [P, D]
    keys = target_keys(items_ptr, ids, valid, target_weight_ptr, D, KEY_BLOCK, DTYPE, PRECISION)
    z_s, _, _ = attend(keys, search_ptr, search_length, D, EVENTS, PRECISION)
    keys = target_keys(
        items_ptr, ids, valid, target_weight_ptr + D * D, D, KEY_BLOCK, DTYPE, PRECISION
    )
    z_r, _, _ = attend(keys, rec_ptr, rec_length, D, EVENTS, PRECISION)
    y = head(
        z_r, z_s, e, user_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, 0, 0, ids, 0, 1.0,
        D, H1, H2, DOT, H1_BLOCK, H2_TILE, 0, HAS_USER, False, PRECISION,
    )  # fmt: skip
    return y.to(DTYPE)


@triton.jit
def _sort_keys(scores, ids):
    """Make int64 keys that order like (score, -id), and so are unique; a NaN is the highest."""
    scores = tl.where(scores == 0, 0.0, scores.to(tl.float32))  # -0 equals 0
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(scores != scores, _NAN_BITS, bits)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative numbers: the larger, the lower
    return (bits.to(tl.int64) << 32) | (ids ^ _ID_BITS).to(tl.int64)


@kernel(do_not_specialize=["k", "tiles_per_split"])
def _catalogue_topk_kernel(
    search_ptr, rec_ptr, search_lengths_ptr, rec_lengths_ptr,  # [B, L, D] x 2, [B] x 2
    items_ptr, user_ptr,  # [I + 1, D], [B, D]
    target_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
    exclude_ptr, ceiling_ptr,  # [B, X], [B]: only keys below the ceiling count
    keys_ptr,  # [B, splits, k] int64, in no order
    search_size, rec_size, n_rows, n_excluded, n_users, k, tiles_per_split,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, DOT: tl.constexpr, HAS_USER: tl.constexpr,
    PRECISION: tl.constexpr, ITEMS: tl.constexpr, EVENTS: tl.constexpr, H1_BLOCK: tl.constexpr,
    H2_TILE: tl.constexpr, KEY_BLOCK: tl.constexpr, K_TILE: tl.constexpr, X_BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, split = pid % n_users, pid // n_users
    search_length = tl.minimum(tl.load(search_lengths_ptr + b), search_size).to(tl.int32)
    rec_length = tl.minimum(tl.load(rec_lengths_ptr + b), rec_size).to(tl.int32)
    ceiling = tl.load(ceiling_ptr + b)
    slots = tl.arange(0, K_TILE)
    # Distinct, as one slot at a time is replaced; slots beyond k never are.
    best = tl.where(slots < k, slots.to(tl.int64) + _NO_KEY, _HIGHEST_KEY)
    worst = tl.min(best, 0)
    n_nan = 0

    n_tiles = tl.cdiv(n_rows - 1, ITEMS)
    first_tile = split.to(tl.int32) * tiles_per_split
    end = tl.minimum(first_tile + tiles_per_split, n_tiles)
    # No hoisting: weights that waited for the next tile would take registers all the while.
    for tile in tl.range(first_tile, end, disable_licm=True):
        ids = 1 + tile * ITEMS + tl.arange(0, ITEMS)
        valid = ids < n_rows
        scores = _score_items(
            ids, valid, items_ptr, search_ptr + b * search_size * D, search_length,
            rec_ptr + b * rec_size * D, rec_length, user_ptr + b * D,
            target_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
            D, H1, H2, DOT, HAS_USER, PRECISION, EVENTS, H1_BLOCK, H2_TILE, KEY_BLOCK,
        )  # fmt: skip
        n_nan += tl.sum((valid & (scores != scores)).to(tl.int32), 0)
        keys = _sort_keys(scores, ids)
        keys = tl.where(valid & (scores > float("-inf")) & (keys < ceiling), keys, _NO_KEY)
        # After the first tiles few keys pass, so one at a time is cheap, and so is the search for
        # each of them among the excluded ids.
        key = tl.max(keys, 0)
        while key > worst:
            item = (key & _ID_BITS) ^ _ID_BITS
            n_found = 0
            for x in range(0, n_excluded, X_BLOCK):
                place = x + tl.arange(0, X_BLOCK)
                excluded = tl.load(
                    exclude_ptr + b * n_excluded + place, mask=place < n_excluded, other=0
                )
                n_found += tl.sum((excluded == item).to(tl.int32), 0)
            best = tl.where((best == worst) & (n_found == 0), key, best)
            worst = tl.min(best, 0)
            keys = tl.where(keys == key, _NO_KEY, keys)
            key = tl.max(keys, 0)
    # One NaN spoils the user's list: it must not look like a list.
    nan_key = tl.full([K_TILE], _NAN_BITS, tl.int64) << 32
    best = tl.where(n_nan > 0, nan_key, best)
    tl.store(
        keys_ptr + (b * tl.cdiv(n_tiles, tiles_per_split) + split) * k + slots, best, mask=slots < k
    )


@kernel(do_not_specialize=["tiles_per_split"])
def _catalogue_rank_kernel(
    search_ptr, rec_ptr, search_lengths_ptr, rec_lengths_ptr,  # [B, L, D] x 2, [B] x 2
    items_ptr, user_ptr,  # [I + 1, D], [B, D]
    target_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
    target_ptr, bonus_ptr, exclude_ptr,  # [B] x 2, [B, X] without repetitions
    ahead_ptr,  # [B, splits] int64, hugely negative where there was a NaN
    search_size, rec_size, n_rows, n_excluded, n_users, tiles_per_split,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, DOT: tl.constexpr, HAS_USER: tl.constexpr,
    PRECISION: tl.constexpr, ITEMS: tl.constexpr, EVENTS: tl.constexpr, H1_BLOCK: tl.constexpr,
    H2_TILE: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, split = pid % n_users, pid // n_users
    search_length = tl.minimum(tl.load(search_lengths_ptr + b), search_size).to(tl.int32)
    rec_length = tl.minimum(tl.load(rec_lengths_ptr + b), rec_size).to(tl.int32)
    target = tl.load(target_ptr + b).to(tl.int32)
    bonus = tl.load(bonus_ptr + b)
    goal = tl.zeros([1], tl.float32)
    n_ahead = 0
    n_nan = 0

    # Tiles of the excluded items, which are counted away, and then of the whole catalogue. Before
    # them each program scores the target in the same loop, so that the very same instructions
    # give its score and that of an equal item.
    n_listed = tl.cdiv(n_excluded, ITEMS)
    n_tiles = n_listed + tl.cdiv(n_rows - 1, ITEMS)
    first_tile = split.to(tl.int32) * tiles_per_split
    end = tl.minimum(first_tile + tiles_per_split, n_tiles)
    for tile in tl.range(first_tile - 1, end, disable_licm=True):  # as in the kernel above
        is_goal, is_listed = tile < first_tile, tile < n_listed
        place = tile * ITEMS + tl.arange(0, ITEMS)
        listed = tl.load(
            exclude_ptr + b * n_excluded + place,
            mask=(place >= 0) & (place < n_excluded),
            other=0,
        ).to(tl.int32)
        ids = tl.where(is_listed, listed, place - n_listed * ITEMS + 1)
        ids = tl.where(is_goal, target, ids)
        valid = (ids > 0) & (ids < n_rows)
        scores = _score_items(
            ids, valid, items_ptr, search_ptr + b * search_size * D, search_length,
            rec_ptr + b * rec_size * D, rec_length, user_ptr + b * D,
            target_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
            D, H1, H2, DOT, HAS_USER, PRECISION, EVENTS, H1_BLOCK, H2_TILE, KEY_BLOCK,
        ).to(tl.float32)  # fmt: skip
        goal = tl.where(is_goal, tl.max(scores, 0) + bonus, goal)
        n_nan += tl.sum((valid & (scores != scores)).to(tl.int32), 0)
        ahead = valid & (ids != target) & (scores >= goal) & (scores > float("-inf"))
        count = tl.sum(ahead.to(tl.int32), 0)
        n_ahead += tl.where(is_goal, 0, tl.where(is_listed, -count, count))
    n_splits = tl.cdiv(n_tiles, tiles_per_split)
    result = tl.where(n_nan > 0, -(1 << 40), n_ahead.to(tl.int64))  # type: ignore[attr-defined]
    tl.store(ahead_ptr + b * n_splits + split, result)


# A longer list is found in several passes over the catalogue.
MAX_K = 512
# A split has at least so many tiles: its programs fill their lists, or score the target, once.
_SPLIT_TILES = 8


def _catalogue_config(
    dim: int, n_events: int, dtype: torch.dtype, precision: str, gpu: Gpu
) -> dict[str, int]:
    n_items = 1 << 20  # a catalogue is large
    config = _config("catalogue", dim, n_items, n_events, dtype, precision, gpu)
    if (
        gpu.major == 10
    ):  # Triton 3.7 fails on this loop with tcgen05, which takes tiles from 64 rows on
        config["ITEMS"] = min(config["ITEMS"], 32)
    return config


def _catalogue_constants(
    dim: int, dtype: torch.dtype, user: Tensor, mlp_weights: list[Tensor], dot: bool
) -> dict[str, Any]:
    constants = _constants(dim, dtype, user, mlp_weights, 0, dot)
    return {name: v for name, v in constants.items() if name not in ("SITE", "DROPOUT")}


def _split_tiles(n_tiles: int, n_users: int) -> tuple[int, int]:
    """Tiles of a split, and splits."""
    n_splits = min(triton.cdiv(_PROGRAMS, n_users), triton.cdiv(n_tiles, _SPLIT_TILES))
    per_split = triton.cdiv(n_tiles, max(n_splits, 1))
    return per_split, triton.cdiv(n_tiles, max(per_split, 1))


def catalogue_topk(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    user: Tensor,
    target_weight: Tensor,
    mlp_weights: list[Tensor],
    mlp_biases: list[Tensor],
    k: int,
    exclude: Tensor,
    dot: bool,
) -> tuple[Tensor, Tensor]:
    """Find the k best rows of ``items`` [I + 1, D] but row 0: ids and scores [B, k].

    States are [B, L, D], ``exclude`` int64 [B, X]. The best first, of equal scores the lower id;
    id 0 and score -inf where fewer have a score above -inf. One NaN among a user's scores makes
    them all NaN. Exact; each program keeps the best keys of a run of items, so memory is
    O(B splits min(k, MAX_K)), with splits <= _PROGRAMS / B + 1.
    """
    n_users, _, dim = search.shape
    n_rows = items.shape[0]
    head = _head_tensors(mlp_weights, mlp_biases, target_weight)
    constants = _catalogue_constants(dim, search.dtype, user, mlp_weights, dot)
    n_events = max(search.shape[1], rec.shape[1])
    gpu = gpu_of(search.device)
    config = _catalogue_config(dim, n_events, search.dtype, constants["PRECISION"], gpu)
    per_split, n_splits = _split_tiles(triton.cdiv(n_rows - 1, config["ITEMS"]), max(n_users, 1))
    tensors = [
        t.contiguous()
        for t in (search, rec, search_lengths, rec_lengths, items, user, target_weight)
    ]
    exclude = exclude.contiguous()

    ceiling = torch.full((n_users,), 2**63 - 1, dtype=torch.int64, device=search.device)
    n_best = min(k, n_rows - 1) if n_users else 0
    found = [ceiling.new_empty(n_users, 0)]
    for first in range(0, n_best, MAX_K):
        size = min(MAX_K, n_best - first)
        keys = ceiling.new_empty(n_users, n_splits, size)
        with on_device(search):
            _catalogue_topk_kernel[(n_users * n_splits,)](
                *tensors, *head, exclude, ceiling, keys,
                search.shape[1], rec.shape[1], n_rows, exclude.shape[1], n_users, size, per_split,
                K_TILE=triton.next_power_of_2(size), X_BLOCK=_block(exclude.shape[1], 256),
                **constants, **config,
            )  # fmt: skip
        found.append(keys.flatten(1).sort(1, descending=True).values[:, :size])
        ceiling = found[-1][:, -1].contiguous()
    return _read_keys(torch.cat(found, 1), k, search.dtype)


def _read_keys(keys: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Undo :func:`_sort_keys`: [B, n] -> ids and scores [B, k], 0 and -inf where no item is."""
    bits = keys >> 32
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    scores = bits.to(torch.int32).view(torch.float32)
    absent = keys < _LOWEST_KEY
    scores = scores.masked_fill(absent, -torch.inf)
    ids = (~keys & 0x7FFFFFFF).masked_fill(absent, 0)
    missing = (0, k - keys.shape[1])
    ids = torch.nn.functional.pad(ids, missing)
    return ids, torch.nn.functional.pad(scores, missing, value=-torch.inf).to(dtype)


def catalogue_rank(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    user: Tensor,
    target_weight: Tensor,
    mlp_weights: list[Tensor],
    mlp_biases: list[Tensor],
    target: Tensor,
    bonus: Tensor,
    exclude: Tensor,
    dot: bool,
) -> Tensor:
    """Count, for each user, the items that come before ``target``, from 1: int64 [B].

    1 + the number of rows of ``items`` [I + 1, D], but row 0, the target and those in ``exclude``
    [B, X], with a score above -inf and not below the target's plus
    ``bonus`` [B]. -1 where a score is NaN.
    """
    n_users, _, dim = search.shape
    n_rows = items.shape[0]
    ahead = target.new_zeros(n_users, 0)
    if n_users and n_rows > 1:
        head = _head_tensors(mlp_weights, mlp_biases, target_weight)
        constants = _catalogue_constants(dim, search.dtype, user, mlp_weights, dot)
        n_events = max(search.shape[1], rec.shape[1])
        gpu = gpu_of(search.device)
        config = _catalogue_config(dim, n_events, search.dtype, constants["PRECISION"], gpu)
        exclude = exclude.sort(1).values
        repeated = torch.zeros_like(exclude, dtype=torch.bool)
        repeated[:, 1:] = exclude[:, 1:] == exclude[:, :-1]
        exclude = exclude.masked_fill(repeated | (exclude < 0) | (exclude >= n_rows), 0)
        n_tiles = sum(triton.cdiv(n, config["ITEMS"]) for n in (exclude.shape[1], n_rows - 1))
        per_split, n_splits = _split_tiles(n_tiles, n_users)
        ahead = target.new_empty(n_users, n_splits)
        with on_device(search):
            _catalogue_rank_kernel[(n_users * n_splits,)](
                search.contiguous(), rec.contiguous(), search_lengths.contiguous(),
                rec_lengths.contiguous(), items.contiguous(), user.contiguous(),
                target_weight.contiguous(), *head, target.contiguous(), bonus.contiguous(),
                exclude, ahead,
                search.shape[1], rec.shape[1], n_rows, exclude.shape[1], n_users, per_split,
                **constants, **config,
            )  # fmt: skip
    n_ahead = ahead.sum(1)
    return torch.where(n_ahead < 0, -1, n_ahead + 1)


# -- what is compiled -----------------------------------------------------------------------------

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_POINTER_TYPES = {
    "search_lengths_ptr": "*i64", "rec_lengths_ptr": "*i64", "lengths_ptr": "*i64",
    "ids_ptr": "*i64", "rows_ptr": "*i64", "exclude_ptr": "*i64", "ceiling_ptr": "*i64",
    "target_ptr": "*i64", "keys_ptr": "*i64", "ahead_ptr": "*i64",
    "softmax_ptr": "*fp32", "sums_ptr": "*fp32", "bonus_ptr": "*fp32",
}  # fmt: skip
_SCALAR_TYPES = {"scale": "fp32", "seed": "i64"}


def _variant(name: str, kernel, dtype: torch.dtype, constants: dict[str, Any]) -> Variant:
    def kind(argument: str) -> str:
        if argument.endswith("_ptr"):
            return _POINTER_TYPES.get(argument, f"*{_TYPES[dtype]}")
        return _SCALAR_TYPES.get(argument, "i32")

    chosen = {n: v for n, v in constants.items() if n in kernel.arg_names}
    signature = {n: kind(n) for n in kernel.arg_names if n not in chosen}
    options = {n: v for n, v in constants.items() if n in LAUNCH_OPTIONS}
    return Variant(name, kernel, signature, chosen, options)


def variants(arch: str) -> Iterator[Variant]:
    """Yield what a model launches, in training (C 5) and in phase 2 (C 100).

    L is the longer history, k the length of a list. Names that say no head are of ``mlp`` with a
    user vector; ``mlp_dot``, at the default width, is without one.
    """
    for variant in _variants_of_one_head(arch):
        yield variant
        if variant.constexprs["D"] == 64 and variant.constexprs.get("DOT") is False:
            name = variant.name.replace("-", "-mlp_dot-", 1)
            both = variant.constexprs | {"DOT": True, "HAS_USER": False}
            yield variant._replace(name=name, constexprs=both)


def _variants_of_one_head(arch: str) -> Iterator[Variant]:
    gpu = GPUS[arch]
    shapes = ((32, 20), (64, 30), (64, 50), (128, 200))
    for dtype, precision in (
        (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "tf32x3"),
    ):  # fmt: skip
        half = dtype != torch.float32
        kind = _TYPES[dtype] if half else f"{_TYPES[dtype]}-{precision}"
        for dim, n_events in {"ieee": shapes, "tf32": shapes[2:3], "tf32x3": shapes[2:]}[precision]:
            user = torch.empty(1, dim, device="meta")
            layers = [torch.empty(n, device="meta") for n in (200, 80)]
            for n_candidates, threshold in ((5, 6554), (100, 0)):
                sizes = (dim, n_candidates, n_events, dtype, precision, gpu)
                call = _constants(dim, dtype, user, layers, threshold, False)
                call["PRECISION"] = precision
                suffix = f"{kind}-d{dim}-L{n_events}-C{n_candidates}"
                forward = call | _config("score_fwd", *sizes)
                yield _variant(f"score_fwd-{suffix}", _score_fwd_kernel, dtype, forward)
                if n_candidates == 100:
                    dot = forward | {"H1": 0, "DOT": True, "HAS_USER": False}
                    yield _variant(f"score_fwd-dot-{suffix}", _score_fwd_kernel, dtype, dot)
                backward = call | _config("head_bwd", *sizes)
                yield _variant(f"head_bwd-{suffix}", _head_bwd_kernel, dtype, backward)
                backward = call | _config("attention_bwd", *sizes)
                yield _variant(f"candidate_bwd-{suffix}", _candidate_bwd_kernel, dtype, backward)
                yield _variant(f"state_bwd-{suffix}", _state_bwd_kernel, dtype, backward)
            scan = call | _catalogue_config(dim, n_events, dtype, precision, gpu)
            for k in (10, 100):
                top = scan | {"K_TILE": triton.next_power_of_2(k), "X_BLOCK": 128}
                name = f"catalogue_topk-{kind}-d{dim}-L{n_events}-k{k}"
                yield _variant(name, _catalogue_topk_kernel, dtype, top)
            name = f"catalogue_rank-{kind}-d{dim}-L{n_events}"
            yield _variant(name, _catalogue_rank_kernel, dtype, scan)
        if precision != "tf32":
            call = {"D": 64, "H1": 200, "H2": 80, **_USER_CONFIG}
            yield _variant(f"user_bwd-no-dot-{kind}-d64", _user_bwd_kernel, dtype, call)
