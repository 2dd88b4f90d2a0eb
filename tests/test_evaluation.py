"""Evaluation against a slow oracle that sorts explicit lists, and by hand-made cases."""

import dataclasses
import io
import math
import re

import numpy as np
import polars as pl
import pytest
import torch

from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.data.log import InteractionLog
from lcr_fast.data.prepared import PreparedData
from lcr_fast.data.synthetic import _EVENT_MS
from lcr_fast.training import analysis, evaluation
from lcr_fast.training.analysis import (
    exchanged_searches,
    relevance_share,
    search_effects,
    state_distances,
)
from lcr_fast.training.baselines import TITLES, Baselines
from lcr_fast.training.evaluation import (
    PROTOCOLS,
    catalogue_rows,
    make_batcher,
    rank_model,
    rank_split,
    rank_targets,
    strata,
    with_target,
)
from lcr_fast.training.ranks import differences, rank_metrics
from lcr_fast.training.scorers import model_scorer
from lcr_fast.weights import REC, SEARCH


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    """Synthetic data with what it lacks otherwise.

    Two thirds of the targets have impressions, every test target happens at the time of the
    validation target, users 0..3 have no searches and users 4..7 short histories.
    """
    log = synthetic.generate(synthetic.World(n_users=24, n_topics=16))
    rng = np.random.default_rng(3)
    shown = [
        [int(item), *rng.choice(160, rng.integers(1, 9)).tolist()] if rng.random() < 0.67 else None
        for item in log.events["item"]
    ]
    last = pl.col("order").max().over("user")
    events = log.events.with_columns(
        impressions=pl.Series(shown, dtype=pl.List(pl.Int64)),
        time=pl.col("time") - pl.when(pl.col("order") == last).then(_EVENT_MS).otherwise(0),
    ).filter(~pl.col("user").is_between(4, 7) | (pl.col("order") >= last - 3))
    searches = log.searches.filter(pl.col("user") > 3)
    clicks = log.clicks.join(searches, on="search", how="semi")
    log = InteractionLog("shown", events, searches, clicks, [], log.item_text, log.query_text)
    return prepare(log, tmp_path_factory.mktemp("shown") / "data", n_negatives=40)


@pytest.fixture(scope="module")
def model(data, make_model):
    return make_model(data, n_layers=2, step_embedding=True).eval()


# -- ranks ---------------------------------------------------------------------------------------


def hashed_scorer(n_values: int):
    """Score by user and item alone, a few values only, so that many candidates tie."""

    def read(batch):
        return lambda ids: ((ids * 7919 + batch.user[:, None] * 104_729) % n_values).float()

    return read


def list_candidates(data, split, row, protocol) -> list[int]:
    """List what the target of a sample competes with, item by item."""
    samples = data.split(split)
    user, item, time = samples.users[row], int(samples.items[row]), samples.times[row]
    if protocol == "sampled":
        return samples.negatives[row].tolist()
    if protocol == "impressions":
        start, end = samples.impression_offsets[row : row + 2]
        return [int(i) for i in samples.impressions[start:end] if i != item]
    seen = {
        int(data.seen_items[i])
        for i in range(data.seen_offsets[user], data.seen_offsets[user + 1])
        if data.seen_times[i] < time
    }
    return [i for i in range(1, data.n_items + 1) if i != item and i not in seen]


