"""The command line in-process: a whole job, resume, what recommend writes, and every bad input."""

import contextlib
import csv
import dataclasses
import io
import json
import re
import resource
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor

import matplotlib.image
import numpy as np
import polars as pl
import pytest
import torch

import lcr_fast
from lcr_fast import cli
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import synthetic
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments.comparison import VARIANTS, with_requirements
from lcr_fast.model import LCRSER
from lcr_fast.ops import _triton
from lcr_fast.serving.offline import recommend
from lcr_fast.storage import claimed, load_json, load_tensors
from lcr_fast.training.baselines import TITLES
from lcr_fast.training.evaluation import rank_model
from lcr_fast.training.objective import Supervised
from lcr_fast.training.ranks import RANKS, Ranks, differences
from lcr_fast.training.trainer import CHECKPOINT, Trainer

WORLD = synthetic.World(n_users=24, n_topics=16)
TINY = [
    *("--epochs", "1", "--rl-epochs", "1", "--rl-epoch-size", "16", "--rl-negatives", "9"),
    *("--dim", "8", "--steps", "1", "--mlp-hidden", "8", "--n-trajectories", "2"),
    *("--max-search-len", "4", "--max-rec-len", "5", "--schedule", "constant"),
]
COMMANDS = (
    "prepare", "train", "evaluate", "baselines", "compare", "recommend", "extend", "export",
    "serve", "study",
)  # fmt: skip
SERIES = (*TITLES, *VARIANTS)


