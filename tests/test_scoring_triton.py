"""Scoring by the Triton kernels, which run where tests/where.py says."""

import contextlib
import copy
import importlib.util

import pytest
import torch

import tensor_core
from lcr_fast import ops
from lcr_fast.ops.noise import Dropout
from lcr_fast.testing import assert_parity_with_luck, every_op_rounded, neighbours
from lcr_fast.weights import ScoringWeights
from scoring_cases import (
    Case,
    all_scores,
    assert_counted,
    assert_full_sort,
    assert_only_inputs_and_ids_are_kept,
    assert_padding_and_strides_change_no_bit,
    assert_serves_no_user_and_no_candidate,
    catalogue_case,
    check_registered_ops,
)
from where import DEVICE, GPU, HALVES, INTERPRETED

triton_installed = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def on_triton(test):
    """Mark a test of the Triton kernels."""
    return pytest.mark.gpu(triton_installed(test))


def kernel_case(head="mlp", **options) -> Case:
    """Small, yet with two blocks of events and of hidden units, each ragged.

    The first five users are the corners, among them both streams full, each empty, and both empty.
    """
    sizes = {"max_search_len": 5, "max_rec_len": 37, "mlp_hidden": (40, 24)}
    return Case(head, **(sizes | options)).to(DEVICE)


def exact_case(n_items=0, copies=False, **options) -> Case:
    """Integers and one event at most: no sum is rounded, in whatever order it is taken.

    The interpreter's products are numpy's, whose bits depend on the place of a row in the matrix.
    """
    sizes = {"max_search_len": 1, "max_rec_len": 1, "mlp_hidden": (20, 12)} | options
    case = catalogue_case(n_items, copies=copies, **sizes) if n_items else Case(**sizes)
    case.tensors = {k: (4 * v).round() for k, v in case.tensors.items()}
    w = case.weights
    case.weights = ScoringWeights(
        *((4 * x.detach()).round() if torch.is_tensor(x) else
          tuple((4 * y.detach()).round() for y in x) for x in w[:3]), w.dot,
    )  # fmt: skip
    case.upstream = (4 * case.upstream).round()
    return case.to(DEVICE)


def assert_kernels_match(case: Case, dtype=torch.float32, **options):
    """Hold every result to the parity rule, the states' gradients with a larger factor.

    Softmax's gradient subtracts dz . z here, in the reference the sum of p dz . h: where they
    cancel, as with one event, only the latter leaves nothing. Up to 9 times its error was seen.
    """
    fused = case.run("triton", dtype, **options)
    generator = torch.Generator().manual_seed(0)
    with every_op_rounded() if dtype.itemsize < 4 else contextlib.nullcontext():
        eager = [case.run("reference", dtype, **options)]
        for _ in range(2):
            near = copy.copy(case)
            near.tensors = neighbours({k: v.to(dtype) for k, v in case.tensors.items()}, generator)
            eager.append(near.run("reference", dtype, **options))
    exact = case.run("reference", torch.float64, **options)
    assert fused.keys() >= exact.keys()
    for name, value in fused.items():
        if name not in exact:  # what the head does not read
            assert not value.any()
            continue
        factor = 10 if name in ("search", "rec") else 3
        near = [results[name] for results in eager]
        assert_parity_with_luck(name, value, near, exact[name], factor)


@on_triton
@pytest.mark.parametrize(("head", "n_candidates"), [
    ("mlp", 1), ("mlp", 5), ("mlp", 37), ("mlp without user", 5), ("dot", 5), ("dot", 37),
    ("mlp and dot", 37),
])  # fmt: skip
def test_triton_parity_of_scores_and_gradients(head, n_candidates):
    n_users = 12 if n_candidates < 20 else 6
    assert_kernels_match(kernel_case(head, n_candidates=n_candidates, n_users=n_users))


