"""The latent cross reasoning steps, and what is read from their states at a target."""

from typing import NamedTuple

import torch
from torch import Tensor

from lcr_fast.profiling import ranged_steps
from lcr_fast.reference.transformer import (
    Streams,
    accumulator,
    add_norm,
    attention,
    ffn,
    key_bias,
    unpack,
    zero_padding,
)
from lcr_fast.weights import REC, SEARCH, ReasoningWeights


class Steps(NamedTuple):
    """How the reasoning runs."""

    n_steps: int  # K
    n_heads: int
    embedding: Tensor | None = None  # [K, 2, D]
    update: str = "jacobi"  # one of config.Update
    cross_memory: str = "post_msa"  # one of config.CrossMemory

    def step(self, k: int) -> "Steps":
        """Step k alone, from 0, as a reasoning of its own.

        Raises ValueError where every step reads the state before the first one.
        """
        if self.cross_memory == "initial":
            raise ValueError("cross_memory=initial reads h^(0) in every step: none stands alone")
        embedding = None if self.embedding is None else self.embedding[k : k + 1]
        return self._replace(n_steps=1, embedding=embedding)


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
    steps: Steps,
    *,
    masks: Streams | None = None,  # [3K, ..., L_s, D], [3K, ..., L_r, D]
) -> States:
    """Run K latent cross reasoning steps on both streams (paper: interleaved MSA and MCA).

    For each stream x with the other stream x' and g = 1 if x' has an event, else 0:

        a_x = LN1_x( h_x + MSA_x(h_x) )
        c_x = LN2_x( a_x + g * MCA_x(Q = a_x, K = V = a_x') )
        h_x <- LN3_x( c_x + FFN_x(c_x) )

    The equations are our reading, after the same authors' public systems. Step k uses weight
    set k, or set 0 if there is one set; a set with F = 0 has no FFN: h_x <- c_x. Switches of
    ``steps``:

    - ``update``: ``jacobi``, each stream reads the other's state from before the exchange;
      ``search_first`` / ``rec_first``, the second stream reads the first one's new h.
    - ``cross_memory``: MCA reads a_x' (``post_msa``), the step's input h_x' (``step_input``), or
      h_x'^(0) (``initial``, in both streams whatever the update).
    - ``embedding`` [K, 2, D] is added to the valid positions of the step's input (ReaRec).
    """
    acc = accumulator(search)
    lengths = (search_lengths, rec_lengths)
    gates = tuple((n > 0).to(acc)[..., None, None] for n in lengths)  # [..., 1, 1]
    sets = unpack(weights, acc)
    initial = (zero_padding(search.to(acc), lengths[0]), zero_padding(rec.to(acc), lengths[1]))

    def self_attend(x: int, h: Tensor, w: ReasoningWeights, mask: Tensor | None) -> Tensor:
        attended = attention(
            h, h, lengths[x], w.self_qkv_weight, w.self_qkv_bias,
            w.self_out_weight, w.self_out_bias, steps.n_heads,
        )  # fmt: skip
        a = add_norm(h, attended, mask, w.norm_weight[0], w.norm_bias[0])
        return zero_padding(a, lengths[x])

    def cross_attend(x, a: Tensor, memory: Tensor, w: ReasoningWeights, masks) -> Tensor:
        attended = attention(
            a, memory, lengths[1 - x], w.cross_qkv_weight, w.cross_qkv_bias,
            w.cross_out_weight, w.cross_out_bias, steps.n_heads,
        )  # fmt: skip
        c = add_norm(a, gates[1 - x] * attended, masks[1], w.norm_weight[1], w.norm_bias[1])
        if w.ffn_in_weight.shape[0]:
            c = add_norm(c, ffn(c, w), masks[2], w.norm_weight[2], w.norm_bias[2])
        return zero_padding(c, lengths[x])

    states = States([initial], [])
    h = initial
    for k in ranged_steps("reason step", steps.n_steps):
        w = sets[min(k, len(sets) - 1)]
        m = [[None] * 3 if masks is None else masks[x][3 * k : 3 * k + 3] for x in (SEARCH, REC)]
        if steps.embedding is not None:
            shifted = (h[x] + steps.embedding[k, x].to(acc) for x in (SEARCH, REC))
            h_s, h_r = map(zero_padding, shifted, lengths)
            h = (h_s, h_r)
        a_s, a_r = (self_attend(x, h[x], w[x], m[x][0]) for x in (SEARCH, REC))
        a = (a_s, a_r)

        memory = list({"post_msa": a, "step_input": h, "initial": initial}[steps.cross_memory])
        new = list(h)
        for x in (REC, SEARCH) if steps.update == "rec_first" else (SEARCH, REC):
            new[x] = cross_attend(x, a[x], memory[1 - x], w[x], m[x])
            if steps.update != "jacobi" and steps.cross_memory != "initial":
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
            h = zero_padding(pair[x].to(accumulator(pair[x])), lengths)  # [..., L, D]
            logits = keys[..., x, None, :].to(h.dtype) @ h.transpose(-1, -2)  # [..., 1, L]
            alpha = (logits + key_bias(lengths, h.shape[-2], h.dtype)).softmax(-1)
            pooled.append((alpha @ h).squeeze(-2))
        return torch.stack(pooled, -2).to(pair[0].dtype)  # [..., 2, D]

    steps = [
        torch.stack((pool(a), pool(h)), -3) for a, h in zip(states.a, states.h[1:], strict=True)
    ]
    if not steps:
        return keys.new_zeros(*keys.shape[:-2], 0, 2, *keys.shape[-2:])
    return torch.stack(steps, -4)
