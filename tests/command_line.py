"""Run the command line in this process, for tests."""

import contextlib
import csv
import io

import pytest

from lcr_fast import cli
from lcr_fast.data import synthetic

WORLD = synthetic.World(n_users=24, n_topics=16)
TINY = [
    *("--epochs", "1", "--rl-epochs", "1", "--rl-epoch-size", "16", "--rl-negatives", "9"),
    *("--dim", "8", "--steps", "1", "--mlp-hidden", "8", "--n-trajectories", "2"),
    *("--max-search-len", "4", "--max-rec-len", "5", "--schedule", "constant"),
]


def run(*argv) -> str:
    """Run a command that must succeed; return its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main([str(word) for word in argv])
    return out.getvalue()


def fails(capsys, *argv, code: int = 2) -> str:
    """Run a command that must fail; return its one line of complaint."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in argv])
    assert end.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("lcr-fast")
    return lines[0]


def read_csv(path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def is_untouched(folder) -> bool:
    """Whether a folder and its siblings hold nothing, not even something half-written."""
    left = [path for path in folder.parent.iterdir() if folder.name in path.name]
    return not left or (left == [folder] and not any(folder.iterdir()))


def rewrite(path, edit) -> None:
    """Let a function change the bytes of a file, as a bytearray."""
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)
