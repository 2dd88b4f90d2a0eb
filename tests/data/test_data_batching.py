"""Batcher against a plain loop over samples."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcr_fast import LCRSER, LCRConfig
from lcr_fast.data.batching import Batcher
from lcr_fast.data.build import prepare
from lcr_fast.data.log import InteractionLog
from lcr_fast.data.prepared import SPLITS
from lcr_fast.report.facts import facts_of
from lcr_fast.training.evaluation import make_batcher


def slow_batch(data, split, rows, max_rec_len, max_search_len, max_clicks, max_terms):
    """Assemble the same batch sample by sample, untrimmed."""
    s = data.split(split)
    b = len(rows)
    out = {
        "rec_items": np.zeros((b, max_rec_len), int),
        "rec_lengths": np.zeros(b, int),
        "search_queries": np.zeros((b, max_search_len), int),
        "search_terms": np.zeros((b, max_search_len, max_terms), int),
        "search_clicks": np.zeros((b, max_search_len, max_clicks), int),
        "search_lengths": np.zeros(b, int),
    }
    for n, row in enumerate(rows):
        user, time = s.users[row], s.times[row]
        first, last = data.rec_offsets[user], s.rec_end[row]
        events = data.rec_items[first:last][max(0, last - first - max_rec_len) :]
        out["rec_items"][n, : len(events)] = events
        out["rec_lengths"][n] = len(events)
        searches = list(range(data.search_offsets[user], s.search_end[row]))
        searches = searches[max(0, len(searches) - max_search_len) :]
        out["search_lengths"][n] = len(searches)
        for place, search in enumerate(searches):
            query = data.search_queries[search]
            out["search_queries"][n, place] = query
            start, end = data.query_term_offsets[query : query + 2]
            terms = data.query_terms[start:end][:max_terms]
            out["search_terms"][n, place, : len(terms)] = terms
            start, end = data.click_offsets[search : search + 2]
            clicks = [i for i in range(start, end) if data.click_times[i] < time][:max_clicks]
            out["search_clicks"][n, place, : len(clicks)] = data.click_items[clicks]
    return out


@pytest.fixture(scope="module")
def data(make_log, tmp_path_factory):
    rng = np.random.default_rng(7)
    events = [
        (int(u), int(i), int(t), bool(f))
        for u, i, t, f in zip(
            rng.integers(1, 9, 150),
            rng.integers(1, 30, 150),
            rng.integers(0, 60, 150),
            rng.random(150) < 0.6,
            strict=True,
        )
    ]
    searches = []
    for _ in range(60):
        time = int(rng.integers(0, 60))
        clicks = [(int(rng.integers(1, 30)), time + int(rng.integers(0, 20))) for _ in range(4)]
        terms = [str(term) for term in rng.integers(0, 9, rng.integers(0, 5))]
        searches.append((int(rng.integers(1, 9)), time, terms, clicks[: rng.integers(0, 5)]))
    log = make_log(events, searches)
    truth = log.searches.with_columns(relevant=(pl.col("search") % 2).cast(pl.Int8))
    log = InteractionLog("random", log.events, truth, log.clicks)
    return prepare(log, tmp_path_factory.mktemp("d") / "out", n_negatives=0)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    split=st.sampled_from(SPLITS),
    sizes=st.tuples(
        *(st.integers(0, 12) for _ in range(2)), *(st.integers(0, 5) for _ in range(2))
    ),
    picks=st.lists(st.integers(0, 10_000), max_size=9),
)
def test_equals_the_loop(data, split, sizes, picks):
    names = ("max_rec_len", "max_search_len", "max_clicks", "max_terms")
    limits = dict(zip(names, sizes, strict=True))
    full, trimmed = (Batcher(data, split, **limits, trim=trim) for trim in (False, True))
    rows = np.array(picks, dtype=np.int64) % len(full)
    candidates, target = np.tile(np.arange(3), (len(rows), 1)), np.ones(len(rows), np.int64)
    expected = slow_batch(data, split, rows, **limits)
    batch, short = (batcher.gather(rows, candidates, target) for batcher in (full, trimmed))
    for name, array in expected.items():
        assert getattr(batch, name).tolist() == array.tolist(), name
    longest = {"rec_items": expected["rec_lengths"].max(initial=0)}
    longest |= dict.fromkeys(
        ("search_queries", "search_terms", "search_clicks"),
        expected["search_lengths"].max(initial=0),
    )
    for name, width in longest.items():
        assert getattr(short, name).tolist() == expected[name][:, :width].tolist(), name
    assert torch.equal(batch.row, torch.from_numpy(rows))
    assert torch.equal(batch.user, torch.from_numpy(data.split(split).users[rows].astype(np.int64)))
    assert batch.candidates.shape == (len(rows), 3)


def test_at_equals_gather_at_the_samples_own_times(data):
    batcher = Batcher(data, "test", max_rec_len=6, max_search_len=4, max_clicks=3)
    rows = np.arange(len(batcher))
    samples = batcher.samples
    candidates = np.array(samples.items[:, None])
    told = batcher.gather(rows, candidates, np.full(len(rows), -1))
    now = batcher.at(samples.users, samples.times, candidates)
    for name in ("user", "rec_items", "search_terms", "search_clicks", "target", "row"):
        assert torch.equal(getattr(told, name), getattr(now, name)), name


def test_relevance_is_aligned_with_the_searches(data):
    batcher = Batcher(data, "train", max_rec_len=3, max_search_len=3, max_clicks=2)
    rows = np.arange(len(batcher))
    batch = batcher.gather(rows, rows[:, None], np.zeros_like(rows))
    relevant = batcher.relevant(rows, batch.search_queries.shape[1])
    assert relevant.dtype == np.int8
    samples = batcher.samples
    for row in rows:
        start, end = data.search_offsets[samples.users[row]], samples.search_end[row]
        told = data.search_relevant[max(start, end - 3) : end].tolist()
        assert relevant[row].tolist() == told + [-1] * (relevant.shape[1] - len(told))


def test_relevance_without_ground_truth(shop, tmp_path):
    data = prepare(shop, tmp_path / "out", n_negatives=2)
    batcher = Batcher(data, "test", max_rec_len=3, max_search_len=3, max_clicks=2)
    assert batcher.relevant(np.arange(2), 3).tolist() == [[-1] * 3] * 2


def test_terms_are_as_many_as_the_model_reads(make_log, tmp_path):
    long = [str(n) for n in range(20)]
    data = prepare(make_log([(1, 1, 5, True)], [(1, 1, long, [])]), tmp_path / "out", n_negatives=0)
    assert data.max_terms == 20
    sizes = {"max_rec_len": 2, "max_search_len": 2, "max_clicks": 2}
    assert Batcher(data, "train", **sizes).max_terms == 20
    for max_terms, read in ((16, 16), (30, 20)):
        model = LCRSER(LCRConfig(n_items=1, n_terms=20, dim=4, n_heads=1, max_terms=max_terms))
        assert make_batcher(data, "train", model).max_terms == read
    assert {fact.name: fact.value for fact in facts_of(data).facts}[
        "searches with more than 16 terms"
    ] == 1.0
    batch = Batcher(data, "train", **sizes, max_terms=30).gather(
        np.array([0]), np.array([[1]]), np.array([0])
    )
    assert [data.terms[int(t)] for t in batch.search_terms[0, 0, :20]] == long


def test_unknown_split(data):
    with pytest.raises(ValueError, match="train, valid, test, got 'dev'"):
        Batcher(data, "dev", max_rec_len=1, max_search_len=1, max_clicks=1)