def slow_ranks(scorer, data, split, model, protocol) -> list[int]:
    """Rank sample by sample, candidate lists in full, equal scores before the target."""
    batcher = make_batcher(data, split, model)
    ranks = []
    for row in range(len(batcher)):
        others = list_candidates(data, split, row, protocol)
        ids = np.array([[int(batcher.samples.items[row]), *others]])
        batch = batcher.gather(np.array([row]), ids, np.array([0]))
        with torch.no_grad():
            first, *rest = scorer(batch)(batch.candidates)[0].tolist()
        order = sorted([*((-score, 0) for score in rest), (-first, 1)])
        ranks.append(order.index((-first, 1)) + 1 if others else 0)
    return ranks


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("scorer", ["model", "ties", "constant", *TITLES])
def test_ranks_equal_the_sorted_lists(data, model, monkeypatch, scorer, protocol, split):
    monkeypatch.setattr(evaluation, "_CATALOGUE_BLOCK", 50)  # several blocks and a ragged one
    others = {
        "model": model_scorer(model),
        "ties": hashed_scorer(5),
        "constant": hashed_scorer(1),
    }
    score = others[scorer] if scorer in others else Baselines(data, split).scorer(scorer)
    reader = model if scorer == "model" else None
    ranks = rank_targets(score, make_batcher(data, split, reader), protocol, batch_size=7)
    assert ranks.dtype == np.int64
    expected = slow_ranks(score, data, split, reader, protocol)
    if scorer == "model":  # rounding of another batch shape may swap near equals
        assert np.mean(ranks != expected) <= 0.05
        assert np.abs(ranks - expected).max() <= 1
    else:
        assert ranks.tolist() == expected
    if scorer == "constant":
        assert not rank_metrics(ranks)["hr@1"].any()
    if protocol == "impressions":
        assert 0 < (ranks == 0).sum() < len(ranks)


def test_a_batch_of_users_without_impressions_has_no_ranks(data):
    batcher = make_batcher(data, "test", None)
    alone, together = (
        rank_targets(hashed_scorer(5), batcher, "impressions", batch_size=n) for n in (1, 24)
    )
    assert alone.tolist() == together.tolist()
    assert 0 in alone


def test_a_repeated_target_is_ranked_in_the_catalogue(data):
    """Seen items are masked, the target never: the best score gives rank 1 to a repeat too."""
    batcher = make_batcher(data, "test", None)
    assert batcher.samples.repeat.any()
    target = torch.from_numpy(np.array(batcher.samples.items, dtype=np.int64))
    ranks = rank_targets(
        lambda batch: lambda ids: (ids == target[batch.row, None]).float(), batcher, "catalogue"
    )
    assert (ranks == 1).all()


def test_nan_scores_are_refused(data):
    nan = torch.tensor(float("nan"))
    for protocol in PROTOCOLS:
        with pytest.raises((ValueError, RuntimeError), match="NaN"):  # by op or by extension
            rank_targets(
                lambda batch: lambda ids: nan.expand(len(batch), ids.shape[1]),
                make_batcher(data, "test", None),
                protocol,
            )


def test_some_users_are_ranked_in_the_catalogue(data, model, monkeypatch):
    whole = rank_model(model, data, catalogue_users=0)
    some, fewer = (rank_model(model, data, catalogue_users=n) for n in (7, 4))
    chosen, part = (ranks.by_protocol["catalogue"] > 0 for ranks in (some, fewer))
    assert chosen.sum() == 7
    assert part.sum() == (part & chosen).sum() == 4
    # Another batch may round otherwise, and swap near equals.
    gap = whole.by_protocol["catalogue"][chosen] - some.by_protocol["catalogue"][chosen]
    assert np.abs(gap).max() <= 1
    assert np.array_equal(some.by_protocol["sampled"], whole.by_protocol["sampled"])
    rows = {(r["protocol"], r["targets"]): r["n"] for r in some.rows() if r["metric"] == "mrr"}
    assert (rows["catalogue", "all"], rows["sampled", "all"]) == (7, len(chosen))
    # A pair is compared where both are ranked.
    rows = [r for r in differences([(some, fewer)]) if r["targets"] == "all"]
    assert {r["n"] for r in rows if r["protocol"] == "catalogue"} == {4}
    monkeypatch.setattr(evaluation, "CATALOGUE_SECONDS", 3)
    monkeypatch.setattr(evaluation, "_CATALOGUE_RATE", data.n_items)
    assert len(catalogue_rows(data, "test")) == 3


