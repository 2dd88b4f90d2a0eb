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

from lcr_fast.kernels.products import product

LN_EPS = tl.constexpr(1e-5)  # of every LayerNorm, as in the reference
LOG2_E = tl.constexpr(1.4426950408889634)
TWO_PI = tl.constexpr(6.283185307179586)
# Lower bound of a row's largest score: finite, so that a row without keys gets exp2(-inf) = 0.
LOWEST_SCORE = tl.constexpr(-1e30)
DROPOUT_COUNTER = tl.constexpr(1 << 31)  # in the third counter word; noise stays below

# -- rows -----------------------------------------------------------------------------------------


@triton.jit
def load_of_user(ptr, first, end, n_trajectories, M: tl.constexpr, SLOT: tl.constexpr):
    """Element of each row's user in a tensor [B], 0 beyond the last sequence: [M]."""
    if M == SLOT:  # one sequence: a number for all rows, not a register for each
        value = tl.load(ptr + first // n_trajectories, mask=first < end, other=0)
        values = tl.zeros([M], value.dtype) + value
    else:
        sequence = first + tl.arange(0, M) // SLOT
        values = tl.load(ptr + sequence // n_trajectories, mask=sequence < end, other=0)
    return values


@triton.jit
def locate_rows(first, end, lengths_ptr, n_trajectories, size, M: tl.constexpr, SLOT: tl.constexpr):
    """Say what stands in each row of a tile: (sequence, position, length, stored), [M] each.

    Two more say where the rows are in tensors [sequences, size, ...]: the first sequence, int64,
    and each row's place after its start, int32 [M].

    Sequence b N + n (int64) is trajectory n of user b; the slots hold ``first``, ``first`` + 1 and
    so on up to ``end``, where the length is 0. A row is stored if tensors [sequences, size, D] have
    it.
    """
    row = tl.arange(0, M)
    position = row % SLOT
    sequence = first + row // SLOT
    length = load_of_user(lengths_ptr, first, end, n_trajectories, M, SLOT)
    length = tl.minimum(length, size).to(tl.int32)
    stored = (sequence < end) & (position < size)
    return sequence, position, length, stored, first, row // SLOT * size + position


@triton.jit
def row_slots(M: tl.constexpr, SLOT: tl.constexpr):
    """Slot of each row, [M]."""
    return tl.arange(0, M) // SLOT


@triton.jit
def key_slots(length, SLOT: tl.constexpr):
    """Slot of each row as a key, [M]; -1 where there is no event, so that no query matches."""
    row = tl.arange(0, length.shape[0])
    return tl.where(row % SLOT < length, row // SLOT, -1)


@triton.jit
def tile_at(ptr, rows, size, WIDTH: tl.constexpr):
    """Say where a tile's rows are in a contiguous tensor [sequences, size, WIDTH].

    That is the place of its first row, the others' offsets from there, int32 [M, 1], and which of
    them exist, bool [M, 1]. Only the first needs 64 bits, and that is one number.
    """
    return ptr + rows[4] * size * WIDTH, (rows[5] * WIDTH)[:, None], rows[3][:, None]


@triton.jit
def load_tile(at, D: tl.constexpr):
    """D columns of a tile's rows, 0 in rows that do not exist: [M, D]."""
    start, offset, exists = at
    return tl.load(start + offset + tl.arange(0, D)[None, :], mask=exists, other=0.0)


@triton.jit
def store_tile(at, x, D: tl.constexpr):
    """Store x [M, D] in D columns of a tile's rows, in the tensor's dtype."""
    start, offset, exists = at
    x = x.to(start.dtype.element_ty)
    tl.store(start + offset + tl.arange(0, D)[None, :], x, mask=exists)


@triton.jit
def columns(at, first):
    """Move to another column of the same rows."""
    start, offset, exists = at
    return start + first, offset, exists


@triton.jit
def set_aside(at, x, D: tl.constexpr, ASIDE: tl.constexpr):
    """If ASIDE, store a tile where :func:`take_up` will look for it."""
    if ASIDE:
        tl.debug_barrier()  # other threads may still read what stands there
        store_tile(at, x, D)


@triton.jit
def take_up(x, at, D: tl.constexpr, RELOAD: tl.constexpr):
    """x, or if RELOAD its copy in memory, so that x need not wait in registers until here."""
    if RELOAD:
        # Without the barrier this load would be merged with an earlier one, and kept till here.
        tl.debug_barrier()
        x = load_tile(at, D)
    return x


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
    """Take the top 23 bits, centred in their cell: in (0, 1) and exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * (2.0**-23)


@triton.jit
def _box_muller(word0, word1):
    """Two normals from two words. The angle is reduced exactly, so that no slow path is compiled.

    With quarter = round(4 u) the rest of the angle is within pi / 4, where the polynomials are
    those of Cephes' sinf and cosf.
    """
    radius = tl.sqrt(-2.0 * tl.log(_uniform(word0)))
    u = _uniform(word1)
    quarter = (4.0 * u + 0.5).to(tl.int32)
    angle = TWO_PI * (u - 0.25 * quarter.to(tl.float32))
    z = angle * angle
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * angle + angle
    cosine = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    cosine = cosine * z * z - 0.5 * z + 1.0
    odd = (quarter & 1) != 0
    cos_negative = ((quarter + 1) & 2) != 0
    sin_negative = (quarter & 2) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    return radius * tl.where(cos_negative, -x, x), radius * tl.where(sin_negative, -y, y)


@triton.jit
def normal_noise(user_row, position, trajectory_stream, seed, D: tl.constexpr):
    """Draw eps ~ N(0, I) by Box-Muller, four coordinates a Philox call: [M, D].

    ``user_row`` int64, ``position`` and ``trajectory_stream`` (2 n + stream) are [M].
    """
    w0, w1, w2, w3 = _philox(user_row, position, trajectory_stream, seed, D // 4)
    x0, x1 = _box_muller(w0, w1)  # [M, D/4] each
    x2, x3 = _box_muller(w2, w3)
    return _interleave4(x0, x1, x2, x3)


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


@triton.jit
def layer_norm_bwd(dy, x, weight_ptr, dnorm_ptr, D: tl.constexpr):
    """Backward of :func:`layer_norm`: dx, float32 [M, D].

    Stores the tile's own dw and db at dnorm_ptr [2, D].

        dx = rstd (g - mean(g) - x_hat mean(g x_hat)),  g = dy w;   dw = sum dy x_hat,  db = sum dy

    Rows with dy = 0 add nothing and get 0.
    """
    column = tl.arange(0, D)
    weight = tl.load(weight_ptr + column).to(tl.float32)
    x_hat, rstd = standardise(x, D)
    tl.store(dnorm_ptr + column, tl.sum(dy * x_hat, 0))
    tl.store(dnorm_ptr + D + column, tl.sum(dy, 0))
    g = dy * weight[None, :]
    mean_g = tl.sum(g, 1) / D
    mean_gx = tl.sum(g * x_hat, 1) / D
    return rstd[:, None] * (g - mean_g[:, None] - x_hat * mean_gx[:, None])


# -- weights and products -------------------------------------------------------------------------


@triton.jit
def load_block(weight_ptr, rows, columns, STRIDE: tl.constexpr, dtype: tl.constexpr):
    """W[rows, columns] of a row-major matrix of STRIDE columns, in the states' dtype."""
    return tl.load(weight_ptr + rows[:, None] * STRIDE + columns[None, :]).to(dtype)


@triton.jit
def load_block_transposed(weight_ptr, rows, columns, STRIDE: tl.constexpr, dtype: tl.constexpr):
    """W[rows, columns]^T, [columns, rows]."""
    return load_block(weight_ptr, rows, columns, STRIDE, dtype).trans()


@triton.jit
def linear(x, weight_ptr, bias_ptr, rows, D: tl.constexpr, PRECISION: tl.constexpr):
    """Compute x W[rows]^T + b[rows] for weights [out, D]: float32 [M, rows]."""
    weight = load_block_transposed(weight_ptr, rows, tl.arange(0, D), D, x.dtype)
    bias = tl.load(bias_ptr + rows).to(tl.float32)
    return product(x, weight, PRECISION) + bias[None, :]


# -- sublayers ------------------------------------------------------------------------------------


@triton.jit
def _project_head(
    x, x_at, memory, memory_at, memory_length, h, head, qkv_weight_ptr, qkv_bias_ptr,
    D: tl.constexpr, WIDTH: tl.constexpr, SLOT: tl.constexpr, MEMORY_SLOT: tl.constexpr,
    RELOAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's queries [M_q, D/H] times log2(e) / sqrt(D/H), keys, values and probabilities.

    p = softmax(q k^T) over a query's own keys, float32 [M_q, M_k]; zeros for a query without keys.
    """
    memory = take_up(memory, memory_at, D, RELOAD)
    v = linear(memory, qkv_weight_ptr, qkv_bias_ptr, 2 * D + head, D, PRECISION).to(x.dtype)
    x = take_up(x, x_at, D, RELOAD)
    q = linear(x, qkv_weight_ptr, qkv_bias_ptr, head, D, PRECISION)
    q = (q * (LOG2_E * WIDTH**-0.5)).to(x.dtype)
    memory = take_up(memory, memory_at, D, RELOAD)
    k = linear(memory, qkv_weight_ptr, qkv_bias_ptr, D + head, D, PRECISION).to(x.dtype)
    scores = product(q, k.trans(), PRECISION)  # [M_q, M_k]
    query_slot = row_slots(x.shape[0], SLOT)
    key_slot = key_slots(memory_length, MEMORY_SLOT)
    scores = tl.where(query_slot[:, None] == key_slot[None, :], scores, float("-inf"))
    top = tl.maximum(tl.max(scores, 1), LOWEST_SCORE)
    p = tl.exp2(scores - top[:, None])
    p = p / tl.maximum(tl.sum(p, 1), 1.0)[:, None]  # a sum over keys is at least 1
    return q, k, v, p


@triton.jit
def attention(
    x,  # [M_q, D]
    x_at,  # where x stands in memory too, if RELOAD
    memory,  # [M_k, D]
    memory_at,
    memory_length,  # [M_k] of each row's sequence
    y,  # float32 [M_q, D], added to
    has_keys,  # bool [M_q]: to the others nothing is added
    weights,  # pointers to one stream's qkv weight and bias, out weight and bias
    D: tl.constexpr,
    H: tl.constexpr,
    SLOT: tl.constexpr,
    MEMORY_SLOT: tl.constexpr,
    RELOAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multi-head attention, head by head: y = sum_h softmax(Q_h K_h^T / sqrt(D/H)) V_h Wo_h^T + bo.

    The loop is not unrolled and its weights are read in it, so one head's are on chip at a time.
    Returns float32 [M_q, D]; finite, and without meaning, for a query without keys.
    """
    qkv_weight_ptr, qkv_bias_ptr, out_weight_ptr, out_bias_ptr = weights
    WIDTH: tl.constexpr = D // H
    column = tl.arange(0, D)
    for h in tl.range(0, H, disable_licm=True):
        head = h * WIDTH + tl.arange(0, WIDTH)
        _, _, v, p = _project_head(
            x, x_at, memory, memory_at, memory_length, h, head, qkv_weight_ptr, qkv_bias_ptr,
            D, WIDTH, SLOT, MEMORY_SLOT, RELOAD, PRECISION,
        )  # fmt: skip
        o = product(p.to(x.dtype), v, PRECISION).to(x.dtype)  # [M_q, D/H]
        out_weight = load_block_transposed(out_weight_ptr, column, head, D, x.dtype)  # [D/H, D]
        y = product(o, out_weight, PRECISION, y)
    out_bias = tl.load(out_bias_ptr + column).to(tl.float32)
    return y + tl.where(has_keys[:, None], out_bias[None, :], 0.0)


@triton.jit
def _project_back(
    dq, dk, dv, dx, dmemory, head, qkv_weight_ptr,
    D: tl.constexpr, IS_SELF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dq Wq_h to dx and dk Wk_h + dv Wv_h to dmemory, or all to dx if the memory is x."""
    column = tl.arange(0, D)
    query_weight = load_block(qkv_weight_ptr, head, column, D, dq.dtype)  # [D/H, D]
    dx = product(dq, query_weight, PRECISION, dx)
    key_weight = load_block(qkv_weight_ptr, D + head, column, D, dq.dtype)
    value_weight = load_block(qkv_weight_ptr, 2 * D + head, column, D, dq.dtype)
    if IS_SELF:
        dx = product(dk, key_weight, PRECISION, dx)
        dx = product(dv, value_weight, PRECISION, dx)
    else:
        dmemory = product(dk, key_weight, PRECISION, dmemory)
        dmemory = product(dv, value_weight, PRECISION, dmemory)
    return dx, dmemory


@triton.jit
def attention_bwd(
    dy,  # [M_q, D] gradient of the sublayer's output, in the states' dtype
    dy_at,  # where dy stands in memory too, if RELOAD
    x,  # [M_q, D]
    x_at,
    memory,  # [M_k, D]
    memory_at,
    memory_length,  # [M_k] of each row's sequence
    dx,  # float32 [M_q, D], added to
    dmemory,  # float32 [M_k, D], added to; not used if the memory is x itself
    heads_at,  # where o, dq [M_q, D] and dk, dv [M_k, D] are to be stored
    dq_at,
    dk_at,
    dv_at,
    weights,
    D: tl.constexpr,
    H: tl.constexpr,
    SLOT: tl.constexpr,
    MEMORY_SLOT: tl.constexpr,
    IS_SELF: tl.constexpr,
    RELOAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of :func:`attention`, recomputing each head.

        do = dy Wo_h;   dv = p^T do;   dp = do v^T;   ds = p (dp - rowsum(p dp))
        dq = ds k / sqrt(D/H);   dk = ds^T q / sqrt(D/H)
        dx += dq Wq_h;   dmemory += dk Wk_h + dv Wv_h

    Stores what the weight gradients need: o (with dy), dq (with x), dk and dv (with memory).
    Returns dx and dmemory; for self-attention all of it in dx.
    """
    qkv_weight_ptr, qkv_bias_ptr, out_weight_ptr, _ = weights
    WIDTH: tl.constexpr = D // H
    column = tl.arange(0, D)
    for h in tl.range(0, H, disable_licm=True):
        head = h * WIDTH + tl.arange(0, WIDTH)
        q, k, v, p = _project_head(
            x, x_at, memory, memory_at, memory_length, h, head, qkv_weight_ptr, qkv_bias_ptr,
            D, WIDTH, SLOT, MEMORY_SLOT, RELOAD, PRECISION,
        )  # fmt: skip
        o = product(p.to(x.dtype), v, PRECISION)
        store_tile(columns(heads_at, h * WIDTH), o, WIDTH)

        out_weight = load_block(out_weight_ptr, column, head, D, x.dtype)  # [D, D/H]
        dy = take_up(dy, dy_at, D, RELOAD)
        do = product(dy, out_weight, PRECISION).to(x.dtype)  # [M_q, D/H]
        dv = product(p.to(x.dtype).trans(), do, PRECISION).to(x.dtype)
        dp = product(do, v.trans(), PRECISION)  # [M_q, M_k]
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(x.dtype)
        dq = (product(ds, k, PRECISION) * WIDTH**-0.5).to(x.dtype)
        dk = (product(ds.trans(), q, PRECISION) / LOG2_E).to(x.dtype)
        store_tile(columns(dq_at, h * WIDTH), dq, WIDTH)
        store_tile(columns(dk_at, h * WIDTH), dk, WIDTH)
        store_tile(columns(dv_at, h * WIDTH), dv, WIDTH)

        if not RELOAD:
            dx, dmemory = _project_back(
                dq, dk, dv, dx, dmemory, head, qkv_weight_ptr, D, IS_SELF, PRECISION
            )
    if RELOAD:  # in a loop of their own, dx and dmemory need not wait beside the scores
        tl.debug_barrier()
        for h in tl.range(0, H, disable_licm=True):
            head = h * WIDTH + tl.arange(0, WIDTH)
            dq = load_tile(columns(dq_at, h * WIDTH), WIDTH)
            dk = load_tile(columns(dk_at, h * WIDTH), WIDTH)
            dv = load_tile(columns(dv_at, h * WIDTH), WIDTH)
            dx, dmemory = _project_back(
                dq, dk, dv, dx, dmemory, head, qkv_weight_ptr, D, IS_SELF, PRECISION
            )
    return dx, dmemory


@triton.jit
def ffn(
    x,  # [M, D]
    x_at,
    y,  # float32 [M, D], added to
    weights,  # pointers to one stream's in weight and bias, out weight and bias
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    RELOAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """relu(x W1^T + b1) W2^T + b2 in blocks of BLOCK_F hidden units: float32 [M, D]."""
    in_weight_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr = weights
    column = tl.arange(0, D)
    for start in tl.range(0, F, BLOCK_F, disable_licm=True):
        unit = start + tl.arange(0, BLOCK_F)
        x = take_up(x, x_at, D, RELOAD)
        hidden = linear(x, in_weight_ptr, in_bias_ptr, unit, D, PRECISION)  # [M, BLOCK_F]
        hidden = tl.maximum(hidden, 0.0).to(x.dtype)
        out_weight = load_block_transposed(out_weight_ptr, column, unit, F, x.dtype)
        y = product(hidden, out_weight, PRECISION, y)
    return y + tl.load(out_bias_ptr + column).to(tl.float32)[None, :]


@triton.jit
def ffn_bwd(
    dy,  # [M, D] gradient of the sublayer's output, in the states' dtype
    dy_at,
    x,  # [M, D]
    x_at,
    dx,  # float32 [M, D], added to
    hidden_at,  # where the hidden units and their gradient are to be stored, [M, F]
    dhidden_at,
    weights,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    RELOAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of :func:`ffn`: dhidden = dy W2 [hidden > 0], dx += dhidden W1."""
    in_weight_ptr, in_bias_ptr, out_weight_ptr, _ = weights
    column = tl.arange(0, D)
    for start in tl.range(0, F, BLOCK_F, disable_licm=True):
        unit = start + tl.arange(0, BLOCK_F)
        x = take_up(x, x_at, D, RELOAD)
        hidden = linear(x, in_weight_ptr, in_bias_ptr, unit, D, PRECISION)  # [M, BLOCK_F]
        hidden = tl.maximum(hidden, 0.0).to(x.dtype)
        store_tile(columns(hidden_at, start), hidden, BLOCK_F)
        out_weight = load_block(out_weight_ptr, column, unit, F, x.dtype)  # [D, BLOCK_F]
        dy = take_up(dy, dy_at, D, RELOAD)
        dhidden = product(dy, out_weight, PRECISION)
        dhidden = tl.where(hidden > 0.0, dhidden, 0.0).to(x.dtype)
        store_tile(columns(dhidden_at, start), dhidden, BLOCK_F)
        in_weight = load_block(in_weight_ptr, unit, column, D, x.dtype)  # [BLOCK_F, D]
        dx = product(dhidden, in_weight, PRECISION, dx)
    return dx


# -- pooling --------------------------------------------------------------------------------------


@triton.jit
def _pool_weights(state, key, events):
    """Compute softmax_j(state_j . key) over the rows that are ``events``, else 0: float32 [M]."""
    logits = tl.where(events, tl.sum(state * key[None, :], 1) * LOG2_E, float("-inf"))
    alpha = tl.exp2(logits - tl.maximum(tl.max(logits, 0), LOWEST_SCORE))
    return alpha / tl.maximum(tl.sum(alpha, 0), 1.0)


@triton.jit
def pool(
    state,  # [M, D]
    event_slot,  # [M] slot of each event, -1 at padding
    keys_ptr,  # [B, 2, D], at the stream
    pooled_ptr,  # [sequences, K, 2, 2, D], at the step, state and stream
    pooled_stride,  # from one sequence to the next
    first,  # sequences of the tile's slots: first, first + 1, ..., up to end
    end,
    n_trajectories,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Store each sequence's pooled state, z = sum_j alpha_j state_j; 0 without an event."""
    column = tl.arange(0, D)
    state = state.to(tl.float32)
    for slot in tl.range(0, SLOTS, disable_licm=True):
        sequence = first + slot
        exists = sequence < end
        key_offset = (sequence // n_trajectories) * (2 * D) + column
        key = tl.load(keys_ptr + key_offset, mask=exists, other=0.0).to(tl.float32)
        alpha = _pool_weights(state, key, event_slot == slot)
        z = tl.sum(alpha[:, None] * state, 0)  # [D]
        z_ptr = pooled_ptr + sequence * pooled_stride + column
        tl.store(z_ptr, z.to(pooled_ptr.dtype.element_ty), mask=exists)


@triton.jit
def pool_bwd(
    dstate,  # float32 [M, D], added to
    state,  # [M, D]
    event_slot,  # [M]
    keys_ptr,  # [B, 2, D], at the stream
    dpooled_ptr,  # [sequences, K, 2, 2, D], at the step, state and stream
    dkeys_ptr,  # the same shape, float32: a sequence's share of this step and state
    pooled_stride,
    first,
    end,
    n_trajectories,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Backward of :func:`pool`.

    With t_j = state_j . dz and s_j = alpha_j (t_j - sum_i alpha_i t_i),

    dstate_j += alpha_j dz + s_j key;   dkey = sum_j s_j state_j
    """
    column = tl.arange(0, D)
    state = state.to(tl.float32)
    for slot in tl.range(0, SLOTS, disable_licm=True):
        sequence = first + slot
        exists = sequence < end
        key_offset = (sequence // n_trajectories) * (2 * D) + column
        key = tl.load(keys_ptr + key_offset, mask=exists, other=0.0).to(tl.float32)
        offset = sequence * pooled_stride + column
        dz = tl.load(dpooled_ptr + offset, mask=exists, other=0.0).to(tl.float32)
        alpha = _pool_weights(state, key, event_slot == slot)  # [M]
        t = tl.sum(state * dz[None, :], 1)
        s = alpha * (t - tl.sum(alpha * t, 0))
        dstate += alpha[:, None] * dz[None, :] + s[:, None] * key[None, :]
        tl.store(dkeys_ptr + offset, tl.sum(s[:, None] * state, 0), mask=exists)
    return dstate
