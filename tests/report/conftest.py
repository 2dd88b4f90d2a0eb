"""A run on a log whose every text is hostile, trained for an epoch."""

import pytest

from hostile import hostile_log
from lcr_fast import cli
from lcr_fast.data.build import prepare

_SIZES = {"epochs": 1, "dim": 8, "steps": 2, "mlp-hidden": 8, "max-search-len": 4, "max-rec-len": 6}


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory):
    """Return a folder with prepared data and a finished run."""
    folder = tmp_path_factory.mktemp("hostile")
    prepare(hostile_log(), folder / "data", n_negatives=12)
    tiny = [each for name, size in _SIZES.items() for each in (f"--{name}", str(size))]
    arguments = ["train", "--data", str(folder / "data"), "--out", str(folder / "run"), *tiny]
    cli.main([*arguments, "--variants", "base", "lcr", "nosearch", "--device", "cpu"])
    return folder
