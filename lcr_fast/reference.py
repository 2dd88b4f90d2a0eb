"""LCR-SER in plain PyTorch: the definition of every op, and the oracle of every test.

Read it beside the paper (arXiv 2508.04152), from the top. Halves are computed in float32 and
rounded once at the end of an op; float64 stays float64 and gives the exact answer. Histories are
right-padded, so a length is a mask; what stands behind it is not read, and is 0 in every result.
A leading ``...`` is B users, or B users x N trajectories.

Dropout masks are arguments (0 or 1 / (1 - p), see :mod:`lcr_fast.noise`), so that every function
here is deterministic; None means no dropout.

"Paper" marks what the paper states; where it is silent, the choice is ours ("our reading").
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lcr_fast.profiling import ranged_steps
from lcr_fast.weights import REC, SEARCH, EncoderWeights, ReasoningWeights, ScoringWeights

EPS = 1e-5  # of every LayerNorm
_CATALOGUE_BLOCK = 1024  # items scored at once, which bounds the memory

Streams = tuple[Tensor, Tensor]  # (search, recommendation)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """Mark valid positions: lengths [...] -> bool [..., size]."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


def _zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    return x.masked_fill(~length_mask(lengths, x.shape[-2]).unsqueeze(-1), 0.0)


def _key_bias(lengths: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Give 0 to valid keys and the lowest finite number to padding: [...] -> [..., 1, size].

    Not -inf: a history without events must have finite attention and gradients. Its softmax is
    uniform over zero vectors, which aggregation turns into 0 and reasoning gates away.
    """
    bias = torch.zeros((*lengths.shape, 1, size), dtype=dtype, device=lengths.device)
    return bias.masked_fill(~length_mask(lengths, size).unsqueeze(-2), torch.finfo(dtype).min)


def _project_heads(
    query: Tensor,  # [..., Lq, D]
    memory: Tensor,  # [..., Lk, D]
    qkv_weight: Tensor,  # [3D, D]
    qkv_bias: Tensor,  # [3D]
    n_heads: int,
) -> list[Tensor]:
    """Project to queries [..., H, Lq, D/H], keys and values [..., H, Lk, D/H]."""
    dim = query.shape[-1]
    if query is memory:
        q, k, v = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        q = F.linear(query, qkv_weight[:dim], qkv_bias[:dim])
        k, v = F.linear(memory, qkv_weight[dim:], qkv_bias[dim:]).chunk(2, -1)
    return [x.unflatten(-1, (n_heads, -1)).transpose(-2, -3) for x in (q, k, v)]


def attention(
    query: Tensor,  # [..., Lq, D]
    memory: Tensor,  # [..., Lk, D]
    memory_lengths: Tensor,  # [...]
    qkv_weight: Tensor,  # [3D, D] rows: queries, keys, values
    qkv_bias: Tensor,  # [3D]
    out_weight: Tensor,  # [D, D]
    out_bias: Tensor,  # [D]
    n_heads: int,
) -> Tensor:
    """Attend from ``query`` to ``memory``; self-attention where they are the same tensor.

    head_h = softmax(Q_h K_h^T / sqrt(D/H)) V_h over the valid keys; the heads are concatenated
    and projected. Returns [..., Lq, D], finite but meaningless where the memory has no event.
    """
    q, k, v = _project_heads(query, memory, qkv_weight, qkv_bias, n_heads)
    bias = _key_bias(memory_lengths, memory.shape[-2], q.dtype).unsqueeze(-3)  # [..., 1, 1, Lk]
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [..., H, Lq, D/H]
    return F.linear(heads.transpose(-2, -3).flatten(-2), out_weight, out_bias)


def attention_probabilities(
    query: Tensor,  # [..., Lq, D]
    memory: Tensor,  # [..., Lk, D]
    memory_lengths: Tensor,  # [...]
    qkv_weight: Tensor,  # [3D, D]
    qkv_bias: Tensor,  # [3D]
    n_heads: int,
) -> Tensor:
    """Where :func:`attention` looks: softmax(Q K^T / sqrt(D/H)), [..., H, Lq, Lk]; for analysis."""
    q, k, _ = _project_heads(query, memory, qkv_weight, qkv_bias, n_heads)
    bias = _key_bias(memory_lengths, memory.shape[-2], q.dtype).unsqueeze(-3)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1)


def _ffn(x: Tensor, weights: EncoderWeights | ReasoningWeights) -> Tensor:
    hidden = F.relu(F.linear(x, weights.ffn_in_weight, weights.ffn_in_bias))
    return F.linear(hidden, weights.ffn_out_weight, weights.ffn_out_bias)


def _add_norm(
    x: Tensor, update: Tensor, mask: Tensor | None, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    """LN(x + dropout(update)): the end of every sublayer (post-norm)."""
    x = x + (update if mask is None else update * mask.to(update.dtype))
    return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _unpack(weights, dtype: torch.dtype):
    """Split packed weights: entry [i][x] holds layer or step i of stream x, without those axes."""
    first_axis = [w.to(dtype).unbind(0) for w in weights]
    slices = [[w.unbind(0) for w in layer] for layer in zip(*first_axis, strict=True)]
    return [[type(weights)(*(w[x] for w in layer)) for x in (SEARCH, REC)] for layer in slices]


def encode(
    x: Tensor,  # [..., L, D]
    lengths: Tensor,  # [...]
    weights: EncoderWeights,
    stream: int,
    *,
    n_heads: int,
    masks: Tensor | None = None,  # [2 n_layers, ..., L, D]
) -> Tensor:
    """Encode one stream with its own post-norm Transformer (paper: separate Transformers).

        h <- LN(x + MSA(x));   h <- LN(h + FFN(h))

    Bidirectional, ReLU, dropout on each sublayer's output (our reading).
    Returns h^(0) [..., L, D] in x's dtype.
    """
    acc = _accumulator(x)
    h = _zero_padding(x.to(acc), lengths)
    for i, layer in enumerate(_unpack(weights, acc)):
        w = layer[stream]
        mask_msa, mask_ffn = (None, None) if masks is None else masks[2 * i : 2 * i + 2]
        attended = attention(
            h, h, lengths, w.qkv_weight, w.qkv_bias, w.out_weight, w.out_bias, n_heads
        )
        h = _add_norm(h, attended, mask_msa, w.norm_weight[0], w.norm_bias[0])
        h = _add_norm(h, _ffn(h, w), mask_ffn, w.norm_weight[1], w.norm_bias[1])
    return _zero_padding(h, lengths).to(x.dtype)


class States(NamedTuple):
    """Every state of the reasoning; each entry is (search, recommendation), [..., L, D]."""

    h: list[Streams]  # K+1 entries: h^(0) .. h^(K), cross-attentive
    a: list[Streams]  # K entries: a^(1) .. a^(K), non-cross-attentive


def latent_reasoning(
    search: Tensor,  # [..., L_s, D] h_s^(0)
    rec: Tensor,  # [..., L_r, D] h_r^(0)
    search_lengths: Tensor,  # [...]
    rec_lengths: Tensor,  # [...]
    weights: ReasoningWeights,
    steps: int,
    *,
    n_heads: int,
    step_embedding: Tensor | None = None,  # [K, 2, D]
    update: str = "jacobi",
    cross_memory: str = "post_msa",
    masks: Streams | None = None,  # [3K, ..., L_s, D], [3K, ..., L_r, D]
) -> States:
    """Run K latent cross reasoning steps on both streams (paper: interleaved MSA and MCA).

    For each stream x with the other stream x' and g = 1 if x' has an event, else 0:

        a_x = LN1_x( h_x + MSA_x(h_x) )
        c_x = LN2_x( a_x + g * MCA_x(Q = a_x, K = V = a_x') )
        h_x <- LN3_x( c_x + FFN_x(c_x) )

    The equations are our reading, after the same authors' public systems. Step k uses weight
    set k, or set 0 if there is one set; a set with F = 0 has no FFN: h_x <- c_x. Switches:

    - ``update``: ``jacobi``, each stream reads the other's state from before the exchange;
      ``search_first`` / ``rec_first``, the second stream reads the first one's new h.
    - ``cross_memory``: MCA reads a_x' (``post_msa``), the step's input h_x' (``step_input``), or
      h_x'^(0) (``initial``, in both streams whatever the update).
    - ``step_embedding`` is added to the valid positions of the step's input (ReaRec).
    """
    acc = _accumulator(search)
    lengths = (search_lengths, rec_lengths)
    gates = tuple((n > 0).to(acc)[..., None, None] for n in lengths)  # [..., 1, 1]
    sets = _unpack(weights, acc)
    initial = (_zero_padding(search.to(acc), lengths[0]), _zero_padding(rec.to(acc), lengths[1]))

    def self_attend(x: int, h: Tensor, w: ReasoningWeights, mask: Tensor | None) -> Tensor:
        attended = attention(
            h, h, lengths[x], w.self_qkv_weight, w.self_qkv_bias,
            w.self_out_weight, w.self_out_bias, n_heads,
        )  # fmt: skip
        a = _add_norm(h, attended, mask, w.norm_weight[0], w.norm_bias[0])
        return _zero_padding(a, lengths[x])

    def cross_attend(x, a: Tensor, memory: Tensor, w: ReasoningWeights, masks) -> Tensor:
        attended = attention(
            a, memory, lengths[1 - x], w.cross_qkv_weight, w.cross_qkv_bias,
            w.cross_out_weight, w.cross_out_bias, n_heads,
        )  # fmt: skip
        c = _add_norm(a, gates[1 - x] * attended, masks[1], w.norm_weight[1], w.norm_bias[1])
        if w.ffn_in_weight.shape[0]:
            c = _add_norm(c, _ffn(c, w), masks[2], w.norm_weight[2], w.norm_bias[2])
        return _zero_padding(c, lengths[x])

    states = States([initial], [])
    h = initial
    for k in ranged_steps("reason step", steps):
        w = sets[min(k, len(sets) - 1)]
        m = [[None] * 3 if masks is None else masks[x][3 * k : 3 * k + 3] for x in (SEARCH, REC)]
        if step_embedding is not None:
            shifted = (h[x] + step_embedding[k, x].to(acc) for x in (SEARCH, REC))
            h_s, h_r = map(_zero_padding, shifted, lengths)
            h = (h_s, h_r)
        a_s, a_r = (self_attend(x, h[x], w[x], m[x][0]) for x in (SEARCH, REC))
        a = (a_s, a_r)

        memory = list({"post_msa": a, "step_input": h, "initial": initial}[cross_memory])
        new = list(h)
        for x in (REC, SEARCH) if update == "rec_first" else (SEARCH, REC):
            new[x] = cross_attend(x, a[x], memory[1 - x], w[x], m[x])
            if update != "jacobi" and cross_memory != "initial":
                memory[x] = new[x]
        h = (new[SEARCH], new[REC])
        states.h.append(h)
        states.a.append(a)
    h_all, a_all = ([(s.to(search.dtype), r.to(search.dtype)) for s, r in part] for part in states)
    return States(h_all, a_all)


def pool_steps(
    states: States,
    search_lengths: Tensor,  # [...]
    rec_lengths: Tensor,  # [...]
    keys: Tensor,  # [..., 2, D] W_x e_t of both streams
) -> Tensor:
    """Pool what each step made of both streams at one target: what TCL compares.

        alpha_j = softmax_j( h_j^T W_x e_t );   q_x(h) = sum_j alpha_j h_j     (0 without an event)

    Returns [..., K, 2, 2, D]: step, (a^(k), h^(k)), (search, rec).
    """

    def pool(pair: Streams) -> Tensor:
        pooled = []
        for x, lengths in ((SEARCH, search_lengths), (REC, rec_lengths)):
            h = _zero_padding(pair[x].to(_accumulator(pair[x])), lengths)  # [..., L, D]
            logits = keys[..., x, None, :].to(h.dtype) @ h.transpose(-1, -2)  # [..., 1, L]
            alpha = (logits + _key_bias(lengths, h.shape[-2], h.dtype)).softmax(-1)
            pooled.append((alpha @ h).squeeze(-2))
        return torch.stack(pooled, -2).to(pair[0].dtype)  # [..., 2, D]

    steps = [
        torch.stack((pool(a), pool(h)), -3) for a, h in zip(states.a, states.h[1:], strict=True)
    ]
    if not steps:
        return keys.new_zeros(*keys.shape[:-2], 0, 2, *keys.shape[-2:])
    return torch.stack(steps, -4)


def aggregate(
    states: Tensor,  # [..., L, D]
    lengths: Tensor,  # [...]
    candidates: Tensor,  # [..., C, D] item vectors
    target_weight: Tensor,  # [D, D] W_x
) -> tuple[Tensor, Tensor]:
    """Target-aware aggregation (paper) of one stream for every candidate.

        alpha_ij = softmax_j( h_j^T W e_i );   z(i) = sum_j alpha_ij h_j     (0 without an event)

    Computed as (E W^T) H^T, so a history is never repeated per candidate.
    Returns z [..., C, D] and alpha [..., C, L].
    """
    acc = _accumulator(states)
    h = _zero_padding(states.to(acc), lengths)
    keys = F.linear(candidates.to(acc), target_weight.to(acc))  # [..., C, D] W e_i
    logits = keys @ h.transpose(-1, -2) + _key_bias(lengths, h.shape[-2], acc)
    alpha = logits.softmax(-1)  # [..., C, L]
    return (alpha @ h).to(states.dtype), alpha.to(states.dtype)


def score(
    search: Tensor,  # [..., L_s, D] h_s^(K)
    rec: Tensor,  # [..., L_r, D] h_r^(K)
    search_lengths: Tensor,  # [...]
    rec_lengths: Tensor,  # [...]
    candidates: Tensor,  # [..., C, D] item vectors
    user: Tensor | None,  # [..., D] user vector
    weights: ScoringWeights,
    *,
    masks: tuple[Tensor, ...] = (),  # [..., C, H1], [..., C, H2]
) -> Tensor:
    """Score every candidate from both streams.

        y(i) = MLP( z_r(i); z_s(i); e_i; e_u )       ReLU, dropout after each hidden layer
        y(i) = (z_r(i) + z_s(i))^T e_i               if the weights hold no MLP
        y(i) = MLP(...) + (z_r(i) + z_s(i))^T e_i    if they hold one and ``dot`` (our reading)

    Returns [..., C] in the states' dtype.
    """
    acc = _accumulator(search)
    w_s, w_r = weights.target_weight
    z_s, _ = aggregate(search.to(acc), search_lengths, candidates, w_s)  # [..., C, D]
    z_r, _ = aggregate(rec.to(acc), rec_lengths, candidates, w_r)  # [..., C, D]
    items = candidates.to(acc)
    dot = ((z_r + z_s) * items).sum(-1) if weights.dot or not weights.mlp_weights else None
    if not weights.mlp_weights:
        assert dot is not None
        return dot.to(search.dtype)
    layers = [
        (w.to(acc), b.to(acc)) for w, b in zip(weights.mlp_weights, weights.mlp_biases, strict=True)
    ]
    w_in, b_in = layers[0]
    n_pair, n_item = 2 * items.shape[-1], 3 * items.shape[-1]
    # Trajectories share the item's part of the first layer, candidates share the user's.
    shared = F.linear(items, w_in[:, n_pair:n_item], b_in)  # [..., C, H1]
    if user is not None:
        shared = shared + F.linear(user.to(acc), w_in[:, n_item:]).unsqueeze(-2)
    x = F.linear(torch.cat((z_r, z_s), -1), w_in[:, :n_pair]) + shared  # [..., C, H1]
    for i, (w, b) in enumerate(layers[1:]):
        x = F.relu(x) if not masks else F.relu(x) * masks[i]
        x = F.linear(x, w, b)
    y = x.squeeze(-1)
    return (y if dot is None else y + dot).to(search.dtype)


def seen_bonus(
    candidates: Tensor,  # [B or 1, C] ids, 0 is padding
    seen: Streams,  # clicked ids [B, n_s] and ids of events [B, n_r], padded with 0
    bonus: Tensor,  # [2]
) -> Tensor:
    """Add up what candidates gain by standing in the histories (our reading): [B, C].

        bonus_s [i was clicked] + bonus_r [i is an event]

    The steps know the item of an event by the likeness of vectors alone, which is little where an
    item has few training events.
    """
    total = bonus.new_zeros(())
    for gain, items in zip(bonus, seen, strict=True):
        # One more column, of padding: no list is empty.
        ordered = F.pad(items, (1, 0)).sort(1).values
        wanted = candidates.expand(len(items), -1).contiguous()
        place = torch.searchsorted(ordered, wanted).clamp(max=ordered.shape[1] - 1)
        total = total + gain * ((ordered.gather(1, place) == wanted) & (wanted > 0))
    return total


def _catalogue_scores(
    search: Tensor, rec: Tensor, search_lengths: Tensor, rec_lengths: Tensor, items: Tensor,
    user: Tensor | None, weights: ScoringWeights,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Score all items but row 0 block by block: (ids [c], scores [B, c]), in order of id."""
    for first in range(1, len(items), _CATALOGUE_BLOCK):
        block = items[first : first + _CATALOGUE_BLOCK]
        ids = torch.arange(first, first + len(block), device=items.device)
        yield (
            ids,
            score(
                search, rec, search_lengths, rec_lengths, block.unsqueeze(0).to(search.dtype), user,
                weights,
            ),
        )  # fmt: skip


def _listed(ids: Tensor, exclude: Tensor) -> Tensor:
    """Mark which of the ids [c] each user excludes: [B, X] -> bool [B, c]."""
    column = exclude - ids[0]
    outside = (column < 0) | (column >= len(ids))
    # A spare last column takes what lies outside this block.
    marks = torch.zeros(len(exclude), len(ids) + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter(1, column.masked_fill(outside, len(ids)), True)[:, :-1]


def score_topk(
    search: Tensor,  # [B, L_s, D]
    rec: Tensor,  # [B, L_r, D]
    search_lengths: Tensor,  # [B]
    rec_lengths: Tensor,  # [B]
    items: Tensor,  # [I + 1, D], row 0 is padding
    user: Tensor | None,  # [B, D]
    weights: ScoringWeights,
    k: int,
    exclude: Tensor,  # [B, X] ids; those outside 1..I are nothing
) -> tuple[Tensor, Tensor]:
    """Find the k best items of the catalogue for every user: ids [B, k] and scores [B, k].

    The best first, of equal scores the lower id; excluded items and scores of -inf do not count.
    What is missing is id 0 with score -inf. A user with a NaN score gets NaN scores.
    """
    B = len(search)
    top_ids = torch.zeros(B, k, dtype=torch.int64, device=search.device)
    top = torch.full((B, k), -torch.inf, dtype=search.dtype, device=search.device)
    bad = torch.zeros(B, 1, dtype=torch.bool, device=search.device)
    for ids, scores in _catalogue_scores(
        search, rec, search_lengths, rec_lengths, items, user, weights
    ):
        bad = bad | scores.isnan().any(1, keepdim=True)
        scores = scores.masked_fill(_listed(ids, exclude), -torch.inf)
        # Stable: earlier columns, which hold lower ids, win ties.
        merged, order = torch.cat((top, scores), 1).sort(dim=1, descending=True, stable=True)
        pool = torch.cat((top_ids, ids.expand(B, -1)), 1)
        top, top_ids = merged[:, :k], pool.gather(1, order[:, :k])
    return top_ids.masked_fill(top == -torch.inf, 0), top.masked_fill(bad, torch.nan)


def score_rank(
    search: Tensor,  # [B, L_s, D]
    rec: Tensor,  # [B, L_r, D]
    search_lengths: Tensor,  # [B]
    rec_lengths: Tensor,  # [B]
    items: Tensor,  # [I + 1, D], row 0 is padding
    user: Tensor | None,  # [B, D]
    weights: ScoringWeights,
    target: Tensor,  # [B] ids
    bonus: Tensor,  # [B] added to the target's score alone
    exclude: Tensor,  # [B, X] ids; those outside 1..I are nothing
) -> Tensor:
    """Find the target's place among all items, from 1, ties before it: [B], -1 for a NaN score.

    1 + the number of other items, neither excluded nor of score -inf, that score at least as high.
    Two passes: a product of another shape may round the target's score differently.
    """
    arguments = (search, rec, search_lengths, rec_lengths, items, user, weights)
    goal = target.unsqueeze(1)  # [B, 1]
    of_target = torch.full_like(goal, -torch.inf, dtype=search.dtype)
    bad = torch.zeros_like(target, dtype=torch.bool)
    for ids, scores in _catalogue_scores(*arguments):
        found = (ids == goal).any(1)
        value = scores.gather(1, (goal - ids[0]).clamp(0, len(ids) - 1))
        of_target = torch.where(found.unsqueeze(1), value, of_target)
        bad = bad | scores.isnan().any(1)
    of_target = of_target + bonus.unsqueeze(1)
    ahead = torch.zeros_like(target)
    for ids, scores in _catalogue_scores(*arguments):
        competes = ~_listed(ids, torch.cat((exclude, goal), 1)) & (scores > -torch.inf)
        ahead += (competes & (scores >= of_target)).sum(1)
    return (ahead + 1).masked_fill(bad, -1)


RANKING_KINDS = ("hr", "ndcg", "ndcg_exp", "mrr", "recall", "precision", "map", "rank")
TIES = ("pessimistic", "optimistic", "average")


def parse_metric(name: str) -> tuple[str, int]:
    """Split ``"ndcg@10"`` into ``("ndcg", 10)``; without a cut-off the number is 0.

    ``mrr``, ``map``, ``ndcg`` and ``ndcg_exp`` without ``@`` are over the whole list; ``rank`` has
    no cut-off. Any other name is a ValueError.
    """
    kind, at, k = name.partition("@")
    whole = kind in ("mrr", "map", "ndcg", "ndcg_exp", "rank") and not at
    cut = kind in RANKING_KINDS and kind != "rank" and k.isdecimal() and int(k) > 0
    if not (whole or cut):
        raise ValueError(
            f"metric {name!r} is unknown: expected hr@k, ndcg@k, ndcg_exp@k, mrr@k, recall@k, "
            "precision@k or map@k with k > 0, or mrr, map, ndcg, ndcg_exp or rank"
        )
    return kind, int(k) if at else 0


def parse_reward(name: str) -> tuple[tuple[float, str], ...]:
    """Split ``"0.5*hr@1 + 0.5*ndcg@10"`` into ((0.5, "hr@1"), (0.5, "ndcg@10")).

    A term is hr@k, ndcg@k or mrr, with a positive weight before it or without one (1). Anything
    else is a ValueError.
    """
    terms = []
    for term in name.split("+"):
        weight, times, metric = term.rpartition("*")
        metric = metric.strip()
        try:
            value = float(weight) if times else 1.0
            kind, cut = parse_metric(metric)
        except ValueError:
            value, kind, cut = 0.0, "", 0
        rewarding = (kind in ("hr", "ndcg") and cut) or metric == "mrr"
        if not rewarding or not 0 < value < float("inf"):
            raise ValueError(
                f"reward must be hr@k, ndcg@k, mrr or a sum of them with positive weights, such as "
                f"0.5*hr@1+0.5*ndcg@10, got {name!r}"
            )
        terms.append((value, metric))
    return tuple(terms)


def ranking_metrics(
    scores: Tensor,
    target: Tensor | None,
    *,
    relevance: Tensor | None,
    metrics: tuple[str, ...],
    counts: Tensor | None,
    excluded: Tensor | None,
    ties: str,
) -> dict[str, Tensor]:
    """Ranking metrics of every row of ``scores`` [..., C], in float64, by sorting the lists.

    The contract is that of :func:`lcr_fast.ranking_metrics`, except that ``target`` and ``counts``
    have exactly the leading shape, ``relevance`` and ``excluded`` that of ``scores``, and that a
    row with a NaN candidate, a target out of range or an impossible count becomes NaN.

    A list with ties has many orders. Under ``average`` every metric is its expectation over them,
    with the closed forms of McSherry and Najork (ECIR 2008): in a group of n tied items, p of them
    relevant, after a others, each place holds a relevant item with probability p / n.
    """
    C = scores.shape[-1]
    zero = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)  # (..., C)
    index = torch.arange(C, device=scores.device)  # (C,)
    n_candidates = torch.full(scores.shape[:-1], C, device=scores.device)  # (...)
    bad = torch.zeros_like(n_candidates, dtype=torch.bool)  # (...)
    if counts is not None:
        bad = bad | (counts < 0) | (counts > C)
        n_candidates = counts
    inside = index < n_candidates.unsqueeze(-1)  # (..., C)
    if target is not None:
        bad = bad | (target < -1) | (target >= n_candidates)
        grade = (index == target.unsqueeze(-1)).double()
    else:
        assert relevance is not None
        grade = relevance.double()
    grade = torch.where(inside & (grade > 0), grade, zero)
    candidate = inside if excluded is None else inside & ~excluded | (grade > 0)
    has_relevant = (grade > 0).any(-1)  # (...)
    bad = bad | has_relevant & (scores.isnan() & candidate).any(-1)

    # Candidates first, best score first, tied items by the rule: stable sorts, last key first.
    order = grade.argsort(dim=-1, descending=ties == "optimistic", stable=True)
    for key in (scores, candidate.byte()):
        order = order.gather(
            -1, key.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
        )
    score, grade, candidate = (t.gather(-1, order) for t in (scores, grade, candidate))
    relevant = (grade > 0).double()
    place = (index + 1).double().expand_as(zero)

    if ties == "average":
        new = (score[..., 1:] != score[..., :-1]) | (candidate[..., 1:] != candidate[..., :-1])
        new = torch.cat([torch.ones_like(candidate[..., :1]), new], -1)
        group = new.long().cumsum(-1) - 1
        above = torch.where(new, place - 1, zero).cummax(-1).values if C else zero

        def over_group(values: Tensor) -> Tensor:
            return zero.scatter_add(-1, group, values).gather(-1, group)
    else:
        above = place - 1

        def over_group(values: Tensor) -> Tensor:
            return values

    n, p = over_group(zero + 1), over_group(relevant)  # (..., C), of the group at each place
    chance = p / n
    inner = place - above - 1
    relevant_above = torch.nn.functional.pad(relevant.cumsum(-1), (1, 0)).gather(-1, above.long())
    precision = chance * (relevant_above + 1 + inner * (p - 1) / (n - 1).clamp(min=1)) / place
    stays_empty = torch.where(p > 0, (n - p - inner).clamp(min=0) / (n - inner), zero + 1)
    empty = torch.nn.functional.pad(stays_empty.cumprod(-1), (1, 0), value=1.0)
    first = empty[..., :-1] - empty[..., 1:]  # the chance that the first relevant item is here
    n_relevant = relevant.sum(-1)  # (...)
    ideal = grade.sort(-1, descending=True).values

    def gain(grade: Tensor, kind: str) -> Tensor:
        return torch.exp2(grade) - 1 if kind == "ndcg_exp" else grade

    values = {}
    for name in metrics:
        kind, k = parse_metric(name)
        within = (place <= (k or C)).double()
        discount = within / torch.log2(place + 1)
        if kind == "hr":
            value = (first * within).sum(-1)
        elif kind == "mrr":
            value = (first / place * within).sum(-1)
        elif kind == "rank":
            # The first of p among n shuffled items stands, on average, at (n + 1) / (p + 1). One
            # term is not 0, so no order of the sum can change a bit.
            leads = relevant * (relevant.cumsum(-1) == 1)
            value = (leads * (above + (n + 1) / (p + 1))).sum(-1)
        elif kind == "precision":
            value = (chance * within).sum(-1) / k
        elif kind == "recall":
            value = (chance * within).sum(-1) / n_relevant
        elif kind == "map":
            value = (precision * within).sum(-1) / n_relevant
        else:
            gains = over_group(gain(grade, kind)) / n
            value = (gains * discount).sum(-1) / (gain(ideal, kind) * discount).sum(-1)
        value = torch.where(has_relevant, value, torch.zeros_like(value))
        values[name] = torch.where(bad, torch.full_like(value, torch.nan), value)
    return values


def catalogue_metrics(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    metrics: tuple[str, ...],
    seen: Tensor | None,
    ties: str,
) -> dict[str, Tensor]:
    """Metrics of ``target`` [B] among all ``items`` [I, d] scored by ``users`` [B, d], in float64.

    Stores all scores [B, I]. The sum over d is in order, not a matrix product: that may sum equal
    vectors in different orders, depending on where they stand, and so break ties.
    """
    acc = torch.promote_types(users.dtype, torch.float32)
    scores = torch.zeros(len(users), len(items), dtype=acc, device=users.device)  # (B, I)
    for user, item in zip(users.to(acc).unbind(-1), items.to(acc).unbind(-1), strict=True):
        scores = scores + user.unsqueeze(-1) * item
    excluded = None
    if seen is not None:
        n_items = items.shape[0]
        seen = torch.where(seen < 0, n_items, seen)  # one more column collects the padding
        excluded = torch.zeros(len(users), n_items + 1, dtype=torch.bool, device=users.device)
        excluded = excluded.scatter(-1, seen.clamp(max=n_items), True)[:, :n_items]
        excluded = excluded & ~scores.isnan()  # a NaN is an error wherever it stands
    return ranking_metrics(
        scores,
        target,
        relevance=None,
        metrics=metrics,
        counts=None,
        excluded=excluded,
        ties=ties,
    )
