"""Gradients of the scores of given candidates: the kernels and their launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.core.noise import Dropout, dropout_arguments
from lcr_fast.kernels.core.product import product
from lcr_fast.kernels.gpu import gpu_of, on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.scoring.config import USER_CONFIG, config, constants, mlp_of
from lcr_fast.kernels.scoring.tile import (
    Stream,
    attend,
    first_layer,
    hidden_keep,
    load_events,
    load_length,
    load_vectors,
    relu,
    second_layer,
    second_layer_weights,
    target_keys,
    third_layer_weights,
)
from lcr_fast.kernels.weight_gradients import product_of_rows


@triton.jit
def _store(ptr, rows, columns, stride, values, inside, WIDTH: tl.constexpr):
    """Store values [P, n] at rows [P] that are ``inside``, and columns [n] that are below WIDTH."""
    tl.store(
        ptr + rows[:, None] * stride + columns[None, :],
        values.to(ptr.dtype.element_ty),
        mask=inside[:, None] & (columns < WIDTH)[None, :],
    )


@kernel(do_not_specialize=["first_user", "threshold"])
def head_bwd_kernel(
    search,  # Stream
    rec,  # Stream
    items_ptr,  # [T, D]
    ids_ptr,  # [B or 1, C]
    user_ptr,  # [B, D]
    target_weight_ptr,  # [2, D, D]
    mlp,  # Mlp
    user_rows_ptr,  # [B]
    dscores_ptr,  # [B, N, C]
    # Rows R = users of the chunk x N x C.
    inputs_ptr,  # [R, 3D] z_r, z_s, e
    dinputs_ptr,  # [R, 3D]
    hidden_ptr,  # [R, H1]
    dt1_ptr,  # [R, H1]
    dt2_ptr,  # [R, H2]
    softmax_ptr,  # [2, 3, R] of each stream: maximum, inverse sum, dz . z
    sums_ptr,  # [programs, H1 + 2 H2] sums over the tile: dt1, dt2, dy relu(t2)
    ids_stride,
    n_trajectories,
    n_candidates,
    n_rows,
    first_user,
    threshold,
    scale,
    seed_ptr,  # int64 []
    D: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CANDIDATES: tl.constexpr,
    EVENTS: tl.constexpr,
    H1_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
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
    DTYPE: tl.constexpr = search.states.dtype.element_ty
    H1: tl.constexpr = HEAD.H1
    H2: tl.constexpr = HEAD.H2

    search_length = load_length(search, b)
    rec_length = load_length(rec, b)
    ids = tl.load(ids_ptr + b * ids_stride + c, mask=inside, other=0)
    e = load_vectors(items_ptr, ids, inside, 0, D, D, DTYPE)  # [P, D]
    keys = target_keys(items_ptr, ids, inside, target_weight_ptr, D, KEY_BLOCK, DTYPE, PRECISION)
    z, top, inverse = attend(
        keys, search.states + bn * search.size * D, search_length, D, EVENTS, PRECISION
    )
    z_s = z.to(DTYPE)
    tl.store(softmax_ptr + r, top, mask=inside)
    tl.store(softmax_ptr + n_rows + r, inverse, mask=inside)
    keys = target_keys(
        items_ptr, ids, inside, target_weight_ptr + D * D, D, KEY_BLOCK, DTYPE, PRECISION
    )
    z, top, inverse = attend(keys, rec.states + bn * rec.size * D, rec_length, D, EVENTS, PRECISION)
    z_r = z.to(DTYPE)
    rec_softmax_ptr = softmax_ptr + 3 * n_rows
    tl.store(rec_softmax_ptr + r, top, mask=inside)
    tl.store(rec_softmax_ptr + n_rows + r, inverse, mask=inside)

    dy = tl.load(dscores_ptr + bn * n_candidates + c, mask=inside, other=0.0).to(tl.float32)
    dz_r = tl.zeros([CANDIDATES, D], tl.float32)
    dz_s = tl.zeros([CANDIDATES, D], tl.float32)
    de = tl.zeros([CANDIDATES, D], tl.float32)
    if H1 > 0:
        row = tl.load(user_rows_ptr + b) if HEAD.DROPOUT else b
        dropout = Dropout(threshold, scale, seed_ptr)
        _store(inputs_ptr, r, axis, 3 * D, z_r, inside, D)
        _store(inputs_ptr + D, r, axis, 3 * D, z_s, inside, D)
        _store(inputs_ptr + 2 * D, r, axis, 3 * D, e, inside, D)
        t2 = second_layer(
            z_r, z_s, e, user_ptr + b * D, mlp, dropout, row, c, HEAD, H1_BLOCK, PRECISION
        )
        outputs = tl.arange(0, HEAD.H2_TILE)
        w3 = third_layer_weights(mlp, HEAD)
        x2 = relu(t2)
        dt2 = tl.where(t2 > 0, dy[:, None] * w3[None, :], 0.0)
        if HEAD.DROPOUT:
            keep2 = hidden_keep(dropout, row, c, 1, 0, HEAD.H2_TILE)
            x2 = tl.where(keep2, x2 * scale, 0.0)
            dt2 = tl.where(keep2, dt2 * scale, 0.0)
        my_sums_ptr = sums_ptr + pid * (H1 + 2 * H2)
        tl.store(my_sums_ptr + H1 + outputs, tl.sum(dt2, 0), mask=outputs < H2)
        tl.store(my_sums_ptr + H1 + H2 + outputs, tl.sum(dy[:, None] * x2, 0), mask=outputs < H2)
        _store(dt2_ptr + row_0 * H2, r, outputs, H2, dt2, inside, H2)
        dt2 = dt2.to(DTYPE)

        for first in range(0, H1, H1_BLOCK):
            units = first + tl.arange(0, H1_BLOCK)
            t1, w_r, w_s, w_e = first_layer(
                z_r, z_s, e, user_ptr + b * D, mlp, units, HEAD, PRECISION
            )
            w2 = second_layer_weights(mlp, units, HEAD).to(DTYPE)
            dt1 = product(dt2, w2, PRECISION)  # [P, BLOCK]
            dt1 = tl.where(t1 > 0, dt1, 0.0)
            x1 = relu(t1)
            if HEAD.DROPOUT:
                keep = hidden_keep(dropout, row, c, 0, first, H1_BLOCK)
                x1 = tl.where(keep, x1 * scale, 0.0)
                dt1 = tl.where(keep, dt1 * scale, 0.0)
            _store(hidden_ptr + row_0 * H1, r, units, H1, x1, inside, H1)
            _store(dt1_ptr + row_0 * H1, r, units, H1, dt1, inside, H1)
            tl.store(my_sums_ptr + units, tl.sum(dt1, 0), mask=units < H1)
            dt1 = dt1.to(DTYPE)
            dz_r = product(dt1, w_r, PRECISION, dz_r)
            dz_s = product(dt1, w_s, PRECISION, dz_s)
            de = product(dt1, w_e, PRECISION, de)
    if HEAD.DOT:  # last: tensor cores truncate what they add to, with every block
        dz = dy[:, None] * e.to(tl.float32)
        dz_r += dz
        dz_s += dz
        de += dy[:, None] * (z_s.to(tl.float32) + z_r.to(tl.float32))

    dz_r, dz_s = dz_r.to(DTYPE), dz_s.to(DTYPE)
    _store(dinputs_ptr, r, axis, 3 * D, dz_r, inside, D)
    _store(dinputs_ptr + D, r, axis, 3 * D, dz_s, inside, D)
    _store(dinputs_ptr + 2 * D, r, axis, 3 * D, de, inside, D)
    # From the rounded dz, which is what the next kernels multiply with the states.
    mean = tl.sum(dz_s.to(tl.float32) * z_s.to(tl.float32), 1)
    tl.store(softmax_ptr + 2 * n_rows + r, mean, mask=inside)
    mean = tl.sum(dz_r.to(tl.float32) * z_r.to(tl.float32), 1)
    tl.store(rec_softmax_ptr + 2 * n_rows + r, mean, mask=inside)


@triton.jit
def _softmax_rows(softmax_ptr, r, n_rows, inside):
    """Load what :func:`head_bwd_kernel` kept of a softmax: maximum, inverse sum, dz . z; [P]."""
    top = tl.load(softmax_ptr + r, mask=inside, other=0.0)
    inverse = tl.load(softmax_ptr + n_rows + r, mask=inside, other=0.0)
    mean = tl.load(softmax_ptr + 2 * n_rows + r, mask=inside, other=0.0)
    return top, inverse, mean


@triton.jit
def _dkeys(
    e,  # [P, D]
    states_ptr,
    length,
    size,
    weight_ptr,
    # At the tile's first row, of the first trajectory where there are several.
    keys_ptr,
    dkeys_ptr,
    dz_ptr,
    softmax_ptr,
    inside,  # [P]
    n_trajectories,
    n_candidates,
    n_rows,
    D: tl.constexpr,
    EVENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store k and dk of one stream, dk summed over the trajectories; return W^T dk, [P, D]."""
    DTYPE: tl.constexpr = e.dtype
    axis = tl.arange(0, D)
    i = tl.arange(0, e.shape[0])
    weight = tl.load(weight_ptr + axis[:, None] * D + axis[None, :]).to(DTYPE)
    keys = product(e, tl.trans(weight), PRECISION).to(DTYPE)
    _store(keys_ptr, i, axis, 3 * D, keys, inside, D)
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
    _store(dkeys_ptr, i, axis, 2 * D, dkeys, inside, D)
    return product(dkeys, weight, PRECISION)


