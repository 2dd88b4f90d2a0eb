"""Studies of depth: what they train, how strata and controls are made, that tables add up."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import WORLD

from command_line import read_csv, run
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments import depth, latency, strata
from lcr_fast.experiments.comparison import Job
from lcr_fast.model import LCRSER
from lcr_fast.training import adaptive
from lcr_fast.training.diversity import tail_items
from lcr_fast.training.models import load_model
from lcr_fast.training.ranks import (
    Ranks,
    across_seeds,
    bootstrap,
    samples_digest,
    weighted_metric,
)
from lcr_fast.training.trainer import Trainer

pytestmark = pytest.mark.full

TINY = [
    *("--epochs", "1", "--dim", "8", "--steps", "2", "--mlp-hidden", "8", "--seeds", "2"),
    *("--max-search-len", "4", "--max-rec-len", "5", "--deep-supervision", "0.5"),
]


@pytest.fixture(scope="module")
def study(prepared_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("depth") / "run"
    with pytest.MonkeyPatch.context() as patch:
        times = latency.forward_times
        patch.setattr(latency, "forward_times", lambda *a: times(*a, users=(1, 3), turns=1))
        text = run("study", "latency", "--data", prepared_folder, "--out", out, *TINY)
    (out.parent / "text").write_text(text)
    return out


def gains(study, name, seeds=(0, 1)) -> np.ndarray:
    """Gains of the test users by seed: [seeds, n]."""
    ranks = [Ranks.load(study / f"seed-{seed}" / name / "ranks.safetensors") for seed in seeds]
    return np.stack([weighted_metric(r.by_protocol["sampled"], "ndcg@5") for r in ranks])


def test_the_latency_study_compares_all_depths(study, prepared_folder):
    assert (study / "results.md").read_text() in (study.parent / "text").read_text()
    rows = {row["model"]: row for row in read_csv(study / "results.csv")}
    assert list(rows) == [
        "base", "long", "k1", "k2", "deep0", "deep1", "deep2", "adaptive", "distilled"
    ]  # fmt: skip
    base = gains(study, "base")
    for name in ("base", "long", "k1", "k2"):
        mine = gains(study, name)
        assert float(rows[name]["ndcg@5"]) == pytest.approx(mine.mean())
        less = mine - base
        found = {key: float(value) for key, value in rows[name].items() if key != "model"}
        assert found["less_base"] == pytest.approx(less.mean(), abs=1e-12)
        users, seeds = bootstrap(less.mean(0)), across_seeds(less.mean(1))
        ends = [found[f"less_base_{end}"] for end in ("low", "high", "seeds_low", "seeds_high")]
        assert ends == pytest.approx([users.low, users.high, seeds.low, seeds.high], abs=1e-12)
    assert float(rows["deep2"]["ndcg@5"]) == pytest.approx(gains(study, "deep").mean())
    data = PreparedData.open(prepared_folder)
    folder = study / "seed-0"
    student = load_model(folder / "distilled" / "model.safetensors", data, "cpu")
    assert student.config.steps == 0
    assert LCRSER.load(folder / "k1" / "model.safetensors").config.steps == 1
    deep = load_model(folder / "deep" / "model.safetensors", data, "cpu")
    first = adaptive.read_depths(deep, data, "test").gains("ndcg@5")
    deep = load_model(study / "seed-1" / "deep" / "model.safetensors", data, "cpu")
    second = adaptive.read_depths(deep, data, "test").gains("ndcg@5")
    depths = (first.mean(0) + second.mean(0)) / 2
    assert [float(rows[f"deep{k}"]["ndcg@5"]) for k in range(3)] == pytest.approx(list(depths))
    times = {(row["model"], row["users"]) for row in read_csv(study / "latency.csv")}
    assert times == {
        (name, n) for name in ("base", "k1", "k2", "distilled", "adaptive") for n in "13"
    }
    for name in ("pareto", "rules"):
        assert min(matplotlib.image.imread(study / f"{name}.png").shape[:2]) > 200


def test_base_trains_twice_as_long_where_updates_say_how_long(prepared, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        Job, "cell", lambda _, name, *of, train, **more: asked.update({name: train})
    )
    job = Job(prepared, LCRConfig(steps=1), TrainConfig(epochs=3, min_updates=50), tmp_path)
    with pytest.raises(ValueError, match="no such file"):  # no model was trained
        depth.train_models(job, 0)
    assert (asked["long"]["epochs"], asked["long"]["min_updates"]) == (6, 100)


def test_rules_are_set_against_chance_and_the_oracle(study):
    rows = read_csv(study / "rules.csv")
    assert {row["rule"] for row in rows} <= {*adaptive.TITLES, "oracle"}
    assert rows[0]["rule"] == "fixed"
    for row in rows:
        if row["rule"] == "fixed":  # where all take as many steps, chance changes nothing
            assert float(row["less_random"]) == pytest.approx(0, abs=1e-12)
    assert max(float(row["less_best_fixed"]) for row in rows) == float(rows[-1]["less_best_fixed"])


def test_curves_of_seeds_are_their_mean(study, prepared_folder):
    """At the ends of a rule's curve all users take the same steps, whatever the seed."""
    data = PreparedData.open(prepared_folder)
    seeds = []
    for seed in (0, 1):
        model = load_model(study / f"seed-{seed}" / "deep" / "model.safetensors", data, "cpu")
        valid, test = (adaptive.read_depths(model, data, split) for split in ("valid", "test"))
        seeds.append(depth.SeedModels({}, valid, test, {}))
    curves = latency._curves(seeds)
    fixed = np.mean([seed.test.gains("ndcg@5").mean(0) for seed in seeds], 0)
    for rule, first in (("change", 1), ("confidence", 0), ("entropy", 0)):
        curve = curves[adaptive.TITLES[rule]]
        assert curve[0] == pytest.approx((first, fixed[first]))
        assert curve[-1] == pytest.approx((2, fixed[2]))
    alone = dict(latency._curves(seeds[:1])[adaptive.TITLES["change"]])
    assert alone[2.0] == pytest.approx(seeds[0].test.gains("ndcg@5").mean(0)[2])


