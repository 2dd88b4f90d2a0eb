"""Tables and plots of the JSON files that `pytest benchmarks --benchmark --benchmark-json` writes.

    python benchmarks/report.py FILE.json ... [--plots FOLDER]

prints a table for each group of benchmarks, with one row a case: our median with its quartiles, and
how many times longer each of the others takes; below 1, they are faster. Files of
`benchmarks/gpu_check.py` also say what else was checked. No number in the tables is made anywhere
else.
"""

import argparse
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from lcr_fast.experiments.plots import new_figure, save_figure

OURS = "lcr_fast"
# Marks of the others in every plot; an unknown name takes what is left.
_STYLES = {
    "eager": "#4477aa",
    "torch.compile": "#ee6677",
    "captured": "#009988",
    "captured eager": "#aa3377",
    "repeated history": "#ccbb44",
    "N calls": "#ccbb44",
}
_OURS_COLOUR = "#228833"
_SPARE = ("#66ccee", "#888888", "#ee8866", "#332288", "#661100")
_MOST_SERIES = 4  # in one panel
_MOST_LINES = 12  # in one panel, of all series


class Entry(NamedTuple):
    """One benchmark: its case, and seconds of everyone who took part, ours under ``OURS``."""

    group: str
    case: str
    axes: dict[str, Any]
    medians: dict[str, float]
    quartiles: tuple[float, float]  # ours
    info: dict[str, Any]

    @property
    def ours(self) -> float:
        return self.medians[OURS]

    def of_everyone(self, key: str) -> dict[str, Any]:
        """Look up a number that was kept for each variant; ours stands under an empty name."""
        return {name or OURS: value for name, value in self.info.get(key, {}).items()}


class Check(NamedTuple):
    """Something else that was run on the machine, and how it ended."""

    name: str
    status: str
    seconds: float
    summary: str


class Run(NamedTuple):
    """One file: the machine, and all that was measured on it."""

    name: str
    about: str
    ceilings: dict[str, float]
    entries: list[Entry]
    checks: list[Check]


