"""prepare: splits, histories, counts and stored candidates against a plain reading of the log."""

import dataclasses
import json
import re
import shutil
import signal
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcr_fast.data import folder
from lcr_fast.data.batching import Batcher
from lcr_fast.data.build import prepare
from lcr_fast.data.log import InteractionLog
from lcr_fast.data.pairs import training_pairs
from lcr_fast.data.prepared import SPLITS, PreparedData

users, items = st.integers(1, 3), st.integers(1, 8)
times = st.integers(0, 12)  # few, so that ties abound
events_of_users = st.lists(st.tuples(users, items, times, st.booleans()), min_size=1, max_size=25)
searches_of_users = st.lists(
    st.tuples(
        users,
        times,
        st.lists(st.sampled_from("abc"), max_size=3),
        st.lists(st.tuples(items, times), max_size=4),  # clicks, with the delay after the search
    ).map(lambda s: (*s[:3], [(item, s[1] + delay) for item, delay in s[3]])),
    max_size=8,
)


def by_id(table, numbers):
    return [table[int(number)] for number in numbers if number]


def told_history(log, user, time):
    """Read off the log what of a user is known strictly before a time."""
    events = [e for e in log.events.to_dicts() if str(e["user"]) == user and e["time"] < time]
    events.sort(key=lambda e: (e["time"], e["order"]))
    searches = [s for s in log.searches.to_dicts() if str(s["user"]) == user and s["time"] < time]
    searches.sort(key=lambda s: s["time"])
    told = []
    for search in searches:
        clicks = [c for c in log.clicks.to_dicts() if c["search"] == search["search"]]
        clicks.sort(key=lambda c: c["time"])  # the order of the log decides where times tie
        shown = dict.fromkeys(c["item"] for c in clicks if c["time"] < time)
        told.append((search["terms"], list(shown)))
    return [str(e["item"]) for e in events], told


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=events_of_users, searches=searches_of_users)
def test_histories_hold_exactly_what_lies_strictly_before_the_target(
    make_log, tmp_path_factory, events, searches
):
    log = make_log(events, searches)
    out = tmp_path_factory.mktemp("data") / "prepared"
    eligible = [
        event
        for event in log.events.filter("target").to_dicts()
        if told_history(log, str(event["user"]), event["time"]) != ([], [])
    ]
    if not eligible:
        with pytest.raises(ValueError, match="nothing to prepare"):
            prepare(log, out, n_negatives=0)
        return
    data = prepare(log, out, n_negatives=0)
    n_samples = 0
    for split in SPLITS:
        batcher = Batcher(data, split, max_rec_len=30, max_search_len=10, max_clicks=8)
        samples = batcher.samples
        rows = np.arange(len(samples))
        n_samples += len(rows)
        batch = batcher.gather(rows, samples.items[:, None], np.zeros_like(rows))
        for row in rows:
            user, time = data.users[int(samples.users[row])], int(samples.times[row])
            rec, told = told_history(log, user, time)
            assert by_id(data.items, batch.rec_items[row]) == rec
            shown = [
                (by_id(data.terms, terms), [int(i) for i in by_id(data.items, clicks)])
                for terms, clicks in zip(
                    batch.search_terms[row, : batch.search_lengths[row]],
                    batch.search_clicks[row, : batch.search_lengths[row]],
                    strict=True,
                )
            ]
            assert shown == told
            target = data.items[int(samples.items[row])]
            past = set(rec) | {str(item) for _, clicks in told for item in clicks}
            assert bool(samples.repeat[row]) == (target in past)
            _, seen = data.seen.before(samples.users[[row]], samples.times[[row]])
            assert set(by_id(data.items, seen)) == past
    assert n_samples == len(eligible)


def test_an_open_search_shows_the_first_clicks_made_before_the_target(make_log, tmp_path):
    clicks = [(9, 60), (4, 100), (3, 80), (9, 90), (5, 120)]
    log = make_log([(1, 1, 0, False), (1, 2, 100, True)], [(1, 50, ["a"], clicks)])
    data = prepare(log, tmp_path / "out", n_negatives=0)
    for max_clicks, expected in ((5, ["9", "3"]), (1, ["9"])):
        batcher = Batcher(data, "train", max_rec_len=2, max_search_len=2, max_clicks=max_clicks)
        batch = batcher.gather(np.array([0]), np.array([[1]]), np.array([0]))
        assert by_id(data.items, batch.search_clicks[0, 0]) == expected


