"""The encoders, forward: all layers of one stream in one program.

A program takes a tile of whole users of either stream through the layers, each a reasoning step
without cross-attention (kernels/reasoning/step.py):

    x1 = h + m1 MSA(h)     a = LN1(x1)
    x2 = a + m2 FFN(a)     h <- LN2(x2)

The input is read once, the result written once.
"""

from typing import Any, NamedTuple

import triton.language as tl

from lcr_fast.kernels.core.noise import Dropout
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.reasoning.step import (
    before_last_norm,
    before_norm1,
    choose_stream,
    load_initial,
    norm,
    zero_padding,
)
from lcr_fast.kernels.reasoning.tile import (
    load_of_user,
    locate_rows,
    memory_lengths,
    store_tile,
    tile_at,
)


class EncoderStream(NamedTuple):
    """Tensors of one stream."""

    x: Any  # [B, L, D]
    lengths: Any  # [B]
    out: Any  # [B, L, D] of the last layer, or with SAVE [n_layers, B, L, D] of each


@kernel(
    do_not_specialize=[
        "first_stream", "n_users", "search_size", "rec_size", "n_layers", "dropout_threshold",
    ]
)  # fmt: skip
def encode_fwd_kernel(
    search,  # EncoderStream
    rec,  # EncoderStream
    first_stream,
    user_rows_ptr,  # [B]
    weights,  # LayerWeights
    n_users,
    search_size,
    rec_size,
    n_layers,
    dropout_threshold,
    dropout_scale,
    dropout_seed_ptr,  # int64 []
    SHAPE: tl.constexpr,
    SLOT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    DROPOUT: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Encode; one program a tile and stream."""
    D: tl.constexpr = SHAPE.D
    M: tl.constexpr = SEQUENCES * SLOT
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed_ptr)
    first = tl.program_id(0).to(tl.int64) * SEQUENCES
    stream = first_stream + tl.program_id(1)
    x, size = choose_stream(stream, search, rec, search_size, rec_size)
    rows = locate_rows(first, n_users, x.lengths, 1, size, M, SLOT)
    h = load_initial(x.x, rows, size, 1, None, stream, None, D, False)  # [M, D]
    for i in tl.range(0, n_layers, disable_licm=True):
        # The bound holds anyway: as it names i, addresses of rows do not stay in registers, and
        # weights, whose addresses depend on i, not on chip.
        bound = tl.minimum(size, SLOT + i)
        rows = locate_rows(first, n_users, x.lengths, 1, bound, M, SLOT)
        lengths = memory_lengths(x.lengths, first, n_users, 1, bound, M, SLOT, SEQUENCES)
        user_row = rows.sequence
        if DROPOUT:
            user_row = load_of_user(user_rows_ptr, first, n_users, 1, M, SLOT)
        index = 2 * i + stream
        x1 = before_norm1(
            h, lengths, user_row, rows.position, i, index, stream, weights.attention, dropout,
            SHAPE, SEQUENCES, DROPOUT,
        )  # fmt: skip
        a = norm(x1, weights.norms, index, 0, h.dtype, SHAPE)
        x2 = before_last_norm(
            a, user_row, rows.position, i, index, stream, weights.ffn, dropout, SHAPE, DROPOUT
        )
        h = norm(x2, weights.norms, index, 1, h.dtype, SHAPE)
        if SAVE:
            layer_ptr = x.out + n_users.to(tl.int64) * bound * D * i
            store_tile(tile_at(layer_ptr, rows, bound, D), zero_padding(h, rows), D)
    if not SAVE:
        store_tile(tile_at(x.out, rows, size, D), zero_padding(h, rows), D)
