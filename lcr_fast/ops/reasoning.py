"""Encoders, latent cross reasoning and its noisy rollouts.

Both have three implementations: the reference; ``triton`` on CUDA tensors (and on CPU tensors
under Triton's interpreter, if asked for); ``cpp`` on CPU tensors. The fused two serve the defaults
of the model and ``share_steps``, ``step_ffn``; what limits them is asked of
``LATENT_REASONING.obstacles`` and ``ENCODE.obstacles``. What they do not serve runs on the
reference.
"""

from types import ModuleType
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from lcr_fast import reference
from lcr_fast.config import CrossMemory, Update
from lcr_fast.ops._op import INTEGERS, Backend, Op, kernel
from lcr_fast.ops._triton import current_gpu, triton_obstacle
from lcr_fast.ops.noise import (
    ENCODER_SITES,
    REASONING_SITES,
    STREAM_SITES,
    Dropout,
    Noise,
    dropout_key,
    seed_tensor,
)
from lcr_fast.precision import autocasts
from lcr_fast.reference import States, Steps, Streams
from lcr_fast.weights import REC, SEARCH, EncoderWeights, ReasoningWeights

# -- who serves -----------------------------------------------------------------------------------


class EncodeCase(NamedTuple):
    """All that decides which implementations can serve a call of :func:`encode`."""

    device: str  # cpu, cuda
    dtype: torch.dtype
    dim: int
    n_heads: int
    ffn_dim: int
    search_len: int
    rec_len: int


class ReasoningCase(NamedTuple):
    """All that decides which implementations can serve a call of :func:`latent_reasoning`."""

    device: str  # cpu, cuda
    dtype: torch.dtype
    dim: int
    n_heads: int
    ffn_dim: int
    search_len: int
    rec_len: int
    update: str = "jacobi"
    cross_memory: str = "post_msa"
    step_embedding: bool = False


def _switch_obstacle(case: ReasoningCase) -> str | None:
    if case.update != "jacobi":
        return f"it has no update={case.update!r}"
    if case.cross_memory != "post_msa":
        return f"it has no cross_memory={case.cross_memory!r}"
    return "it has no step embedding" if case.step_embedding else None


def _shape_obstacle(kernels: ModuleType, case: EncodeCase | ReasoningCase) -> str | None:
    return kernels.obstacle(
        dim=case.dim,
        n_heads=case.n_heads,
        ffn_dim=case.ffn_dim,
        search_len=case.search_len,
        rec_len=case.rec_len,
        dtype=case.dtype,
        gpu=current_gpu() if case.device == "cuda" else None,
    )


def _triton_obstacle(case: ReasoningCase) -> str | None:
    if (reason := triton_obstacle(case.device)) is not None:
        return reason
    from lcr_fast.kernels import reasoning

    return _switch_obstacle(case) or _shape_obstacle(reasoning, case)


def _encode_triton_obstacle(case: EncodeCase) -> str | None:
    if (reason := triton_obstacle(case.device)) is not None:
        return reason
    from lcr_fast.kernels import encoding

    return _shape_obstacle(encoding, case)


def _dtype_obstacle(case: EncodeCase | ReasoningCase) -> str | None:
    if case.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it serves float32 and halves, not {case.dtype}"
    return None


def cpp_obstacle(case: ReasoningCase) -> str | None:
    return _dtype_obstacle(case) or _switch_obstacle(case)


# -- the ops --------------------------------------------------------------------------------------


class _Reasoning(NamedTuple):
    """The arguments of a registered pass, in the order of its schema; absent tensors are empty."""

    search: Tensor  # [B, L_s, D]
    rec: Tensor  # [B, L_r, D]
    search_lengths: Tensor  # [B]
    rec_lengths: Tensor  # [B]
    rows: Tensor  # int64 [B]
    target_keys: Tensor  # [B, 2, D]
    weights: tuple[Tensor, ...]
    steps: int
    n_heads: int
    n_trajectories: int
    noise_scale: float
    noise_seed: Tensor  # int64 []
    dropout_threshold: int
    dropout_seed: Tensor  # int64 []


def _fake_reasoning(call: _Reasoning, save: bool) -> tuple[Tensor, ...]:
    B, n_search, D = call.search.shape
    n_rec, N, n_saved = call.rec.shape[1], call.n_trajectories, call.steps - 1 if save else 0
    pooled = (B, N, call.steps, 2, 2, D) if call.target_keys.ndim == 3 else (0,)
    return (
        call.search.new_empty(B, N, n_search, D),
        call.rec.new_empty(B, N, n_rec, D),
        call.search.new_empty(pooled),
        call.search.new_empty(n_saved, B, N, n_search, D),
        call.rec.new_empty(n_saved, B, N, n_rec, D),
    )


