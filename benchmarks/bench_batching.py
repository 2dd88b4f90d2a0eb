"""Batch assembly: Batcher against a loop over samples, at KuaiSAR's shapes (L=30+30, 5 clicks).

Divide the batch size by the time for samples/s.
"""

import numpy as np
import polars as pl
import pytest
import torch

from lcr_fast.data.batching import Batcher
from lcr_fast.data.build import prepare
from lcr_fast.data.log import InteractionLog

LIMITS = {"max_rec_len": 30, "max_search_len": 30, "max_clicks": 5, "max_terms": 8}
N_USERS, N_ITEMS, N_EVENTS, N_SEARCHES, N_CLICKS, N_TERMS = 1000, 20_000, 60, 50, 3, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    events, searches = N_USERS * N_EVENTS, N_USERS * N_SEARCHES
    began = rng.integers(0, 10**9, searches)
    log = InteractionLog(
        "random",
        pl.DataFrame(
            {
                "user": np.repeat(np.arange(N_USERS), N_EVENTS),
                "item": rng.integers(0, N_ITEMS, events),
                "time": rng.integers(0, 10**9, events),
                "order": np.arange(events),
                "target": np.ones(events, bool),
            }
        ),
        pl.DataFrame(
            {
                "search": np.arange(searches),
                "user": np.repeat(np.arange(N_USERS), N_SEARCHES),
                "time": began,
                "terms": rng.integers(0, 5000, (searches, N_TERMS)).astype(str).tolist(),
            }
        ),
        pl.DataFrame(
            {
                "search": np.repeat(np.arange(searches), N_CLICKS),
                "item": rng.integers(0, N_ITEMS, searches * N_CLICKS),
                "time": np.repeat(began, N_CLICKS) + rng.integers(0, 10**6, searches * N_CLICKS),
            }
        ),
    )
    return prepare(log, tmp_path_factory.mktemp("bench") / "data", n_negatives=0)


def assemble_by_loop(data, split, rows):
    """Slice every sample's history, then copy it into the padded arrays."""
    samples = data.split(split)
    sizes = (len(rows), LIMITS["max_search_len"])
    items = np.zeros((len(rows), LIMITS["max_rec_len"]), np.int64)
    queries = np.zeros(sizes, np.int64)
    terms = np.zeros((*sizes, LIMITS["max_terms"]), np.int64)
    clicks = np.zeros((*sizes, LIMITS["max_clicks"]), np.int64)
    for n, row in enumerate(rows):
        user, time = samples.users[row], samples.times[row]
        end = samples.rec_end[row]
        start = max(data.rec_offsets[user], end - LIMITS["max_rec_len"])
        items[n, : end - start] = data.rec_items[start:end]
        end = samples.search_end[row]
        start = max(data.search_offsets[user], end - LIMITS["max_search_len"])
        queries[n, : end - start] = data.search_queries[start:end]
        for place, search in enumerate(range(start, end)):
            a, b = data.query_term_offsets[queries[n, place] :][:2]
            words = data.query_terms[a:b][: LIMITS["max_terms"]]
            terms[n, place, : len(words)] = words
            a, b = data.click_offsets[search : search + 2]
            made = data.click_items[a:b][data.click_times[a:b] < time][: LIMITS["max_clicks"]]
            clicks[n, place, : len(made)] = made
    return {
        "rec_items": items,
        "search_queries": queries,
        "search_terms": terms,
        "search_clicks": clicks,
    }


@pytest.mark.benchmark(group="batch assembly")
@pytest.mark.parametrize("size", [256, 1024])
def test_batch_assembly(benchmark, race, data, size):
    """On the CPU, whatever the device of the other benchmarks."""
    batcher = Batcher(data, "train", **LIMITS, trim=False)
    rows = np.random.default_rng(1).integers(len(batcher), size=size)
    candidates, target = np.ones((size, 5), np.int64), np.zeros(size, np.int64)
    batch = batcher.gather(rows, candidates, target)
    for name, expected in assemble_by_loop(data, "train", rows).items():
        assert torch.equal(getattr(batch, name), torch.from_numpy(expected)), name
    benchmark.extra_info |= {
        "case": f"{size} users, 30 + 30 events",
        "samples": size,
        "device": "cpu",
    }
    race(
        lambda: batcher.gather(rows, candidates, target),
        {"loop over samples": (lambda: assemble_by_loop(data, "train", rows), 1.0)},
        rounds=30,
        on="cpu",
    )
