"""PNG plots of comparisons and studies; matplotlib is imported only here, without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcr_fast.storage import replacing
from lcr_fast.training.baselines import TITLES
from lcr_fast.training.ranks import Difference, Interval
from lcr_fast.training.trainer import VALIDATION, validation_scores

Results = dict[str, dict[str, Any]]
_COLOURS = {
    **dict.fromkeys(TITLES, "#999999"), "base": "#4477aa", "lcr": "#ee6677", "tcl": "#228833",
    "rl": "#aa3377", "control": "#ccbb44", "nosearch": "#66ccee",
}  # fmt: skip


def new_figure(n_columns: int = 1, width: float = 6.0):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n_columns, 4.0), layout="constrained")
    return figure, figure.subplots(1, n_columns, squeeze=False)[0]


def _legend(figure, axis, n_columns: int) -> None:
    """Put the labels of one panel above all of them, where they hide no data."""
    lines = axis.get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=n_columns, fontsize="small")


def save_figure(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def learning_curves(results: Results, path: Path) -> None:
    """Draw what validation said against seconds of training, phase 2 after the phase before it."""
    figure, (axis,) = new_figure(width=7.0)
    end_of_tcl = results["tcl"]["seconds"] if "tcl" in results else 0.0
    for name, result in results.items():
        offset = end_of_tcl if name in ("rl", "control") else 0.0
        x = [offset + record["seconds"] for record in result["history"]]
        y = validation_scores(result)
        axis.plot(x, y, marker="o", markersize=3, color=_COLOURS[name], label=result["title"])
    axis.set_xlabel("seconds of training")
    first = next(iter(results.values()))
    metric = next(key for key in first["history"][0] if key.startswith(VALIDATION))
    metric = metric.removeprefix(VALIDATION).upper()
    axis.set_ylabel(f"validation {metric} (1 + {first['ranks'].n_negatives})")
    axis.grid(alpha=0.3)
    _legend(figure, axis, 3)
    save_figure(figure, path)


def target_distances(results: Results, path: Path) -> None:
    """Draw the distance of the pooled states to the target at every step."""
    figure, axes = new_figure(2)
    for axis, stream, title in zip(
        axes, ("search", "rec"), ("search stream", "recommendation stream"), strict=True
    ):
        for name, result in results.items():
            h, a = result["distances"][f"h_{stream}"], result["distances"][f"a_{stream}"]
            if not h:
                continue
            colour = _COLOURS[name]
            axis.plot(range(len(h)), h, marker="o", color=colour, label=result["title"].strip())
            axis.plot(range(1, len(a) + 1), a, marker="x", linestyle=":", color=colour)
        axis.set_title(title)
        axis.set_xlabel("reasoning step k")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("distance to the target item")
    axes[0].plot([], [], color="black", marker="o", label="after cross-attention, h")
    axes[0].plot([], [], color="black", marker="x", linestyle=":", label="before it, a")
    _legend(figure, axes[0], 4)
    save_figure(figure, path)


def metric_bars(results: Results, path: Path) -> None:
    """Draw NDCG@5 with confidence intervals, by candidate set."""
    n = next(iter(results.values()))["ranks"].n_negatives
    titles = {"sampled": f"1 + {n}", "catalogue": "whole catalogue", "impressions": "impressions"}
    rows = {
        (name, row["protocol"]): row
        for name, result in results.items()
        for row in result["rows"]
        if row["targets"] == "all" and row["metric"] == "ndcg@5"
    }
    protocols = [p for p in titles if any(key[1] == p for key in rows)]
    figure, axes = new_figure(len(protocols), width=4.5)
    for axis, protocol in zip(axes, protocols, strict=True):
        for place, (name, result) in enumerate(results.items()):
            row = rows[name, protocol]
            axis.barh(place, row["mean"], color=_COLOURS[name], label=result["title"])
            axis.hlines(place, row["low"], row["high"], color="black")
        axis.set_yticks(range(len(results)), [r["title"].strip() for r in results.values()])
        axis.invert_yaxis()
        axis.set_xlabel("test NDCG@5")
        axis.set_title(titles[protocol])
    for axis in axes[1:]:
        axis.set_yticklabels([])
    save_figure(figure, path)


def intervals(
    axis: str,
    values: Sequence[Any],
    series: dict[str, dict[str, list[Interval]]],
    titles: Mapping[str, str],
    path: Path,
) -> None:
    """Draw metrics against the values of one setting, evenly spaced, with intervals.

    ``series`` holds, by variant and metric, one interval a value; ``titles`` says what a variant is
    called. A panel a metric. Lines join numbers; between names there is nothing to join.
    """
    metrics = list(next(iter(series.values())))
    figure, panels = new_figure(len(metrics), width=4.5)
    names = [str(value) for value in values]
    slanted = max(map(len, names)) > 6
    line = "-" if all(type(value) in (int, float) for value in values) else "none"
    for panel, metric in zip(panels, metrics, strict=True):
        for place, (variant, by_metric) in enumerate(series.items()):
            points = by_metric[metric]
            x = [i + 0.06 * (place - 1) for i in range(len(points))]  # side by side, not hidden
            colour = _COLOURS[variant]
            y = [p.mean for p in points]
            panel.plot(x, y, linestyle=line, marker="o", color=colour, label=titles[variant])
            panel.vlines(x, [p.low for p in points], [p.high for p in points], color=colour)
        panel.set_xticks(range(len(names)), names, rotation=30 if slanted else 0)
        panel.set_xlabel(axis)
        panel.set_title(metric)
        panel.grid(alpha=0.3)
    _legend(figure, panels[0], len(series))
    save_figure(figure, path)


def latencies(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the median time of a forward against K with its interval, a panel a number of users."""
    users = list(dict.fromkeys(row["users"] for row in rows))
    figure, panels = new_figure(len(users), width=4.5)
    for panel, n in zip(panels, users, strict=True):
        mine = [row for row in rows if row["users"] == n]
        steps = [r["steps"] for r in mine]
        panel.plot(steps, [r["ms"] for r in mine], linestyle="none", marker="o")
        panel.vlines(steps, [r["low"] for r in mine], [r["high"] for r in mine])
        panel.set_ylim(bottom=0)
        panel.set_xticks(steps)
        panel.set_xlabel("reasoning steps K")
        panel.set_ylabel("ms a forward")
        panel.set_title(f"{n} user{'s' * (n > 1)}")
        panel.grid(alpha=0.3)
    save_figure(figure, path)


