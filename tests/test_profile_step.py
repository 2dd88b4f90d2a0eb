"""The profile of a step: every stage has a line, and lines add up to the whole."""

import types

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import profile_step
from lcr_fast import ops, profiling

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
    assert header.split() == ["range", "calls", "ms", "a", "repeat", "share", "operations"]
    whole, *parts = [line.rsplit(maxsplit=4) for line in lines]
    assert whole[0] == workload
    assert whole[1] == "2"
    assert whole[3] == "100.0%"
    direct = {line.lstrip(". ").split("  ")[0]: line for line in lines[1:] if line[2] != "."}
    assert direct.keys() == STAGES[workload] | {"(no range)"}
    for column, error in ((-3, 0.01), (-1, 5)):
        total = sum(float(line.split()[column]) for line in direct.values())
        assert total == pytest.approx(float(whole[column]), abs=error)
    step = next(line for line in lines if "reason step 1" in line)
    assert step.startswith(". . ")
    assert all(float(part[2]) >= 0 for part in parts)


def test_operations_are_counted_where_they_compute():
    """Those of an operation made of others count, views do not; an op of ours is one."""
    weight = torch.ones(3, 4)

    def workload():
        with profiling.range_("inner"):
            torch.nn.functional.linear(weight.view(3, 4), weight)  # addmm or mm of a transpose
            torch.nn.functional.linear(weight, weight, weight[:, 0]).relu()
        with profiling.range_("ours"):
            ops.dropout_masks(torch.arange(3), 5, 0, 1, 2, 4, 0.5, backend="cpp")
        return weight + 1

    lines, kernels = profile_step.profiled("whole", workload, 3)
    assert [(line.path[-1], line.calls) for line in lines] == [
        ("whole", 3), ("inner", 3), ("ours", 3),
    ]  # fmt: skip
    assert lines[1].operations == 3 * 3
    assert lines[0].operations == lines[1].operations + lines[2].operations + 3
    assert not kernels


def test_kernels_have_a_table():
    event = types.SimpleNamespace(
        name="k" * 99, device_type=torch.autograd.DeviceType.CUDA, is_user_annotation=False,
        device_time_total=3000.0,
    )  # fmt: skip
    _, kernels = profile_step.summarize("whole", [event, event])
    row = profile_step.format_kernels(kernels, 2).splitlines()[-1].split()
    assert row == ["k" * 60, "3.000", "100.0%"]


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
