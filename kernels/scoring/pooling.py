"""What candidates take of the histories, as rows of the head's MLP."""

import triton
import triton.language as tl

from lcr_fast.kernels.core.product import store_operand
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.scoring.tile import SIZES, attend, load_length, load_vectors, target_keys


@triton.jit
def _store_softmax(softmax_ptr, r, top, inverse, inside, n_rows):
    tl.store(softmax_ptr + r, top, mask=inside)
    tl.store(softmax_ptr + n_rows + r, inverse, mask=inside)


@kernel(do_not_specialize=[*SIZES, "ids_stride", "n_rows", "n_run", "first_user"])
def pool_kernel(
    search,  # Stream
    rec,  # Stream
    search_size,
    rec_size,
    items_ptr,  # [T, D]
    ids_ptr,  # [B or 1, C]
    target_weight_ptr,  # [parts, 2, D, D]
    # Rows R = users of the chunk x N x C.
    inputs_ptr,  # [parts, R, 3D] z_r, z_s, e
    # If FOR_BACKWARD:
    softmax_ptr,  # float32 [2, 3, R] of each stream: maximum and inverse sum; the third is later's
    candidates_ptr,  # [users of the chunk x C, 3D] k_s, k_r, e
    ids_stride,
    n_trajectories,
    n_candidates,
    n_rows,
    first_user,
    n_run,  # trajectories of a program
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    CANDIDATES: tl.constexpr,
    EVENTS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    FOR_BACKWARD: tl.constexpr,
):
    """One program: a tile of candidates of one user, for a run of trajectories."""
    n_tiles = tl.cdiv(n_candidates, CANDIDATES)
    n_runs = tl.cdiv(n_trajectories, n_run)
    pid = tl.program_id(0).to(tl.int64)
    tile, run, b_local = pid % n_tiles, pid // n_tiles % n_runs, pid // n_tiles // n_runs
    b = first_user + b_local
    c = tile.to(tl.int32) * CANDIDATES + tl.arange(0, CANDIDATES)
    inside = c < n_candidates
    r = tl.arange(0, CANDIDATES)
    # Offsets of a tile are 32-bit, on a scalar base: 64-bit ones take twice the registers.
    offsets = r[:, None] * (3 * D) + tl.arange(0, D)[None, :]
    mask = inside[:, None]
    part = n_rows.to(tl.int64) * (3 * D)
    DTYPE: tl.constexpr = search.states.dtype.element_ty

    search_length = load_length(search, b, search_size)
    rec_length = load_length(rec, b, rec_size)
    ids = tl.load(ids_ptr + b * ids_stride + c, mask=inside, other=0)
    keys_s = target_keys(
        items_ptr, ids, inside, target_weight_ptr, 0, D, KEY_BLOCK, DTYPE, PRECISION
    )
    keys_r = target_keys(
        items_ptr, ids, inside, target_weight_ptr, 1, D, KEY_BLOCK, DTYPE, PRECISION
    )
    if FOR_BACKWARD and run == 0:
        ptrs = candidates_ptr + (b_local * n_candidates + tile * CANDIDATES) * (3 * D) + offsets
        tl.store(ptrs, keys_s, mask=mask)
        tl.store(ptrs + D, keys_r, mask=mask)
        e = load_vectors(items_ptr, ids, inside, 0, D, D, DTYPE)  # [P, D]
        tl.store(ptrs + 2 * D, e, mask=mask)
    for n in range(run * n_run, tl.minimum((run + 1) * n_run, n_trajectories)):
        bn = b * n_trajectories + n
        row_0 = (b_local * n_trajectories + n) * n_candidates + tile * CANDIDATES
        row_ptr = inputs_ptr + row_0 * (3 * D)
        z, top, inverse = attend(
            keys_s, search.states + bn * search_size * D, search_length, D, EVENTS, PRECISION
        )
        store_operand(row_ptr + D, offsets, z, mask, part, PRECISION)
        if FOR_BACKWARD:
            _store_softmax(softmax_ptr + row_0, r, top, inverse, inside, n_rows)
        z, top, inverse = attend(
            keys_r, rec.states + bn * rec_size * D, rec_length, D, EVENTS, PRECISION
        )
        store_operand(row_ptr, offsets, z, mask, part, PRECISION)
        if FOR_BACKWARD:
            rec_softmax_ptr = softmax_ptr + 3 * n_rows.to(tl.int64) + row_0
            _store_softmax(rec_softmax_ptr, r, top, inverse, inside, n_rows)
        e = load_vectors(items_ptr, ids, inside, 0, D, D, DTYPE)  # [P, D]
        store_operand(row_ptr + 2 * D, offsets, e, mask, part, PRECISION)
