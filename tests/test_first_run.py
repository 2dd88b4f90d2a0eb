"""docs/first-run.md, word by word: its script, its excerpts, its commands in their order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lcr_fast import cli

PAGE = (Path(__file__).parents[1] / "docs" / "first-run.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^    (lcr-fast .+)$", PAGE, re.M)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first-run")
    (folder / "shop.py").write_text(re.search(r"```python\n(.+?)```", PAGE, re.S)[1])
    subprocess.run([sys.executable, "shop.py"], cwd=folder, check=True, timeout=60)
    return folder


def test_the_files_begin_as_shown(shop):
    for name in ("events", "searches", "clicks"):
        shown = re.search(rf"`{name}\.csv`.*?```\n(.+?)```", PAGE, re.S)[1].splitlines()
        text = (shop / "shop" / f"{name}.csv").read_text()
        assert len(shown) == 4
        assert text.splitlines()[:4] == shown


def test_the_data_are_as_told(shop, monkeypatch, capsys):
    monkeypatch.chdir(shop)
    assert [command[0] for command in COMMANDS] == [
        "prepare",
        "inspect",
        "train",
        "report",
        "recommend",
    ]
    for command in COMMANDS[:2]:
        cli.main(command)
    told = capsys.readouterr().out
    warning = re.search(r"> (Warning: .+?\.)$", PAGE, re.M | re.S)[1]
    assert " ".join(warning.replace(">", " ").split()) in told


@pytest.mark.full
def test_every_command_does_what_it_says(shop, monkeypatch, capsys):
    monkeypatch.chdir(shop)
    for command in COMMANDS:
        cli.main([*command, "--overwrite"] if command[0] == "prepare" else command)
    lines = capsys.readouterr().out.splitlines()
    assert "page: runs/shop/report.html" in lines
    page = (shop / "runs" / "shop" / "report.html").read_text(encoding="utf-8")
    assert all(title in page for title in ("Against Base", "A few users", "nice tea"))
    assert lines[-4] == "user,rank,item,score"
    assert [line.split(",")[:2] for line in lines[-3:]] == [["user1", str(n)] for n in (1, 2, 3)]
