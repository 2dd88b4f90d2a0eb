"""Captured models: which bucket computes what, and what is refused; on a GPU, the bits."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from graphs import Recorded
from lcr_fast.batch import Batch
from lcr_fast.capture import CudaGraph, Staged, capture, capture_recommender
from lcr_fast.cli.arguments import apply_run_options
from lcr_fast.config import LCRConfig
from lcr_fast.model import LCRSER
from lcr_fast.serving.engine import Engine
from lcr_fast.testing import random_batch

CONFIG = LCRConfig(
    n_items=30, n_users=9, n_queries=9, n_terms=9, dim=8, steps=2, max_search_len=4, max_rec_len=5,
    max_clicks=3, mlp_hidden=(8,),
)  # fmt: skip
SIZES = {"batch_sizes": (4, 1), "n_candidates": 6, "max_terms": 3}


def draw(n_users: int, n_candidates: int = 5, seed: int = 0, config: LCRConfig = CONFIG) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return random_batch(config, n_users, n_candidates, generator)


def test_staged_tensors_are_aligned_and_padded():
    staged = Staged({"a": (3,), "none": (0, 2), "b": (), "c": (2, 3)}, torch.device("cpu"))
    assert all(t.data_ptr() % 16 == 0 for t in staged.tensors.values())
    none = torch.zeros(0, 2, dtype=torch.int64)
    for size in (3, 2):
        given = {"a": torch.arange(size), "none": none, "b": torch.tensor(7)}
        given["c"] = torch.ones(2, size, dtype=torch.int64)
        staged.fill(given)
        for name, tensor in staged.padded(given).items():
            assert torch.equal(tensor, staged.tensors[name])
        assert staged.tensors["a"].tolist() == [0, 1, 2][:size] + [0] * (3 - size)
        assert staged.tensors["c"].sum(1).tolist() == [size, size]
        assert staged.tensors["b"].item() == 7


@pytest.fixture
def model() -> LCRSER:
    torch.manual_seed(0)
    return LCRSER(CONFIG).eval()


@pytest.fixture
def graphs(monkeypatch) -> list[Recorded]:
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


@pytest.mark.parametrize("n_users", [1, 3, 4])
def test_a_batch_is_scored_by_the_smallest_bucket_that_holds_it(model, graphs, n_users):
    captured = capture(model, **SIZES, graph=Recorded)
    batch = draw(n_users)
    scores = captured(batch)
    one, four = graphs
    assert (one.replays, four.replays) == ((1, 0) if n_users == 1 else (0, 1))
    padded = captured.padded(batch)
    assert len(padded) == (1 if n_users == 1 else 4)
    with torch.inference_mode():
        assert torch.equal(scores, model(padded)[:n_users, :5])
        torch.testing.assert_close(scores, model(batch))


def test_memory_is_that_of_the_graphs_and_their_inputs(model, graphs):
    small, both = (capture(model, sizes, 6, 3, graph=Recorded) for sizes in ((4,), (1, 4)))
    of_inputs = small.memory_bytes - Recorded.memory_bytes
    assert of_inputs > 4 * 8 * 6  # of the candidates alone
    assert small.memory_bytes < both.memory_bytes < 2 * small.memory_bytes


def test_results_outlive_the_next_call_and_nothing_of_a_batch_stays(model, graphs):
    captured = capture(model, **SIZES, graph=Recorded)
    wide = draw(4, n_candidates=6, seed=1)
    narrow = draw(2, n_candidates=2, seed=2)
    alone = captured(narrow)
    first = captured(wide)
    kept = first.clone()
    assert torch.equal(captured(narrow), alone)
    assert torch.equal(first, kept)


def test_more_users_than_the_largest_bucket_come_in_pieces(model, graphs):
    captured = capture(model, **SIZES, graph=Recorded)
    batch = draw(9)
    scores = captured(batch)
    assert scores.shape == (9, batch.candidates.shape[1])
    assert [graph.replays for graph in graphs] == [1, 2]
    assert torch.equal(scores[4:8], captured(batch.rows(slice(4, 8))))
    assert captured(batch.rows(slice(0))).shape == (0, batch.candidates.shape[1])


def test_weights_that_change_are_read_anew(model, graphs):
    captured = capture(model, **SIZES, graph=Recorded)
    batch = draw(4)
    before = captured(batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(captured(batch), before)


def test_what_was_not_captured_is_named(model, graphs):
    captured = capture(model, **SIZES, graph=Recorded)
    with pytest.raises(ValueError, match=r"candidates has shape \[B, 7\], but at most \[B, 6\]"):
        captured(draw(2, n_candidates=7))
    with pytest.raises(ValueError, match="9 users are more than the largest batch, 4"):
        captured.padded(draw(9))


def test_what_cannot_be_captured_is_refused(model):
    with pytest.raises(ValueError, match="only a model on a GPU can be captured, this one is on"):
        capture(model)
    with pytest.raises(ValueError, match=r"batch_sizes must be positive numbers, got \(0, 2\)"):
        capture(model, (2, 0), graph=Recorded)
    with pytest.raises(ValueError, match="n_candidates must be positive"):
        capture(model, n_candidates=0, graph=Recorded)
    with pytest.raises(ValueError, match=r"model in training .* model.eval\(\)"):
        capture(model.train(), graph=Recorded)

    class Failing(Recorded):
        def capture(self, function):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    with pytest.raises(RuntimeError, match=r"cannot be captured: operation not permitted$"):
        capture(model.eval(), graph=Failing)


def test_recommendations_are_those_for_the_padded_batch(model, graphs):
    captured = capture_recommender(model, (4, 1), 3, graph=Recorded)
    exclude = torch.randint(0, 31, (9, 7), generator=torch.Generator().manual_seed(3))
    exclude[5:] = 0
    batch = draw(9, n_candidates=0)
    items, scores = captured.recommend(batch, 5, exclude)
    assert [graph.replays for graph in graphs] == [1, 2]
    expected = model.recommend(batch, 5, exclude)
    assert torch.equal(items, expected[0])
    torch.testing.assert_close(scores, expected[1])
    for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
        padded = captured.padded(batch.rows(rows))
        plain = model.recommend(padded, 5, exclude[rows])
        assert torch.equal(items[rows], plain[0])
        assert torch.equal(scores[rows], plain[1])


def test_recommendations_need_no_exclude_and_no_user(model, graphs):
    captured = capture_recommender(model, (4,), 3, graph=Recorded)
    batch = draw(3)
    items, scores = captured.recommend(batch, 2)
    plain = model.recommend(captured.padded(draw(3, n_candidates=0)), 2)
    assert torch.equal(items, plain[0][:3])
    assert torch.equal(scores, plain[1][:3])
    assert captured.recommend(batch.rows(slice(0)), 2)[0].shape == (0, 2)


def test_what_a_recommender_refuses(model, graphs):
    captured = capture_recommender(model, (4,), 3, graph=Recorded)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        captured.recommend(draw(2), 0)
    with pytest.raises(ValueError, match=r"exclude must be int64 \[2, X\], got \[1, 3\]"):
        captured.recommend(draw(2), 1, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="only a model on a GPU can be captured"):
        capture_recommender(model)
    model.exits = object()
    with pytest.raises(ValueError, match="users leave the reasoning early cannot be captured"):
        capture_recommender(model, graph=Recorded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_have_the_bits_of_the_padded_batch(dtype):
    config = CONFIG.replace(dim=64, mlp_hidden=(200, 80), max_search_len=30, max_rec_len=30)
    torch.manual_seed(0)
    model = LCRSER(config).to("cuda", dtype).eval()
    captured = capture(model, (1, 16), n_candidates=6, max_terms=3)
    assert captured.memory_bytes > 0
    for seed, n_users in enumerate((1, 7, 16, 40)):
        batch = draw(n_users, 6, seed, config)
        with torch.inference_mode():
            pieces = [batch.rows(slice(i, i + 16)) for i in range(0, n_users, 16)]
            plain = [model(captured.padded(p).to("cuda"))[: len(p), :6] for p in pieces]
        assert torch.equal(captured(batch), torch.cat(plain))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recommendations_by_replay_have_the_bits_of_the_padded_batch(dtype):
    config = CONFIG.replace(dim=64, mlp_hidden=(200, 80), max_search_len=30, max_rec_len=30)
    torch.manual_seed(0)
    model = LCRSER(config).to("cuda", dtype).eval()
    captured = capture_recommender(model, (1, 16), max_terms=3)
    assert captured.memory_bytes > 0
    for seed, n_users in enumerate((1, 7, 16)):
        batch = draw(n_users, 0, seed, config)
        exclude = torch.randint(0, 31, (n_users, 4), device="cuda")
        padded = captured.padded(batch)
        whole = exclude.new_zeros(len(padded), 4)
        whole[:n_users] = exclude
        plain = model.recommend(padded.to("cuda"), 9, whole)
        for found, expected in zip(captured.recommend(batch, 9, exclude), plain, strict=True):
            assert torch.equal(found, expected[:n_users])


def test_a_graph_is_made_and_replayed_on_its_own_gpu(monkeypatch):
    current, used = [0], []

    @contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    def note(what, result=None):
        return lambda *_, **__: (used.append((what, current[-1])), result)[1]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Mock(replay=note("replay")))
    monkeypatch.setattr(torch.cuda, "Stream", note("stream", Mock()))
    monkeypatch.setattr(torch.cuda, "current_stream", note("current", Mock()))
    monkeypatch.setattr(torch.cuda, "stream", note("run", nullcontext()))
    monkeypatch.setattr(torch.cuda, "graph", note("capture", nullcontext()))
    graph = CudaGraph(torch.device("cuda", 1))
    assert graph.run(lambda: current[-1]) == 1
    assert graph.capture(lambda: current[-1]) == 1
    graph.replay()
    assert {what for what, _ in used} == {"stream", "current", "run", "capture", "replay"}
    assert {index for _, index in used} == {1}
    assert current == [0]


def test_the_device_asked_for_is_made_current(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda:1", "cuda", "cpu"):
        apply_run_options(SimpleNamespace(threads=None, device=name))
    assert chosen == [torch.device("cuda", 1)]


@pytest.mark.parametrize("name", ["score", "recommend"])
def test_a_server_computes_on_the_models_gpu(monkeypatch, name):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda d: nullcontext(entered.append(d)))
    engine = SimpleNamespace(_device=torch.device("cuda", 1))
    with pytest.raises((AttributeError, ValueError)):  # it is no engine
        getattr(Engine, name)(engine, [])
    assert entered == [engine._device]
