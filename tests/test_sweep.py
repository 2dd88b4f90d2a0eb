"""The sweep of configurations, without a GPU: what it would run, and that it is what runs."""

import pytest
import torch

pytest.importorskip("triton")

import sweep
from lcr_fast.kernels import weight_gradients
from lcr_fast.kernels.gpu import GPUS
from lcr_fast.kernels.reasoning import config as reasoning_config
from lcr_fast.kernels.scoring import config as scoring_config
from lcr_fast.kernels.scoring.tile import HeadShape


def test_every_job_is_another_one():
    names = [str(job) for job in sweep.jobs()]
    assert len(set(names)) == len(names)
    ops = {"forward", "backward", "encode", "encode backward", "products"}
    assert {job.op for job in sweep.jobs()} == ops | {"score", "score backward"}


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


def test_tiles_of_the_head_are_the_asked_ones():
    asked = sweep.HeadTiles(64, 32, 16, 2, 1)
    head = HeadShape(H1=200, H2=80, H2_TILE=128, DOT=False, HAS_USER=True, DROPOUT=False)
    for name, gpu in GPUS.items():
        case = (64, head, torch.float32, "bf16x6", gpu)
        with sweep._configured(sweep.Job("score backward", "bf16x6", 64, 30, asked)):
            found = scoring_config.head_config(*case)
        assert (found["BLOCK"], found["num_warps"]) == (32, 2), name
        assert scoring_config.head_config(*case)["num_warps"] != 2


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
