"""Encoders, latent cross reasoning and its noisy rollouts.

Reasoning has three implementations: the reference; ``triton`` on CUDA tensors (and on CPU tensors
under Triton's interpreter, if asked for); ``cpp`` on CPU tensors. The fused two serve the defaults
of the model and ``share_steps``, ``step_ffn``; their own limits on sizes and dtypes are in
:func:`reasoning_backends`. What they do not serve runs on the reference. The encoders have the
reference and ``cpp``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lcr_fast import reference
from lcr_fast.noise import dropout_threshold
from lcr_fast.ops._dispatch import choose_backend, extension_obstacle
from lcr_fast.ops._extension import has_kernel
from lcr_fast.ops._triton import current_gpu, triton_obstacle
from lcr_fast.ops.noise import (
    ENCODER_SITES,
    REASONING_SITES,
    STREAM_SITES,
    Dropout,
    normal_noise,
)
from lcr_fast.reference import States, Streams
from lcr_fast.weights import REC, SEARCH, EncoderWeights, ReasoningWeights

# -- who serves -----------------------------------------------------------------------------------

# Looked up once: torch.compile cannot trace the question.
_HAS_CPP = has_kernel("cpu_latent_reasoning_fwd", "cpu")


class ReasoningCase(NamedTuple):
    """All that decides which implementations can serve a call."""

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


def _triton_obstacle(case: ReasoningCase) -> str | None:
    if (reason := triton_obstacle(case.device)) is not None:
        return reason
    from lcr_fast.kernels import reasoning as kernels

    return _switch_obstacle(case) or kernels.obstacle(
        dim=case.dim, n_heads=case.n_heads, ffn_dim=case.ffn_dim, search_len=case.search_len,
        rec_len=case.rec_len, dtype=case.dtype,
        gpu=current_gpu() if case.device == "cuda" else None,
    )  # fmt: skip


def _cpp_obstacle(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return "it needs CPU tensors"
    if (error := extension_obstacle()) is not None:
        return error
    if not _HAS_CPP:
        return "the C++ extension was built without it"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it serves float32 and halves, not {dtype}"
    return None


def reasoning_backends(case: ReasoningCase) -> dict[str, str | None]:
    """List the implementations of :func:`latent_reasoning`, each with None or what prevents it."""
    cpp = _cpp_obstacle(case.device, case.dtype) or _switch_obstacle(case)
    triton = _triton_obstacle(case)
    if case.device == "cpu":  # the interpreter is for tests: never chosen by itself
        return {"cpp": cpp, "reference": None, "triton": triton}
    return {"triton": triton, "reference": None, "cpp": cpp}


def encode_backends(device: str, dtype: torch.dtype) -> dict[str, str | None]:
    """List the implementations of :func:`encode`, each with None or what prevents it."""
    return {"cpp": _cpp_obstacle(device, dtype), "reference": None}


def expected_backend(device: str, dtype: torch.dtype) -> str | None:
    """Name the backend that a caller counts on; float64 is for exactness, not for speed."""
    if dtype == torch.float64:
        return None
    return {"cpu": "cpp", "cuda": "triton"}.get(device)


# -- registered ops -------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor search, Tensor rec, Tensor search_lengths, Tensor rec_lengths, Tensor rows, "
    "Tensor target_keys, Tensor[] weights"
)
_SCALARS = (
    "int steps, int n_heads, int n_trajectories, float noise_scale, int noise_seed, "
    "int dropout_threshold, int dropout_seed"
)
_FWD_SCHEMA = (
    f"({_ARGUMENTS}, {_SCALARS}, bool save_states) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BWD_SCHEMA = (
    f"(Tensor dsearch_out, Tensor drec_out, Tensor dpooled, {_ARGUMENTS}, {_SCALARS}, "
    "Tensor saved_search, Tensor saved_rec) -> (Tensor, Tensor, Tensor, Tensor[])"
)


def _fwd_fake(
    search, rec, search_lengths, rec_lengths, rows, target_keys, weights, steps, n_heads,
    n_trajectories, noise_scale, noise_seed, dropout_threshold, dropout_seed, save_states,
):  # fmt: skip
    B, n_search, D = search.shape
    n_rec, N, n_saved = rec.shape[1], n_trajectories, steps - 1 if save_states else 0
    pooled = (B, N, steps, 2, 2, D) if target_keys.ndim == 3 else (0,)
    return (
        search.new_empty(B, N, n_search, D),
        rec.new_empty(B, N, n_rec, D),
        search.new_empty(pooled),
        search.new_empty(n_saved, B, N, n_search, D),
        rec.new_empty(n_saved, B, N, n_rec, D),
    )


def _bwd_fake(
    dsearch_out, drec_out, dpooled, search, rec, search_lengths, rec_lengths, rows, target_keys,
    weights, *_,
):  # fmt: skip
    inputs = (torch.empty_like(t) for t in (search, rec, target_keys))
    return (*inputs, [torch.empty_like(w) for w in weights])


def _encode_fwd_fake(x, *_):
    return torch.empty_like(x)


def _encode_bwd_fake(dout, x, lengths, rows, weights, *_):
    return torch.empty_like(x), [torch.empty_like(w) for w in weights]


def _triton_fwd(*args):
    from lcr_fast.kernels import reasoning as kernels

    return kernels.latent_reasoning_fwd(*args)


def _triton_bwd(*args):
    from lcr_fast.kernels import reasoning as kernels

    return kernels.latent_reasoning_bwd(*args)


# Schemas are known before Triton is: importing this package must not import it.
_LIBRARY = torch.library.Library("lcr_fast", "FRAGMENT")
for _name, _schema, _launch in (
    ("triton_latent_reasoning_fwd", _FWD_SCHEMA, _triton_fwd),
    ("triton_latent_reasoning_bwd", _BWD_SCHEMA, _triton_bwd),
):
    _LIBRARY.define(_name + _schema)
    for _device in ("CUDA", "CPU"):  # CPU: the interpreter
        _LIBRARY.impl(_name, _launch, _device)
for _prefix in ("triton", "cpu"):
    if _prefix == "triton" or _HAS_CPP:
        torch.library.register_fake(f"lcr_fast::{_prefix}_latent_reasoning_fwd", _fwd_fake)
        torch.library.register_fake(f"lcr_fast::{_prefix}_latent_reasoning_bwd", _bwd_fake)
if _HAS_CPP:
    torch.library.register_fake("lcr_fast::cpu_encode_fwd", _encode_fwd_fake)
    torch.library.register_fake("lcr_fast::cpu_encode_bwd", _encode_bwd_fake)

_OPS = {"triton": "triton_latent_reasoning", "cpp": "cpu_latent_reasoning"}


class _Scalars(NamedTuple):
    """The numbers that every pass of one call shares, in the order of the schema."""

    steps: int
    n_heads: int
    n_trajectories: int = 1
    noise_scale: float = 0.0
    noise_seed: int = 0
    dropout_threshold: int = 0
    dropout_seed: int = 0


class _LatentReasoning(torch.autograd.Function):
    """Saves the inputs and, by the forward op, each later step's input; all else is recomputed."""

    @staticmethod
    def forward(
        ctx, op, scalars, search, rec, search_lengths, rec_lengths, rows, target_keys, *weights
    ):
        inputs = (search, rec, search_lengths, rec_lengths, rows, target_keys)
        out_search, out_rec, pooled, *saved = getattr(torch.ops.lcr_fast, f"{op}_fwd")(
            *inputs, list(weights), *scalars, True
        )
        ctx.op, ctx.scalars, ctx.n_weights = op, scalars, len(weights)
        ctx.save_for_backward(*inputs, *weights, *saved)
        return out_search, out_rec, pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, dsearch_out, drec_out, dpooled):
        tensors = ctx.saved_tensors
        inputs, weights, saved = tensors[:6], tensors[6:-2], tensors[-2:]
        dsearch, drec, dkeys, dweights = getattr(torch.ops.lcr_fast, f"{ctx.op}_bwd")(
            dsearch_out.contiguous(), drec_out.contiguous(), dpooled.contiguous(),
            *inputs, list(weights), *ctx.scalars, *saved,
        )  # fmt: skip
        return None, None, dsearch, drec, None, None, None, dkeys, *dweights