@on_triton
@pytest.mark.parametrize(
    "changes",
    [
        {"trajectories": 1},
        {"trajectories": 3, "n_candidates": 19, "n_users": 5},
        {"dim": 64, "n_users": 7},
        {"dim": 128, "n_users": 5, "mlp_hidden": (20, 4)},
        {"dim": 64, "n_users": 7, "n_candidates": 37, "mlp_hidden": (200, 80)},
        {"n_users": 7, "mlp_hidden": (512, 128)},
        {"n_users": 7, "mlp_hidden": (33, 7)},
        {"max_search_len": 0, "n_candidates": 17},
        {"trajectories": 3, "n_users": 5, "score": "mlp_dot", "user_embedding": False},
    ],
    ids=str,
)
def test_triton_parity_in_other_shapes(changes):
    assert_kernels_match(kernel_case(**changes))


@triton_installed
@pytest.mark.skipif(not INTERPRETED, reason="a GPU has tensor cores")
@pytest.mark.parametrize(
    ("head", "precision"), [("mlp", "highest"), ("mlp", "high"), ("mlp and dot", "highest")]
)
def test_triton_parity_with_the_rounding_of_tensor_cores(monkeypatch, head, precision):
    with tensor_core.multiplying(monkeypatch, precision):
        case = kernel_case(head, trajectories=1)
        fused, exact = case.run("triton"), case.run("reference", torch.float64)
        if precision == "highest":
            assert_kernels_match(case)
    error = (fused["scores"].double() - exact["scores"]).abs().max()
    assert (error > 1e-5) == (precision == "high")  # the model multiplies, and as it was asked


@on_triton
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("changes", [{}, {"trajectories": 3}, {"score": "mlp_dot"}], ids=str)
def test_triton_parity_of_halves(changes, dtype):
    assert_kernels_match(kernel_case(**changes), dtype)


@on_triton
@pytest.mark.parametrize("dtype", HALVES)
def test_triton_casts_weights_and_users_to_the_states(dtype):
    """In both passes alike, as if the caller had rounded them."""
    case, states = kernel_case(), ("search", "rec")
    half = {k: v.to(dtype) for k, v in case.tensors.items()}
    as_they_are = [k for k in half if k.startswith("bias") or k == "weight 2"]  # no operands
    wide = {
        k: half[k] if k in states else half[k].float() if k in as_they_are else v
        for k, v in case.tensors.items()
    }
    results = []
    for tensors in (half, wide):
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        scores = case.call("triton", leaves)
        gradients = torch.autograd.grad(scores, list(leaves.values()), case.upstream.to(dtype))
        results.append({"scores": scores, **dict(zip(leaves, gradients, strict=True))})
    for name, value in results[1].items():
        assert value.dtype == (dtype if name in ("scores", *states) else torch.float32), name
        if name != "weight 0":  # whose users' columns take the users' vectors
            assert torch.equal(value.to(dtype), results[0][name]), name


@on_triton
@pytest.mark.parametrize(("head", "n_candidates"), [("mlp", 5), ("mlp", 19), ("mlp and dot", 5)])
def test_triton_parity_with_dropout(head, n_candidates):
    rows = torch.tensor([5, 2**40 + 1, 0, 7, 7, 3], device=DEVICE)
    dropout = Dropout(0.3, 2**60 + 5, rows)
    assert_kernels_match(kernel_case(head, n_candidates=n_candidates), dropout=dropout)


@on_triton
@pytest.mark.parametrize("shared", [False, True])
def test_triton_gathers_ids(shared):
    """Duplicates and row 0 included, in the bits of the gathered vectors, the same each time."""
    case = kernel_case(n_candidates=19, max_rec_len=9)
    g = torch.Generator().manual_seed(3)
    table = torch.randn(11, 32, generator=g).to(DEVICE)
    ids = torch.randint(0, 11, (1 if shared else 6, 19), generator=g).to(DEVICE)
    case.tensors["candidates"] = table
    assert_kernels_match(case, ids=ids)
    once, twice = case.run("triton", ids=ids), case.run("triton", ids=ids)
    gathered = case.call("triton", {**case.tensors, "candidates": table[ids]})
    assert torch.equal(once["scores"], gathered)
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name


