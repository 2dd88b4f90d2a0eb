"""Write a made-up log of hotel searches: many hotels, few samples each, no text.

    python docs/learning/hotel_log.py RAW && lcr-fast prepare frames RAW OUT

A session has a destination, most often asked for by a typed search (a city, at times a place in
it), and events on hotels there; about half of them are on a hotel of the session seen before.
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl

N_USERS, N_DESTINATIONS, N_HOTELS = 1900, 700, 45  # hotels of a destination
ZIPF = 0.6  # of destinations, and of the hotels of one
SESSION_MS, EVENT_MS = 10_000_000, 60_000


def zipf(n: int) -> np.ndarray:
    weights = np.arange(1, n + 1) ** -ZIPF
    return weights / weights.sum()


def sessions(rng: np.random.Generator):
    """Yield (user, start, terms of its search or None, [(item, time, target)])."""
    of_destinations, of_hotels = zipf(N_DESTINATIONS), zipf(N_HOTELS)
    hotels = rng.permutation(N_DESTINATIONS * N_HOTELS)
    for user in range(N_USERS):
        now = 0
        usual = rng.choice(N_DESTINATIONS, size=2, p=of_destinations, replace=False)
        for _ in range(int(rng.integers(3, 7))):
            now += SESSION_MS
            if rng.random() < 0.3:
                where = int(usual[int(rng.integers(2))])
            else:
                where = int(rng.choice(N_DESTINATIONS, p=of_destinations))
            start, terms = now, None
            if rng.random() < 0.75:
                terms = [f"city{where}"]
                if rng.random() < 0.4:
                    terms.append(f"poi{where}_{int(rng.integers(5))}")
            events: list[tuple[int, int, bool]] = []
            for place in range(int(rng.integers(2, 7))):
                now += EVENT_MS
                again = rng.random() < 0.4
                if place and again:
                    item = events[int(rng.integers(place))][0]
                else:
                    item = int(hotels[where * N_HOTELS + int(rng.choice(N_HOTELS, p=of_hotels))])
                booked = rng.random() < 0.45 or (place > 0 and again and rng.random() < 0.5)
                events.append((item, now, bool(booked)))
            yield user, start, terms, events


def main(out: Path) -> None:
    events, searches, clicks = [], [], []
    for user, start, terms, acts in sessions(np.random.default_rng([0, 77])):
        if terms is not None:
            clicks += [(len(searches), item, time) for item, time, _ in acts]
            searches.append((len(searches), user, start, terms))
        events += [(user, item, time, time, target) for item, time, target in acts]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows, columns in (
        ("events", events, ("user", "item", "time", "order", "target")),
        ("searches", searches, ("search", "user", "time", "terms")),
        ("clicks", clicks, ("search", "item", "time")),
    ):
        pl.DataFrame(rows, schema=columns, orient="row").write_parquet(out / f"{name}.parquet")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="RAW", type=Path, help="folder to write")
    main(parser.parse_args().out)
