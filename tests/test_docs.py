"""The documents name files that exist, link to pages that exist, and give commands that parse."""

import re
import shlex
from pathlib import Path

import pytest

from lcr_fast import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_links(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@each_page
def test_files(page):
    found = re.findall(r"`((?:[\w-]+/)+[\w*-]+\.\w+)`", page.read_text(encoding="utf-8"))
    for path in found:
        if not path.startswith("runs/"):
            assert any(any(root.glob(path)) for root in (ROOT, ROOT / "csrc")), path


def commands() -> list[str]:
    pages = ("reproducing.md", "studies.md", "learning.md", "questions.md")
    text = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in pages)
    pieces = re.findall(r"`([^`]+)`", text) + re.findall(r"^    (.+)$", text, re.M)
    split = (command.strip() for piece in pieces for command in piece.split("&&"))
    return [command for command in split if command.startswith("lcr-fast ")]


def test_commands_are_found():
    assert len(commands()) >= 9


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    cli.make_parser().parse_args(shlex.split(command)[1:])
