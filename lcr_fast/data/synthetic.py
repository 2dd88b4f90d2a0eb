"""A generative model with planted structure: search tells the next interest, if you know which search.

The world has topics; a topic has items, a word that asks for it ("lens") and a word that names it
as the occasion of a search ("for-camera"). The recommendation stream of a user follows a few
current interests, each a topic, and drifts: now and then a fresh topic replaces the oldest one.
Two kinds of search run beside it, alike in everything that one stream shows:

- an *announcement*, some events before the first item of the next interest: it asks for the next
  topic, and its occasion is one of the interests that the recommendation stream shows already
  ("lens for-camera" from somebody who looks at cameras);
- *noise*, at random times: it asks for a random topic, and its occasion is none of the user's
  ("lens for-microscope", for a friend; the paper's "visa application" among electronics).

Both are followed by clicks on items of the topic that they ask for. A search alone does not tell
which kind it is, nor does the candidate item; only the occasion, looked up in the recommendation
stream, does. Ground truth is kept: ``searches.relevant`` is 1 for announcements and 0 for noise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .log import InteractionLog

RECENT = 4
_EVENT_MS = 60_000  # between two events of the recommendation stream


@dataclass(frozen=True)
class World:
    """Parameters of the generator; rates are per event of the recommendation stream."""

    n_users: int = 1200
    n_topics: int = 30
    items_per_topic: int = 20
    min_events: int = 16
    max_events: int = 24
    n_interests: int = 2  # current interests of a user
    drift: float = 0.3  # chance that an event opens a new interest
    announced: float = 0.9  # share of new interests that a search announces
    noise: float = 0.4  # chance of a noise search before an event
    max_lead: int = 2  # an announcement comes 0..max_lead events early
    click_rate: float = 0.6  # share of searches with clicks
    max_clicks: int = 2
    n_targets: int = 10  # the last events of a user that may be predicted
    text_dim: int = 32
    text_noise: float = 0.5
    popularity: float = 0.7  # exponent of the items' Zipf law within a topic


def generate(world: World | None = None, seed: int = 0) -> InteractionLog:
    """Draw a log from the generative model; the same world and seed give the same log.

    Raises ValueError where the world has too few topics for its users' interests.
    """
    import polars as pl

    from .log import InteractionLog

    world = world or World()
    if world.n_topics < 2 * world.n_interests + 1:
        raise ValueError(
            f"n_topics must be at least {2 * world.n_interests + 1} for {world.n_interests} "
            f"interests, got {world.n_topics}"
        )
    rng = np.random.default_rng([seed, 0x5EA7C])
    events: list[tuple] = []
    searches: list[tuple] = []
    clicks: list[tuple] = []
    for user in range(1, world.n_users + 1):
        _User(world, rng, user, events, searches, clicks).live()

    log = InteractionLog(
        source="synthetic",
        events=pl.DataFrame(
            events, orient="row", schema=["user", "item", "time", "order", "target"]
        ),
        searches=pl.DataFrame(
            searches,
            orient="row",
            schema={
                "search": pl.Int64, "user": pl.Int64, "time": pl.Int64,
                "terms": pl.List(pl.String), "relevant": pl.Int8, "topic": pl.Int32,
            },
        ),
        clicks=pl.DataFrame(
            clicks, orient="row", schema={"search": pl.Int64, "item": pl.Int64, "time": pl.Int64}
        ),
    )  # fmt: skip
    topics = _unit(rng.normal(size=(world.n_topics, world.text_dim)))

    def item_text():
        ids = np.arange(world.n_topics * world.items_per_topic)
        own = _unit(rng_text.normal(size=(len(ids), world.text_dim)))
        yield (
            pl.Series(ids + 1),
            _unit(topics[ids // world.items_per_topic] + world.text_noise * own).astype(np.float32),
        )

    def query_text():
        words = np.array([[int(t[0][5:]), int(t[1][3:])] for t in log.searches["terms"].to_list()])
        yield (
            log.searches["search"],
            _unit(topics[words[:, 0]] + topics[words[:, 1]]).astype(np.float32),
        )

    rng_text = np.random.default_rng([seed, 1])
    log.item_text, log.query_text = item_text, query_text
    n_relevant = int(log.searches["relevant"].sum())
    log.notes.append(f"generated with seed {seed} and {dataclasses.asdict(world)}")
    log.notes.append(
        f"{len(events)} events of {world.n_users} users; {len(searches)} searches, "
        f"{n_relevant} announcements and {len(searches) - n_relevant} noise"
    )
    return log


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class _User:
    """One user's life, event by event."""

    def __init__(self, world: World, rng, user: int, events, searches, clicks) -> None:
        self.world, self.rng, self.user = world, rng, user
        self.events, self.searches, self.clicks = events, searches, clicks
        self.interests = list(rng.permutation(world.n_topics)[: world.n_interests])
        self.past = set(self.interests)
        weights = np.arange(1, world.items_per_topic + 1) ** -world.popularity
        self.item_law = weights / weights.sum()

    def live(self) -> None:
        world, rng = self.world, self.rng
        n_events = int(rng.integers(world.min_events, world.max_events + 1))
        opens = rng.random(n_events) < world.drift
        opens[: world.max_lead + 1] = False
        leads = rng.integers(0, world.max_lead + 1, n_events)
        planned: dict[int, int] = {}  # event that opens an interest -> its topic, once announced
        for now in range(n_events):
            if rng.random() < world.noise:
                self._search(now, topic=self._fresh_topic(), relevant=False)
            for event in range(now, min(now + world.max_lead + 1, n_events)):
                if opens[event] and event not in planned and event - leads[event] <= now:
                    planned[event] = self._fresh_topic()
                    self.past.add(planned[event])
                    if rng.random() < world.announced:
                        self._search(now, topic=planned[event], relevant=True)
            if opens[now]:
                topic = planned[now]
                self.interests = [*self.interests[1:], topic]
            else:
                topic = self.interests[int(rng.integers(len(self.interests)))]
            is_target = now >= n_events - world.n_targets
            self.events.append((self.user, self._item(topic), now * _EVENT_MS, now, is_target))

    def _fresh_topic(self) -> int:
        """Draw a topic that the user has not been interested in; any topic once there is none."""
        others = [t for t in range(self.world.n_topics) if t not in self.past]
        return int(self.rng.choice(others or self.world.n_topics))

    def _item(self, topic: int) -> int:
        rank = int(self.rng.choice(self.world.items_per_topic, p=self.item_law))
        return 1 + topic * self.world.items_per_topic + rank

    def _search(self, now: int, topic: int, relevant: bool) -> None:
        rng, number = self.rng, len(self.searches)
        occasion = (
            self.interests[int(rng.integers(len(self.interests)))]
            if relevant
            else self._fresh_topic()
        )
        # After the previous event, before this one; room for two searches and their clicks.
        time = now * _EVENT_MS - _EVENT_MS // 2 + int(rng.integers(_EVENT_MS // 4))
        terms = [f"topic{topic}", f"for{occasion}"]
        self.searches.append((number, self.user, time, terms, int(relevant), topic))
        if rng.random() < self.world.click_rate:
            for i in range(int(rng.integers(1, self.world.max_clicks + 1))):
                self.clicks.append((number, self._item(topic), time + 1000 * (i + 1)))
