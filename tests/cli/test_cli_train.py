"""``lcr-fast train``: what a whole job writes, where, and every bad input."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor

import matplotlib.image
import numpy as np
import pytest
import torch

from command_line import TINY, WORLD, fails, is_untouched, read_csv, run
from lcr_fast import cli
from lcr_fast.cli.jobs import mention_capture, merged_configs
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import synthetic
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments.comparison import VARIANTS, with_requirements
from lcr_fast.model import LCRSER
from lcr_fast.ops import _triton
from lcr_fast.storage import claimed, load_json, load_tensors, next_folder
from lcr_fast.training.baselines import TITLES
from lcr_fast.training.objective import Supervised
from lcr_fast.training.ranks import RANKS, Ranks, differences
from lcr_fast.training.trainer import CHECKPOINT

SERIES = (*TITLES, *VARIANTS)


def test_a_job_writes_its_tables(job, texts):
    table = (job / "run" / "results.md").read_text()
    assert table in texts["train"]
    titles = [variant.title for variant in VARIANTS.values()]
    parts = table.strip().split("\n\n")
    for heading, part in zip(parts[::2], parts[1::2], strict=True):
        rows = [line.split("|")[1].strip() for line in part.splitlines()[2:]]
        assert part.splitlines()[0].count("|") > 2, heading  # columns beside the model's name
        if "own searches" in heading:
            expected = []
            for name, variant in VARIANTS.items():
                kinds = ["those of other users", "none"] * variant.searches
                kinds += ["none, as trained"] * (name == "lcr")
                expected += [f"{variant.title}, {kind}" for kind in kinds]
            assert rows == expected
        else:
            assert rows == [*TITLES.values(), *titles["user by user" in heading :]], heading
    rows = read_csv(job / "run" / "results.csv")
    assert tuple(dict.fromkeys(row["model"] for row in rows)) == SERIES
    assert {row["protocol"] for row in rows} == {"sampled", "catalogue"}
    for row in rows:
        low, mean, high = (float(row[name]) for name in ("low", "mean", "high"))
        assert int(row["n"]) == 0 or 0 <= low <= mean <= high <= 1


@pytest.mark.parametrize("name", ["learning_curves", "target_distance", "metrics"])
def test_a_job_draws_its_plots(job, name):
    path = job / "run" / f"{name}.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels[::2, ::2] @ [1, 10, 100, 0])) > 20


def test_only_what_has_tcl_is_trained_with_a_weight_of_it(job):
    weights = {}
    for variant in VARIANTS:
        _, info = load_tensors(job / "run" / variant / CHECKPOINT, "checkpoint")
        weights[variant] = info["train"]["tcl_weight"]
        logged = {key for record in info["progress"]["history"] for key in record}
        assert ("tcl" in logged) == (weights[variant] > 0)
    assert weights == {
        "base": 0.0, "lcr": 0.0, "nosearch": 0.0, "tcl": 0.1, "rl": 0.0, "control": 0.0,
    }  # fmt: skip


def test_what_has_no_searches_neither_reads_nor_learns_them(job):
    for variant in VARIANTS:
        model = LCRSER.load(job / "run" / variant / "model.safetensors")
        _, info = load_tensors(job / "run" / variant / CHECKPOINT, "checkpoint")
        reads = variant != "nosearch"
        assert bool(model.config.max_search_len) == reads
        logged = {key for record in info["progress"]["history"] for key in record}
        if info["objective"] == "supervised":
            assert ("query_alignment" in logged) == reads
        result = load_json(job / "run" / variant / "evaluation.json", "evaluation")
        assert ("searches" in result) == reads


@pytest.mark.parametrize(
    ("device", "capture", "n_lines"),
    [("cpu", False, 0), ("cuda", False, 1), ("cuda:1", False, 1), ("cuda", True, 0)],
)
def test_who_launches_on_a_gpu_is_told_of_graphs(device, capture, n_lines, capsys):
    mention_capture(device, TrainConfig(capture=capture))
    assert capsys.readouterr().out.count("--capture") == n_lines


def test_a_job_without_data_makes_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "World", lambda seed: dataclasses.replace(WORLD, seed=seed))
    (tmp_path / "runs" / "synthetic-1").mkdir(parents=True)
    text = run("train", "--variants", "base", "--seed", "3", *TINY)
    out = tmp_path / "runs" / "synthetic-2"
    assert f"writing to {out.relative_to(tmp_path)}" in text
    assert PreparedData.open(out / "data").manifest["options"]["seed"] == 3
    assert (out / "base" / "model.safetensors").is_file()
    assert (out / "results.md").read_text() in text


@pytest.mark.parametrize(
    ("wanted", "trained"),
    [
        (["lcr", "base"], ["base", "lcr"]),
        (["rl"], ["tcl", "rl", "control"]),
        (["control"], ["tcl", "control"]),
    ],
)
def test_variants_bring_what_they_need(wanted, trained):
    assert with_requirements(wanted) == trained


def test_flags_override_the_config_file(tmp_path):
    path = tmp_path / "config.json"
    given = {
        "model": {"dim": 16, "steps": 1, "backend": "reference", "mlp_hidden": [5, 4]},
        "train": {"clip": 0.3, "seed": 4},
    }
    path.write_text(json.dumps(given))
    flags = ["--config", str(path), "--dim", "24", "--clip", "0.1", "--no-step-ffn"]
    configs = merged_configs(
        cli.make_parser().parse_args(["train", *flags]), {"model": {"steps": 7, "n_layers": 2}}
    )
    assert configs["model"] == LCRConfig(
        dim=24, steps=1, backend="reference", mlp_hidden=(5, 4), n_layers=2, step_ffn=False
    )
    assert configs["train"] == TrainConfig(clip=0.1, seed=4)


def test_differences_to_base_are_those_of_the_saved_ranks(job):
    rows = read_csv(job / "run" / "differences.csv")
    assert list(dict.fromkeys(row["model"] for row in rows)) == [*TITLES, *list(VARIANTS)[1:]]
    base = Ranks.load(job / "run" / "base" / RANKS)
    for name, folder in (("rl", "rl"), ("recency", "baselines/recency")):
        mine = Ranks.load(job / "run" / folder / RANKS)
        expected = differences([(mine, base)])
        found = [row for row in rows if row["model"] == name]
        assert [row["than"] for row in found] == ["base"] * len(expected)
        for row, numbers in zip(found, expected, strict=True):
            assert all(row[key] == str(value) for key, value in numbers.items())
    n_users = len(PreparedData.open(job / "data").split("test"))
    assert len(base.groups["all"]) == n_users
    table = (job / "run" / "results.md").read_text()
    assert table.count("NDCG@5 less that of Base (K=0), user by user") == 2


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-heads", "3", "--dim", "32"], "n_heads must divide dim, got 3 heads for dim 32"),
        (["--dropout", "nan"], "dropout must be a finite number, got nan"),
        (["--dropout", "2"], "dropout must be at most 0.99"),
        (["--epochs", "-1"], "epochs must be at least 0"),
        (["--reward", "auc"], "auc"),
        (["--reward", "hr@1+-1*mrr"], "hr@1+-1*mrr"),
        (["--precision", "float16"], "float16"),
        (["--action", "best"], "best"),
        (["--dim", "wide"], "wide"),
        (["--frobnicate"], "--frobnicate"),
        (["--variants", "base", "ltr"], "base, lcr, nosearch, tcl, rl, control, got 'ltr'"),
        (["--threads", "0"], "--threads must be in 1..4096, got 0"),
        (["--n-negatives", str(2**31)], f"n_negatives must be at most {2**31 - 1}"),
        (["--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "mps"], "--device must be cpu, cuda or cuda:N, got 'mps'"),
        (["--valid-metric", "auc"], "TrainConfig.valid_metric must be hr@k, ndcg@k, mrr or a sum"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--config", '{"model": {"dims": 8}}'], "no field 'dims'; did you mean 'dim'?"),
        (["--config", '{"train": {"epoch": 8}}'], "no field 'epoch'; did you mean 'epochs'?"),
        (["--config", '{"model": {"dim": "8"}}'], "dim must be an integer, got '8'"),
        (["--config", '{"model": {"item_text_dim": 0}}'], "decides item_text_dim, leave it out"),
        (["--config", '{"models": {}}'], "models"),
        (["--config", "[]"], "list"),
        (["--config", '{"model": [1]}'], "model"),
        (["--config", '{"model": {'], "config.json: not valid JSON"),
        (["--config", "[" * 9999], "config.json: not valid JSON"),
        (["--config", '{"train": {"seed": 1, "seed": 2}}'], "'seed' is there twice"),
        pytest.param(["--config", '{"model": {"backend": "triton"}}'], "triton", marks=NO_GPU),
        pytest.param(["--backend", "triton"], "triton", marks=NO_GPU),
        pytest.param(["--device", "cuda"], "sees no GPU", marks=NO_GPU),
    ],
)
@pytest.mark.parametrize("source", ["given", "made"])
def test_train_refuses(capsys, monkeypatch, job, tmp_path, options, message, source):
    monkeypatch.setattr(_triton, "INTERPRETED", False)  # users do not run Triton's interpreter
    monkeypatch.setattr(synthetic, "World", lambda seed: WORLD)
    if options[-1][0] in "{[":
        (tmp_path / "config.json").write_text(options[-1])
        options = [*options[:-1], tmp_path / "config.json"]
    data = ["--data", job / "data"] if source == "given" else []
    out = tmp_path / "out"
    assert message in fails(capsys, "train", *data, "--out", out, "--variants", "base", *options)
    assert is_untouched(out)


# Faults of the data and the config together, which phase 2 or validation would meet last.
@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        (["rl"], ["--rl-negatives", "500"], r"rl_negatives must be at most \d+ for this data"),
        (["base", "rl"], ["--rl-negatives", "500"], r"whose user '\d+' has no more unseen items"),
        (["base"], ["--negatives", "in_batch", "--batch-size", "1"], "batch_size of at least 2"),
        (["base"], ["--catalogue-users", "-1"], "catalogue_users must be at least 1, or 0"),
        (["base"], ["--protocols", "impressions"], "no impressions to rank test targets among"),
        (["base"], ["--valid-metric", "hr@100"], "nothing can be chosen by hr@100: .* 99 evalu"),
        (
            ["base", "lcr"],
            ["--deep-supervision", "1", "--cross-memory", "initial", "--backend", "reference"],
            "deep_supervision goes step by step",
        ),
    ],
)
def test_train_checks_everything_first(capsys, job, tmp_path, variants, options, message):
    out = tmp_path / "out"
    argv = ["--data", job / "data", "--out", out, *TINY, "--variants", *variants, *options]
    assert re.search(message, fails(capsys, "train", *argv))
    assert is_untouched(out)


def test_studies_check_every_value_first(capsys, job, tmp_path):
    out = tmp_path / "out"
    options = ["--data", job / "data", "--out", out, *TINY]
    for argv, message in (
        (["rl", *options, "--axes", "rl_negatives=5,500"], "rl_negatives must be at most"),
        (["latency", *options, "--cross-memory", "initial"], "needs steps that stand alone"),
    ):
        assert message in fails(capsys, "study", *argv)
        assert is_untouched(out)


def test_jobs_side_by_side_choose_other_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: next_folder(tmp_path / "runs", "data"), range(8)))
    assert sorted(folders) == [tmp_path / "runs" / f"data-{i}" for i in range(1, 9)]


def test_a_folder_has_one_job(capsys, job, second):
    argv = ["--data", job / "data", "--out", second, "--resume", *TINY, "--seed", "1"]
    with claimed(second):
        line = fails(capsys, "train", *argv, "--variants", "base")
    assert "another process is writing into it" in line


def test_train_refuses_an_occupied_folder(capsys, job, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    argv = ["train", "--data", job / "data", "--out", tmp_path, *TINY]
    assert "is not empty" in fails(capsys, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_diverging_run_ends_in_one_line(capsys, job, tmp_path, monkeypatch):
    original = Supervised.updates
    monkeypatch.setattr(
        Supervised,
        "updates",
        lambda *a: ((loss * float("inf"), logs) for loss, logs in original(*a)),
    )
    argv = ["train", "--data", job / "data", "--out", tmp_path / "run", *TINY]
    assert "the loss is inf in epoch 1, step 1" in fails(capsys, *argv, code=1)


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError, torch.OutOfMemoryError])
def test_a_full_memory_ends_in_one_line(capsys, job, tmp_path, monkeypatch, kind):
    def fail(*arguments):
        raise kind("can't allocate memory: you tried to allocate 9 bytes\nmore")

    monkeypatch.setattr(Supervised, "updates", fail)
    argv = ["train", "--data", job / "data", "--out", tmp_path / "run", *TINY]
    line = fails(capsys, *argv, code=1)
    assert line.endswith("out of memory: can't allocate memory: you tried to allocate 9 bytes")
