"""A job prepared and trained through the command line, and a second one."""

import dataclasses
import json

import pytest

from command_line import TINY, WORLD, run


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def texts(job):
    return json.loads((job / "texts.json").read_text())


@pytest.fixture(scope="session")
def second(job, tmp_path_factory):
    """Train on the same data with another seed, without phase 2; return the folder."""
    out = tmp_path_factory.mktemp("second") / "run"
    options = ["--variants", "base", "lcr", "--seed", "1"]
    run("train", "--data", job / "data", "--out", out, *TINY, *options)
    return out
