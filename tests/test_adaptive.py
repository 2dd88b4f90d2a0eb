"""Adaptive depth: the rule, its backends, how thresholds are chosen, and what it costs nobody."""

import itertools

import numpy as np
import pytest
import torch

from command_line import fails, run
from lcr_fast.config import LCRConfig
from lcr_fast.data.prepared import PreparedData
from lcr_fast.export import program
from lcr_fast.model import LCRSER
from lcr_fast.ops import adaptive_reasoning, latent_reasoning, latent_states
from lcr_fast.ops._extension import extension_error
from lcr_fast.reference import Exits, Steps, exit_features, exit_scores, steps_taken
from lcr_fast.testing import assert_parity, random_streams, random_weights
from lcr_fast.training import adaptive
from lcr_fast.training.evaluation import make_batcher, rank_model
from lcr_fast.training.identity import assign
from lcr_fast.weights import ReasoningWeights

needs_cpp = pytest.mark.skipif(
    extension_error() is not None, reason=f"lcr_fast._C is not built: {extension_error()}"
)


class Call:
    """One call, in float64, with a rule by which users leave after each number of steps."""

    def __init__(self, dim=32, length=9, n_users=40, steps=3, **changes) -> None:
        generator = torch.Generator().manual_seed(0)
        config = LCRConfig(
            dim=dim, max_search_len=length, max_rec_len=length + 2, steps=steps, **changes
        )
        weights = random_weights(config, generator)[1]
        self.weights = ReasoningWeights(*(w.detach() for w in weights))
        self.streams = random_streams(config, n_users, generator)
        self.steps = Steps(steps, config.n_heads)
        weight = torch.randn(2 * dim + 2, generator=generator, dtype=torch.float64) / dim**0.5
        states = latent_states(*self.streams, self.weights, self.steps)
        self.features = exit_features(states.h[:-1], *self.streams[2:])
        free = exit_scores(self.features, Exits(weight, torch.zeros(steps)))
        # Between two users, so that rounding moves nobody across.
        ordered = free.sort(0).values
        place = int(0.7 * n_users)
        self.exits = Exits(weight, -(ordered[place] + ordered[place + 1]) / 2)

    def run(self, dtype=torch.float32, users=slice(None), **options):
        search, rec, n_search, n_rec = (t[users] for t in self.streams)
        weights = ReasoningWeights(*(w.to(dtype) for w in self.weights))
        return adaptive_reasoning(
            search.to(dtype), rec.to(dtype), n_search, n_rec, weights, self.steps, self.exits,
            **options,
        )  # fmt: skip

    def fixed(self, k: int, dtype=torch.float32):
        search, rec, *lengths = self.streams
        weights = ReasoningWeights(*(w.to(dtype) for w in self.weights))
        steps = self.steps._replace(n_steps=k)
        return latent_reasoning(search.to(dtype), rec.to(dtype), *lengths, weights, steps)


