"""The page of a run: one HTML file without script, network or fonts of its own."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lcr_fast.experiments.comparison import VARIANTS
from lcr_fast.experiments.tables import BASE, protocol_titles
from lcr_fast.storage import replacing
from lcr_fast.training.baselines import TITLES
from lcr_fast.training.ranks import differences
from lcr_fast.training.trainer import VALIDATION, validation_scores

from . import charts
from .charts import Line, Row
from .facts import Facts, duration
from .html import Html, join, raw, table, tag
from .run import Run
from .users import Past, Place, User

_METRIC = "ndcg@5"
_COLUMNS = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr")
_GROUPS = {
    "all": "all",
    "repeat": "seen before",
    "new": "new",
    "covered": "training target too",
    "uncovered": "no training target",
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched, nothing runs
_SHORT = {"sampled": "sampled", "impressions": "impressions", "catalogue": "whole catalogue"}


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


# -- results --------------------------------------------------------------------------------------


def _value(rows: list[dict[str, Any]], protocol: str, targets: str, metric: str) -> dict | None:
    key = {"protocol": protocol, "targets": targets, "metric": metric}
    row = next((r for r in rows if all(r[k] == v for k, v in key.items())), None)
    return row if row and row["n"] else None


def _colour(name: str) -> str:
    base = name.split(",")[0]
    return base if base in VARIANTS else "count" if base in TITLES else "other"


def _number(row: dict | None, sign: str = "") -> Html:
    return join("" if row is None else f"{row['mean']:{sign}.3f}")


def _cell(row: dict | None, sign: str = "") -> Html:
    if row is None:
        return join("")
    low, high = f"{row['low']:{sign}.3f}", f"{row['high']:{sign}.3f}"
    return join(f"{row['mean']:{sign}.3f}", tag("small", f"[{low}, {high}]"))


def _text(row: dict[str, Any], sign: str = "") -> str:
    return f"{row['mean']:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"


def _rows(
    titled: dict[str, tuple[str, list[dict[str, Any]]]], protocol: str, targets: str, sign: str = ""
) -> list[Row]:
    found = []
    for name, (title, rows) in titled.items():
        if row := _value(rows, protocol, targets, _METRIC):
            values = (row["mean"], row["low"], row["high"])
            found.append(Row(title.strip(), _colour(name), *values, _text(row, sign)))
    return found


def _summary(page: Page) -> Html:
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
            title = models[compared]["title"].strip()
            tiles.append((f"{row['mean']:+.3f}", f"{title} less Base; its interval {holds} 0"))
    tiles.append((f"{len(page.run.ranks.by_protocol[protocol]):,}", "test users"))
    if page.facts:
        sizes = {fact.name: fact.text for fact in page.facts.facts}
        tiles.append((sizes["items"], "items"))
        tiles.append((sizes["searches"], "searches"))
    drawn = [tag("div", tag("b", value), tag("span", what), class_="tile") for value, what in tiles]
    about = f"NDCG@5, {page.protocols[protocol]}."
    warned = [tag("p", f"{text}.", class_="warning") for text in (page.facts or _NO_FACTS).warnings]
    return join(tag("p", about, class_="quiet"), tag("div", drawn, class_="tiles"), warned)


_NO_FACTS = Facts("", [], [], [], [])


def _results(page: Page) -> Html:
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


def _differences(page: Page) -> Html | None:
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
            rows = _rows(compared, protocol, group, "+")
            near = [row for row in rows if row.colour != "count"]
            if near:
                kind = "all targets" if group == "all" else "new targets"
                parts.append(
                    tag(
                        "div",
                        tag("h3", f"{_SHORT[protocol]}, {kind}"),
                        charts.intervals(near, zero=True, sign="+"),
                        class_="card",
                        title=title,
                    )
                )
    about = (
        "NDCG@5 of each model less that of Base, user by user. What crosses the line at 0 may be "
        "chance."
    )
    return join(tag("p", about, class_="quiet"), parts)


def _searches(page: Page) -> Html | None:
    compared: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    than = {"others": "those of other users", "none": "none", "training": "none, as trained"}
    for name, result in page.run.models.items():
        for key, what in than.items():
            if rows := result.get("searches", {}).get(key):
                compared[f"{name},{key}"] = (f"{result['title'].strip()}: {what}", rows)
    parts = [
        tag(
            "div",
            tag("h3", f"{_SHORT[protocol]}"),
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


# -- inside the models ----------------------------------------------------------------------------


def _training(page: Page) -> Html | None:
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
        drawn.append(Line(result["title"].strip(), _colour(name), epochs, scores))
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
    return charts.legend([(r["title"].strip(), _colour(name)) for name, r in models.items()])


def _inside(page: Page) -> Html | None:
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
                        Line(result["title"].strip(), _colour(name), x, y, dotted=state == "a")
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


def _tables(page: Page) -> Html | None:
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


# -- users ----------------------------------------------------------------------------------------


def _users(page: Page) -> Html | None:
    if not page.users or page.shown is None:
        return None
    title = page.run.models[page.shown]["title"].strip()
    steps = len(page.users[0].searches[0].looks) if page.users[0].searches else 0
    about = f"Users of {title}, some of them extremes. " + (
        "Columns 1, 2, … say what per cent of its attention the other stream gives, in each "
        "reasoning step; t, how much of the stream the target reads."
        if steps
        else "Column t says what per cent of the stream the target reads; there is no step."
    )
    return join(
        tag("p", about, class_="quiet"),
        [_user(user, place < 2) for place, user in enumerate(page.users)],
    )


def _user(user: User, opened: bool) -> Html:
    before, after = user.ranks
    kind = "up" if after < before else "down" if after > before else "quiet"
    summary = tag(
        "summary",
        tag("span", "User ", raw(user.user, 40)),
        tag("span", f"rank {before} → {after} of {user.candidates}", class_=f"move {kind}"),
        tag("span", user.why, class_="chip"),
        tag("span", "seen before" if user.repeat else "new to the user", class_="chip"),
    )
    target = tag(
        "p", "Target: ", tag("b", raw(user.target)), ", ", _times(user.known), " in training"
    )
    histories = tag(
        "div",
        _history("Searches, latest first", user.searches, user.earlier[1]),
        _history("Recommendation history, latest first", user.events, user.earlier[0]),
        class_="grid2",
    )
    lists = tag(
        "div",
        _list("Before reasoning", user.before),
        _list("After reasoning", user.after),
        class_="grid2",
    )
    opening = {"open": ""} if opened else {}
    return tag("details", summary, target, histories, lists, class_="user", **opening)


def _times(count: int) -> str:
    return f"{count:,} event{'' if count == 1 else 's'}"


def _history(title: str, past: Sequence[Past], earlier: int) -> Html:
    steps = len(past[0].looks) if past else 0
    head = tag(
        "li",
        tag("span"),
        tag("div", [tag("b", k + 1) for k in range(steps)], tag("b", "t"), class_="looks head"),
    )
    most = max([look for each in past for look in (*each.looks, each.pooled)] + [1e-9])
    entries = [
        tag(
            "li",
            tag(
                "div",
                raw(each.text) if each.text else tag("span", "(no term)", class_="quiet"),
                tag("span", "announces", class_="chip") if each.relevant else None,
                tag("span", f" {each.times} times", class_="quiet") if each.times > 1 else None,
                tag("small", f"{duration(each.before)} before", _clicked(each.clicks)),
            ),
            tag("div", [_look(look, most) for look in (*each.looks, each.pooled)], class_="looks"),
        )
        for each in reversed(past)
    ]
    more = tag("p", f"{earlier:,} earlier ones are read too", class_="note") if earlier else None
    return tag("div", tag("h3", title), tag("ul", head, entries, class_="past"), more)


def _clicked(clicks: Sequence[str]) -> Html | None:
    if not clicks:
        return None
    named = [join(", " if place else "", raw(item, 40)) for place, item in enumerate(clicks)]
    return join("; clicked ", named)


def _look(share: float, most: float) -> Html:
    heat = share / most
    return tag(
        "b",
        f"{100 * share:.0f}",
        style=f"--a:{0.05 + 0.9 * heat:.2f}",
        class_="full" if heat > 0.55 else None,
        title=f"{share:.1%}",
    )


def _list(title: str, places: Sequence[Place]) -> Html:
    return tag(
        "div",
        tag("h3", title),
        tag(
            "ol",
            [
                tag(
                    "li",
                    tag("span", raw(place.item, 60)),
                    tag("small", _moved(place.rise), " ", _times(place.known)),
                    class_="target" if place.is_target else None,
                )
                for place in places
            ],
            class_="ranked",
        ),
    )


def _moved(rise: int) -> Html | None:
    if not rise:
        return None
    return tag(
        "span", f"{'▲' if rise > 0 else '▼'}{abs(rise)}", class_="up" if rise > 0 else "down"
    )


# -- the data and the settings --------------------------------------------------------------------


def _data(page: Page) -> Html | None:
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


def _settings(page: Page) -> Html | None:
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


# In the order of the page: its anchor, its title, and what makes it, None where there is nothing.
_SECTIONS: tuple[tuple[str, str, Callable[[Page], Html | None]], ...] = (
    ("summary", "At a glance", _summary),
    ("results", "Results", _results),
    ("differences", "Against Base", _differences),
    ("searches", "What searches are worth", _searches),
    ("users", "A few users", _users),
    ("training", "Training", _training),
    ("inside", "Inside the models", _inside),
    ("studies", "Depth, strata, latency", _tables),
    ("data", "The data", _data),
    ("settings", "Settings", _settings),
)
