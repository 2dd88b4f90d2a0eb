"""New data for an old model: ids keep their numbers, the unknown is skipped or appended."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command_line import fails, run
from lcr_fast.config import TrainConfig
from lcr_fast.data.batching import Batcher
from lcr_fast.data.build import prepare
from lcr_fast.data.folder import write_folder
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.serving.offline import recommend
from lcr_fast.training.evaluation import make_batcher, rank_model
from lcr_fast.training.identity import assign, count_unknown, describe_unknown, extend
from lcr_fast.training.models import attach_text, load_model
from lcr_fast.training.trainer import Trainer

# The day after: of users 5 is new, 6 too and has only searched, 3 stays away; items 50 and 51 are
# new, and so are the terms "blue" and "hat", and three queries.
EVENTS = [
    (1, 50, 1000, True), (1, 15, 1100, True), (1, 51, 1200, True), (1, 12, 1300, True),
    (2, 10, 1000, True), (2, 50, 1050, True), (2, 14, 1150, True), (2, 51, 1250, True),
    (5, 51, 1000, True), (5, 10, 1100, True), (5, 11, 1200, True), (5, 16, 1300, True),
]  # fmt: skip
SEARCHES = [
    (1, 1040, ["red", "hat"], [(50, 1045), (12, 1046)]),
    (1, 1050, ["red", "shoe"], [(13, 1060)]),
    (6, 1000, ["blue"], []),
    (6, 1001, ["hat", "late"], [(51, 1002), (16, 1003)]),
]
MODELS = [{}, {"query_encoder": "id", "score": "mlp"}, {"user_embedding": False, "steps": 0}]


def known_part(events, searches):
    """Leave out by hand what the first day does not know."""
    items, terms = {50, 51}, {"blue", "hat"}
    kept = [
        (user, time, [t for t in words if t not in terms], [c for c in made if c[0] not in items])
        for user, time, words, made in searches
    ]
    return [event for event in events if event[1] not in items], kept


@pytest.fixture
def old(shop, tmp_path):
    return prepare(shop, tmp_path / "old", n_negatives=2)


@pytest.fixture
def new_log(make_log):
    shown = [None] * len(EVENTS)
    shown[3], shown[7], shown[11] = [50, 10], [10, 51, 11], [50, 16, 13, 51]
    return make_log(EVENTS, SEARCHES, shown)


@pytest.fixture
def new(new_log, old, tmp_path):
    return prepare(new_log, tmp_path / "new", n_negatives=4, vocabulary=old)


@pytest.fixture
def make_old_model(make_model):
    def make(data, **changes):
        model = make_model(data, **changes).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # no bonus, bias or norm is left at its start
                parameter += 0.1 * torch.randn_like(parameter)
            for name in ("item", "user", "query"):
                if (table := getattr(model, f"{name}_embedding")) is not None:
                    table.weight[0] = 0
        assign(model, data)
        return model

    return make


def test_known_ids_keep_their_numbers(old, new, tmp_path):
    assert [*new.items.texts()] == [*old.items.texts(), "50", "51"]
    assert [*new.users.texts()] == [*old.users.texts(), "5", "6"]
    assert [*new.terms.texts()] == [*old.terms.texts(), "blue", "hat"]
    queries = [[data.query(n) for n in range(1, data.n_queries + 1)] for data in (old, new)]
    assert queries[1] == [*queries[0], "blue", "hat late", "red hat"]
    assert new.known_sizes.tolist() == list(old.sizes)
    assert PreparedData.open(tmp_path / "new").sizes == new.sizes
    (note,) = (line for line in new.manifest["notes"] if "ids keep their numbers" in line)
    told = f"2 of {new.n_users} users, 2 of {new.n_items} items, 3 of {new.n_queries} queries, 2 of"
    assert told in note
    user = new.users.find("1")
    events = new.rec_items[new.rec_offsets[user] : new.rec_offsets[user + 1]]
    assert [new.items[int(item)] for item in events] == ["50", "15", "51", "12"]
    searches = new.search_queries[new.search_offsets[user] : new.search_offsets[user + 1]]
    assert [new.query(int(query)) for query in searches] == ["red hat", "red shoe"]
    searched = new.search_offsets[new.users.find("6")]  # who only searches is kept, to be served
    assert new.search_offsets[new.users.find("6") + 1] - searched == 2


ids, times = st.integers(1, 6), st.integers(0, 9)
logs = st.tuples(
    st.lists(st.tuples(ids, ids, times, st.booleans()), max_size=15),
    st.lists(
        st.tuples(
            ids,
            times,
            st.lists(st.sampled_from("abcd"), max_size=3),
            st.lists(st.tuples(ids, st.integers(10, 19)), max_size=3),
        ),
        min_size=1,
        max_size=6,
    ),
)


def told(log, user, known_items, known_terms):
    """Read off a log what is known of a user at last, without what is not known at all."""
    events = [e for e in log.events.to_dicts() if e["user"] == user]
    events.sort(key=lambda e: (e["time"], e["order"]))
    searches = [s for s in log.searches.to_dicts() if s["user"] == user]
    searches.sort(key=lambda s: s["time"])
    clicks = sorted(log.clicks.to_dicts(), key=lambda c: c["time"])
    return [e["item"] for e in events if e["item"] in known_items], [
        (
            [term for term in search["terms"] if term in known_terms],
            [
                *dict.fromkeys(
                    click["item"]
                    for click in clicks
                    if click["search"] == search["search"] and click["item"] in known_items
                )
            ],
        )
        for search in searches
    ]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(days=st.lists(logs, min_size=2, max_size=3))
def test_any_later_day_is_read_as_told(make_log, shop, tmp_path_factory, days):
    folder = tmp_path_factory.mktemp("days")
    data = first = prepare(shop, folder / "0", n_negatives=0)
    for number, (events, searches) in enumerate(days, 1):
        # Some of the items and terms are the shop's.
        events = [(user, item + 8, time, target) for user, item, time, target in events]
        searches = [
            (u, t, [{"a": "red", "b": "shoe"}.get(w, w) for w in ws], [(i + 8, w) for i, w in cs])
            for u, t, ws, cs in searches
        ]
        log = make_log(events, searches)
        before, data = data, prepare(log, folder / str(number), n_negatives=0, vocabulary=data)
        for kind in ("users", "items", "terms"):
            ours, theirs = (getattr(each, kind).texts() for each in (data, before))
            assert ours[: len(theirs)] == theirs
            assert len(set(ours)) == len(ours)
        assert data.continues(first.vocabulary(), first.sizes)
        for known in (first, before, data):
            batcher = Batcher(
                data.without_items_above(known.n_items),
                "train",
                max_rec_len=20,
                max_search_len=9,
                max_clicks=5,
                largest_ids={"search_terms": known.n_terms},
            )
            users = {*log.events["user"], *log.searches["user"]}
            numbers = np.array([data.users.find(str(user)) for user in users])
            batch = batcher.at(numbers, np.full(len(users), 99), np.zeros((len(users), 0)))
            items, terms = ({*getattr(known, kind).texts()} for kind in ("items", "terms"))
            for row, user in enumerate(users):
                rec, shown = told(log, user, {int(item) for item in items}, terms)
                n_rec, n_search = int(batch.rec_lengths[row]), int(batch.search_lengths[row])
                assert [int(data.items[i]) for i in batch.rec_items[row, :n_rec].tolist()] == rec
                assert [
                    (
                        [data.terms[t] for t in batch.search_terms[row, n].tolist() if t],
                        [int(data.items[i]) for i in batch.search_clicks[row, n].tolist() if i],
                    )
                    for n in range(n_search)
                ] == shown


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([3, 99, 3, 3], "of [5, 19, 7, 5] ids"), ([-1, 0, 0, 0], "ids"), ([1, 1], "2 rows where 4")],
)
def test_damaged_sizes_are_refused(new, tmp_path, sizes, message):
    arrays = new.arrays | {"known_sizes": np.array(sizes)}
    write_folder(
        tmp_path / "forged",
        {},
        lambda to: [np.save(to / f"{name}.npy", array) for name, array in arrays.items()],
    )
    with pytest.raises(ValueError, match=r"known_sizes.npy: ") as caught:
        PreparedData.open(tmp_path / "forged")
    assert message in str(caught.value)


def test_the_same_log_adds_nothing_but_users_without_samples(shop, old, tmp_path):
    again = prepare(shop, tmp_path / "again", n_negatives=2, vocabulary=old)
    assert again.items.texts()[: old.n_items] == old.items.texts()
    assert again.users.texts() == [*old.users.texts(), "4"]
    assert again.continues(old.vocabulary(), old.sizes)
    third = prepare(shop, tmp_path / "third", n_negatives=2, vocabulary=again)
    assert third.vocabulary() == again.vocabulary()
    assert third.continues(old.vocabulary(), old.sizes)  # over two steps, too
    assert not old.continues(old.vocabulary(), old.sizes)  # it was not prepared to go on


def test_ids_may_be_text_on_the_second_day(new_log, old, tmp_path):
    for name in ("events", "searches", "clicks"):
        frame = getattr(new_log, name)
        ids = [column for column in ("user", "item") if column in frame.columns]
        frame = frame.with_columns(pl.col(ids).cast(pl.String))
        if name == "events":
            frame = frame.with_columns(pl.col("impressions").cast(pl.List(pl.String)))
        setattr(new_log, name, frame)
    data = prepare(new_log, tmp_path / "new", n_negatives=4, vocabulary=old)
    assert data.items.texts() == [*old.items.texts(), "50", "51"]


def test_searches_alone_can_be_served(make_log, old, make_old_model, tmp_path):
    data = prepare(make_log([], [(9, 5, ["shoe"], [])]), tmp_path / "new", vocabulary=old)
    assert not any(len(data.split(split)) for split in ("train", "valid", "test"))
    model = make_old_model(old)
    lines = list(recommend(model, data, ["9"], 3))
    assert [rank for _, rank, _, _ in lines] == [1, 2, 3]
    assert len(list(recommend(model, data, k=2))) == 2 * data.n_users
    with pytest.raises(ValueError, match="nothing to prepare"):
        prepare(make_log([], [(9, 5, [], [])]), tmp_path / "no", vocabulary=old, split="time")


@pytest.mark.parametrize("changes", MODELS)
def test_an_old_model_reads_what_it_knows(make_log, old, new, make_old_model, tmp_path, changes):
    model = make_old_model(old, **changes)
    plain = prepare(
        make_log(*known_part(EVENTS, SEARCHES)), tmp_path / "plain", n_negatives=1, vocabulary=old
    )
    lines = list(recommend(model, new, k=100))
    if changes.get("query_encoder") == "id":  # an unknown query is none, known terms or not
        lines = [line for line in lines if line[0] != "6"]
    expected = {(u, i): s for u, _, i, s in recommend(model, plain, k=100)}
    assert lines
    for user, _, item, score in lines:
        assert item not in ("50", "51")
        assert score == expected[user, item]
    batch = make_batcher(new, "test", model).at(
        np.array([new.users.find(user) for user in "156"]), np.full(3, 9999), np.zeros((3, 0))
    )
    if model.user_embedding is not None:
        assert batch.user.tolist() == [old.users.find("1"), 0, 0]
    if changes.get("query_encoder") == "id":
        assert batch.search_queries.tolist() == [
            [0, old.search_queries[old.search_offsets[1]]],
            [0, 0],
            [0, 0],
        ]
    model.check(batch)


def test_unknown_targets_and_candidates_are_left_out_of_ranks(old, new, make_old_model):
    model = make_old_model(old)
    samples = new.split("test")
    known = samples.items <= old.n_items
    assert known.tolist() == [True, False, True]
    ranks = rank_model(model, new).by_protocol
    batcher = make_batcher(new, "test", model)
    rows = np.arange(3)
    every = np.tile(np.arange(1, old.n_items + 1), (3, 1))
    batch = batcher.gather(rows, every, np.zeros(3))
    with torch.no_grad():
        scores = np.concatenate([np.full((3, 1), -np.inf), model(batch).numpy()], 1)
    offsets, shown = samples.impression_offsets, samples.impressions
    for row in rows:
        target, seen = (
            samples.items[row],
            new.seen.before(samples.users[[row]], samples.times[[row]]),
        )
        lists = {
            "sampled": samples.negatives[row],
            "impressions": shown[offsets[row] : offsets[row + 1]],
            "catalogue": np.setdiff1d(np.arange(1, new.n_items + 1), seen[1]),
        }
        for protocol, items in lists.items():
            items = items[(items <= old.n_items) & (items != target)]
            there = known[row] and (protocol != "impressions" or len(items))
            rank = 1 + (scores[row, items] >= scores[row, target]).sum() if there else 0
            assert ranks[protocol][row] == rank, (row, protocol)
    assert ranks["impressions"].tolist() == [ranks["impressions"][0], 0, ranks["impressions"][2]]
    assert (ranks["impressions"][[0, 2]] > 0).all()


def test_what_is_unknown_is_said(old, new, make_old_model):
    model = make_old_model(old)
    assert count_unknown(model.config, new) == {"users": 2, "items": 2, "terms": 2}
    text = describe_unknown(model.config, new)
    assert "2 users, 2 items, 2 terms; left out are 5 of 12 events, 2 of 5 clicks" in text
    assert "of 6 held-out targets" in text
    assert describe_unknown(model.config, old) == ""


def test_training_needs_every_row(old, new, make_old_model, tmp_path):
    model = make_old_model(old)
    with pytest.raises(ValueError, match="no row for 2 users, 2 items, 2 terms of the data"):
        Trainer(model, new, TrainConfig(epochs=1), "supervised", tmp_path / "run")
    extended = extend(model, new)
    Trainer(
        extended, new, TrainConfig(epochs=1, batch_size=8), "supervised", tmp_path / "run"
    ).run()


def test_an_unknown_catalogue_cannot_be_ranked(make_log, old, make_old_model, tmp_path):
    events = [(1, item, 1000 + item, True) for item in range(60, 65)]
    data = prepare(make_log(events, []), tmp_path / "new", n_negatives=1, vocabulary=old)
    with pytest.raises(ValueError, match="the model knows no test target: extend it first"):
        rank_model(make_old_model(old), data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("changes", MODELS)
def test_extending_keeps_every_bit(old, new, make_old_model, tmp_path, changes, dtype):
    model = make_old_model(old, **changes).to(dtype)
    extended = extend(model, new)
    for name, tensor in extended.state_dict().items():
        before = model.state_dict()[name]
        assert torch.equal(tensor[: len(before)], before), name
        mean = before[1:].double().mean(0).to(dtype)
        assert all(torch.equal(row, mean) for row in tensor[len(before) :]), name
    assert count_unknown(extended.config, new) == {}
    batch = make_batcher(old, "test", model).gather(
        np.arange(2), np.tile(np.arange(1, old.n_items + 1), (2, 1)), np.zeros(2)
    )
    with torch.no_grad():
        assert torch.equal(extended(batch), model(batch))
    both = (zip(*m.recommend(batch, 99), strict=True) for m in (model, extended))
    for before, after in zip(*both, strict=True):
        listed, wider = (
            dict(zip(*map(torch.Tensor.tolist, pair), strict=True)) for pair in (before, after)
        )
        # In float64 torch multiplies, and how it rounds depends on the number of items.
        kept = pytest.approx(listed, rel=1e-12) if dtype == torch.float64 else listed
        assert {item: wider[item] for item in listed} == kept
        assert new.n_items in wider.keys() - listed.keys()
    with pytest.raises(ValueError, match="the model knows more items than the data"):
        list(recommend(extended, old))
    assert "50" in {item for _, _, item, _ in recommend(extended, new, ["6"], 99)}
    extended.save(tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors", new, "cpu").config.n_items == new.n_items
    with pytest.raises(ValueError, match=rf"knows {new.n_items} items, the data has {old.n_items}"):
        load_model(tmp_path / "model.safetensors", old, "cpu")


def test_extending_never_takes_rows(old, make_old_model):
    model = make_old_model(old)
    sizes = {f"n_{name}": n for name, n in old.sizes._asdict().items()}
    with pytest.raises(ValueError, match="n_items must be at least the model's"):
        model.extended(**sizes | {"n_items": 1})


def test_another_vocabulary_is_refused(make_log, shop, old, new_log, new, make_old_model, tmp_path):
    path = tmp_path / "model.safetensors"
    model = make_old_model(old)
    model.save(path)
    load_model(path, new, "cpu")
    other = prepare(new_log, tmp_path / "other", n_negatives=1)
    strange = prepare(shop, tmp_path / "strange", n_negatives=1, vocabulary=other)
    for data in (other, strange):
        with pytest.raises(ValueError, match="do not go on with the model's"):
            load_model(path, data, "cpu")
        with pytest.raises(ValueError, match="does not go on with the model's ids"):
            extend(model, data)
    # Of the same size, with other items.
    moved = dataclasses.replace(
        shop,
        events=shop.events.filter(pl.col("user") < 4).with_columns(
            pl.col("item") + 100, pl.col("impressions") + 100
        ),
        clicks=shop.clicks.with_columns(pl.col("item") + 100),
    )
    first = prepare(moved, tmp_path / "first", n_negatives=1)
    twisted = prepare(moved, tmp_path / "twisted", n_negatives=1, vocabulary=first)
    assert twisted.items.texts() == [str(int(item) + 100) for item in old.items.texts()]
    with pytest.raises(ValueError, match="it is of other prepared data"):
        load_model(path, twisted, "cpu")


def test_text_vectors_of_known_ids_stay(shop, old, new_log, make_old_model, tmp_path):
    def vectors(of, seed):
        def read():
            keys = pl.Series(of, dtype=pl.Int64)
            yield keys, np.random.default_rng(seed).random((len(of), 8), np.float32)

        return read

    shop = type(shop)(shop.source, shop.events, shop.searches, shop.clicks)
    shop.item_text, shop.query_text = vectors(range(10, 50), 0), vectors(range(4), 1)
    first = prepare(shop, tmp_path / "first", n_negatives=1)
    model = make_old_model(first)
    model.save(tmp_path / "model.safetensors")
    for more in (None, vectors([10, 51], 2)):
        new_log.item_text = more
        data = prepare(
            new_log, tmp_path / "second", n_negatives=1, vocabulary=first, overwrite=True
        )
        assert np.array_equal(data.item_text[: first.n_items + 1], first.item_text)
        assert np.array_equal(data.query_text[: first.n_queries + 1], first.query_text)
        assert data.item_text[data.items.find("51")].any() == (more is not None)
        loaded = load_model(tmp_path / "model.safetensors", data, "cpu")
        assert len(rank_model(loaded, data).by_protocol) == 3
        lines = list(recommend(attach_text(extend(loaded, data), data), data, k=99))
        assert {"50", "51"} <= {item for _, _, item, _ in lines}
    new_log.item_text = None
    shop.item_text = vectors(range(10, 50), 9)
    other = prepare(shop, tmp_path / "other", n_negatives=1)
    data = prepare(new_log, tmp_path / "third", n_negatives=1, vocabulary=other)
    with pytest.raises(ValueError, match="do not go on with the model's"):
        load_model(tmp_path / "model.safetensors", data, "cpu")
    narrow = vectors([50], 4)
    new_log.item_text = lambda: ((keys, block[:, :3]) for keys, block in narrow())
    with pytest.raises(ValueError, match="item_text: vectors of 8 and 3 numbers"):
        prepare(new_log, tmp_path / "fourth", n_negatives=1, vocabulary=first)


def test_the_command_line(old, new_log, make_old_model, tmp_path, capsys):
    model = tmp_path / "model.safetensors"
    make_old_model(old).save(model)
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("events", "searches", "clicks"):
        getattr(new_log, name).write_parquet(raw / f"{name}.parquet")
    out, longer = tmp_path / "day2", tmp_path / "longer.safetensors"
    options = ("--vocabulary", tmp_path / "old", "--n-negatives", 3)
    assert "ids keep their numbers" in run("prepare", "frames", raw, out, *options)
    assert "without a row in the model: 2 users" in run("evaluate", model, "--data", out)
    capsys.readouterr()
    listed = run("recommend", model, "--data", out, "-k", 99)
    assert "without a row in the model" in capsys.readouterr().err
    assert ",50," not in listed
    assert "\n6,1," in listed
    told = run("extend", model, "--data", out, "-o", longer)
    assert f"items: {old.n_items} + 2\nusers: {old.n_users} + 2" in told
    assert ",50," in run("recommend", longer, "--data", out, "-k", 99)
    assert "without a row" not in run("evaluate", longer, "--data", out)
    assert LCRSER.load(longer).config.n_items == old.n_items + 2
    for argv, message in (
        (["extend", model, "--data", out, "-o", longer], "exists already"),
        (["recommend", longer, "--data", tmp_path / "old"], "do not go on with the model's"),
        (["prepare", "frames", raw, tmp_path / "no", "--vocabulary", model], "not prepared data"),
    ):
        assert message in fails(capsys, *argv)
