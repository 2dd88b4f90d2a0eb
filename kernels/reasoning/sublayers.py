"""Sublayers of a step, forward and backward: LayerNorm, attention, FFN.

States come in the dtype of the tensors and are operands of the dots; everything between two
rounded states (dot accumulators, softmax, LayerNorm, sums) is float32. In backward, an operand
comes with the place where it is parked (``x_at`` beside ``x``); see :func:`unpark`.
"""

import triton
import triton.language as tl
from triton import knobs

from lcr_fast.kernels.core.product import (
    load_operand,
    multiply,
    operand,
    product,
    rounded_products,
    transposed,
)
from lcr_fast.kernels.reasoning.tile import (
    columns,
    key_slots,
    load_tile,
    row_slots,
    store_tile,
    unpark,
)

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
LN_EPS = tl.constexpr(1e-5)  # of every LayerNorm, as in the reference
LOG2_E = tl.constexpr(1.4426950408889634)
# Lower bound of a row's largest score: finite, so that a row without keys gets exp2(-inf) = 0.
LOWEST_SCORE = tl.constexpr(-1e30)


@triton.jit
def reciprocal(x):
    """1 / x of float32 from 1 to some thousands, to one unit in the last place."""
    if _INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round float32 to the states' dtype.

    Two at a time, in a way that the compiler sees no more than that: it would round each once more,
    by itself and slowly, where the rounded number is both packed for a product and added.
    """
    if _INTERPRETED or dtype == tl.float32:
        y = x.to(dtype)
    elif dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        y = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, is_pure=True, pack=2
        )
    return y


@triton.jit
def _start(x, RESIDUAL: tl.constexpr):
    """Start a sum from x, or from 0: float32."""
    return x.to(tl.float32) if RESIDUAL else tl.zeros(x.shape, tl.float32)


@triton.jit
def add_pairs(a, b, c, d):
    """Add up two tiles at once, by ``tl.reduce``: their threads meet once."""
    return a + c, b + d


@triton.jit
def standardise(x, D: tl.constexpr):
    """x_hat = (x - mean) rstd of each row, and rstd: float32 [M, D], [M]."""
    mean = tl.sum(x, 1) / D
    centred = x - mean[:, None]
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + LN_EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def layer_norm(x, norm, D: tl.constexpr):
    """LN(x) = x_hat w + b for :class:`NormWeights` w, b of one norm: float32 [M, D]."""
    column = tl.arange(0, D)
    weight = tl.load(norm.weight + column).to(tl.float32)
    bias = tl.load(norm.bias + column).to(tl.float32)
    x_hat, _ = standardise(x, D)
    return x_hat * weight[None, :] + bias[None, :]


@triton.jit
def layer_norm_bwd(dy, x, norm, dnorm_ptr, D: tl.constexpr):
    """Backward of :func:`layer_norm`: dx, float32 [M, D].

    Stores the tile's own dw and db at dnorm_ptr [2, D].

        dx = rstd (g - mean(g) - x_hat mean(g x_hat)),  g = dy w;   dw = sum dy x_hat,  db = sum dy

    Rows with dy = 0 add nothing and get 0.
    """
    column = tl.arange(0, D)
    weight = tl.load(norm.weight + column).to(tl.float32)
    x_hat, rstd = standardise(x, D)
    dw, db = tl.reduce((rounded_products(dy, x_hat), dy), 0, add_pairs)
    tl.store(dnorm_ptr + column, dw)
    tl.store(dnorm_ptr + D + column, db)
    g = dy * weight[None, :]
    mean_g = tl.sum(g, 1) / D
    mean_gx = tl.sum(g * x_hat, 1) / D
    of_mean, of_x_hat = rstd * mean_g, rstd * mean_gx
    return g * rstd[:, None] - of_mean[:, None] - x_hat * of_x_hat[:, None]


@triton.jit
def weight_product(
    x,  # [M, columns], TRANSPOSED, or [M, rows]
    weight_ptr,  # [OUT, IN], or [parts, OUT, IN]
    rows,
    columns,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SHAPE: tl.constexpr,
    c=None,
):
    """Compute x W[rows, columns]^T + c, or x W[rows, columns] + c if not TRANSPOSED: float32."""
    PRECISION: tl.constexpr = SHAPE.PRECISION
    row_ptrs = weight_ptr + rows[:, None] * IN
    weight = load_operand(row_ptrs, columns[None, :], None, OUT * IN, PRECISION)
    if TRANSPOSED:
        weight = transposed(weight, PRECISION)
    return multiply(operand(x, PRECISION), weight, PRECISION, c)


@triton.jit
def linear(x, weight_ptr, bias_ptr, rows, OUT: tl.constexpr, SHAPE: tl.constexpr):
    """Compute x W[rows]^T + b[rows] for weights [OUT, D]: float32 [M, rows]."""
    D: tl.constexpr = SHAPE.D
    bias = tl.load(bias_ptr + rows).to(tl.float32)
    y = weight_product(x, weight_ptr, rows, tl.arange(0, D), OUT, D, True, SHAPE)
    return y + bias[None, :]


@triton.jit
def _split_columns(x):
    """Cut a tile [M, 2 W] in two, [M, W] each."""
    M: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1] // 2
    return tl.split(x.reshape(M, 2, W).permute(0, 2, 1))


@triton.jit
def _join_columns(left, right):
    """Put two tiles [M, W] side by side: [M, 2 W]."""
    M: tl.constexpr = left.shape[0]
    W: tl.constexpr = left.shape[1]
    return tl.join(left, right).permute(0, 2, 1).reshape(M, 2 * W)


@triton.jit
def _for_groups(x, GROUPS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Repeat each sequence's rows of x [M_k, W] for its groups: [GROUPS, M_k / SEQUENCES, W]."""
    SLOT: tl.constexpr = x.shape[0] // SEQUENCES
    W: tl.constexpr = x.shape[1]
    x = x.reshape(SEQUENCES, 1, SLOT, W)
    return tl.broadcast_to(x, (SEQUENCES, GROUPS // SEQUENCES, SLOT, W)).reshape(GROUPS, SLOT, W)


@triton.jit
def _heads(
    q,  # [M_q, D] times log2(e) / sqrt(D/H)
    k,  # [M_k, D]
    v,  # [M_k, D], without their bias
    bias_ptr,  # [D] of the values
    lengths,  # [GROUPS], see memory_lengths
    H: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """softmax(q k^T) v + bias of H heads side by side: [M_q, D] in q's dtype, 0 without keys.

    Halves the columns until one head is left. The bias comes after the softmax, whose sum is 1.
    """
    if H > 1:
        q_left, q_right = _split_columns(q)
        k_left, k_right = _split_columns(k)
        v_left, v_right = _split_columns(v)
        right_ptr = bias_ptr + q.shape[1] // 2
        left = _heads(q_left, k_left, v_left, bias_ptr, lengths, H // 2, SEQUENCES, PRECISION)
        right = _heads(q_right, k_right, v_right, right_ptr, lengths, H // 2, SEQUENCES, PRECISION)
        o = _join_columns(left, right)
    else:
        GROUPS: tl.constexpr = lengths.shape[0]
        KEYS: tl.constexpr = 2 if GROUPS > 1 else 1  # the axis of the scores
        position = tl.arange(0, k.shape[0] // SEQUENCES)
        mask = tl.where(position[None, :] < lengths[:, None], 0.0, float("-inf"))
        bias = tl.load(bias_ptr + tl.arange(0, q.shape[1])).to(tl.float32)
        bias = tl.where(lengths[:, None] > 0, bias[None, :], 0.0)
        queries = q
        if GROUPS > 1:  # a batch of products
            queries = q.reshape(GROUPS, q.shape[0] // GROUPS, q.shape[1])
            k = _for_groups(k, GROUPS, SEQUENCES)
            v = _for_groups(v, GROUPS, SEQUENCES)
            mask, bias = mask[:, None, :], bias[:, None, :]
            transposed = k.permute(0, 2, 1)
        else:
            transposed = k.trans()
        scores = product(queries, transposed, PRECISION) + mask
        top = tl.maximum(tl.max(scores, KEYS, keep_dims=True), LOWEST_SCORE)
        p = tl.exp2(scores - top)
        total = tl.maximum(tl.sum(p, KEYS, keep_dims=True), 1.0)  # a sum over keys is at least 1
        o = product(rounded(p, q.dtype), v, PRECISION) * reciprocal(total) + bias
        o = rounded(o, q.dtype).reshape(q.shape)
    return o


@triton.jit
def attention(
    x,  # [M_q, D]
    memory,  # [M_k, D]
    lengths,  # [GROUPS], see memory_lengths
    has_keys,  # float32 [M_q], 0 for queries that get nothing, else 1; None if all have keys
    weights,  # AttentionWeights of one stream and step
    SHAPE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Multi-head attention, sum_h softmax(Q_h K_h^T / sqrt(D/H)) V_h Wo_h^T + bo: float32 [M_q, D].

    With RESIDUAL, x is added. The heads of BLOCK_HEADS columns are projected in one product. Keys
    have no bias: it would add the same to all scores of a query. Rows at padding are finite, and
    without meaning.
    """
    D: tl.constexpr = SHAPE.D
    BLOCK: tl.constexpr = SHAPE.BLOCK_HEADS
    PRECISION: tl.constexpr = SHAPE.PRECISION
    SCALE: tl.constexpr = LOG2_E * (D // SHAPE.H) ** -0.5
    column = tl.arange(0, D)
    y = _start(x, RESIDUAL)
    for start in tl.range(0, D, BLOCK, disable_licm=True):
        head = start + tl.arange(0, BLOCK)
        query_bias = tl.load(weights.qkv_bias + head).to(tl.float32) * SCALE
        q = weight_product(x, weights.qkv_weight, head, column, 3 * D, D, True, SHAPE)
        q = rounded(q * SCALE + query_bias[None, :], x.dtype)
        k = weight_product(memory, weights.qkv_weight, D + head, column, 3 * D, D, True, SHAPE)
        k = rounded(k, x.dtype)
        v = weight_product(memory, weights.qkv_weight, 2 * D + head, column, 3 * D, D, True, SHAPE)
        v = rounded(v, x.dtype)
        value_bias = weights.qkv_bias + 2 * D + start
        o = _heads(q, k, v, value_bias, lengths, BLOCK * SHAPE.H // D, SEQUENCES, PRECISION)
        y = weight_product(o, weights.out_weight, column, head, D, D, True, SHAPE, y)
    out_bias = tl.load(weights.out_bias + column).to(tl.float32)[None, :]
    if has_keys is None:
        y += out_bias
    else:
        y += out_bias * has_keys[:, None]
    return y


@triton.jit
def _heads_bwd(
    q,  # [M_q, W] times log2(e) / sqrt(D/H)
    k,  # [M_k, W]
    v,  # [M_k, W]
    do,  # [M_q, W]
    query_slot,  # [M_q]
    key_slot,  # [M_k], see key_slots
    H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of the attention of H heads side by side: o, dq, dk and dv in q's dtype.

        p = softmax(q k^T);   o = p v;   dv = p^T do;   dp = do v^T;   ds = p (dp - rowsum(p dp))
        dq = ds k / sqrt(D/H);   dk = ds^T q / sqrt(D/H)

    p is over a query's own keys, zeros without any. Halves the columns until one head is left.
    """
    if H > 1:
        q_left, q_right = _split_columns(q)
        k_left, k_right = _split_columns(k)
        v_left, v_right = _split_columns(v)
        do_left, do_right = _split_columns(do)
        o_left, dq_left, dk_left, dv_left = _heads_bwd(
            q_left, k_left, v_left, do_left, query_slot, key_slot, H // 2, PRECISION
        )
        o_right, dq_right, dk_right, dv_right = _heads_bwd(
            q_right, k_right, v_right, do_right, query_slot, key_slot, H // 2, PRECISION
        )
        o, dq = _join_columns(o_left, o_right), _join_columns(dq_left, dq_right)
        dk, dv = _join_columns(dk_left, dk_right), _join_columns(dv_left, dv_right)
    else:
        dtype: tl.constexpr = q.dtype
        scores = product(q, k.trans(), PRECISION)  # [M_q, M_k]
        scores = tl.where(query_slot[:, None] == key_slot[None, :], scores, float("-inf"))
        p = tl.exp2(scores - tl.maximum(tl.max(scores, 1), LOWEST_SCORE)[:, None])
        total = tl.maximum(tl.sum(p, 1), 1.0)  # a sum over keys is at least 1
        p = p * reciprocal(total)[:, None]
        of_p = operand(p.to(dtype), PRECISION)
        o = multiply(of_p, operand(v, PRECISION), PRECISION).to(dtype)
        dv = multiply(transposed(of_p, PRECISION), operand(do, PRECISION), PRECISION).to(dtype)
        dp = product(do, v.trans(), PRECISION)  # [M_q, M_k]
        ds = (p * (dp - tl.sum(rounded_products(p, dp), 1)[:, None])).to(dtype)
        of_ds = operand(ds, PRECISION)
        dq = (multiply(of_ds, operand(k, PRECISION), PRECISION) * q.shape[1] ** -0.5).to(dtype)
        dk = multiply(transposed(of_ds, PRECISION), operand(q, PRECISION), PRECISION)
        dk = (dk / LOG2_E).to(dtype)
    return o, dq, dk, dv


@triton.jit
def _project_back(
    dq, dk, dv, dx, dmemory, head, weights, IS_SELF: tl.constexpr, SHAPE: tl.constexpr
):
    """Add dq Wq to dx and dk Wk + dv Wv to dmemory, or all to dx if the memory is x."""
    D: tl.constexpr = SHAPE.D
    column = tl.arange(0, D)
    weight_ptr = weights.qkv_weight
    dx = weight_product(dq, weight_ptr, head, column, 3 * D, D, False, SHAPE, dx)
    of_memory = dx if IS_SELF else dmemory
    of_memory = weight_product(dk, weight_ptr, D + head, column, 3 * D, D, False, SHAPE, of_memory)
    of_memory = weight_product(
        dv, weight_ptr, 2 * D + head, column, 3 * D, D, False, SHAPE, of_memory
    )
    return of_memory if IS_SELF else dx, dmemory if IS_SELF else of_memory


@triton.jit
def attention_bwd(
    dy,  # [M_q, D] gradient of the sublayer's output, in the states' dtype
    dy_at,  # where dy is parked, if PARKED
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
    weights,  # AttentionWeights of one stream and step
    SHAPE: tl.constexpr,
    SLOT: tl.constexpr,
    MEMORY_SLOT: tl.constexpr,
    IS_SELF: tl.constexpr,
    PARKED: tl.constexpr,
):
    """Backward of :func:`attention`, a block of heads at a time, which is computed again.

        do = dy Wo;   o, dq, dk, dv by :func:`_heads_bwd`;   dx += dq Wq;   dmemory += dk Wk + dv Wv

    Stores what the weight gradients need: o (with dy), dq (with x), dk and dv (with memory).
    Returns dx and dmemory; for self-attention all of it in dx.
    """
    D: tl.constexpr = SHAPE.D
    BLOCK: tl.constexpr = SHAPE.BLOCK_HEADS
    PRECISION: tl.constexpr = SHAPE.PRECISION
    SCALE: tl.constexpr = LOG2_E * (D // SHAPE.H) ** -0.5
    dtype: tl.constexpr = x.dtype
    column = tl.arange(0, D)
    query_slot = row_slots(x.shape[0], SLOT)
    key_slot = key_slots(memory_length, MEMORY_SLOT)
    qkv, bias = weights.qkv_weight, weights.qkv_bias
    for start in tl.range(0, D, BLOCK, disable_licm=True):
        head = start + tl.arange(0, BLOCK)
        memory = unpark(memory, memory_at, D, PARKED)
        v = linear(memory, qkv, bias, 2 * D + head, 3 * D, SHAPE).to(dtype)
        x = unpark(x, x_at, D, PARKED)
        q = (linear(x, qkv, bias, head, 3 * D, SHAPE) * SCALE).to(dtype)
        memory = unpark(memory, memory_at, D, PARKED)
        k = linear(memory, qkv, bias, D + head, 3 * D, SHAPE).to(dtype)
        dy = unpark(dy, dy_at, D, PARKED)
        do = weight_product(dy, weights.out_weight, column, head, D, D, False, SHAPE).to(dtype)
        o, dq, dk, dv = _heads_bwd(
            q, k, v, do, query_slot, key_slot, BLOCK * SHAPE.H // D, PRECISION
        )
        store_tile(columns(heads_at, start), o, BLOCK)
        store_tile(columns(dq_at, start), dq, BLOCK)
        store_tile(columns(dk_at, start), dk, BLOCK)
        store_tile(columns(dv_at, start), dv, BLOCK)
        if not PARKED:
            dx, dmemory = _project_back(dq, dk, dv, dx, dmemory, head, weights, IS_SELF, SHAPE)
    if PARKED:  # in a loop of their own, dx and dmemory need not wait beside the scores
        tl.debug_barrier()
        for start in tl.range(0, D, BLOCK, disable_licm=True):
            head = start + tl.arange(0, BLOCK)
            dq = load_tile(columns(dq_at, start), BLOCK)
            dk = load_tile(columns(dk_at, start), BLOCK)
            dv = load_tile(columns(dv_at, start), BLOCK)
            dx, dmemory = _project_back(dq, dk, dv, dx, dmemory, head, weights, IS_SELF, SHAPE)
    return dx, dmemory


@triton.jit
def _relu(x):
    """Unlike tl.maximum by default, on a GPU, it lets a NaN through."""
    return tl.maximum(x, 0.0, tl.PropagateNan.ALL)


@triton.jit
def ffn(
    x,  # [M, D]
    weights,  # FfnWeights of one stream and step
    SHAPE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """relu(x W1^T + b1) W2^T + b2 in blocks of BLOCK_F hidden units: float32 [M, D].

    With RESIDUAL, x is added.
    """
    D: tl.constexpr = SHAPE.D
    F: tl.constexpr = SHAPE.F
    BLOCK_F: tl.constexpr = SHAPE.BLOCK_F
    column = tl.arange(0, D)
    y = _start(x, RESIDUAL)
    for start in tl.range(0, F, BLOCK_F, disable_licm=True):
        unit = start + tl.arange(0, BLOCK_F)
        hidden = linear(x, weights.in_weight, weights.in_bias, unit, F, SHAPE)  # [M, BLOCK_F]
        hidden = rounded(_relu(hidden), x.dtype)
        y = weight_product(hidden, weights.out_weight, column, unit, D, F, True, SHAPE, y)
    return y + tl.load(weights.out_bias + column).to(tl.float32)[None, :]


@triton.jit
def ffn_bwd(
    dy,  # [M, D] gradient of the sublayer's output, in the states' dtype
    dy_at,
    x,  # [M, D]
    x_at,
    dx,  # float32 [M, D], added to
    hidden_at,  # where the hidden units and their gradient are to be stored, [M, F]
    dhidden_at,
    weights,  # FfnWeights of one stream and step
    SHAPE: tl.constexpr,
    PARKED: tl.constexpr,
):
    """Backward of :func:`ffn`: dhidden = dy W2 [hidden > 0], dx += dhidden W1."""
    D: tl.constexpr = SHAPE.D
    F: tl.constexpr = SHAPE.F
    BLOCK_F: tl.constexpr = SHAPE.BLOCK_F
    column = tl.arange(0, D)
    for start in tl.range(0, F, BLOCK_F, disable_licm=True):
        unit = start + tl.arange(0, BLOCK_F)
        x = unpark(x, x_at, D, PARKED)
        hidden = linear(x, weights.in_weight, weights.in_bias, unit, F, SHAPE)  # [M, BLOCK_F]
        hidden = _relu(hidden).to(x.dtype)
        store_tile(columns(hidden_at, start), hidden, BLOCK_F)
        dy = unpark(dy, dy_at, D, PARKED)
        dhidden = weight_product(dy, weights.out_weight, column, unit, D, F, False, SHAPE)
        dhidden = tl.where(hidden > 0.0, dhidden, 0.0).to(x.dtype)
        store_tile(columns(dhidden_at, start), dhidden, BLOCK_F)
        dx = weight_product(dhidden, weights.in_weight, unit, column, F, D, False, SHAPE, dx)
    return dx
