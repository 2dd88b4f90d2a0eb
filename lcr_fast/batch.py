"""Batch: the tensors of one mini-batch, and the checks that they make sense.

Shapes use one vocabulary throughout the package: B users, L events of a stream, T terms of a
query, M clicked items of a search, C candidates, D width, H heads, K steps, N trajectories,
I items.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Histories and candidates of B users, all int64.

    Histories are right-padded, oldest event first, so a mask is always a length. What stands behind
    a length enters no result but must be an id that the model knows, at best 0: it is looked up.
    Ids start at 1. Any L, T, M and C may be 0.
    """

    user: Tensor  # [B], 0 = unknown
    rec_items: Tensor  # [B, L_r]
    rec_lengths: Tensor  # [B]
    search_queries: Tensor  # [B, L_s] query ids; 0 where only the terms are known
    search_terms: Tensor  # [B, L_s, T] term ids, 0 = no term
    search_clicks: Tensor  # [B, L_s, M] item ids, 0 = no click
    search_lengths: Tensor  # [B]
    candidates: Tensor  # [B, C] item ids
    target: Tensor  # [B] column of the positive in candidates, -1 = none
    row: Tensor  # [B] number of the sample in its split; keys the noise of its trajectories

    def __post_init__(self) -> None:
        dims = {
            "user": 1, "rec_items": 2, "rec_lengths": 1, "search_queries": 2, "search_terms": 3,
            "search_clicks": 3, "search_lengths": 1, "candidates": 2, "target": 1, "row": 1,
        }  # fmt: skip
        for name, n_dims in dims.items():
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name} must be an int64 tensor, got {got}")
            if tensor.ndim != n_dims:
                raise ValueError(
                    f"{name} must have {n_dims} dimensions, got shape {list(tensor.shape)}"
                )
            # Not len(): that is a number even where torch.export traces a size.
            if tensor.shape[0] != self.user.shape[0]:
                raise ValueError(
                    f"{name} has {tensor.shape[0]} rows, but user has {self.user.shape[0]}"
                )
        for name in ("search_terms", "search_clicks"):
            length = getattr(self, name).shape[1]
            if length != self.search_queries.shape[1]:
                raise ValueError(
                    f"{name} has {length} searches a user, but search_queries has "
                    f"{self.search_queries.shape[1]}"
                )

    def __len__(self) -> int:
        return len(self.user)

    @property
    def device(self) -> torch.device:
        return self.user.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy every tensor to ``device``."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Copy every tensor to pinned memory, as ``DataLoader(pin_memory=True)`` asks for it."""
        return self._map(Tensor.pin_memory)

    def rows(self, index: Tensor | slice) -> "Batch":
        """Select users by a slice, a boolean mask [B] or indices."""
        return self._map(lambda t: t[index])

    def replace(self, **changes: Tensor) -> "Batch":
        """Copy with some tensors replaced, e.g. ``batch.replace(candidates=...)``."""
        return dataclasses.replace(self, **changes)

    def _map(self, function) -> "Batch":
        return Batch(**{f.name: function(getattr(self, f.name)) for f in dataclasses.fields(self)})


def read_items(batch: Batch, max_clicks: int) -> tuple[Tensor, Tensor]:
    """Items of a batch's valid events, padded with 0: clicked [B, L_s * n], and read [B, L_r]."""
    searches = torch.arange(batch.search_clicks.shape[1], device=batch.device)
    valid = (searches < batch.search_lengths.unsqueeze(1)).unsqueeze(-1)
    clicked = (batch.search_clicks[..., :max_clicks] * valid).flatten(1)
    events = torch.arange(batch.rec_items.shape[1], device=batch.device)
    return clicked, batch.rec_items * (events < batch.rec_lengths.unsqueeze(1))


def seen_items(batch: Batch, exclude: Tensor | None = None) -> Tensor:
    """Items that a user of the batch has seen, [B, X], padded with 0."""
    parts = read_items(batch, batch.search_clicks.shape[2])
    return torch.cat(parts if exclude is None else (*parts, exclude), 1)
