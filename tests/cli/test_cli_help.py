"""The command line: its help, its version, and that ``python -m lcr_fast`` is it."""

import dataclasses
import re
import runpy

import pytest

import lcr_fast
from lcr_fast import cli
from lcr_fast.cli.arguments import FROM_DATA
from lcr_fast.config import LCRConfig, TrainConfig


def help_of(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*argv, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_commands_by_the_names_of_their_modules(capsys):
    named = re.findall(r"^    (\w+)\b", help_of(capsys), re.MULTILINE)
    assert named == [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]


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
        ("recommend", "data any-data users budget-ms no-capture device backend threads"),
        ("extend", "data out"),
        ("export", "format out dtype data any-data device backend threads"),
        (
            "serve",
            "data any-data device backend threads host port max-batch wait-ms dtype no-capture",
        ),
        ("study rl", "data out resume seeds quick config device backend threads rewards axes"),
        ("study paper", "data out resume seeds quick config device backend threads all-steps"),
    ],
)
def test_help_names_every_flag(capsys, command, flags):
    wanted = flags.split()
    if command.startswith(("train", "study")):
        names = [f.name for kind in (LCRConfig, TrainConfig) for f in dataclasses.fields(kind)]
        sizes = ("n_items", "n_users", "n_queries", "n_terms", "item_text_dim", "query_text_dim")
        wanted += [name.replace("_", "-") for name in names if name not in sizes]
    named = set(re.findall(r"--([a-z0-9-]+)", help_of(capsys, *command.split())))
    assert named.issuperset(wanted)
    assert not named.intersection(name.replace("_", "-") for name in FROM_DATA)


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
