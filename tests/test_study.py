"""Studies: their statistics, what the command line writes, resume, and every bad input."""

import dataclasses
import json
import math
import re

import matplotlib.image
import numpy as np
import pytest
import torch

from command_line import fails, read_csv, run
from lcr_fast.cli import study as study_command
from lcr_fast.config import TrainConfig
from lcr_fast.experiments import grid
from lcr_fast.experiments import paper as paper_study
from lcr_fast.experiments.comparison import VARIANTS, Job
from lcr_fast.experiments.rl import AXES, parse_axis
from lcr_fast.experiments.timing import median
from lcr_fast.model import LCRSER
from lcr_fast.storage import load_tensors
from lcr_fast.training import evaluation
from lcr_fast.training.baselines import TITLES
from lcr_fast.training.diversity import list_diversity, tail_items
from lcr_fast.training.ranks import Ranks, across_seeds, bootstrap, weighted_metric
from lcr_fast.training.trainer import CHECKPOINT, PHASE_2, Trainer

TINY = [
    *("--epochs", "1", "--rl-epochs", "1", "--rl-epoch-size", "16", "--rl-negatives", "9"),
    *("--dim", "8", "--steps", "1", "--mlp-hidden", "8", "--n-trajectories", "2"),
    *("--max-search-len", "4", "--max-rec-len", "5", "--no-user-embedding"),
    *("--rl-learning-rate", "0.01"),
]
RL = ["--rewards", "mrr", "--axes", "kl_weight=0", "n_trajectories=3"]
RL_CELLS = {
    "tcl", "rl", "control", "rl,reward=mrr", "rl,kl_weight=0.0", "rl,n_trajectories=3",
    "control,n_trajectories=3",
}  # fmt: skip
PAPER_CELLS = {*VARIANTS, "rl,steps=0", "control,steps=0"}


def rl_study(data, out, *options, seeds=2) -> str:
    return run("study", "rl", "--data", data, "--out", out, "--seeds", seeds, *TINY, *options)


def cells_of(folder) -> dict[tuple[int, str], dict[str, float]]:
    """Numbers by (seed, cell) and metric."""
    cells: dict = {}
    for row in read_csv(folder / "cells.csv"):
        key = int(row["seed"]), row["cell"]
        cells.setdefault(key, {})[row["metric"]] = float(row["value"])
    return cells


@pytest.fixture(scope="module")
def rl(prepared_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("rl") / "run"
    (out.parent / "text").write_text(rl_study(prepared_folder, out, *RL))
    return out


@pytest.fixture(scope="module")
def paper(prepared_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("paper") / "run"
    options = ["--data", prepared_folder, "--out", out, "--seeds", 1, "--all-steps", 0, 1]
    with pytest.MonkeyPatch.context() as patch:
        times = paper_study.forward_latency
        patch.setattr(paper_study, "forward_latency", lambda *a: times(*a, (1, 3), 20))
        (out.parent / "text").write_text(run("study", "paper", *options, *TINY))
    return out


# -- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl_weight", ("kl_weight", AXES["kl_weight"])),
        ("kl_weight=0,1e-1", ("kl_weight", (0.0, 0.1))),
        ("n_trajectories=2, 4", ("n_trajectories", (2, 4))),
        ("action=top1,sampled", ("action", ("top1", "sampled"))),
        ("scale_advantages=True,false", ("scale_advantages", (True, False))),
    ],
)
def test_axes_are_read(text, expected):
    assert parse_axis(text) == expected


def test_phase_2_fields_are_fields_of_the_config():
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    assert names.issuperset(PHASE_2)
    assert set(PHASE_2).issuperset(AXES)
    told = {f.name for f in dataclasses.fields(TrainConfig) if "phase 2:" in f.metadata["help"]}
    assert told == set(PHASE_2)


