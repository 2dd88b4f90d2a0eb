"""Make the page of a run's folder: read it, look at its data and at a few users, write the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lcr_fast.data.prepared import PreparedData
from lcr_fast.training.models import load_model
from lcr_fast.training.trainer import MODEL, validation_scores

from .contents import Page
from .facts import facts_of
from .page import write_page
from .run import CONTROL, Run, find_data, read_run
from .users import User, look_at_users


def report(
    folder: Path,
    out: Path,
    *,
    data: Path | None = None,
    model: str | None = None,
    n_users: int = 6,
    any_data: bool = False,
) -> list[str]:
    """Write the page and return what it lacks, a line each.

    ``data`` are by default those in the run's folder; without any, the page has neither facts nor
    users. ``model`` names the one whose users are shown; by default of those that reason, controls
    aside, the one that validation ranks first. Raises ValueError where the folder is no run, for
    other data, and for an unknown model.
    """
    run = read_run(folder)
    if model is not None and model not in run.models:
        raise ValueError(f"--model must be one of {', '.join(run.models)}, got {model!r}")
    if n_users < 0:
        raise ValueError(f"--users must be at least 0, got {n_users}")
    prepared = find_data(run, data, any_data)
    if prepared is None:
        write_page(Page(run, None, [], None), out)
        return ["without --data there are no facts of the data and no users on the page"]
    shown = model or _best(run.models)
    users = _look(run, prepared, shown, n_users, any_data)
    write_page(Page(run, facts_of(prepared), users, shown), out)
    if n_users and not users:
        return ["no test user has both histories and negatives: there are none on the page"]
    return []


def _best(models: dict[str, dict[str, Any]]) -> str:
    """Choose a model by validation: of those that reason, then of any; no control."""
    named = {n: r for n, r in models.items() if not n.startswith(CONTROL)} or models
    named = {n: r for n, r in named.items() if r.get("distances", {}).get("a_rec")} or named
    return max(named, key=lambda name: max(validation_scores(named[name]), default=0.0))


def _look(run: Run, data: PreparedData, name: str, n: int, any_data: bool) -> list[User]:
    path = run.folder / name / MODEL
    if not n or not path.is_file():
        return []
    return look_at_users(load_model(path, data, "cpu", any_data=any_data), data, n)