@kernel(do_not_specialize=["first_user"])
def candidate_bwd_kernel(
    search,  # Stream
    rec,  # Stream
    items_ptr,  # [T, D]
    ids_ptr,  # [B or 1, C]
    target_weight_ptr,  # [2, D, D]
    dinputs_ptr,  # [R, 3D]
    softmax_ptr,  # [2, 3, R]
    candidates_ptr,  # [users of the chunk x C, 3D] k_s, k_r, e
    dkeys_ptr,  # [users of the chunk x C, 2D]
    ditems_ptr,  # [B, C, D]
    ids_stride,
    n_trajectories,
    n_candidates,
    n_rows,
    first_user,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    CANDIDATES: tl.constexpr,
    EVENTS: tl.constexpr,
):
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
    DTYPE: tl.constexpr = search.states.dtype.element_ty

    ids = tl.load(ids_ptr + b * ids_stride + c, mask=inside, other=0)
    e = load_vectors(items_ptr, ids, inside, 0, D, D, DTYPE)  # [P, D]
    _store(candidates_ptr + 2 * D, i, axis, 3 * D, e, inside, D)
    de = _dkeys(
        e, search.states + b * n_trajectories * search.size * D,
        load_length(search, b), search.size, target_weight_ptr,
        candidates_ptr, dkeys_ptr, dinputs_ptr + D, softmax_ptr, inside,
        n_trajectories, n_candidates, n_rows, D, EVENTS, PRECISION,
    )  # fmt: skip
    de += _dkeys(
        e, rec.states + b * n_trajectories * rec.size * D,
        load_length(rec, b), rec.size, target_weight_ptr + D * D,
        candidates_ptr + D, dkeys_ptr + D, dinputs_ptr, softmax_ptr + 3 * n_rows, inside,
        n_trajectories, n_candidates, n_rows, D, EVENTS, PRECISION,
    )  # fmt: skip
    for n in range(0, n_trajectories):
        de_ptr = dinputs_ptr + tl.cast(n, tl.int64) * n_candidates * (3 * D) + 2 * D
        de_ptrs = de_ptr + (i[:, None] * (3 * D) + axis[None, :])
        de += tl.load(de_ptrs, mask=inside[:, None], other=0.0).to(tl.float32)
    _store(ditems_ptr + (b * n_candidates + first) * D, i, axis, D, de, inside, D)


