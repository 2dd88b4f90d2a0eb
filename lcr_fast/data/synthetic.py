"""A generative model with planted structure: some searches tell the next interest, most do not.

The world has topics; a topic has items and a word that asks for it. The recommendation stream of a
user follows a few current interests, each a topic, and drifts: now and then a new topic replaces
the oldest one. Two kinds of search run beside it, alike in all that one stream shows. Both have two
words, what is asked for and the occasion ("lens", "for my camera"), and both may be followed by
clicks on items of what is asked for.

- An *announcement* precedes the first item of a new interest by up to ``max_lead`` events. It asks
  for the new topic, and its occasion is an interest that the recommendation stream shows already
  ("a lens for my camera", from somebody who looks at cameras).
- *Noise* comes at random times. It asks for a random topic, and its occasion is none of the
  user's ("a slide for the microscope", for a friend; "visa application" among electronics).

Neither the search nor the candidate item tells the two apart: only the occasion does, looked up in
the recommendation stream. ``searches.relevant`` keeps the truth, 1 for announcements, 0 for noise.

In a ``disjoint`` world every search asks at random for topics that the recommendation stream never
has: reading the streams together can bring nothing.

Words and items come with frozen text vectors, as if from a language model: an item's is its
topic's direction with an own part, a query's the sum of its two words' directions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .log import InteractionLog

_EVENT_MS = 60_000  # between two events of the recommendation stream
_NUMBERS = {"int": "an integer", "float": "a number"}
_CHANCES = dict.fromkeys(("drift", "announced", "noise", "click_rate"), (0, 1))
_COUNTS = ("n_users", "items_per_topic", "min_events", "n_targets", "n_interests", "max_clicks")
_RANGES = _CHANCES | dict.fromkeys(_COUNTS, (1, math.inf))  # others: from 0 on


@dataclass(frozen=True)
class World:
    """Parameters of the generator; chances are per event of the recommendation stream.

    Raises ValueError for a value out of range, and for too few topics for the users' interests.
    """

    seed: int = 0
    n_users: int = 1500
    n_topics: int = 20
    items_per_topic: int = 10
    min_events: int = 16
    max_events: int = 24
    n_targets: int = 10  # the last events of a user that may be predicted
    n_interests: int = 2  # current interests of a user
    drift: float = 0.4  # chance that an event opens a new interest
    announced: float = 0.9  # share of new interests that a search announces
    noise: float = 0.4  # chance of a noise search before an event
    max_lead: int = 2  # an announcement comes 0..max_lead events early
    click_rate: float = 0.5  # share of searches with clicks
    max_clicks: int = 2
    popularity: float = 0.7  # exponent of the items' Zipf law within a topic
    disjoint: bool = False  # searches ask for other topics than those recommended, at random
    text_dim: int = 32  # 0 for ids alone
    text_noise: float = 0.5  # length of an item's own part beside its topic's unit vector

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "bool":
                if not isinstance(value, bool):
                    raise ValueError(f"{f.name} must be true or false, got {value!r}")
                continue
            kinds = (int,) if f.type == "int" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
                raise ValueError(f"{f.name} must be {_NUMBERS[str(f.type)]}, got {value!r}")
            least, most = _RANGES.get(f.name, (0, math.inf))
            if not least <= value <= most:
                bounds = f"at least {least}" if most == math.inf else f"within {least}..{most}"
                raise ValueError(f"{f.name} must be {bounds}, got {value}")
        if self.max_events < self.min_events:
            raise ValueError(
                f"max_events must be at least min_events ({self.min_events}), got {self.max_events}"
            )
        least = (2 * self.n_interests + 1) * (2 if self.disjoint else 1)
        if self.n_topics < least:
            raise ValueError(
                f"n_topics must be at least {least} for {self.n_interests} interests, got "
                f"{self.n_topics}"
            )

    @property
    def n_wanted(self) -> int:
        """How many of the topics, the first ones, the recommendation stream has."""
        return self.n_topics // 2 if self.disjoint else self.n_topics


def read(path: str | os.PathLike) -> InteractionLog:
    """Generate a log from the :class:`World` in a JSON file, or from the default one for ``-``.

    Raises ValueError for a file that is not a JSON object of World's fields.
    """
    if os.fspath(path) == "-":
        return generate()
    try:
        with open(path, encoding="utf-8") as file:
            return generate(World(**json.load(file)))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, TypeError) as error:
        raise ValueError(f"{path}: must be a JSON object of World's fields: {error}") from None


def generate(world: World | None = None) -> InteractionLog:
    """Draw a log from the generative model; the same world gives the same log."""
    import polars as pl

    from .log import InteractionLog

    world = world or World()
    rng = np.random.default_rng([world.seed, 0])
    users = [_User(world, rng).live() for _ in range(world.n_users)]
    events = pl.DataFrame(
        [
            (u, item, now * _EVENT_MS, now, now >= len(user.items) - world.n_targets)
            for u, user in enumerate(users)
            for now, item in enumerate(user.items)
        ],
        schema={
            "user": pl.Int64,
            "item": pl.Int64,
            "time": pl.Int64,
            "order": pl.Int64,
            "target": pl.Boolean,
        },
        orient="row",
    )
    all_searches = [(u, search) for u, user in enumerate(users) for search in user.searches]
    searches = pl.DataFrame(
        [
            (key, u, s.time, [f"topic{s.topic}", f"for{s.occasion}"], int(s.relevant), s.topic)
            for key, (u, s) in enumerate(all_searches)
        ],
        schema={
            "search": pl.Int64,
            "user": pl.Int64,
            "time": pl.Int64,
            "terms": pl.List(pl.String),
            "relevant": pl.Int8,
            "topic": pl.Int32,
        },
        orient="row",
    )
    clicks = pl.DataFrame(
        [
            (key, item, s.time + 1000 * (i + 1))
            for key, (_, s) in enumerate(all_searches)
            for i, item in enumerate(s.clicks)
        ],
        schema={"search": pl.Int64, "item": pl.Int64, "time": pl.Int64},
        orient="row",
    )
    n_relevant = int(searches["relevant"].sum())
    notes = [
        f"generated by {dataclasses.asdict(world)}",
        f"{events.height:,} events, {searches.height:,} searches: {n_relevant:,} announcements, "
        f"{searches.height - n_relevant:,} noise",
    ]
    asked = np.array([(s.topic, s.occasion) for _, s in all_searches]).reshape(-1, 2)
    text = _Text(world, asked) if world.text_dim else None
    log = InteractionLog("synthetic", events, searches, clicks, notes)
    if text is not None:
        log.item_text, log.query_text = text.of_items, text.of_queries
    return log


@dataclass(frozen=True)
class _Search:
    time: int
    topic: int
    occasion: int  # a topic too
    relevant: bool
    clicks: list[int]


class _User:
    """One user's life, event by event."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self.world, self.rng = world, rng
        self.items: list[int] = []
        self.searches: list[_Search] = []
        self.interests = [int(t) for t in rng.permutation(world.n_wanted)[: world.n_interests]]
        self.past = set(self.interests)
        weights = np.arange(1, world.items_per_topic + 1) ** -world.popularity
        self.item_law = weights / weights.sum()

    def live(self) -> _User:
        world, rng = self.world, self.rng
        n_events = int(rng.integers(world.min_events, world.max_events + 1))
        opens = rng.random(n_events) < world.drift
        opens[: world.max_lead + 1] = False
        leads = rng.integers(0, world.max_lead + 1, n_events)
        planned: dict[int, int] = {}  # event that opens an interest -> its topic
        for now in range(n_events):
            if rng.random() < world.noise:
                self._search(now, self._new_topic(), self._new_topic(), relevant=False)
            for event in range(now, min(now + world.max_lead + 1, n_events)):
                if opens[event] and event not in planned and event - leads[event] <= now:
                    planned[event] = self._new_topic()
                    self.past.add(planned[event])
                    if rng.random() < world.announced:
                        self._search(now, planned[event], self._interest(), relevant=True)
            if now in planned:
                self.interests = [*self.interests[1:], planned[now]]
            self.items.append(self._item(planned[now] if now in planned else self._interest()))
        return self

    def _interest(self) -> int:
        return self.interests[int(self.rng.integers(len(self.interests)))]

    def _new_topic(self) -> int:
        """Draw a topic the user has not been interested in; any topic once there is none left."""
        n = self.world.n_wanted
        others = [t for t in range(n) if t not in self.past]
        return int(self.rng.choice(others or n))

    def _item(self, topic: int) -> int:
        rank = int(self.rng.choice(self.world.items_per_topic, p=self.item_law))
        return topic * self.world.items_per_topic + rank

    def _search(self, now: int, topic: int, occasion: int, relevant: bool) -> None:
        if self.world.disjoint:
            topic, occasion = self.rng.integers(
                self.world.n_wanted, self.world.n_topics, 2
            ).tolist()
            relevant = False
        # After the previous event and before this one, with room for the clicks.
        time = now * _EVENT_MS - _EVENT_MS // 2 + int(self.rng.integers(_EVENT_MS // 4))
        n_clicks = 0
        if self.rng.random() < self.world.click_rate:
            n_clicks = int(self.rng.integers(1, self.world.max_clicks + 1))
        clicks = [self._item(topic) for _ in range(n_clicks)]
        self.searches.append(_Search(time, topic, occasion, relevant, clicks))


class _Text:
    """Frozen text vectors of items and queries."""

    def __init__(self, world: World, asked: NDArray[np.int64]) -> None:
        self.world, self.asked = world, asked  # [n_searches, 2] topic, occasion
        rng = np.random.default_rng([world.seed, 1])
        self.topics = _unit(rng.normal(size=(world.n_topics, world.text_dim)))

    def of_items(self) -> Iterator:
        """Yield (item ids, float32 vectors)."""
        import polars as pl

        world = self.world
        items = np.arange(world.n_topics * world.items_per_topic)
        rng = np.random.default_rng([world.seed, 2])
        own = _unit(rng.normal(size=(len(items), world.text_dim)))
        vectors = self.topics[items // world.items_per_topic] + world.text_noise * own
        yield pl.Series(items), _unit(vectors).astype(np.float32)

    def of_queries(self) -> Iterator:
        """Yield (search keys, float32 vectors)."""
        import polars as pl

        vectors = self.topics[self.asked[:, 0]] + self.topics[self.asked[:, 1]]
        yield pl.Series(np.arange(len(self.asked))), _unit(vectors).astype(np.float32)


def _unit(x: NDArray) -> NDArray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