def test_splits_leave_the_last_targets_out(shop, tmp_path):
    data = prepare(shop, tmp_path / "out", n_negatives=2)
    told = {
        name: [
            (data.users[int(u)], data.items[int(i)], int(t))
            for u, i, t in zip(s.users, s.items, s.times, strict=True)
        ]
        for name, s in ((name, data.split(name)) for name in SPLITS)
    }
    assert told["test"] == [("1", "14", 500), ("2", "16", 450)]
    assert told["valid"] == [("1", "10", 400), ("2", "15", 350)]
    # User 3 has one sample only (its first target ties with its first event), user 4 has none.
    assert told["train"] == [
        ("1", "11", 200),
        ("1", "12", 300),
        ("2", "11", 150),
        ("2", "12", 250),
        ("3", "22", 220),
    ]
    assert data.split("valid").repeat.tolist() == [True, True]
    assert data.split("test").repeat.tolist() == [False, True]
    notes = "\n".join(data.manifest["notes"])
    assert "9 of 12 targets are samples; 3 dropped" in notes
    assert "kept 3 of 4 users; 1 dropped, with 1 events" in notes


@pytest.mark.parametrize(
    ("min_targets", "n_samples", "expected"),
    [(3, 3, "train valid test"), (3, 2, "train train"), (2, 2, "train test"), (1, 1, "test")],
)
def test_users_with_few_targets(make_log, tmp_path, min_targets, n_samples, expected):
    events = [(1, 1, 0, False)] + [(1, 2, 10 * (n + 1), True) for n in range(n_samples)]
    data = prepare(make_log(events, []), tmp_path / "out", n_negatives=0, min_targets=min_targets)
    split_at = {int(t): name for name in SPLITS for t in data.split(name).times}
    assert " ".join(split_at[time] for time in sorted(split_at)) == expected


@pytest.mark.parametrize(("min_history", "n_samples"), [(0, 3), (1, 2), (2, 2), (3, 1), (4, 0)])
def test_min_history_counts_the_events_of_both_streams(make_log, tmp_path, min_history, n_samples):
    log = make_log([(1, 1, 5, True), (1, 2, 10, True), (1, 3, 20, True)], [(1, 6, ["a"], [])])
    options = {"n_negatives": 0, "min_targets": 9, "min_history": min_history}
    if n_samples:
        assert len(prepare(log, tmp_path / "out", **options).split("train")) == n_samples
    else:
        with pytest.raises(ValueError, match="at least 4 events"):
            prepare(log, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("rec", "search", "times"),
    [(0, 0, [10, 20, 30]), (1, 0, [10, 20, 30]), (2, 0, [20, 30]), (0, 1, [10, 20, 30]),
     (0, 2, [20, 30]), (2, 2, [20, 30]), (3, 1, [30]), (0, 3, [])],
)  # fmt: skip
def test_a_sample_may_need_both_streams(make_log, tmp_path, rec, search, times):
    """Strictly before: the search at the time 10 is no history of the target at 10."""
    events = [(1, 1, 5, False), *((1, i, 10 * i, True) for i in (1, 2, 3)), (2, 4, 40, True)]
    log = make_log(events, [(1, 6, ["a"], []), (1, 10, ["b"], []), (2, 39, ["a"], [])])
    options = {"n_negatives": 0, "min_targets": 9, "min_rec_history": rec}
    options["min_search_history"] = search
    if rec == 0 and search < 2:
        times = [*times, 40]
    if times:
        data = prepare(log, tmp_path / "out", **options)
        assert sorted(data.split("train").times.tolist()) == times
        assert data.manifest["options"].items() >= options.items()
    else:
        with pytest.raises(ValueError, match="at least 1 events, 3 searches, so there is nothing"):
            prepare(log, tmp_path / "out", **options)


