"""What tests and benchmarks share: the parity assertion, random inputs and random models."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcr_fast import ops, reference
from lcr_fast.batch import Batch
from lcr_fast.config import LCRConfig
from lcr_fast.model import LCRSER
from lcr_fast.ops.noise import Dropout, Noise
from lcr_fast.precision import allows_tf32
from lcr_fast.reference import Steps, Streams, length_mask
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


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let torch, and what asks it, multiply float32 in TF32, or not."""
    before = allows_tf32()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("high" if before else "highest")


@contextlib.contextmanager
def every_op_rounded() -> Iterator[None]:
    """Let the reference compute in the dtype of its states: an ordinary half-precision model.

    The reference computes halves in float32 and rounds once, which no kernel can meet that feeds
    halves to tensor cores. The baseline of such a kernel is what a user would run instead: every
    operation in the half dtype, every result rounded.
    """
    with contextlib.ExitStack() as stack:
        for part in (reference.transformer, reference.reasoning, reference.scoring):
            stack.enter_context(mock.patch.object(part, "accumulator", lambda x: x.dtype))
        yield


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


class ReasoningCase(NamedTuple):
    """Shapes and switches of one call of :func:`lcr_fast.ops.latent_reasoning`."""

    dim: int = 32
    n_heads: int = 2
    search_len: int = 5
    rec_len: int = 7
    n_users: int = 6
    steps: int = 2
    share_steps: bool = True
    ffn_dim: int = 32  # 0 for none
    dropout: float = 0.0
    pooled: bool = True
    n_trajectories: int = 0  # with noise; 0 for none
    noise_scale: float = 0.5
    scale: float = 1.0  # of the states
    offset: float = 0.0  # added to the states
    out_scale: float = 1.0  # of the projections that end a sublayer
    padding: float = math.nan  # of the states, beyond their lengths


class EncoderCase(NamedTuple):
    """Shapes and switches of one call of :func:`lcr_fast.ops.encode`."""

    dim: int = 32
    n_heads: int = 2
    ffn_dim: int = 48
    n_layers: int = 2
    search_len: int = 5
    rec_len: int = 7
    n_users: int = 6
    dropout: float = 0.0
    padding: float = math.nan  # of the states, beyond their lengths


class Call(NamedTuple):
    """One call of either: its inputs, and the upstream gradients of its results."""

    case: Any
    inputs: dict[str, Tensor]  # what has a gradient: search, rec, target_keys, the weights
    lengths: Streams
    rows: Tensor  # int64 [B]
    upstream: dict[str, Tensor]  # search, rec, pooled

    def to(
        self,
        dtype: torch.dtype,
        weights: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> "Call":
        """Cast all that is floating point; the weights to a dtype of their own, if given."""

        def cast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: t.to(device, weights if weights and name in _WEIGHTS else dtype)
                for name, t in tensors.items()
            }

        n_search, n_rec = self.lengths
        return self._replace(
            inputs=cast(self.inputs),
            lengths=(n_search.to(device), n_rec.to(device)),
            rows=self.rows.to(device),
            upstream=cast(self.upstream),
        )


_WEIGHTS = {*ReasoningWeights._fields, *EncoderWeights._fields}