@on_triton
@pytest.mark.parametrize("n_candidates", [5, 37])
def test_triton_permutes_with_the_candidates(n_candidates):
    """Scores and the candidates' gradients move along, bit by bit, over tiles and copies too."""
    case = exact_case(n_candidates=n_candidates)
    candidates, upstream = case.tensors["candidates"].clone(), case.upstream
    candidates[:, -1] = candidates[:, 0]
    order = torch.randperm(n_candidates, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    case.tensors["candidates"] = candidates
    before = case.run("triton")
    assert torch.equal(before["scores"][:, -1], before["scores"][:, 0])
    case.tensors["candidates"], case.upstream = candidates[:, order], upstream[:, order]
    after = case.run("triton")
    for name in ("scores", "candidates"):
        assert torch.equal(after[name], before[name][:, order]), name


@on_triton
def test_triton_chunks_and_runs_change_no_bit(monkeypatch):
    """One user of scratch at a time, of forward one candidate, and one program for a run."""
    from lcr_fast.kernels.scoring import call, forward

    case = kernel_case(trajectories=3, max_rec_len=9, n_users=5)
    expected = case.run("triton")
    monkeypatch.setattr(call, "SCRATCH_BYTES", 1)
    for module in (call, forward):
        monkeypatch.setattr(module, "PROGRAMS", 1)
    for name, value in case.run("triton").items():
        if "weight" in name or "bias" in name:  # sums over users, in other groups
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(value, expected[name]), name


@on_triton
@pytest.mark.parametrize("head", ["mlp", "dot"])
def test_triton_writes_every_element(head):
    """Memory that torch.empty hands out holds NaN in the second run."""
    case = kernel_case(head)
    expected = case.run("triton")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for name, value in case.run("triton").items():
            assert torch.equal(value, expected[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


@on_triton
def test_triton_reads_no_padding_and_keeps_only_its_inputs():
    case = kernel_case()
    assert_padding_and_strides_change_no_bit(case, "triton")
    assert_only_inputs_and_ids_are_kept(case, "triton")


@on_triton
def test_triton_reads_no_other_user_behind_a_length_that_is_too_large():
    case = kernel_case()
    expected = case.run("triton")
    sizes = (case.tensors[name].shape[1] for name in ("search", "rec"))
    case.lengths = [
        lengths + 3 * (lengths == size) for lengths, size in zip(case.lengths, sizes, strict=True)
    ]
    for name, value in case.run("triton").items():
        assert torch.equal(value, expected[name]), name


@on_triton
def test_triton_scores_a_user_alone_as_in_a_batch():
    """By the bit, whichever tile of rows its candidates fall into."""
    case = kernel_case(n_candidates=37, n_users=9) if GPU else exact_case(n_candidates=37)
    together = case.run("triton")
    for user in (3, 5):
        alone = copy.copy(case)
        of_user = slice(user, user + 1)
        alone.lengths = [lengths[of_user] for lengths in case.lengths]
        alone.upstream = case.upstream[of_user]
        names = ("search", "rec", "candidates", "user")
        alone.tensors = {k: v[of_user] if k in names else v for k, v in case.tensors.items()}
        for name in ("scores", *names):
            assert torch.equal(alone.run("triton")[name][0], together[name][user]), name


@on_triton
def test_triton_registered_ops():
    check_registered_ops("triton", Case(n_users=1, mlp_hidden=(6, 5)).to(DEVICE))


@on_triton
def test_triton_serves_no_user_and_no_candidate():
    assert_serves_no_user_and_no_candidate(kernel_case, "triton")


@on_triton
@pytest.mark.parametrize(
    ("head", "n_items", "copies"),
    [("mlp", 1, False), ("mlp", 150, True), ("mlp and dot", 40, True)],
)
def test_triton_topk_is_a_full_sort(head, n_items, copies, monkeypatch):
    """Of equal scores the lower id first, whichever tile, split or pass each is found in."""
    from lcr_fast.kernels.scoring import catalogue

    case = exact_case(n_items=n_items, copies=copies, head=head)
    scores = all_scores(case, "triton")
    tensors = {**case.tensors, "candidates": case.tensors["table"]}
    ids = torch.arange(1, n_items + 1, device=DEVICE)[None]
    assert torch.equal(scores[:, 1:].to(DEVICE), case.call("reference", tensors, ids=ids))
    if copies:
        assert len(scores[0, 1:].unique()) < n_items / 2
    monkeypatch.setattr(catalogue, "MAX_K", 4)
    for k in (1, 6):
        assert_full_sort(case, scores, k, "triton")


@on_triton
@pytest.mark.parametrize(("head", "copies"), [("mlp", False), ("mlp", True), ("mlp and dot", True)])
def test_triton_ranks_are_counted(head, copies):
    case = exact_case(n_items=150, copies=copies, head=head)
    tensors = {**case.tensors, "candidates": case.tensors["table"]}
    scores = case.call("reference", tensors, ids=torch.arange(151, device=DEVICE)[None])
    target = torch.tensor([0, 150, 17, 9, 1, 16])  # 9 is excluded
    bonus = torch.tensor([0.0, 0.0, 1.0, 0.0, -2.0, 0.5])
    assert_counted(case, scores.cpu(), target, bonus, "triton")


@on_triton
def test_triton_names_a_nan(monkeypatch):
    case = exact_case(n_items=20)
    case.tensors["search"][2, 0] = torch.nan
    for function, argument in (
        (ops.score_topk, 3),
        (ops.score_rank, torch.full((6,), 2, device=DEVICE)),
    ):
        with pytest.raises(ValueError, match="user 2 of the batch has a NaN score"):
            case.catalogue(function, argument, backend="triton")
    # A compiled model cannot raise: it must not look like a list, nor leave the item table.
    monkeypatch.setattr("lcr_fast.ops.scoring._raise_nan", lambda *_: None)
    ids, scores = case.catalogue(ops.score_topk, 3, backend="triton")
    assert scores[2].isnan().all()
    assert not ids[2].any()


@on_triton
def test_triton_names_a_nan_of_the_bonus():
    case = exact_case(n_items=20)
    bonus = torch.tensor([0.0, 0.0, 0.0, torch.nan, 0.0, 0.0], device=DEVICE)
    target = torch.full((6,), 2, device=DEVICE)
    with pytest.raises(ValueError, match="user 3 of the batch has a NaN score"):
        case.catalogue(ops.score_rank, target, bonus=bonus, backend="triton")
    case.catalogue(ops.score_rank, target * (bonus == 0), bonus=bonus, backend="triton")


def test_small_gpus_get_small_tiles():
    configs = pytest.importorskip("lcr_fast.kernels.scoring.config")
    gpus = pytest.importorskip("lcr_fast.kernels.gpu")
    case = (64, 100, 50, torch.bfloat16, "ieee")
    large = configs.config("score_fwd", *case, gpus.GPUS["sm_80"])
    small = configs.config("score_fwd", *case, gpus.Gpu(8, 99 << 10))
    assert (large["CANDIDATES"], small["CANDIDATES"]) == (64, 16)


@pytest.mark.parametrize(("major", "expected"), [(9, 64), (10, 32), (11, 32)])
def test_the_catalogue_does_without_tensor_memory(major, expected):
    configs = pytest.importorskip("lcr_fast.kernels.scoring.config")
    gpus = pytest.importorskip("lcr_fast.kernels.gpu")
    gpu = gpus.Gpu(major, 227 << 10)
    chosen = configs.catalogue_config(64, 50, torch.bfloat16, "ieee", gpu)
    assert chosen["CANDIDATES"] == expected
