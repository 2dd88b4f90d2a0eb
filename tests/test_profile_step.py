"""The profile of a step: every stage has a line, and lines add up to the whole."""

import pytest
from torch.profiler import ProfilerActivity, profile

import profile_step
from lcr_fast import profiling

TINY = (
    *("--users", "2", "--steps", "1", "--dim", "8", "--candidates", "4", "--population", "24"),
    *("--repeats", "2", "--backend", "reference"),
)
TRAINING = {"batch", "encode", "score", "loss", "backward", "optimizer"}
STAGES = {
    "phase1": TRAINING | {"reason"},
    "phase2": TRAINING | {"rollout", "reward"},
    "inference": {"encode", "reason", "score"},
}


@pytest.mark.parametrize("workload", STAGES)
def test_the_table(workload, capsys):
    profile_step.main([workload, *TINY])
    header, _, *lines = capsys.readouterr().out.rstrip().splitlines()
    assert header.split() == ["range", "calls", "ms", "a", "repeat", "share"]
    whole, *parts = [line.rsplit(maxsplit=3) for line in lines]
    assert whole[0] == workload
    assert whole[1] == "2"
    assert whole[3] == "100.0%"
    direct = {line.lstrip(". ").split("  ")[0]: line for line in lines[1:] if line[2] != "."}
    assert direct.keys() == STAGES[workload] | {"(no range)"}
    total = sum(float(line.split()[-2]) for line in direct.values())
    assert total == pytest.approx(float(whole[2]), abs=0.01)
    step = next(line for line in lines if "reason step 1" in line)
    assert step.startswith(". . ")
    assert all(float(part[2]) >= 0 for part in parts)


def test_bare_leaves_the_ranges_to_others(capsys):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        profile_step.main(["inference", *TINY, "--bare"])
    assert capsys.readouterr().out == ""
    names = [event.name for event in profiler.events()]
    assert names.count("inference") == 2
    assert names.count("reason") == 2
    assert profiling.range_("x") is profiling.range_("y")  # the switch went back


def test_help_names_the_commands_of_other_profilers(capsys):
    with pytest.raises(SystemExit) as end:
        profile_step.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "nsys profile --" in text
    assert "ncu --" in text
    assert text.count(" \\\n") == 3


@pytest.mark.parametrize("words", [["--repeats", "0"], ["--steps", "-1"], ["phase3"]])
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit) as end:
        profile_step.main(words)
    assert end.value.code == 2
    assert words[0] in capsys.readouterr().err
