"""Whether float32 products may be TF32's, whichever of torch's settings says so."""

import warnings

import pytest
import torch

from lcr_fast.precision import allows_tf32
from lcr_fast.testing import tf32


@pytest.fixture(autouse=True)
def _default():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def old(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)


def allow(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


def new(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def generic(precision: str) -> None:
    torch.backends.fp32_precision = precision


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ([], False),
        ([(old, "high")], True),
        ([(old, "medium")], True),
        ([(old, "high"), (old, "highest")], False),
        ([(allow, True)], True),
        ([(allow, True), (allow, False)], False),
        ([(new, "tf32")], True),
        ([(new, "ieee")], False),
        ([(new, "tf32"), (new, "none")], False),
        ([(new, "none"), (generic, "tf32")], True),
        ([(generic, "tf32"), (new, "ieee")], False),
        ([(new, "tf32"), (old, "highest")], False),
        ([(new, "ieee"), (old, "high")], True),
    ],
)
def test_either_setting_is_read(settings, allowed):
    for setting, value in settings:
        setting(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert allows_tf32() == allowed


@pytest.mark.parametrize("setting", [old, new])
def test_kernels_multiply_as_torch_may(setting):
    pytest.importorskip("triton")
    from lcr_fast.kernels.gpu import dot_precision

    assert dot_precision(torch.float32) == "bf16x6"
    setting({old: "high", new: "tf32"}[setting])
    assert dot_precision(torch.float32) == "bf16x3"
    assert dot_precision(torch.bfloat16) == "ieee"


def test_what_was_allowed_is_allowed_again():
    new("tf32")
    with tf32(False):
        assert not allows_tf32()
        with tf32(True):
            assert allows_tf32()
        assert not allows_tf32()
    assert allows_tf32()


def test_a_compiled_program_follows_the_setting():
    compiled = torch.compile(lambda x: x + allows_tf32(), backend="eager", fullgraph=True)
    for setting, value in ((old, "highest"), (old, "high"), (new, "ieee"), (new, "tf32")):
        setting(value)
        assert compiled(torch.zeros(())) == (value in ("high", "tf32"))
