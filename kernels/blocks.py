"""Device functions that the kernels share: rows of a tile, noise, dropout, LayerNorm, attention.

A program holds whole sequences. A stream's tile has M rows of width D, cut into slots of SLOT rows;
a slot holds one sequence (one user, one trajectory), its events first. SLOT is a power of two of at
least 16, so that every sum over rows meets a sequence's numbers in the same grouping whatever slot
it stands in: a result does not depend on the batch around it.

States come in the dtype of the tensors and are operands of the dots; everything between two
rounded states (dot accumulators, softmax, LayerNorm, sums) is float32.
"""

import triton
import triton.language as tl

LN_EPS = tl.constexpr(1e-5)  # of every LayerNorm, as in the reference
LOG2_E = tl.constexpr(1.4426950408889634)
TWO_PI = tl.constexpr(6.283185307179586)
# Lower bound of a row's largest score: finite, so that a row without keys gets exp2(-inf) = 0.
LOWEST_SCORE = tl.constexpr(-1e30)
DROPOUT_COUNTER = tl.constexpr(1 << 31)  # in the third counter word; noise stays below

# -- rows -----------------------------------------------------------------------------------------


@triton.jit
def locate_rows(
    tile, lengths_ptr, n_sequences, n_trajectories, size, M: tl.constexpr, SLOT: tl.constexpr
):
    """Say what stands in each row of a tile: (sequence, position, length, stored), [M] each.

    Sequence b N + n (int64) is trajectory n of user b; a row is stored if tensors
    [sequences, size, D] have it. The length of a sequence beyond the last one is 0.
    """
    row = tl.arange(0, M)
    position = row % SLOT
    sequence = tile * (M // SLOT) + row // SLOT
    exists = sequence < n_sequences
    length = tl.load(lengths_ptr + sequence // n_trajectories, mask=exists, other=0)
    length = tl.minimum(length, size).to(tl.int32)
    return sequence, position, length, exists & (position < size)


@triton.jit
def row_slots(M: tl.constexpr, SLOT: tl.constexpr):
    """Slot of each row, [M]."""
    return tl.arange(0, M) // SLOT


@triton.jit
def key_slots(position, length, SLOT: tl.constexpr):
    """Slot of each row as a key, [M]; -1 where there is no event, so that no query matches."""
    return tl.where(position < length, row_slots(position.shape[0], SLOT), -1)


@triton.jit
def tile_offsets(sequence, position, size, D: tl.constexpr):
    """Offsets of a tile in a contiguous tensor [sequences, size, D], int64 [M, D]."""
    return (sequence * size + position)[:, None] * D + tl.arange(0, D)[None, :]


# -- noise and dropout: the definition is in lcr_fast/noise.py ------------------------------------


@triton.jit
def _philox(user_row, position, word2, seed, CALLS: tl.constexpr):
    """Philox words for CALLS counters of each row: four uint32 tiles [M, CALLS]."""
    call = tl.arange(0, CALLS).to(tl.uint32)[None, :]
    c1 = position.to(tl.uint32)[:, None]
    c2 = word2.to(tl.uint32)[:, None]
    c3 = user_row.to(tl.uint32)[:, None]  # mod 2^32
    call, c1 = tl.broadcast(call, c1)
    call, c2 = tl.broadcast(call, c2)
    call, c3 = tl.broadcast(call, c3)
    return tl.philox(seed, call, c1, c2, c3)


@triton.jit
def _interleave4(x0, x1, x2, x3):
    """Put four tiles [M, n] together column by column: x0[:, 0], x1[:, 0], ... -> [M, 4 n]."""
    M: tl.constexpr = x0.shape[0]
    n: tl.constexpr = x0.shape[1]
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(M, 4 * n)


@triton.jit
def _uniform(word):
    """The top 23 bits, centred in their cell: in (0, 1) and exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * (2.0**-23)


@triton.jit
def normal_noise(user_row, position, trajectory_stream, seed, D: tl.constexpr):
    """Draw eps ~ N(0, I) by Box-Muller, four coordinates a Philox call: [M, D].

    ``user_row`` int64, ``position`` and ``trajectory_stream`` (2 n + stream) are [M].
    """
    w0, w1, w2, w3 = _philox(user_row, position, trajectory_stream, seed, D // 4)
    radius0 = tl.sqrt(-2.0 * tl.log(_uniform(w0)))  # [M, D/4]
    radius1 = tl.sqrt(-2.0 * tl.log(_uniform(w2)))
    angle0 = TWO_PI * _uniform(w1)
    angle1 = TWO_PI * _uniform(w3)
    return _interleave4(
        radius0 * tl.cos(angle0),
        radius0 * tl.sin(angle0),
        radius1 * tl.cos(angle1),
        radius1 * tl.sin(angle1),
    )


@triton.jit
def dropout_keep(user_row, position, site, threshold, seed, D: tl.constexpr):
    """Say which coordinates dropout layer ``site`` keeps, eight a Philox call: bool [M, D]."""
    M: tl.constexpr = position.shape[0]
    word2 = (tl.zeros([M], tl.int32) + site).to(tl.uint32) + DROPOUT_COUNTER
    w0, w1, w2, w3 = _philox(user_row, position, word2, seed, D // 8)
    words = _interleave4(w0, w1, w2, w3)  # [M, D/2]
    halves = tl.join(words & 0xFFFF, words >> 16).reshape(M, D)  # low half first
    return halves >= threshold.to(tl.uint32)


# -- LayerNorm ------------------------------------------------------------------------------------


@triton.jit
def standardise(x, D: tl.constexpr):
    """x_hat = (x - mean) rstd of each row, and rstd: float32 [M, D], [M]."""
    mean = tl.sum(x, 1) / D
    centred = x - mean[:, None]
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + LN_EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def layer_norm(x, weight_ptr, bias_ptr, D: tl.constexpr):
    """LN(x) = x_hat w + b, float32 [M, D]."""
    column = tl.arange(0, D)
    weight = tl.load(weight_ptr + column).to(tl.float32)
    bias = tl.load(bias_ptr + column).to(tl.float32)
    x_hat, _ = standardise(x, D)
    return x_hat * weight[None, :] + bias[None, :]


# -- dots with weights ----------------------------------------------------------------------------


@triton.jit
def load_block(weight_ptr, rows, columns, STRIDE: tl.constexpr, dtype: tl.constexpr):
    """W[rows, columns] of a row-major matrix of STRIDE columns, in the states' dtype."""
    return tl.load(weight_ptr + rows[:, None] * STRIDE + columns[None, :]).to(dtype)


@triton.jit
def load_block_transposed(weight_ptr, rows, columns, STRIDE: tl.constexpr, dtype: tl.constexpr):
    """W[rows, columns]^T, [columns, rows]."""
    return tl.load(weight_ptr + rows[None, :] * STRIDE + columns[:, None]).to(dtype)


@triton.jit
def linear(x, weight_ptr, bias_ptr, rows, D: tl.constexpr, PRECISION: tl.constexpr):
    """x W[rows]^T + b[rows] for weights [out, D]: float32 [M, rows]."""
    weight = load_block_transposed(weight_ptr, rows, tl.arange(0, D), D, x.dtype)
    bias = tl.load(bias_ptr + rows).to(tl.float32)
    return tl.dot(x, weight, input_precision=PRECISION) + bias[None, :]


# -- sublayers ------------------------------------------------------------------------------------


@triton.jit
def head_probabilities(q, k, query_slot, key_slot, PRECISION: tl.constexpr):
    """softmax(q k^T) over a query's own keys, for q times log2(e) / sqrt(D/H): [M_q, M_k].

    A query without keys gets zeros.
    """
    scores = tl.dot(q, k.trans(), input_precision=PRECISION)
    scores = tl.where(query_slot[:, None] == key_slot[None, :], scores, float("-inf"))
    top = tl.maximum(tl.max(scores, 1), LOWEST_SCORE)
    p = tl.exp2(scores - top[:, None])
    return p / tl.maximum(tl.sum(p, 1), 1.0)[:, None]  # a sum over keys is at least 1


@triton.jit
def attention(
    x,  # [M_q, D]
    memory,  # [M_k, D]
    query_slot,  # [M_q]
    key_slot,  # [M_k]
    weights,  # pointers to one stream's qkv weight and bias, out weight and bias
    D: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multi-head attention, head by head: sum_h softmax(Q_h K_h^T / sqrt(D/H)) V_h Wo_h^T + bo.

    The loop is not unrolled and its weights are read in it, so one head's are on chip at a time.
    Returns float32 [M_q, D]; finite, and without meaning, for a query without keys.
    """
    qkv_weight_ptr, qkv_bias_ptr, out_weight_ptr, out_bias_ptr = weights
    WIDTH: tl.constexpr = D // H
    column = tl.arange(0, D)
    y = tl.zeros([x.shape[0], D], tl.float32) + tl.load(out_bias_ptr + column).to(tl.float32)
    for h in range(H):
        head = h * WIDTH + tl.arange(0, WIDTH)
        q = linear(x, qkv_weight_ptr, qkv_bias_ptr, head, D, PRECISION)  # [M_q, D/H]
        q = (q * (LOG2_E * WIDTH**-0.5)).to(x.dtype)
        k = linear(memory, qkv_weight_ptr, qkv_bias_ptr, D + head, D, PRECISION).to(x.dtype)
        p = head_probabilities(q, k, query_slot, key_slot, PRECISION)  # [M_q, M_k]
        v = linear(memory, qkv_weight_ptr, qkv_bias_ptr, 2 * D + head, D, PRECISION).to(x.dtype)
        o = tl.dot(p.to(x.dtype), v, input_precision=PRECISION).to(x.dtype)  # [M_q, D/H]
        out_weight = load_block_transposed(out_weight_ptr, column, head, D, x.dtype)  # [D/H, D]
        y = tl.dot(o, out_weight, y, input_precision=PRECISION)
    return y


@triton.jit
def ffn(
    x,  # [M, D]
    weights,  # pointers to one stream's in weight and bias, out weight and bias
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """relu(x W1^T + b1) W2^T + b2 in blocks of BLOCK_F hidden units: float32 [M, D]."""
    in_weight_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr = weights
    column = tl.arange(0, D)
    y = tl.zeros([x.shape[0], D], tl.float32) + tl.load(out_bias_ptr + column).to(tl.float32)
    for start in range(0, F, BLOCK_F):
        unit = start + tl.arange(0, BLOCK_F)
        hidden = linear(x, in_weight_ptr, in_bias_ptr, unit, D, PRECISION)  # [M, BLOCK_F]
        hidden = tl.maximum(hidden, 0.0).to(x.dtype)
        out_weight = load_block_transposed(out_weight_ptr, column, unit, F, x.dtype)
        y = tl.dot(hidden, out_weight, y, input_precision=PRECISION)
    return y


# -- pooling --------------------------------------------------------------------------------------


@triton.jit
def pool(
    state,  # [M, D]
    keys_ptr,  # [B, 2, D], at the stream
    pooled_ptr,  # [sequences, ..., D], at the place of this step, state and stream
    pooled_stride,  # from one sequence to the next
    rows,
    n_sequences,
    n_trajectories,
    tile,
    D: tl.constexpr,
    SLOT: tl.constexpr,
):
    """Pool each slot's state at its user's key and store it: z = sum_j alpha_j state_j.

    alpha = softmax_j(state_j . key) over the events of the slot; z = 0 without an event.
    """
    M: tl.constexpr = state.shape[0]
    _, position, length, _ = rows
    slot = row_slots(M, SLOT)
    column = tl.arange(0, D)
    state = state.to(tl.float32)
    for u in range(M // SLOT):
        sequence = tile * (M // SLOT) + u
        exists = sequence < n_sequences
        key_offset = (sequence // n_trajectories) * (2 * D) + column
        key = tl.load(keys_ptr + key_offset, mask=exists & (column < D), other=0.0)
        logits = tl.sum(state * key.to(tl.float32)[None, :], 1)  # [M]
        logits = tl.where((slot == u) & (position < length), logits * LOG2_E, float("-inf"))
        alpha = tl.exp2(logits - tl.maximum(tl.max(logits, 0), LOWEST_SCORE))
        alpha = alpha / tl.maximum(tl.sum(alpha, 0), 1.0)
        z = tl.sum(alpha[:, None] * state, 0)  # [D]
        tl.store(
            pooled_ptr + sequence * pooled_stride + column,
            z.to(pooled_ptr.dtype.element_ty),
            mask=exists & (column < D),
        )
