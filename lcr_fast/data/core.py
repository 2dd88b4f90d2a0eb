"""k-core of a log: users and items with few events are dropped until none is left."""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from .log import InteractionLog


def k_core(log: InteractionLog, k: int) -> InteractionLog:
    """Keep the users and items with at least ``k`` events of the recommendation stream each.

    Dropping either may leave others with too few, so both are repeated. Searches of dropped users
    go, and clicks and impressions of dropped items, so that the catalogue is the core's. Raises
    ValueError where nothing is left.
    """
    events, height = log.events, -1
    while events.height != height:
        height = events.height
        for column in ("user", "item"):
            events = events.filter(pl.len().over(column) >= k)
    if not height:
        raise ValueError(f"{log.source}: no user and item have {k} events each (--k-core)")
    users, items = (events[column].unique() for column in ("user", "item"))
    if "impressions" in events.columns:
        in_core = pl.element().filter(pl.element().is_in(items.implode()))
        events = events.with_columns(pl.col("impressions").list.eval(in_core))
    searches = log.searches.filter(pl.col("user").is_in(users.implode()))
    kept = pl.col("search").is_in(searches["search"].implode())
    clicks = log.clicks.filter(kept & pl.col("item").is_in(items.implode()))
    dropped = {
        name: getattr(log, name).height - frame.height
        for name, frame in (("events", events), ("searches", searches), ("clicks", clicks))
    }
    note = (
        f"prepare: the {k}-core has {len(users):,} users and {len(items):,} items; dropped "
        + ", ".join(f"{n:,} {name}" for name, n in dropped.items())
    )
    return replace(log, events=events, searches=searches, clicks=clicks, notes=[*log.notes, note])
