"""Every case that the Triton kernels serve has a configuration, whatever the GPU."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from lcr_fast.kernels import reasoning_config as configs
from lcr_fast.kernels._launch import GPUS, Gpu, gpu_of

SMALL = Gpu(8, 99 << 10)  # such as sm_86 and sm_89
A100, H100 = GPUS["sm_80"], GPUS["sm_90"]
NEWER = Gpu(12, 99 << 10)


@pytest.mark.parametrize("gpu", [SMALL, A100, H100, NEWER], ids=str)
@pytest.mark.parametrize("which", ["fwd", "recompute", "bwd"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "tf32"), (torch.float32, "ieee"), (torch.bfloat16, "ieee")],
    ids=str,
)
def test_every_case_has_a_configuration(which, dtype, precision, gpu):
    for D, size in itertools.product((32, 64, 128), (1, 16, 17, 50, 64, 65, 128)):
        for H in (1, 2, D // 16):
            tile = configs.tile(size, 1)
            compiled = configs.constants(which, D, 48, H, tile, dtype, precision, gpu)
            assert compiled["num_warps"] in (4, 8, 16)
            assert compiled["PARK"] in (0, 1, 2)
            assert compiled["RELOAD"] == (compiled["PARK"] == 2)
            assert 48 % compiled["BLOCK_F"] == 0
            if precision == "ieee" and dtype == torch.float32:
                assert compiled["PRECISION"] in ("ieee16", "ieee32")
            if which != "fwd":
                assert compiled["PARK"] in (0, 2)


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        ((20, 20), (1, (32, 32))),
        ((1, 16), (2, (16, 16))),
        ((5, 17), (1, (16, 32))),
        ((50, 128), (1, (64, 128))),
    ],
)
def test_short_histories_share_a_tile(size, tile):
    assert configs.tile(*size) == tile


def test_products_are_cut_where_a_wide_head_does_not_fit_shared_memory():
    def precision(which, H, dtype, gpu):
        return configs.constants(which, 128, 128, H, configs.tile(128, 128), dtype, "tf32", gpu)[
            "PRECISION"
        ]

    assert precision("bwd", 2, torch.float32, H100) == "tf32"
    assert precision("bwd", 2, torch.float32, A100) == "ieee16"
    assert precision("bwd", 4, torch.float32, A100) == "tf32"
    assert precision("fwd", 1, torch.float32, A100) == "tf32"
    assert precision("fwd", 1, torch.float32, SMALL) == "ieee16"
    assert precision("bwd", 1, torch.bfloat16, A100) == "ieee16"
    assert precision("bwd", 2, torch.bfloat16, A100) == "tf32"  # halves do not ask


def test_a_gpu_is_described_and_an_old_one_refused(monkeypatch):
    class Properties:
        major, minor, shared_memory_per_block_optin = 9, 0, 227 << 10

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert gpu_of(torch.device("cuda", 0)) == H100
    assert gpu_of(torch.device("cpu")) == A100
    Properties.major, Properties.minor = 7, 5
    with pytest.raises(ValueError, match=r"8\.0 or more, cuda:0 has 7\.5; use backend='reference'"):
        gpu_of(torch.device("cuda", 0))