def run(*argv) -> str:
    """Run a command that must succeed; return its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main([str(word) for word in argv])
    return out.getvalue()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Prepare and train through the CLI; return the folder, with all that was printed."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "world.json").write_text(json.dumps(dataclasses.asdict(WORLD)))
    texts = {
        "prepare": run("prepare", "synthetic", folder / "world.json", folder / "data"),
        "train": run("train", "--data", folder / "data", "--out", folder / "run", *TINY),
    }
    (folder / "texts.json").write_text(json.dumps(texts))
    return folder


@pytest.fixture(scope="module")
def texts(job):
    return json.loads((job / "texts.json").read_text())


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# -- help ----------------------------------------------------------------------------------------


def help_of(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*argv, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    text = help_of(capsys)
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (
            "prepare",
            "seed n-negatives negatives min-targets min-history min-rec-history "
            "min-search-history split time-shares k-core vocabulary keep-duplicates time-unit "
            "test-query overwrite",
        ),
        (
            "train",
            "data out resume any-data variants protocols catalogue-users config device backend "
            "threads",
        ),
        ("evaluate", "data any-data split protocols catalogue-users csv device backend threads"),
        ("baselines", "data protocols catalogue-users csv"),
        ("compare", "than metric any-data csv"),
        ("recommend", "data any-data users budget-ms device backend threads"),
        ("extend", "data out"),
        ("export", "format out data any-data device backend threads"),
        ("serve", "data any-data device backend threads host port max-batch wait-ms"),
    ],
)
def test_help_names_every_flag(capsys, command, flags):
    wanted = flags.split()
    if command == "train":
        names = [f.name for kind in (LCRConfig, TrainConfig) for f in dataclasses.fields(kind)]
        sizes = ("n_items", "n_users", "n_queries", "n_terms", "item_text_dim", "query_text_dim")
        wanted += [name.replace("_", "-") for name in names if name not in sizes]
    named = set(re.findall(r"--([a-z0-9-]+)", help_of(capsys, command)))
    assert named.issuperset(wanted)
    assert not named.intersection(name.replace("_", "-") for name in cli._FROM_DATA)


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"lcr-fast {lcr_fast.__version__}\n"


def test_the_package_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lcr_fast", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("lcr_fast", run_name="__main__")
    assert capsys.readouterr().out.startswith("lcr-fast ")


# -- a whole job ---------------------------------------------------------------------------------


def test_prepare_says_what_it_made(job, texts):
    data = PreparedData.open(job / "data")
    assert data.n_users == 24
    assert texts["prepare"].endswith(data.summary() + "\n")


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
    rows = read_csv((job / "run" / "results.csv").read_text())
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


@pytest.mark.parametrize("variant", ["base", "rl", "nosearch"])
def test_a_model_evaluates_to_its_line_of_the_table(job, variant, tmp_path):
    path = tmp_path / "numbers.csv"
    model = job / "run" / variant / "model.safetensors"
    text = run("evaluate", model, "--data", job / "data", "--csv", path)
    mine = read_csv(path.read_text())
    theirs = [
        row
        for row in read_csv((job / "run" / "results.csv").read_text())
        if row.pop("model") == variant
    ]
    assert mine == theirs
    assert f"| ndcg@5 | {float(mine[5]['mean']):.4f} [" in re.sub(" +", " ", text)


def test_a_finished_job_is_read_back(job, monkeypatch):
    before = (job / "run" / "results.csv").read_bytes()
    monkeypatch.setattr(Trainer, "run", None)
    text = run("train", "--data", job / "data", "--out", job / "run", "--resume", *TINY)
    assert text.count("already evaluated") == len(VARIANTS)
    assert (job / "run" / "results.csv").read_bytes() == before


def test_a_stopped_job_resumes_to_the_same_numbers(job, tmp_path, monkeypatch, capsys):
    """Stopped in phase 1 and, resumed, again in phase 2."""
    command = ["train", "--data", job / "data", "--out", tmp_path / "run", *TINY]
    original = Trainer._update
    for objective, *resume in (("supervised",), ("grpo", "--resume")):

        def stop(self, loss, objective=objective):
            if self.name == objective:
                raise KeyboardInterrupt
            original(self, loss)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_update", stop)
            with pytest.raises(SystemExit) as end:
                run(*command, *resume)
        assert end.value.code == 130
        assert "--resume continues" in capsys.readouterr().err
        assert not (tmp_path / "run" / "results.csv").exists()
    run(*command, "--resume")
    for variant in ("base", "tcl", "rl", "control"):
        mine, theirs = (
            load_tensors(folder / variant / "model.safetensors", "model")[0]
            for folder in (tmp_path / "run", job / "run")
        )
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items()), variant
    mine, theirs = (folder / "results.csv" for folder in (tmp_path / "run", job / "run"))
    assert mine.read_bytes() == theirs.read_bytes()


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
    configs = cli._configs(
        cli._parser().parse_args(["train", *flags]), {"model": {"steps": 7, "n_layers": 2}}
    )
    assert configs["model"] == LCRConfig(
        dim=24, steps=1, backend="reference", mlp_hidden=(5, 4), n_layers=2, step_ffn=False
    )
    assert configs["train"] == TrainConfig(clip=0.1, seed=4)


# -- baselines and comparisons -------------------------------------------------------------------


def test_the_baselines_have_a_table_of_their_own(job, tmp_path):
    text = run("baselines", "--data", job / "data", "--csv", tmp_path / "numbers.csv")
    of_job = (job / "run" / "results.md").read_text()
    for part in text.strip().split("\n\n")[1::2]:
        assert [line.split("|")[1].strip() for line in part.splitlines()[2:]] == [*TITLES.values()]
    mine = read_csv((tmp_path / "numbers.csv").read_text())
    theirs = read_csv((job / "run" / "results.csv").read_text())
    assert mine == [row for row in theirs if row["model"] in TITLES]
    assert "recency, then after the last query" in of_job


def test_differences_to_base_are_those_of_the_saved_ranks(job):
    rows = read_csv((job / "run" / "differences.csv").read_text())
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


@pytest.fixture(scope="module")
def second(job, tmp_path_factory):
    """Train on the same data with another seed, without phase 2; return the folder."""
    out = tmp_path_factory.mktemp("second") / "run"
    options = ["--variants", "base", "lcr", "--seed", "1"]
    run("train", "--data", job / "data", "--out", out, *TINY, *options)
    return out


def test_compare_runs_by_model(job, second, tmp_path):
    path = tmp_path / "numbers.csv"
    text = run("compare", second, job / "run", "--csv", path, "--metric", "mrr")
    assert text.startswith(f"MRR, {second} less {job / 'run'}, [95 % interval")
    assert re.findall(r"^\| (\w+) ", text, re.MULTILINE) == ["model", "base", "lcr"] * 2
    mine, theirs = (Ranks.load(folder / "lcr" / RANKS) for folder in (second, job / "run"))
    expected = differences([(mine, theirs)])
    rows = [row for row in read_csv(path.read_text()) if row["model"] == "lcr"]
    assert [float(row["mean"]) for row in rows] == pytest.approx(
        [row["mean"] for row in expected], nan_ok=True
    )


def test_compare_two_models_and_groups_of_seeds(job, second):
    text = run("compare", second / "lcr", job / "run" / "baselines" / "recency")
    assert re.findall(r"^\| (\w+) ", text, re.MULTILINE) == ["model", "model"] * 2
    assert "seeds" not in text
    groups = [second / "lcr", job / "run" / "lcr", "--than", second / "base", job / "run" / "base"]
    text = run("compare", *groups)
    assert "of each user's mean over 2 seeds; seeds: Student's t over the seeds' means" in text
    mine, theirs = (
        [Ranks.load(folder / name / RANKS) for folder in (second, job / "run")]
        for name in ("lcr", "base")
    )
    (row,) = (
        row
        for row in differences(list(zip(mine, theirs, strict=True)))
        if (row["protocol"], row["targets"], row["metric"]) == ("sampled", "all", "ndcg@5")
    )
    assert row["seeds"] == 2
    cell = f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], seeds ["
    assert cell in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN"], "two runs, or two groups with --than between them; got 1"),
        (["RUN", "RUN", "RUN"], "got 3"),
        (["RUN", "RUN", "--than", "RUN"], "compared in pairs, a pair a seed: got 2 and 1"),
        (["RUN", "NOWHERE"], "nowhere: no ranks.safetensors there"),
        (
            ["RUN", "RUN/base"],
            "no model in common: base, lcr, nosearch, tcl, rl, control and one model",
        ),
        (["RUN", "RUN", "--metric", "auc"], "metric must be hr@k, ndcg@k or mrr, got 'auc'"),
        (["RUN/base", "BROKEN"], "ranks.safetensors: not a complete safetensors file"),
        (["RUN/base", "OTHER"], "rank other samples: runs must be of the same prepared data"),
    ],
)
def test_compare_refuses(capsys, job, tmp_path, argv, message):
    ranks = Ranks.load(job / "run" / "base" / RANKS)
    dataclasses.replace(ranks, samples="other").save(tmp_path / "other" / RANKS)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RANKS).write_text("ranks")
    places = {"NOWHERE": tmp_path / "nowhere", "BROKEN": tmp_path / "broken"}
    places |= {"OTHER": tmp_path / "other"}
    argv = [places.get(word, word.replace("RUN", str(job / "run"))) for word in argv]
    assert message in fails(capsys, "compare", *argv)


# -- recommend -----------------------------------------------------------------------------------


@pytest.mark.parametrize("users", [None, ["7", "0", "23"]])
@pytest.mark.parametrize("k", [1, 5])
def test_recommendations(job, users, k):
    model = job / "run" / "lcr" / "model.safetensors"
    chosen = ["--users", *users] if users else []
    text = run("recommend", model, "--data", job / "data", "-k", k, *chosen)
    assert text.splitlines()[0] == "user,rank,item,score"
    log = synthetic.generate(WORLD)
    known = {str(item) for item in log.events["item"]} | {str(i) for i in log.clicks["item"]}
    by_user: dict[str, list] = {}
    for row in read_csv(text):
        by_user.setdefault(row["user"], []).append(row)
    assert list(by_user) == users if users else len(by_user) == WORLD.n_users
    for user, rows in by_user.items():
        assert [int(row["rank"]) for row in rows] == list(range(1, k + 1))
        scores = [float(row["score"]) for row in rows]
        assert scores == sorted(scores, reverse=True)
        items = {row["item"] for row in rows}
        assert len(items) == k
        assert items <= known
        searches = log.searches.filter(pl.col("user") == int(user))["search"].implode()
        clicked = log.clicks.filter(pl.col("search").is_in(searches))["item"]
        events = log.events.filter(pl.col("user") == int(user))["item"]
        assert items.isdisjoint(map(str, [*events, *clicked]))


def test_recommendations_stop_quietly_with_their_reader(job, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    errors = io.StringIO()
    monkeypatch.setattr("sys.stdout", Closed())
    monkeypatch.setattr("sys.stderr", errors)
    model = job / "run" / "lcr" / "model.safetensors"
    cli.main(["recommend", str(model), "--data", str(job / "data")])
    assert errors.closed


# -- bad input -----------------------------------------------------------------------------------


def fails(capsys, *argv, code: int = 2) -> str:
    """Run a command that must fail; return its one line of complaint."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in argv])
    assert end.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("lcr-fast")
    return lines[0]


