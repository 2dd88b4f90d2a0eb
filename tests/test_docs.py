"""The documents name files that exist, link to pages that exist, and give commands that parse."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from lcr_fast import cli
from lcr_fast.cli.jobs import SYNTHETIC_DEFAULTS
from lcr_fast.cli.study import STUDY_DEFAULTS
from lcr_fast.config import LCRConfig, TrainConfig

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


@pytest.mark.parametrize("config", [LCRConfig, TrainConfig])
def test_every_switch_is_named(config):
    page = (ROOT / "docs" / "switches.md").read_text(encoding="utf-8")
    assert [f.name for f in dataclasses.fields(config) if f"`{f.name}`" not in page] == []


def test_defaults_by_command():
    page = (ROOT / "docs" / "switches.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (`\w+`.*) \| (.*) \| (.*) \|$", page.split("## Defaults by")[1], re.M)
    told: tuple[dict[str, str], ...] = ({}, {})
    for names, *columns in lines:
        for of_command, values in zip(told, columns, strict=True):
            same = columns[0] if values == "the same" else values
            of_command |= zip(
                re.findall(r"\w+", names), same.replace(", ", " ").split(), strict=True
            )
    for of_command, defaults in zip(told, (SYNTHETIC_DEFAULTS, STUDY_DEFAULTS), strict=True):
        expected = {**defaults["model"], **defaults["train"]}
        assert of_command == {name: f"{value:,}" for name, value in expected.items()}


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
