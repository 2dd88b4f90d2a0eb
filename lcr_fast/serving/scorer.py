"""Scorer: a model that scores requests by one call of the C++ extension."""

from typing import Any

import torch
from torch import Tensor, nn

from lcr_fast.batch import Batch
from lcr_fast.model import LCRSER
from lcr_fast.ops import ranking
from lcr_fast.ops.request import REQUEST, Request, RequestCase, item_layer, pack_weights

#: What the products of a request can be computed in.
DTYPES = (torch.float32, torch.bfloat16)
_IDS = Request._fields[:8]  # of a Batch
_SMALL = 64 << 20  # bytes that are kept of the items unasked


class Scorer(nn.Module):
    """Scores a batch's candidates as ``model(batch)`` does in evaluation on ``cpp``.

    In float32 to the bit where the width is a multiple of 64 and nothing has text vectors. In other
    widths torch adds the vectors of a query's terms in another order, and texts are projected here
    for all ids at once, which rounds as torch does for so many. With ``dtype`` bfloat16 every
    product rounds its factors, which are weights and activations, to bfloat16 and adds in float32,
    and all else stays float32: twice the rate where the CPU has AVX512-BF16, slower than float32
    elsewhere; :meth:`describe` says which. What that does to rankings is in docs/serving.md.

    On one thread, unless ``n_threads`` says otherwise: where others want the cores too, waiting for
    a second one costs more than it brings. The weights of the layers are packed here, once; vectors
    of items, terms and users without texts are the model's own tensors where contiguous, which must
    not move. What the MLP's first layer makes of each item alone is computed here too with
    ``keep_items``, by default in float32 where that takes at most 64 MiB: 4 bytes for each of
    ``mlp_hidden[0]`` and each item. The scores are the same bits. In bfloat16 fetching it takes the
    time that the product takes. Trained on, the model needs a new Scorer. No gradients. Raises
    ValueError where one call cannot serve the model (as a subclass, or with hooks), its text
    vectors are not set or row 0 of a table is not 0, and RuntimeError on ids or lengths out of
    range.
    """

    def __init__(
        self,
        model: LCRSER,
        n_threads: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        keep_items: bool | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(n_threads, int) or n_threads < 1:
            raise ValueError(f"n_threads must be an integer of at least 1, got {n_threads!r}")
        if dtype not in DTYPES:
            raise ValueError(f"a Scorer computes in float32 or bfloat16, not {dtype}")
        if (why := obstacle(model)) is not None:
            raise ValueError(f"one call cannot serve this model: {why}")
        model.check_padding()
        config, head = model.config, model.head.weights()
        self.dtype, pairs = dtype, dtype == torch.bfloat16
        empty = model.search_position.detach().new_empty(0)

        def ready(t: Tensor) -> Tensor:
            return t.detach().contiguous()

        items, queries = ready(model.item_table()), ready(model.query_embedding.weight)
        query_text = empty
        if config.query_encoder == "id":
            queries = ready(model.query_table())
        elif config.query_text_dim:
            query_text = ready(model.query_table())
        users = model.user_embedding
        bonus = model.head.seen_bonus
        reasoning = model.reasoning.weights() if config.steps else ()
        kept = empty
        if head.mlp_weights:
            first = head.mlp_weights[0].detach()
            if keep_items is None:
                size = len(items) * len(first) * first.element_size()
                keep_items = dtype == torch.float32 and size <= _SMALL
            if keep_items:
                kept = item_layer(items, first.contiguous(), pairs)
        rest: dict[str, Any] = {
            "items": items,
            "item_layer": kept,
            "queries": queries,
            "query_text": query_text,
            "users": empty if users is None else ready(users.weight),
            "search_position": ready(model.search_position),
            "rec_position": ready(model.rec_position),
            "seen_bonus": empty if bonus is None else bonus.detach() * config.dim,
            "weights": pack_weights(
                tuple(map(ready, model.encoder.weights())),
                tuple(map(ready, reasoning)),
                head.target_weight.detach(),
                tuple(map(ready, head.mlp_weights)),
                tuple(map(ready, head.mlp_biases)),
                config.n_heads,
                pairs,
            ),
            "widths": [bias.numel() for bias in head.mlp_biases],
            "n_layers": config.n_layers,
            "ffn": config.ffn_width,
            "n_sets": len(reasoning[0]) if reasoning else 0,
            "step_ffn": config.ffn_width if config.step_ffn else 0,
            "steps": config.steps,
            "n_heads": config.n_heads,
            "max_clicks": config.max_clicks,
            "readout": config.readout,
            "terms": config.query_encoder == "terms",
            "dot": head.dot,
            "pairs": pairs,
            "n_threads": n_threads,
        }
        self._rest = tuple(rest[name] for name in Request._fields[len(_IDS) :])
        self.kept_bytes = kept.numel() * kept.element_size()

    def forward(self, batch: Batch) -> Tensor:
        """Score the batch's candidates: [B, C], -inf where a candidate is 0."""
        ids = (getattr(batch, name) for name in _IDS)
        return REQUEST("cpp", Request(*ids, *self._rest))

    def describe(self) -> str:
        """Say in a line what products are computed in, by which instructions, and what is kept."""
        level = ranking.cpu_level()
        how = f"products in {str(self.dtype).removeprefix('torch.')}, instructions {level}"
        if self.dtype == torch.bfloat16 and level != "avx512bf16":
            how += ", which have none for bfloat16: slower than float32"
        kept = f"{self.kept_bytes / 2**20:.1f} MiB" if self.kept_bytes else "nothing"
        return f"{how}; {kept} kept of the items' first layer"


def fastest(model: LCRSER, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Take a Scorer where one can serve the model, else the model itself.

    Only a Scorer computes in another ``dtype`` than the model: ValueError where it cannot.
    """
    if dtype == torch.float32 and obstacle(model) is not None:
        return model
    return Scorer(model, dtype=dtype)


def obstacle(model: LCRSER) -> str | None:
    """Say why one call cannot serve a model, or None where it can."""
    config = model.config
    if config.backend not in ("auto", "cpp"):
        return f"its backend is {config.backend}"
    if model.exits is not None:
        return "its users leave the reasoning early"
    if type(model) is not LCRSER:
        return f"its class {type(model).__name__} may compute something else than LCRSER"
    # Hooks of all modules at once are those of profilers, which look on.
    if any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        for part in model.modules()
    ):
        return "it has hooks, which one call would not run"
    weight = model.head.target_weight
    case = RequestCase(
        weight.device.type,
        weight.dtype,
        config.update,
        config.cross_memory,
        config.step_embedding,
    )
    return REQUEST.obstacles(case)["cpp"]