def test_ranking_the_catalogue_shows_how_long_it_takes(data, model, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    batcher = make_batcher(data, "test", model)
    rank_targets(model_scorer(model), batcher, "sampled", batch_size=5)
    assert not terminal.getvalue()
    rank_targets(model_scorer(model), batcher, "catalogue", batch_size=5)
    assert re.search(r"ranking in the catalogue: +\d+%.*/\d+ \[.*<", terminal.getvalue())


def test_unknown_protocol(data):
    with pytest.raises(ValueError, match="sampled, catalogue, impressions, got 'best'"):
        rank_targets(hashed_scorer(2), make_batcher(data, "test", None), "best")


# -- strata and the whole table ------------------------------------------------------------------


def test_strata(data):
    samples, groups = data.split("test"), strata(data, "test")
    targets = set(data.split("train").items.tolist())
    for row in range(len(samples)):
        item, user = int(samples.items[row]), samples.users[row]
        seen = list(zip(data.seen_items, data.seen_times, strict=True))
        mine = seen[data.seen_offsets[user] : data.seen_offsets[user + 1]]
        repeat = any(i == item and t < samples.times[row] for i, t in mine)
        expected = {
            "all": True,
            "repeat": repeat,
            "new": not repeat,
            "covered": item in targets,
            "uncovered": item not in targets,
        }
        assert {name: bool(member[row]) for name, member in groups.items()} == expected


def test_rows_of_the_table(data, model):
    rows = rank_model(model.train(), data, "test").rows()
    assert not model.training
    groups = strata(data, "test")
    keys = [(r["protocol"], r["targets"], r["metric"]) for r in rows]
    assert len(set(keys)) == len(keys) == 3 * 5 * 9
    by_key = dict(zip(keys, rows, strict=True))
    for protocol in PROTOCOLS:
        ranks = rank_targets(model_scorer(model), make_batcher(data, "test", model), protocol)
        for group, member in groups.items():
            kept = [rank for rank in ranks[member] if rank]
            row = by_key[protocol, group, "ndcg@5"]
            assert row["n"] == len(kept)
            if kept:
                gains = [1 / math.log2(rank + 1) if rank <= 5 else 0 for rank in kept]
                assert row["mean"] == pytest.approx(np.mean(gains))


def test_protocols_without_candidates_are_left_out(prepared):
    rows = rank_split(hashed_scorer(3), prepared).rows()
    assert {row["protocol"] for row in rows} == {"sampled", "catalogue"}


def test_validation_score(data, model):
    ranks = slow_ranks(model_scorer(model), data, "valid", model, "sampled")
    gains = [1 / math.log2(rank + 1) if rank <= 5 else 0 for rank in ranks]
    batcher = make_batcher(data, "valid", model)
    assert evaluation.validation_score(model, batcher) == pytest.approx(np.mean(gains), abs=0.02)


# -- searches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [True, False])
def test_a_model_of_no_searches_scores_all_histories_as_if_there_were_none(data, make_model, trim):
    deaf = make_model(data, max_search_len=0).eval()
    rows = np.arange(len(data.split("test")))
    scores = []
    for search_of in (None, np.full(len(rows), -1)):
        batcher = make_batcher(data, "test", deaf, search_of=search_of)
        batcher.trim = trim
        batch = batcher.gather(rows, *with_target(batcher.samples.items, data.test_negatives))
        assert batch.search_queries.shape[1] == 0
        scores.append(deaf(batch))
    assert torch.equal(*scores)
    assert torch.isfinite(scores[0]).all()


def test_no_distance_is_measured_where_nobody_has_both_streams(data, make_model):
    distances = state_distances(make_model(data, max_search_len=0).eval(), data)
    assert distances == {"h_search": [], "h_rec": [], "a_search": [], "a_rec": []}


def test_searches_are_exchanged_among_those_who_searched(data):
    samples = data.split("test")
    searched = samples.search_end > data.search_offsets[samples.users]
    search_of = exchanged_searches(data)
    assert sorted(search_of) == list(range(len(samples)))
    for row, (has, other) in enumerate(zip(searched, search_of, strict=True)):
        assert (other != row) == has
        assert searched[other] == has
    assert 0 < searched.sum() < len(searched)


def test_only_the_searches_are_those_of_another(data, model):
    """A sample shows what the other sample's own batch shows, as it was known then."""
    search_of = exchanged_searches(data)
    search_of[5] = -1
    rows = np.arange(len(search_of))
    candidates = with_target(data.split("test").items, None)
    own, others = (
        make_batcher(data, "test", model, shown).gather(rows, *candidates)
        for shown in (None, search_of)
    )
    for field in dataclasses.fields(own):
        mine, theirs = getattr(own, field.name), getattr(others, field.name)
        if "search" not in field.name:
            assert torch.equal(mine, theirs)
            continue
        for row, other in enumerate(search_of):
            if other < 0:
                assert not theirs[row].any()
            else:
                assert torch.equal(theirs[row], mine[other]), field.name
    assert own.search_clicks.any()


def test_others_clicks_compete_in_the_catalogue_with_their_bonus(data, model):
    """They are not seen by the user who is ranked, and so stand in the list."""
    search_of = exchanged_searches(data)
    batcher = make_batcher(data, "test", model, search_of)
    rows = np.arange(len(batcher))
    targets = batcher.samples.items
    with torch.no_grad():
        before = model.head.seen_bonus.clone()
        model.head.seen_bonus.copy_(torch.tensor([3.0, 0.5]))
        everything = np.tile(np.arange(data.n_items + 1), (len(rows), 1))
        scores = model(batcher.gather(rows, everything, targets)).numpy()
        ranks = rank_targets(model_scorer(model), batcher, "catalogue")
        model.head.seen_bonus.copy_(before)
    for row, target in enumerate(targets):
        others = scores[row, list_candidates(data, "test", row, "catalogue")]
        assert abs(ranks[row] - 1 - (others >= scores[row, target]).sum()) <= 1  # rounding


def test_effects_of_searches_are_paired_differences(data, model):
    effects = search_effects(model, data)
    searched = analysis.searched(data, "test")
    ranks = {
        name: rank_targets(model_scorer(model), make_batcher(data, "test", model, of), "sampled")
        for name, of in (
            ("own", None),
            ("others", exchanged_searches(data)),
            ("none", np.full(len(searched), -1)),
        )
    }
    assert effects.keys() == {"others", "none"}
    for name, rows in effects.items():
        assert {row["protocol"] for row in rows} == {"sampled", "impressions"}
        (row,) = (
            row
            for row in rows
            if (row["protocol"], row["targets"], row["metric"]) == ("sampled", "new", "mrr")
        )
        kept = searched & ~data.split("test").repeat
        change = 1 / ranks["own"][kept] - 1 / ranks[name][kept]
        assert row["n"] == kept.sum() > 5
        assert row["mean"] == pytest.approx(change.mean())
        assert change.any()


# -- looking inside ------------------------------------------------------------------------------


def one_user(data, model, row, split="test"):
    """Batch a single sample, target as its only candidate."""
    batcher = make_batcher(data, split, model)
    ids = batcher.samples.items[[row]][:, None]
    return batcher.gather(np.array([row]), ids, np.array([0]))


def attention_over(events, weight, target) -> torch.Tensor:
    """Where the aggregation at a target looks: softmax_j( h_j^T W e )."""
    return (events @ weight @ target).softmax(0)


@torch.no_grad()
def test_state_distances(data, model):
    sums: dict[str, list[list[float]]] = {}
    for row in range(len(data.split("test"))):
        batch = one_user(data, model, row)
        n = {"search": int(batch.search_lengths), "rec": int(batch.rec_lengths)}
        if not all(n.values()):
            continue
        states, target = model.states(batch), model.item_vectors(batch.candidates[0, 0])
        for x, stream in ((SEARCH, "search"), (REC, "rec")):
            for name, pairs in (("h", states.h), ("a", states.a)):
                distances = []
                for pair in pairs:
                    events = pair[x][0, : n[stream]]
                    alpha = attention_over(events, model.head.target_weight[x], target)
                    distances.append(float((target - alpha @ events).norm()))
                sums.setdefault(f"{name}_{stream}", []).append(distances)
    got = state_distances(model, data)
    assert got.keys() == sums.keys()
    for name, distances in sums.items():
        assert got[name] == pytest.approx(np.mean(distances, 0), rel=1e-4), name
    assert (len(got["h_rec"]), len(got["a_rec"])) == (3, 2)


@torch.no_grad()
def test_relevance_share(data, model):
    shares = []
    samples = data.split("test")
    for row in range(len(samples)):
        batch = one_user(data, model, row)
        n_search, n_rec = int(batch.search_lengths), int(batch.rec_lengths)
        truth = data.search_relevant[: samples.search_end[row]][-n_search:] if n_search else []
        relevant = torch.tensor([value == 1 for value in truth])
        if not n_search or not n_rec or relevant.all() or not relevant.any():
            continue
        states, target = model.states(batch), model.item_vectors(batch.candidates[0, 0])
        events = states.h[-1][SEARCH][0, :n_search]
        alpha = attention_over(events, model.head.target_weight[SEARCH], target)
        looks = [
            cross_attention_of(model, states, k, REC, n_rec, n_search)[..., relevant].sum(-1)
            for k in range(model.config.steps)
        ]
        shares.append(
            [
                float(relevant.float().mean()),
                float(alpha[relevant].sum()),
                float(torch.stack(looks).mean()),
            ]
        )
    got = relevance_share(model, data)
    assert got.n == len(shares) > 10
    assert got[:3] == pytest.approx(np.mean(shares, 0), rel=1e-4)


def cross_attention_of(model, states, k, x, n_queries, n_keys) -> torch.Tensor:
    """Compute softmax(Q K^T / sqrt(D/H)) of stream x in step k, head by head: [H, L, L_other]."""
    d, h = model.config.dim, model.config.n_heads
    weights = model.reasoning.weights()
    weight, bias = weights.cross_qkv_weight[0, x], weights.cross_qkv_bias[0, x]
    query = states.a[k][x][0, :n_queries] @ weight[:d].T + bias[:d]
    key = states.a[k][1 - x][0, :n_keys] @ weight[d : 2 * d].T + bias[d : 2 * d]
    heads = [slice(i * d // h, (i + 1) * d // h) for i in range(h)]
    scale = (d // h) ** -0.5
    return torch.stack([(query[:, s] @ key[:, s].T * scale).softmax(-1) for s in heads])


@torch.no_grad()
def test_cross_attention_of_the_model(data, model):
    batch = next(
        batch
        for batch in (one_user(data, model, row) for row in range(len(data.split("test"))))
        if int(batch.search_lengths) > 1 and int(batch.rec_lengths) > 1
    )
    lengths = (int(batch.search_lengths), int(batch.rec_lengths))
    states = model.states(batch)
    looks = model.cross_attention(states, batch)
    assert len(looks) == 2
    for k, pair in enumerate(looks):
        for x, look in enumerate(pair):
            torch.testing.assert_close(look.sum(-1), torch.ones(look.shape[:-1]))
            expected = cross_attention_of(model, states, k, x, lengths[x], lengths[1 - x])
            torch.testing.assert_close(look[0, :, : lengths[x], : lengths[1 - x]], expected)


def test_shares_where_there_is_nothing_to_look_at(data, make_model):
    base = make_model(data, steps=0)
    share = relevance_share(base, data)
    assert math.isnan(share.cross)
    assert 0 < share.chance < 1
    assert 0 < share.target < 1
    distances = state_distances(base, data)
    assert distances["a_rec"] == distances["a_search"] == []
    unknown = {k: v for k, v in data.arrays.items() if k != "search_relevant"}
    nothing = relevance_share(base, PreparedData(unknown, {}))
    assert nothing.n == 0
    assert all(math.isnan(value) for value in nothing[:3])
