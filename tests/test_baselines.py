"""Baselines against dictionaries, on a small log with traps, and what they may and do read."""

import itertools
from collections import defaultdict

import numpy as np
import polars as pl
import pytest
import torch

from lcr_fast.data.build import prepare
from lcr_fast.data.log import InteractionLog
from lcr_fast.data.prepared import PreparedData
from lcr_fast.training.baselines import MU, TITLES, Baselines
from lcr_fast.training.evaluation import make_batcher

N_ITEMS, N_USERS = 14, 40


def random_log(seed: int = 0) -> InteractionLog:
    """Draw a log whose times are a few seconds, so that most of them tie.

    Queries repeat and repeat terms, one has none; some users never search and some searches lie
    after every target. Clicks are events too in half of the cases.
    """
    rng = np.random.default_rng(seed)
    events, searches, clicks = [], [], []
    for user in range(N_USERS):
        times = np.sort(rng.integers(0, 12, rng.integers(2, 14)))
        items = rng.integers(0, N_ITEMS - 3, len(times))
        items[rng.random(len(times)) < 0.15] = 100 + user  # nobody else's
        for order, (time, item) in enumerate(zip(times, items, strict=True)):
            events.append((user, int(item), int(time), order, rng.random() < 0.7))
        for _ in range(rng.integers(0, 5) * (user % 4 > 0)):
            number, time = len(searches), int(rng.integers(0, 14))
            terms = [["a"], ["a", "b"], ["b", "b", "c"], [], ["d", f"rare{number}"]]
            searches.append((number, user, time, terms[rng.integers(5)]))
            for _ in range(rng.integers(0, 4)):
                item, when = int(rng.integers(0, N_ITEMS)), time + int(rng.integers(0, 3))
                clicks.append((number, item, when))
                if rng.random() < 0.5:
                    events.append((user, item, when, 100 + len(events), False))
    columns = {"user": pl.Int64, "item": pl.Int64, "time": pl.Int64, "order": pl.Int64}
    return InteractionLog(
        "traps",
        pl.DataFrame(events, {**columns, "target": pl.Boolean}, orient="row"),
        pl.DataFrame(
            searches,
            {"search": pl.Int64, "user": pl.Int64, "time": pl.Int64, "terms": pl.List(pl.String)},
            orient="row",
        ),
        pl.DataFrame(
            clicks, {"search": pl.Int64, "item": pl.Int64, "time": pl.Int64}, orient="row"
        ),
        [],
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    out = tmp_path_factory.mktemp("traps") / "data"
    return prepare(random_log(), out, n_negatives=2, min_targets=3, min_history=0)


# -- the slow, obvious way -------------------------------------------------------------------------


class Slow:
    """Counts in dictionaries, filled one event at a time; scores by the documented formulas."""

    def __init__(self, data: PreparedData, split: str) -> None:
        self.data, self.samples = data, data.split(split)
        self.after_query, self.after_term, self.after_item = (
            defaultdict(lambda: defaultdict(float)) for _ in range(3)
        )
        held_out = {}
        for name in ("valid", "test"):
            samples = data.split(name)
            for user, time in zip(samples.users.tolist(), samples.times.tolist(), strict=True):
                held_out[user] = min(time, held_out.get(user, time))
        for user in range(1, data.n_users + 1):
            self.count(user, held_out.get(user, 10**9))

    def events(self, user):
        span = range(self.data.rec_offsets[user], self.data.rec_offsets[user + 1])
        return [(int(self.data.rec_times[e]), int(self.data.rec_items[e])) for e in span]

    def searches(self, user):
        """Time, query and clicks, (time, item), of every search."""
        data, found = self.data, []
        for s in range(data.search_offsets[user], data.search_offsets[user + 1]):
            span = range(data.click_offsets[s], data.click_offsets[s + 1])
            clicks = [(int(data.click_times[c]), int(data.click_items[c])) for c in span]
            found.append((int(data.search_times[s]), int(data.search_queries[s]), clicks))
        return found

    def terms(self, query):
        start, end = self.data.query_term_offsets[query : query + 2]
        return set(self.data.query_terms[start:end].tolist())

    def count(self, user, end):
        events = [(time, item) for time, item in self.events(user) if time < end]
        searches = self.searches(user)
        under = [{item for time, item in clicks if time < end} for _, _, clicks in searches]
        for time, item in events:
            earlier = [s for s, (searched, _, _) in enumerate(searches) if searched < time]
            if earlier:
                under[earlier[-1]].add(item)
        for (_, query, _), items in zip(searches, under, strict=True):
            for item in items:
                self.after_query[query][item] += 1
                for term in self.terms(query):
                    self.after_term[term][item] += 1
        for (_, item), (_, following) in itertools.pairwise(events):
            self.after_item[item][following] += 1

    def history(self, row):
        user, time = int(self.samples.users[row]), int(self.samples.times[row])
        events = [item for at, item in self.events(user) if at < time]
        queries = [query for at, query, _ in self.searches(user) if at < time]
        return events, queries

    def popularity(self, row, item):
        counts = self.data.item_count
        return (int(counts[item]) + 1) / (int(counts.sum()) + self.data.n_items)

    def smoothed(self, counts, item, coarser):
        return (counts[item] + MU * coarser) / (sum(counts.values()) + MU)

    def last_query(self, row, item):
        _, queries = self.history(row)
        p = self.popularity(row, item)
        if not queries:
            return p
        of_terms = [
            self.smoothed(self.after_term[term], item, p) for term in self.terms(queries[-1])
        ]
        p = sum(of_terms) / len(of_terms) if of_terms else p
        return self.smoothed(self.after_query[queries[-1]], item, p)

    def last_item(self, row, item):
        events, _ = self.history(row)
        p = self.popularity(row, item)
        return self.smoothed(self.after_item[events[-1]], item, p) if events else p

    def recency(self, row, item):
        events, _ = self.history(row)
        return max((place for place, seen in enumerate(events, 1) if seen == item), default=0)

    def score(self, name, row, item):
        return sum(getattr(self, part)(row, item) for part in name.split("+"))


def score_all(data, split, name) -> np.ndarray:
    """Every sample's score of every item, [n, I]."""
    batcher = make_batcher(data, split, None)
    rows = np.arange(len(batcher))
    batch = batcher.gather(rows, np.zeros((len(rows), 1), np.int64), np.zeros(len(rows), np.int64))
    ids = torch.arange(1, data.n_items + 1)[None]
    return Baselines(data, split).scorer(name)(batch)(ids).numpy()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("name", TITLES)
def test_scores_equal_the_dictionaries(data, name, split):
    slow = Slow(data, split)
    expected = [
        [slow.score(name, row, item) for item in range(1, data.n_items + 1)]
        for row in range(len(slow.samples))
    ]
    np.testing.assert_allclose(score_all(data, split, name), expected, rtol=1e-12)


def test_the_traps_are_there(data):
    slow = Slow(data, "test")
    histories = [slow.history(row) for row in range(len(slow.samples))]
    last_queries = [queries[-1] for _, queries in histories if queries]
    known = {query for query, counts in slow.after_query.items() if counts}
    assert len(last_queries) < len(histories)
    assert any(query not in known for query in last_queries)
    assert any(not slow.terms(query) for query in last_queries)
    assert any(events and not slow.after_item[events[-1]] for events, _ in histories)
    assert any(not events for events, _ in (Slow(data, "train").history(r) for r in range(40)))
    assert (data.item_count[1:] == 0).any()
    ties = np.diff(data.rec_times) == 0
    assert ties.mean() > 0.2
    assert set(data.search_times) & set(data.rec_times)


def test_nothing_at_or_after_a_held_out_target_is_counted(data):
    """Whatever the held-out targets are and whatever follows them, the scores stay."""
    arrays = {name: np.array(array) for name, array in data.arrays.items()}
    rng = np.random.default_rng(0)
    first = np.full(data.n_users + 1, 10**9)
    for split in ("valid", "test"):
        np.minimum.at(first, data.split(split).users, data.split(split).times)
    changed = 0
    for values, times, offsets in (
        ("rec_items", "rec_times", "rec_offsets"),
        ("click_items", "click_times", None),
    ):
        if offsets:
            owner = np.repeat(np.arange(data.n_users + 1), np.diff(arrays[offsets]))
        else:
            searcher = np.repeat(np.arange(data.n_users + 1), np.diff(data.search_offsets))
            owner = searcher[np.repeat(np.arange(len(searcher)), np.diff(data.click_offsets))]
        late = arrays[times] >= first[owner]
        arrays[values][late] = rng.integers(1, data.n_items + 1, late.sum())
        changed += late.sum()
    assert changed > 50
    other = PreparedData(arrays, {})
    for name in TITLES:  # of training samples, whose histories end before the held-out targets
        keep = data.split("train").times <= first[data.split("train").users]
        before, after = (score_all(each, "train", name)[keep] for each in (data, other))
        assert np.array_equal(before, after), name


def test_a_history_is_read_whole(tmp_path):
    """Recency knows the first of 1,000 items."""
    n = 1000
    events = pl.DataFrame(
        {
            "user": [0] * (n + 3),
            "item": [*range(n), 0, 1, 0],
            "time": list(range(n + 3)),
            "order": list(range(n + 3)),
            "target": [False] * n + [True] * 3,
        }
    )
    searches = pl.DataFrame(
        schema={"search": pl.Int64, "user": pl.Int64, "time": pl.Int64, "terms": pl.List(pl.String)}
    )
    clicks = pl.DataFrame(schema={"search": pl.Int64, "item": pl.Int64, "time": pl.Int64})
    log = InteractionLog("long", events, searches, clicks, [])
    data = prepare(log, tmp_path / "data", n_negatives=0)
    (scores,) = score_all(data, "test", "recency")
    ranked = [int(data.items[i]) for i in np.argsort(-scores) + 1]
    assert ranked == [1, 0, *range(n - 1, 1, -1)]


def test_an_unknown_baseline_is_refused(data):
    with pytest.raises(ValueError, match=r"popularity, recency, .*, got 'magic'"):
        Baselines(data).scorer("magic")
