"""Results as Markdown tables and as CSV."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from lcr_fast.storage import replacing
from lcr_fast.training.ranks import Ranks

BASE = "base"  # the variant that tables compare to


def markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Lay texts out as a table of Markdown."""
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def in_brackets(low: float, high: float, sign: str = "", digits: int = 3) -> str:
    """Write an interval, ``[-]`` where there is none."""
    if math.isnan(low):
        return "[-]"
    return f"[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def with_interval(row: Mapping[str, Any], sign: str = "", digits: int = 3) -> str:
    """Write a mean and its interval (:func:`in_brackets`); nothing without a mean."""
    if math.isnan(row["mean"]):
        return ""
    return f"{row['mean']:{sign}.{digits}f} {in_brackets(row['low'], row['high'], sign, digits)}"


def protocol_titles(n_negatives: int | str) -> dict[str, str]:
    """Say what each protocol ranks a target among, in the order of the tables."""
    return {
        "sampled": f"1 target + {n_negatives} sampled negatives",
        "impressions": "items shown with the target",
        "catalogue": "whole catalogue, seen items masked",
    }


def rank_tables(rows: list[dict[str, Any]], n_negatives: int | str) -> list[str]:
    """Lay out the metrics of one model as Markdown: a table a protocol, a column a kind of target.

    ``rows`` are those of :meth:`~lcr_fast.training.ranks.Ranks.rows`.
    """
    titles = protocol_titles(n_negatives)
    tables = []
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        mine = [row for row in rows if row["protocol"] == protocol and row["n"]]
        counts = {row["targets"]: row["n"] for row in mine}
        lines = [
            [
                metric,
                *(with_interval(row, digits=4) for row in mine if row["metric"] == metric),
            ]
            for metric in dict.fromkeys(row["metric"] for row in mine)
        ]
        headers = [titles[protocol], *(f"{group} (n={n:,})" for group, n in counts.items())]
        tables.append(markdown(lines, headers))
    return tables


