"""``lcr-fast compare``: runs, models and seeds."""

import dataclasses
import re

import pytest

from command_line import fails, read_csv, run
from lcr_fast.training.ranks import RANKS, Ranks, differences


def test_compare_runs_by_model(job, second, tmp_path):
    path = tmp_path / "numbers.csv"
    text = run("compare", second, job / "run", "--csv", path, "--metric", "mrr")
    assert text.startswith(f"MRR, {second} less {job / 'run'}, [95 % interval")
    assert re.findall(r"^\| (\w+) ", text, re.MULTILINE) == ["model", "base", "lcr"] * 2
    mine, theirs = (Ranks.load(folder / "lcr" / RANKS) for folder in (second, job / "run"))
    expected = differences([(mine, theirs)])
    rows = [row for row in read_csv(path) if row["model"] == "lcr"]
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


def test_compare_measures_any_cut(job, second):
    text = run("compare", second / "base", job / "run" / "base", "--metric", "hr@50")
    assert text.startswith("HR@50, ")
    mine, theirs = (Ranks.load(folder / "base" / RANKS) for folder in (second, job / "run"))
    better = [ranks.by_protocol["sampled"] <= 50 for ranks in (mine, theirs)]
    assert f"| {better[0].mean() - better[1].mean():+.3f} [" in re.sub(" +", " ", text)