def heat_maps(maps: Sequence[tuple[Any, Mapping[tuple[float, float], Any]]], path: Path) -> None:
    """Draw a mean for each pair of settings, a panel a map; what is level with the best is framed.

    ``maps`` are pairs of a :class:`~lcr_fast.experiments.grid.Map` and its cells by place.
    """
    from matplotlib.patches import Rectangle

    figure, panels = new_figure(len(maps), width=4.5)
    for panel, (part, cells) in zip(panels, maps, strict=True):
        (row, rows), (column, columns) = part.rows, part.columns
        means = [[cells[a, b].mean for b in columns] for a in rows]
        image = panel.imshow(means, aspect="auto", cmap="viridis")
        middle = sum(image.get_clim()) / 2
        for y, a in enumerate(rows):
            for x, b in enumerate(columns):
                cell = cells[a, b]
                colour = "black" if cell.mean > middle else "white"
                panel.text(x, y, f"{cell.mean:.3f}", ha="center", va="center", color=colour)
                if cell.level:
                    panel.add_patch(
                        Rectangle(
                            (x - 0.46, y - 0.46), 0.92, 0.92, fill=False, color="#ee6677", lw=2
                        )
                    )
        panel.set_xticks(range(len(columns)), [str(v) for v in columns])
        panel.set_yticks(range(len(rows)), [str(v) for v in rows])
        panel.set_xlabel(column)
        panel.set_ylabel(row)
        panel.set_title(part.title)
    save_figure(figure, path)


def pareto(
    points: Mapping[str, tuple[str, Difference]], times: Sequence[dict[str, Any]], path: Path
) -> None:
    """Draw accuracy against the time of a forward, a panel a number of users.

    ``points`` are titles and accuracies by model, ``times`` rows of
    :func:`~lcr_fast.experiments.timing.forward_times`.
    """
    users = list(dict.fromkeys(row["users"] for row in times))
    figure, panels = new_figure(len(users), width=5.0)
    for panel, n in zip(panels, users, strict=True):
        for place, row in enumerate(r for r in times if r["users"] == n):
            title, y = points[row["model"]]
            colour = f"C{place}"
            panel.plot(row["mean_ms"], y.mean, "o", color=colour, label=title)
            panel.vlines(row["mean_ms"], y.low, y.high, color=colour)
        panel.set_xlabel("ms a forward, fastest turns")
        panel.set_title(f"{n} user{'s' * (n > 1)}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test NDCG@5")
    _legend(figure, panels[0], 3)
    save_figure(figure, path)


def rule_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], fixed: Sequence[float], path: Path
) -> None:
    """Draw a metric against the mean number of steps, a line a rule; ``fixed`` by k = 0 to K."""
    figure, (axis,) = new_figure(width=8.0)
    for title, points in curves.items():
        axis.plot(*zip(*points, strict=True), label=title)
    axis.plot(range(len(fixed)), fixed, "ks", label="fixed")
    axis.set_xlabel("steps, mean of the test users")
    axis.set_ylabel("test NDCG@5")
    axis.grid(alpha=0.3)
    _legend(figure, axis, 2)
    save_figure(figure, path)


def strata(rows: Sequence[dict[str, Any]], titles: Mapping[str, str], path: Path) -> None:
    """Draw differences to Base by stratum with intervals, a colour a model."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["stratum"] for row in rows))
    figure = Figure(figsize=(7.0, 1.0 + 0.34 * len(names)), layout="constrained")
    axis = figure.subplots()
    for place, (model, title) in enumerate(titles.items()):
        mine = [row for row in rows if row["model"] == model]
        y = [names.index(row["stratum"]) + 0.22 * (place - 1) for row in mine]
        axis.plot([row["less_base"] for row in mine], y, "o", color=f"C{place}", label=title)
        lows, highs = ([row[f"less_base_{end}"] for row in mine] for end in ("low", "high"))
        axis.hlines(y, lows, highs, color=f"C{place}")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("test NDCG@5 less that of Base")
    axis.grid(alpha=0.3)
    _legend(figure, axis, len(titles))
    save_figure(figure, path)


def worlds(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what LCR gains over Base in each synthetic world, with intervals."""
    figure, (axis,) = new_figure()
    x = range(len(rows))
    axis.plot(x, [row["less_base"] for row in rows], "o")
    axis.vlines(x, *([row[f"less_base_{end}"] for row in rows] for end in ("low", "high")))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(x, [row["world"] for row in rows])
    axis.set_ylabel("test NDCG@5, LCR - Base")
    axis.grid(alpha=0.3)
    save_figure(figure, path)