def is_untouched(folder) -> bool:
    """Whether a folder and its siblings hold nothing, not even something half-written."""
    left = [path for path in folder.parent.iterdir() if folder.name in path.name]
    return not left or (left == [folder] and not any(folder.iterdir()))


@pytest.fixture
def frames(tmp_path):
    """Write a data set of the ``frames`` source without a single target; return its folder."""
    folder = tmp_path / "frames"
    folder.mkdir()
    log = synthetic.generate(WORLD)
    log.events.with_columns(target=False).write_parquet(folder / "events.parquet")
    log.searches.write_parquet(folder / "searches.parquet")
    log.clicks.write_parquet(folder / "clicks.parquet")
    return folder


def rewrite(path, edit) -> None:
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        pytest.param(lambda f: None, "no target event has a history", id="no-targets"),
        pytest.param(
            lambda f: pl.read_parquet(f / "events.parquet").clear().write_parquet(
                f / "events.parquet"
            ),
            "no target event has a history", id="no-events",
        ),
        pytest.param(
            lambda f: rewrite(f / "clicks.parquet", lambda b: b.__delitem__(slice(100, None))),
            "clicks.parquet: cannot be read", id="truncated-parquet",
        ),
        pytest.param(
            lambda f: (f / "events.parquet").write_text("user,item\n1,2\n"),
            "events.parquet: cannot be read", id="csv-named-parquet",
        ),
        pytest.param(
            lambda f: (f / "searches.parquet").unlink(),
            "searches.parquet: not found", id="missing-file",
        ),
        pytest.param(
            lambda f: pl.read_parquet(f / "events.parquet").drop("time").write_parquet(
                f / "events.parquet"
            ),
            "events.parquet: column time is missing", id="missing-column",
        ),
    ],
)  # fmt: skip
def test_prepare_refuses(capsys, tmp_path, frames, break_it, message):
    break_it(frames)
    assert message in fails(capsys, "prepare", "frames", frames, tmp_path / "out")
    assert is_untouched(tmp_path / "out")