def test_strata_reads_back_what_latency_trained(study, prepared_folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", None)
        options = ["--data", prepared_folder, "--out", study, "--resume", *TINY]
        text = run("study", "strata", *options)
    assert text.count("already evaluated") == 2 * 5
    rows = read_csv(study / "strata.csv")
    base = gains(study, "base")
    (everybody,) = (r for r in rows if (r["stratum"], r["model"]) == ("all: all", "lcr"))
    assert float(everybody["base"]) == pytest.approx(base.mean())
    assert int(everybody["n"]) == base.shape[1]
    assert everybody["less_base_seeds_low"] != "nan"
    assert min(matplotlib.image.imread(study / "strata.png").shape[:2]) > 200


def test_strata_part_the_users(prepared, make_model):
    model = make_model(prepared).eval()
    found = strata.user_strata(model, prepared)
    samples = prepared.split("test")
    n_searches = samples.search_end - prepared.search_offsets[samples.users]
    kinds: dict = {}
    for name, member in found.items():
        kind, stratum = name.split(": ")
        kinds.setdefault(kind, {})[stratum] = member
    assert {"similarity", "text similarity", "searches", "noise", "target"} <= set(kinds)
    known = np.stack(list(kinds["noise"].values())).sum(0)
    assert known.max() == 1
    parts = np.stack(list(kinds["searches"].values()))
    assert (parts.sum(0) == 1).all()
    assert all(
        (n_searches[member] == 0).all() for name, member in kinds["searches"].items() if name == "0"
    )
    assert (kinds["target"]["new"] == ~np.array(samples.repeat)).all()
    tails = tail_items(prepared)[samples.items]
    assert (kinds["target"].get("tail item", np.zeros(len(tails), bool)) == tails).all()
    # Similarity is that of sums of vectors, user by user.
    queries, items = np.array(prepared.query_text), np.array(prepared.item_text)
    similarity = {}
    for i, user in enumerate(samples.users):
        begin, end = prepared.search_offsets[user], samples.search_end[i]
        asked = prepared.search_queries[max(begin, end - 4) : end]
        begin, end = prepared.rec_offsets[user], samples.rec_end[i]
        seen = prepared.rec_items[max(begin, end - 5) : end]
        if len(asked) and len(seen):
            a, b = queries[asked].sum(0), items[seen].sum(0)
            similarity[i] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    thirds = [kinds["text similarity"][name] for name in ("low", "middle", "high")]
    low, middle, high = ([similarity[i] for i in np.flatnonzero(member)] for member in thirds)
    assert len(low) + len(middle) + len(high) == len(similarity)
    assert max(low) < min(middle)
    assert max(middle) < min(high)
    # Noise is the planted share among the searches that are read.
    truth = np.array(prepared.search_relevant)
    for i in np.flatnonzero(kinds["noise"]["to 100%"]):
        begin, end = prepared.search_offsets[samples.users[i]], samples.search_end[i]
        assert (truth[max(begin, end - 4) : end] == 0).mean() > 2 / 3


def finished_run(study, folder: Path) -> Path:
    for name, cell in (("base", "base"), ("lcr", "k1")):
        shutil.copytree(study / "seed-0" / cell, folder / name)
    return folder


def test_strata_of_finished_runs_count_a_user_once(study, prepared_folder, tmp_path):
    """Twice the same run is no evidence: the interval stays as wide as that of one."""
    runs = [finished_run(study, tmp_path / name) for name in ("one", "again")]
    rows = []
    for some in (runs, runs[:1]):
        out = tmp_path / f"out-{len(some)}"
        text = run("study", "strata", "--runs", *some, "--data", prepared_folder, "--out", out)
        assert (out / "results.md").read_text() in text
        rows.append(read_csv(out / "strata.csv")[0])
    less = gains(study, "k1", (0,)) - gains(study, "base", (0,))
    assert [int(row["n"]) for row in rows] == [less.size] * 2
    for field in ("less_base", "less_base_low", "less_base_high"):
        assert float(rows[0][field]) == pytest.approx(float(rows[1][field]))
    assert float(rows[0]["less_base"]) == pytest.approx(less.mean())
    shutil.rmtree(runs[0] / "lcr")
    with pytest.raises(SystemExit):
        run("study", "strata", "--runs", runs[0], "--data", prepared_folder)


def test_strata_of_finished_runs_pool_users_of_different_data(study, prepared, tmp_path):
    runs = [finished_run(study, tmp_path / name) for name in ("one", "other")]
    for seed, folder in enumerate(runs):
        data = prepare(synthetic.generate(WORLD), folder / "data", seed=seed)  # other negatives
        for name in ("base", "lcr"):
            ranks = Ranks.load(folder / name / "ranks.safetensors")
            replace(ranks, samples=samples_digest(data, "test")).save(
                folder / name / "ranks.safetensors"
            )
    out = tmp_path / "out"
    run("study", "strata", "--runs", *runs, "--out", out, "--any-data")
    row = read_csv(out / "strata.csv")[0]
    less = gains(study, "k1", (0,)) - gains(study, "base", (0,))
    assert int(row["n"]) == 2 * less.size
    assert row["less_base_seeds_low"] == "nan"  # other data is no other seed
    assert float(row["less_base"]) == pytest.approx(less.mean())
    assert "seeds" not in (out / "results.md").read_text()


@pytest.mark.full
def test_other_worlds_are_trained_apart(prepared_folder, study, monkeypatch):
    from lcr_fast.data import synthetic

    small = synthetic.World
    monkeypatch.setattr(synthetic, "World", lambda **c: small(n_users=24, n_targets=14, **c))
    options = ["--data", prepared_folder, "--out", study, "--resume", *TINY]
    text = run("study", "strata", *options, "--noise", "0", "--disjoint")
    assert [row["world"] for row in read_csv(study / "worlds.csv")] == [
        "noise 0",
        "disjoint",
    ]
    assert "### Other worlds" in text
    world = study / "worlds" / "disjoint"
    for cell in (study / "seed-0" / "k2", world / "seed-0" / "lcr"):  # the same LCR
        of = json.loads((cell / "evaluation.json").read_text())["of"]
        assert of["train"]["deep_supervision"] == 0
    less = gains(world, "lcr") - gains(world, "base")
    row = read_csv(study / "worlds.csv")[1]
    assert float(row["less_base"]) == pytest.approx(less.mean(), abs=1e-12)
    seeds = across_seeds(less.mean(1))
    assert float(row["less_base_seeds_high"]) == pytest.approx(seeds.high, abs=1e-12)
