"""Facts of prepared data: right on a log that one can count; what misleads is warned of."""

import math
from dataclasses import replace

import pytest

from lcr_fast import cli
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.report.facts import fact_table, facts_of

MINUTE, START = 60_000, 1_700_000_000_000


def values(facts):
    return {fact.name: fact.value for fact in facts.facts}


def at(minutes):
    return START + minutes * MINUTE


@pytest.fixture
def clear():
    """Sixty users who differ, read one new item after the other, and search before each."""
    events, searches = [], []
    for user in range(1, 61):
        for step in range(6):
            item = (7 * user + 11 * step) % 90 + 1
            clicked = [((item + 44) % 90 + 1, at(10 * step - 4))]
            events.append((user, item, at(10 * step), True))
            searches.append((user, at(10 * step - 5), ["w", str(step)], clicked))
    return events, searches


@pytest.mark.parametrize("n_days", [3, 4])
def test_data_that_nothing_can_be_trained_on_is_warned_of(make_log, tmp_path, n_days):
    events = [(u, 4 * u + day, 10 * day, True) for u in range(20) for day in range(n_days)]
    data = prepare(make_log(events, []), tmp_path / "out", n_negatives=1, min_targets=2)
    assert len(data.split("valid")) == (20 if n_days == 4 else 0)  # the first day has no history
    warned = [w for w in facts_of(data).warnings if w.startswith("there is no validation sample")]
    assert len(warned) == (n_days == 3)


def test_facts_can_be_counted(shop, tmp_path):
    found = facts_of(prepare(shop, tmp_path / "out", n_negatives=1, min_targets=2))
    named = values(found)
    assert (named["events"], named["searches"], named["clicks in searches"]) == (13, 4, 6)
    # Of user 1 two at 400, of user 3 two at 120; of the clicks two at 300.
    assert named["events at the time of another"] == 4 / 13
    assert named["clicks in searches at the time of another"] == 2 / 6
    assert named["events that repeat the one before"] == 0
    assert named["searches with a click"] == 3 / 4
    assert named["searches with a term"] == 3 / 4
    # Users 1 and 2 are tested: 14 at 500 after five events, 16 at 450 after three.
    assert named["test samples"] == 2
    assert named["events before a target, median"] == 4
    assert named["targets seen before (repeats)"] == 1 / 2  # 16 was clicked at 300
    assert [dict(zip(each.bins, each.counts, strict=True)) for each in found.histograms] == [
        {"0": 0, "1": 0, "2": 0, "3-4": 1, "5-7": 1},
        {"0": 0, "1": 0, "2": 2},
    ]
    assert named["test targets clicked in the search before"] == 1 / 2


def test_clear_data_are_not_warned_of(make_log, clear, tmp_path):
    told = facts_of(prepare(make_log(*clear), tmp_path / "out", n_negatives=5))
    assert values(told)["targets with a search before them"] == 1
    assert [warning.split(":")[0] for warning in told.warnings] == ["60 test samples"]


def staggered(events, searches):
    """Let each user come long after the one before."""
    return (
        [(user, item, time + user * 10**9, target) for user, item, time, target in events],
        [(user, time + user * 10**9, words, []) for user, time, words, _ in searches],
    )


CHANGES = {
    "targets are repeats": lambda e, s: ([(u, i % 2 + 1, t, k) for u, i, t, k in e], s),
    "have a search before them": lambda e, s: (e, s[:10]),
    "events have the time of": lambda e, s: (e + [(u, i + 90, t, False) for u, i, t, _ in e], s),
    "later than the median": staggered,
    "are no training target": lambda e, s: ([(u, 999 * u + i, t, k) for u, i, t, k in e], s),
    "of the searches have a click": lambda e, s: (e, [(u, t, w, []) for u, t, w, _ in s]),
    "are the ids of both of one kind": lambda e, s: (
        e,
        [(u, t, w, [(item + 1000, at) for item, at in clicked]) for u, t, w, clicked in s],
    ),
    "one item is the target of": lambda e, s: (
        [(u, i if t < at(50) else 99, t, k) for u, i, t, k in e],
        s,
    ),
    "events are of one user, '999'": lambda e, s: (
        e + [(999, n % 90 + 1, START + n, n == 59) for n in range(60)],
        s,
    ),
    "of the event before": lambda e, s: (e + [(u, i, t + 1, False) for u, i, t, _ in e], s),
    "half of the targets have fewer": lambda e, s: ([x for x in e if x[2] < at(30)], s),
    "do not overlap in time": lambda e, s: (e, [(u, t - 10**10, w, []) for u, t, w, _ in s]),
}