def read_run(path: str | Path) -> Run:
    """Read a benchmark file; raises ValueError, in one sentence, if it is not one."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    try:
        machine = dict(values["machine_info"])
        ceilings = machine.pop("ceilings", {})
        command = machine.pop("command", None)
        about = ", ".join(f"{key} {value}" for key, value in machine.items())
        about += f"; {values['datetime'][:10]}" + (f"; {command}" if command else "")
        entries = [_entry(raw) for raw in values["benchmarks"]]
        checks = [
            Check(*(raw[field] for field in Check._fields)) for raw in values.get("checks", [])
        ]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a file of pytest-benchmark") from None
    return Run(path.stem, about, ceilings, entries, checks)


def _entry(raw: dict[str, Any]) -> Entry:
    info, stats = raw["extra_info"], raw["stats"]
    others = {name: other["median"] for name, other in info.get("others", {}).items()}
    return Entry(
        raw["group"] or "other",
        str(info.get("case", raw["name"])),
        info.get("axes", {}),
        {OURS: stats["median"], **others},
        (stats["q1"], stats["q3"]),
        info,
    )


# -- tables ---------------------------------------------------------------------------------------


def quantity(value: float, units: Iterable[tuple[str, float]]) -> str:
    """Format three digits in the first unit that is not larger than the rounded value."""
    unit, scale = "", 1.0
    for unit, scale in units:  # noqa: B007
        if abs(value) >= 0.9995 * scale:
            break
    return f"{value / scale:.3g} {unit}"


def duration(seconds: float) -> str:
    return quantity(seconds, (("s", 1), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)))


def size(n_bytes: float) -> str:
    return quantity(n_bytes, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)))


def ratio(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.2g}x"


def report(run: Run) -> str:
    """Write one run as Markdown: the machine, then a table a group."""
    parts = [run.about + "."]
    if run.checks:
        parts.append(f"**Checks**\n\n{_check_table(run.checks)}")
    for group, entries in _groups(run).items():
        parts.append(f"**{group[:1].upper()}{group[1:]}**\n\n{_time_table(entries)}")
        for entry in entries:
            for name, error in entry.info.get("not captured", {}).items():
                parts.append(f"{entry.case}: {name}: {error}")
        if any(entry.info.get("percentiles") for entry in entries):
            parts.append(f"Percentiles:\n\n{_percentile_table(entries)}")
        for key, title in (("peak bytes", "Peak memory"), ("saved bytes", "Saved for backward")):
            if table := _size_table(entries, key):
                parts.append(f"{title}:\n\n{table}")
    return "\n\n".join(parts)


def _groups(run: Run) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in run.entries:
        groups.setdefault(entry.group, []).append(entry)
    return groups


def _markdown(rows: list[list[str]], headers: list[str]) -> str:
    """Make a table without the columns that are empty."""
    kept = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    cells = [[row[i] for i in kept] for row in rows]
    names = [headers[i] for i in kept]
    return tabulate(cells, names, tablefmt="github", disable_numparse=True)


def _others(entries: list[Entry]) -> list[str]:
    return [n for n in dict.fromkeys(itertools.chain(*(e.medians for e in entries))) if n != OURS]


def _check_table(checks: list[Check]) -> str:
    rows = [[c.name, c.status, duration(c.seconds), c.summary.replace("|", " ")] for c in checks]
    return _markdown(rows, ["check", "", "time", "result"])


def _time_table(entries: list[Entry]) -> str:
    others = _others(entries)
    # Of a CPU; a GPU's times are not theirs.
    threads = [str(e.info.get("threads", "")) * (e.info.get("device") != "cuda") for e in entries]
    rows = []
    for entry, n_threads in zip(entries, threads, strict=True):
        info = entry.info
        low, high = (duration(q) for q in entry.quartiles)
        rate = info.get("GFLOP/s")
        shares = [info.get(f"share of {what}") for what in ("matmul rate", "copy bandwidth")]
        rows.append([
            entry.case,
            n_threads if len(set(threads)) > 1 else "",
            f"{duration(entry.ours)} [{low}, {high}]",
            *(ratio(entry.medians[n] / entry.ours) if n in entry.medians else "" for n in others),
            "" if rate is None else f"{rate:.3g}",
            *("" if share is None else f"{share:.0%}" for share in shares),
        ])  # fmt: skip
    headers = [
        "case", "threads", f"{OURS} [quartiles]", *others, "GFLOP/s", "share of matmul rate",
        "share of copy bandwidth",
    ]  # fmt: skip
    return _markdown(rows, headers)


def _size_table(entries: list[Entry], key: str) -> str:
    """Table ours, and the others as multiples of it, or as they are where ours is next to none."""
    others = _others(entries)
    rows = []
    for entry in entries:
        sizes = entry.of_everyone(key) or {}
        ours = sizes.get(OURS, sizes.get("ours"))
        if ours:
            tell = size if ours < 1e3 else lambda other, ours=ours: ratio(other / ours)
            more = (tell(sizes[name]) if name in sizes else "" for name in others)
            rows.append([entry.case, size(ours), *more])
    return _markdown(rows, ["case", OURS, *others]) if rows else ""


def _percentile_table(entries: list[Entry]) -> str:
    others = [OURS, *_others(entries)]
    rows = []
    for alike in _by_other_axes(entries, "K"):
        first = None
        for entry in alike:
            percentiles = entry.of_everyone("percentiles")
            row = [entry.case]
            for name in others:
                values = percentiles.get(name)
                row.append("" if values is None else " / ".join(map(duration, values.values())))
            median = percentiles.get(OURS, {}).get("50")
            first = first or median
            row.append(f"{median / first - 1:+.0%}" if median and first else "")
            rows.append(row)
    names = [f"{name}, p50 / p99" for name in others]
    return _markdown(rows, ["case", *names, f"{OURS} against the first row"])


def _by_other_axes(entries: list[Entry], axis: str) -> list[list[Entry]]:
    """Put entries together that differ in one axis only, sorted by it."""
    found: dict[tuple, list[Entry]] = {}
    for entry in entries:
        rest = tuple((name, value) for name, value in entry.axes.items() if name != axis)
        found.setdefault(rest, []).append(entry)
    return [sorted(some, key=lambda entry: entry.axes.get(axis, 0)) for some in found.values()]


# -- plots ----------------------------------------------------------------------------------------


def draw(run: Run, folder: str | Path) -> list[Path]:
    """Draw what a run has numbers for into ``folder``; return the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for group, entries in _groups(run).items():
        for title, some in _legible(group, entries).items():
            if series := _all_series(some):
                files.append(folder / f"{run.name}-speed-up-{_file_name(title)}.png")
                _draw_speed_up(run, title, series, files[-1])
    if points := [e for e in run.entries if "bytes" in e.info and "FLOPs" in e.info]:
        files.append(folder / f"{run.name}-roofline.png")
        _draw_roofline(run, points, files[-1])
    for group, entries in _groups(run).items():
        timed = [entry for entry in entries if entry.info.get("percentiles")]
        panels = [some for some in _by_other_axes(timed, "K") if len(some) > 1]
        if panels:
            files.append(folder / f"{run.name}-latency-{_file_name(group)}.png")
            _draw_latency(run, group, panels, files[-1])
    return files