@pytest.mark.parametrize("all_items", [False, True])
def test_diversity_counts_lists_one_by_one(prepared, make_model, monkeypatch, all_items):
    model = make_model(prepared).eval()
    k = prepared.n_items if all_items else 3  # more than a user has not seen, or fewer
    found = list_diversity(model, prepared, k=k)
    samples = prepared.split("test")
    batcher = evaluation.make_batcher(prepared, "test", model)
    entropies, lists = [], []
    for row in range(len(samples)):
        rows = np.array([row])
        candidates = evaluation.with_target(samples.items[rows], samples.negatives[rows])
        batch = batcher.gather(rows, *candidates)
        p = model(batch)[0].softmax(-1).tolist()
        entropies.append(-sum(x * math.log(x) for x in p))
        seen = evaluation.padded_seen(prepared, samples.users[rows], samples.times[rows])
        batch = batcher.gather(rows, np.zeros((1, 0), dtype=int), np.array([-1]))
        items, _ = model.recommend(batch, k, exclude=torch.from_numpy(seen))
        lists += [item for item in items[0].tolist() if item]
    assert found.entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert found.coverage == len(set(lists)) / prepared.n_items
    tail = tail_items(prepared)
    assert found.tail == pytest.approx(tail[lists].mean())
    assert 0 < found.tail < 1
    assert found.n == len(samples)
    # A large catalogue: lists for a part of the users only.
    monkeypatch.setattr("lcr_fast.training.diversity._LIST_PAIRS", 5 * prepared.n_items)
    part = list_diversity(model, prepared, k=k)
    assert part.n == 5
    assert part.entropy == found.entropy


def test_the_tail_is_the_least_popular_four_fifths(prepared):
    tail, counts = tail_items(prepared), np.array(prepared.item_count)
    assert not tail[0]
    assert tail.sum() == round(0.8 * prepared.n_items)
    assert counts[1:][tail[1:]].max() <= counts[1:][~tail[1:]].min()


# -- study rl ------------------------------------------------------------------------------------


def test_every_cell_is_trained_once_a_seed(rl):
    cells = cells_of(rl)
    assert set(cells) == {(seed, name) for seed in (0, 1) for name in RL_CELLS}
    for seed in (0, 1):
        folders = {path.name for path in (rl / f"seed-{seed}").iterdir()}
        assert folders == RL_CELLS


def test_results_are_statistics_of_the_cells(rl):
    cells, n = cells_of(rl), 0
    names = {
        "reward": {"hr@1": "", "mrr": ",reward=mrr"},
        "kl_weight": {"0.0": ",kl_weight=0.0", "0.1": ""},
        "n_trajectories": {"2": "", "3": ",n_trajectories=3"},
    }
    for row in read_csv(rl / "results.csv"):
        change = names[row["axis"]][row["value"]]
        of_control = change if row["axis"] == "n_trajectories" else ""
        cell = {"rl": f"rl{change}", "control": f"control{of_control}", "no_rl": "tcl"}
        first, _, second = row["series"].partition("-")
        values = [cells[seed, cell[first]][row["metric"]] for seed in (0, 1)]
        if second:
            other = [cells[seed, cell[second]][row["metric"]] for seed in (0, 1)]
            values = [a - b for a, b in zip(values, other, strict=True)]
        expected = across_seeds(values)
        found = [float(row[key]) for key in ("mean", "low", "high")]
        assert found == pytest.approx(list(expected[:3]), nan_ok=True)
        assert row["n"] == "2"
        n += 1
    assert n == 6 * 5 * len(cells[0, "rl"])


def test_the_last_weights_are_those_of_the_checkpoint(rl, prepared):
    folder = rl / "seed-1" / "rl,n_trajectories=3"
    tensors, info = load_tensors(folder / CHECKPOINT, "checkpoint")
    model = LCRSER.load(folder / "model.safetensors")
    model.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    )
    model.set_text(prepared.arrays["item_text"], prepared.arrays["query_text"])
    rows = evaluation.rank_model(model, prepared, protocols=("sampled",)).rows()
    score = next(r["mean"] for r in rows if (r["targets"], r["metric"]) == ("all", "ndcg@5"))
    cell = cells_of(rl)[1, "rl,n_trajectories=3"]
    assert cell["last_ndcg@5"] == pytest.approx(score)
    history = info["progress"]["history"]
    assert cell["kept"] == (history[1]["valid_ndcg@5"] > history[0]["valid_ndcg@5"])


