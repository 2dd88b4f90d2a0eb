"""A few users: their histories, where the model looks, their lists before and after steps."""

from __future__ import annotations

from collections.abc import Sequence

from ..contents import Page
from ..facts import duration
from ..html import Html, join, raw, tag
from ..users import Past, Place, User


def a_few(page: Page) -> Html | None:
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