def _file_name(title: str) -> str:
    return re.sub(r"\W+", "-", title)


def _all_series(entries: list[Entry]) -> dict[str, dict[str, list[Entry]]]:
    return {axis: found for axis in "BLdKNC" if (found := _series(entries, axis))}


def _legible(group: str, entries: list[Entry]) -> dict[str, list[Entry]]:
    """Split a group by precision where one picture would have too many lines; by title.

    Where it still has, there is none.
    """

    def is_legible(some: list[Entry]) -> bool:
        n_lines = max(map(len, _all_series(some).values()), default=0) * len(_others(some))
        return n_lines <= _MOST_LINES

    if is_legible(entries):
        return {group: entries}
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(", ".join([group, *_dtype_of(entry)]), []).append(entry)
    return {title: some for title, some in found.items() if is_legible(some)}


def _series(entries: list[Entry], axis: str) -> dict[str, list[Entry]]:
    """Find the entries that differ in one axis only: series of two or more, by the other axes.

    Of many series the longest are kept: the others are corners of another axis' series.
    """
    found: dict[tuple, list[Entry]] = {}
    for entry in entries:
        if axis in entry.axes:
            rest = tuple((name, v) for name, v in entry.axes.items() if name != axis)
            found.setdefault(rest, []).append(entry)
    found = {rest: some for rest, some in found.items() if len({e.axes[axis] for e in some}) > 1}
    if len(found) > _MOST_SERIES:
        longest = max(map(len, found.values()))
        found = {rest: some for rest, some in found.items() if len(some) == longest}
    varying = {
        name
        for name, _ in itertools.chain(*found)
        if len({dict(rest).get(name) for rest in found}) > 1
    }
    labels = {rest: ", ".join(f"{n} = {v}" for n, v in rest if n in varying) for rest in found}
    return {
        labels[rest]: sorted(some, key=lambda entry: entry.axes[axis])
        for rest, some in found.items()
    }


def _colours(names: Iterable[str]) -> dict[str, str]:
    spare = itertools.cycle(_SPARE)
    return {name: _STYLES.get(name) or next(spare) for name in names}


def _finish(figure, run: Run, path: Path) -> None:
    import textwrap

    width = int(15 * figure.get_size_inches()[0])
    figure.supxlabel("\n".join(textwrap.wrap(run.about, width)), fontsize=7, color="#555555")
    save_figure(figure, path)


def _legend_above(plot, n_columns: int, figure=None) -> None:
    """Put a panel's labels above it, or above all panels of a figure: they would hide points."""
    lines = plot.get_legend_handles_labels()
    if figure is not None:
        figure.legend(*lines, loc="outside upper center", ncols=n_columns, fontsize="small")
        return
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    plot.legend(*lines, **above, ncols=n_columns, fontsize="x-small", frameon=False)


def _draw_speed_up(run: Run, group: str, series: dict[str, dict], path: Path) -> None:
    figure, axes = new_figure(len(series), width=4.5)
    for plot, (axis, lines) in zip(axes, series.items(), strict=True):
        some = list(itertools.chain(*lines.values()))
        colours = _colours(_others(some))
        dashes = itertools.cycle(("-", "--", ":", "-."))
        for (label, entries), dash in zip(lines.items(), dashes, strict=False):
            for name, colour in colours.items():
                known = [e for e in entries if name in e.medians]
                if not known:
                    continue
                x = [e.axes[axis] for e in known]
                y = [e.medians[name] / e.ours for e in known]
                title = ", ".join(filter(None, (name, label)))
                plot.plot(x, y, dash, marker="o", markersize=4, color=colour, label=title)
        plot.axhline(1.0, color="black", linewidth=0.8)
        if axis in "BNC":
            plot.set_xscale("log", base=2)
        measured = sorted({entry.axes[axis] for entry in some})
        plot.set_xticks(measured, [f"{value:,}" for value in measured])
        plot.minorticks_off()
        plot.set_xlabel(axis)
        plot.grid(alpha=0.3)
        _legend_above(plot, 2)
    axes[0].set_ylabel("times longer than lcr_fast")
    figure.suptitle(group)
    _finish(figure, run, path)