def test_prepare_hands_options_to_the_reader_and_on(tmp_path):
    header = ("query", "candidate_wid_list", "candidate_label_list", "history_qry_list",
              "history_wid_list", "history_type_list", "history_time_list")  # fmt: skip
    lines = [
        ("q", f"7{user}_8", "1.0_0.0", "-1_-1_-1", "1_2_3", "CLICK_CLICK_CLICK", "0_1_1_1")
        for user in (1, 1, 2)
    ]
    (tmp_path / "raw.txt").write_text("\n".join("\t".join(line) for line in (header, *lines)))
    plain, asked = (
        run(
            "prepare",
            "jdsearch",
            tmp_path / "raw.txt",
            tmp_path / name,
            "--n-negatives",
            "1",
            *more,
        )
        for name, more in (("plain", ()), ("asked", ("--test-query", "--keep-duplicates")))
    )
    assert "dropped 2 test queries" in plain
    assert "raw.txt: dropped 1 rows that repeat another exactly" in plain
    assert "kept the test query of 3 users as a target" in asked
    assert "raw.txt: kept 1 rows that repeat another exactly" in asked


def test_prepare_splits_by_time_and_keeps_a_core(job, tmp_path):
    text = run("prepare", "synthetic", job / "world.json", tmp_path / "out", "--split", "time",
               "--time-shares", "0.2", "0.1", "--k-core", "2", "--n-negatives", "9")  # fmt: skip
    options = PreparedData.open(tmp_path / "out").manifest["options"]
    assert options.items() >= {"split": "time", "time_shares": [0.2, 0.1], "k_core": 2}.items()
    assert "prepare: validation begins at" in text
    assert "prepare: the 2-core has" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["clicks", "-", "OUT"], "'clicks'"),
        (["trivago", "nowhere", "OUT"], "nowhere"),
        (["synthetic", "nowhere.json", "OUT"], "nowhere.json"),
        (["synthetic", "WORLD", "OUT", "--min-targets", "0"], "min_targets must be at least 1"),
        (["synthetic", "WORLD", "OUT", "--n-negatives", "500"], "negatives"),
        (["synthetic", "WORLD", "OUT", "--n-negatives", "0"], "--n-negatives must be at least 1"),
        (["synthetic", "WORLD", "OUT", "--seed", "one"], "--seed"),
        (["synthetic", "WORLD", "OUT", "--seed", "-5"], "seed must be at least 0, got -5"),
        (["synthetic", "WORLD", "OUT", "--k-core", "99"], "have 99 events each (--k-core)"),
        (
            ["synthetic", "WORLD", "OUT", "--split", "time", "--time-shares", "1", "0"],
            "time_shares",
        ),
        (
            ["synthetic", "WORLD", "OUT", "--test-query"],
            "--test-query: the reader of synthetic has",
        ),
        (["synthetic", "WORLD"], "OUT"),
    ],
)
def test_prepare_refuses_options(capsys, job, tmp_path, argv, message):
    places = {"OUT": tmp_path / "out", "WORLD": job / "world.json"}
    argv = [places.get(word, word) for word in argv]
    assert message in fails(capsys, "prepare", *argv)
    assert is_untouched(tmp_path / "out")


