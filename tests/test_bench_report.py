"""Reports of benchmark files: tables, ratios, percentiles, plots, and files that are none."""

import json
from pathlib import Path

import matplotlib.image
import pytest

import report as bench_report
from report import duration, ratio, read_run, report, size

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def benchmark(group: str, median: float, others: dict[str, float], **info) -> dict:
    return {
        "group": group,
        "name": "test_x",
        "stats": {"median": median, "q1": 0.9 * median, "q3": 1.1 * median},
        "extra_info": {"others": {name: {"median": t} for name, t in others.items()}, **info},
    }


def request(k: int, ours: float, eager: float) -> dict:
    percentiles = {"": {"50": ours, "99": 2 * ours}, "eager": {"50": eager, "99": 3 * eager}}
    return benchmark(
        "one request",
        ours,
        {"eager": eager},
        case=f"K = {k}",
        axes={"K": k, "B": 1},
        percentiles=percentiles,
    )


RUN = {
    "machine_info": {
        "cpu": "some CPU", "cores": 2, "command": "pytest benchmarks --benchmark",
        "ceilings": {"matmul fp32 GFLOP/s": 100.0, "copy GB/s": 10.0},
    },
    "datetime": "2026-01-02T03:04:05",
    "benchmarks": [
        benchmark(
            "reasoning", 1e-3, {"eager": 2.5e-3, "torch.compile": 5e-4}, case="small",
            axes={"B": 1, "dtype": "fp32"}, FLOPs=5e7, bytes=1e6, **{
                "eager bytes": 1e7, "GFLOP/s": 50.0, "share of matmul rate": 0.5,
                "peak bytes": {"": 2_000_000, "eager": 5_000_000}, "threads": 1,
            },
        ),
        benchmark(
            "reasoning", 8e-3, {"eager": 0.1}, case="large", axes={"B": 8, "dtype": "fp32"},
            threads=1,
        ),
        request(5, 4e-3, 9e-3),
        request(0, 2e-3, 3e-3),
    ],
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some-run.json"
    path.write_text(json.dumps(RUN))
    return path


def cells(text: str, first: str) -> list[list[str]]:
    """Return the rows of all tables that begin with ``first``."""
    lines = [
        line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")
    ]
    rows = [[cell.strip() for cell in line] for line in lines]
    return [row for row in rows if row[0] == first]


def test_tables(file):
    text = report(read_run(file))
    assert text.startswith("cpu some CPU, cores 2; 2026-01-02; pytest benchmarks --benchmark.")
    assert "**Reasoning**" in text
    time, memory = cells(text, "small")
    assert time == ["small", "1 ms [900 µs, 1.1 ms]", "2.5x", "0.5x", "50", "50%"]
    assert memory == ["small", "2 MB", "2.5x"]
    # What took no part, and what was not counted, leaves its cell empty.
    assert cells(text, "large") == [["large", "8 ms [7.2 ms, 8.8 ms]", "12x", "", "", ""]]
    # Columns that nothing fills are left out: all ran on one number of threads.
    assert "threads" not in text
    assert "share of copy bandwidth" not in text


def test_threads_are_a_column_where_they_differ_on_a_cpu(file):
    run = json.loads(json.dumps(RUN))
    first, second = (case["extra_info"] for case in run["benchmarks"][:2])
    second["threads"] = 2
    file.write_text(json.dumps(run))
    assert cells(report(read_run(file)), "large")[0][1] == "2"
    first["device"] = second["device"] = "cuda"
    file.write_text(json.dumps(run))
    assert "threads" not in report(read_run(file))


def test_sizes_are_no_multiples_of_next_to_nothing(tmp_path):
    path = tmp_path / "sizes.json"
    saved = {"": 8, "eager": 33_000_000}
    first, second = RUN["benchmarks"][:2]
    info = first["extra_info"] | {"saved bytes": saved, "peak bytes": {"": 0, "eager": 5e6}}
    path.write_text(json.dumps(RUN | {"benchmarks": [first | {"extra_info": info}, second]}))
    text = report(read_run(path))
    assert cells(text, "small")[1:] == [["small", "8 B", "33 MB"]]
    assert "Peak memory" not in text  # nobody's is a multiple of nothing


def test_percentiles_are_sorted_by_k_and_compared_with_the_first(file):
    text = report(read_run(file)).split("Percentiles:")[1]
    rows = cells(text, "K = 0") + cells(text, "K = 5")
    assert rows == [
        ["K = 0", "2 ms / 4 ms", "3 ms / 9 ms", "+0%"],
        ["K = 5", "4 ms / 8 ms", "9 ms / 27 ms", "+100%"],
    ]
    assert text.index("K = 0") < text.index("K = 5")


def test_each_precision_is_compared_with_its_own_first_row(tmp_path):
    """As on a GPU, where cases have a precision, and may not be captured."""
    path = tmp_path / "gpu.json"
    runs = [(k, t, dtype) for dtype, t in (("fp32", 4e-3), ("bf16", 1e-3)) for k in (0, 5)]
    requests = [request(k, (1 + k) * t, 9e-3) for k, t, _ in runs]
    for entry, (k, _, dtype) in zip(requests, runs, strict=True):
        entry["extra_info"] |= {"axes": {"K": k, "B": 1, "dtype": dtype}, "case": f"{k}, {dtype}"}
    requests[0]["extra_info"]["not captured"] = {"captured eager": "operation not permitted"}
    checks = [{"name": "tests", "status": "failed", "seconds": 61.0, "summary": "1 failed | 3"}]
    path.write_text(json.dumps(RUN | {"benchmarks": requests, "checks": checks}))
    text = report(read_run(path))
    assert cells(text, "tests") == [["tests", "failed", "61 s", "1 failed   3"]]
    assert "0, fp32: captured eager: operation not permitted" in text
    shares = [row[-1] for row in cells(text.split("Percentiles:")[1], "0, fp32")]
    shares += [row[-1] for dtype in ("fp32", "bf16") for row in cells(text, f"5, {dtype}")[1:]]
    assert shares == ["+0%", "+500%", "+500%"]
    assert [row[-1] for row in cells(text, "0, bf16")[1:]] == ["+0%"]
    bench_report.main([str(path), "--plots", str(tmp_path)])
    pixels = matplotlib.image.imread(tmp_path / "gpu-latency-one-request.png")
    assert pixels.shape[1] == 2 * 5 * 120  # a panel a precision


@pytest.mark.parametrize(
    ("text", "expected"),
    [(duration(2), "2 s"), (duration(0.99999), "1 s"), (duration(1.5e-5), "15 µs"),
     (duration(3e-9), "3 ns"), (size(12), "12 B"), (size(2.5e9), "2.5 GB"), (ratio(0.123), "0.12x"),
     (ratio(12.4), "12x")],
)  # fmt: skip
def test_quantities(text, expected):
    assert text == expected


def test_the_command_prints_tables_and_draws_plots(file, tmp_path, capsys):
    bench_report.main([str(file), "--plots", str(tmp_path / "plots")])
    out, text = capsys.readouterr()
    assert out == f"## {read_run(file).name}\n\n{report(read_run(file))}\n"
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {
        "some-run-speed-up-reasoning.png",
        "some-run-speed-up-one-request.png",
        "some-run-roofline.png",
        "some-run-latency-one-request.png",
    }
    for name in names:
        assert str(tmp_path / "plots" / name) in text
        pixels = matplotlib.image.imread(tmp_path / "plots" / name)
        assert pixels.min() < 0.5 < pixels.max()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results(path):
    cases = [entry["extra_info"]["case"] for entry in json.loads(path.read_text())["benchmarks"]]
    text = report(read_run(path))
    assert all(case in text for case in cases)
    assert text in PAGE, "print it again: docs/reproducing.md says how"


@pytest.mark.parametrize(("page", "n_rows"), [("README.md", 10), ("docs/speed.md", 60)])
def test_rows_shown_elsewhere_are_measured(page, n_rows):
    text = (ROOT / page).read_text()
    if page == "README.md":
        text = text.split("\n## Speed\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > n_rows
    assert not set(rows) - set(PAGE.splitlines())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "not a file of pytest-benchmark"),
        ('{"machine_info": {}}', "not a file of pytest-benchmark"),
        (json.dumps(RUN | {"benchmarks": [{"group": "x"}]}), "not a file of pytest-benchmark"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_ends_in_one_sentence(tmp_path, capsys, content, complaint):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as end:
        bench_report.main([str(path)])
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert complaint in text
    assert text.count("\n") == 1
    assert str(path) in text
