"""Logs of any size: a made-up one like KuaiSAR's is read to the last row; progress is told."""

import io
import itertools
import re
import sys

import pytest

import kuaisar_log
import slow_readers
from lcr_fast.data import kuaisar
from lcr_fast.data.build import prepare

SEARCH_COLUMNS = (
    *("user_id", "search_session_id", "search_session_timestamp", "keyword"),
    *("item_id", "click_cnt"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of a log of several blocks, with all traps, and what is in it."""
    folder = tmp_path_factory.mktemp("log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kuaisar_log, "_BLOCK", 1500)
        for name, share in (("REPEATED", 0.2), ("WITHOUT_KEYWORD", 0.02), ("WORDLESS", 0.04)):
            patch.setattr(kuaisar_log, f"_{name}", share)
        return folder, kuaisar_log.write(folder, 6000, seed=3)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_made_up_log_is_read_to_the_last_row(made, tmp_path):
    folder, counts = made
    log = kuaisar.read(folder)
    assert counts.repeated
    assert counts.conflicts
    notes = "\n".join(log.notes)
    assert f"dropped {counts.rec_rows - counts.clicks - counts.repeated:,} of" in notes
    assert f"dropped {counts.repeated} rows that repeat another exactly" in notes
    assert (
        f"{counts.search_rows:,} rows in {counts.sessions:,} search sessions of "
        f"{log.searches['user'].n_unique()} users, {counts.sessions_clicked} with a click"
    ) in notes
    assert (
        f"kept {counts.results_clicked:,} clicked results, {counts.conflicts} of them listed both "
        f"clicked and not; dropped {counts.results_unclicked:,}"
    ) in notes
    there = prepare(log, tmp_path / "out", n_negatives=5).manifest["counts"]
    assert {name: there[name] for name in ("users", "items", "queries")} == {
        "users": counts.users, "items": counts.items, "queries": counts.queries,
    }  # fmt: skip
    assert (there["events"], there["searches"], there["clicks"]) == (
        counts.clicks, counts.sessions, counts.results_clicked,
    )  # fmt: skip


def test_the_made_up_log_has_the_traps_of_the_real_one(made):
    folder, _ = made
    rows = list(slow_readers.rows_of(folder / "src_inter.csv", SEARCH_COLUMNS))
    sessions = [tuple(row[name] for name in SEARCH_COLUMNS[:4]) for row in rows]
    users, words = {}, {}
    for user, session, time, keyword in sessions:
        users.setdefault(session, set()).add(user)
        words.setdefault((user, session, time), set()).add(keyword)
    assert max(map(len, users.values())) > 1
    assert max(map(len, words.values())) > 1
    assert {None, "[]"} <= {keyword for *_, keyword in sessions}
    apart = [a for a, b in itertools.pairwise(sessions) if a != b]
    assert len(apart) > 2 * len(set(sessions))  # their rows do not stand together
    assert len(set(map(repr, rows))) < len(rows)


def test_the_same_size_and_seed_give_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        kuaisar_log.write(tmp_path / name, 500, seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_progress_is_told_on_a_terminal_alone(made, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    prepare(kuaisar.read(made[0]), tmp_path / "told", n_negatives=5)
    told = terminal.getvalue()
    assert re.search(r"rec_inter\.csv: +\d+%.*4\.46k", told)
    assert re.search(r"prepare: 100%.* 7/7 .*files", told)
    terminal.isatty = lambda: False
    prepare(kuaisar.read(made[0]), tmp_path / "silent", n_negatives=5)
    assert terminal.getvalue() == told
    assert contents(tmp_path / "told") == contents(tmp_path / "silent")