def test_prepare_never_replaces_unasked(capsys, job, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(job / "data", out)
    command = ["prepare", "synthetic", job / "world.json", out, "--seed", "5"]
    assert "already holds prepared data" in fails(capsys, *command)
    assert PreparedData.open(out).manifest["options"]["seed"] == 0
    run(*command, "--overwrite")
    assert PreparedData.open(out).manifest["options"]["seed"] == 5


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
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "mps"], "--device must be cpu, cuda or cuda:N, got 'mps'"),
        (["--valid-metric", "auc"], "TrainConfig.valid_metric must be hr@k, ndcg@k, mrr or a sum"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--config", '{"model": {"dims": 8}}'], "no field 'dims'; did you mean 'dim'?"),
        (["--config", '{"train": {"epoch": 8}}'], "no field 'epoch'; did you mean 'epochs'?"),
        (["--config", '{"model": {"dim": "8"}}'], "dim must be an integer, got '8'"),
        (["--config", '{"models": {}}'], "models"),
        (["--config", "[]"], "list"),
        (["--config", '{"model": [1]}'], "model"),
        (["--config", '{"model": {'], "config.json: not valid JSON"),
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
    ],
)
def test_train_checks_everything_first(capsys, job, tmp_path, variants, options, message):
    out = tmp_path / "out"
    argv = ["--data", job / "data", "--out", out, *TINY, "--variants", *variants, *options]
    assert re.search(message, fails(capsys, "train", *argv))
    assert is_untouched(out)


def test_studies_check_every_value_first(capsys, job, tmp_path):
    out = tmp_path / "out"
    argv = ["rl", "--data", job / "data", "--out", out, *TINY, "--axes", "rl_negatives=5,500"]
    assert "rl_negatives must be at most" in fails(capsys, "study", *argv)
    assert is_untouched(out)


def test_jobs_side_by_side_choose_other_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: cli._next_folder(tmp_path / "runs", "data"), range(8)))
    assert sorted(folders) == [tmp_path / "runs" / f"data-{i}" for i in range(1, 9)]


def test_a_folder_has_one_job(capsys, job, second):
    argv = ["--data", job / "data", "--out", second, "--resume", *TINY, "--seed", "1"]
    with claimed(second):
        line = fails(capsys, "train", *argv, "--variants", "base")
    assert "another process is writing into it" in line