def _draw_roofline(run: Run, entries: list[Entry], path: Path) -> None:
    """Draw rates against FLOPs a byte, under the measured copy bandwidth and matmul rates."""
    figure, (plot,) = new_figure(width=7.0)
    points = []
    for entry in entries:
        flops, moved = entry.info["FLOPs"], entry.info["bytes"]
        medians = entry.medians
        points.append((OURS, flops / moved, flops / medians.get("captured", entry.ours) / 1e9))
        if "eager" in medians and "eager bytes" in entry.info:
            rate = flops / medians.get("captured eager", medians["eager"]) / 1e9
            points.append(("eager", flops / entry.info["eager bytes"], rate))
    for name, colour in ((OURS, _OURS_COLOUR), ("eager", _STYLES["eager"])):
        mine = [(x, y) for n, x, y in points if n == name]
        if mine:
            plot.scatter(*zip(*mine, strict=True), s=16, color=colour, label=name)
    bandwidth = run.ceilings.get("copy GB/s")
    low, high = min(x for _, x, _ in points) / 4, max(x for _, x, _ in points) * 4
    for key, rate in run.ceilings.items():
        if key.startswith("matmul") and bandwidth:
            ridge = rate / bandwidth
            x = [min(low, ridge), ridge, max(high, ridge)]
            plot.plot(x, [bandwidth * x[0], rate, rate], color="black", linewidth=1)
            plot.annotate(key.removesuffix(" GFLOP/s"), (x[2], rate), ha="right", va="bottom")
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.set_xlabel("FLOPs a byte that must be moved (by formula)")
    plot.set_ylabel("GFLOP/s")
    figure.suptitle("Roofline")
    plot.grid(alpha=0.3)
    _legend_above(plot, 2)
    _finish(figure, run, path)


def _draw_latency(run: Run, group: str, panels: list[list[Entry]], path: Path) -> None:
    """Draw percentiles against K, a panel for each set of the other axes."""
    figure, axes = new_figure(len(panels), width=7.0 if len(panels) == 1 else 5.0)
    names = [OURS, *_others(list(itertools.chain(*panels)))]
    colours = {OURS: _OURS_COLOUR} | _colours(names[1:])
    differing = {
        name for name in panels[0][0].axes if len({some[0].axes.get(name) for some in panels}) > 1
    } - {"K"}
    for plot, entries in zip(axes, panels, strict=True):
        for name in names:
            known = [e for e in entries if name in e.of_everyone("percentiles")]
            x = [e.axes.get("K", 0) for e in known]
            for percentile, line in (("50", "-"), ("99", ":")):
                y = [e.of_everyone("percentiles")[name][percentile] * 1e3 for e in known]
                plot.plot(
                    x, y, line, marker="o", markersize=4, color=colours[name],
                    label=f"{name}, p{percentile}",
                )  # fmt: skip
        plot.set_xlabel("reasoning steps K")
        plot.set_ylabel("ms a request")
        plot.set_yscale("log")
        plot.set_xticks(sorted({entry.axes.get("K", 0) for entry in entries}))
        own = entries[0].axes
        plot.set_title(", ".join([group, *(f"{n} = {own[n]}" for n in own if n in differing)]))
        plot.grid(alpha=0.3)
    _legend_above(axes[len(axes) // 2], len(names), figure)
    _finish(figure, run, path)


def _dtype_of(entry: Entry) -> list[str]:
    return [str(entry.axes["dtype"])] if "dtype" in entry.axes else []


def main(argv: list[str] | None = None) -> None:
    """Print the tables, draw the plots; bad input ends in one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/report.py",
        description="Print what `pytest benchmarks --benchmark --benchmark-json=FILE` measured as "
        "Markdown tables: our median, and how many times longer each of the others takes.",
    )
    parser.add_argument("files", metavar="JSON", type=Path, nargs="+", help="benchmark files")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw plots, into here")
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # µs, whatever the locale can spell
    try:
        runs = [read_run(path) for path in arguments.files]
        print("\n\n".join(f"## {run.name}\n\n{report(run)}" for run in runs))
        if arguments.plots:
            files = [file for run in runs for file in draw(run, arguments.plots)]
            # Not among the tables, which belong into a page. Older files do not say along which
            # axes their cases differ.
            names = "\n".join(map(str, files)) or "no plots: too few cases differ by one axis"
            print(names, file=sys.stderr)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: {error.filename}: {error.strerror}\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
