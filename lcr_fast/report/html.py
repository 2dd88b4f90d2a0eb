"""HTML built from elements, so that no text of the data can become markup.

A child that is not :class:`Html` is text and is escaped, wherever it came from.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

_VOID = frozenset({"br", "meta", "line", "circle", "polyline", "rect"})
# Letters that show nothing, or turn the text around them: shown as what they are not.
_HIDDEN = dict.fromkeys(
    [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F),
     *range(0x2066, 0x206A), 0xFEFF, *range(0xFFF9, 0xFFFC)],
    "\N{REPLACEMENT CHARACTER}",
)  # fmt: skip
_HIDDEN |= dict.fromkeys(map(ord, "\t\n\r"), " ")
_LONGEST = 120


class Html(str):
    """Markup, made by this module alone."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Iterable[Child] | None"


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """Make an element; attributes are named as in HTML, ``class_`` and ``_`` for ``-``.

    None leaves a child or an attribute out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given}/>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Put elements and texts one behind the other."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str | int | float):
            parts.append(html.escape(str(child)))
        elif child is not None:
            parts.append(join(*child))
    return Html("".join(parts))


def raw(text: str, longest: int = _LONGEST) -> Html:
    """Show an id or a query of the data: isolated, without hidden letters, not too long."""
    shown = text.translate(_HIDDEN)
    if len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return tag("bdi", shown)


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]]) -> Html:
    """Make a table that scrolls sideways in itself where the screen is narrow."""
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])),
            tag("tbody", [
                tag("tr", [
                    tag("th", cell, scope="row") if not place else tag("td", cell)
                    for place, cell in enumerate(row)
                ])
                for row in rows
            ]),
            class_="numbers",
        ),
        class_="scroll",
        tabindex=0,
    )  # fmt: skip
