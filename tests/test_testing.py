"""The assertion that other tests rely on must itself reject wrong results."""

from types import SimpleNamespace

import pytest
import torch

from lcr_fast import LCRConfig
from lcr_fast.testing import (
    EncoderCase,
    assert_parity,
    random_batch,
    random_encoder,
    random_model,
    random_streams,
    relu_inputs,
    run_encoder,
    without_kinks,
)
from lcr_fast.weights import REC

EXACT = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EAGER = EXACT.float()
U = torch.finfo(torch.float32).eps / 2


def one_wrong_element():
    wrong = EAGER.clone()
    wrong[3, 4] += 1e-5
    return wrong


def not_finite(value):
    wrong = EAGER.clone()
    wrong[0, 0] = value
    return wrong


REJECTED = {
    "one wrong element": (one_wrong_element, "max error"),
    # Every element is within the budget of the largest one: only the RMS sees it.
    "small error everywhere": (lambda: (EXACT + 1.5 * U).float(), "rms error"),
    "rounded to half": (lambda: EXACT.half().float(), "max error"),
    "nan": (lambda: not_finite(torch.nan), "non-finite"),
    "inf": (lambda: not_finite(torch.inf), "non-finite"),
    "dtype": (EXACT.half, "dtype"),
    "shape": (lambda: EAGER[:1].clone(), "shape"),
    "shape that would broadcast": (lambda: EAGER[None], "shape"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_assert_parity_rejects(case):
    make, message = REJECTED[case]
    with pytest.raises(AssertionError, match=message):
        assert_parity("y", make(), EAGER, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_assert_parity_accepts_a_correctly_rounded_result(dtype):
    rounded = EXACT.to(dtype)
    assert_parity("y", rounded, rounded, EXACT)
    # Eager is exact by luck, the fused result one unit in the last place off.
    exact = torch.tensor([1.5, 4.0], dtype=torch.float64)
    fused = exact.to(dtype) + torch.tensor([torch.finfo(dtype).eps, 0.0], dtype=dtype)
    assert_parity("y", fused, exact.to(dtype), exact)


def test_assert_parity_accepts_empty_results_and_wants_a_float64_oracle():
    assert_parity("y", torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3).double())
    with pytest.raises(AssertionError, match="float64"):
        assert_parity("y", EAGER, EAGER, EAGER)
    with pytest.raises(AssertionError, match="eager result has non-finite"):
        assert_parity("y", EAGER, not_finite(torch.nan), EXACT)


def call_near_a_kink(distance: float):
    """Give a hidden unit of the first user's second event an input so far from 0."""
    call = random_encoder(EncoderCase(n_layers=1))
    _, of_rec = relu_inputs(call, run_encoder)
    call.inputs["ffn_in_bias"][0, REC, 3] += distance - of_rec[0, 1, 3]
    return call.to(torch.float32)


def test_a_user_whose_gradient_rounding_decides_has_no_upstream_gradient():
    call = call_near_a_kink(1e-8)
    kept = without_kinks(call, run_encoder)
    for name, upstream in kept.upstream.items():
        assert not upstream[0].any()
        assert torch.equal(upstream[1:], call.upstream[name][1:])
    assert kept.inputs is call.inputs
    for same in (call_near_a_kink(1e-4), call_near_a_kink(1e-8).to(torch.bfloat16)):
        for name, upstream in without_kinks(same, run_encoder).upstream.items():
            assert torch.equal(upstream, same.upstream[name])


def test_every_upstream_gradient_stays_where_rounding_decides_nearly_all():
    call = random_encoder(EncoderCase(n_layers=1)).to(torch.float32)
    rounded = {name: t.bfloat16().float() for name, t in call.inputs.items()}

    def in_half(of_call, backend):  # eager's run, as inexact as a half
        is_eager = of_call.inputs["rec"].dtype == torch.float32
        return run_encoder(of_call._replace(inputs=rounded) if is_eager else of_call, backend)

    assert without_kinks(call, in_half) is call


CONFIG = LCRConfig(
    n_items=20, n_users=3, n_terms=9, dim=4, max_search_len=3, max_rec_len=5, max_clicks=2,
    user_embedding=True,
)  # fmt: skip


def test_random_batch_has_the_corners_and_fits_the_config():
    batch = random_batch(CONFIG, 40, 6, torch.Generator().manual_seed(0))
    lengths = list(zip(batch.search_lengths.tolist(), batch.rec_lengths.tolist(), strict=True))
    assert lengths[:5] == [(3, 5), (0, 5), (3, 0), (0, 0), (1, 1)]
    assert {n for n, _ in lengths} == set(range(4))
    assert {n for _, n in lengths} == set(range(6))
    assert batch.row.unique().numel() == 40
    random_model(CONFIG, torch.Generator().manual_seed(0)).check(batch)


def test_random_streams_poison_their_padding():
    search, rec, search_lengths, rec_lengths = random_streams(
        CONFIG, 6, torch.Generator().manual_seed(0)
    )
    for x, lengths in ((search, search_lengths), (rec, rec_lengths)):
        assert (x.isfinite().all(-1).sum(-1) == lengths).all()


def test_random_model_has_no_trivial_weight():
    model = random_model(CONFIG, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        values = parameter.detach()[1:] if "embedding.weight" in name else parameter.detach()
        assert ((values != 0) & (values != 1)).all(), name
    assert not model.training


# -- tests/conftest.py ----------------------------------------------------------------------------


class _Properties:
    total_memory = 36 << 30


@pytest.mark.parametrize(
    ("change", "on_cpu", "on_gpu"),
    [
        ({}, 4, 6),
        ({"numprocesses": 0}, 0, 0),  # asked for
        ({"usepdb": True}, None, None),
        ({"capture": "no"}, None, None),
        ({"collectonly": True}, None, None),
        ({"args_source": pytest.Config.ArgsSource.ARGS}, None, None),  # some tests
        ({"workerinput": {}}, None, None),
    ],
    ids=str,
)
def test_a_whole_run_takes_several_processes(monkeypatch, pytestconfig, change, on_cpu, on_gpu):
    (conftest,) = (
        plugin
        for plugin in pytestconfig.pluginmanager.get_plugins()
        if hasattr(plugin, "_MOST_ON_GPU")
    )
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: _Properties)
    for has_gpu, expected in ((False, on_cpu), (True, on_gpu)):
        option = SimpleNamespace(
            numprocesses=None, collectonly=False, usepdb=False, capture="fd", dist="no"
        )
        config = SimpleNamespace(option=option, args_source=pytest.Config.ArgsSource.TESTPATHS)
        for name, value in change.items():
            setattr(option if hasattr(option, name) else config, name, value)
        monkeypatch.setattr(conftest, "GPU", has_gpu)
        conftest.pytest_cmdline_main(config)
        assert option.numprocesses == expected
        assert option.dist == ("worksteal" if expected else "no")