LATENT_REASONING = Op(
    "latent_reasoning",
    _Reasoning,
    ("search_out", "rec_out", "pooled"),
    _fake_reasoning,
    [
        Backend(
            "triton",
            "triton_",
            ("cuda",),
            _triton_obstacle,
            [kernel("reasoning", f"latent_reasoning_{name}") for name in ("fwd", "bwd")],
        ),
        Backend("cpp", "cpu_", ("cpu",), cpp_obstacle),
    ],
    gradients=("search", "rec", "target_keys", "weights"),
    saved=("saved_search", "saved_rec"),  # the inputs of all steps but the first
)


class _Encode(NamedTuple):
    """The arguments of a registered pass, in the order of its schema; absent tensors are empty."""

    search: Tensor  # [B, L_s, D]
    rec: Tensor  # [B, L_r, D]
    search_lengths: Tensor  # [B]
    rec_lengths: Tensor  # [B]
    rows: Tensor  # int64 [B]
    weights: tuple[Tensor, ...]
    n_heads: int
    dropout_threshold: int
    dropout_seed: Tensor  # int64 []


ENCODE = Op(
    "encode",
    _Encode,
    ("search_out", "rec_out"),
    lambda call: (torch.empty_like(call.search), torch.empty_like(call.rec)),
    [
        Backend(
            "triton",
            "triton_",
            ("cuda",),
            _encode_triton_obstacle,
            [kernel("encoding", f"encode_{name}") for name in ("fwd", "bwd")],
        ),
        Backend("cpp", "cpu_", ("cpu",), _dtype_obstacle),
    ],
    gradients=("search", "rec", "weights"),
)


# -- public functions -----------------------------------------------------------------------------


class Reasoned(NamedTuple):
    """What K steps make of both streams."""

    search: Tensor  # [..., L_s, D] h_s^(K)
    rec: Tensor  # [..., L_r, D] h_r^(K)
    pooled: Tensor | None  # [..., K, 2, 2, D] see reference.pool_steps; None if not asked for

    @property
    def streams(self) -> Streams:
        return self.search, self.rec


def _check_stream(names: tuple[str, str], x: Tensor, lengths: Tensor, dim: int) -> None:
    name, lengths_name = names
    if x.ndim < 3 or x.shape[-1] != dim:
        raise ValueError(f"{name} must be [..., L, {dim}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    fits = lengths.ndim == x.ndim - 2 and all(
        n == m or n == 1 for n, m in zip(lengths.shape, x.shape[:-2], strict=True)
    )
    if lengths.dtype not in INTEGERS or not fits:
        raise ValueError(
            f"{lengths_name} must be integers {list(x.shape[:-2])}, "
            f"got {lengths.dtype} {list(lengths.shape)}"
        )


def _check_streams(
    search: Tensor, rec: Tensor, search_lengths: Tensor, rec_lengths: Tensor, dim: int
) -> None:
    _check_stream(("search", "search_lengths"), search, search_lengths, dim)
    _check_stream(("rec", "rec_lengths"), rec, rec_lengths, dim)
    if search.dtype != rec.dtype or search.shape[:-2] != rec.shape[:-2]:
        raise ValueError(
            "search and rec must agree in dtype and leading axes, got "
            f"{search.dtype} {list(search.shape)} and {rec.dtype} {list(rec.shape)}"
        )


def _draw_masks(
    dropout: Dropout | None, first_site: int, n_sites: int, streams: Streams
) -> tuple[Tensor, Tensor] | None:
    """Draw the masks of both streams, [n_sites, B, L, D] each."""
    if dropout is None:
        return None
    search, rec = (
        dropout.draw(first_site + x * STREAM_SITES, n_sites, *states.shape[-2:])
        for x, states in enumerate(streams)
    )
    return search, rec


def _check_heads(dim: int, n_heads: int) -> None:
    if n_heads < 1 or dim % n_heads:
        raise ValueError(f"n_heads must divide the width {dim}, got {n_heads}")


def _flat(lengths: Tensor, leading: torch.Size) -> Tensor:
    """Give every user's length as kernels take them: int64 [the product of ``leading``]."""
    return lengths.long().expand(leading).flatten().contiguous()