def test_item_count_knows_nothing_of_held_out_targets(shop, tmp_path):
    data = prepare(shop, tmp_path / "out", n_negatives=2)
    counts = {data.items[i]: int(data.item_count[i]) for i in range(1, data.n_items + 1)}
    known = Counter(["10", "11", "12", "11", "12", "20", "21", "22"])
    assert {item: n for item, n in counts.items() if n} == dict(known)
    targets = {data.items[i]: int(data.train_target_count[i]) for i in range(1, data.n_items + 1)}
    assert {item: n for item, n in targets.items() if n} == {"11": 2, "12": 2, "22": 1}


def test_item_count_holds_a_training_target_at_the_held_out_time(make_log, tmp_path):
    events = [(1, 1, 0, False), (1, 2, 10, True), (1, 3, 10, True), (1, 4, 20, True)]
    data = prepare(make_log(events, []), tmp_path / "out", n_negatives=0)
    assert data.split("train").times == data.split("valid").times
    assert data.item_count.tolist() == [0, 1, 1, 0, 0]


def test_impressions_are_distinct_and_hold_the_target(shop, tmp_path):
    data = prepare(shop, tmp_path / "out", n_negatives=2)
    test = data.split("test")
    assert test.impression_offsets.tolist() == [0, 4, 7]
    assert by_id(data.items, test.impressions) == ["10", "40", "41", "14", "42", "43", "16"]
    assert data.split("valid").impression_offsets.tolist() == [0, 0, 0]


def test_impressions_of_the_target_alone_are_left_out(make_log, tmp_path):
    log = make_log([(1, 1, 0, False), (1, 2, 5, True)], [], [None, [2, 2]])
    data = prepare(log, tmp_path / "out", n_negatives=0)
    assert data.split("train").impressions is None


def test_stored_negatives_are_new_to_the_user(shop, tmp_path):
    data = prepare(shop, tmp_path / "out", n_negatives=7)
    for split in ("valid", "test"):
        s = data.split(split)
        assert s.negatives.shape == (2, 7)
        assert not data.seen.has(s.users[:, None], s.negatives, s.times[:, None]).any()
        assert (s.negatives != s.items[:, None]).all()
        assert all(len(set(row)) == 7 for row in s.negatives.tolist())
    assert data.split("train").negatives is None


