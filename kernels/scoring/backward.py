"""Gradients of the scores of given candidates: the kernels and their launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.core.product import multiply, operand, product
from lcr_fast.kernels.gpu import on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.scoring.call import ScoreCall, score_call, tiles
from lcr_fast.kernels.scoring.config import USER_CONFIG, n_blocks
from lcr_fast.kernels.scoring.head import (
    Rows,
    hidden_bwd_kernel,
    inputs_bwd_kernel,
    output_bwd_kernel,
    user_bwd_kernel,
)
from lcr_fast.kernels.scoring.tile import (
    SIZES,
    load_events,
    load_length,
    load_target_weight,
)
from lcr_fast.kernels.weight_gradients import CONFIG, product_of_operands, product_of_rows


@triton.jit
def _store(ptr, rows, columns, stride, values, inside, WIDTH: tl.constexpr):
    """Store values [P, n] at rows [P] that are ``inside``, and columns [n] that are below WIDTH."""
    tl.store(
        ptr + rows[:, None] * stride + columns[None, :],
        values.to(ptr.dtype.element_ty),
        mask=inside[:, None] & (columns < WIDTH)[None, :],
    )


@triton.jit
def _softmax_rows(softmax_ptr, r, n_rows, inside):
    """Load what earlier kernels kept of a softmax: maximum, inverse sum, dz . z; [P]."""
    top = tl.load(softmax_ptr + r, mask=inside, other=0.0)
    inverse = tl.load(softmax_ptr + n_rows + r, mask=inside, other=0.0)
    mean = tl.load(softmax_ptr + 2 * n_rows + r, mask=inside, other=0.0)
    return top, inverse, mean


@triton.jit
def _dkeys(
    states_ptr,
    length,
    size,
    # At the tile's first row, of the first trajectory where there are several.
    keys_ptr,  # [P, 3D]
    dkeys_ptr,  # [P, 2D]
    dz_ptr,  # [*, 3D]
    softmax_ptr,
    inside,  # [P]
    n_trajectories,
    n_candidates,
    n_rows,
    D: tl.constexpr,
    EVENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store dk of one stream, summed over the trajectories, and return it: [P, D]."""
    P: tl.constexpr = inside.shape[0]
    axis = tl.arange(0, D)
    i = tl.arange(0, P)
    offsets = i[:, None] * (3 * D) + axis[None, :]
    keys = tl.load(keys_ptr + offsets, mask=inside[:, None], other=0.0)
    dkeys = tl.zeros([P, D], tl.float32)
    for n in range(0, n_trajectories):
        row_0 = tl.cast(n, tl.int64) * n_candidates
        top, inverse, mean = _softmax_rows(softmax_ptr + row_0, i, n_rows, inside)
        dz = tl.load(dz_ptr + row_0 * (3 * D) + offsets, mask=inside[:, None], other=0.0)
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
            dkeys = product(dl.to(keys.dtype), h, PRECISION, dkeys)
    dkeys = dkeys.to(keys.dtype)
    _store(dkeys_ptr, i, axis, 2 * D, dkeys, inside, D)
    return dkeys


