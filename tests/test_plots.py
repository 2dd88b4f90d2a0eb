"""Plots: a colour a model, no line between names, nothing hidden by a legend, whole steps."""

import numpy as np
import pytest

from lcr_fast.experiments import plots
from lcr_fast.experiments.comparison import VARIANTS
from lcr_fast.training.ranks import Interval, Ranks

ROWS = [{"users": 1, "steps": k, "ms": 1.0 + k, "low": 0.9 + k, "high": 1.2 + k} for k in range(3)]


@pytest.fixture
def results():
    ranks = Ranks("x", {"all": np.ones(9, bool)}, {"sampled": np.arange(1, 10)}, 20)
    states = [f"{state}_{stream}" for state in "ha" for stream in ("search", "rec")]
    return {
        name: {
            "title": variant.title,
            "ranks": ranks,
            "rows": ranks.rows(),
            "seconds": 1.0,
            "history": [{"epoch": e, "valid_mrr": 0.1 * e, "seconds": float(e)} for e in range(3)],
            "distances": {state: [1.0, 1.5, 1.2] for state in states},
        }
        for name, variant in VARIANTS.items()
    }


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures in the order in which they would be saved."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def series():
    points = [Interval(0.3, 0.2, 0.4, 3)] * 3
    return {variant: {"mrr": points} for variant in ("control", "tcl", "rl")}


def test_a_model_has_one_colour(drawn, results):
    titles = {name: VARIANTS[name].title for name in series()}
    plots.learning_curves(results, "x")
    plots.target_distances(results, "x")
    plots.intervals("K", (0, 1, 2), series(), titles, "x")
    found: dict[str, set] = {}
    for figure in drawn:
        for line in (line for axis in figure.axes for line in axis.get_lines()):
            found.setdefault(line.get_label(), set()).add(line.get_color())
    for variant in VARIANTS.values():
        assert len(found[variant.title]) == 1, variant.title


@pytest.mark.parametrize(
    ("values", "joined"), [((0, 1, 2), True), ((0.1, 0.5, 1.0), True), (("a", "b", "c"), False)]
)
def test_lines_join_numbers_only(drawn, values, joined):
    plots.intervals("setting", values, series(), {name: name for name in series()}, "x")
    styles = {line.get_linestyle() for line in drawn[0].axes[0].get_lines()}
    assert styles == ({"-"} if joined else {"None"})


def test_a_latency_has_an_interval_and_a_step_is_whole(drawn):
    plots.latencies(ROWS, "x")
    (axis,) = drawn[0].axes
    assert [line.get_linestyle() for line in axis.get_lines()] == ["None"]
    bars = [segment[:, 1].tolist() for segment in axis.collections[0].get_segments()]
    assert bars == [[row["low"], row["high"]] for row in ROWS]
    assert axis.get_xticks().tolist() == [0, 1, 2]


def test_legends_stand_outside(drawn, results):
    plots.learning_curves(results, "x")
    plots.target_distances(results, "x")
    for figure in drawn:
        assert figure.legends
        assert not any(axis.get_legend() for axis in figure.axes)


def test_labels_say_what_was_measured(drawn, results):
    plots.learning_curves(results, "x")
    plots.metric_bars(results, "x")
    assert drawn[0].axes[0].get_ylabel() == "validation MRR (1 + 20)"
    assert [axis.get_title() for axis in drawn[1].axes] == ["1 + 20"]
