"""The check of a GPU machine, without one: parts that fail, hang or lack a tool; the report."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_check
import kernel_check
from gpu_check import Machine
from parts import FAILED, NOT_RUN, PASSED, TIMED_OUT, Command, Part, Result, Runner
from report import read_run, report

BARE = Machine("cuda", 4, has_xdist=False, sanitizer=None)


def python(title: str, code: str, **options) -> Command:
    return Command(title, (sys.executable, "-c", code), **options)


@pytest.fixture
def runner(tmp_path):
    (tmp_path / "logs").mkdir()
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take time
    with Runner(tmp_path, tmp_path / "logs", environment) as runner:
        yield runner


def run(runner: Runner, *parts: Part, seconds: float = 60.0) -> dict[str, Result]:
    results = runner.run(parts, time.monotonic() + seconds)
    return {result.name: result for result in results}


def run_out_of_time_at(path: Path, monkeypatch) -> None:
    """Let every process be waited for in vain from when ``path`` exists, and no shorter."""

    class Late(subprocess.Popen):
        is_over = False

        def wait(self, timeout=None):
            if timeout is None or self.is_over:
                return super().wait(timeout)
            while not path.exists():
                assert self.poll() is None, f"it ended with {self.returncode} before"
                time.sleep(0.02)
            self.is_over = True
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Late)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Killed, but nobody has asked for its status yet: its new parent may not.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_one_part_stops_no_other(runner, tmp_path):
    broken = python("broken", "print('so far'); raise SystemExit(3)")
    results = run(
        runner,
        Part("bad", [[broken, python("next", "print('still run')")]]),
        Part("missing", [[Command("missing", ("/no/such/tool",))]]),
        Part("good", [[python("good", "print('line'); print('=== all well ===')")]]),
    )
    assert {name: r.status for name, r in results.items()} == {
        "bad": FAILED,
        "missing": FAILED,
        "good": PASSED,
    }
    assert results["bad"].summary == "1 of 2 commands passed; broken failed: exit status 3: so far"
    assert [(o.title, o.tail) for o in results["bad"].outcomes] == [("broken", ["so far"])]
    assert "No such file" in results["missing"].summary
    assert results["good"].summary == "all well"
    assert "still run" in (tmp_path / "logs" / "bad.log").read_text()


@pytest.mark.full
def test_a_part_is_stopped_in_time_with_all_that_it_started(runner, tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(600)\n"
    )
    part = Part("hangs", [[python("sleeper", code), python("late", "print(1)")]], seconds=3)
    began = time.monotonic()
    result = run(runner, part)["hangs"]
    assert time.monotonic() - began < 20
    assert result.status == TIMED_OUT
    assert "sleeper timed out: stopped after 3 s" in result.summary
    assert "late timed out: no time was left to start it" in result.summary
    assert result.outcomes[0].tail[0] == "waiting"
    deadline = time.monotonic() + 5
    while is_alive(child := int((tmp_path / "child").read_text())):
        assert time.monotonic() < deadline, f"process {child} lives on"
        time.sleep(0.05)


@pytest.mark.full
def test_an_interrupted_command_may_write_what_it_has(runner, tmp_path):
    code = (
        "import time\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    open('kept', 'w').write('x')\n"
    )
    result = run(runner, Part("part", [[python("part", code)]]), seconds=2)["part"]
    assert result.status == TIMED_OUT
    assert (tmp_path / "kept").read_text() == "x"


def test_what_a_machine_cannot_run_is_no_failure(runner):
    tool = python(
        "memcheck",
        "print('== Device not supported ==', 1); raise SystemExit(1)",
        cannot="Device not supported",
    )
    results = run(
        runner,
        Part("both", [[python("bare", "print(1)"), tool]], note="no racecheck"),
        Part("tool", [[tool]]),
    )
    assert results["both"].status == PASSED
    assert results["both"].summary == (
        "1 of 2 commands passed; memcheck not run: Device not supported == 1; no racecheck"
    )
    assert results["tool"].status == NOT_RUN


@pytest.mark.parametrize(
    ("names", "status", "expected"),
    [
        ((), 0, PASSED),
        (("nvjet_sm90",), 9, PASSED),
        (("nvjet_sm90", "ffn_bwd_kernel"), 9, FAILED),
        (("nvjet_sm90",), 1, FAILED),  # the program itself
        ((), 9, FAILED),
    ],
)
def test_findings_in_the_kernels_of_others_are_told_apart(runner, names, status, expected):
    code = "".join(f"print('Race at {name}+0xb0')\n" for name in names)
    code += f"print('SUMMARY'); raise SystemExit({status})"
    command = python(
        "race", code, accuses=r"at (\w+)\+0x", accusing_status=9, others="nvjet|cublas"
    )
    result = run(runner, Part("race", [[command]]))["race"]
    assert result.status == expected
    if names and expected == PASSED:
        assert "none in our kernels but in nvjet_sm90" in result.summary


@pytest.mark.parametrize(
    "options", [(), pytest.param(("-n", "1"), marks=pytest.mark.full)], ids=["plain", "xdist"]
)
def test_failed_tests_are_quoted_when_time_runs_out(runner, tmp_path, monkeypatch, options):
    if options:
        pytest.importorskip("xdist")
    (tmp_path / "test_a.py").write_text(
        "import pytest, time\n"
        "@pytest.mark.parametrize('x', ['an id, with D=1'])\n"
        "def test_a(x): assert 0\n"
        "def test_b(): pass\n"
        "def test_c():\n"
        "    open('began', 'w').close()\n"
        "    time.sleep(600)\n"
    )
    run_out_of_time_at(tmp_path / "began", monkeypatch)
    words = (*gpu_check.PYTEST, *options, "test_a.py")
    path = {"PYTHONPATH": str(gpu_check.ROOT)}  # of the plugin, as the folder is another
    part = Part("tests", [[Command("test_a", words, environment=path, is_pytest=True)]])
    result = run(runner, part)["tests"]
    assert result.status == TIMED_OUT
    assert "1 passed, 1 failed: test_a.py::test_a[an id, with D=1]" in result.summary
    log = (tmp_path / "logs" / "tests.log").read_text()
    assert log.index("def test_a(x): assert 0") < log.index("test_b")


def test_pytest_is_summed_up_over_files(runner, tmp_path):
    (tmp_path / "test_a.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    (tmp_path / "test_b.py").write_text("def test_a(): pass\n")
    words = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    commands = [[Command(n, (*words, n), is_pytest=True)] for n in ("test_a.py", "test_b.py")]
    none = Command("none", (*words, "-k", "nothing"), is_pytest=True)
    results = run(
        runner, Part("both", commands, jobs=2), Part("b", commands[1:]), Part("none", [[none]])
    )
    assert results["both"].status == FAILED
    assert results["both"].summary.startswith("1 failed, 2 passed; 1 of 2 commands passed; test_a")
    assert (results["b"].status, results["b"].summary) == (PASSED, "1 passed")
    # Selecting nothing, as with a marker that nothing has, must not look like success.
    assert (results["none"].status, results["none"].summary) == (FAILED, "no test ran")


def test_the_output_folder_has_at_most_eight_files():
    """Few enough to be copied by hand: the logs of all parts, the JSON file and the table."""
    work = Path("work")
    parts = [
        gpu_check.package(BARE),
        gpu_check.tests(BARE),
        gpu_check.sanitizer(BARE),
        gpu_check.train(BARE, work),
        gpu_check.warm_up(BARE),
        gpu_check.benchmarks(BARE, work),
        gpu_check.compiled(BARE, work),
    ]
    assert [part.name for part in parts] == list(gpu_check.PARTS)
    assert len({part.log or part.name for part in parts}) + 2 <= 8


def test_parts_without_tools_and_with_them():
    part = gpu_check.sanitizer(BARE)
    assert [len(chain) for chain in part.chains] == [1] * len(kernel_check.FAMILIES)
    assert "compute-sanitizer not found" in part.note
    (bare, memcheck, racecheck), *_ = gpu_check.sanitizer(
        BARE._replace(sanitizer="/x/compute-sanitizer")
    ).chains
    assert memcheck.words[:3] == ("/x/compute-sanitizer", "--tool", "memcheck")
    assert racecheck.words[:3] == ("/x/compute-sanitizer", "--tool", "racecheck")
    assert memcheck.words[-len(bare.words) :] == racecheck.words[-len(bare.words) :] == bare.words

    split = gpu_check.tests(BARE)
    assert len(split.chains) == len(list(Path(__file__).parent.glob("test_*.py")))
    assert "pytest-xdist is not installed" in split.note
    ((command,),) = gpu_check.tests(BARE._replace(has_xdist=True, n_cpus=10)).chains
    assert command.words[command.words.index("-n") + 1] == "6"
    assert command.words[command.words.index("-m", 2 + 1) + 1] == "gpu"


def benchmark(fullname: str, median: float, **others: float) -> dict:
    return {
        "group": "scoring",
        "name": "test_x",
        "fullname": fullname,
        "stats": {"median": median, "q1": median, "q3": median},
        "extra_info": {"case": fullname, "others": {n: {"median": t} for n, t in others.items()}},
    }


def run_file(path: Path, ceiling: float, *benchmarks: dict) -> None:
    machine = {"gpu": "GPU Z", "ceilings": {"copy GB/s": ceiling}, "command": "pytest"}
    values = {"machine_info": machine, "datetime": "2026-01-02T03", "benchmarks": benchmarks}
    path.write_text(json.dumps(values))


def test_the_report_holds_times_and_checks(tmp_path):
    """A case that was timed again with torch.compile has its last times; an empty file is none."""
    work, folder = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    folder.mkdir()
    run_file(
        work / "benchmarks-scoring.json", 5.0, benchmark("a", 1.0), benchmark("b", 2.0, eager=4.0)
    )
    run_file(work / "compiled-scoring.json", 7.0, benchmark("b", 2.0, compiled=6.0))
    (work / "benchmarks-training.json").touch()
    results = [
        Result("tests", PASSED, 61.0, "9 passed", []),
        Result("train", TIMED_OUT, 9.0, "slow", []),
    ]
    versions = {"gpu": "GPU Z/80 GB", "driver": "1.2"}
    path = gpu_check.write_report(folder, versions, results, work, "gpu_check.py --only x")
    assert path.name == "gpu-z-80-gb.json"
    assert {file.name for file in folder.iterdir()} == {path.name, "table.md"}
    found = read_run(path)
    assert found.ceilings == {"copy GB/s": 7.0}
    assert [entry.medians for entry in found.entries] == [
        {"lcr_fast": 1.0},
        {"lcr_fast": 2.0, "compiled": 6.0},
    ]
    assert [(c.name, c.status) for c in found.checks] == [("tests", PASSED), ("train", TIMED_OUT)]
    table = (folder / "table.md").read_text()
    assert table.strip() == f"## {path.stem}\n\n{report(found)}"
    assert "driver 1.2" in table
    assert "| train   | timed out | 9 s    | slow" in table


def test_a_report_names_no_folder_of_the_machine():
    text = f"{gpu_check.ROOT}/benchmarks/harness.py:1 {Path(pytest.__file__)}"
    assert gpu_check.without_paths(text) == "benchmarks/harness.py:1 pytest/__init__.py"


@pytest.mark.full
def test_a_report_without_any_time(tmp_path):
    path = gpu_check.write_report(
        tmp_path, {"gpu": "Z"}, [Result("tests", FAILED, 1.0, "exit status 1", [])], tmp_path, "x"
    )
    assert read_run(path).entries == []
    assert "exit status 1" in (tmp_path / "table.md").read_text()


def test_benchmarks_come_last_and_alone(runner, capsys):
    code = "import time; print(time.monotonic()); time.sleep(0.5); print(time.monotonic())"
    parts = {
        name: lambda name=name: Part(name, [[python(name, code, quote=r"[\d.]+")]])
        for name in ("compiled", "benchmarks", "tests", "train")
    }
    results = gpu_check.run(parts, list(parts), runner, 100.0)
    assert {result.name for result in results} == set(parts)
    times = {result.name: [float(t) for t in result.summary.split("; ")] for result in results}
    assert times["compiled"][0] > times["benchmarks"][1]
    assert times["benchmarks"][0] > max(times["tests"][1], times["train"][1])
    assert max(times["tests"][0], times["train"][0]) < min(times["tests"][1], times["train"][1])
    assert "benchmarks: passed in" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as end:
        kernel_check.main([])
    assert end.value.code == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["--only", "everything"], "invalid choice"), (["--limit", "5"], "at least 60 seconds")],
)
def test_bad_arguments(words, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        gpu_check.main(words)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


# -- the kernels ----------------------------------------------------------------------------------

TINY = kernel_check.Sizes(
    dim=32, search_len=3, rec_len=5, n_users=4, steps=1, hidden=(24, 16), n_candidates=7, n_items=60
)


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.parametrize("family", kernel_check.FAMILIES)
def test_families_are_right(family, capsys):
    if torch.cuda.is_available():
        settings = {n: kernel_check.Setting(d, "cuda") for n, d in kernel_check.DTYPES.items()}
    else:  # interpreted, bfloat16 truncates
        settings = {"fp32": kernel_check.Setting(torch.float32, "cpu", TINY)}
    assert kernel_check.check([family], settings) == 0
    assert f"{family}, fp32: as the reference" in capsys.readouterr().out


def test_a_wrong_result_is_found(monkeypatch, capsys):
    right = kernel_check.ranking.ranking_metrics

    def wrong(*args, backend, **options):
        found = right(*args, backend=backend, **options)
        return {n: v + 1e-3 * (backend == "cpp") for n, v in found.items()}

    monkeypatch.setattr(kernel_check.ranking, "ranking_metrics", wrong)
    setting = kernel_check.Setting(torch.float32, "cpu", TINY)
    assert kernel_check.check(["ranking"], {"fp32": setting}) == 1
    assert "ranking, fp32: FAILED" in capsys.readouterr().out


def test_the_report_says_what_a_case_took_then_and_takes_now():
    def timed(name: str, called: float, captured: float | None = None) -> dict:
        others = {} if captured is None else {"captured": {"median": captured}}
        return {
            "fullname": f"benchmarks/bench_reasoning.py::test_forward[{name}]",
            "stats": {"median": called},
            "extra_info": {"case": name, "others": others},
        }

    before = {
        "datetime": "2026-11-25T10:00:00",
        "benchmarks": [timed("B = 1", 4e-3, 6e-4), timed("B = 2", 1.0)],
    }
    now = {"benchmarks": [timed("B = 1", 2e-3, 3e-4), timed("B = 3", 1.0)]}
    table = gpu_check.then_and_now(before, now)
    assert "| forward, B = 1 | called | 4 | 2 | 2.00 |" in table
    assert "| forward, B = 1 | captured | 0.6 | 0.3 | 2.00 |" in table
    assert "the run of 2026-11-25" in table
    assert "B = 2" not in table
    assert "B = 3" not in table
    assert gpu_check.then_and_now(before, {"benchmarks": []}) == ""
