"""Pairs of the training period against a plain loop over users."""

import itertools

import numpy as np
import pytest

from lcr_fast.data.build import prepare
from lcr_fast.data.pairs import training_pairs
from lcr_fast.data.prepared import PreparedData
from lcr_fast.data.synthetic import World, generate


def slow_pairs(data):
    """List both kinds of pairs, user by user."""
    asked, followed = [], []
    for user in range(1, data.n_users + 1):
        times = [
            t
            for split in ("valid", "test")
            for u, t in zip(data.split(split).users, data.split(split).times, strict=True)
            if u == user
        ]
        end = min(times, default=np.inf)
        for search in range(*data.search_offsets[user : user + 2]):
            for click in range(*data.click_offsets[search : search + 2]):
                if data.click_times[click] < end:
                    asked.append((data.search_queries[search], data.click_items[click]))
        events = range(*data.rec_offsets[user : user + 2])
        for first, second in itertools.pairwise(events):
            pair = data.rec_items[first], data.rec_items[second]
            if data.rec_times[second] < end and pair[0] != pair[1]:
                followed.append(pair)
    return asked, followed


@pytest.fixture(scope="module", params=["synthetic", "shop"])
def data(request, shop, tmp_path_factory):
    log = shop if request.param == "shop" else generate(World(n_users=30))
    out = tmp_path_factory.mktemp("pairs") / "data"
    data = prepare(log, out, n_negatives=2)
    # A click at the very time of a held-out target.
    user = int(data.split("valid").users[0])
    search = int(data.search_offsets[user])
    click = int(data.click_offsets[search + 1]) - 1
    times = np.array(data.click_times)
    assert data.click_offsets[search] <= click
    times[click] = data.train_end[user]
    return PreparedData({**data.arrays, "click_times": times}, data.manifest)


def test_pairs_match_a_loop_over_users(data):
    pairs = training_pairs(data)
    asked, followed = slow_pairs(data)
    assert asked
    assert followed
    assert list(zip(pairs.queries, pairs.clicked, strict=True)) == asked
    assert list(zip(pairs.items, pairs.following, strict=True)) == followed


def test_nothing_at_or_after_a_held_out_target_makes_a_pair(data):
    """Whatever stands there, the pairs are the same."""
    changed = {name: np.array(array) for name, array in data.arrays.items()}
    for user in range(1, data.n_users + 1):
        held = [data.split(s).times[data.split(s).users == user] for s in ("valid", "test")]
        if not len(np.concatenate(held)):
            continue
        end = np.concatenate(held).min()
        events = slice(*data.rec_offsets[user : user + 2])
        late = data.rec_times[events] >= end
        assert late.any()
        changed["rec_items"][events][late] = 1
        searches = range(*data.search_offsets[user : user + 2])
        for search in searches:
            clicks = slice(*data.click_offsets[search : search + 2])
            changed["click_items"][clicks][data.click_times[clicks] >= end] = 1
            if data.search_times[search] >= end:
                changed["search_queries"][search] = 1
    twin = type(data)(changed, data.manifest)
    for mine, theirs in zip(training_pairs(data), training_pairs(twin), strict=True):
        assert np.array_equal(mine, theirs)