@kernel(do_not_specialize=["first_user"])
def state_bwd_kernel(
    stream,  # Stream
    keys_ptr,  # [users of the chunk x C, 3D], at the stream's k
    dz_ptr,  # [R, 3D], at the stream's dz
    softmax_ptr,  # [3, R]
    dstates_ptr,  # [B, N, L, D]
    n_trajectories,
    n_candidates,
    n_rows,
    first_user,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    CANDIDATES: tl.constexpr,
    EVENTS: tl.constexpr,
):
    n_blocks = tl.cdiv(stream.size, EVENTS)
    pid = tl.program_id(0).to(tl.int64)
    block, bn_local = pid % n_blocks, pid // n_blocks
    b_local = bn_local // n_trajectories
    bn = first_user * n_trajectories + bn_local
    length = load_length(stream, first_user + b_local)
    first_event = block.to(tl.int32) * EVENTS
    events = first_event + tl.arange(0, EVENTS)
    valid = events < length
    axis = tl.arange(0, D)
    i = tl.arange(0, CANDIDATES)
    tile_offsets = i[:, None] * (3 * D) + axis[None, :]

    h = load_events(stream.states + bn * stream.size * D, events, length, D)  # [EVENTS, D]
    dh = tl.zeros([EVENTS, D], tl.float32)
    for first in range(0, tl.where(first_event < length, n_candidates, 0), CANDIDATES):
        inside = first + i < n_candidates
        keys_tile_ptr = keys_ptr + (b_local * n_candidates + first) * (3 * D)
        row_0 = bn_local * n_candidates + first
        keys = tl.load(keys_tile_ptr + tile_offsets, mask=inside[:, None], other=0.0)  # [P, D]
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
    dstates_ptr += bn * stream.size * D
    _store(dstates_ptr, events, axis, D, dh, events < stream.size, D)


