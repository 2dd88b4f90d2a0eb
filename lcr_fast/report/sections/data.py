"""The data, and the settings."""

from __future__ import annotations

from .. import charts
from ..contents import Page
from ..html import Html, join, raw, table, tag


def measured(page: Page) -> Html | None:
    if page.facts is None:
        return None
    rows = [[f"{fact.about}: {fact.name}", fact.text] for fact in page.facts.facts]
    histograms = [
        tag("div", tag("h3", each.title), charts.bars(each.bins, each.counts))
        for each in page.facts.histograms
    ]
    notes = tag("ul", [tag("li", raw(note, 400)) for note in page.facts.notes])
    return join(
        tag("div", tag("div", histograms, class_="grid2"), class_="card"),
        tag("details", tag("summary", "All that was measured"), table(["", ""], rows)),
        tag("details", tag("summary", "What the reader kept and dropped"), notes),
    )


def settings(page: Page) -> Html | None:
    if not page.run.configs:
        return None
    return join(
        [
            tag(
                "details",
                tag("summary", f"{section} config"),
                table(["", ""], [(name, raw(str(value))) for name, value in values.items()]),
            )
            for section, values in page.run.configs.items()
        ]
    )