def test_tables_and_plots_of_phase_2(rl):
    text = (rl / "results.md").read_text()
    assert text in (rl.parent / "text").read_text()
    assert "mean [95 % t-interval] over 2 seeds" in text
    titles = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    assert titles == ["reward", "kl_weight", "n_trajectories"]
    first = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert first == [
        "reward", "no RL", "control", "hr@1", "mrr",
        "kl_weight", "no RL", "control", "0.0", "0.1",
        "n_trajectories", "no RL", "2", "3",
    ]  # fmt: skip
    for name in titles:
        assert_drawn(rl / f"{name}.png")


def assert_drawn(path):
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels[::2, ::2] @ [1, 10, 100, 0])) > 20


def test_a_finished_study_is_read_back_and_grows(rl, prepared_folder, monkeypatch, tmp_path):
    before = {p: (rl / p).read_bytes() for p in ("cells.csv", "results.csv", "results.md")}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", None)
        text = rl_study(prepared_folder, rl, *RL, "--resume")
    assert text.count("already evaluated") == 2 * len(RL_CELLS)
    assert all((rl / p).read_bytes() == content for p, content in before.items())
    options = ["--rewards", "hr@1", "--axes", "clip=0.1"]
    text = rl_study(prepared_folder, rl, *options, "--resume", seeds=1)
    assert text.count("already evaluated") == 3
    assert {name for _, name in cells_of(rl)} == {"tcl", "rl", "control", "rl,clip=0.1"}
    for p, content in before.items():
        (rl / p).write_bytes(content)


