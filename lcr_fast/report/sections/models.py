"""Inside the models: how they learned, what their states do, and the tables of studies."""

from __future__ import annotations

import math
from typing import Any

from lcr_fast.training.trainer import VALIDATION, validation_scores

from .. import charts
from ..charts import Line
from ..contents import Page, colour
from ..html import Html, join, raw, table, tag


def training(page: Page) -> Html | None:
    models = {name: r for name, r in page.run.models.items() if r.get("history")}
    if not models:
        return None
    record = next(iter(models.values()))["history"][0]
    metric = next((key for key in record if key.startswith(VALIDATION)), VALIDATION)
    title = f"validation {metric.removeprefix(VALIDATION).upper()}"
    drawn, seconds = [], []
    for name, result in models.items():
        scores = validation_scores(result)
        epochs = [
            float(record.get("epoch", place)) for place, record in enumerate(result["history"])
        ]
        drawn.append(Line(result["title"].strip(), colour(name), epochs, scores))
        seconds.append(
            [
                result["title"].strip(),
                f"{len(epochs) - 1}",
                f"{max(scores):.3f}",
                f"{result['seconds']:,.0f} s",
            ]
        )
    times = table(["model", "epochs", f"best {title}", "training"], seconds)
    drawn_and_told = tag(
        "div", charts.lines(drawn, "epoch", title, whole=True), times, class_="grid2"
    )
    return tag("div", drawn_and_told, _legend(models), class_="card")


def _legend(models: dict[str, dict[str, Any]]) -> Html:
    return charts.legend([(r["title"].strip(), colour(name)) for name, r in models.items()])


def inside(page: Page) -> Html | None:
    parts = []
    models = {name: r for name, r in page.run.models.items() if r.get("distances", {}).get("h_rec")}
    figures = []
    for stream, title in (("search", "search stream"), ("rec", "recommendation stream")):
        drawn = []
        for name, result in models.items():
            for state, first in (("h", 0), ("a", 1)):
                y = result["distances"].get(f"{state}_{stream}", [])
                x = [float(k) for k in range(first, first + len(y))]
                if y:
                    drawn.append(
                        Line(result["title"].strip(), colour(name), x, y, dotted=state == "a")
                    )
        if drawn:
            about = f"distance to the target, {title}"
            figures.append(charts.lines(drawn, "reasoning step", about, whole=True))
    if figures:
        about = (
            "Mean distance to the target of what a stream's states pool to at it. Solid: after a "
            "step's cross-attention; dotted: before it."
        )
        parts.append(
            tag("div", tag("h3", "Do states approach the target?"), tag("p", about, class_="quiet"),
                tag("div", figures, class_="grid2"), _legend(models), class_="card")
        )  # fmt: skip
    shares = {
        result["title"].strip(): result["relevance"]
        for result in page.run.models.values()
        if result.get("relevance", {}).get("n")
    }
    if shares:
        chance = next(iter(shares.values()))["chance"]
        rows = [
            [
                title,
                *("" if math.isnan(share[k]) else f"{share[k]:.3f}" for k in ("target", "cross")),
            ]
            for title, share in shares.items()
        ]
        about = (
            "The data say which searches announce what a user turns to. Shares of attention that "
            f"go to them; {chance:.3f} would be chance."
        )
        parts.append(
            tag(
                "div",
                tag("h3", "Attention on relevant searches"),
                tag("p", about, class_="quiet"),
                table(["model", "of the target", "of the recommendation stream"], rows),
                class_="card",
            )
        )
    return join(parts) if parts else None


def tables(page: Page) -> Html | None:
    """Show the tables that studies leave: depth, strata, latency."""
    parts = [
        tag(
            "details",
            tag("summary", each.title),
            table(
                [raw(cell) for cell in each.head],
                [[_short(cell) for cell in row] for row in each.rows],
            ),
            tag("p", f"{each.left_out:,} more rows", class_="note") if each.left_out else None,
        )
        for each in page.run.tables
    ]
    return join(parts) if parts else None


def _short(cell: str) -> Html:
    try:
        return join(f"{float(cell):.4g}")
    except ValueError:
        return raw(cell)
