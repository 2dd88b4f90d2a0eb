"""``torch.autocast`` is a cast of the states, on every backend, and of nothing else."""

import functools

import pytest
import torch

from lcr_fast import LCRSER, Batch, LCRConfig, grpo, ops
from lcr_fast.capture import capture
from lcr_fast.objectives import alignment, rank_loss, tcl
from lcr_fast.ops._extension import extension_error
from lcr_fast.ops._op import Op
from lcr_fast.ops.noise import Noise
from lcr_fast.reference import Exits, Steps
from lcr_fast.testing import (
    EncoderCase,
    ReasoningCase,
    assert_parity,
    random_batch,
    random_encoder,
    random_model,
    random_reasoning,
)
from lcr_fast.weights import EncoderWeights, ReasoningWeights
from scoring_cases import Case
from where import GPU, HALVES

BOTH = [torch.bfloat16, torch.float16]
CONFIG = LCRConfig(
    n_items=40, n_users=9, n_queries=9, n_terms=9, dim=32, n_heads=2, steps=2, max_search_len=4,
    max_rec_len=5, max_clicks=3, readout=0.7,
)  # fmt: skip
BACKENDS = [
    "reference",
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(
            extension_error() is not None, reason="the C++ extension is not built"
        ),
    ),
    pytest.param("triton", marks=pytest.mark.gpu),
]


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend == "triton" else "cpu"


def _encode(backend):
    call = random_encoder(EncoderCase()).to(torch.float32, device=device_of(backend))

    def run(x):
        weights = EncoderWeights(*(x[name] for name in EncoderWeights._fields))
        return ops.encode(x["search"], x["rec"], *call.lengths, weights, n_heads=2, backend=backend)

    return call.inputs, run


def _reason(backend, n_trajectories=0):
    case = ReasoningCase(n_trajectories=n_trajectories, pooled=not n_trajectories)
    call = random_reasoning(case).to(torch.float32, device=device_of(backend))
    noise = Noise(n_trajectories, 0.5, 3, call.rows) if n_trajectories else None

    def run(x):
        weights = ReasoningWeights(*(x[name] for name in ReasoningWeights._fields))
        reasoned = ops.latent_reasoning(
            x["search"], x["rec"], *call.lengths, weights, Steps(2, 2), noise=noise,
            target_keys=x.get("target_keys"), backend=backend,
        )  # fmt: skip
        return [t for t in reasoned if t is not None]

    return call.inputs, run


def _score(backend):
    case = Case(max_search_len=5, max_rec_len=7).to(device_of(backend))
    return case.tensors, lambda x: [case.call(backend, x)]


OPS = {
    "encode": _encode,
    "reason": _reason,
    "roll out": functools.partial(_reason, n_trajectories=2),
    "score": _score,
}


