"""The synthetic world: reproducible, and the facts it plants hold in the log."""

import dataclasses
import json

import numpy as np
import polars as pl
import pytest

from lcr_fast.data import read, synthetic
from lcr_fast.data.synthetic import _EVENT_MS, World, generate

WORLD = World(n_users=40, n_topics=32)  # more than any user gets interested in


@pytest.fixture(
    scope="module", params=[{}, {"max_lead": 0}, {"n_interests": 4, "n_topics": 40, "seed": 3}]
)
def world(request) -> World:
    return dataclasses.replace(WORLD, **request.param)


@pytest.fixture(scope="module")
def log(world):
    return generate(world)


def lives(world, log):
    """Yield (topics of the events, [(events before it, topic, occasion, relevant)]) of users."""
    events = log.events.sort("user", "order")
    for (user,), mine in events.group_by("user", maintain_order=True):
        times = mine["time"].to_numpy()
        topics = (mine["item"].to_numpy() // world.items_per_topic).tolist()
        searches = []
        for row in log.searches.filter(pl.col("user") == user).sort("search").to_dicts():
            asked, occasion = row["terms"]
            searches.append(
                (
                    int((times < row["time"]).sum()),
                    int(asked.removeprefix("topic")),
                    int(occasion.removeprefix("for")),
                    row["relevant"],
                )
            )
        yield topics, searches


def same(first, second) -> bool:
    frames = all(
        getattr(first, name).equals(getattr(second, name))
        for name in ("events", "searches", "clicks")
    )
    (mine,), (theirs,) = list(first.item_text()), list(second.item_text())
    return frames and np.array_equal(mine[1], theirs[1])


def test_a_world_without_text_has_the_same_events():
    bare = generate(dataclasses.replace(WORLD, text_dim=0))
    assert bare.item_text is None
    assert bare.query_text is None
    assert bare.events.equals(generate(WORLD).events)


def test_a_world_names_its_log():
    assert same(generate(WORLD), generate(WORLD))
    assert not same(generate(WORLD), generate(dataclasses.replace(WORLD, seed=1)))


def test_announcements_point_from_an_interest_shown_to_a_new_one(world, log):
    n = shown = 0
    for topics, searches in lives(world, log):
        for now, topic, occasion, relevant in searches:
            if not relevant:
                continue
            n += 1
            assert topic not in topics[:now]  # it comes before the first item of its topic ...
            opened = topics.index(topic) if topic in topics else len(topics)
            assert now <= opened <= now + world.max_lead  # ... and soon before it
            assert topic != occasion
            shown += occasion in topics[:now]
    assert n > 50
    # A current interest whose first item is yet to come is rare, and rarer with fewer interests.
    assert shown / n > (0.9 if world.n_interests == 2 else 0.7)


def test_noise_has_nothing_to_do_with_its_user(world, log):
    n = shown = announced = 0
    for topics, searches in lives(world, log):
        past = {topic for _, topic, _, relevant in searches if relevant}
        for now, _, occasion, relevant in searches:
            if relevant:
                continue
            n += 1
            shown += occasion in topics[:now]
            announced += occasion in past.intersection(topics[:now])
    assert n > 50
    assert shown == announced == 0


def test_streams_are_alike_in_form(world, log):
    """Neither word says by itself whether a search is relevant."""
    for relevant in (0, 1):
        terms = log.searches.filter(pl.col("relevant") == relevant)["terms"].to_list()
        assert all(t[0].startswith("topic") and t[1].startswith("for") for t in terms)
        for place in (0, 1):
            assert len({t[place] for t in terms}) > 0.8 * world.n_topics
    clicked = log.clicks["search"].unique()
    rates = log.searches.group_by("relevant").agg(pl.col("search").is_in(clicked.implode()).mean())
    assert rates["search"].to_list() == pytest.approx([world.click_rate] * 2, abs=0.12)


def test_searches_and_clicks_lie_between_events(log):
    searches = log.searches.select(
        "search", "user", "time", after=pl.col("time") % _EVENT_MS, topic="topic"
    )
    # Before event n stands at n * _EVENT_MS: in the half of the gap that precedes it.
    assert searches["after"].min() >= _EVENT_MS // 2
    clicks = log.clicks.join(searches, on="search", suffix="_of_search")
    assert (clicks["time"] > clicks["time_of_search"]).all()
    ends = (clicks["time_of_search"] // _EVENT_MS + 1) * _EVENT_MS
    assert (clicks["time"] < ends).all()
    assert (clicks["item"] // WORLD.items_per_topic == clicks["topic"]).all()
    assert (log.events["time"] == log.events["order"] * _EVENT_MS).all()


def test_sizes(world, log):
    per_user = log.events.group_by("user").agg(pl.len(), pl.col("target").sum())
    assert per_user.height == world.n_users
    assert world.min_events <= per_user["len"].min() <= per_user["len"].max() <= world.max_events
    assert (per_user["target"] == world.n_targets).all()
    assert log.searches["relevant"].is_in([0, 1]).all()


def test_text_vectors_are_unit_and_of_their_topic(world, log):
    ((items, of_items),) = log.item_text()
    ((searches, of_queries),) = log.query_text()
    assert of_items.dtype == of_queries.dtype == np.float32
    assert of_items.shape == (len(items), world.text_dim)
    assert searches.to_list() == log.searches["search"].to_list()
    for vectors in (of_items, of_queries):
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(vectors)), abs=1e-5)
    topics = items.to_numpy() // world.items_per_topic
    centres = np.stack([of_items[topics == t].mean(0) for t in range(world.n_topics)])
    assert ((of_items @ centres.T).argmax(1) == topics).all()
    asked = np.array(log.searches["topic"])
    nearest = np.argsort(-(of_queries @ centres.T), 1)[:, :2]
    assert (nearest == asked[:, None]).any(1).mean() > 0.95


def test_read(tmp_path, monkeypatch):
    path = tmp_path / "world.json"
    path.write_text(json.dumps(dataclasses.asdict(WORLD)))
    assert same(read("synthetic", path), generate(WORLD))
    monkeypatch.setattr(synthetic, "World", lambda: WORLD)
    assert same(read("synthetic", "-"), generate(WORLD))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n_user": 5}', "n_user'"),
        ("{", "must be a JSON object of World's fields"),
        ("[1, 2]", "must be a JSON object of World's fields"),
        ('{"n_topics": 4}', "n_topics must be at least 5 for 2 interests, got 4"),
        ('{"n_users": "many"}', "n_users must be an integer, got 'many'"),
        ('{"n_users": 2.5}', r"n_users must be an integer, got 2\.5"),
        ('{"n_users": true}', "n_users must be an integer, got True"),
        ('{"n_users": 0}', "n_users must be at least 1, got 0"),
        ('{"seed": -1}', "seed must be at least 0, got -1"),
        ('{"items_per_topic": 0}', "items_per_topic must be at least 1, got 0"),
        ('{"min_events": 30}', r"max_events must be at least min_events \(30\), got 24"),
        ('{"drift": 5}', r"drift must be within 0\.\.1, got 5"),
        ('{"text_noise": NaN}', "text_noise must be a number, got nan"),
        ('{"disjoint": 1}', "disjoint must be true or false, got 1"),
        (
            '{"disjoint": true, "n_topics": 9}',
            "n_topics must be at least 10 for 2 interests, got 9",
        ),
        ('{"popularity": 1e400}', "popularity must be a number, got inf"),
    ],
)
def test_bad_worlds(tmp_path, text, message):
    path = tmp_path / "world.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read("synthetic", path)


def test_missing_world(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        read("synthetic", tmp_path / "nothing.json")


def test_a_disjoint_world_asks_for_what_is_never_recommended():
    world = World(n_users=60, disjoint=True)
    log = generate(world)
    half = world.n_topics // 2
    topics = {item // world.items_per_topic for item in log.events["item"].to_list()}
    assert topics == set(range(half))
    assert set(log.searches["topic"].to_list()) == set(range(half, world.n_topics))
    assert log.searches["relevant"].sum() == 0
    occasions = {int(terms[1].removeprefix("for")) for terms in log.searches["terms"].to_list()}
    assert min(occasions) >= half
    # Nor does the topic of a search say anything of the next event's.
    pairs = []
    for (user,), events in log.events.sort("order").group_by("user"):
        times, items = events["time"].to_numpy(), events["item"].to_numpy()
        for search in log.searches.filter(pl.col("user") == user).to_dicts():
            place = int((times < search["time"]).sum())
            if place < len(times):
                pairs.append((search["topic"] - half, items[place] // world.items_per_topic))
    table = np.zeros((half, half))
    np.add.at(table, tuple(np.transpose(pairs)), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    n = (half - 1) ** 2
    assert abs(statistic - n) < 5 * np.sqrt(2 * n)
