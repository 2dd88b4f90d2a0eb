"""Every family of GPU kernels once, forward and backward, at small sizes, against the reference.

    python benchmarks/kernel_check.py [FAMILY ...]

The reference computes on the CPU, so that the GPU runs our kernels and little else: the program is
meant for compute-sanitizer, which :mod:`gpu_check` starts it under. Exit status 1 if a result is
wrong, after all families have run.
"""

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import harness
from lcr_fast import ops
from lcr_fast.config import LCRConfig
from lcr_fast.metrics import TIES
from lcr_fast.model import LCRSER
from lcr_fast.ops import ranking
from lcr_fast.reference import Steps
from lcr_fast.testing import (
    Call,
    EncoderCase,
    ReasoningCase,
    assert_parity,
    assert_reasoning_parity,
    every_op_rounded,
    random_batch,
    random_encoder,
    random_model,
    random_reasoning,
    random_streams,
    random_weights,
    reasoning_baseline,
    run_encoder,
    run_reasoning,
    without_kinks,
)
from lcr_fast.weights import ReasoningWeights, ScoringWeights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
K = 5  # of the best items
HEADS = ("mlp", "mlp_dot")
# Items on either side of a rank, in units of the reference's own error.
_RANK_MARGIN = 4.0


class Sizes(NamedTuple):
    """One stream fits a tile of 32 rows, the other takes a warpgroup's 64."""

    dim: int = 64
    search_len: int = 20
    rec_len: int = 50
    n_users: int = 6
    steps: int = 2
    hidden: tuple[int, int] = (200, 80)
    n_candidates: int = 40
    n_items: int = 1000


class Setting(NamedTuple):
    """What is checked: a dtype and sizes on a device.

    A device ``cpu`` means Triton's interpreter, and C++ where there is no Triton kernel.
    """

    dtype: torch.dtype
    device: str
    sizes: Sizes = Sizes()


# -- encoders and reasoning -----------------------------------------------------------------------


def _check_call(setting: Setting, call: Any, run: Callable[[Any, str], dict[str, Tensor]]) -> None:
    call = without_kinks(call.to(setting.dtype), run)
    found = run(call.to(setting.dtype, device=setting.device), "triton")
    expected = reasoning_baseline(call, run)
    assert_reasoning_parity({name: t.cpu() for name, t in found.items()}, expected)


def lookups(setting: Setting) -> None:
    sizes = setting.sizes
    generator = torch.Generator().manual_seed(0)
    config = LCRConfig(
        n_items=sizes.n_items, dim=sizes.dim, max_search_len=sizes.search_len,
        max_rec_len=sizes.rec_len, backend="reference",
    )  # fmt: skip
    drawn = random_model(config, generator, setting.dtype)
    batch = random_batch(config, sizes.n_users, sizes.n_candidates, generator, n_terms=20)
    batch.candidates[:, -1] = batch.rec_items[:, 0]
    scores = torch.randn(batch.candidates.shape, generator=generator).to(setting.dtype)
    results = []
    for backend, dtype, device in (
        ("triton", setting.dtype, setting.device),
        ("reference", setting.dtype, "cpu"),
        ("reference", torch.float64, "cpu"),
    ):
        model = LCRSER(config.replace(backend=backend)).to(dtype).eval()
        model.load_state_dict(drawn.state_dict())
        model.to(device)
        here = batch.to(device)
        with torch.inference_mode():
            finished = model.finish(scores.to(device, dtype), here, here.candidates)
            finished = finished.nan_to_num(neginf=0.0)  # of padding
            results.append([t.cpu() for t in (*model.embed(here), finished)])
    for name, *found in zip(("search", "rec", "scores"), *results, strict=True):
        assert_parity(name, *found)


def encoding(setting: Setting) -> None:
    sizes = setting.sizes
    for dropout in (0.0, 0.2):
        case = EncoderCase(
            dim=sizes.dim, ffn_dim=sizes.dim, search_len=sizes.search_len, rec_len=sizes.rec_len,
            n_users=sizes.n_users, dropout=dropout,
        )  # fmt: skip
        _check_call(setting, random_encoder(case), run_encoder)


def _forward_alone(call: Call, backend: str) -> dict[str, Tensor]:
    """Reason as inference does, which keeps nothing for a backward."""
    inputs = call.inputs
    weights = ReasoningWeights(*(inputs[name] for name in ReasoningWeights._fields))
    with torch.inference_mode():
        reasoned = ops.latent_reasoning(
            inputs["search"],
            inputs["rec"],
            *call.lengths,
            weights,
            Steps(call.case.steps, call.case.n_heads),
            target_keys=inputs.get("target_keys"),
            backend=backend,
        )
    return {name: t for name, t in reasoned._asdict().items() if t is not None}