def test_a_stopped_study_resumes_to_the_same_numbers(rl, prepared_folder, monkeypatch, tmp_path):
    original = Trainer._update

    def stop(self, loss):
        if "n_trajectories" in str(self.out):
            raise KeyboardInterrupt
        original(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", stop)
        with pytest.raises(SystemExit) as end:
            rl_study(prepared_folder, tmp_path / "run", *RL, seeds=1)
    assert end.value.code == 130
    rl_study(prepared_folder, tmp_path / "run", *RL, "--resume", seeds=1)
    whole, resumed = cells_of(rl), cells_of(tmp_path / "run")
    assert set(resumed) == {(0, name) for name in RL_CELLS}
    for key, numbers in resumed.items():
        expected = pytest.approx({**whole[key], "seconds": 0}, rel=0, abs=0, nan_ok=True)
        assert {**numbers, "seconds": 0} == expected, key


# -- study paper ---------------------------------------------------------------------------------


def test_the_paper_study_writes_its_tables(paper):
    text = (paper / "results.md").read_text()
    assert text in (paper.parent / "text").read_text()
    assert "one seed, so no interval" in text
    assert text.count("### ") == 5
    assert all(f"\n| {title} " in text for title in TITLES.values())
    (own,) = re.findall(r"^\| LCR, none +\| (\S+) ", text, re.MULTILINE)
    result = json.loads((paper / "seed-0" / "lcr" / "evaluation.json").read_text())
    (row,) = (
        row
        for row in result["searches"]["none"]
        if (row["protocol"], row["targets"], row["metric"]) == ("sampled", "all", "ndcg@5")
    )
    assert own == f"{row['mean']:+.3f}"
    for name in ("steps", "target_distance", "latency"):
        assert_drawn(paper / f"{name}.png")
    assert {name for _, name in cells_of(paper)} == PAPER_CELLS


@pytest.mark.full
def test_the_paper_study_where_nobody_has_both_streams(prepared_folder, tmp_path, monkeypatch):
    times = paper_study.forward_latency
    monkeypatch.setattr(paper_study, "forward_latency", lambda *a: times(*a, (1,), 2))
    options = ["--data", prepared_folder, "--out", tmp_path / "run", "--seeds", 1, *TINY]
    run("study", "paper", *options, "--all-steps", 1, "--max-search-len", 0)
    assert (tmp_path / "run" / "results.md").is_file()
    assert not (tmp_path / "run" / "distances.csv").exists()


def test_the_paper_study_adds_up(paper):
    cells = cells_of(paper)
    for row in read_csv(paper / "results.csv"):
        name = row["variant"]
        if row["table"] == "steps" and row["steps"] == "0":
            name = {"tcl": "base"}.get(name, f"{name},steps=0")
        value = cells[0, name][row["metric"]]
        assert float(row["mean"]) == pytest.approx(value, nan_ok=True)
        assert row["low"] == "nan"
    assert json.loads((paper / "seed-0" / "base" / "evaluation.json").read_text())["distances"]
    assert LCRSER.load(paper / "seed-0" / "rl,steps=0" / "model.safetensors").config.steps == 0


def test_distances_and_latency_are_listed(paper):
    distances = read_csv(paper / "distances.csv")
    steps: dict = {}
    for row in distances:
        steps.setdefault((row["variant"], row["state"]), []).append(int(row["step"]))
    assert steps["base", "h_rec"] == [0]
    assert steps["rl", "h_search"] == [0, 1]
    assert steps["rl", "a_search"] == [1]
    latency = read_csv(paper / "latency.csv")
    assert [(row["users"], row["steps"]) for row in latency] == [
        ("1", "0"),
        ("1", "1"),
        ("3", "0"),
        ("3", "1"),
    ]
    for row in latency:
        assert 0 < float(row["low"]) <= float(row["ms"]) <= float(row["high"])
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
        assert (float(row["ratio_high"]) == float(row["ratio_low"])) == (row["steps"] == "0")
        assert int(row["rounds"]) == 20


def test_the_interval_of_a_median_holds_it():
    """For any law, in some 95 of 100 cases."""
    rng = np.random.default_rng(0)
    found = [median(rng.lognormal(0, 2, 100)) for _ in range(300)]
    assert 0.9 <= np.mean([low <= 1 <= high for _, low, high, _ in found]) <= 0.99


# -- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rl", "paper"])
def test_a_quick_study_makes_its_own_data(tmp_path, monkeypatch, kind):
    asked = []

    def record(job, n_seeds, *rest):
        asked.append((job, n_seeds, rest))
        return "tables"

    monkeypatch.setattr(f"lcr_fast.experiments.{kind}.run_{kind}_study", record)
    monkeypatch.setattr(study_command, "QUICK_USERS", 24)
    monkeypatch.chdir(tmp_path)
    assert "tables" in run("study", kind, "--quick", "--epochs", "2", "--seed", "4")
    ((job, n_seeds, rest),) = asked
    assert isinstance(job, Job)
    assert job.data.n_users == 24
    assert job.out.resolve() == tmp_path / "runs" / f"study-{kind}-synthetic-1"
    assert (n_seeds, job.train.epochs, job.train.rl_epochs, job.train.seed) == (1, 2, 1, 4)
    assert job.model.n_items == job.data.n_items
    names = [name for name, _ in rest[1]] if kind == "rl" else list(AXES)
    assert names == list(AXES)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("rl", ["--rewards", "auc"], "reward must be hr@k, ndcg@k, mrr or a sum"),
        ("rl", ["--axes", "dim=3"], "an axis must be one of reward, action"),
        ("rl", ["--axes", "clip"], "axis clip has no usual values: write clip=V,V,..."),
        ("rl", ["--axes", "n_trajectories=2,x"], "axis n_trajectories: '2,x' is no list of int"),
        ("rl", ["--axes", "scale_advantages=2"], "axis scale_advantages: '2' is no list of bool"),
        ("rl", ["--axes", "kl_weight=0,-1"], "kl_weight must be at least 0, got -1.0"),
        ("rl", ["--axes", "action=best"], "action must be one of top1, sampled, target"),
        ("rl", ["--rewards", "--axes"], "nothing to study"),
        ("rl", ["--seeds", "0"], "--seeds must be at least 1, got 0"),
        ("paper", ["--all-steps", "-1"], "steps must be at least 0, got -1"),
        ("paper", ["--seeds", "-1"], "--seeds must be at least 1, got -1"),
        ("paper", ["--precision", "float16"], "float16"),
    ],
)
def test_a_study_refuses(capsys, tmp_path, kind, options, message):
    line = fails(capsys, "study", kind, "--out", tmp_path / "out", *options)
    assert message in line
    assert line.startswith("lcr-fast study")
    assert not (tmp_path / "out").exists()