@autocasts
def encode(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    weights: EncoderWeights,
    *,
    n_heads: int,
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> Streams:
    """Encode both streams, each by itself: see :func:`lcr_fast.reference.encode`.

    ``search`` [..., L_s, D] and ``rec`` [..., L_r, D] of one dtype and leading axes, lengths [...]
    or what broadcasts to it. ``dropout`` acts on every sublayer's output, on states [B, L, D]; None
    means none. Returns h_s^(0) and h_r^(0), of the same shapes and dtype.
    Raises ValueError on other shapes or dtypes, and where ``backend`` cannot serve the call.
    """
    dim = weights.qkv_weight.shape[-1]
    _check_streams(search, rec, search_lengths, rec_lengths, dim)
    _check_heads(dim, n_heads)
    if dropout is not None:
        dropout.check(search)
    case = EncodeCase(
        search.device.type, search.dtype, dim, n_heads, weights.ffn_in_weight.shape[-2],
        search.shape[-2], rec.shape[-2],
    )  # fmt: skip
    chosen = ENCODE.choose(backend, case, notice=search.dtype != torch.float64)
    if chosen == "reference":
        masks = _draw_masks(dropout, ENCODER_SITES, 2 * weights.qkv_weight.shape[0], (search, rec))
        search, rec = (
            reference.encode(
                x, lengths, weights, stream, n_heads=n_heads, masks=masks and masks[stream]
            )
            for stream, x, lengths in ((SEARCH, search, search_lengths), (REC, rec, rec_lengths))
        )
        return search, rec
    leading = search.shape[:-2]
    search_lengths = _flat(search_lengths, leading)
    rows, threshold, seed = dropout_key(dropout, search_lengths)
    call = _Encode(
        search=search.flatten(0, -3).contiguous(),
        rec=rec.flatten(0, -3).contiguous(),
        search_lengths=search_lengths,
        rec_lengths=_flat(rec_lengths, leading),
        rows=rows,
        weights=tuple(w.contiguous() for w in weights),
        n_heads=n_heads,
        dropout_threshold=threshold,
        dropout_seed=seed,
    )
    out_search, out_rec = ENCODE(chosen, call)
    return out_search.view(search.shape), out_rec.view(rec.shape)


def check_reasoning(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    weights: ReasoningWeights,
    steps: Steps,
) -> None:
    """Raise ValueError where the arguments of :func:`latent_reasoning` do not fit together."""
    dim = weights.self_qkv_weight.shape[-1]
    _check_streams(search, rec, search_lengths, rec_lengths, dim)
    _check_heads(dim, steps.n_heads)
    n_sets = weights.self_qkv_weight.shape[0]
    if steps.n_steps < 0 or (n_sets != 1 and n_sets < steps.n_steps):
        raise ValueError(
            f"n_steps must be 0..{n_sets} for {n_sets} sets of weights, got {steps.n_steps}"
        )
    for name, kind in (("update", Update), ("cross_memory", CrossMemory)):
        if (choice := getattr(steps, name)) not in get_args(kind):
            raise ValueError(f"{name} must be {' or '.join(get_args(kind))}, got {choice!r}")
    if steps.embedding is not None and (
        steps.embedding.ndim != 3
        or len(steps.embedding) < steps.n_steps
        or steps.embedding.shape[1:] != (2, dim)
    ):
        raise ValueError(
            f"embedding must be [{steps.n_steps}, 2, {dim}], got {list(steps.embedding.shape)}"
        )


def case_of(search: Tensor, rec: Tensor, weights: ReasoningWeights, steps: Steps) -> ReasoningCase:
    """Tell what decides who can serve the arguments of :func:`latent_reasoning`."""
    return ReasoningCase(
        search.device.type, search.dtype, search.shape[-1], steps.n_heads,
        weights.ffn_in_weight.shape[-2], search.shape[-2], rec.shape[-2], steps.update,
        steps.cross_memory, steps.embedding is not None,
    )  # fmt: skip


@autocasts
def latent_states(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    weights: ReasoningWeights,
    steps: Steps,
    *,
    dropout: Dropout | None = None,
) -> States:
    """Run K steps and keep every state, for analysis: always on the reference.

    Arguments as for :func:`latent_reasoning`.
    """
    check_reasoning(search, rec, search_lengths, rec_lengths, weights, steps)
    if dropout is not None:
        dropout.check(search)
    masks = _draw_masks(dropout, REASONING_SITES, 3 * steps.n_steps, (search, rec))
    return reference.latent_reasoning(
        search, rec, search_lengths, rec_lengths, weights, steps, masks=masks
    )


@autocasts
def latent_reasoning(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    weights: ReasoningWeights,
    steps: Steps,
    *,
    target_keys: Tensor | None = None,
    noise: Noise | None = None,
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> Reasoned:
    """Run K latent cross reasoning steps: see :func:`lcr_fast.reference.latent_reasoning`.

    Args:
        search: h_s^(0) [..., L_s, D].
        rec: h_r^(0) [..., L_r, D], of the same dtype and leading axes.
        search_lengths: integers [...], or what broadcasts to it.
        rec_lengths: the same.
        weights: float32 or of the states' dtype.
        steps: their number, heads and switches.
        target_keys: W_x e_t of both streams [..., 2, D]; asks for the pooled vectors of every step
            (:func:`lcr_fast.reference.pool_steps`).
        noise: reasons from N noisy copies of states [B, L, D] (paper, Eq. 14),
            h_n^(0) = h^(0) + gamma eps_n, eps_n ~ N(0, I) on valid positions; the results have an
            axis [B, N, ...] for them. Fused backends draw the noise where they read h^(0), in
            backward again, and never store it. With neither pooled vectors nor dropout.
        dropout: acts on every sublayer's output, on states [B, L, D].
        backend: ``auto``, ``reference``, ``triton`` or ``cpp``.

    Raises ValueError on other shapes or dtypes, and where ``backend`` cannot serve the call.

    """
    check_reasoning(search, rec, search_lengths, rec_lengths, weights, steps)
    leading = search.shape[:-2]
    if target_keys is not None and target_keys.shape != (*leading, 2, search.shape[-1]):
        raise ValueError(
            f"target_keys must be {[*leading, 2, search.shape[-1]]}, got {list(target_keys.shape)}"
        )
    if dropout is not None:
        dropout.check(search)
    if noise is not None:
        noise.check(search)
        if dropout is not None or target_keys is not None:
            raise ValueError("noise goes with neither dropout nor target_keys")
    case = case_of(search, rec, weights, steps)
    chosen = LATENT_REASONING.choose(backend, case, notice=search.dtype != torch.float64)
    if chosen == "reference" or steps.n_steps == 0:
        if noise is not None:
            search, rec = noise.added(search, SEARCH), noise.added(rec, REC)
            search_lengths, rec_lengths = search_lengths.unsqueeze(1), rec_lengths.unsqueeze(1)
        states = latent_states(
            search, rec, search_lengths, rec_lengths, weights, steps, dropout=dropout
        )
        pooled = None
        if target_keys is not None:
            pooled = reference.pool_steps(states, search_lengths, rec_lengths, target_keys)
        return Reasoned(*states.h[-1], pooled)
    search_lengths = _flat(search_lengths, leading)
    rows, threshold, seed = dropout_key(dropout, search_lengths)
    if target_keys is None:
        keys = search.new_empty(0)
    else:
        keys = target_keys.to(search.dtype).flatten(0, -3).contiguous()
    call = _Reasoning(
        search=search.flatten(0, -3).contiguous(),
        rec=rec.flatten(0, -3).contiguous(),
        search_lengths=search_lengths,
        rec_lengths=_flat(rec_lengths, leading),
        rows=rows,
        target_keys=keys,
        weights=tuple(w.contiguous() for w in weights),
        steps=steps.n_steps,
        n_heads=steps.n_heads,
        n_trajectories=1,
        noise_scale=0.0,
        noise_seed=seed.new_empty(0),
        dropout_threshold=threshold,
        dropout_seed=seed,
    )
    axes: tuple[int, ...] = leading
    if noise is not None:
        call = call._replace(
            rows=noise.rows.contiguous(),
            n_trajectories=noise.n_trajectories,
            noise_scale=noise.scale,
            noise_seed=seed_tensor(noise.seed, search_lengths),
        )
        axes = (*leading, noise.n_trajectories)
    out_search, out_rec, pooled = LATENT_REASONING(chosen, call)
    return Reasoned(
        out_search.view(*axes, *search.shape[-2:]),
        out_rec.view(*axes, *rec.shape[-2:]),
        None if target_keys is None else pooled.view(*axes, *pooled.shape[2:]),
    )