CASES = {
    "default": {},
    "D=20": {"dim": 20, "length": 5, "steps": 4},
    "own weights a step": {"share_steps": False},
    "one step": {"steps": 1, "ffn_dim": 7},
    "no FFN": {"step_ffn": False},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_users_leave_when_the_rule_says_and_with_those_states(backend, changes):
    if backend == "cpp" and extension_error() is not None:
        pytest.skip("lcr_fast._C is not built")
    call = Call(**changes)
    expected = steps_taken(exit_scores(call.features, call.exits))
    K = call.steps.n_steps
    assert expected.unique().tolist() == list(range(K + 1))
    found = call.run(backend=backend)
    assert torch.equal(found.taken, expected)
    for k in range(K + 1):
        mine, (exact_s, exact_r, _) = expected == k, call.fixed(k, torch.float64)
        eager_s, eager_r, _ = call.fixed(k)
        for name, got, eager, exact in (
            ("search", found.search, eager_s, exact_s),
            ("rec", found.rec, eager_r, exact_r),
        ):
            assert_parity(f"{name}, k = {k}", got[mine], eager[mine], exact[mine], factor=3.0)


@pytest.mark.gpu
def test_triton_takes_the_steps_of_those_who_stay(monkeypatch):
    pytest.importorskip("triton")
    call = Call(length=5, n_users=8)
    batches = []

    def record(search, *args, **options):
        batches.append((len(search), options["backend"]))
        return latent_reasoning(search, *args, **options)

    monkeypatch.setattr("lcr_fast.ops.adaptive.latent_reasoning", record)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    search, rec, *lengths = (t.to(device) for t in call.streams)
    weights = ReasoningWeights(*(w.float().to(device) for w in call.weights))
    exits = call.exits._replace(
        weight=call.exits.weight.to(device), bias=call.exits.bias.to(device)
    )
    found = adaptive_reasoning(
        search.float(), rec.float(), *lengths, weights, call.steps, exits, backend="triton"
    )
    stayed = [(int((found.taken > k).sum()), "triton") for k in range(call.steps.n_steps)]
    assert batches == stayed
    expected = call.run(backend="reference")
    exact = call.run(torch.float64, backend="reference")
    assert len(expected.taken.unique()) > 2
    assert torch.equal(found.taken.cpu(), expected.taken)
    for name in ("search", "rec"):
        results = (getattr(each, name).cpu() for each in (found, expected, exact))
        assert_parity(name, *results, factor=3.0)


def test_features_are_means_and_their_changes():
    call = Call(n_users=6)
    states = latent_states(*call.streams, call.weights, call.steps)
    n_search, n_rec = call.streams[2:]
    for b in range(6):
        means = [
            torch.cat(
                [
                    h[b, : n[b]].mean(0) if n[b] else torch.zeros(32, dtype=torch.float64)
                    for h, n in zip(pair, (n_search, n_rec), strict=True)
                ]
            )
            for pair in states.h[:-1]
        ]
        change = [0.0, *((y - x).norm() for x, y in itertools.pairwise(means))]
        turn = [0.0, 0.0, (means[2] - 2 * means[1] + means[0]).norm()]
        for k in range(3):
            row = call.features[b, k]
            assert torch.allclose(row[:-2], means[k])
            assert row[-2:].tolist() == pytest.approx([float(change[k]), float(turn[k])])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nobody_depends_on_the_batch(dtype):
    call = Call()
    whole = call.run(dtype)
    for n in (1, 3, 7):
        parts = [call.run(dtype, slice(i, i + n)) for i in range(0, 40, n)]
        for name in whole._fields:
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(map(torch.equal, call.run(dtype), whole))
        assert all(map(torch.equal, call.run(dtype, slice(1)), call.run(dtype, slice(1))))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_padding_is_not_read(backend):
    if backend == "cpp" and extension_error() is not None:
        pytest.skip("lcr_fast._C is not built")
    call = Call()
    clean = call.run(backend=backend)
    for x, n in zip(call.streams[:2], call.streams[2:], strict=True):
        x[torch.arange(x.shape[1]) >= n.unsqueeze(1)] = torch.nan
    assert all(map(torch.equal, call.run(backend=backend), clean))
    nobody = call.run(users=slice(0), backend=backend)
    assert [list(t.shape) for t in nobody] == [[0, 9, 32], [0, 11, 32], [0]]


def test_what_does_not_fit_is_refused():
    call = Call()
    call.exits = Exits(call.exits.weight[1:], call.exits.bias)
    with pytest.raises(ValueError, match=r"exits must hold a weight \[66\] and a bias \[3\]"):
        call.run()
    call = Call()
    call.steps = call.steps._replace(cross_memory="initial")
    with pytest.raises(ValueError, match="none stands alone"):
        call.run()


# -- the model -----------------------------------------------------------------------------------


@pytest.fixture
def model(prepared, make_model) -> LCRSER:
    return make_model(prepared, steps=3).eval()


def batch_of(model, data, split="test"):
    batcher = make_batcher(data, split, model)
    rows = np.arange(len(batcher))
    return batcher.gather(rows, batcher.samples.items[:, None], rows * 0)


def some_exits(model, data) -> Exits:
    depths = adaptive.read_depths(model, data)
    head = adaptive.fit_confidence(depths)
    scores = adaptive.rule_scores("confidence", depths, head)
    choice = adaptive.Choice("confidence", float(np.quantile(scores, 0.6)), 0.0, 0.0)
    return choice.exits(depths, head)


def test_a_model_reads_what_its_exits_leave(model, prepared):
    batch = batch_of(model, prepared)
    states = model.states(batch)
    model.exits = some_exits(model, prepared)
    count = model.on_steps = adaptive.StepCount(3)
    found = model.final_states(batch)
    features = exit_features(states.h[:-1], batch.search_lengths, batch.rec_lengths)
    taken = steps_taken(exit_scores(features, model.exits))
    assert count.counts.tolist() == taken.bincount(minlength=4).tolist()
    assert len(taken.unique()) > 1
    for x in (0, 1):
        every = torch.stack([h[x] for h in states.h])
        expected = every[taken, torch.arange(len(taken))]
        torch.testing.assert_close(found[x], expected, rtol=1e-4, atol=1e-5)
    # Training takes all steps, and so does what asks for pooled states.
    model.train()
    model.dropout_seed = 3
    trained = model.final_states(batch)
    model.exits = None
    assert all(map(torch.equal, trained, model.final_states(batch)))


def test_exits_are_saved_and_kept_by_extension(model, prepared, tmp_path):
    model.exits = some_exits(model, prepared)
    model.save(tmp_path / "m.safetensors")
    loaded = LCRSER.load(tmp_path / "m.safetensors")
    sizes = {name: getattr(model.config, name) for name in ("n_items", "n_users", "n_terms")}
    for other in (loaded, model.extended(**sizes, n_queries=model.config.n_queries + 1)):
        assert other.exits.rule == "confidence"
        assert torch.equal(other.exits.weight, model.exits.weight)
        assert torch.equal(other.exits.bias, model.exits.bias)


def test_a_program_takes_all_steps(model, prepared):
    model.exits = some_exits(model, prepared)
    with pytest.raises(ValueError, match="export the one without exits"):
        program(model)


# -- rules and thresholds ------------------------------------------------------------------------


def test_depths_are_those_of_models_read_after_k_steps(model, prepared):
    depths = adaptive.read_depths(model, prepared, "test")
    for k in range(4):
        model.exits = adaptive.Choice("fixed", k, 0.0, 0.0).exits(depths)
        ranks = rank_model(model, prepared, protocols=("sampled",)).by_protocol["sampled"]
        assert ranks.tolist() == depths.ranks[:, k].tolist()
    assert (depths.kl >= -1e-9).all()
    assert depths.stays.min() >= 0
    assert depths.stays.max() <= 1
    candidates = prepared.split("test").negatives.shape[1] + 1
    assert depths.entropy.min() >= 0
    assert depths.entropy.max() <= np.log(candidates) + 1e-9


def test_served_rules_leave_in_the_model_where_they_do_on_paper(model, prepared):
    depths = adaptive.read_depths(model, prepared, "test")
    head = adaptive.fit_confidence(depths)
    batch = batch_of(model, prepared)
    for rule in ("change", "curvature", "confidence"):
        scores = np.sort(adaptive.rule_scores(rule, depths, head)[:, -1])
        middle = float(scores[len(scores) // 2 - 1 : len(scores) // 2 + 1].mean())
        choice = adaptive.Choice(rule, middle, 0.0, 0.0)
        taken = choice.taken(depths, head)
        assert len(np.unique(taken)) > 1
        model.exits = choice.exits(depths, head)
        count = model.on_steps = adaptive.StepCount(3)
        model.final_states(batch)
        assert count.counts.tolist() == np.bincount(taken, minlength=4).tolist(), rule


def test_the_confidence_head_is_the_optimum_of_its_loss():
    rng = np.random.default_rng(0)
    n, K, F = 60, 2, 5
    features = rng.normal(size=(n, K, F)).astype(np.float32)
    stays = rng.random((n, K))
    depths = adaptive.Depths(np.ones((n, K + 1), int), features, stays, stays, np.ones((n, K + 1)))
    head = adaptive.fit_confidence(depths)
    scale = torch.from_numpy(features.reshape(-1, F).std(0).astype(np.float64))

    def loss(weight, bias):
        logits = torch.from_numpy(features).double() @ weight + bias
        cross = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(stays), reduction="sum"
        )
        return cross + 0.5 * adaptive._PENALTY * (weight * scale).square().sum()

    leaves = [t.double().requires_grad_() for t in head[:2]]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    assert max(float(g.abs().max()) for g in gradients) < 1e-3


def planted() -> adaptive.Depths:
    """Four users; the first two need no step, the third one, the last two; K = 2."""
    ranks = np.array([[1, 1, 1], [1, 2, 2], [4, 1, 1], [9, 4, 1]])
    change = np.array([[0.0, 0.1], [0.0, 0.2], [0.0, 0.3], [0.0, 0.4]])
    features = np.zeros((4, 2, 4), dtype=np.float32)
    features[..., -2] = change
    half = np.full((4, 2), 0.5)
    return adaptive.Depths(ranks, features, half, half, np.ones((4, 3)))


def test_validation_chooses_the_cheapest_within_the_loss_and_the_best_within_the_steps():
    depths = planted()
    fixed = adaptive.curve("fixed", depths, "hr@1")
    assert [(c.steps, c.gain) for c in fixed] == [(0, 0.5), (1, 0.5), (2, 0.75)]
    # Only the last user's state still moves more than 0.3: the others leave after one step.
    choice = adaptive.choose(depths, "hr@1", ("fixed", "change"), loss=0.0)
    assert (choice.rule, choice.steps, choice.gain) == ("change", 1.25, 0.75)
    assert choice.taken(depths).tolist() == [1, 1, 1, 2]
    assert adaptive.choose(depths, "hr@1", ("fixed", "change"), loss=0.25).steps == 0
    choice = adaptive.choose(depths, "hr@1", ("fixed", "change"), steps=1.3)
    assert (choice.steps, choice.gain) == (1.25, 0.75)
    assert adaptive.choose(depths, "hr@1", ("fixed", "change"), steps=0.9).steps == 0
    with pytest.raises(ValueError, match="rule must be one of fixed"):
        adaptive.rule_scores("luck", depths)


def test_steps_are_counted_and_described():
    count = adaptive.StepCount(3)
    assert count.describe() == ""
    count(torch.tensor([0] * 90 + [2] * 6))
    count(torch.tensor([3] * 4))
    assert count.describe() == "steps: mean 0.24, p95 2; 0: 90.0%, 1: 0.0%, 2: 6.0%, 3: 4.0%"


# -- the command line ----------------------------------------------------------------------------


def test_adapt_evaluate_recommend(model, prepared, prepared_folder, tmp_path, capsys):
    before, after = tmp_path / "m.safetensors", tmp_path / "n.safetensors"
    assign(model, prepared)
    model.save(before)
    text = run("adapt", before, "--data", prepared_folder, "-o", after, "--mean-steps", "1.5")
    depths = adaptive.read_depths(model, PreparedData.open(prepared_folder))
    gains = depths.gains("ndcg@5").mean(0)
    assert "validation NDCG@5 after k = 0..3 steps: " + ", ".join(f"{g:.4f}" for g in gains) in text
    assert LCRSER.load(after).exits is not None
    text = run("evaluate", after, "--data", prepared_folder, "--protocols", "sampled")
    assert "steps: mean " in text
    capsys.readouterr()
    run("recommend", after, "--data", prepared_folder)
    text = capsys.readouterr().err
    assert text.startswith("steps: mean ")
    assert "p95" in text
    text = run("evaluate", before, "--data", prepared_folder, "--protocols", "sampled")
    assert "steps: " not in text


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"steps": 0}, [], "the model has no steps (K = 0)"),
        ({"cross_memory": "initial"}, [], "none stands alone"),
        ({}, ["--metric", "hr@100"], "nothing can be chosen by hr@100"),
        ({}, ["--loss", "-1"], "the loss must be at least 0, got -1.0"),
        ({}, ["--loss", "nan"], "the loss must be at least 0, got nan"),
        ({}, ["--mean-steps", "-1"], "the mean steps must be at least 0, got -1.0"),
        ({}, ["--mean-steps", "nan"], "the mean steps must be at least 0, got nan"),
        ({}, ["--metric", "auc"], "TrainConfig.valid_metric must be hr@k"),
    ],
)
def test_adapt_refuses(
    prepared, make_model, prepared_folder, tmp_path, capsys, changes, options, message
):
    model = make_model(prepared, **changes)
    assign(model, prepared)
    model.save(tmp_path / "m.safetensors")
    out = tmp_path / "n.safetensors"
    words = (tmp_path / "m.safetensors", "--data", prepared_folder, "-o", out, *options)
    assert message in fails(capsys, "adapt", *words)
    assert not out.exists()


def test_nobody_chooses_exits_where_nobody_is_validated(prepared, make_model):
    arrays = {
        name: array[:0] if name.startswith("valid_") else array
        for name, array in prepared.arrays.items()
    }
    with pytest.raises(ValueError, match="the data has no valid targets that the model can rank"):
        adaptive.adapt(make_model(prepared), PreparedData(arrays, prepared.manifest))