def random_reasoning(case: ReasoningCase, seed: int = 0) -> Call:
    """Draw a call in float64.

    The first users have, in this order: both histories full, no search, no recommendation event,
    neither, one event of each. Rows are any 64 bits. Upstream gradients are random at padding too,
    where they must not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    config = LCRConfig(
        dim=case.dim, n_heads=case.n_heads, ffn_dim=case.ffn_dim, step_ffn=case.ffn_dim > 0,
        steps=case.steps, share_steps=case.share_steps, max_search_len=case.search_len,
        max_rec_len=case.rec_len,
    )  # fmt: skip
    _, weights, _ = random_weights(config, generator)
    search, rec, *lengths = random_streams(
        config, case.n_users, generator, torch.float64, case.padding
    )

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {"search": case.scale * search + case.offset, "rec": case.scale * rec + case.offset}
    leading = (case.n_users, case.n_trajectories) if case.n_trajectories else (case.n_users,)
    upstream = {
        "search": draw(*leading, *search.shape[1:]),
        "rec": draw(*leading, *rec.shape[1:]),
    }
    if case.pooled and not case.n_trajectories:
        inputs["target_keys"] = draw(case.n_users, 2, case.dim) * case.dim**-0.5
        upstream["pooled"] = draw(case.n_users, case.steps, 2, 2, case.dim)
    for name, w in weights._asdict().items():
        inputs[name] = w.detach() * (case.out_scale if "out" in name else 1.0)
    rows = torch.randint(-(2**63), 2**63 - 1, (case.n_users,), generator=generator)
    return Call(case, inputs, (lengths[0], lengths[1]), rows, upstream)


def run_reasoning(call: Call, backend: str) -> dict[str, Tensor]:
    """Run forward and backward: every result by its name, every gradient as ``d<name>``."""
    case = call.case
    leaves = {name: t.detach().requires_grad_() for name, t in call.inputs.items()}
    streams = (leaves["search"], leaves["rec"], *call.lengths)
    weights = ReasoningWeights(*(leaves[name] for name in ReasoningWeights._fields))
    noise = dropout = None
    if case.n_trajectories:
        noise = Noise(case.n_trajectories, case.noise_scale, _NOISE_SEED, call.rows)
    elif case.dropout:
        dropout = Dropout(case.dropout, _DROPOUT_SEED, call.rows)
    reasoned = ops.latent_reasoning(
        *streams, weights, Steps(case.steps, case.n_heads), noise=noise, dropout=dropout,
        target_keys=leaves.get("target_keys"), backend=backend,
    )  # fmt: skip
    results = {k: t for k, t in reasoned._asdict().items() if t is not None}
    gradients = torch.autograd.grad(
        list(results.values()),
        list(leaves.values()),
        [call.upstream[k] for k in results],
        allow_unused=True,
    )
    results = {name: t.detach() for name, t in results.items()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


# 64-bit keys whose halves both matter.
_NOISE_SEED, _DROPOUT_SEED = 0x1234567_89ABCDEF, 0x7EDCBA98_76543210


def random_encoder(case: EncoderCase, seed: int = 0) -> Call:
    """Draw a call in float64, as :func:`random_reasoning` does."""
    generator = torch.Generator().manual_seed(seed)
    config = LCRConfig(
        dim=case.dim, n_heads=case.n_heads, ffn_dim=case.ffn_dim, n_layers=case.n_layers,
        max_search_len=case.search_len, max_rec_len=case.rec_len,
    )  # fmt: skip
    weights, _, _ = random_weights(config, generator)
    search, rec, *lengths = random_streams(
        config, case.n_users, generator, torch.float64, case.padding
    )
    upstream = {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for name, x in (("search", search), ("rec", rec))
    }
    inputs = {"search": search, "rec": rec}
    inputs |= {name: w.detach() for name, w in weights._asdict().items()}
    rows = torch.randint(-(2**63), 2**63 - 1, (case.n_users,), generator=generator)
    return Call(case, inputs, (lengths[0], lengths[1]), rows, upstream)


def encode(call: Call, backend: str) -> Streams:
    """Run a call of :func:`lcr_fast.ops.encode` as it stands."""
    case = call.case
    return ops.encode(
        call.inputs["search"],
        call.inputs["rec"],
        *call.lengths,
        EncoderWeights(*(call.inputs[name] for name in EncoderWeights._fields)),
        n_heads=case.n_heads,
        dropout=Dropout(case.dropout, _DROPOUT_SEED, call.rows) if case.dropout else None,
        backend=backend,
    )


def run_encoder(call: Call, backend: str) -> dict[str, Tensor]:
    """Run forward and backward, as :func:`run_reasoning` does."""
    leaves = {name: t.detach().requires_grad_() for name, t in call.inputs.items()}
    search, rec = encode(call._replace(inputs=leaves), backend)
    gradients = torch.autograd.grad(
        (search, rec), list(leaves.values()), (call.upstream["search"], call.upstream["rec"])
    )
    names = (f"d{name}" for name in leaves)
    results = {"search": search.detach(), "rec": rec.detach()}
    return results | dict(zip(names, gradients, strict=True))


def split_weights(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take packed gradients apart, so that a large part does not hide an error in a small one.

    By stream; queries and keys of a projection apart from its values; by norm. Queries and keys
    stay together, as the exact gradient of a key's bias is 0.
    """
    parts = {}
    for name, t in results.items():
        if name.removeprefix("d") not in _WEIGHTS:
            parts[name] = t
            continue
        for x, of_stream in zip(("search", "rec"), t.unbind(1), strict=True):
            if "qkv" in name:
                third = of_stream.shape[1] // 3
                parts[f"{name}[{x}, qk]"] = of_stream[:, : 2 * third]
                parts[f"{name}[{x}, v]"] = of_stream[:, 2 * third :]
            elif "norm" in name:
                for i, norm in enumerate(of_stream.unbind(1)):
                    parts[f"{name}[{x}, LN{i + 1}]"] = norm
            else:
                parts[f"{name}[{x}]"] = of_stream
    return parts


class Baseline(NamedTuple):
    """What :func:`run_reasoning` returns for the exact call, and for eager ones."""

    exact: dict[str, Tensor]
    eager: list[dict[str, Tensor]]