def test_a_study_is_not_resumed_with_another_config(rl, prepared_folder, capsys):
    with pytest.raises(SystemExit):
        rl_study(prepared_folder, rl, *RL, "--resume", "--clip", "0.5")
    assert "the config differs in clip" in capsys.readouterr().err


# -- study grid ----------------------------------------------------------------------------------


def test_the_grid_marks_what_is_level_with_its_best_place(prepared_folder, tmp_path, monkeypatch):
    small = {
        "tcl-l2": grid.MAPS["tcl-l2"]._replace(
            rows=("tcl_margin", (0.1, 0.5)), columns=("tcl_weight", (1.0,))
        ),
        "kl-noise": grid.MAPS["kl-noise"]._replace(
            rows=("kl_weight", (0.1,)), columns=("noise_scale", (0.1, 1.0))
        ),
    }
    monkeypatch.setattr(grid, "MAPS", small)
    out = tmp_path / "run"
    options = ["--data", prepared_folder, "--out", out, "--seeds", 2, "--maps", *small]
    text = run("study", "grid", *options, *TINY)
    assert (out / "results.md").read_text() in text
    assert_drawn(out / "maps.png")
    rows = read_csv(out / "results.csv")
    assert [(r["map"], r["row"], r["column"]) for r in rows] == [
        ("tcl-l2", "0.1", "1.0"),
        ("tcl-l2", "0.5", "1.0"),
        ("kl-noise", "0.1", "0.1"),
        ("kl-noise", "0.1", "1.0"),
    ]
    gains = {}
    for row in rows:
        name = (
            f"tcl,tcl_margin={row['row']},tcl_weight=1.0,tcl_distance=l2"
            if row["map"] == "tcl-l2"
            else f"rl,kl_weight=0.1,noise_scale={row['column']}"
        )
        mine = []
        for seed in (0, 1):
            folder = out / f"seed-{seed}" / name
            ranks = Ranks.load(folder / "ranks.safetensors").by_protocol["sampled"]
            if row["map"] == "kl-noise":
                last = json.loads((folder / "evaluation.json").read_text())["last"]
                ranks = np.array(last["test_ranks"])
            mine.append(weighted_metric(ranks, "ndcg@5"))
        gains[row["map"], row["row"], row["column"]] = np.stack(mine)
        assert float(row["mean"]) == pytest.approx(np.mean(mine))
        seeds = [float(value) for value in row["seeds"].split()]
        assert seeds == pytest.approx([m.mean() for m in mine], abs=1e-6)
    for row in rows:
        best = max((g for key, g in gains.items() if key[0] == row["map"]), key=lambda g: g.mean())
        less = gains[row["map"], row["row"], row["column"]] - best
        spread, seeds = bootstrap(less.mean(0)), across_seeds(less.mean(1))
        assert (float(row["low"]), float(row["high"])) == pytest.approx(spread[1:3])
        ends = float(row["seeds_low"]), float(row["seeds_high"])
        assert ends == pytest.approx((seeds.low, seeds.high), abs=1e-12)
        assert (row["level"] == "True") == (spread.high >= 0)