def _check_reasoning(setting: Setting, run, **changes) -> None:
    sizes = setting.sizes
    case = ReasoningCase(
        dim=sizes.dim, search_len=sizes.search_len, rec_len=sizes.rec_len, ffn_dim=sizes.dim,
        n_users=sizes.n_users, steps=sizes.steps, **changes,
    )  # fmt: skip
    _check_call(setting, random_reasoning(case), run)


def inference(setting: Setting) -> None:
    _check_reasoning(setting, _forward_alone)
    _check_reasoning(setting, _forward_alone, pooled=False)


def training(setting: Setting) -> None:
    _check_reasoning(setting, run_reasoning, dropout=0.2)


def rollout(setting: Setting) -> None:
    _check_reasoning(setting, run_reasoning, n_trajectories=3)


# -- scoring --------------------------------------------------------------------------------------


class _Scoring(NamedTuple):
    states: tuple[Tensor, Tensor, Tensor, Tensor]
    user: Tensor
    weights: ScoringWeights
    table: Tensor  # [I + 1, D]
    upstream: Tensor  # [B, C]

    def to(self, **where) -> "_Scoring":
        return type(self)(*harness.moved(tuple(self), **where))


def _draw_scoring(sizes: Sizes, head: str) -> _Scoring:
    n_users = sizes.n_users
    generator = torch.Generator().manual_seed(0)
    config = LCRConfig(
        dim=sizes.dim, max_search_len=sizes.search_len, max_rec_len=sizes.rec_len,
        mlp_hidden=sizes.hidden, score=head, user_embedding=True, seen_bonus=False,
    )  # fmt: skip

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return _Scoring(
        random_streams(config, n_users, generator),
        normal(n_users, sizes.dim),
        harness.moved(random_weights(config, generator)[2]),
        normal(sizes.n_items + 1, sizes.dim),
        normal(n_users, sizes.n_candidates),
    )


def _exact_and_eager(function, drawn: _Scoring, dtype: torch.dtype):
    """Run the reference in float64 and in a dtype, both on the same rounded inputs."""
    rounded = drawn.to(dtype=dtype)
    with every_op_rounded() if dtype.itemsize < 4 else contextlib.nullcontext():
        eager = function(rounded, "reference")
    return function(rounded.to(dtype=torch.float64), "reference"), eager


def scoring(setting: Setting) -> None:
    C = setting.sizes.n_candidates

    def run(drawn: _Scoring, backend: str) -> dict[str, Tensor]:
        """Scores, and the gradients of all that has one."""
        search, rec, *lengths = drawn.states
        candidates = drawn.table[1 : C + 1].expand(len(search), C, -1)
        leaves = [t.detach().requires_grad_() for t in (search, rec, candidates, drawn.user)]
        matrix, mlp_weights, mlp_biases, dot = drawn.weights
        parts = [matrix, *mlp_weights, *mlp_biases]
        parts = [w.detach().requires_grad_() for w in parts]
        n = len(mlp_weights)
        weights = ScoringWeights(parts[0], tuple(parts[1 : n + 1]), tuple(parts[n + 1 :]), dot)
        scores = ops.score(*leaves[:2], *lengths, *leaves[2:], weights, backend=backend)
        gradients = torch.autograd.grad(scores, [*leaves, *parts], drawn.upstream)
        names = ["search", "rec", "candidates", "user", "target weight"]
        names += [f"{kind} {i}" for kind in ("weight", "bias") for i in range(n)]
        return {"scores": scores.detach(), **dict(zip(names, gradients, strict=True))}

    for head in HEADS:
        drawn = _draw_scoring(setting.sizes, head)
        found = run(drawn.to(dtype=setting.dtype, device=setting.device), "triton")
        exact, eager = _exact_and_eager(run, drawn, setting.dtype)
        for name, truth in exact.items():
            assert_parity(f"{head} {name}", found[name].cpu(), eager[name], truth, factor=3)


def catalogue(setting: Setting) -> None:
    """Require that the best items have the best scores, and that a rank counts those before it."""
    for head in HEADS:
        _check_catalogue(setting, _draw_scoring(setting.sizes, head))


