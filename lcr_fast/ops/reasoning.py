"""Encoders, latent cross reasoning and its noisy rollouts."""

from torch import Tensor

from lcr_fast import reference
from lcr_fast.ops._dispatch import choose_backend
from lcr_fast.ops.noise import (
    ENCODER_SITES,
    REASONING_SITES,
    STREAM_SITES,
    Dropout,
    normal_noise,
)
from lcr_fast.reference import States
from lcr_fast.weights import REC, SEARCH, EncoderWeights, ReasoningWeights

# No fused implementation is registered yet; explicit requests for one say so.
AVAILABLE: dict[str, str | None] = {"reference": None}


def _check_stream(name: str, x: Tensor, lengths: Tensor, dim: int) -> None:
    if x.ndim < 3 or x.shape[-1] != dim:
        raise ValueError(f"{name} must be [..., L, {dim}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if lengths.is_floating_point() or lengths.ndim != x.ndim - 2:
        raise ValueError(
            f"{name}_lengths must be integers {list(x.shape[:-2])}, "
            f"got {lengths.dtype} {list(lengths.shape)}"
        )


def _check_heads(dim: int, n_heads: int) -> None:
    if n_heads < 1 or dim % n_heads:
        raise ValueError(f"n_heads must divide the width {dim}, got {n_heads}")


def encode(
    x: Tensor,
    lengths: Tensor,
    weights: EncoderWeights,
    stream: int,
    *,
    n_heads: int,
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Encode one stream: see :func:`lcr_fast.reference.encode`. [B, L, D] -> [B, L, D]."""
    dim = weights.qkv_weight.shape[-1]
    _check_stream("x", x, lengths, dim)
    _check_heads(dim, n_heads)
    choose_backend("encode", backend, AVAILABLE)
    masks = None
    if dropout is not None:
        dropout.check(x)
        n_layers = weights.qkv_weight.shape[0]
        masks = dropout.draw(ENCODER_SITES + stream * STREAM_SITES, 2 * n_layers, *x.shape[-2:])
    return reference.encode(x, lengths, weights, stream, n_heads=n_heads, masks=masks)


def latent_reasoning(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    weights: ReasoningWeights,
    steps: int,
    *,
    n_heads: int,
    step_embedding: Tensor | None = None,
    update: str = "jacobi",
    cross_memory: str = "post_msa",
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> States:
    """Run K latent cross reasoning steps: see :func:`lcr_fast.reference.latent_reasoning`.

    ``dropout`` acts on every sublayer's output, on states [B, L, D]; None means none.
    ``search`` [..., L_s, D] and ``rec`` [..., L_r, D] share dtype and leading axes; the lengths
    are integers [...], or broadcast to it. ``steps`` >= 0.
    Raises ValueError on other shapes or dtypes, and where ``backend`` cannot serve the call.
    """
    dim = weights.self_qkv_weight.shape[-1]
    _check_stream("search", search, search_lengths, dim)
    _check_stream("rec", rec, rec_lengths, dim)
    _check_heads(dim, n_heads)
    if search.dtype != rec.dtype or search.shape[:-2] != rec.shape[:-2]:
        raise ValueError(
            "search and rec must agree in dtype and leading axes, got "
            f"{search.dtype} {list(search.shape)} and {rec.dtype} {list(rec.shape)}"
        )
    n_sets = weights.self_qkv_weight.shape[0]
    if steps < 0 or (n_sets != 1 and n_sets < steps):
        raise ValueError(f"steps must be 0..{n_sets} for {n_sets} sets of weights, got {steps}")
    choose_backend("latent_reasoning", backend, AVAILABLE)
    masks = None
    if dropout is not None:
        dropout.check(search)
        mask_s, mask_r = (
            dropout.draw(REASONING_SITES + i * STREAM_SITES, 3 * steps, *x.shape[-2:])
            for i, x in enumerate((search, rec))
        )
        masks = (mask_s, mask_r)
    return reference.latent_reasoning(
        search, rec, search_lengths, rec_lengths, weights, steps, n_heads=n_heads,
        step_embedding=step_embedding, update=update, cross_memory=cross_memory, masks=masks,
    )  # fmt: skip


def rollout(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    rows: Tensor,
    weights: ReasoningWeights,
    steps: int,
    *,
    n_trajectories: int,
    noise_scale: float,
    seed: int,
    n_heads: int,
    step_embedding: Tensor | None = None,
    update: str = "jacobi",
    cross_memory: str = "post_msa",
    backend: str = "auto",
) -> States:
    """Reason from N noisy copies of each user's h^(0) (paper, Eq. 14).

        h_n^(0) = h^(0) + gamma eps_n,   eps_n ~ N(0, I) on valid positions

    ``search`` [B, L_s, D], ``rec`` [B, L_r, D], lengths [B], ``rows`` int64 [B] names the users for
    the generator (:mod:`lcr_fast.noise`). Dropout is off. Returns states [B, N, L, D].
    """
    if n_trajectories < 1:
        raise ValueError(f"n_trajectories must be at least 1, got {n_trajectories}")
    noisy = []
    for stream, x in ((SEARCH, search), (REC, rec)):
        length, dim = x.shape[-2:]
        eps = normal_noise(rows, seed, n_trajectories, stream, length, dim, x.dtype)
        noisy.append(x.unsqueeze(1) + noise_scale * eps)  # [B, N, L, D]
    return latent_reasoning(
        noisy[SEARCH], noisy[REC], search_lengths.unsqueeze(1), rec_lengths.unsqueeze(1),
        weights, steps, n_heads=n_heads, step_embedding=step_embedding, update=update,
        cross_memory=cross_memory, backend=backend,
    )  # fmt: skip