def test_too_many_negatives_name_the_user_and_write_nothing(shop, tmp_path):
    with pytest.raises(ValueError, match="99 distinct negatives are wanted"):
        prepare(shop, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_users_who_have_seen_nearly_all_are_left_out_and_counted(make_log, tmp_path):
    def life(user, items):
        return [(user, item, 10 * n, True) for n, item in enumerate(items)]

    log = make_log(
        [*life(1, [1, 2, 1, 2]), *life(2, [3, 1, 2, 4, 5, 6, 7, 8, 1]), *life(9, [9])],
        [(9, -5, ["a"], [])],
    )
    data = prepare(log, tmp_path / "out", n_negatives=3)
    # Before its last target user 2 has seen 8 of the 9 items, before the one before it 7 and that.
    assert [data.users[int(user)] for user in data.split("test").users] == ["1"]
    assert [data.users[int(user)] for user in data.split("valid").users] == ["1"]
    assert data.test_negatives.shape == (1, 3)
    note = next(note for note in data.manifest["notes"] if "negatives left" in note)
    assert "2 validation and test samples and 0 training samples of 1 users" in note
    assert "user '2' has seen all but 1 of the 9 items" in note
    assert "1 users are tested and 1 validated" in data.summary()
    with pytest.raises(
        ValueError, match=r"8 distinct .* user '1' has seen all but 7 of the 9 items"
    ):
        prepare(log, tmp_path / "none", n_negatives=8)


def test_a_training_sample_without_a_negative_is_left_out(make_log, tmp_path):
    seen = [(7, item, item, True) for item in (1, 2, 3, 4)] + [(7, 1, 9, True)]
    data = prepare(make_log(seen, []), tmp_path / "out", n_negatives=1, min_targets=9)
    assert data.split("train").times.tolist() == [2, 3]
    assert "0 validation and test samples and 2 training samples of 1 users" in data.summary()


@pytest.mark.parametrize("ordered", [True, False])
def test_the_order_of_the_file_decides_where_times_tie(make_log, tmp_path, ordered):
    log = make_log(
        [(1, 8, 5, False), (1, 3, 5, False), (1, 5, 9, True)],
        [(1, 6, ["z"], [(9, 7), (4, 7), (9, 8), (2, 7)]), (1, 6, ["a"], [])],
    )
    if not ordered:  # a second key that ties as well
        log = dataclasses.replace(log, events=log.events.with_columns(order=pl.lit(0, pl.Int64)))
    data = prepare(log, tmp_path / "out", n_negatives=0)
    assert by_id(data.items, data.rec_items) == ["8", "3", "5"]
    assert [data.query(int(query)) for query in data.search_queries] == ["z", "a"]
    assert by_id(data.items, data.click_items) == ["9", "4", "2"]
    batch = Batcher(data, "train", max_rec_len=2, max_search_len=2, max_clicks=1).gather(
        np.array([0]), np.array([[1]]), np.array([0])
    )
    assert by_id(data.items, batch.search_clicks[0, 0]) == ["9"]
    assert "2 of 3 events and 3 of 4 clicks in searches have the time of another" in data.summary()


def test_a_split_by_time_trains_on_nothing_later(make_log, tmp_path):
    events = [(user, item, 10 * item + user, True) for user in (1, 2, 3, 4) for item in range(10)]
    events += [(5, 70, 3, True), (5, 71, 4, True), (5, 3, 95, False), (5, 4, 96, False)]
    log = make_log(events, [(5, 97, ["late"], [(6, 98)])])
    data = prepare(log, tmp_path / "out", n_negatives=1, split="time", time_shares=(0.2, 0.2))
    begins = data.split_times.tolist()
    samples = [e for e in events if e[3] and e[2] > min(t for u, _, t, _ in events if u == e[0])]
    times = sorted(time for _, _, time, _ in samples)
    assert begins == [times[int(len(times) * 0.6)], times[int(len(times) * 0.8)]]
    expected = {"valid": {}, "test": {}}
    for user, item, time, _ in sorted(samples, key=lambda e: e[2]):
        if user != 5 and time >= begins[0]:
            expected["valid" if time < begins[1] else "test"][str(user)] = (str(item), time)
    for name in ("valid", "test"):
        s = data.split(name)
        got = zip(by_id(data.users, s.users), by_id(data.items, s.items), s.times, strict=True)
        assert {user: (item, time) for user, item, time in got} == expected[name]
    assert (data.split("train").times < begins[0]).all()
    assert len(data.split("train")) == sum(time < begins[0] for time in times)
    assert (data.train_end == begins[0]).all()
    known = Counter(str(item) for _, item, time, _ in events if time < begins[0])
    counts = {data.items[i]: int(data.item_count[i]) for i in range(1, data.n_items + 1)}
    assert {item: n for item, n in counts.items() if n} == dict(known)
    assert len(training_pairs(data).queries) == 0  # the only search is late
    assert f"validation begins at {begins[0]}, test at {begins[1]}" in data.summary()
    with pytest.raises(ValueError, match="no sample is left to train"):
        prepare(make_log(events[:2], []), tmp_path / "no", split="time", n_negatives=0)
    own = dataclasses.replace(log, common_clock=False)
    with pytest.raises(ValueError, match="times compare within a user only: no split by time"):
        prepare(own, tmp_path / "no", split="time", n_negatives=1)


def test_times_too_coarse_for_a_split_are_told(make_log, tmp_path):
    events = [(user, 3 * user + day, 10 * day, True) for user in range(20) for day in range(3)]
    data = prepare(make_log(events, []), tmp_path / "out", n_negatives=1, split="time")
    assert data.split_times.tolist() == [20, 20]
    assert not len(data.split("valid"))
    assert "validation and test begin at one time, so that nothing is left" in data.summary()


def test_leave_one_out_says_how_much_of_training_is_later_than_tests(make_log, tmp_path):
    early = [(1, item, item, True) for item in range(5)]
    late = [(2, item, 100 + item, True) for item in range(6)]
    text = prepare(make_log(early + late, []), tmp_path / "out", n_negatives=0).summary()
    assert "3 of 5 training samples are later than the median test target" in text  # 54.5
    text = prepare(
        make_log(early + late, []), tmp_path / "two", n_negatives=0, min_targets=7
    ).summary()
    assert "median" not in text  # nobody is tested


def test_a_k_core_drops_users_and_items_until_none_has_too_few(make_log, tmp_path):
    events = [(1, 1, 1, True), (1, 2, 2, True), (2, 1, 1, True), (2, 2, 2, True),
              (3, 2, 1, True), (3, 3, 2, True), (4, 3, 1, True)]  # fmt: skip
    shown = [None, [2, 3, 1], None, [3], None, None, None]
    log = make_log(events, [(1, 0, ["a"], [(2, 1), (3, 1)]), (3, 0, ["b"], [(1, 1)])], shown)
    data = prepare(log, tmp_path / "out", n_negatives=0, k_core=2)
    # User 4 goes, item 3 with it, then user 3.
    assert by_id(data.users, range(1, data.n_users + 1)) == ["1", "2"]
    assert by_id(data.items, range(1, data.n_items + 1)) == ["1", "2"]
    assert by_id(data.items, data.click_items) == ["2"]
    assert by_id(data.items, data.train_impressions) == ["2", "1"]
    note = "the 2-core has 2 users and 2 items; dropped 3 events, 1 searches, 2 clicks"
    assert note in data.summary()
    with pytest.raises(ValueError, match="no user and item have 9 events each"):
        prepare(log, tmp_path / "none", n_negatives=0, k_core=9)


def test_same_log_and_seed_give_the_same_bytes(shop, tmp_path):
    first, again, other = (
        prepare(shop, tmp_path / name, n_negatives=5, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.manifest == again.manifest
    assert first.fingerprint == PreparedData.open(tmp_path / "b").fingerprint
    assert not np.array_equal(first.test_negatives, other.test_negatives)
    assert first.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "bad",
    [{"negatives": "hard"}, {"min_targets": 0}, {"n_negatives": -1}, {"seed": -5}, {"split": "x"},
     {"k_core": -1}, {"n_negatives": 2**64}, {"min_history": 2**64},
     {"time_shares": (0.5, 0.5), "split": "time"}],
)  # fmt: skip
def test_bad_options(shop, tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        prepare(shop, tmp_path / "out", **bad)


def test_a_log_without_samples_is_refused(make_log, tmp_path):
    for log in (make_log([], []), make_log([(1, 1, 5, True)], [(1, 5, ["a"], [])])):
        with pytest.raises(ValueError, match="nothing to prepare"):
            prepare(log, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_search_alone_is_a_history(make_log, tmp_path):
    data = prepare(make_log([(1, 1, 5, True)], [(1, 4, [], [])]), tmp_path / "out", n_negatives=0)
    train = data.split("train")
    assert (len(train), len(data.rec_items)) == (1, 1)
    assert data.rec_offsets[train.users[0]] == train.rec_end[0]


def test_optional_columns_and_text_vectors(shop, tmp_path):
    def item_text():
        yield pl.Series([12, 77]), np.array([[1, 2], [3, 4]], np.float32)
        yield pl.Series([14]), np.array([[5, 6]], np.float32)

    def query_text():
        yield pl.Series([0], dtype=pl.Int64), np.array([[7, 8, 9]], np.float32)

    searches = shop.searches.with_columns(
        relevant=pl.Series([1, 0, -1, None], dtype=pl.Int8), topic=pl.Series([4, 5, 6, 7])
    )
    log = InteractionLog("x", shop.events, searches, shop.clicks, [], item_text, query_text)
    prepare(log, tmp_path / "out", n_negatives=2)
    data = PreparedData.open(tmp_path / "out")
    assert data.search_relevant.tolist() == [1, 0, -1, -1]
    assert data.search_topic.tolist() == [4, 5, 6, 7]
    assert data.item_text[data.items.find("14")].tolist() == [5, 6]
    assert np.count_nonzero(data.item_text.any(1)) == 2
    number = int(data.search_queries[0])
    assert data.query(number) == "red shoe"
    assert data.query_text[number].tolist() == [7, 8, 9]


def test_a_log_is_checked(shop):
    parts = {"events": shop.events, "searches": shop.searches, "clicks": shop.clicks}
    for name, frame, message in (
        ("events", shop.events.drop("item"), "events lacks the column item"),
        ("events", shop.events.with_columns(time=pl.lit(None, pl.Int64)), "events.time has 14"),
        ("events", shop.events.cast({"time": pl.Float64}), "events.time must be an integer"),
        ("events", shop.events.cast({"item": pl.Float64}), "events.item must be integers or text"),
        ("events", shop.events.cast({"target": pl.Int8}), "events.target must be a column of true"),
        ("events", shop.events.with_columns(time=pl.lit(10**15)), "events.time holds 10+, which"),
        ("events", shop.events.cast({"impressions": pl.List(pl.String)}), "impressions must be a"),
        ("searches", shop.searches.with_columns(terms=pl.lit("a b")), "terms must be a column of"),
        ("searches", shop.searches.with_columns(terms=pl.lit(["a\x1f"])), "has a term with"),
        ("searches", shop.searches.with_columns(relevant=pl.lit(300)), "relevant must be integers"),
        ("searches", shop.searches.cast({"search": pl.Int32}), "search is Int32 in searches, but"),
        ("searches", shop.searches.cast({"user": pl.String}), "user is Int64 in events, but Str"),
        ("searches", pl.concat([shop.searches] * 2), "searches.search repeats"),
        ("clicks", shop.clicks.with_columns(search=pl.lit(9, pl.Int64)), "7 clicks name a search"),
        ("clicks", shop.clicks.with_columns(time=pl.lit(299, pl.Int64)), "3 clicks precede"),
    ):
        with pytest.raises(ValueError, match=message):
            InteractionLog("x", **(parts | {name: frame}))


def test_summary_tells_sizes_and_notes(shop, tmp_path):
    text = prepare(shop, tmp_path / "out", n_negatives=2).summary()
    assert "3 users" in text
    assert "test: 2 samples, 50.0% repeats" in text
    assert "made up" in text


def test_the_fingerprint_names_the_content_of_every_array(shop, tmp_path):
    data = prepare(shop, tmp_path / "out", n_negatives=2)

    def fingerprint_with(**changes):
        arrays = data.arrays | changes
        out = folder.write_folder(
            tmp_path / "again",
            {"source": "another"},
            lambda to: [np.save(to / f"{name}.npy", array) for name, array in arrays.items()],
            overwrite=True,
        )
        return PreparedData.open(out, verify=False).fingerprint

    assert re.fullmatch("[0-9a-f]{64}", data.fingerprint)
    assert fingerprint_with() == data.fingerprint
    for name, array in list(data.arrays.items())[::6]:
        if array.size:
            changed = array.copy()
            changed.flat[-1] ^= 1
            assert fingerprint_with(**{name: changed}) != data.fingerprint, name


class TestFolder:
    def test_only_prepared_data_is_overwritten_and_only_when_asked(self, shop, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        prepare(shop, out, n_negatives=2)
        with pytest.raises(ValueError, match=r"overwrite it \(--overwrite\)"):
            prepare(shop, out, n_negatives=2)
        assert len(prepare(shop, out, n_negatives=3, overwrite=True).test_negatives[0]) == 3
        (out / "run").mkdir()
        with pytest.raises(ValueError, match="holds run beside prepared data, which would be lost"):
            prepare(shop, out, n_negatives=2, overwrite=True)
        assert PreparedData.open(out).test_negatives.shape[1] == 3
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "thesis.txt").write_text("precious")
        with pytest.raises(ValueError, match="never overwritten"):
            prepare(shop, mine, n_negatives=2, overwrite=True)
        with pytest.raises(ValueError, match="is a file"):
            prepare(shop, mine / "thesis.txt", n_negatives=2, overwrite=True)
        assert (mine / "thesis.txt").read_text() == "precious"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]

    def test_a_link_is_followed(self, shop, tmp_path, monkeypatch):
        link, there = tmp_path / "link", tmp_path / "disk" / "data"
        link.symlink_to(there)
        for n_negatives in (2, 3):
            prepare(shop, link, n_negatives=n_negatives, overwrite=n_negatives == 3)
            assert link.is_symlink()
            assert PreparedData.open(there).test_negatives.shape[1] == n_negatives
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
        assert [path.name for path in there.parent.iterdir()] == ["data"]
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        prepare(shop, ".", n_negatives=2)
        assert (tmp_path / "here" / "manifest.json").exists()

    @pytest.mark.parametrize("step", ["_sha256", "_swap"])
    @pytest.mark.parametrize("existed", [False, True])
    def test_a_failure_leaves_nothing_half_written(
        self, shop, tmp_path, monkeypatch, step, existed
    ):
        out = tmp_path / "out"
        if existed:
            prepare(shop, out, n_negatives=2)

        def fail(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(folder, step, fail)
            with pytest.raises(KeyboardInterrupt):
                prepare(shop, out, n_negatives=4, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == (["out"] if existed else [])
        if existed:
            assert PreparedData.open(out).test_negatives.shape[1] == 2

    def test_the_old_data_returns_if_the_new_cannot_take_its_place(
        self, shop, tmp_path, monkeypatch
    ):
        out = tmp_path / "out"
        prepare(shop, out, n_negatives=2)
        rename = folder.Path.rename

        def fail_for_the_new(path, target):
            if "partial" in path.name:
                raise OSError("disk gone")
            return rename(path, target)

        monkeypatch.setattr(folder.Path, "rename", fail_for_the_new)
        with pytest.raises(OSError, match="disk gone"):
            prepare(shop, out, n_negatives=4, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert PreparedData.open(out).test_negatives.shape[1] == 2

    def test_a_killed_process_leaves_nothing_under_the_name(self, run_code, shop, tmp_path):
        for name in ("events", "searches", "clicks"):
            getattr(shop, name).write_parquet(tmp_path / f"{name}.parquet")
        code = (
            "import os, signal\n"
            "from lcr_fast.data import build, folder, read\n"
            "folder._swap = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"build.prepare(read('frames', {str(tmp_path)!r}), {str(tmp_path / 'out')!r},"
            " n_negatives=2)\n"
        )
        done = run_code(code)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "out").exists()
        assert len(list(tmp_path.glob(".out.partial-*"))) == 1
        assert len(prepare(shop, tmp_path / "out", n_negatives=2).split("test")) == 2
        assert not list(tmp_path.glob(".out.*"))

    def test_only_what_is_ours_and_nobodys_is_tidied_up(self, shop, tmp_path):
        out, number = tmp_path / "out", "0" * 32
        prepare(shop, out, n_negatives=2)
        ours = [tmp_path / f".out.{kind}-{number}" for kind in ("partial", "old")]
        for path in ours:
            shutil.copytree(out, path)
        others = [
            tmp_path / name
            for name in (f".out.partial-{number[:-1]}", f".outer.old-{number}", ".out.old-mine")
        ]
        foreign = tmp_path / f".out.partial-{'1' * 32}"
        for path in (*others, foreign):
            shutil.copytree(out, path)
        (foreign / "thesis.txt").write_text("precious")
        link = tmp_path / f".out.old-{'2' * 32}"
        link.symlink_to(others[0], target_is_directory=True)
        with folder._held(ours[0]):  # as a process that still writes does
            prepare(shop, out, n_negatives=2, overwrite=True)
            assert [path.exists() for path in ours] == [True, False]
        prepare(shop, out, n_negatives=2, overwrite=True)
        assert not ours[0].exists()
        assert all(path.exists() for path in (*others, foreign, link))

    def test_data_that_a_killed_writer_put_aside_are_put_back(self, shop, tmp_path):
        out = tmp_path / "out"
        first = prepare(shop, out, n_negatives=2).fingerprint
        out.rename(tmp_path / f".out.old-{'0' * 32}")
        with pytest.raises(ValueError, match="already holds prepared data"):
            prepare(shop, out, n_negatives=3)
        assert PreparedData.open(out).fingerprint == first
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_two_writers_of_one_folder(self, shop, tmp_path):
        out = tmp_path / "out"
        prepare(shop, out, n_negatives=2)
        with folder._held(out), pytest.raises(ValueError, match="another process is writing"):
            prepare(shop, out, n_negatives=2, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestDamage:
    """Every way to damage a prepared folder gives one sentence that names the file."""

    @pytest.fixture
    def out(self, shop, tmp_path):
        prepare(shop, tmp_path / "out", n_negatives=2)
        return tmp_path / "out"

    @staticmethod
    def complaint(out, **options) -> str:
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
            PreparedData.open(out, **options)
        return str(caught.value)

    def test_every_array_missing_truncated_changed_or_retyped(self, out):
        for path in sorted(out.glob("*.npy")):
            content, array = path.read_bytes(), np.load(path)
            path.unlink()
            assert f"{path.name}: missing" in self.complaint(out, verify=False)
            for damaged in (content[:-1] if array.size else content[:60], content + b"x"):
                path.write_bytes(damaged)
                assert path.name in self.complaint(out, verify=False)
            np.save(path, array.astype(np.float64))
            assert f"{path.name}: dtype" in self.complaint(out, verify=False)
            np.save(path, np.pad(array, [(0, 1)] + [(0, 0)] * (array.ndim - 1)))
            assert f"{path.name}: shape" in self.complaint(out, verify=False)
            if array.size:
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
                assert f"{path.name}: checksum" in self.complaint(out)
            path.write_bytes(content)
        PreparedData.open(out)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "not found"),
            ("{", "not valid JSON"),
            ("[" * 9999, "not valid JSON"),
            ("[]", "does not describe"),
            ('{"format": "lcr_fast prepared data", "version": 99}', "format version 99"),
            ('{"format": "lcr_fast prepared data", "version": 1}', "lists no arrays"),
        ],
    )
    def test_manifest(self, out, content, message):
        path = out / "manifest.json"
        path.unlink()
        if content is not None:
            path.write_text(content)
        complaint = self.complaint(out)
        assert "manifest.json" in complaint
        assert message in complaint

    def test_a_manifest_whose_fingerprint_is_of_other_arrays(self, out):
        path = out / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"fingerprint": "0" * 64}))
        assert "manifest.json: the fingerprint is not" in self.complaint(out, verify=False)
        del manifest["fingerprint"]  # as written before there were any
        path.write_text(json.dumps(manifest))
        assert len(PreparedData.open(out).fingerprint) == 64

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("rec_offsets", lambda a: a[::-1].copy(), "starts at 0 and never falls"),
            ("rec_offsets", lambda a: np.append(a[:-1], a[-1] + 1), "ends at"),
            ("rec_items", lambda a: a - a.min(), "an id outside"),
            ("test_negatives", lambda a: a + 1000, "an id outside"),
            ("rec_times", lambda a: a[::-1].copy(), "not sorted"),
            ("seen_items", lambda a: np.repeat(a[:1], len(a)), "not sorted"),
            ("test_items", lambda a: a[:1], "1 rows where 2"),
            ("test_users", lambda a: a + 100, "an id outside"),
            ("test_rec_end", lambda a: a + 100, "ends outside"),
            ("item_count", lambda a: a.astype(np.int32), "the format says int64"),
        ],
    )
    def test_arrays_that_make_no_sense_under_a_fitting_checksum(
        self, out, tmp_path, name, change, message
    ):
        data = PreparedData.open(out)
        arrays = {key: np.array(array) for key, array in data.arrays.items()}
        arrays[name] = change(arrays[name])
        forged = tmp_path / "forged"
        folder.write_folder(
            forged, {}, lambda to: [np.save(to / f"{k}.npy", v) for k, v in arrays.items()]
        )
        complaint = self.complaint(forged)
        assert message in complaint

    def test_a_folder_without_an_array_in_manifest_and_disk(self, out, tmp_path):
        arrays = dict(PreparedData.open(out).arrays)
        del arrays["seen_times"]
        forged = tmp_path / "forged"
        folder.write_folder(
            forged, {}, lambda to: [np.save(to / f"{k}.npy", v) for k, v in arrays.items()]
        )
        assert "seen_times.npy: missing from the manifest" in self.complaint(forged)
