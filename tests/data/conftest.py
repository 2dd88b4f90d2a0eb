"""Small made-up logs, shared by the data tests."""

import os
from pathlib import Path

import polars as pl
import pytest

from lcr_fast.data import folder
from lcr_fast.data.log import InteractionLog


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Spare the tests thousands of fsyncs, which matter where the power fails."""
    monkeypatch.setattr(folder, "_fsync", lambda path: None)


def _log(events, searches, impressions=None) -> InteractionLog:
    """Make a log of (user, item, time, target) and (user, time, terms, [(item, time), ...])."""
    frame = pl.DataFrame(
        [(*event, order) for order, event in enumerate(events)],
        schema={
            "user": pl.Int64,
            "item": pl.Int64,
            "time": pl.Int64,
            "target": pl.Boolean,
            "order": pl.Int64,
        },
        orient="row",
    )
    if impressions is not None:
        frame = frame.with_columns(
            impressions=pl.Series(impressions, dtype=pl.List(pl.Int64), strict=False)
        )
    texts = pl.DataFrame(
        [(key, user, time, terms) for key, (user, time, terms, _) in enumerate(searches)],
        schema={
            "search": pl.Int64,
            "user": pl.Int64,
            "time": pl.Int64,
            "terms": pl.List(pl.String),
        },
        orient="row",
    )
    clicks = pl.DataFrame(
        [(key, *click) for key, search in enumerate(searches) for click in search[3]],
        schema={"search": pl.Int64, "item": pl.Int64, "time": pl.Int64},
        orient="row",
    )
    return InteractionLog("made up", frame, texts, clicks, ["made up"])


@pytest.fixture(scope="session")
def make_log():
    return _log


@pytest.fixture(scope="session")
def shop() -> InteractionLog:
    """Three users with histories of both kinds, ties, a search left open, and a lone event."""
    events = [
        (1, 10, 100, True), (1, 11, 200, True), (1, 12, 300, True), (1, 10, 400, True),
        (1, 13, 400, False), (1, 14, 500, True),
        (2, 11, 150, True), (2, 12, 250, True), (2, 15, 350, True), (2, 16, 450, True),
        (3, 20, 120, False), (3, 21, 120, True), (3, 22, 220, True),
        (4, 30, 999, True),
    ]  # fmt: skip
    searches = [
        (1, 250, ["red", "shoe"], [(12, 260), (17, 310), (12, 320), (18, 600)]),
        (1, 400, ["late"], [(19, 405)]),
        (2, 100, ["shoe"], []),
        (2, 300, [], [(15, 300), (16, 300)]),
    ]
    shown = [None] * len(events)
    shown[5] = [10, 40, 41, 40, 14]
    shown[9] = [42, 43]
    shown[4] = [44]
    return _log(events, searches, shown)


@pytest.fixture
def tables(shop) -> dict[str, pl.DataFrame]:
    """Give the tables of the shop by their names."""
    return {name: getattr(shop, name) for name in ("events", "searches", "clicks")}


@pytest.fixture(scope="session")
def real_data():
    """Return the folder of a real data set under $LCR_FAST_DATA, or skip."""

    def find(name: str) -> Path:
        root = os.environ.get("LCR_FAST_DATA")
        if not root or not (Path(root) / name).is_dir():
            pytest.skip(f"LCR_FAST_DATA does not name a folder that holds {name}")
        return Path(root) / name

    return find
