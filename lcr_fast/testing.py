"""What tests and benchmarks share: the parity assertion, random inputs and random models."""

import math

import torch
from torch import Tensor

from lcr_fast.batch import Batch
from lcr_fast.config import LCRConfig
from lcr_fast.model import LCRSER
from lcr_fast.reference import Streams, length_mask
from lcr_fast.weights import EncoderWeights, ReasoningWeights, ScoringWeights


def _max(t: Tensor) -> float:
    return t.abs().max().item()


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def assert_parity(
    name: str, fused: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0
) -> None:
    """Require ``fused`` to be about as accurate as ``eager``, both measured against ``exact``.

    ``eager`` is the reference in the dtype under test and ``exact`` the same reference in float64.
    With e(t) = t - exact and u the unit roundoff,

        max|e(fused)| <= factor * max|e(eager)| + u * max|exact|
        rms e(fused)  <= factor * rms e(eager)  + 2u * rms(exact) / sqrt(n)

    The maximum catches one wrong element, the RMS a small error everywhere. The last terms let a
    correctly rounded result pass where ``eager`` is exact by luck. Raises AssertionError.
    """
    assert fused.dtype == eager.dtype, f"{name}: dtype {fused.dtype}, expected {eager.dtype}"
    for other in (fused, eager):
        assert other.shape == exact.shape, (
            f"{name}: shape {tuple(other.shape)}, expected {tuple(exact.shape)}"
        )
    assert exact.dtype == torch.float64, f"{name}: the exact result must be float64"
    if exact.numel() == 0:
        return
    for kind, t in (("fused", fused), ("eager", eager), ("exact", exact)):
        assert torch.isfinite(t).all(), f"{name}: the {kind} result has non-finite values"

    u = torch.finfo(fused.dtype).eps / 2
    e_fused, e_eager = fused.double() - exact, eager.double() - exact
    for kind, norm, floor in (
        ("max", _max, u * _max(exact)),
        ("rms", _rms, 2 * u * _rms(exact) / math.sqrt(exact.numel())),
    ):
        error, budget = norm(e_fused), factor * norm(e_eager) + floor
        assert error <= budget, (
            f"{name}: {kind} error {error:.3e} exceeds {budget:.3e} "
            f"(the eager reference has {norm(e_eager):.3e})"
        )


def random_lengths(n_users: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw lengths in 0..size, int64 [n_users]."""
    return torch.randint(0, size + 1, (n_users,), generator=generator)


def _pair_lengths(config: LCRConfig, n_users: int, generator: torch.Generator) -> Streams:
    """Lengths of both streams; the first users are the corners, among them each empty stream."""
    search = random_lengths(n_users, config.max_search_len, generator)
    rec = random_lengths(n_users, config.max_rec_len, generator)
    full_s, full_r = config.max_search_len, config.max_rec_len
    corners = ((full_s, full_r), (0, full_r), (full_s, 0), (0, 0), (1, 1))[:n_users]
    for b, (n_search, n_rec) in enumerate(corners):
        search[b], rec[b] = min(n_search, full_s), min(n_rec, full_r)
    return search, rec


def random_batch(
    config: LCRConfig,
    n_users: int,
    n_candidates: int,
    generator: torch.Generator,
    *,
    n_terms: int = 3,
) -> Batch:
    """Draw a batch that fits ``config``, padded with 0 to its longest histories.

    The first users have, in this order: both histories full, no search, no recommendation event,
    neither, one event of each. Terms and clicks may be missing anywhere; user 0 occurs.
    """
    search_lengths, rec_lengths = _pair_lengths(config, n_users, generator)
    n_search, n_rec = config.max_search_len, config.max_rec_len

    def ids(limit: int, *shape: int, first: int = 1) -> Tensor:
        if limit < first:
            return torch.zeros(shape, dtype=torch.int64)
        return torch.randint(first, limit + 1, shape, generator=generator)

    searches = length_mask(search_lengths, n_search)
    return Batch(
        user=ids(config.n_users, n_users, first=0),
        rec_items=ids(config.n_items, n_users, n_rec) * length_mask(rec_lengths, n_rec),
        rec_lengths=rec_lengths,
        search_queries=ids(config.n_queries, n_users, n_search, first=0) * searches,
        search_terms=ids(config.n_terms, n_users, n_search, n_terms, first=0)
        * searches.unsqueeze(-1),
        search_clicks=ids(config.n_items, n_users, n_search, config.max_clicks, first=0)
        * searches.unsqueeze(-1),
        search_lengths=search_lengths,
        candidates=ids(config.n_items, n_users, n_candidates),
        target=torch.randint(0, max(n_candidates, 1), (n_users,), generator=generator)
        if n_candidates
        else torch.full((n_users,), -1),
        row=torch.randperm(4 * n_users + 1, generator=generator)[:n_users],
    )


def random_streams(
    config: LCRConfig,
    n_users: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    padding: float = math.nan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw vectors of both streams, [B, L_s, D] and [B, L_r, D], and their lengths.

    Lengths are those of :func:`random_batch`; padding holds ``padding``, which must not matter.
    """
    lengths = _pair_lengths(config, n_users, generator)
    vectors = []
    for n, size in zip(lengths, (config.max_search_len, config.max_rec_len), strict=True):
        x = torch.randn(n_users, size, config.dim, generator=generator, dtype=torch.float64)
        vectors.append(x.to(dtype).masked_fill(~length_mask(n, size).unsqueeze(-1), padding))
    return vectors[0], vectors[1], *lengths


@torch.no_grad()
def random_model(
    config: LCRConfig, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> LCRSER:
    """Make a model in eval mode with nothing trivial in it: no bias is 0, no norm weight is 1."""
    model = LCRSER(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "norm_weight" in name:
            value = 1 + 0.3 * value
        elif "bias" in name or "step_embedding" in name:
            value = 0.3 * value
        elif parameter.numel() and "embedding" not in name and "position" not in name:
            value = value * parameter.shape[-1] ** -0.5
        if "embedding.weight" in name:
            value[0] = 0.0  # padding
        parameter.copy_(value)
    return model


def random_weights(
    config: LCRConfig, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> tuple[EncoderWeights, ReasoningWeights, ScoringWeights]:
    """Draw the packed weights of a :func:`random_model`, as leaves that require gradients."""
    model = random_model(config, generator, dtype)
    return model.encoder.weights(), model.reasoning.weights(), model.head.weights()
