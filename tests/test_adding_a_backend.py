"""docs/adding-a-backend.md, followed: a toy backend of scoring, as the page says, step by step."""

from typing import NamedTuple

import pytest
import torch

from lcr_fast import ops, reference
from lcr_fast.ops import adaptive, lookup, noise, ranking, reasoning, scoring
from lcr_fast.ops._extension import extension_error
from lcr_fast.ops._op import Backend, Op
from lcr_fast.ops.noise import HEAD_SITES, Dropout
from lcr_fast.testing import assert_parity
from lcr_fast.weights import ScoringWeights

OPS = (
    noise.NORMAL_NOISE, noise.DROPOUT_MASKS, reasoning.ENCODE, reasoning.LATENT_REASONING,
    adaptive.ADAPTIVE_REASONING, scoring.SCORE, scoring.SCORE_TOPK, scoring.SCORE_RANK,
    ranking.RANKING_METRICS, ranking.CATALOGUE_METRICS, lookup.EMBED, lookup.SEEN_BONUS,
)  # fmt: skip
N_USERS, D, WIDTHS = 5, 8, (6, 3)
IDS = torch.randint(0, 9, (N_USERS, 7), generator=torch.Generator().manual_seed(1))

launches: list[str] = []


# -- 1. the kernel: launchers with the arguments of the schema, without autograd ------------------


def _differentiable(call: scoring._Score) -> list[torch.Tensor]:
    return [
        call.search, call.rec, call.user, call.target_weight, *call.mlp_weights, *call.mlp_biases
    ]  # fmt: skip


def _scores(call: scoring._Score, candidates: torch.Tensor) -> torch.Tensor:
    masks = ()
    if call.dropout_threshold:
        dropout = Dropout(call.dropout_threshold / 65536, call.dropout_seed, call.dropout_rows)
        masks = tuple(
            dropout.draw(HEAD_SITES + i, 1, candidates.shape[1], w.shape[0])[0].unsqueeze(1)
            for i, w in enumerate(call.mlp_weights[:-1])
        )
    return reference.score(
        call.search,
        call.rec,
        call.search_lengths.unsqueeze(1),
        call.rec_lengths.unsqueeze(1),
        candidates.unsqueeze(1),
        call.user.unsqueeze(1) if call.user.numel() else None,
        ScoringWeights(call.target_weight, call.mlp_weights, call.mlp_biases, call.dot),
        masks=masks,
    )


def _call(arguments) -> scoring._Score:
    """Read the arguments of the schema; a list of tensors comes as a list."""
    return scoring._Score(*(tuple(a) if isinstance(a, list) else a for a in arguments))


def toy_score_fwd(*arguments):
    launches.append("fwd")
    call = _call(arguments)
    return _scores(call, call.items[call.ids])