def result_tables(
    results: dict[str, dict[str, Any]], changes: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """Lay out results as Markdown: the main metrics, then NDCG@5 by protocol and kind of target.

    ``changes`` are the rows of :func:`~lcr_fast.training.ranks.differences` to Base, by model.
    """
    ranks = next(iter(results.values()))["ranks"]
    titles = {
        protocol: _of_some(title, ranks, protocol)
        for protocol, title in protocol_titles(ranks.n_negatives).items()
        if protocol in ranks.by_protocol
    }
    tables = [_main_table(results, titles)]
    compared = {
        name: {"title": results[name]["title"], "rows": rows} for name, rows in changes.items()
    }
    for protocol, title in titles.items():
        tables.append(f"NDCG@5, {title}:\n\n" + strata_table(results, protocol))
        if compared:
            tables.append(
                f"NDCG@5 less that of {results[BASE]['title']}, user by user, {title}:\n\n"
                + strata_table(compared, protocol, sign="+")
            )
    return tables + _search_tables(results, titles)


def _main_table(results: dict[str, dict[str, Any]], titles: dict[str, str]) -> str:
    columns = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr")
    main, first = next(iter(titles)), next(iter(results.values()))
    headers = ["model", *(name.upper() for name in columns)]
    ranked = (first["ranks"].by_protocol.get("catalogue", np.ones(1)) > 0).all()
    with_catalogue = main != "catalogue" and "catalogue" in titles
    if with_catalogue:
        n = _count(first, "catalogue")
        headers.append("NDCG@10, catalogue" if ranked else f"NDCG@10, catalogue (n={n:,})")
    trained = any("seconds" in result for result in results.values())
    if trained:
        headers.append("seconds")
    chance = [r["relevance"]["chance"] for r in results.values() if "relevance" in r]
    with_truth = bool(chance) and chance[0] == chance[0]
    if with_truth:
        headers += [
            f"attention on relevant searches: of the target (chance {chance[0]:.3f})",
            "of the recommendation stream",
        ]
    rows = []
    for result in results.values():
        row = [result["title"]]
        row += [
            _cell(_value(result, main, "all", name), interval=name == "ndcg@5") for name in columns
        ]
        if with_catalogue:
            row.append(_cell(_value(result, "catalogue", "all", "ndcg@10"), interval=not ranked))
        if trained:
            row.append(f"{result['seconds']:.0f}" if "seconds" in result else "")
        if with_truth:
            shares = result.get("relevance", {})
            for name in ("target", "cross"):
                share = shares.get(name, float("nan"))
                row.append(f"{share:.3f}" if share == share else "")
        rows.append(row)
    title = f"Test, {_count(first, main):,} users, {titles[main]}, [95 % bootstrap interval]:\n\n"
    return title + markdown(rows, headers)


def strata_table(
    results: dict[str, dict[str, Any]], protocol: str, *, metric: str = "ndcg@5", sign: str = ""
) -> str:
    """Lay out one metric by model and kind of target, with intervals."""
    groups = ("all", "repeat", "new", "covered", "uncovered")
    counts = {
        group: (_value(next(iter(results.values())), protocol, group, metric) or {}).get("n", 0)
        for group in groups
    }
    shown = [group for group in groups if counts[group]]
    headers = ["model", *(f"{group} (n={counts[group]:,})" for group in shown)]
    rows = [
        [
            result["title"],
            *(_cell(_value(result, protocol, group, metric), True, sign) for group in shown),
        ]
        for result in results.values()
    ]
    return markdown(rows, headers)


def _search_tables(results: dict[str, dict[str, Any]], titles: dict[str, str]) -> list[str]:
    """Lay out what a user's own searches are worth to every model, a table a protocol."""
    effects = {
        f"{name}-{than}": {"title": f"{result['title']}, {title}", "rows": result["searches"][than]}
        for name, result in results.items()
        if "searches" in result
        for than, title in (
            ("others", "those of other users"),
            ("none", "none"),
            ("training", "none, as trained"),
        )
        if than in result["searches"]
    }
    protocols = {row["protocol"] for effect in effects.values() for row in effect["rows"]}
    return [
        "NDCG@5 with a user's own searches less that of the same model with others, users that "
        f"searched, {title}:\n\n" + strata_table(effects, protocol, sign="+")
        for protocol, title in titles.items()
        if protocol in protocols
    ]


def _of_some(title: str, ranks: Ranks, protocol: str) -> str:
    """Add to a title how many users it is about, where the catalogue is not ranked for all."""
    n, n_all = int((ranks.by_protocol[protocol] > 0).sum()), len(ranks.by_protocol[protocol])
    some = protocol == "catalogue" and n < n_all
    return f"{title}, {n:,} of {n_all:,} users, the same for every model" if some else title


def _value(result: dict[str, Any], protocol: str, targets: str, metric: str) -> dict | None:
    key = {"protocol": protocol, "targets": targets, "metric": metric}
    return next((r for r in result["rows"] if all(r[k] == v for k, v in key.items())), None)


def _count(result: dict[str, Any], protocol: str) -> int:
    return (_value(result, protocol, "all", "mrr") or {}).get("n", 0)


def _cell(row: dict | None, interval: bool = False, sign: str = "") -> str:
    if row is None or not row["n"]:
        return ""
    text = with_interval(row, sign) if interval else f"{row['mean']:{sign}.3f}"
    if row.get("seeds", 1) > 1:
        text += f", seeds [{row['seeds_low']:{sign}.3f}, {row['seeds_high']:{sign}.3f}]"
    return text


def write_results(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write every number of the results as CSV, atomically."""
    write_rows(
        path, [{"model": n, **row} for n, result in results.items() for row in result["rows"]]
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write dictionaries with the same keys as CSV, atomically."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tables(folder: Path, parts: Sequence[str]) -> str:
    """Write ``results.md``, atomically; return its text."""
    text = "\n\n".join(parts)
    with replacing(folder / "results.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    return text