@pytest.mark.parametrize("warning", CHANGES)
def test_what_misleads_is_warned_of(make_log, clear, tmp_path, warning):
    for name, log in (("clear", clear), ("odd", CHANGES[warning](*clear))):
        data = prepare(make_log(*log), tmp_path / name, n_negatives=5)
        assert (warning in " ".join(facts_of(data).warnings)) == (name == "odd")


def test_many_candidates_are_warned_of(make_log, clear, tmp_path):
    data = prepare(make_log(*clear), tmp_path / "data", n_negatives=60)
    assert "of all items are candidates" in " ".join(facts_of(data).warnings)


def test_lists_without_their_target_are_told(make_log, clear, tmp_path):
    events, searches = clear
    for name, lacking in (("few", 100), ("most", 200)):
        shown = [[91] if n < lacking else [event[1], 91] for n, event in enumerate(events)]
        data = prepare(make_log(events, searches, shown), tmp_path / name, n_negatives=5)
        lists = data.manifest["lists_of_impressions"]
        told = f"prepare: {lists['without_target']} of 360 lists of impressions lack their target"
        assert lists["all"] == 360
        assert lists["without_target"] == lacking
        assert told in data.summary()
        warned = "of the lists of impressions lack their target" in " ".join(
            facts_of(data).warnings
        )
        assert warned == (name == "most")


def test_a_split_by_time_leaks_nothing(make_log, clear, tmp_path):
    log = make_log(*staggered(*clear))
    data = prepare(log, tmp_path / "out", n_negatives=5, split="time")
    assert values(facts_of(data))["training samples later than the median target"] == 0


def test_clocks_of_their_own_are_not_compared(make_log, tmp_path):
    events = [(user, 5 * user + n, 100 * user + n, True) for user in range(5) for n in range(5)]
    log = make_log(events, [(0, 9_000, ["w"], [])])
    warned = []
    for name, common in (("common", True), ("own", False)):
        data = prepare(replace(log, common_clock=common), tmp_path / name, n_negatives=1)
        found = facts_of(PreparedData.open(tmp_path / name))
        assert data.manifest["common_clock"] is common
        warned.append("\n".join(found.warnings))
    for told in ("later than the median test target", "do not overlap in time"):
        assert told in warned[0]
        assert told not in warned[1]
    assert math.isnan(values(found)["training samples later than the median target"])


def test_data_without_searches_or_test_samples(make_log, clear, tmp_path):
    data = prepare(make_log(clear[0], []), tmp_path / "none", n_negatives=5)
    told = facts_of(data)
    assert math.isnan(values(told)["searches with a click"])
    assert values(told)["targets with a search before them"] == 0
    assert "| span of searches" in fact_table(told)
    data = prepare(make_log(*clear), tmp_path / "untested", n_negatives=5, min_targets=99)
    assert facts_of(data).warnings == [
        "there is no validation sample, by which an epoch is chosen: no model can be trained",
        "there is no test sample: nothing can be evaluated",
    ]


def test_the_command(make_log, clear, tmp_path, capsys):
    prepare(make_log(*clear), tmp_path / "data", n_negatives=5)
    cli.main(["inspect", str(tmp_path / "data")])
    told = capsys.readouterr().out
    assert "events before a test target:" in told
    assert "Warning: 60 test samples" in told
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tmp_path)])
    assert "is not prepared data" in capsys.readouterr().err
