"""NegativeSampler: what it never draws, what it draws how often, and when it gives up."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcr_fast.data.build import prepare
from lcr_fast.data.negatives import NegativeSampler


@pytest.fixture(scope="module")
def data(make_log, tmp_path_factory):
    """User 1 sees items 1..20 at times 1..20, user 2 only a few of 1..30, often item 25."""
    events = [(1, item, item, True) for item in range(1, 21)]
    events += [(2, 25, time, False) for time in range(10)]
    events += [(2, item, 50 + item, True) for item in range(21, 31)]
    return prepare(make_log(events, []), tmp_path_factory.mktemp("d") / "out", n_negatives=0)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1000),
    time=st.integers(0, 30),
    n=st.integers(0, 31),
    kind=st.sampled_from(["popularity", "uniform"]),
    distinct=st.booleans(),
)
def test_never_seen_never_the_target_or_a_clear_refusal(data, seed, time, n, kind, distinct):
    user, target = data.users.find("1"), data.items.find("30")
    left = 30 - min(max(time - 1, 0), 20) - 1
    draw = (np.random.default_rng(seed), [0, user], [time, time], [target, target], n, distinct)
    sampler = NegativeSampler(data, kind)
    if distinct and n > left:
        with pytest.raises(ValueError, match=f"{n} distinct negatives are wanted, "):
            sampler.draw(*draw)
        return
    drawn = sampler.draw(*draw)
    assert drawn.shape == (2, n)
    assert drawn.dtype == np.int64
    assert ((drawn >= 1) & (drawn <= 30) & (drawn != target)).all()
    assert not data.seen.has(np.array([user]), drawn[1], np.array([time])).any()
    if distinct:
        assert all(len(set(row)) == n for row in drawn.tolist())


@pytest.mark.parametrize(
    ("kind", "smoothing"), [("popularity", 1), ("popularity", 0), ("uniform", 1)]
)
def test_frequencies_follow_the_weights(data, kind, smoothing):
    n = 200_000
    none = np.zeros(n, dtype=np.int64)  # user 0 has seen nothing
    sampler = NegativeSampler(data, kind, smoothing)
    drawn = sampler.draw(np.random.default_rng(0), none, none, none + 1, 1)[:, 0]
    weights = data.item_count + smoothing if kind == "popularity" else np.ones(31)
    weights = np.where(np.arange(31) < 2, 0, weights)
    expected = weights / weights.sum()
    got = np.bincount(drawn, minlength=31) / n
    assert np.abs(got - expected).max() < 5 * np.sqrt(0.25 / n)


def test_rows_that_rejection_cannot_fill_are_drawn_exactly(data, monkeypatch):
    monkeypatch.setattr("lcr_fast.data.negatives._ROUNDS", 0)
    user, target = data.users.find("1"), data.items.find("30")
    sampler = NegativeSampler(data)
    rng = np.random.default_rng(0)
    drawn = sampler.draw(rng, [user], [100], [target], 9, distinct=True)
    assert sorted(drawn[0].tolist()) == [data.items.find(str(item)) for item in range(21, 30)]
    assert sampler.draw(rng, [user], [100], [target], 400).min() >= 1


def test_nothing_left_to_draw(make_log, tmp_path):
    log = make_log([(1, 1, 1, False), (1, 2, 2, False), (1, 1, 5, True)], [])
    data = prepare(log, tmp_path / "out", n_negatives=0)
    with pytest.raises(ValueError, match="user '1' has seen all but too few of the 2 items"):
        NegativeSampler(data).draw(np.random.default_rng(0), [1], [5], [1], 1)


def test_unknown_kind(data):
    with pytest.raises(ValueError, match="popularity, uniform, got 'hard'"):
        NegativeSampler(data, "hard")
