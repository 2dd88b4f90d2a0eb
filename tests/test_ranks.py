"""Metrics of ranks, their intervals, what a file of ranks holds, and paired differences."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments import depth, tables
from lcr_fast.training.ranks import (
    CUTS,
    RANKS,
    Interval,
    Ranks,
    across_seeds,
    bootstrap,
    differences,
    rank_metrics,
    samples_digest,
    spread,
)

METRICS = tuple(rank_metrics(np.ones(1)))

# -- metrics and intervals -----------------------------------------------------------------------


def test_metrics_of_ranks():
    metrics = rank_metrics(np.array([1, 0, 3, 6, 25]))  # 0 is not ranked
    assert set(metrics) == {f"{m}@{k}" for m in ("hr", "ndcg") for k in (1, 5, 10, 20)} | {"mrr"}
    assert metrics["mrr"].tolist() == [1, 1 / 3, 1 / 6, 1 / 25]
    for k, hits in {1: [1, 0, 0, 0], 5: [1, 1, 0, 0], 10: [1, 1, 1, 0], 20: [1, 1, 1, 0]}.items():
        gains = [1.0, 0.5, 1 / math.log2(7), 0.0]
        assert metrics[f"hr@{k}"].tolist() == hits
        expected = [hit * gain for hit, gain in zip(hits, gains, strict=True)]
        assert metrics[f"ndcg@{k}"] == pytest.approx(expected)


def test_bootstrap_interval():
    rng = np.random.default_rng(0)
    widths = []
    for n in (20, 200, 2000):
        values = rng.random(n)
        interval = bootstrap(values)
        assert interval == bootstrap(values)
        assert interval.n == n
        assert interval.mean == values.mean()
        assert interval.low < interval.mean < interval.high
        widths.append(interval.high - interval.low)
        normal = 2 * 1.96 * values.std() / math.sqrt(n)
        assert widths[-1] == pytest.approx(normal, rel=0.15)
    assert widths[0] > widths[1] > widths[2]
    assert bootstrap(values, level=0.5).high < interval.high


def test_bootstrap_of_next_to_nothing():
    empty = bootstrap(np.zeros(0))
    assert empty.n == 0
    assert all(math.isnan(value) for value in empty[:3])
    one = bootstrap(np.ones(1))
    assert (one.mean, one.n) == (1.0, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert bootstrap(np.ones(2)) == Interval(1.0, 1.0, 1.0, 2)


def ranks_of(samples: str, *ranks: int) -> Ranks:
    groups = {"all": np.ones(len(ranks), bool), "one": np.arange(len(ranks)) == 0}
    return Ranks(samples, groups, {"sampled": np.array(ranks)}, 9)


def test_one_user_has_no_interval_and_tables_say_so():
    """Nor have the pairs of which one is of a single user, whose spread nobody knows."""
    pairs = [(ranks_of("a", 1, 4, 9), ranks_of("a", 2, 3, 1))]
    two_seeds = [*pairs, (ranks_of("b", 2), ranks_of("b", 5))]
    for rows, alone in ((pairs[0][0].rows(), False), (differences(pairs), False),
                        (differences(two_seeds), True)):  # fmt: skip
        rows = [row for row in rows if row["metric"] == "mrr"]
        assert [math.isnan(row["low"]) for row in rows] == [alone, True]
        assert [math.isnan(row["high"]) for row in rows] == [alone, True]
        assert not any(math.isnan(row["mean"]) for row in rows)
        (table,) = tables.rank_tables(rows, 9)
        cells = [cell.strip() for cell in table.splitlines()[-1].split("|")[1:-1]]
        assert [cell.endswith(" [-]") for cell in cells[1:]] == [alone, True]
        shown = tables.strata_table({"m": {"title": "M", "rows": rows}}, "sampled", metric="mrr")
        assert (" [-]" in shown) == alone
    assert tables.with_interval({"mean": math.nan, "low": math.nan, "high": math.nan}) == ""
    less = spread(np.array([[0.5], [0.25]]))
    assert depth.shown(less).startswith("+0.3750 [-], seeds [")


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(1)
    intervals = [bootstrap((rng.random(100) < 0.3).astype(float), draws=300) for _ in range(100)]
    assert 0.88 <= np.mean([i.low <= 0.3 <= i.high for i in intervals]) <= 1.0


def test_interval_of_two_and_of_many_seeds():
    # 12.706 is the 97.5 % quantile of Student's t with one degree of freedom, 2.228 with ten.
    low_high = across_seeds([1.0, 3.0])
    assert low_high == pytest.approx((2.0, 2 - 12.706, 2 + 12.706, 2), rel=1e-4)
    values = [float(i) for i in range(11)]
    assert across_seeds(values) == pytest.approx((5.0, 5 - 2.228, 5 + 2.228, 11), rel=2e-3)


def test_one_seed_has_no_interval():
    mean, low, high, n = across_seeds([0.25])
    assert (mean, n) == (0.25, 1)
    assert math.isnan(low)
    assert math.isnan(high)


# -- files ---------------------------------------------------------------------------------------


def make_ranks(seed: int, n: int = 200, samples: str = "these", better: float = 1.0) -> Ranks:
    """Draw ranks, those of a ``better`` model lower; every seventh target has no impressions."""
    rng = np.random.default_rng(seed)
    sampled = 1 + (rng.random(n) ** better * 100).astype(np.int64)
    shown = np.where(np.arange(n) % 7, 1 + rng.integers(0, 20, n), 0)
    new = np.arange(n) % 3 == 0
    groups = {"all": np.ones(n, bool), "repeat": ~new, "new": new, "covered": np.zeros(n, bool)}
    return Ranks(samples, groups, {"sampled": sampled, "impressions": shown})


def test_ranks_are_read_as_they_were_written(tmp_path):
    ranks = make_ranks(0)
    ranks.save(tmp_path / RANKS)
    read = Ranks.load(tmp_path / RANKS)
    assert read.samples == ranks.samples
    for mine, theirs in ((read.groups, ranks.groups), (read.by_protocol, ranks.by_protocol)):
        assert list(mine) == list(theirs)  # in their order
        for name, array in mine.items():
            assert array.dtype == theirs[name].dtype
            assert np.array_equal(array, theirs[name])
    assert [path.name for path in tmp_path.iterdir()] == [RANKS]


def test_rows_measure_every_group(tmp_path):
    ranks = make_ranks(0)
    rows = ranks.rows()
    assert len(rows) == 2 * 4 * len(METRICS) == 2 * 4 * (2 * len(CUTS) + 1)
    for row in rows:
        of_group = ranks.by_protocol[row["protocol"]][ranks.groups[row["targets"]]]
        values = rank_metrics(of_group)[row["metric"]]
        found = Interval(*(row[key] for key in Interval._fields))
        assert found == pytest.approx(bootstrap(values), nan_ok=True)


def test_other_files_are_refused(tmp_path, make_model, prepared):
    path = tmp_path / RANKS
    with pytest.raises(ValueError, match="no such file; expected a ranks file"):
        Ranks.load(path)
    make_ranks(0).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        Ranks.load(path)
    make_model(prepared).save(path)
    with pytest.raises(ValueError, match="not a ranks file"):
        Ranks.load(path)


@pytest.mark.parametrize(
    "name", ["items", "times", "negatives", "users", "impressions", "impression_offsets"]
)
def test_a_digest_names_the_samples_and_their_candidates(prepared, name):
    arrays = dict(prepared.arrays)
    before = samples_digest(prepared, "test")
    assert before == samples_digest(PreparedData(arrays, {}), "test")
    assert before != samples_digest(prepared, "valid")
    arrays[f"test_{name}"] = np.flip(arrays.get(f"test_{name}", np.arange(5)))
    assert before != samples_digest(PreparedData(arrays, {}), "test")


# -- differences ---------------------------------------------------------------------------------


def by_key(rows):
    return {(row["protocol"], row["targets"], row["metric"]): row for row in rows}


def test_a_difference_is_paired_user_by_user():
    first, second = make_ranks(0, better=1.5), make_ranks(1)
    rows = by_key(differences([(first, second)]))
    assert len(rows) == 2 * 4 * len(METRICS)
    for (protocol, group, metric), row in rows.items():
        mine, theirs = (
            rank_metrics(ranks.by_protocol[protocol][ranks.groups[group]])[metric]
            for ranks in (first, second)
        )
        found = Interval(*(row[key] for key in Interval._fields))
        assert found == pytest.approx(bootstrap(mine - theirs), nan_ok=True)
        assert row["seeds"] == (row["n"] > 0)
        assert math.isnan(row["seeds_low"])
    better = rows["sampled", "all", "mrr"]
    assert 0 < better["low"] < better["mean"] < better["high"]


def test_a_paired_interval_is_narrower_than_the_marginal_ones():
    """One place lost by some users, where users differ by much: the difference is sure."""
    second = make_ranks(0)
    worse = second.by_protocol["sampled"] + (np.arange(200) % 5 == 0)
    first = Ranks(second.samples, second.groups, {"sampled": worse})
    row = by_key(differences([(first, second)]))["sampled", "all", "mrr"]
    assert row["high"] < 0
    lone = by_key(second.rows())["sampled", "all", "mrr"]
    assert row["high"] - row["low"] < 0.5 * (lone["high"] - lone["low"])


def test_seeds_of_the_same_samples_are_averaged_user_by_user():
    pairs = [(make_ranks(seed, better=1.5), make_ranks(10 + seed)) for seed in range(3)]
    values = [
        rank_metrics(a.by_protocol["sampled"])["ndcg@5"]
        - rank_metrics(b.by_protocol["sampled"])["ndcg@5"]
        for a, b in pairs
    ]
    row = by_key(differences(pairs))["sampled", "all", "ndcg@5"]
    users, seeds = bootstrap(np.mean(values, 0)), across_seeds([v.mean() for v in values])
    assert [row[key] for key in Interval._fields] == pytest.approx(users)
    assert [row["seeds_low"], row["seeds_high"], row["seeds"]] == pytest.approx(seeds[1:])


def test_seeds_of_other_samples_are_resampled_on_their_own():
    """Four times the same numbers, but as those of other users: half as wide an interval."""
    key = "sampled", "all", "mrr"
    one, four = (
        by_key(
            differences(
                [(make_ranks(0, samples=f"{i}"), make_ranks(1, samples=f"{i}")) for i in ids]
            )
        )[key]
        for ids in (range(1), range(4))
    )
    assert (four["n"], one["n"]) == (800, 200)
    assert four["mean"] == pytest.approx(one["mean"])
    assert 0.4 < (four["high"] - four["low"]) / (one["high"] - one["low"]) < 0.6


def test_a_seed_without_users_of_a_kind_has_no_say_in_it():
    pairs = [(make_ranks(0, samples=s), make_ranks(1, samples=s)) for s in ("here", "there")]
    none = np.zeros(200, dtype=bool)
    pairs[1] = tuple(replace(ranks, groups={**ranks.groups, "all": none}) for ranks in pairs[1])
    key = "sampled", "all", "mrr"
    both, one = (by_key(differences(some))[key] for some in (pairs, pairs[:1]))
    assert one["n"] == 200
    assert both == pytest.approx(one, nan_ok=True)


def test_other_samples_are_not_compared():
    with pytest.raises(ValueError, match="not of the same samples"):
        differences([(make_ranks(0), make_ranks(0, samples="those"))])
