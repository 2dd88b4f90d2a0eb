"""A log whose every text tries to be more than text."""

import polars as pl

from lcr_fast.data.log import InteractionLog

HOSTILE = (
    "<script>console.error('ran')</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><h1>big",
    "'; --&amp;&lt;",
    "{{7*7}}${1}%s\\u003c",
    "http://127.0.0.1:1/fetched.png",
    "left\u202eright\u2066",
    "bell\x07\x9b",
    "w" * 300,
    "红色 ü 🎒",
)


def hostile(number):
    return f"{HOSTILE[number % len(HOSTILE)]}{number}"


def hostile_log(n_users=24, n_events=7, n_items=40) -> InteractionLog:
    events, searches, clicks = [], [], []
    for user in range(n_users):
        for step in range(n_events):
            item = (3 * user + 5 * step * (step % 3)) % n_items
            time = 10**12 + 60_000 * (100 * user + 10 * step)
            key = len(searches)
            searches.append((key, hostile(user), time - 5000, [hostile(item), "x"]))
            clicks.append((key, hostile((item + 1) % n_items), time - 4000))
            events.append((hostile(user), hostile(item), time, len(events), True))
    return InteractionLog(
        "<b>shop</b>",
        pl.DataFrame(events, ("user", "item", "time", "order", "target"), orient="row"),
        pl.DataFrame(searches, ("search", "user", "time", "terms"), orient="row"),
        pl.DataFrame(clicks, ("search", "item", "time"), orient="row"),
        ["kept <i>all</i>"],
    )