def toy_score_bwd(dscores, *arguments):
    launches.append("bwd")
    call = _call(arguments)
    n = len(call.search)
    candidates = call.items[call.ids.expand(n, -1)].requires_grad_()
    call = scoring._Score(
        *(
            tuple(w.detach().requires_grad_() for w in part)
            if isinstance(part, tuple)
            else part.detach().requires_grad_()
            if isinstance(part, torch.Tensor) and part.is_floating_point()
            else part
            for part in call
        )
    )
    with torch.enable_grad():
        scores = _scores(call, candidates)
        search, rec, user, weight, *mlp = torch.autograd.grad(
            scores,
            [*_differentiable(call)],
            dscores,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        (dcandidates,) = torch.autograd.grad(scores, candidates, dscores)
    n_layers = len(call.mlp_weights)
    return search, rec, dcandidates, user, weight, mlp[:n_layers], mlp[n_layers:]


# -- 2. the obstacle: what it cannot serve --------------------------------------------------------


def toy_obstacle(case: scoring.ScoringCase) -> str | None:
    if case.device != "cpu":
        return "it needs CPU tensors"
    return None if case.dtype == torch.float32 else f"it computes float32, not {case.dtype}"


# -- 3. the Backend, entered in the list of the op ------------------------------------------------

TOY = Backend("toy", "toy_", ("cpu",), toy_obstacle, [toy_score_fwd, toy_score_bwd])
scoring.SCORE.register(TOY)  # what the constructor does for the backends of its list


@pytest.fixture(autouse=True)
def _entered(monkeypatch):
    """Enter it before the others, so that ``auto`` takes it."""
    monkeypatch.setattr(scoring.SCORE, "backends", (TOY, *scoring.SCORE.backends))
    launches.clear()


# -- everything else follows ----------------------------------------------------------------------


def draw(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Draw what has a gradient."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "search": (N_USERS, 4, D), "rec": (N_USERS, 6, D), "table": (9, D), "user": (N_USERS, D),
        "target_weight": (2, D, D), "w1": (WIDTHS[0], 4 * D), "w2": WIDTHS[::-1],
        "w3": (1, WIDTHS[1]), "b1": WIDTHS[:1], "b2": WIDTHS[1:], "b3": (1,),
    }  # fmt: skip
    drawn = {k: torch.randn(shape, generator=g, dtype=torch.float64) for k, shape in shapes.items()}
    return {k: t.to(dtype).requires_grad_() for k, t in drawn.items()}


def run(t: dict[str, torch.Tensor], backend: str, dropout: float = 0.0) -> torch.Tensor:
    weights = ScoringWeights(
        t["target_weight"], (t["w1"], t["w2"], t["w3"]), (t["b1"], t["b2"], t["b3"]), dot=True
    )
    return ops.score(
        t["search"], t["rec"], torch.tensor([4, 0, 2, 1, 4]), torch.tensor([6, 3, 0, 1, 6]),
        t["table"], t["user"], weights, ids=IDS, backend=backend,
        dropout=Dropout(dropout, 3, torch.arange(N_USERS)) if dropout else None,
    )  # fmt: skip


def results(dtype: torch.dtype, backend: str, dropout: float) -> dict[str, torch.Tensor]:
    t = draw(dtype)
    scores = run(t, backend, dropout)
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    gradients = torch.autograd.grad(scores, list(t.values()), upstream)
    return {"scores": scores.detach(), **dict(zip(t, gradients, strict=True))}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_results_and_every_gradient(dropout):
    found = results(torch.float32, "toy", dropout)
    assert launches == ["fwd", "bwd"]
    eager, exact = (results(t, "reference", dropout) for t in (torch.float32, torch.float64))
    for name, value in found.items():
        assert_parity(name, value, eager[name], exact[name])


def test_auto_takes_it_first():
    with torch.no_grad():
        assert torch.equal(run(draw(), "auto"), run(draw(), "toy"))
    assert launches == ["fwd", "fwd"]


def test_the_obstacle_is_what_a_refused_call_says():
    with pytest.raises(ValueError, match="'toy' cannot serve score: it computes float32, not"):
        run(draw(torch.float64), "toy")
    case = scoring.ScoringCase("cuda", torch.float32, D, WIDTHS)
    assert list(scoring.SCORE.obstacles(case))[-1] != "reference"
    assert scoring.SCORE.obstacles(case)["toy"] == "it needs CPU tensors"


def test_it_compiles_by_the_fakes_of_the_op():
    t = draw()
    compiled = torch.compile(lambda: run(t, "toy"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), run(t, "toy"))
    assert launches == ["fwd", "fwd"]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_backends_register_the_schema_of_their_op(op):
    """C++ defines what it implements, Python the rest: the same names and types either way."""
    checked = 0
    for backend in op.backends:
        for name, (schema, _) in op.passes.items():
            if not torch._C._dispatch_has_kernel(f"lcr_fast::{backend.prefix}{name}"):
                continue  # of an extension that is not built
            registered = getattr(torch.ops.lcr_fast, backend.prefix + name).default._schema
            full_name = f"lcr_fast::{backend.prefix}{name}"
            assert registered == torch._C.parse_schema(f"{full_name}{schema}")
            checked += 1
    assert checked


@pytest.mark.skipif(extension_error() is not None, reason="needs the C++ extension")
def test_an_extension_of_other_sources_is_not_used():
    class Call(NamedTuple):
        rows: torch.Tensor
        seed: int

    backend = noise.NORMAL_NOISE.backends[0]
    op = Op("normal_noise", Call, ("eps",), lambda call: call.rows, [backend])
    obstacles = op.obstacles(noise.NoiseCase("cpu"))
    assert obstacles["cpp"] == "the C++ extension was built from other sources: build it again"
    assert op.choose("auto", noise.NoiseCase("cpu")) == "reference"