def _fused(
    backend: str,
    search: Tensor,  # [B, L_s, D]
    rec: Tensor,  # [B, L_r, D]
    search_lengths: Tensor,  # [B]
    rec_lengths: Tensor,  # [B]
    rows: Tensor | None,  # int64 [B]
    target_keys: Tensor | None,  # [B, 2, D]
    weights: ReasoningWeights,
    scalars: _Scalars,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a fused op, in training with its backward: [B, N, L, D] twice, [B, N, K, 2, 2, D]."""
    rows = search_lengths.new_empty(0) if rows is None else rows
    keys = search.new_empty(0) if target_keys is None else target_keys
    inputs = [
        t.contiguous() for t in (search, rec, search_lengths, rec_lengths, rows, keys, *weights)
    ]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        out_search, out_rec, pooled = _LatentReasoning.apply(_OPS[backend], scalars, *inputs)
    else:
        op = getattr(torch.ops.lcr_fast, f"{_OPS[backend]}_fwd")
        out_search, out_rec, pooled, *_ = op(*inputs[:6], inputs[6:], *scalars, False)
    return out_search, out_rec, None if target_keys is None else pooled


class _Encode(torch.autograd.Function):
    """Saves the inputs; the layers are recomputed."""

    @staticmethod
    def forward(ctx, scalars, x, lengths, rows, *weights):
        ctx.scalars = scalars
        ctx.save_for_backward(x, lengths, rows, *weights)
        return torch.ops.lcr_fast.cpu_encode_fwd(x, lengths, rows, list(weights), *scalars)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, lengths, rows, *weights = ctx.saved_tensors
        dx, dweights = torch.ops.lcr_fast.cpu_encode_bwd(
            dout.contiguous(), x, lengths, rows, weights, *ctx.scalars
        )
        return None, dx, None, None, *dweights


def _encode_cpp(
    x: Tensor,  # [B, L, D]
    lengths: Tensor,  # [B]
    weights: EncoderWeights,
    stream: int,
    n_heads: int,
    dropout: Dropout | None,
) -> Tensor:
    if dropout is None:
        rows, threshold, seed = lengths.new_empty(0), 0, 0
    else:
        rows, threshold, seed = dropout.rows, dropout_threshold(dropout.rate), dropout.seed
    scalars = (stream, n_heads, threshold, seed)
    inputs = [t.contiguous() for t in (x, lengths, rows, *weights)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _Encode.apply(scalars, *inputs)
    return torch.ops.lcr_fast.cpu_encode_fwd(*inputs[:3], inputs[3:], *scalars)


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
    if lengths.is_floating_point() or lengths.ndim != x.ndim - 2:
        raise ValueError(
            f"{lengths_name} must be integers {list(x.shape[:-2])}, "
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
    """Encode one stream: see :func:`lcr_fast.reference.encode`. [..., L, D] -> [..., L, D].

    ``lengths`` [...], or what broadcasts to it. ``dropout`` acts on every sublayer's output, on
    states [B, L, D]; None means none.
    Raises ValueError on other shapes or dtypes, and where ``backend`` cannot serve the call.
    """
    dim = weights.qkv_weight.shape[-1]
    _check_stream(("x", "lengths"), x, lengths, dim)
    _check_heads(dim, n_heads)
    if dropout is not None:
        dropout.check(x)
    available = encode_backends(x.device.type, x.dtype)
    if choose_backend("encode", backend, available) == "cpp":
        flat, n_events = x.flatten(0, -3), lengths.expand(x.shape[:-2]).flatten()
        return _encode_cpp(flat, n_events, weights, stream, n_heads, dropout).view(x.shape)
    masks = None
    if dropout is not None:
        n_layers = weights.qkv_weight.shape[0]
        masks = dropout.draw(ENCODER_SITES + stream * STREAM_SITES, 2 * n_layers, *x.shape[-2:])
    return reference.encode(x, lengths, weights, stream, n_heads=n_heads, masks=masks)


def _check_reasoning(
    search: Tensor, rec: Tensor, search_lengths: Tensor, rec_lengths: Tensor,
    weights: ReasoningWeights, steps: int, n_heads: int,
) -> None:  # fmt: skip
    dim = weights.self_qkv_weight.shape[-1]
    _check_stream(("search", "search_lengths"), search, search_lengths, dim)
    _check_stream(("rec", "rec_lengths"), rec, rec_lengths, dim)
    _check_heads(dim, n_heads)
    if search.dtype != rec.dtype or search.shape[:-2] != rec.shape[:-2]:
        raise ValueError(
            "search and rec must agree in dtype and leading axes, got "
            f"{search.dtype} {list(search.shape)} and {rec.dtype} {list(rec.shape)}"
        )
    n_sets = weights.self_qkv_weight.shape[0]
    if steps < 0 or (n_sets != 1 and n_sets < steps):
        raise ValueError(f"steps must be 0..{n_sets} for {n_sets} sets of weights, got {steps}")


def _choose(
    op: str, backend: str, search: Tensor, rec: Tensor, weights: ReasoningWeights, n_heads: int,
    update: str, cross_memory: str, step_embedding: Tensor | None,
) -> str:  # fmt: skip
    device, dtype = search.device.type, search.dtype
    case = ReasoningCase(
        device, dtype, search.shape[-1], n_heads, weights.ffn_in_weight.shape[-2],
        search.shape[-2], rec.shape[-2], update, cross_memory, step_embedding is not None,
    )  # fmt: skip
    expected = expected_backend(device, dtype)
    return choose_backend(op, backend, reasoning_backends(case), expected)


def latent_states(
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
) -> States:
    """Run K steps and keep every state, for analysis: always on the reference.

    Arguments as for :func:`latent_reasoning`.
    """
    _check_reasoning(search, rec, search_lengths, rec_lengths, weights, steps, n_heads)
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


def latent_reasoning(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    weights: ReasoningWeights,
    steps: int,
    *,
    n_heads: int,
    target_keys: Tensor | None = None,
    step_embedding: Tensor | None = None,
    update: str = "jacobi",
    cross_memory: str = "post_msa",
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> Reasoned:
    """Run K latent cross reasoning steps: see :func:`lcr_fast.reference.latent_reasoning`.

    ``search`` [..., L_s, D] and ``rec`` [..., L_r, D] share dtype and leading axes; the lengths
    are integers [...], or broadcast to it. ``steps`` >= 0. ``target_keys`` [..., 2, D], W_x e_t of
    both streams, asks for the pooled vectors of every step (:func:`reference.pool_steps`).
    ``dropout`` acts on every sublayer's output, on states [B, L, D]; None means none.
    Weights are float32 or of the states' dtype.
    Raises ValueError on other shapes or dtypes, and where ``backend`` cannot serve the call.
    """
    _check_reasoning(search, rec, search_lengths, rec_lengths, weights, steps, n_heads)
    leading = search.shape[:-2]
    if target_keys is not None and target_keys.shape != (*leading, 2, search.shape[-1]):
        raise ValueError(
            f"target_keys must be {[*leading, 2, search.shape[-1]]}, got {list(target_keys.shape)}"
        )
    if dropout is not None:
        dropout.check(search)
    chosen = _choose(
        "latent_reasoning", backend, search, rec, weights, n_heads, update, cross_memory,
        step_embedding,
    )  # fmt: skip
    if chosen == "reference" or steps == 0:
        states = latent_states(
            search, rec, search_lengths, rec_lengths, weights, steps, n_heads=n_heads,
            step_embedding=step_embedding, update=update, cross_memory=cross_memory,
            dropout=dropout,
        )  # fmt: skip
        pooled = None
        if target_keys is not None:
            pooled = reference.pool_steps(states, search_lengths, rec_lengths, target_keys)
        return Reasoned(*states.h[-1], pooled)
    scalars = _Scalars(steps, n_heads)
    rows = None
    if dropout is not None:
        rows = dropout.rows
        scalars = scalars._replace(
            dropout_threshold=dropout_threshold(dropout.rate), dropout_seed=dropout.seed
        )
    out_search, out_rec, pooled = _fused(
        chosen, search.flatten(0, -3), rec.flatten(0, -3),
        search_lengths.expand(leading).flatten(), rec_lengths.expand(leading).flatten(), rows,
        None if target_keys is None else target_keys.to(search.dtype).flatten(0, -3), weights,
        scalars,
    )  # fmt: skip
    return Reasoned(
        out_search.view(search.shape),
        out_rec.view(rec.shape),
        None if pooled is None else pooled.view(*leading, *pooled.shape[2:]),
    )


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
) -> Reasoned:
    """Reason from N noisy copies of each user's h^(0) (paper, Eq. 14).

        h_n^(0) = h^(0) + gamma eps_n,   eps_n ~ N(0, I) on valid positions

    ``search`` [B, L_s, D], ``rec`` [B, L_r, D], lengths [B], ``rows`` int64 [B] names the users for
    the generator (:mod:`lcr_fast.noise`). Dropout is off. Returns states [B, N, L, D]. The fused
    backends draw the noise where they read h^(0), in backward again, and never store it.
    """
    if n_trajectories < 1:
        raise ValueError(f"n_trajectories must be at least 1, got {n_trajectories}")
    if rows.shape != search_lengths.shape or rows.dtype != torch.int64:
        raise ValueError(
            f"rows must be int64 {list(search_lengths.shape)}, got {rows.dtype} {list(rows.shape)}"
        )
    _check_reasoning(search, rec, search_lengths, rec_lengths, weights, steps, n_heads)
    options: dict[str, Any] = {
        "step_embedding": step_embedding, "update": update, "cross_memory": cross_memory,
    }  # fmt: skip
    chosen = _choose("rollout", backend, search, rec, weights, n_heads, **options)
    if chosen != "reference" and steps:
        scalars = _Scalars(steps, n_heads, n_trajectories, noise_scale, seed)
        out_search, out_rec, _ = _fused(
            chosen, search, rec, search_lengths, rec_lengths, rows, None, weights, scalars
        )
        return Reasoned(out_search, out_rec, None)
    noisy = []
    for stream, x in ((SEARCH, search), (REC, rec)):
        length, dim = x.shape[-2:]
        eps = normal_noise(rows, seed, n_trajectories, stream, length, dim, x.dtype)
        noisy.append(x.unsqueeze(1) + noise_scale * eps)  # [B, N, L, D]
    states = latent_states(
        noisy[SEARCH], noisy[REC], search_lengths.unsqueeze(1), rec_lengths.unsqueeze(1),
        weights, steps, n_heads=n_heads, **options,
    )  # fmt: skip
    return Reasoned(*states.h[-1], None)