def test_a_full_disk_ends_in_one_line_and_resumes(capsys, job, second, tmp_path):
    """A limit on the size of files fails as a full disk does, here at the first model."""
    argv = ["--data", job / "data", "--out", tmp_path / "run", *TINY, "--seed", "1"]
    argv += ["--variants", "base"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        line = fails(capsys, "train", *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"run/base/model\.safetensors: File too large$", line)
    assert not any((tmp_path / "run" / "base").iterdir())
    run("train", *argv, "--resume")
    mine, theirs = (folder / "base" / "model.safetensors" for folder in (tmp_path / "run", second))
    assert mine.read_bytes() == theirs.read_bytes()


def test_train_refuses_an_occupied_folder(capsys, job, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    argv = ["train", "--data", job / "data", "--out", tmp_path, *TINY]
    assert "is not empty" in fails(capsys, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_resume_needs_a_folder(capsys, job):
    assert "--resume needs --out" in fails(capsys, "train", "--data", job / "data", "--resume")


def test_resume_refuses_another_job(capsys, job, tmp_path):
    shutil.copytree(job / "run", tmp_path / "run")
    argv = ["train", "--data", job / "data", "--out", tmp_path / "run", "--resume", *TINY]
    assert "config differs in n_layers" in fails(capsys, *argv, "--n-layers", "2")


def test_resume_goes_on_with_what_has_not_begun(job, second, tmp_path):
    """Phase 2's settings before it begins, and more epochs: as if they had been given at once."""
    out = shutil.copytree(second, tmp_path / "run")
    changes = ["--rl-negatives", "5", "--epochs", "2", "--seed", "1", "--variants", "base"]
    changes += ["--protocols", "sampled"]
    argv = ["--data", job / "data", *TINY, *changes]
    text = run("train", "--out", out, "--resume", *argv)
    assert "resuming with epochs 1 -> 2, rl_negatives 9 -> 5; kept and gone on from: base" in text
    run("train", "--out", tmp_path / "whole", *argv)
    for name in ("base/model.safetensors", "base/ranks.safetensors", "results.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    text = run("train", "--out", out, "--resume", *argv)
    assert "already evaluated" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rl-negatives", "5"], "config differs in rl_negatives"),  # phase 2 has begun
        (["--epochs", "2"], "config differs in epochs"),  # phase 2 has begun from it
        (["--rl-epochs", "0"], "config differs in rl_epochs"),  # one is done
        (["--seed", "4"], "config differs in seed"),
    ],
)
def test_resume_refuses_to_change_what_was_done(capsys, job, tmp_path, options, message):
    out = shutil.copytree(job / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    argv = ["train", "--data", job / "data", "--out", out, "--resume", *TINY, *options]
    assert message in fails(capsys, *argv)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["job.json", "base/evaluation.json", "base/ranks.safetensors"])
def test_damaged_results_are_not_read_back(capsys, job, second, tmp_path, name):
    out = shutil.copytree(second, tmp_path / "run")
    rewrite(out / name, lambda b: b.__setitem__(len(b) * 3 // 4, b[len(b) * 3 // 4] ^ 1))
    argv = ["train", "--data", job / "data", "--out", out, "--resume", *TINY, "--seed", "1"]
    assert f"{name}: " in fails(capsys, *argv, "--variants", "base")


# -- which data ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_data(job):
    """Prepare the same log with other negatives: data of the same size."""
    run("prepare", "synthetic", job / "world.json", job / "other", "--seed", "5")
    return job / "other"


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_a_model_knows_its_data(capsys, job, other_data, command):
    argv = [command, job / "run" / "lcr" / "model.safetensors", "--data", other_data]
    assert "it is of other prepared data (--any-data" in fails(capsys, *argv)
    assert len(run(*argv, "--any-data").splitlines()) > 9


def test_a_job_knows_its_data(capsys, job, second, other_data, tmp_path):
    out = shutil.copytree(second, tmp_path / "run")
    argv = ["train", "--data", other_data, "--out", out, "--resume", *TINY, "--seed", "1"]
    argv += ["--variants", "base", "--protocols", "sampled"]
    assert "cannot resume, it is of other prepared data" in fails(capsys, *argv)
    for name in ("job.json", "base/evaluation.json"):
        (out / name).unlink()
        assert "cannot resume, it is of other prepared data" in fails(capsys, *argv)
    assert "1 target + 99" in run(*argv, "--any-data")


def test_runs_know_their_data(capsys, job, second, tmp_path):
    ranks = Ranks.load(job / "run" / "base" / RANKS)
    dataclasses.replace(ranks, data="other").save(tmp_path / "other" / RANKS)
    argv = ["compare", second / "base", tmp_path / "other"]
    assert "it is of other prepared data" in fails(capsys, *argv)
    assert run(*argv, "--any-data").count("| model ") == 4


# -- what is ranked, and how it is called --------------------------------------------------------


@pytest.fixture(scope="module")
def few(job):
    """Prepare the same log with 20 negatives a target."""
    run("prepare", "synthetic", job / "world.json", job / "few", "--n-negatives", "20")
    return job / "few"


def test_labels_say_how_many_negatives_there_are(job, few, tmp_path):
    model = job / "run" / "lcr" / "model.safetensors"
    out, sampled = tmp_path / "run", ["--protocols", "sampled"]
    for text in (
        run("baselines", "--data", few, *sampled),
        run("evaluate", model, "--data", few, "--any-data", *sampled),
        run("train", "--data", few, "--out", out, *TINY, "--variants", "base", *sampled),
        run("compare", out / "base", out / "baselines" / "recency"),
    ):
        assert "1 target + 20 sampled negatives" in text
        assert "99" not in re.sub(r"[\d.,]*\.\d+|n=\d+", "", text)


@pytest.mark.parametrize("n", [5, 0])
def test_the_catalogue_is_ranked_for_so_many(job, n):
    n_users = len(PreparedData.open(job / "data").split("test"))
    text = run("baselines", "--data", job / "data", "--catalogue-users", n)
    main = text.splitlines()[2]
    if n:
        assert "NDCG@10, catalogue (n=5)" in main
        assert f"seen items masked, 5 of {n_users} users, the same for every model" in text
        assert re.search(r"\| popularity .*\] .*\[", text)  # both with an interval
    else:
        assert "NDCG@10, catalogue  " in main
        assert " of " not in text.split("whole catalogue")[1].splitlines()[0]


def test_protocols_and_cuts_are_chosen(job, tmp_path):
    model, path = job / "run" / "lcr" / "model.safetensors", tmp_path / "numbers.csv"
    argv = ["evaluate", model, "--data", job / "data", "--csv", path]
    text = run(*argv, "--protocols", "catalogue", "-k", 3)
    rows = read_csv(path.read_text())
    assert {row["protocol"] for row in rows} == {"catalogue"}
    assert {row["metric"] for row in rows} == {"hr@3", "ndcg@3", "mrr"}
    assert "sampled" not in text
    text = run("baselines", "--data", job / "data", "--protocols", "catalogue")
    assert text.startswith("Test, 24 users, whole catalogue, seen items masked, [95 %")


@pytest.mark.parametrize("command", ["evaluate", "baselines", "compare"])
def test_a_folder_is_no_csv(capsys, monkeypatch, job, tmp_path, command):
    """Known before anything is computed."""
    monkeypatch.setattr(PreparedData, "open", None)
    argv = {"evaluate": ["MODEL", "--data", "DATA"], "baselines": ["--data", "DATA"]}
    line = fails(capsys, command, *argv.get(command, ["RUN", "RUN"]), "--csv", tmp_path)
    assert "a folder; name a file in it" in line


def test_a_text_is_no_list(job):
    """Its letters would be taken for users, protocols and metrics: of user 17, 1 and 7."""
    data = PreparedData.open(job / "data")
    model = LCRSER.load(job / "run" / "lcr" / "model.safetensors")
    with pytest.raises(ValueError, match=r"users must be a sequence of ids, \['17'\], got a text"):
        recommend(model, data, "17")
    with pytest.raises(ValueError, match=r"protocols must be a sequence of names, \['sampled'\]"):
        rank_model(model, data, protocols="sampled")
    with pytest.raises(ValueError, match=r"metrics must be a sequence of names, \('hr@10',\)"):
        lcr_fast.ranking_metrics(torch.rand(1, 3), torch.tensor([0]), metrics="hr@10")


def test_compare_measures_any_cut(job, second):
    text = run("compare", second / "base", job / "run" / "base", "--metric", "hr@50")
    assert text.startswith("HR@50, ")
    mine, theirs = (Ranks.load(folder / "base" / RANKS) for folder in (second, job / "run"))
    better = [ranks.by_protocol["sampled"] <= 50 for ranks in (mine, theirs)]
    assert f"| {better[0].mean() - better[1].mean():+.3f} [" in re.sub(" +", " ", text)


def test_a_locale_does_not_change_what_is_written(job, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr(PreparedData, "items", {i: f"ä{i}" for i in range(999)})
    model = job / "run" / "lcr" / "model.safetensors"
    cli.main(["recommend", str(model), "--data", str(job / "data"), "-k", "1"])
    assert "ä".encode() in stream.buffer.getvalue()


def test_a_diverging_run_ends_in_one_line(capsys, job, tmp_path, monkeypatch):
    original = Supervised.updates
    monkeypatch.setattr(
        Supervised,
        "updates",
        lambda *a: ((loss * float("inf"), logs) for loss, logs in original(*a)),
    )
    argv = ["train", "--data", job / "data", "--out", tmp_path / "run", *TINY]
    assert "the loss is inf in epoch 1, step 1" in fails(capsys, *argv, code=1)


@pytest.mark.parametrize("command", ["train", "evaluate", "recommend"])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda d: rewrite(d / "rec_items.npy", lambda b: b.__setitem__(-4, b[-4] ^ 1)),
            "checksum",
        ),
        (lambda d: rewrite(d / "rec_items.npy", lambda b: b.__delitem__(-4)), "rec_items.npy"),
        (lambda d: (d / "rec_items.npy").unlink(), "rec_items.npy: missing"),
        (lambda d: (d / "manifest.json").unlink(), "is not prepared data"),
    ],
)
def test_damaged_data_is_refused(capsys, job, tmp_path, command, break_it, message):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(job / "data", data)
    break_it(data)
    model = job / "run" / "lcr" / "model.safetensors"
    argv = ["--out", out, *TINY] if command == "train" else [model]
    assert message in fails(capsys, command, *argv, "--data", data)
    assert is_untouched(out)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_data_without_test_samples_is_refused(capsys, job, tmp_path, command):
    world = job / "world.json"
    run("prepare", "synthetic", world, tmp_path / "data", "--min-targets", "99")
    out, model = tmp_path / "out", job / "run" / "lcr" / "model.safetensors"
    argv = ["--out", out, *TINY] if command == "train" else [model, "--csv", out, "--any-data"]
    assert "no test samples" in fails(capsys, command, *argv, "--data", tmp_path / "data")
    assert is_untouched(out)


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda m: rewrite(m, lambda b: b.__delitem__(slice(-100, None))),
            "not a complete safeten",
        ),
        (lambda m: m.write_text("weights"), "not a complete safetensors file"),
        (lambda m: m.unlink(), "no such file"),
        (lambda m: (m.unlink(), m.mkdir()), "model.safetensors: a folder; expected a model file"),
        (lambda m: rewrite(m, lambda b: b.__setitem__(-9, b[-9] ^ 1)), "damaged, its content"),
        (lambda m: shutil.copy(m.parent / "checkpoint.safetensors", m), "not a model file"),
    ],
)
def test_damaged_models_are_refused(capsys, job, tmp_path, command, break_it, message):
    folder = shutil.copytree(job / "run" / "lcr", tmp_path / "lcr")
    model = folder / "model.safetensors"
    break_it(model)
    assert message in fails(capsys, command, model, "--data", job / "data")


def test_a_model_of_other_data_is_refused(capsys, job, tmp_path):
    world = dataclasses.replace(WORLD, n_topics=18)
    (tmp_path / "world.json").write_text(json.dumps(dataclasses.asdict(world)))
    run("prepare", "synthetic", tmp_path / "world.json", tmp_path / "data")
    model = job / "run" / "lcr" / "model.safetensors"
    line = fails(capsys, "evaluate", model, "--data", tmp_path / "data")
    assert re.search(r"the model knows \d+ items, the data has \d+", line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--users", "7", "nobody"], "user 'nobody' is not in the data"),
        (["-k", "0"], "k must be at least 1, got 0"),
    ],
)
def test_recommend_refuses(capsys, job, options, message):
    model = job / "run" / "lcr" / "model.safetensors"
    assert message in fails(capsys, "recommend", model, "--data", job / "data", *options)
