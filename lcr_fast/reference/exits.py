"""Leaving the reasoning early: which user has thought enough, by a look at its states."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcr_fast.reference.transformer import Streams, accumulator, zero_padding


class Exits(NamedTuple):
    """A linear rule for when to leave (our reading: the paper takes K steps for everybody)."""

    weight: Tensor  # [2D + 2] of both streams' mean state, its change and the change of that
    bias: Tensor  # [K] of each number of steps already taken, from 0
    rule: str = ""  # how it came about

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as :meth:`from_dict` reads them, of float32 tensors."""
        return {"rule": self.rule, "weight": self.weight.tolist(), "bias": self.bias.tolist()}

    def check(self, dim: int, n_steps: int) -> None:
        """Raise ValueError where the rule is not one for K = ``n_steps`` of width D = ``dim``."""
        if self.weight.shape != (2 * dim + 2,) or self.bias.shape != (n_steps,):
            raise ValueError(
                f"exits must hold a weight [{2 * dim + 2}] and a bias [{n_steps}], got "
                f"{list(self.weight.shape)} and {list(self.bias.shape)}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Exits":
        """Build from plain values. Raises ValueError for other than lists of finite numbers."""
        weight, bias = (torch.tensor(values[name]) for name in ("weight", "bias"))
        for name, found in (("weight", weight), ("bias", bias)):
            if found.ndim != 1 or not found.is_floating_point() or not found.isfinite().all():
                raise ValueError(f"the {name} of exits must be a list of finite numbers")
        return cls(weight, bias, str(values["rule"]))


def exit_features(
    states: list[Streams],  # h^(0) .. h^(k), [..., L_s, D] and [..., L_r, D]
    search_lengths: Tensor,  # [...]
    rec_lengths: Tensor,  # [...]
) -> Tensor:
    """Describe the states after each number of steps: [..., k + 1, 2D + 2].

    With m^(k) [2D] the means of both streams' h^(k) over their events (0 without one):

        m^(k);   |m^(k) - m^(k-1)|, 0 for k = 0;   |m^(k) - 2 m^(k-1) + m^(k-2)|, 0 for k < 2

    None of it needs a candidate, so that looking costs little beside a step.
    """
    lengths = (search_lengths, rec_lengths)
    means = []
    for pair in states:
        both = []
        for h, n in zip(pair, lengths, strict=True):
            total = zero_padding(h.to(accumulator(h)), n).sum(-2)  # [..., D]
            both.append(total / n.clamp(min=1).to(total.dtype).unsqueeze(-1))
        means.append(torch.cat(both, -1))
    m = torch.stack(means, -2)  # [..., k + 1, 2D]
    moved = m.diff(dim=-2)
    change, curvature = m.new_zeros(m.shape[:-1]), m.new_zeros(m.shape[:-1])
    change[..., 1:] = moved.norm(dim=-1)
    curvature[..., 2:] = moved.diff(dim=-2).norm(dim=-1)
    return torch.cat((m, change.unsqueeze(-1), curvature.unsqueeze(-1)), -1)


def exit_scores(features: Tensor, exits: Exits) -> Tensor:
    """Score leaving after 0, 1, ... steps: [..., k, 2D + 2] -> [..., k]."""
    return features @ exits.weight.to(features) + exits.bias[: features.shape[-2]].to(features)


def steps_taken(scores: Tensor) -> Tensor:
    """Count steps: the first k whose score is 0 at least, or all K: [..., K] -> int64 [...]."""
    stays = ~(scores >= 0)  # NaN stays
    return stays.long().cumprod(-1).sum(-1)