@kernel(do_not_specialize=[*SIZES, "n_rows", "first_user"])
def candidate_bwd_kernel(
    search,  # Stream
    rec,  # Stream
    search_size,
    rec_size,
    target_weight_ptr,  # [parts, 2, D, D]
    dinputs_ptr,  # [R, 3D]
    softmax_ptr,  # [2, 3, R]
    candidates_ptr,  # [users of the chunk x C, 3D] k_s, k_r, e
    dkeys_ptr,  # [users of the chunk x C, 2D]
    ditems_ptr,  # [B, C, D]
    n_trajectories,
    n_candidates,
    n_rows,
    first_user,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    CANDIDATES: tl.constexpr,
    EVENTS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    n_tiles = tl.cdiv(n_candidates, CANDIDATES)
    pid = tl.program_id(0).to(tl.int64)
    tile, b_local = pid % n_tiles, pid // n_tiles
    b = first_user + b_local
    inside = tile.to(tl.int32) * CANDIDATES + tl.arange(0, CANDIDATES) < n_candidates
    first = tile * CANDIDATES
    i = tl.arange(0, CANDIDATES)
    row_0 = b_local * n_trajectories * n_candidates + first  # of the first trajectory
    softmax_ptr += row_0
    dinputs_ptr += row_0 * (3 * D)
    candidates_ptr += (b_local * n_candidates + first) * (3 * D)
    dkeys_ptr += (b_local * n_candidates + first) * (2 * D)
    ditems_ptr += (b * n_candidates + first) * D

    dkeys_s = _dkeys(
        search.states + b * n_trajectories * search_size * D,
        load_length(search, b, search_size), search_size,
        candidates_ptr, dkeys_ptr, dinputs_ptr + D, softmax_ptr, inside,
        n_trajectories, n_candidates, n_rows, D, EVENTS, PRECISION,
    )  # fmt: skip
    dkeys_r = _dkeys(
        rec.states + b * n_trajectories * rec_size * D,
        load_length(rec, b, rec_size), rec_size,
        candidates_ptr + D, dkeys_ptr + D, dinputs_ptr, softmax_ptr + 3 * n_rows, inside,
        n_trajectories, n_candidates, n_rows, D, EVENTS, PRECISION,
    )  # fmt: skip
    for first_column in range(0, D, KEY_BLOCK):
        columns = first_column + tl.arange(0, KEY_BLOCK)
        weight = load_target_weight(target_weight_ptr, 0, columns, D, PRECISION)
        de = multiply(operand(dkeys_s, PRECISION), weight, PRECISION)  # [P, KEY_BLOCK]
        weight = load_target_weight(target_weight_ptr, 1, columns, D, PRECISION)
        de = multiply(operand(dkeys_r, PRECISION), weight, PRECISION, de)
        for n in range(0, n_trajectories):
            de_ptr = dinputs_ptr + tl.cast(n, tl.int64) * n_candidates * (3 * D) + 2 * D
            de_ptrs = de_ptr + (i[:, None] * (3 * D) + columns[None, :])
            de += tl.load(de_ptrs, mask=inside[:, None], other=0.0).to(tl.float32)
        _store(ditems_ptr, i, columns, D, de, inside, D)


@kernel(do_not_specialize=[*SIZES, "x", "n_rows", "first_user"])
def state_bwd_kernel(
    stream,  # Stream
    x,  # which
    size,
    keys_ptr,  # [users of the chunk x C, 3D], at the stream's k
    dz_ptr,  # [R, 3D], at the stream's dz
    softmax_ptr,  # [2, 3, R]
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
    softmax_ptr += x.to(tl.int64) * (3 * n_rows)
    n_blocks = tl.cdiv(size, EVENTS)
    pid = tl.program_id(0).to(tl.int64)
    block, bn_local = pid % n_blocks, pid // n_blocks
    b_local = bn_local // n_trajectories
    bn = first_user * n_trajectories + bn_local
    length = load_length(stream, first_user + b_local, size)
    first_event = block.to(tl.int32) * EVENTS
    events = first_event + tl.arange(0, EVENTS)
    valid = events < length
    axis = tl.arange(0, D)
    i = tl.arange(0, CANDIDATES)
    tile_offsets = i[:, None] * (3 * D) + axis[None, :]

    h = load_events(stream.states + bn * size * D, events, length, D)  # [EVENTS, D]
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
    dstates_ptr += bn * size * D
    _store(dstates_ptr, events, axis, D, dh, events < size, D)


def _bytes_of_user(call: ScoreCall) -> int:
    """Count what backward keeps of a user while it lasts."""
    D, head, size = call.items.shape[1], call.head, call.search.states.element_size()
    operands = (3 * D + 2 * head.H1 + head.H2) * (2 * call.parts if call.parts > 1 else size)
    of_row = operands + 3 * D * size + 6 * 4
    if call.parts > 1:  # sums over parts of the rows, of W1's and W2's gradients
        of_row += 4 * head.H1 * (3 * D + head.H2) // CONFIG["PART_ROWS"]
    return call.rows_of_user * of_row + call.ids.shape[1] * 5 * D * size


def _mlp_bwd(
    call: ScoreCall, inputs: Tensor, dscores: Tensor, rows: Rows
) -> tuple[Tensor, list[Tensor]]:
    """Differentiate the MLP for the rows of a chunk.

    Returns the operand dt1 [R, H1], and the sums over the rows that are the gradients of W1 without
    its users' columns, W2, b1, b2 and w3, in float32.
    """
    compiled, head = call.of_head(), call.head
    n_tiles = tiles(rows, compiled)
    hidden = call.hide(inputs, rows)
    dt1, dt2 = call.operand_of_rows(rows, head.H1), call.operand_of_rows(rows, head.H2)
    of_hidden = dscores.new_empty(n_tiles, head.H1, dtype=torch.float32)
    of_outputs = dscores.new_empty(n_tiles, 2, head.H2, dtype=torch.float32)
    launch(
        output_bwd_kernel, (n_tiles,),
        hidden, call.mlp.w2, call.mlp, call.dropout_rows, dscores, dt2, of_outputs, *rows,
        *call.dropout, **compiled,
    )  # fmt: skip
    launch(
        hidden_bwd_kernel, (n_tiles * n_blocks(head.H1, compiled),),
        hidden, call.mlp.w2, dt2, dt1, of_hidden, *rows, call.dropout.scale, **compiled,
    )  # fmt: skip
    db2, dw3 = (part.sum(0) for part in of_outputs.unbind(1))
    dw1, dw2 = product_of_operands(dt1, inputs), product_of_operands(dt2, hidden)
    return dt1, [dw1, dw2, of_hidden.sum(0), db2, dw3]


def _chunk_bwd(
    call: ScoreCall,
    rows: Rows,
    dscores: Tensor,
    dsearch: Tensor,
    drec: Tensor,
    ditems: Tensor,
    duser: Tensor,
    dt1_sums: Tensor,
) -> list[Tensor]:
    """Differentiate for the users of a chunk, into their places in the last five tensors.

    Returns the weights' gradients as :func:`_mlp_bwd` does, if there is an MLP, and that of the
    target's.
    """
    n_trajectories, dim = call.search.states.shape[1], call.search.states.shape[-1]
    users, n_rows, n_candidates = rows.n_rows // rows.of_user, rows.n_rows, rows.n_candidates
    of_head, of_attention = call.of_head(), call.configured("attention")
    of_states = call.configured("state_bwd")
    softmax = dscores.new_empty(2, 3, n_rows, dtype=torch.float32)
    dinputs = call.search.states.new_empty(n_rows, 3 * dim)
    candidates = dinputs.new_empty(users * n_candidates, 3 * dim)  # k_s, k_r, e
    dkeys = dinputs.new_empty(users * n_candidates, 2 * dim)
    numbers = (n_trajectories, n_candidates, n_rows, rows.first_user)
    inputs = call.pool(rows, softmax, candidates)
    dt1, made = _mlp_bwd(call, inputs, dscores, rows) if call.head.H1 else (inputs, [])
    launch(
        inputs_bwd_kernel, (3 * tiles(rows, of_head),),
        inputs, dt1, call.mlp.w1, dscores, dinputs, softmax, *rows, **of_head,
    )  # fmt: skip
    n_tiles = triton.cdiv(n_candidates, of_attention["CANDIDATES"])
    launch(
        candidate_bwd_kernel, (users * n_tiles,),
        call.search, call.rec, *call.sizes, call.target_weight, dinputs, softmax, candidates, dkeys,
        ditems, *numbers, **of_attention,
    )  # fmt: skip
    for x, (stream, dstates) in enumerate(((call.search, dsearch), (call.rec, drec))):
        n_event_blocks = triton.cdiv(call.sizes[x], of_states["EVENTS"])
        launch(
            state_bwd_kernel, (users * n_trajectories * n_event_blocks,),
            stream, x, call.sizes[x], candidates[:, x * dim :], dinputs[:, (1 - x) * dim :],
            softmax, dstates, *numbers, **of_states,
        )  # fmt: skip
    if call.head.HAS_USER:
        launch(
            user_bwd_kernel, (users,), dt1, call.mlp.w1, dt1_sums, duser, n_rows, rows.of_user,
            rows.first_user, **USER_CONFIG, **call.compiled,
        )  # fmt: skip
    return [*made, product_of_rows(dkeys, candidates[:, 2 * dim :])]


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
    n_users, n_candidates, dim = len(search), ids.shape[1], search.shape[-1]
    dscores = dscores.contiguous()
    call = score_call(
        search, rec, search_lengths, rec_lengths, items, ids, user, target_weight, mlp_weights,
        mlp_biases, dropout_rows, dropout_threshold, dropout_seed, dot,
    )  # fmt: skip
    head = call.head
    dsearch, drec = torch.empty_like(call.search.states), torch.empty_like(call.rec.states)
    ditems = items.new_empty(n_users, n_candidates, dim)
    duser = torch.empty_like(call.user) if head.HAS_USER else torch.zeros_like(user)
    if dscores.numel() == 0:
        for t in (dsearch, drec, ditems, duser):
            t.zero_()
        no_weights, no_biases = (
            [torch.zeros_like(t) for t in tensors] for tensors in (mlp_weights, mlp_biases)
        )
        dtarget_weight = torch.zeros_like(target_weight)
        return dsearch, drec, ditems, duser, dtarget_weight, no_weights, no_biases

    dt1_sums = dscores.new_empty(n_users if head.HAS_USER else 0, head.H1, dtype=torch.float32)
    totals: list[Tensor] = []  # gradients of the weights, summed over the chunks
    with on_device(search):
        for rows in call.chunks(_bytes_of_user(call)):
            made = _chunk_bwd(call, rows, dscores, dsearch, drec, ditems, duser, dt1_sums)
            if totals:
                torch._foreach_add_(totals, made)
            else:
                totals = made
    *of_mlp, dtarget_weight = totals
    dmlp_weights: list[Tensor] = []
    dmlp_biases: list[Tensor] = []
    if of_mlp:
        dw1, dw2, db1, db2, dw3 = of_mlp
        if head.HAS_USER:
            of_users = product_of_rows(dt1_sums, call.user.float())
            dw1 = torch.cat((dw1, of_users), 1)
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
