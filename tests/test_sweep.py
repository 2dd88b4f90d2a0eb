"""The sweep of configurations, without a GPU: what it would run, and that it is what runs."""

import pytest
import torch

pytest.importorskip("triton")

import sweep
from lcr_fast.kernels import weight_gradients
from lcr_fast.kernels.gpu import GPUS
from lcr_fast.kernels.reasoning import config as reasoning_config
from lcr_fast.kernels.scoring import config as scoring_config


def test_every_job_is_another_one():
    names = [str(job) for job in sweep.jobs()]
    assert len(set(names)) == len(names)
    ops = {"forward", "backward", "encode", "encode backward", "score", "products"}
    assert {job.op for job in sweep.jobs()} == ops


@pytest.mark.parametrize("op", ["forward", "backward", "encode", "encode backward"])
def test_a_configuration_is_that_of_the_asked_pass_alone(op):
    asked = sweep.Config(16, True, 128)
    case = (64, 2, 32, torch.float32, "bf16x6", GPUS["sm_90"])
    with sweep._configured(sweep.Job(op, "bf16x6", 64, 30, asked)):
        found = {which: reasoning_config.config(which, *case) for which in ("fwd", "bwd")}
    assert (found["bwd"] == asked) == ("backward" in op)
    assert (found["fwd"] == asked) != (found["bwd"] == asked)
    assert reasoning_config.config("fwd", *case) != asked


def test_tiles_are_the_asked_ones():
    asked = sweep.Tiles(16, 32, 16, 8, 1)
    case = ("score_fwd", 64, 100, 50, torch.float32, "bf16x3", GPUS["sm_90"])
    with sweep._configured(sweep.Job("score", "bf16x3", 64, 30, asked)):
        assert scoring_config.config(*case)["num_warps"] == 8
    assert scoring_config.config(*case)["num_warps"] == 4


def test_sums_are_tiled_as_asked(monkeypatch):
    asked = sweep.Sums(256, 64, 128, 8, 1)
    before, launched = dict(weight_gradients.CONFIG), []
    monkeypatch.setattr(
        weight_gradients, "launch", lambda *arguments, **compiled: launched.append(compiled)
    )
    with sweep._configured(sweep.Job("products", "bf16x3", 64, 30, asked)):
        weight_gradients.product_of_rows(torch.ones(5, 2), torch.ones(5, 2))
    assert tuple(launched[0][name] for name in before) == asked
    assert before == weight_gradients.CONFIG


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert sweep.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
