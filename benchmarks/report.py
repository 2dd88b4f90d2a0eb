"""Print a benchmark file as Markdown: `python benchmarks/report.py benchmarks/results/NAME.json`.

Each group becomes a table with one row a case: our median, and how many times longer each of the
others takes. Below 1, they are faster.
"""

import json
import sys
from pathlib import Path


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def ratio(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.2g}x"


def table(rows: list[list[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def group_table(entries: list[dict]) -> str:
    infos = [entry["extra_info"] for entry in entries]
    others = list(dict.fromkeys(name for info in infos for name in info.get("others", {})))
    shares = any("share of copy bandwidth" in info for info in infos)
    threads = any("threads" in info for info in infos)
    rows = [
        ["case"]
        + ["threads"] * threads
        + ["lcr_fast"]
        + others
        + ["share of copy bandwidth"] * shares
    ]
    for entry, info in zip(entries, infos, strict=True):
        ours = entry["stats"]["median"]
        row = [str(info.get("case", entry["name"]))]
        row += [str(info.get("threads", ""))] * threads + [duration(ours)]
        for name in others:
            other = info.get("others", {}).get(name)
            row.append(ratio(other["median"] / ours) if other else "")
        if shares:
            share = info.get("share of copy bandwidth")
            row.append("" if share is None else f"{share:.0%}")
        rows.append(row)
    return table(rows)


def report(results: dict) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in results["machine_info"].items())
    parts = [f"{machine}; {results['datetime'][:10]}."]
    groups: dict[str, list[dict]] = {}
    for entry in results["benchmarks"]:
        groups.setdefault(entry["group"] or "other", []).append(entry)
    parts += [f"**{name}**\n\n{group_table(entries)}" for name, entries in groups.items()]
    return "\n\n".join(parts)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/report.py FILE.json")
    sys.stdout.write(report(json.loads(Path(sys.argv[1]).read_text())) + "\n")