@pytest.mark.parametrize(
    "low", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_an_op_gives_the_bits_of_states_that_were_cast(op, backend, low):
    if backend == "triton" and low not in HALVES:
        pytest.skip("the interpreter truncates float32 to bfloat16")
    inputs, run = OPS[op](backend)
    device = device_of(backend)

    def passes(cast, autocast: bool):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        with torch.autocast(device, low, enabled=autocast):
            results = run({name: cast(name, t) for name, t in leaves.items()})
            # Backward within is ill-advised, and must not cast what kernels hand to torch either.
            upstream = [torch.linspace(-1, 1, t.numel()).to(t).view_as(t) for t in results]
            with torch.autocast(device, low, enabled=autocast and backend != "reference"):
                found = torch.autograd.grad(results, list(leaves.values()), upstream)
        return [*results, *found]

    by_hand = passes(lambda name, t: t.to(low) if name in ("search", "rec") else t, False)
    by_autocast = passes(lambda name, t: t, True)
    n = len(by_hand) - len(inputs)
    assert {t.dtype for t in by_autocast[:n]} == {low}
    assert {t.dtype for t in by_autocast[n:]} == {torch.float32}
    for a, b in zip(by_autocast, by_hand, strict=True):
        assert torch.equal(a, b)


def make_case(backend: str, dtype=torch.float32, **changes) -> tuple[LCRSER, Batch]:
    generator = torch.Generator().manual_seed(0)
    config = CONFIG.replace(backend=backend, **changes)
    model = random_model(config, generator).to(dtype)
    if config.item_text_dim:
        texts = torch.randn(config.n_items + 1, config.item_text_dim, generator=generator)
        model.set_text(item_text=texts)
    return model, random_batch(config, 12, 6, generator)


def losses(model: LCRSER, batch: Batch, scores_of: torch.dtype) -> torch.Tensor:
    """Everything that both phases descend, as a loop of one's own would."""
    h0 = model.encode(batch)
    target, negative = (model.item_vectors(batch.candidates[:, i]) for i in (0, 1))
    reasoned = model.reason(h0, batch, target)
    scores = model.score(reasoned.streams, batch)
    rolled = model.rollout(h0, batch, 2, 0.1, 3).streams
    noisy = model.score_vectors(rolled, batch, model.item_vectors(batch.candidates))
    assert {scores.dtype, noisy.dtype, reasoned.pooled.dtype} == {scores_of}
    actions, ids = batch.candidates.new_zeros(len(batch), 2, 1), batch.candidates
    parts = (
        rank_loss(scores, batch.target),
        tcl(reasoned.pooled, (batch.search_lengths, batch.rec_lengths), target),
        0.1 * alignment(target, negative, ids[:, 0], ids[:, 1]),
        grpo.kl_divergence(noisy, noisy.detach().flip(1), "exact").mean(),
        grpo.list_log_probability(noisy, actions).mean(),
        grpo.entropy(noisy).mean(),
    )
    assert all(part.dtype == torch.promote_types(scores_of, torch.float32) for part in parts)
    return torch.stack(parts).sum()


@pytest.mark.parametrize("low", BOTH, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_loop_of_ones_own_is_as_exact_as_the_reference(backend, low):
    def gradients(backend, dtype, autocast):
        model, batch = make_case(backend, dtype)
        with torch.autocast("cpu", low, enabled=autocast):
            loss = losses(model, batch, low if dtype == torch.float32 else dtype)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.numel()}

    fused, eager = (gradients(b, torch.float32, True) for b in (backend, "reference"))
    exact = gradients("reference", torch.float64, True)  # which autocast leaves alone
    for name, truth in exact.items():
        assert_parity(name, fused[name], eager[name], truth, factor=6)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_every_way_through_a_model_follows_autocast(backend):
    model, batch = make_case(backend)
    twin, _ = make_case(backend)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = model(batch)
        h = model.final_states(batch)
        assert {t.dtype for t in (*h, *model.states(batch).h[-1])} == {torch.bfloat16}
        assert model.recommend(batch, 3)[1].dtype == torch.bfloat16
        rank = model.target_rank(h, batch, batch.candidates[:, 0])
        # Part within and part without: states come in float32.
        assert model.reason(tuple(x.float() for x in h), batch).search.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert model(batch).dtype == torch.float32
            assert torch.equal(rank, model.target_rank(h, batch, batch.candidates[:, 0]))
        twin.exits = Exits(torch.randn(2 * 32 + 2), torch.zeros(2))
        assert twin(batch).dtype == torch.bfloat16
    assert scores.dtype == torch.bfloat16
    assert not torch.equal(scores.float(), model(batch))


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_texts_are_in_the_dtype_of_their_table_under_autocast(backend):
    """A projection is in autocast's dtype, which beside weights in the other half made float32."""
    model, batch = make_case(backend, torch.bfloat16, item_text_dim=6, query_text_dim=5)
    model.set_text(query_text=torch.randn(CONFIG.n_queries + 1, 5))
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert model(batch).dtype == torch.bfloat16
        assert model.recommend(batch, 3)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_compiled_model_follows_autocast(backend):
    model, batch = make_case(backend)
    graphs = []
    compiled = torch.compile(
        model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    for low in BOTH:
        with torch.autocast("cpu", low):
            assert torch.equal(compiled(batch), model(batch))
    assert torch.equal(compiled(batch), model(batch))
    assert len(graphs) == 3


def test_a_graph_keeps_no_copy_of_weights_that_autocast_made():
    model, batch = make_case("auto", item_text_dim=6)

    class Replayed:
        memory_bytes = 0

        def run(self, function):
            return function()

        def capture(self, function):
            weight = model.item_text_projection.weight
            before = model(batch)
            with torch.no_grad():
                weight.neg_()
                assert not torch.equal(model(batch), before)  # which a copy would give
                weight.neg_()
            return function()

    with torch.autocast("cpu", torch.bfloat16):
        model(batch)  # autocast keeps the projection's weight until the block ends
        capture(model, (2,), 6, 3, graph=Replayed)


@pytest.mark.parametrize("low", [None, *BOTH], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("changes", [{}, {"item_text_dim": 6}], ids=str)
def test_the_report_is_of_the_dtypes_that_a_call_has(monkeypatch, low, dtype, changes):
    model, batch = make_case("auto", dtype, **changes)
    cases, choose = {}, Op.choose

    def spied(op, backend, case, **options):
        cases.setdefault(op.name, set()).add((case.device, case.dtype))
        return choose(op, backend, case, **options)

    monkeypatch.setattr(Op, "choose", spied)
    with torch.autocast("cpu", low, enabled=low is not None), torch.no_grad():
        model(batch)
        called, cases = cases, {}
        model.backend_report()
        assert cases == called
