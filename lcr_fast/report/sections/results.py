"""What the models reach: at a glance, in full, against Base, and by what searches are worth."""

from __future__ import annotations

import math
from typing import Any

from lcr_fast.experiments.tables import BASE, with_interval
from lcr_fast.training.ranks import differences

from .. import charts
from ..charts import Row
from ..contents import Page, colour
from ..html import Html, join, table, tag

_METRIC = "ndcg@5"
_COLUMNS = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr")
_GROUPS = {
    "all": "all",
    "repeat": "seen before",
    "new": "new",
    "covered": "training target too",
    "uncovered": "no training target",
}
_SHORT = {"sampled": "sampled", "impressions": "impressions", "catalogue": "whole catalogue"}


def _value(rows: list[dict[str, Any]], protocol: str, targets: str, metric: str) -> dict | None:
    key = {"protocol": protocol, "targets": targets, "metric": metric}
    row = next((r for r in rows if all(r[k] == v for k, v in key.items())), None)
    return row if row and row["n"] else None


def _number(row: dict | None, sign: str = "") -> Html:
    return join("" if row is None else f"{row['mean']:{sign}.3f}")


def _cell(row: dict | None, sign: str = "") -> Html:
    if row is None:
        return join("")
    mean, interval = with_interval(row, sign).split(" ", 1)
    return join(mean, tag("small", interval))


def _rows(
    titled: dict[str, tuple[str, list[dict[str, Any]]]], protocol: str, targets: str, sign: str = ""
) -> list[Row]:
    found = []
    for name, (title, rows) in titled.items():
        if row := _value(rows, protocol, targets, _METRIC):
            # No interval is drawn as one without a width.
            low, high = (row["mean"] if math.isnan(v) else v for v in (row["low"], row["high"]))
            text = with_interval(row, sign)
            found.append(Row(title.strip(), colour(name), row["mean"], low, high, text))
    return found


def summary(page: Page) -> Html:
    protocol = next(iter(page.protocols))
    scores = {
        name: row["mean"]
        for name, result in page.results.items()
        if (row := _value(result["rows"], protocol, "all", _METRIC))
    }
    tiles = []
    for kind, names in (("model", page.run.models), ("baseline that counts", page.run.baselines)):
        if named := [name for name in names if name in scores]:
            best = max(named, key=lambda name: scores[name])
            title = page.results[best]["title"].strip()
            tiles.append((f"{scores[best]:.3f}", f"best {kind}: {title}"))
    models = page.run.models
    compared = "lcr" if "lcr" in models else page.shown
    if compared and BASE in models and compared != BASE:
        rows = differences([(models[compared]["ranks"], models[BASE]["ranks"])])
        if row := _value(rows, protocol, "all", _METRIC):
            holds = "leaves out" if row["low"] > 0 or row["high"] < 0 else "holds"
            said = "one user has no interval" if row["n"] == 1 else f"its interval {holds} 0"
            title = models[compared]["title"].strip()
            tiles.append((f"{row['mean']:+.3f}", f"{title} less Base; {said}"))
    tiles.append((f"{len(page.run.ranks.by_protocol[protocol]):,}", "test users"))
    if page.facts:
        sizes = {fact.name: fact.text for fact in page.facts.facts}
        tiles.append((sizes["items"], "items"))
        tiles.append((sizes["searches"], "searches"))
    drawn = [tag("div", tag("b", value), tag("span", what), class_="tile") for value, what in tiles]
    about = f"NDCG@5, {page.protocols[protocol]}."
    warnings = page.facts.warnings if page.facts else []
    warned = [tag("p", f"{text}.", class_="warning") for text in warnings]
    return join(tag("p", about, class_="quiet"), tag("div", drawn, class_="tiles"), warned)


def by_protocol(page: Page) -> Html:
    titled = {name: (r["title"], r["rows"]) for name, r in page.results.items()}
    parts = []
    for protocol, title in page.protocols.items():
        rows = _rows(titled, protocol, "all")
        every = _value(page.run.models[next(iter(page.run.models))]["rows"], protocol, "all", "mrr")
        n = every["n"] if every else 0
        metrics = table(
            ["model", *(name.upper() for name in _COLUMNS)],
            [
                [text.strip(), *(_number(_value(r, protocol, "all", m)) for m in _COLUMNS)]
                for text, r in titled.values()
            ],
        )
        kinds = [group for group in _GROUPS if any(_rows(titled, protocol, group))]
        strata = table(
            ["model", *(_GROUPS[group] for group in kinds)],
            [
                [text.strip(), *(_cell(_value(r, protocol, group, _METRIC)) for group in kinds)]
                for text, r in titled.values()
            ],
        )
        parts.append(
            tag(
                "div",
                tag("h3", f"NDCG@5: {title} ({n:,} users)"),
                charts.intervals(rows),
                tag("details", tag("summary", "Other metrics"), metrics),
                tag("details", tag("summary", "By kind of target"), strata),
                class_="card",
            )
        )
    return join(parts)


def against_base(page: Page) -> Html | None:
    models = page.run.models
    if BASE not in models or len(models) < 2:
        return None
    base = models[BASE]["ranks"]
    compared = {
        name: (result["title"], differences([(result["ranks"], base)]))
        for name, result in models.items()
        if name != BASE
    }
    parts = []
    for protocol, title in page.protocols.items():
        for group in ("all", "new"):
            if (
                group == "new"
                and not page.run.ranks.groups.get("repeat", base.groups["all"] & False).any()
            ):
                continue
            if rows := _rows(compared, protocol, group, "+"):
                kind = "all targets" if group == "all" else "new targets"
                parts.append(
                    tag(
                        "div",
                        tag("h3", f"{_SHORT[protocol]}, {kind}"),
                        charts.intervals(rows, zero=True, sign="+"),
                        class_="card",
                        title=title,
                    )
                )
    about = (
        "NDCG@5 of each model less that of Base, user by user. What crosses the line at 0 may be "
        "chance."
    )
    return join(tag("p", about, class_="quiet"), parts)


def searches(page: Page) -> Html | None:
    compared: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    than = {"others": "those of other users", "none": "none", "training": "none, as trained"}
    for name, result in page.run.models.items():
        for key, what in than.items():
            if rows := result.get("searches", {}).get(key):
                compared[f"{name},{key}"] = (f"{result['title'].strip()}: {what}", rows)
    parts = [
        tag(
            "div",
            tag("h3", _SHORT[protocol]),
            charts.intervals(rows, zero=True, sign="+"),
            class_="card",
        )
        for protocol in page.protocols
        if (rows := _rows(compared, protocol, "all", "+"))
    ]
    if not parts:
        return None
    about = (
        "NDCG@5 of a model with a user's own searches, less that of the same model with others, "
        "over the users that searched: what the searches are worth to it."
    )
    return join(tag("p", about, class_="quiet"), parts)
