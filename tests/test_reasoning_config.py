"""Every case that the Triton kernels serve has a configuration, whatever the GPU."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from lcr_fast.kernels.gpu import GPUS, Gpu, gpu_of
from lcr_fast.kernels.reasoning import config as configs

SMALL = Gpu(8, 99 << 10)  # such as sm_86 and sm_89
A100, H100 = GPUS["sm_80"], GPUS["sm_90"]
NEWER = Gpu(12, 99 << 10)
THOR = Gpu(11, 227 << 10)


@pytest.mark.parametrize("gpu", [SMALL, A100, H100, NEWER, THOR], ids=str)
@pytest.mark.parametrize("which", ["fwd", "recompute", "bwd"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "bf16x3"), (torch.float32, "bf16x6"), (torch.bfloat16, "ieee")],
    ids=str,
)
def test_every_case_has_a_configuration(which, dtype, precision, gpu):
    for D, size in itertools.product((32, 64, 128), (1, 16, 17, 50, 64, 65, 128)):
        for H in (1, 2, D // 16):
            compiled = configs.constants(which, D, 48, H, (size, 1), dtype, precision, gpu)
            assert compiled["num_warps"] in (4, 8, 16)
            shape = compiled["SHAPE"]
            assert 48 % shape.BLOCK_F == 0
            assert D % shape.BLOCK_HEADS == 0
            assert shape.BLOCK_HEADS % (D // H) == 0
            assert shape.PRECISION.removesuffix(" cut") == precision


@pytest.mark.parametrize(
    ("size", "rows", "tile"),
    [
        ((20, 20), 64, (2, (32, 32))),
        ((1, 16), 64, (4, (16, 16))),
        ((1, 16), 32, (2, (16, 16))),
        ((5, 17), 32, (1, (16, 32))),
        ((50, 128), 64, (1, (64, 128))),
    ],
)
def test_short_histories_share_a_tile(size, rows, tile):
    assert configs.Config(4, rows=rows).tile(*size) == tile


def test_what_does_not_fit_shared_memory_has_fewer_rows_or_is_cut():
    def config(which, D, H, slot, gpu, dtype=torch.float32, precision="bf16x6"):
        return configs.config(which, D, H, slot, dtype, precision, gpu)

    assert not config("bwd", 64, 2, 128, H100).cut
    assert config("bwd", 128, 2, 128, H100).cut
    assert not config("bwd", 128, 2, 128, H100, precision="bf16x3").cut
    assert config("bwd", 128, 2, 128, A100, precision="bf16x3").cut
    assert not config("bwd", 128, 4, 128, A100, precision="bf16x3").cut
    assert not config("fwd", 128, 1, 128, A100, precision="bf16x3").cut
    assert config("fwd", 128, 1, 128, SMALL, precision="bf16x3").cut
    assert config("bwd", 128, 1, 128, A100, torch.bfloat16, "ieee").cut
    assert config("fwd", 64, 2, 32, A100).rows == 64
    assert config("fwd", 64, 1, 32, SMALL).rows == 32  # 64 rows would not fit


def test_cross_attention_of_wide_states_is_parked_where_shared_memory_is_small():
    for slot, n_heads in ((16, 8), (64, 8), (64, 4)):
        call = (128, n_heads, slot, torch.float32, "bf16x3")
        assert configs.config("cross_bwd", *call, SMALL).parked
        assert not configs.config("cross_bwd", *call, A100).parked
        assert configs.config("bwd", *call, SMALL) == configs.config("bwd", *call, A100)


def test_all_heads_are_taken_at_once_where_a_loop_over_them_keeps_too_much():
    def config(which, D, slot, gpu, precision="bf16x6"):
        return configs.config(which, D, 2, slot, torch.float32, precision, gpu)

    for D, slot, gpu in ((128, 128, H100), (64, 128, SMALL), (64, 128, NEWER)):
        chosen = config("recompute", D, slot, gpu)
        assert (chosen.heads(D, 2), chosen.cut) == (D, True)
    for slot in (16, 32, 64):
        assert config("fwd", 128, slot, SMALL, "bf16x3").heads(128, 2) == 128
        assert config("fwd", 128, slot, A100, "bf16x3").heads(128, 2) == 64
    # What fits is forward's.
    for D, slot, gpu in ((128, 64, H100), (64, 128, A100), (32, 128, SMALL)):
        assert config("recompute", D, slot, gpu) == config("fwd", D, slot, gpu)
    assert config("recompute", 128, 128, H100, "bf16x3") == config("fwd", 128, 128, H100, "bf16x3")


@pytest.mark.parametrize(
    ("which", "D", "H", "is_without"),
    [
        ("fwd", 64, 1, True),
        ("fwd", 128, 1, True),
        ("fwd", 32, 2, True),
        ("recompute", 64, 1, True),
        ("fwd", 64, 2, False),
        ("fwd", 128, 2, False),
        ("bwd", 64, 1, False),
    ],
)
def test_a_forward_pass_over_the_whole_width_does_without_tensor_memory(which, D, H, is_without):
    """As does all of float32, whose products have as many sums as parts are multiplied."""
    for slot, gpu in itertools.product((16, 32, 64), (GPUS["sm_100"], THOR)):
        chosen = configs.config(which, D, H, slot, torch.bfloat16, "ieee", gpu)
        assert (chosen.num_warps == 16) == is_without
        for precision in ("bf16x3", "bf16x6"):
            chosen = configs.config(which, D, H, slot, torch.float32, precision, gpu)
            assert chosen.num_warps == 16


def test_a_gpu_is_described(monkeypatch):
    class Properties:
        major, minor, shared_memory_per_block_optin = 9, 0, 227 << 10

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert gpu_of.__wrapped__(torch.device("cuda", 0)) == H100
    assert gpu_of(torch.device("cpu")) == A100
