"""``lcr-fast evaluate`` and ``baselines``: their numbers, and how they call what is ranked."""

import re

import pytest
import torch

import lcr_fast
from command_line import TINY, fails, read_csv, run
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.serving.offline import recommend
from lcr_fast.training.baselines import TITLES
from lcr_fast.training.evaluation import rank_model


@pytest.mark.parametrize("variant", ["base", "rl", "nosearch"])
def test_a_model_evaluates_to_its_line_of_the_table(job, variant, tmp_path):
    path = tmp_path / "numbers.csv"
    model = job / "run" / variant / "model.safetensors"
    text = run("evaluate", model, "--data", job / "data", "--csv", path)
    mine = read_csv(path)
    theirs = [row for row in read_csv(job / "run" / "results.csv") if row.pop("model") == variant]
    assert mine == theirs
    assert f"| ndcg@5 | {float(mine[5]['mean']):.4f} [" in re.sub(" +", " ", text)


def test_the_baselines_have_a_table_of_their_own(job, tmp_path):
    text = run("baselines", "--data", job / "data", "--csv", tmp_path / "numbers.csv")
    of_job = (job / "run" / "results.md").read_text()
    for part in text.strip().split("\n\n")[1::2]:
        assert [line.split("|")[1].strip() for line in part.splitlines()[2:]] == [*TITLES.values()]
    mine = read_csv(tmp_path / "numbers.csv")
    theirs = read_csv(job / "run" / "results.csv")
    assert mine == [row for row in theirs if row["model"] in TITLES]
    assert "recency, then after the last query" in of_job


@pytest.fixture(scope="session")
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
        assert "99" not in re.sub(r"\S*/\S*|[\d.,]*\.\d+|n=\d+", "", text)  # nor in a path


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
    rows = read_csv(path)
    assert {row["protocol"] for row in rows} == {"catalogue"}
    assert {row["metric"] for row in rows} == {"hr@3", "ndcg@3", "mrr"}
    assert "sampled" not in text
    text = run("baselines", "--data", job / "data", "--protocols", "catalogue")
    assert text.startswith("Test, 24 users, whole catalogue, seen items masked, [95 %")


def test_a_protocol_without_candidates(capsys, job):
    asked = ["--data", job / "data", "--protocols", "impressions"]
    model = job / "run" / "lcr" / "model.safetensors"
    for command in (["evaluate", model], ["baselines"]):
        line = fails(capsys, *command, *asked)
        assert "the data has no impressions to rank test targets among" in line


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
