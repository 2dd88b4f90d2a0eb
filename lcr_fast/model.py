"""LCRSER: embed -> encode -> reason -> aggregate and score; thin modules over the ops."""

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcr_fast import reference
from lcr_fast.batch import Batch, read_items, seen_items
from lcr_fast.config import LCRConfig
from lcr_fast.ops import lookup, reasoning, scoring
from lcr_fast.ops._op import INTEGERS, Case, Op
from lcr_fast.ops._triton import ptxas_in_use
from lcr_fast.ops.adaptive import adaptive_reasoning
from lcr_fast.ops.noise import Dropout, Noise
from lcr_fast.ops.reasoning import Reasoned
from lcr_fast.parameters import (
    Head,
    Packed,
    encoder_shapes,
    reasoning_shapes,
    require_gathered,
)
from lcr_fast.precision import autocast_dtype, without_autocast
from lcr_fast.profiling import ranged
from lcr_fast.reference import Exits, States, Steps, Streams
from lcr_fast.storage import load_tensors, save_tensors
from lcr_fast.weights import REC, SEARCH, EncoderWeights, ReasoningWeights, ScoringWeights

_KIND = "model"
_TABLE_BLOCK = 1 << 16  # items whose text is projected at once


class LCRSER(nn.Module):
    """The LCR-SER model (arXiv 2508.04152), phase-1 forward and noisy rollouts.

    ``model(batch)`` scores the batch's candidates, [B, C]; candidate 0 (padding) scores -inf.
    Row 0 of the item and the query (or term) table stands for padding and is 0: own first values
    must leave it so. Raises ValueError on ids, lengths or widths that do not fit the config, and
    in training where row 0 is not 0. Under ``torch.autocast`` float32 states are cast to its
    dtype, which is that of the scores too; weights stay float32.
    """

    def __init__(self, config: LCRConfig) -> None:
        super().__init__()
        self.config = config
        d = config.dim

        def table(n_rows: int, text_dim: int = 0) -> nn.Embedding:
            embedding = nn.Embedding(n_rows + 1, d, padding_idx=0)
            # Beside text vectors an id's own vector starts as a small correction.
            nn.init.normal_(embedding.weight, std=(0.1 if text_dim else 1.0) * d**-0.5)
            with torch.no_grad():
                embedding.weight[0].zero_()
            return embedding

        self.item_embedding = table(config.n_items, config.item_text_dim)
        self.user_embedding = table(config.n_users) if config.user_embedding else None
        n_query_rows = config.n_terms if config.query_encoder == "terms" else config.n_queries
        self.query_embedding = table(n_query_rows, config.query_text_dim)
        self.search_position = nn.Parameter(torch.randn(config.max_search_len, d) * 0.02)
        self.rec_position = nn.Parameter(torch.randn(config.max_rec_len, d) * 0.02)
        self.item_text_projection = self._text_projection(config.item_text_dim)
        self.query_text_projection = self._text_projection(config.query_text_dim)
        self.register_buffer("item_text", None, persistent=False)
        self.register_buffer("query_text", None, persistent=False)

        self.encoder = Packed(EncoderWeights, encoder_shapes(config))
        self.reasoning = Packed(ReasoningWeights, reasoning_shapes(config))
        self.step_embedding = (
            nn.Parameter(torch.zeros(config.steps, 2, d)) if config.step_embedding else None
        )
        self.head = Head(config)
        #: Key of the dropout masks in training mode, an int or int64 [] on the model's device; a
        #: trainer sets a new one every step. torch.compile compiles anew for each int, and with
        #: fullgraph soon refuses: give it a tensor, and overwrite that (``fill_``) or set another.
        self.dropout_seed: int | Tensor = 0
        #: Fingerprint of the prepared data whose ids the model knows; saved with it.
        self.data_fingerprint: str | None = None
        #: Name of those ids in their order: data that goes on with them has others behind.
        self.vocabulary: str | None = None
        #: When a user leaves before K steps, in evaluation mode; saved with the model.
        self.exits: Exits | None = None
        #: Told the steps [B] of each user of a batch where ``exits`` decide them.
        self.on_steps: Callable[[Tensor], None] | None = None
        # An explicit backend that cannot serve this model must fail here, not mid-training.
        if config.backend != "auto":
            self._choices("cuda" if config.backend == "triton" else "cpu")

    def _text_projection(self, text_dim: int) -> nn.Linear | None:
        if not text_dim:
            return None
        projection = nn.Linear(text_dim, self.config.dim, bias=False)
        # The identity keeps similar texts similar, across items and queries too.
        nn.init.eye_(projection.weight)
        return projection

    def _dropout(self, batch: Batch) -> Dropout | None:
        if not self.training or not self.config.dropout:
            return None
        return Dropout(self.config.dropout, self.dropout_seed, batch.row)

    # -- inputs ---------------------------------------------------------------------------------

    def set_text(self, item_text: Any = None, query_text: Any = None) -> None:
        """Attach frozen text vectors, [I+1, item_text_dim] and [Q+1, query_text_dim], row 0 unused.

        Tensors or arrays, memory-mapped ones too; not saved with the model. A model whose config
        names a text width needs them before its first forward.
        """
        rows = {"item": self.config.n_items, "query": self.config.n_queries}
        for kind, given in (("item", item_text), ("query", query_text)):
            width = getattr(self.config, f"{kind}_text_dim")
            if given is None:
                continue
            if not isinstance(given, (Tensor, np.ndarray)):
                raise ValueError(
                    f"{kind}_text must be a tensor or an array, got {type(given).__name__}"
                )
            of_numbers = (
                given.dtype.kind in "fiu"
                if isinstance(given, np.ndarray)
                else not given.is_complex() and given.dtype != torch.bool
            )
            if not of_numbers:
                raise ValueError(f"{kind}_text must hold real numbers, got {given.dtype}")
            expected = (rows[kind] + 1, width)
            if not width or tuple(given.shape) != expected:
                raise ValueError(
                    f"{kind}_text must be {list(expected)}, got {list(given.shape)}"
                    + ("" if width else f" (the config has {kind}_text_dim=0)")
                )
            setattr(self, f"{kind}_text", _text_tensor(given).to(self.head.target_weight.device))

    def _text(self, kind: str, ids: Tensor) -> Tensor:
        table, projection = getattr(self, f"{kind}_text"), getattr(self, f"{kind}_text_projection")
        if table is None:
            raise ValueError(
                f"the config has {kind}_text_dim={projection.in_features}: call "
                f"set_text({kind}_text=...) first"
            )
        # Row 0 may hold anything, so it must not enter the projection's gradient either.
        # A layer that torch quantized has a method for its weight, and takes float32.
        vectors = table[ids].to(getattr(projection.weight, "dtype", torch.float32))
        return projection(vectors.masked_fill((ids == 0).unsqueeze(-1), 0.0))

    def item_vectors(self, ids: Tensor) -> Tensor:
        """Item vectors e_i: ids [...] -> [..., D]; id 0 is the zero vector."""
        vectors = self.item_embedding(ids)
        if self.item_text_projection is not None:
            vectors = vectors + self._text("item", ids).to(vectors.dtype)
        return vectors

    def query_vectors(self, queries: Tensor, terms: Tensor) -> Tensor:
        """Query vectors: ids [...], terms [..., T] -> [..., D] (the mean of the terms)."""
        if self.config.query_encoder == "id":
            vectors = self.query_embedding(queries)
        else:
            vectors = _masked_mean(self.query_embedding(terms), terms > 0)
        if self.query_text_projection is not None:
            vectors = vectors + self._text("query", queries).to(vectors.dtype)
        return vectors

    def user_vectors(self, users: Tensor) -> Tensor | None:
        """User vectors e_u [B, D], or None where the config has no user embedding."""
        return None if self.user_embedding is None else self.user_embedding(users)

    @ranged("embed")
    def embed(self, batch: Batch) -> Streams:
        """Input vectors of both streams: [B, L_s, D], [B, L_r, D]."""
        config = self.config
        require_gathered(self.item_embedding.weight)
        tables = (
            self.query_embedding.weight, self.item_embedding.weight, self.search_position,
            self.rec_position,
        )  # fmt: skip
        sparse = self._is_sparse and torch.is_grad_enabled()
        chosen = self._choose(lookup.EMBED, tables[0], sparse=sparse, text=self._has_text)
        if chosen != "reference":
            of_terms = config.query_encoder == "terms"
            terms = batch.search_terms if of_terms else batch.search_queries.unsqueeze(-1)
            ids = (terms, batch.search_clicks, batch.rec_items)
            return lookup.embed(chosen, lookup.Embed(*ids, *tables, config.max_clicks))
        queries = self.query_vectors(batch.search_queries, batch.search_terms)
        clicked = batch.search_clicks[..., : config.max_clicks]
        clicks = _masked_mean(self.item_vectors(clicked), clicked > 0)
        search = queries + clicks + self.search_position[: queries.shape[1]]
        items = self.item_vectors(batch.rec_items)
        return search, items + self.rec_position[: items.shape[1]]

    def check_padding(self) -> None:
        """Raise ValueError if row 0 of the item or query table, which is padding, is not 0.

        Sums over clicks and terms count on it, and every kernel its own way. Training leaves it as
        it is. On a GPU this synchronises.
        """
        for name in ("item_embedding", "query_embedding"):
            if torch.count_nonzero(getattr(self, name).weight[0]):
                raise ValueError(
                    f"row 0 of {name}.weight stands for padding and must be 0: set it to 0 after "
                    "giving the table values"
                )

    def check(self, batch: Batch) -> None:
        """Raise ValueError, naming the field, if the batch does not fit the config.

        In training mode also where :meth:`check_padding` does. ``forward`` does so by itself for
        CPU tensors; on a GPU this synchronises, so call it where batches are made.
        """
        if self.training:  # requests are spared it: models are checked where they come from
            self.check_padding()
        config = self.config
        for name, limit in config.largest_ids.items():
            ids = getattr(batch, name)
            if ids.numel():
                low, high = (int(v) for v in torch.aminmax(ids))
                if low < 0 or high > limit:
                    raise ValueError(
                        f"{name} must be ids in 0..{limit}, got {low if low < 0 else high}"
                    )
        for name, events in (("search", batch.search_queries), ("rec", batch.rec_items)):
            lengths, size = getattr(batch, f"{name}_lengths"), events.shape[1]
            allowed = getattr(config, f"max_{name}_len")
            if size > allowed:
                raise ValueError(
                    f"{name} histories hold {size} events, but max_{name}_len is {allowed}"
                )
            if len(lengths) and (int(lengths.min()) < 0 or int(lengths.max()) > size):
                raise ValueError(
                    f"{name}_lengths must be in 0..{size}, got {int(lengths.min())}.."
                    f"{int(lengths.max())}"
                )
        if len(batch):
            low, high = (int(v) for v in torch.aminmax(batch.target))
            if low < -1 or high >= batch.candidates.shape[1]:
                raise ValueError(
                    f"target must be a column of candidates, below {batch.candidates.shape[1]}, or "
                    f"-1 for none, got {low if low < -1 else high}"
                )

    # -- stages ---------------------------------------------------------------------------------

    @ranged("encode")
    def encode(self, batch: Batch) -> Streams:
        """Encode both histories: h^(0), [B, L_s, D] and [B, L_r, D]."""
        if batch.user.is_cpu and not torch.compiler.is_compiling():
            self.check(batch)
        return reasoning.encode(
            *self.embed(batch),
            batch.search_lengths,
            batch.rec_lengths,
            self.encoder.weights(),
            n_heads=self.config.n_heads,
            dropout=self._dropout(batch),
            backend=reasoning.ENCODE.of_model(self.config.backend),
        )

    @property
    def _has_text(self) -> bool:
        return bool(self.config.item_text_dim or self.config.query_text_dim)

    @property
    def _is_sparse(self) -> bool:
        return self.item_embedding.sparse or self.query_embedding.sparse

    def _choose(self, op: Op, of: Tensor, **flags: bool) -> str:
        """Choose what serves a lookup on a tensor's device, in its dtype."""
        case = lookup.LookupCase(of.device.type, of.dtype, **flags)
        return op.choose(op.of_model(self.config.backend, case), case)

    def _steps(self) -> Steps:
        config = self.config
        return Steps(
            config.steps, config.n_heads, self.step_embedding, config.update, config.cross_memory
        )

    @ranged("reason")
    def reason(self, h0: Streams, batch: Batch, target: Tensor | None = None) -> Reasoned:
        """Run the K reasoning steps from h^(0): what the aggregation reads, [B, L, D].

        With item vectors ``target`` [B, D] also what each step's states pool to at them. In
        evaluation mode and without them a model with ``exits`` takes as many steps as they say.
        """
        if self.exits is not None and not self.training and target is None:
            adapted = adaptive_reasoning(
                *h0, batch.search_lengths, batch.rec_lengths, self.reasoning.weights(),
                self._steps(), self.exits, backend=self.config.backend,
            )  # fmt: skip
            if self.on_steps is not None:
                self.on_steps(adapted.taken)
            return Reasoned(*self.read(h0, (adapted.search, adapted.rec)), None)
        reasoned = reasoning.latent_reasoning(
            *h0, batch.search_lengths, batch.rec_lengths, self.reasoning.weights(), self._steps(),
            target_keys=None if target is None else self.target_keys(target).to(h0[0].dtype),
            dropout=self._dropout(batch), backend=self.config.backend,
        )  # fmt: skip
        return Reasoned(*self.read(h0, reasoned.streams), reasoned.pooled)

    def reason_by_step(
        self, h0: Streams, batch: Batch, target: Tensor | None = None
    ) -> list[Reasoned]:
        """Run the K steps one by one: what the aggregation reads after 1 to K of them, [B, L, D].

        Each entry as :meth:`reason` gives it, ``pooled`` of its own step; without dropout the last
        one's states are the same bits. With dropout every step has masks of a seed of its own.
        """
        keys = None if target is None else self.target_keys(target).to(h0[0].dtype)
        weights, steps, dropout = self.reasoning.weights(), self._steps(), self._dropout(batch)
        h, found = h0, []
        for k in range(self.config.steps):
            reasoned = reasoning.latent_reasoning(
                *h, batch.search_lengths, batch.rec_lengths, weights.step(k), steps.step(k),
                target_keys=keys, backend=self.config.backend,
                dropout=None if dropout is None else dropout.again(k),
            )  # fmt: skip
            h = reasoned.streams
            found.append(Reasoned(*self.read(h0, h), reasoned.pooled))
        return found

    def read(self, h0: Streams, h: Streams) -> Streams:
        """Give what the aggregation reads: (1 - s) h^(0) + s h^(K), s the config's ``readout``.

        The paper's is s = 1. Less keeps more of the events' identity, which K post-norm steps blur
        (our reading). Trajectories, [B, N, L, D], share the h^(0) without noise.
        """
        share = self.config.readout
        if share == 1 or not self.config.steps:
            return h
        # Under autocast h^(K) may be in halves where h^(0) is not.
        search, rec = (_align(a, b).to(b.dtype).lerp(b, share) for a, b in zip(h0, h, strict=True))
        return search, rec

    def target_keys(self, vectors: Tensor) -> Tensor:
        """W_x e of both streams, at which states are pooled: [B, D] -> [B, 2, D]."""
        return torch.einsum("xij,bj->bxi", self.head.target_weight, vectors)

    def cross_attention(self, states: States, batch: Batch) -> list[Streams]:
        """Recompute where each step's cross-attention looks, for analysis; K pairs (search, rec).

        An entry holds the probabilities of that stream's queries over the other stream's events,
        [..., H, L, L_other]; meaningless where the other stream is empty.
        """
        config, lengths = self.config, (batch.search_lengths, batch.rec_lengths)
        second = {"jacobi": None, "search_first": REC, "rec_first": SEARCH}[config.update]
        weights = self.reasoning.weights()
        looks = []
        for k, a in enumerate(states.a):
            p = min(k, weights.cross_qkv_weight.shape[0] - 1)
            before = states.h[k]
            if self.step_embedding is not None:
                shift_s, shift_r = self.step_embedding[k]
                before = (before[SEARCH] + shift_s, before[REC] + shift_r)
            read = {"post_msa": a, "step_input": before, "initial": states.h[0]}
            pair = []
            for x in (SEARCH, REC):
                late = x == second and config.cross_memory != "initial"
                memory = (states.h[k + 1] if late else read[config.cross_memory])[1 - x]
                pair.append(
                    reference.attention_probabilities(
                        a[x],
                        memory,
                        _align(lengths[1 - x], a[x]),
                        weights.cross_qkv_weight[p, x],
                        weights.cross_qkv_bias[p, x],
                        config.n_heads,
                    )
                )
            looks.append((pair[SEARCH], pair[REC]))
        return looks

    @ranged("rollout")
    def rollout(
        self, h0: Streams, batch: Batch, n_trajectories: int, noise_scale: float, seed: int | Tensor
    ) -> Reasoned:
        """Reason from N noisy copies of h^(0) (paper, Eq. 14): what is read, [B, N, L, D]."""
        reasoned = reasoning.latent_reasoning(
            *h0, batch.search_lengths, batch.rec_lengths, self.reasoning.weights(), self._steps(),
            noise=Noise(n_trajectories, noise_scale, seed, batch.row), backend=self.config.backend,
        )  # fmt: skip
        return Reasoned(*self.read(h0, reasoned.streams), None)

    def score(self, h: Streams, batch: Batch, candidates: Tensor | None = None) -> Tensor:
        """Score candidates (default: the batch's) from final states.

        States [B, L, D] give [B, C]; states [B, N, L, D] of N trajectories give [B, N, C], without
        dropout, as :meth:`rollout`.
        """
        ids = batch.candidates if candidates is None else candidates  # [B, C]
        if self.item_text_projection is None:
            table, places = self.item_embedding.weight, ids
            if self.item_embedding.sparse and torch.is_grad_enabled():
                # The gradient of a table has its size: here, of the rows alone that are scored.
                rows, places = ids.unique(return_inverse=True)
                table = self.item_embedding(rows)
            scores = self._score(h, batch, table, places)
        else:
            scores = self._score(h, batch, self.item_vectors(ids), None)
        return self.finish(scores, batch, ids)

    def pool(
        self, states: Tensor, lengths: Tensor, candidates: Tensor, stream: int
    ) -> tuple[Tensor, Tensor]:
        """Pool one stream at item vectors [B, C, D]: z [B, C, D] and alpha [B, C, L]."""
        weight = self.head.target_weight[stream]
        return reference.aggregate(states, lengths, candidates, weight)

    def score_vectors(self, h: Streams, batch: Batch, vectors: Tensor) -> Tensor:
        """Score the batch's candidates by their item vectors [B, C, D]: [B, (N,) C].

        As :meth:`score` without ``candidates``, for vectors that are at hand already.
        """
        return self.finish(self._score(h, batch, vectors, None), batch, batch.candidates)

    def finish(self, scores: Tensor, batch: Batch, ids: Tensor) -> Tensor:
        """Add the bonus of seen items, and set padding to -inf; scores [B, (N,) C]."""
        if (gains := self.head.seen_bonus) is not None:
            chosen = self._choose(lookup.SEEN_BONUS, scores)
            if chosen != "reference":
                call = lookup.SeenBonus(
                    scores if scores.ndim == 3 else scores.unsqueeze(1), ids, batch.search_clicks,
                    batch.search_lengths, batch.rec_items, batch.rec_lengths, gains,
                    float(self.config.dim), self.config.max_clicks,
                )  # fmt: skip
                return lookup.SEEN_BONUS(chosen, call).view(scores.shape)
        bonus, padding = self._bonus(batch, ids), ids == 0
        if scores.ndim == 3:
            bonus, padding = None if bonus is None else bonus.unsqueeze(1), padding.unsqueeze(1)
        if bonus is not None:
            scores = scores + bonus.to(scores.dtype)
        return scores.masked_fill(padding, -math.inf)

    def _bonus(self, batch: Batch, ids: Tensor) -> Tensor | None:
        """Give what items [B, C] gain by standing in the histories that are read: [B, C]."""
        if self.head.seen_bonus is None:
            return None
        # The factor lets one number keep pace with vectors of D that learn at the same rate.
        bonus = self.head.seen_bonus * self.config.dim
        return reference.seen_bonus(ids, read_items(batch, self.config.max_clicks), bonus)

    @ranged("score")
    def _score(self, h: Streams, batch: Batch, candidates: Tensor, ids: Tensor | None) -> Tensor:
        return scoring.score(
            *h, batch.search_lengths, batch.rec_lengths, candidates, self.user_vectors(batch.user),
            self.head.weights(), ids=ids, dropout=None if h[0].ndim == 4 else self._dropout(batch),
            backend=self.config.backend,
        )  # fmt: skip

    def item_table(self) -> Tensor:
        """Vectors of the whole catalogue, [I + 1, D]; row 0 is padding."""
        if self.item_text_projection is None:
            return self.item_embedding.weight
        return _table([self.item_vectors(ids) for ids in self._item_ids().split(_TABLE_BLOCK)])

    def query_table(self) -> Tensor:
        """Give what the ids of queries stand for, [Q + 1, D]; row 0 is padding.

        Those are the vectors of queries, or where terms make them, what their texts add. Raises
        ValueError where terms make them alone, or text vectors are missing.
        """
        vectors = self.query_embedding.weight
        if self.query_text_projection is None:
            if self.config.query_encoder == "terms":
                raise ValueError(
                    "queries are means of terms and have no text: their ids say nothing"
                )
            return vectors
        ids = torch.arange(self.config.n_queries + 1, device=vectors.device)
        texts = _table([self._text("query", some) for some in ids.split(_TABLE_BLOCK)])
        return vectors + texts if self.config.query_encoder == "id" else texts

    def _item_ids(self) -> Tensor:
        return torch.arange(self.config.n_items + 1, device=self.head.target_weight.device)

    def _catalogue(
        self, h: Streams, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, ScoringWeights]:
        return (
            *h,
            batch.search_lengths,
            batch.rec_lengths,
            self.item_table(),
            self.user_vectors(batch.user),
            self.head.weights(),
        )

    def target_rank(
        self, h: Streams, batch: Batch, target: Tensor, exclude: Tensor | None = None
    ) -> Tensor:
        """Rank ``target`` [B] in the catalogue from final states: see :func:`ops.score_rank`.

        Other items compete without the bonus of seen ones: ``exclude`` those.
        """
        if target.shape != batch.user.shape:
            raise ValueError(f"target must be int64 [{len(batch)}], got {list(target.shape)}")
        bonus = self._bonus(batch, target.unsqueeze(1))
        return scoring.score_rank(
            *self._catalogue(h, batch),
            target,
            bonus=None if bonus is None else bonus.squeeze(1),
            exclude=exclude,
            backend=self.config.backend,
        )

    def best_items(
        self, h: Streams, batch: Batch, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the top-k items of the catalogue from final states: see :meth:`recommend`."""
        # No item that remains has been seen, so none has a bonus.
        return scoring.score_topk(
            *self._catalogue(h, batch),
            k,
            exclude=seen_items(batch, exclude),
            backend=self.config.backend,
        )

    # -- public API -----------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """Score the batch's candidates: [B, C], -inf where a candidate is 0."""
        return self.score(self.final_states(batch), batch)

    def final_states(self, batch: Batch) -> Streams:
        """Encode and reason: what the aggregation reads, (search, rec), [B, L, D]."""
        return self.reason(self.encode(batch), batch).streams

    def states(self, batch: Batch) -> States:
        """Every state of the reasoning: h^(0)..h^(K) and a^(1)..a^(K), (search, rec) pairs.

        For analysis: the steps run on the reference, whatever the backend.
        """
        return reasoning.latent_states(
            *self.encode(batch),
            batch.search_lengths,
            batch.rec_lengths,
            self.reasoning.weights(),
            self._steps(),
            dropout=self._dropout(batch),
        )

    @torch.no_grad()
    def recommend(
        self, batch: Batch, k: int = 10, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the top-k items of the whole catalogue, seen items masked.

        Of equal scores the lower id comes first.

        Seen are the items of the batch's histories and of ``exclude``, int64 [B, X] padded with 0
        (histories are truncated; pass what they lost). Returns items [B, k] and scores [B, k]; a
        user with fewer than k unseen items ends in item 0 with score -inf. Memory O(B * k).

        It evaluates: a model in training is put into evaluation mode meanwhile, and so is not for
        several threads. In evaluation mode nothing is written.
        """
        check_recommendation(batch, k, exclude)
        with evaluating(self):
            return self.best_items(self.final_states(batch), batch, k, exclude)

    def backend_report(self, device: str | None = None) -> str:
        """Say which implementation serves each op of this model, and why; one line an op.

        Where that is Triton on a GPU, a last line names the ptxas that assembles its kernels.

        ``device`` None is the model's. Under ``torch.autocast`` it is of a call there. Raises
        ValueError where the config's backend cannot serve.
        """
        device = device or str(self.head.target_weight.device)
        lines = []
        for op, (chosen, available) in self._choices(torch.device(device).type).items():
            others = [f"{name}: {why}" for name, why in available.items() if why]
            lines.append(f"{op}: {chosen}" + (f" ({'; '.join(others)})" if others else ""))
        if torch.device(device).type == "cuda" and (assembler := ptxas_in_use()):
            lines.append(f"ptxas: {assembler}")
        return "\n".join(lines)

    def _choices(self, device: str) -> dict[str, tuple[str, dict[str, str | None]]]:
        """Find, for each op, what serves it on a device, and what could."""
        config, tables = self.config, self.head.target_weight.dtype
        dtype = autocast_dtype(device, tables)
        sparse = self._is_sparse and self.training
        cases: dict[Op, Case] = {
            lookup.EMBED: lookup.LookupCase(device, tables, sparse, self._has_text),
            reasoning.ENCODE: reasoning.EncodeCase(
                device, dtype, config.dim, config.n_heads, config.ffn_width,
                config.max_search_len, config.max_rec_len,
            ),
            reasoning.LATENT_REASONING: reasoning.ReasoningCase(
                device, dtype, config.dim, config.n_heads,
                config.ffn_width if config.step_ffn else 0, config.max_search_len,
                config.max_rec_len, config.update, config.cross_memory, config.step_embedding,
            ),
            scoring.SCORE: scoring.ScoringCase(
                device, dtype, config.dim, None if config.score == "dot" else config.mlp_hidden
            ),
        }  # fmt: skip
        if self.head.seen_bonus is not None:
            cases[lookup.SEEN_BONUS] = lookup.LookupCase(device, dtype)
        return {
            op.name: (op.choose(op.of_model(config.backend, case), case), op.obstacles(case))
            for op, case in cases.items()
        }

    def save(self, path: str | Path) -> None:
        """Write weights, config and what names its data, not text vectors, to one safetensors file.

        It is replaced atomically and has a checksum; the same model gives the same bytes.
        """
        info = {
            "config": self.config.to_dict(),
            "data": self.data_fingerprint,
            "vocabulary": self.vocabulary,
            "exits": None if self.exits is None else self.exits.to_dict(),
        }
        save_tensors(path, _KIND, self._own_state(), info)

    def _own_state(self) -> dict[str, Tensor]:
        """Return ``state_dict()``; ValueError where it does not hold the tensors of the config."""
        state = self.state_dict()
        for kind, found in (
            ("quantized", any("_packed_params" in name for name in state)),
            ("sharded", hasattr(self.head.target_weight, "device_mesh")),
        ):
            if found:
                raise ValueError(
                    f"the model has layers that torch {kind}, which cannot be saved, extended or "
                    "projected: do so before"
                )
        if missing := sorted(_shapes(LCRSER, self.config).keys() - state.keys()):
            raise ValueError(
                f"the model has no tensor {missing[0]!r}, so it cannot be saved, extended or "
                "projected: remove pruning and parametrizations before"
            )
        return state

    def copy_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors by name, each with its dtype and device; others than the model's are left.

        Their shapes are not checked.
        """
        for name, tensor in self.state_dict(keep_vars=True).items():
            tensor.data = state[name].detach().clone()

    def extended(self, n_items: int, n_users: int, n_queries: int, n_terms: int) -> "LCRSER":
        """Copy the model with rows for more ids; everything else, text vectors aside, is the same.

        A new row is the mean of its table's: an item's dot product is then that of the average
        item, so that nothing unseen comes first or last by chance, and an unseen query, term or
        user shifts no state away from where the model was trained. Beside text vectors it is the
        average correction. Raises ValueError for fewer ids than the model has, and where
        :meth:`check_padding` does.
        """
        sizes = {"n_items": n_items, "n_users": n_users, "n_queries": n_queries, "n_terms": n_terms}
        for name, size in sizes.items():
            if size < (known := getattr(self.config, name)):
                raise ValueError(f"{name} must be at least the model's {known}, got {size}")
        self.check_padding()
        extended = LCRSER(self.config.replace(**sizes))
        state = self._own_state()
        for name, tensor in extended.state_dict().items():
            rows = state[name]
            if len(tensor) > len(rows):
                mean = rows[1:].double().sum(0) / max(len(rows) - 1, 1)
                more = mean.to(rows.dtype).expand(len(tensor) - len(rows), -1)
                state[name] = torch.cat((rows, more))
        extended.copy_state(state)
        extended.exits = self.exits
        return extended.train(self.training)

    @torch.no_grad()
    def projected(self) -> "LCRSER":
        """Copy the model for serving, with item vectors that hold what the items' texts add.

        The same scores but for rounding, and a pass over the catalogue projects no text. It knows
        the same data, and learns no projection of items any more. Without item texts it is the
        model itself. Raises ValueError where text vectors are missing.
        """
        if self.item_text_projection is None:
            return self
        made = LCRSER(self.config.replace(item_text_dim=0))
        state = {**self._own_state(), "item_embedding.weight": self.item_table()}
        made.copy_state(state)
        made.query_text, made.exits, made.on_steps = self.query_text, self.exits, self.on_steps
        made.data_fingerprint, made.vocabulary = self.data_fingerprint, self.vocabulary
        return made.train(self.training)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", backend: str | None = None) -> "LCRSER":
        """Read a model that :meth:`save` wrote, in its dtypes and in evaluation mode.

        Nothing in the file can run code; ``train()`` turns dropout on again. ``backend`` overrides
        the saved one. Raises ValueError, in one sentence, on a missing, damaged or foreign file,
        NaN weights, an unknown config key, tensors that do not fit, or padding that is not 0.
        """
        tensors, info = load_tensors(path, _KIND)
        try:
            values = info["config"]
            config = LCRConfig.from_dict(
                values if backend is None else {**values, "backend": backend}
            )
            exits = None if info.get("exits") is None else Exits.from_dict(info["exits"])
            if exits is not None:
                exits.check(config.dim, config.steps)
            fingerprint = info["data"]
            expected = _shapes(cls, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: it does not describe a model ({error!r})") from None
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"{path}: tensor {name!r} should have shape {expected.get(name)}, "
                    f"the file has {found.get(name)}"
                )
            if not tensors[name].is_floating_point():
                raise ValueError(
                    f"{path}: tensor {name!r} should hold floats, not {tensors[name].dtype}"
                )
        model = cls(config)
        model.copy_state(tensors)
        try:
            model.check_padding()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        model.data_fingerprint, model.vocabulary = fingerprint, info.get("vocabulary")
        model.exits = exits
        return model.to(device).eval()


def _shapes(cls: type[LCRSER], config: LCRConfig) -> dict[str, tuple[int, ...]]:
    """Give the shapes of a model's tensors, without memory for them.

    ValueError where they are beyond what a tensor can hold.
    """
    try:
        with torch.device("meta"):
            state = cls(config).state_dict()
    except RuntimeError as error:
        raise ValueError(f"its config asks for tensors that are too large ({error})") from None
    return {name: tuple(t.shape) for name, t in state.items()}


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and afterwards each part that trained back into its own.

    Where no part trains nothing is written, so that threads may share the module.
    """
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def check_recommendation(batch: Batch, k: int, exclude: Tensor | None) -> None:
    """Raise ValueError for a ``k`` or ``exclude`` that :meth:`LCRSER.recommend` cannot take."""
    scoring.check_k(k)
    B = batch.user.shape[0]
    if exclude is None:
        return
    if not isinstance(exclude, Tensor):
        raise ValueError(f"exclude must be int64 [{B}, X], got {type(exclude).__name__}")
    if exclude.ndim != 2 or exclude.shape[0] != B:
        raise ValueError(f"exclude must be int64 [{B}, X], got {list(exclude.shape)}")
    if exclude.dtype not in INTEGERS:
        raise ValueError(f"exclude must be int64 [{B}, X], ids, got {exclude.dtype}")


def _text_tensor(given: Any) -> Tensor:
    """Make a tensor of text vectors, without reading a whole memory-mapped file."""
    if isinstance(given, Tensor):
        return given
    whole = isinstance(given, np.memmap) and isinstance(given.base, mmap.mmap)
    if whole and given.flags.c_contiguous:
        # Tensors are always writable; copy-on-write spares the file.
        return torch.from_numpy(
            np.memmap(given.filename, given.dtype, "c", given.offset, given.shape)
        )
    return torch.from_numpy(np.array(given))


def _table(blocks: list[Tensor]) -> Tensor:
    """Join blocks of rows; under autocast torch would refuse those in another half than its own."""
    with without_autocast(blocks[0].device.type):
        return torch.cat(blocks)


def _masked_mean(vectors: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid vectors: [..., n, D], [..., n] -> [..., D]; 0 if there is none."""
    # Row 0 of every table is zero, so padding adds nothing to the sum.
    return vectors.sum(-2) / valid.sum(-1, keepdim=True).clamp(min=1)


def _align(x: Tensor, states: Tensor) -> Tensor:
    """Insert a trajectory axis after the first where the states have one."""
    return x.unsqueeze(1) if states.ndim == 4 else x
