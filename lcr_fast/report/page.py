"""The page of a run: one HTML file without script, network or fonts of its own."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path

from lcr_fast.storage import replacing

from .contents import Page
from .html import Html, raw, tag
from .sections import data, models, results, users

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched, nothing runs
# In the order of the page: its anchor, its title, and what makes it, None where there is nothing.
_SECTIONS: tuple[tuple[str, str, Callable[[Page], Html | None]], ...] = (
    ("summary", "At a glance", results.summary),
    ("results", "Results", results.by_protocol),
    ("differences", "Against Base", results.against_base),
    ("searches", "What searches are worth", results.searches),
    ("users", "A few users", users.a_few),
    ("training", "Training", models.training),
    ("inside", "Inside the models", models.inside),
    ("studies", "Depth, strata, latency", models.tables),
    ("data", "The data", data.measured),
    ("settings", "Settings", data.settings),
)


def write_page(page: Page, out: Path) -> None:
    """Write the page, atomically."""
    with replacing(out) as temporary:
        temporary.write_text(render(page), encoding="utf-8")


def render(page: Page) -> str:
    """Lay the page out; the same run gives the same bytes."""
    style = importlib.resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    sections = [(name, title, make(page)) for name, title, make in _SECTIONS]
    sections = [(name, title, content) for name, title, content in sections if content]
    source = page.facts.source if page.facts else "unknown data"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{source}: {page.run.folder.resolve().name}"),
        tag("style", Html(style)),
    )
    header = tag(
        "header",
        tag(
            "div",
            tag("h1", "A run on ", raw(source)),
            tag("p", _introduction(page), class_="quiet"),
            tag("nav", [tag("a", title, href=f"#{name}") for name, title, _ in sections]),
        ),
    )
    body = [tag("section", tag("h2", title), content, id=name) for name, title, content in sections]
    footer = tag(
        "footer",
        f"Folder {page.run.folder.resolve().name}, data {(page.run.ranks.data or 'unknown')[:12]}. "
        "Written by lcr-fast report; the file needs no network.",
    )
    content = tag("html", head, tag("body", header, tag("main", body), footer), lang="en")
    return f"<!doctype html>\n{content}\n"


def _introduction(page: Page) -> str:
    models, counts = len(page.run.models), len(page.run.baselines)
    ranks = page.run.ranks
    n = len(next(iter(ranks.by_protocol.values())))
    told = f"{models} models" + (f" and {counts} baselines that count" if counts else "")
    return (
        f"{told}, {n:,} test users. Intervals hold 95 %: a bootstrap over users, paired where two "
        "models are compared."
    )
