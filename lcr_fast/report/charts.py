"""Charts of a page: rows of intervals and bars in HTML, which any screen can read, lines in SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .html import Html, join, tag

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 34


class Row(NamedTuple):
    """A mean with its interval, and the name of its colour (a class of the page's style)."""

    label: str
    colour: str
    mean: float
    low: float
    high: float
    text: str


class Line(NamedTuple):
    """Points that a line joins; ``dotted`` sets it apart from another of the same colour."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    dotted: bool = False


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Choose at most ``most`` + 1 round numbers that span low..high."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0]
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def labels(values: Sequence[float], sign: str = "") -> list[str]:
    """Spell ticks with as many digits as tell them apart."""
    for digits in range(7):
        texts = [f"{0.0 if abs(value) < 1e-12 else value:{sign},.{digits}f}" for value in values]
        exact = all(
            abs(round(value, digits) - value) <= 1e-9 * max(abs(value), 1) for value in values
        )
        if exact and len(set(texts)) == len(texts):
            return texts
    return [f"{value:{sign}.4g}" for value in values]


def intervals(rows: Sequence[Row], *, zero: bool = False, sign: str = "") -> Html:
    """Draw a dot and an interval a row, on one scale; with ``zero`` a line there."""
    scale = ticks(
        min([row.low for row in rows] + [0.0] * zero),
        max([row.high for row in rows] + [0.0] * zero),
    )
    low, span = scale[0], scale[-1] - scale[0]

    def place(value: float) -> str:
        return f"{100 * (value - low) / span:.2f}%"

    marks = [
        tag(
            "i",
            class_="zero" if zero and abs(value) < 1e-12 else "grid",
            style=f"left:{place(value)}",
        )
        for value in scale
    ]
    drawn = [
        tag(
            "div",
            tag("span", row.label, class_="name"),
            tag(
                "span",
                marks,
                tag(
                    "i",
                    class_="ci",
                    style=f"left:{place(row.low)};width:{100 * (row.high - row.low) / span:.2f}%",
                ),
                tag("i", class_="dot", style=f"left:{place(row.mean)}"),
                class_="track",
                aria_hidden="true",
            ),
            tag("span", row.text, class_="value"),
            class_=f"row {row.colour}",
        )
        for row in rows
    ]
    shown = labels(scale, sign)
    axis = tag(
        "div",
        tag("span", class_="name"),
        tag(
            "span",
            [
                tag("b", text, style=f"left:{place(value)}")
                for value, text in zip(scale, shown, strict=True)
            ],
            class_="track",
        ),
        tag("span", class_="value"),
        class_="row axis",
        aria_hidden="true",
    )
    return tag("div", drawn, axis, class_="intervals")


def bars(names: Sequence[str], counts: Sequence[int]) -> Html:
    """Draw a histogram, a bar a name."""
    most = max([*counts, 1])
    return tag(
        "div",
        [
            tag(
                "div",
                tag("span", name, class_="name"),
                tag("span", tag("i", style=f"width:{100 * count / most:.2f}%"), class_="track"),
                tag("span", f"{count:,}", class_="value"),
                class_="row",
            )
            for name, count in zip(names, counts, strict=True)
        ],
        class_="bars",
    )


def lines(drawn: Sequence[Line], x_title: str, y_title: str, *, whole: bool = False) -> Html:
    """Draw lines over a common scale; ``whole`` marks integers alone on the x axis."""
    every_x = [x for line in drawn for x in line.x]
    every_y = [y for line in drawn for y in line.y if math.isfinite(y)]
    x_ticks = ticks(min(every_x), max(every_x), 4)
    if whole:
        x_ticks = [float(x) for x in range(math.floor(min(every_x)), math.ceil(max(every_x)) + 1)]
        x_ticks = x_ticks[:: max(len(x_ticks) // 6, 1)]
    y_ticks = ticks(min(every_y, default=0), max(every_y, default=1), 4)
    left, right = (
        (min(every_x), max(max(every_x), min(every_x) + 1e-9))
        if whole
        else (x_ticks[0], x_ticks[-1])
    )
    low, high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[str, str]:
        across = (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT) + _LEFT
        down = (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM) + _TOP
        return f"{across:.1f}", f"{down:.1f}"

    grid = []
    for y, text in zip(y_ticks, labels(y_ticks), strict=True):
        _, down = at(left, y)
        grid.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=down, y2=down, class_="grid"))
        grid.append(tag("text", text, x=_LEFT - 6, y=down, dy="0.32em", text_anchor="end"))
    for x, text in zip(x_ticks, labels(x_ticks), strict=True):
        across, _ = at(x, low)
        grid.append(tag("text", text, x=across, y=_HEIGHT - _BOTTOM + 15, text_anchor="middle"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    grid.append(tag("text", x_title, x=middle, y=_HEIGHT - 4, text_anchor="middle", class_="title"))
    curves = []
    for line in drawn:
        points = [at(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        style = f"{line.colour} dotted" if line.dotted else line.colour
        joined = " ".join(",".join(point) for point in points)
        curves.append(
            tag(
                "g",
                tag("polyline", points=joined),
                [tag("circle", cx=x, cy=y, r=2.4) for x, y in points],
                class_=style,
            )
        )
    svg = tag(
        "svg",
        grid,
        curves,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{y_title} against {x_title}",
    )
    return tag("figure", tag("figcaption", y_title), svg, class_="lines")


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """Name the colours: (label, colour)."""
    return tag(
        "p",
        [join(tag("span", tag("i", class_=colour), label), " ") for label, colour in entries],
        class_="legend",
    )
