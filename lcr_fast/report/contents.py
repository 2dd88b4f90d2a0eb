"""What a page can show of a run."""

from __future__ import annotations

from typing import Any, NamedTuple

from lcr_fast.experiments.comparison import VARIANTS
from lcr_fast.experiments.tables import protocol_titles
from lcr_fast.training.baselines import TITLES

from .facts import Facts
from .run import Run
from .users import User


class Page(NamedTuple):
    """What a page can show; ``facts`` and ``users`` need the data."""

    run: Run
    facts: Facts | None
    users: list[User]
    shown: str | None  # the model whose users are shown

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        return {**self.run.baselines, **self.run.models}

    @property
    def protocols(self) -> dict[str, str]:
        titles = protocol_titles(self.run.ranks.n_negatives)
        return {name: titles[name] for name in titles if name in self.run.ranks.by_protocol}


def colour(name: str) -> str:
    """Name the colour of a model or baseline in every chart."""
    base = name.split(",")[0]
    return base if base in VARIANTS else "count" if base in TITLES else "other"