def neighbours(tensors: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Move every number up or down by one unit roundoff: as good a rounding of the same inputs.

    That is TF32's where a GPU multiplies so: it would round a smaller move away.
    """

    def move(t: Tensor) -> Tensor:
        signs = 2 * torch.randint(0, 2, t.shape, generator=generator) - 1
        in_tf32 = t.dtype == torch.float32 and t.is_cuda and allows_tf32()
        u = 2**-11 if in_tf32 else torch.finfo(t.dtype).eps / 2
        return (t.double() * (1 + 1.01 * u * signs.to(t.device))).to(t.dtype)

    return {name: move(t) for name, t in tensors.items()}


def _run_reference(call: Any, run: Callable[[Any, str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Run a call on the reference, by torch's plain attention where its fused one is infinite.

    That has happened on an H200 (torch 2.11): gradients of one head of 64 columns in float16.
    """
    results = run(call, "reference")
    if all(bool(torch.isfinite(t).all()) for t in results.values()):
        return results
    with sdpa_kernel(SDPBackend.MATH):
        return run(call, "reference")


def reasoning_baseline(
    call: Any, run: Callable[[Any, str], dict[str, Tensor]] = run_reasoning
) -> Baseline:
    """Run the reference in float64, and three times in the call's dtype (:func:`every_op_rounded`).

    A deep computation amplifies its first rounding errors, by luck more or less; one eager run is
    a poor measure of that. So two more start from inputs that are one rounding error away.
    ``run`` computes a call on a backend; with another one, the call may be of another op.
    """
    dtype = next(iter(call.inputs.values())).dtype
    generator = torch.Generator().manual_seed(0)
    calls = [call] + [call._replace(inputs=neighbours(call.inputs, generator)) for _ in range(2)]
    with every_op_rounded() if dtype.itemsize < 4 else contextlib.nullcontext():
        eager = [_run_reference(near, run) for near in calls]
    return Baseline(run(call.to(torch.float64), "reference"), eager)


#: What a fused backend may lose, as a multiple of the eager error. Calibrated: see
#: tests/test_parity_rule_reasoning.py.
REASONING_FACTOR = 3.0


def assert_parity_with_luck(
    name: str, fused: Tensor, eager: list[Tensor], exact: Tensor, factor: float
) -> None:
    """Apply :func:`assert_parity` with the eager result of several that has the largest RMS error.

    One eager run may be near the exact result by luck; others start from :func:`neighbours`.
    """
    errors = [_rms(t.double() - exact) if exact.numel() else 0.0 for t in eager]
    assert_parity(name, fused, eager[errors.index(max(errors))], exact, factor)


def assert_reasoning_parity(
    fused: dict[str, Tensor], baseline: Baseline, factor: float = REASONING_FACTOR
) -> None:
    """Apply :func:`assert_parity_with_luck` to what :func:`run_reasoning` returns.

    Weights are taken apart.
    """
    assert fused.keys() == baseline.exact.keys()
    exact, fused = split_weights(baseline.exact), split_weights(fused)
    eager = [split_weights(results) for results in baseline.eager]
    for name, truth in exact.items():
        near = [results[name] for results in eager]
        assert_parity_with_luck(name, fused[name], near, truth, factor)


def relu_inputs(call: Any, run: Callable[[Any, str], dict[str, Tensor]]) -> list[Tensor]:
    """Run a call on the reference and give what its ReLUs read, [users, ..., L, F] each."""
    inputs, relu = [], torch.relu

    def noting(x: Tensor) -> Tensor:
        inputs.append(x.detach())
        return relu(x)

    with mock.patch.object(torch.nn.functional, "relu", noting):
        run(call, "reference")
    return inputs


def without_kinks(call: Call, run: Callable[[Any, str], dict[str, Tensor]] = run_reasoning) -> Call:
    """Take the upstream gradients from users, or trajectories, where rounding decides a ReLU.

    Its gradient jumps at 0. Where an input is nearer to 0 than what a backend may lose there, which
    eager's largest error in the event tells, a user has two gradients, both right and far apart.
    Results are held to the rule all the same. Where hardly a user would be left, as in halves,
    nothing is taken: so many inputs are near 0 that eager's runs differ by such jumps, too.
    """
    dtype = next(iter(call.inputs.values())).dtype
    if dtype.itemsize < 4:
        return call
    leading = call.upstream["search"].shape[:-2]
    is_clear = torch.ones(leading, dtype=torch.bool, device=call.rows.device)
    inputs = (relu_inputs(each, run) for each in (call, call.to(torch.float64)))
    for eager, exact in zip(*inputs, strict=True):
        # Padding counts like an event, though it has no gradient: a stream's ReLUs do not tell.
        lost = (eager.double() - exact).abs().amax(-1, keepdim=True)
        is_clear &= ~(exact.abs() < REASONING_FACTOR * lost).flatten(len(leading)).any(-1)
    if is_clear.sum() < is_clear.numel() / 4:
        return call

    def clear(t: Tensor) -> Tensor:
        return t.masked_fill(~is_clear.view(*leading, *[1] * (t.ndim - len(leading))), 0.0)

    return call._replace(upstream={name: clear(t) for name, t in call.upstream.items()})


def assert_call_parity(
    call: Call,
    backend: str,
    run: Callable[[Any, str], dict[str, Tensor]] = run_reasoning,
    factor: float = REASONING_FACTOR,
) -> None:
    """Run a call on a backend and hold it to the rule (:func:`without_kinks`)."""
    call = without_kinks(call, run)
    assert_reasoning_parity(run(call, backend), reasoning_baseline(call, run), factor)