def _check_catalogue(setting: Setting, drawn: _Scoring) -> None:
    n_users = len(drawn.user)
    exclude = torch.arange(2 * n_users).view(n_users, 2)
    target = torch.arange(1, n_users + 1) * (setting.sizes.n_items // (n_users + 1))

    def score_all(drawn: _Scoring, backend: str) -> Tensor:
        every = drawn.table.unsqueeze(0).expand(n_users, -1, -1)
        return ops.score(*drawn.states, every, drawn.user, drawn.weights, backend=backend)

    ours = drawn.to(dtype=setting.dtype, device=setting.device)
    inputs = (*ours.states, ours.table, ours.user, ours.weights)
    others = {"exclude": exclude.to(setting.device), "backend": "triton"}
    ids, scores = (t.cpu() for t in ops.score_topk(*inputs, K, **others))
    rank = ops.score_rank(*inputs, target.to(setting.device), **others).cpu()

    exact, eager = (t.detach() for t in _exact_and_eager(score_all, drawn, setting.dtype))
    assert_parity("top scores", scores, eager.gather(1, ids), exact.gather(1, ids), factor=3)
    margin = _RANK_MARGIN * (eager.double() - exact).abs().max()
    wanted = exact.gather(1, target[:, None])
    out = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, exclude, True)
    out[:, 0] = True
    others_best = exact.masked_fill(out, -torch.inf).scatter(1, ids, -torch.inf).amax(1)
    assert (exact.gather(1, ids).amin(1) >= others_best - margin).all(), "a better item is missing"
    assert not out.gather(1, ids).any(), "an excluded item is among the best"
    assert all(len(set(row)) == K for row in ids.tolist()), "an item occurs twice"
    out.scatter_(1, target[:, None], True)
    least, most = (1 + ((exact >= wanted + far) & ~out).sum(1) for far in (margin, -margin))
    assert ((rank >= least) & (rank <= most)).all(), f"ranks {rank}, not {least} to {most}"


# -- ranking metrics ------------------------------------------------------------------------------


def ranking_metrics(setting: Setting) -> None:
    """Small integers as scores: every dtype holds them, and many are equal."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-9, 10, shape, generator=generator).to(setting.dtype)

    def on_device(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(setting.device) for name, t in tensors.items()}

    B, n_items = 37, 1003
    counts = torch.randint(1, n_items + 1, (B,), generator=generator)
    lists = {
        "scores": integers(B, n_items),
        "counts": counts,
        "target": counts // 2,
        "excluded": torch.rand(B, n_items, generator=generator) < 0.2,
    }
    vectors = {
        "users": integers(B, 16),
        "items": integers(n_items, 16),
        "target": torch.randint(n_items, (B,), generator=generator),
        "seen": torch.randint(-1, n_items, (B, 7), generator=generator),
    }
    for function, inputs in (
        (ranking.ranking_metrics, lists),
        (ranking.catalogue_metrics, vectors),
    ):
        for ties in TIES:
            found = function(**on_device(inputs), ties=ties, backend="cpp", validate=True)
            expected = function(**inputs, ties=ties, backend="reference")
            for name, value in expected.items():
                torch.testing.assert_close(found[name].cpu(), value, rtol=1e-6, atol=1e-6)


FAMILIES: dict[str, Callable[[Setting], None]] = {
    "lookups": lookups,
    "encoding": encoding,
    "inference": inference,
    "training": training,
    "rollout": rollout,
    "scoring": scoring,
    "catalogue": catalogue,
    "ranking": ranking_metrics,
}


def check(families: Iterable[str], settings: dict[str, Setting]) -> int:
    """Run families in every setting, print a line each; return how many failed."""
    failed = 0
    for family in families:
        for name, setting in settings.items():
            try:
                FAMILIES[family](setting)
            except Exception:  # whatever a GPU makes of it, the others have their turn
                failed += 1
                traceback.print_exc()
                print(f"{family}, {name}: FAILED", flush=True)
            else:
                print(f"{family}, {name}: as the reference", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("families", metavar="FAMILY", nargs="*", help=", ".join(FAMILIES))
    families = parser.parse_args(argv).families or list(FAMILIES)
    if unknown := [name for name in families if name not in FAMILIES]:
        parser.error(f"no family {', '.join(unknown)}: choose from {', '.join(FAMILIES)}")
    if not torch.cuda.is_available():
        parser.error("this torch sees no GPU")
    settings = {name: Setting(dtype, "cuda") for name, dtype in DTYPES.items()}
    return min(check(families, settings), 1)


if __name__ == "__main__":
    sys.exit(main())