@kernel(do_not_specialize=["first_user"])
def user_bwd_kernel(
    w1_ptr,  # [H1, 4D]
    sums_ptr,  # [programs of the head, H1 + 2 H2]
    dt1_ptr,  # float32 [B, H1] sum of dt1 over a user's rows
    duser_ptr,  # [B, D]
    n_sums,
    first_user,
    D: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    H1_BLOCK: tl.constexpr,
):
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
    dropout_seed: Tensor,
    dot: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Differentiate :func:`score_fwd`, for dscores [B, N, C].

    Returns dsearch, drec, the gradient of each candidate's vector [B, C, D] (summed over the
    trajectories), duser (0 for the dot product), dtarget_weight, and lists like the MLP's, each in
    its tensor's dtype.
    """
    n_users, n_trajectories, n_search, dim = search.shape
    n_rec, n_candidates, dtype = rec.shape[2], ids.shape[1], search.dtype
    streams = (
        Stream(search.contiguous(), search_lengths.contiguous(), n_search),
        Stream(rec.contiguous(), rec_lengths.contiguous(), n_rec),
    )
    items, ids, user, target_weight, dscores, rows = (
        t.contiguous() for t in (items, ids, user, target_weight, dscores, dropout_rows)
    )
    mlp = mlp_of(mlp_weights, mlp_biases, absent=target_weight)
    call = constants(dim, dtype, user, mlp_weights, dropout_threshold, dot)
    head = call["HEAD"]
    h1, h2 = head.H1, head.H2
    sizes = (dim, n_candidates, max(n_search, n_rec), dtype, call["PRECISION"])
    gpu = gpu_of(search.device)
    of_head = call | config("head_bwd", *sizes, gpu)
    of_attention = call | config("attention_bwd", *sizes, gpu)
    n_tiles = triton.cdiv(n_candidates, of_attention["CANDIDATES"])
    n_sums = n_trajectories * triton.cdiv(n_candidates, of_head["CANDIDATES"])  # a user

    dsearch, drec = torch.empty_like(streams[0].states), torch.empty_like(streams[1].states)
    ditems = items.new_empty(n_users, n_candidates, dim)
    duser = torch.empty_like(user) if head.HAS_USER else torch.zeros_like(user)
    if dscores.numel() == 0:
        for t in (dsearch, drec, ditems, duser):
            t.zero_()
        no_weights, no_biases = (
            [torch.zeros_like(t) for t in tensors] for tensors in (mlp_weights, mlp_biases)
        )
        dtarget_weight = torch.zeros_like(target_weight)
        return dsearch, drec, ditems, duser, dtarget_weight, no_weights, no_biases
    dt1_sums = user.new_empty(n_users if head.HAS_USER else 0, h1, dtype=torch.float32)
    totals: list[Tensor] = []  # gradients of the weights; see below

    rows_bytes = (6 * dim + 2 * h1 + h2) * search.element_size() + 6 * 4
    user_bytes = (
        n_trajectories * n_candidates * rows_bytes
        + n_candidates * 5 * dim * search.element_size()
        + n_sums * (h1 + 2 * h2) * 4
    )
    n_chunk = max(1, SCRATCH_BYTES // max(user_bytes, 1))
    for first in range(0, n_users, n_chunk):
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
        numbers = (n_trajectories, n_candidates, n_rows, first)
        with on_device(search):
            launch(
                head_bwd_kernel, (users * n_sums,),
                *streams, items, ids, user, target_weight, mlp, rows, dscores,
                inputs, dinputs, hidden, dt1, dt2, softmax, sums, ids_stride, *numbers,
                *dropout_arguments(dropout_threshold, dropout_seed), **of_head,
            )  # fmt: skip
            launch(
                candidate_bwd_kernel, (users * n_tiles,),
                *streams, items, ids, target_weight, dinputs, softmax, candidates, dkeys, ditems,
                ids_stride, *numbers, **of_attention,
            )  # fmt: skip
            for x, (stream, dstates) in enumerate(zip(streams, (dsearch, drec), strict=True)):
                n_blocks = triton.cdiv(stream.size, of_attention["EVENTS"])
                launch(
                    state_bwd_kernel, (users * n_trajectories * n_blocks,),
                    stream, candidates[:, x * dim :], dinputs[:, (1 - x) * dim :], softmax[x],
                    dstates, *numbers, **of_attention,
                )  # fmt: skip
            made = [product_of_rows(dkeys, candidates[:, 2 * dim :])]
            if h1:
                of_rows = (part.sum(0) for part in sums.split((h1, h2, h2), 1))
                made += [product_of_rows(dt1, inputs), product_of_rows(dt2, hidden), *of_rows]
            if totals:
                torch._foreach_add_(totals, made)
            else:
                totals = made
            if head.HAS_USER:
                launch(
                    user_bwd_kernel, (users,),
                    mlp.w1, sums, dt1_sums, duser, n_sums, first,
                    D=dim, H1=h1, H2=h2, **USER_CONFIG,
                )  # fmt: skip
    dtarget_weight, *of_mlp = totals
    dmlp_weights: list[Tensor] = []
    dmlp_biases: list[Tensor] = []
    if of_mlp:
        dw1, dw2, db1, db2, dw3 = of_mlp
        if head.HAS_USER:
            of_user = product_of_rows(dt1_sums.to(dtype), user.to(dtype))
            dw1 = torch.cat((dw1, of_user), 1)
        dmlp_weights = [dw1, dw2, dw3.unsqueeze(0)]
        dmlp_biases = [db1, db2, dscores.sum(dtype=torch.float32).view(1)]
    return (
        dsearch,
        drec,
        ditems,
        duser,
        dtarget_weight.view_as(target_weight).to(target_weight.dtype),
        [d.to(w.dtype) for d, w in zip(dmlp_weights, mlp_weights, strict=True)],
        [d.to(b.dtype) for d, b in zip(dmlp_biases, mlp_biases, strict=True)],
    )
