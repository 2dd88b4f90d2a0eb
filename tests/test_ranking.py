"""Ranking metrics: counting against the sorting reference, and both against the definitions."""

import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcr_fast.metrics import TIES, parse_metric
from lcr_fast.ops import ranking
from lcr_fast.ops._extension import extension_error, has_kernel
from lcr_fast.ops.ranking import (
    catalogue_metrics,
    catalogue_rank,
    group_advantages,
    ranking_metrics,
    target_rank,
)

METRICS = (
    *("hr@1", "hr@3", "ndcg@1", "ndcg@5", "ndcg", "ndcg_exp@5", "ndcg_exp", "mrr@2", "mrr"),
    *("recall@4", "precision@7", "map@5", "map", "rank", "hr@2000000"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GRADES = (torch.bool, torch.int32, torch.int64, torch.float32, torch.float64)
# Around the vector widths, their fourfold, and the pieces in which strided rows are copied.
WIDTHS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 31, 32, 33, 64, 100, 257, 2049)

needs_cpp = pytest.mark.skipif(
    extension_error() is not None, reason=f"lcr_fast._C is not built: {extension_error()}"
)
fuzz = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


on_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_kernel("ranking_metrics", "cuda")),
    reason="needs a GPU and an extension built for CUDA",
)


@pytest.fixture(
    scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_cuda])]
)
def device(request):
    return request.param


def draw_scores(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator
) -> Tensor:
    scores = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == "tied":
        scores = scores.round()
    elif kind == "constant":
        scores = torch.full_like(scores, -0.5)
    elif kind == "denormal":
        scores = (scores * 4).round() * torch.finfo(dtype).smallest_normal / 16
    elif kind == "huge":
        scores = (scores / 4).clamp(-1, 1) * torch.finfo(dtype).max
    elif kind == "infinite":
        scores = torch.where(scores > 0.5, torch.inf, torch.where(scores < 0, -torch.inf, scores))
    elif kind == "zeros":
        scores = torch.where(scores > 0, 0.0, -0.0).double()
    return scores.to(dtype)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """Return the values of ``t`` [A, B, C] in memory that is not contiguous."""
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "sliced":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), 7).to(t.dtype)
        wide[..., 1 : 2 * t.shape[-1] + 1 : 2] = t
        return wide[..., 1 : 2 * t.shape[-1] + 1 : 2]
    if layout == "permuted":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "padded":
        return torch.cat([t, t, t], -1)[..., t.shape[-1] : 2 * t.shape[-1]]
    return t


@st.composite
def lists(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from(WIDTHS)))
    dtype = draw(st.sampled_from(DTYPES))
    kinds = ("random", "tied", "constant", "denormal", "huge", "infinite", "zeros")
    scores = draw_scores(draw(st.sampled_from(kinds)), shape, dtype, g)
    layouts = st.sampled_from(("contiguous", "transposed", "sliced", "permuted", "padded"))
    case = {"scores": lay_out(scores, draw(layouts))}
    counts = torch.full(shape[:-1], shape[-1])
    if draw(st.booleans()):
        counts = torch.randint(0, shape[-1] + 1, shape[:-1], generator=g)
        case["counts"] = counts
    if draw(st.booleans()):
        case["excluded"] = lay_out(torch.rand(shape, generator=g) < 0.3, draw(layouts))
    if draw(st.booleans()):
        share = draw(st.sampled_from((0.02, 0.3, 1.0)))
        grades = torch.randint(-1, 4, shape, generator=g) * (torch.rand(shape, generator=g) < share)
        case["relevance"] = lay_out(grades.to(draw(st.sampled_from(GRADES))), draw(layouts))
    else:
        drawn = torch.rand(shape[:-1], generator=g) * (counts + 1)
        case["target"] = drawn.long().clamp(max=counts) - 1
    return case


@needs_cpp
@fuzz
@given(
    lists(),
    st.sampled_from(TIES),
    st.sampled_from((METRICS, METRICS[:3])),
    st.sampled_from(("none", "sum")),
)
def test_matches_reference(device, case, ties, metrics, reduce):
    assume(device == "cpu" or "target" in case)
    case = {name: tensor.to(device) for name, tensor in case.items()}
    options = {"metrics": metrics, "ties": ties, "reduce": reduce}
    fast = ranking_metrics(**case, **options, backend="cpp")
    exact = ranking_metrics(**case, **options, backend="reference")
    assert fast.keys() == exact.keys()
    for name in fast:
        assert fast[name].dtype == (torch.float32 if reduce == "none" else torch.float64)
    torch.testing.assert_close(fast, exact, rtol=1e-6, atol=1e-7)
    if "target" in case:
        ranks = [target_rank(**case, ties=ties, backend=b) for b in ("cpp", "reference")]
        assert torch.equal(*ranks)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_million_items(device, dtype):
    ties = "average"  # counts both what is above and what is tied
    scores = torch.randn(1, 1_000_003, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    target = torch.tensor([777_777], device=device)
    ranks = [target_rank(scores, target, ties=ties, backend=b) for b in ("cpp", "reference")]
    assert torch.equal(*ranks)
    excluded = torch.zeros_like(scores, dtype=torch.bool)
    assert target_rank(scores, target, excluded=excluded, ties=ties).item() == ranks[0].item()


@needs_cpp
@pytest.mark.parametrize("n_relevant", [1, 20, 127, 128, 129, 400])
@pytest.mark.parametrize("ties", TIES)
def test_many_relevant(n_relevant, ties):
    """Both ways of counting for several relevant items: a pass for each, and binary search."""
    g = torch.Generator().manual_seed(n_relevant)
    scores = torch.randn(2, 5000, generator=g)
    scores[1] = scores[1].mul(100).round()
    relevance = torch.zeros(2, 5000, dtype=torch.int64)
    for row in relevance:
        row[torch.randperm(5000, generator=g)[:n_relevant]] = torch.randint(
            1, 5, (n_relevant,), generator=g
        )
    excluded = torch.rand(2, 5000, generator=g) < 0.2
    for metrics in (METRICS, ("ndcg@10", "map@10", "hr@10")):
        options = {"relevance": relevance, "excluded": excluded, "ties": ties, "metrics": metrics}
        fast = ranking_metrics(scores, **options, backend="cpp")
        exact = ranking_metrics(scores, **options, backend="reference")
        torch.testing.assert_close(fast, exact, rtol=1e-6, atol=1e-7)


def by_definition(grades: list[int], kind: str, k: int) -> float:
    """One metric of a list of grades, best place first, in the words of its definition."""
    k = k or len(grades)
    hits = [place for place, grade in enumerate(grades, 1) if grade > 0]
    n_relevant, top = len(hits), [place for place in hits if place <= k]
    if not hits:
        return 0.0

    def dcg(ranked):
        gains = [2**g - 1 if kind == "ndcg_exp" else g for g in ranked[:k]]
        return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))

    return {
        "hr": float(bool(top)),
        "mrr": 1 / top[0] if top else 0.0,
        "recall": len(top) / n_relevant,
        "precision": len(top) / k,
        "map": sum((i + 1) / place for i, place in enumerate(top)) / n_relevant,
        "rank": float(hits[0]),
        "ndcg": dcg(grades) / dcg(sorted(grades, reverse=True)),
        "ndcg_exp": dcg(grades) / dcg(sorted(grades, reverse=True)),
    }[kind]


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_matches_definition_over_all_orders_of_ties(backend, ties):
    """Every list of five items with scores and grades in {0, 1, 2}, in each possible order."""
    g = torch.Generator().manual_seed(1)
    cases = torch.randint(0, 3, (40, 2, 5), generator=g)
    cases[:3, 0] = 1
    scores, grades = cases[:, 0].float(), cases[:, 1]
    found = ranking_metrics(
        scores, relevance=grades, metrics=METRICS[:-1], ties=ties, backend=backend
    )
    for row in range(len(cases)):
        orders = [
            [int(grades[row, i]) for i in order]
            for order in itertools.permutations(range(5))
            if all(scores[row, a] >= scores[row, b] for a, b in itertools.pairwise(order))
        ]
        # Grades as the sort key put relevant items last, and low grades before high ones.
        if ties == "pessimistic":
            orders = [min(orders)]
        elif ties == "optimistic":
            orders = [max(orders)]
        for name in METRICS[:-1]:
            values = [by_definition(order, *parse_metric(name)) for order in orders]
            expected = sum(values) / len(values)
            assert found[name][row].item() == pytest.approx(expected, abs=1e-6), (name, row)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_constant_scorer_gains_nothing_from_ties(device, backend):
    scores, target = torch.zeros(3, 20, device=device), torch.tensor([0, 7, 19], device=device)

    def hr1(ties):
        return ranking_metrics(scores, target, metrics=["hr@1"], ties=ties, backend=backend)["hr@1"]

    assert hr1("pessimistic").tolist() == [0, 0, 0]
    assert hr1("optimistic").tolist() == [1, 1, 1]
    torch.testing.assert_close(hr1("average"), torch.full((3,), 1 / 20, device=device))
    assert target_rank(scores, target, backend=backend).tolist() == [20, 20, 20]
    assert target_rank(scores, target, ties="average", backend=backend).tolist() == [10.5] * 3


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_one_relevant_item(device, backend):
    """NDCG@k = 1/log2(rank + 1) within k, whichever gain; MAP is MRR, recall is HR."""
    scores = torch.arange(10.0, device=device).flip(0).repeat(10, 1)
    target = torch.arange(10, device=device)
    names = ("ndcg@5", "ndcg_exp@5", "hr@5", "recall@5", "mrr@5", "map@5", "precision@5")
    found = ranking_metrics(scores, target, metrics=names, backend=backend)
    rank = target_rank(scores, target, backend=backend)
    assert rank.tolist() == list(range(1, 11))
    within = (rank <= 5).float()
    discount = within / torch.log2(rank.float() + 1)
    torch.testing.assert_close(found["ndcg@5"], discount)
    torch.testing.assert_close(found["ndcg_exp@5"], discount)
    torch.testing.assert_close(found["mrr@5"], within / rank)
    torch.testing.assert_close(found["map@5"], within / rank)
    torch.testing.assert_close(found["precision@5"], within / 5)
    assert torch.equal(found["hr@5"], within)
    assert torch.equal(found["recall@5"], within)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4)])
@pytest.mark.parametrize("given", ["target", "relevance"])
def test_empty(device, backend, shape, given):
    if (device, backend, given) == ("cuda", "cpp", "relevance"):
        pytest.skip("refused, as test_relevance_on_cuda_is_the_references sees")
    scores = torch.zeros(shape, device=device)
    kind = {"target": torch.full(shape[:-1], -1, device=device), "relevance": scores > 0}
    options = {given: kind[given], "metrics": METRICS, "backend": backend}
    rows = ranking_metrics(scores, **options)
    assert all(v.shape == shape[:-1] and not v.any() for v in rows.values())
    sums = ranking_metrics(scores, **options, reduce="sum")
    assert all(v.item() == 0 for v in sums.values())
    means = ranking_metrics(scores, **options, reduce="mean")
    assert all(v.isnan() for v in means.values())


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_rows_without_target_are_left_out_of_means_and_not_read(device, backend):
    scores = torch.tensor([[3.0, 1, 2], [torch.nan] * 3, [1, 2, 3]], device=device)
    target = torch.tensor([0, -1, 0], device=device)
    found = ranking_metrics(scores, target, metrics=["mrr"], reduce="mean", backend=backend)
    assert found["mrr"].item() == pytest.approx((1 + 1 / 3) / 2)
    assert target_rank(scores, target, backend=backend).tolist() == [1, 0, 3]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_infinities_rank_as_numbers(device, backend):
    inf = torch.inf
    scores = torch.tensor([[inf, -inf, 0.0, inf], [-inf, -inf, -inf, -inf]], device=device)
    for target, expected in (([0, 0], [2, 4]), ([1, 3], [4, 4]), ([2, 1], [3, 4])):
        rank = target_rank(scores, torch.tensor(target, device=device), backend=backend)
        assert rank.tolist() == expected


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_a_relevant_item_competes_though_excluded(device, backend):
    scores = torch.tensor([[3.0, 2, 1]], device=device)
    excluded = torch.tensor([[True, True, False]], device=device)
    rank = target_rank(scores, torch.tensor([1], device=device), excluded=excluded, backend=backend)
    assert rank.item() == 1


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("item", [0, 9, 39, 40])
def test_nan_names_the_row(backend, dtype, item):
    scores = torch.randn(2, 3, 41).to(dtype)
    target = torch.zeros(2, 3, dtype=torch.long)
    scores[1, 0, item] = scores[1, 2, item] = torch.nan
    with pytest.raises(RuntimeError, match=r"scores\[1, 0\] has a NaN"):
        ranking_metrics(scores, target, backend=backend)
    with pytest.raises(RuntimeError, match=r"scores\[1, 0\] has a NaN"):
        ranking_metrics(scores, relevance=scores > 0, reduce="mean", backend=backend)
    # Not a candidate, not an error.
    excluded = scores.isnan()
    if item > 0:
        ranking_metrics(scores, target, excluded=excluded, backend=backend)
        ranking_metrics(scores, target, counts=torch.tensor(item), backend=backend)
    else:
        with pytest.raises(RuntimeError, match="NaN"):
            ranking_metrics(scores, target, excluded=excluded, backend=backend)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_bad_indices_name_the_row(backend):
    scores = torch.randn(3, 5)
    good = torch.zeros(3, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"target\[1\] is 5, expected an index below 5, or -1"):
        ranking_metrics(scores, torch.tensor([0, 5, 9]), backend=backend)
    with pytest.raises(RuntimeError, match=r"target\[2\] is -2"):
        target_rank(scores, torch.tensor([0, 1, -2]), backend=backend)
    with pytest.raises(RuntimeError, match=r"target\[1\] is 3, expected an index below 2"):
        target_rank(scores, good + 3, counts=torch.tensor([5, 2, 2]), backend=backend)
    with pytest.raises(RuntimeError, match=r"counts\[2\] is 6, expected 0 to 5"):
        target_rank(scores, good, counts=torch.tensor([5, 2, 6]), backend=backend)
    with pytest.raises(RuntimeError, match=r"counts\[0\] is -1"):
        ranking_metrics(
            scores, relevance=scores > 9, counts=torch.tensor([-1, 2, 6]), backend=backend
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 3, dtype=torch.long)}, "scores must be .* got .*int64"),
        ({"scores": torch.tensor(1.0)}, r"scores must be \[..., C\]"),
        ({"target": None}, "either target or relevance"),
        ({"relevance": torch.zeros(2, 3)}, "either target or relevance"),
        ({"target": torch.zeros(2)}, "target must be int64 or int32, got torch.float32"),
        (
            {"target": torch.zeros(3, dtype=torch.long)},
            r"target must broadcast to \[2\], got \[3\]",
        ),
        ({"counts": torch.zeros(1, 1, dtype=torch.long)}, "counts must broadcast"),
        ({"excluded": torch.zeros(2, 3)}, "excluded must be bool"),
        ({"excluded": torch.zeros(2, 4, dtype=torch.bool)}, "excluded must broadcast"),
        ({"target": None, "relevance": torch.zeros(2, 3).half()}, "relevance must be"),
        ({"metrics": ["hr"]}, "metric 'hr' is unknown"),
        ({"metrics": ["hr@0"]}, "metric 'hr@0' is unknown"),
        ({"metrics": [f"hr@{2**64}"]}, f"metric 'hr@{2**64}' is unknown"),
        ({"metrics": [5]}, "metric 5 is unknown"),
        ({"metrics": ["rank@2"]}, "metric 'rank@2' is unknown"),
        ({"metrics": ["auc"]}, "metric 'auc' is unknown"),
        ({"ties": "random"}, "ties must be one of pessimistic, optimistic, average, got 'random'"),
        ({"reduce": "max"}, "reduce must be one of"),
        ({"backend": "triton"}, "'triton' cannot serve ranking_metrics: there is no such"),
    ],
)
def test_wrong_arguments_raise(change, message):
    arguments = {"scores": torch.zeros(2, 3), "target": torch.zeros(2, dtype=torch.long)} | change
    with pytest.raises(ValueError, match=message):
        ranking_metrics(**arguments)


def test_explicit_backend_that_cannot_serve_says_what_would():
    scores = torch.zeros(2, 3, device="meta")
    with pytest.raises(ValueError, match=r"backend='cpp' cannot serve .*; use backend='reference'"):
        ranking_metrics(scores, torch.zeros(2, dtype=torch.long, device="meta"), backend="cpp")


@needs_cpp
@pytest.mark.parametrize("reduce", ["none", "sum", "mean"])
def test_bits_do_not_depend_on_threads(reduce):
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(3001, 50, generator=g)
    target = torch.randint(-1, 50, (3001,), generator=g)
    users, items = torch.randn(2, 700, 16, generator=g)
    seen = torch.randint(-1, 700, (700, 9), generator=g)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            options = {"reduce": reduce, "ties": "average", "metrics": METRICS, "backend": "cpp"}
            runs.append(
                [
                    *ranking_metrics(scores, target, **options).values(),
                    *ranking_metrics(scores, relevance=scores > 1, **options).values(),
                    *catalogue_metrics(users, items, target[:700], seen=seen, **options).values(),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@needs_cpp
def test_row_does_not_depend_on_its_batch(device):
    scores = torch.randn(900, 37, device=device)
    target = torch.randint(0, 37, (900,), device=device)
    together = ranking_metrics(scores, target, metrics=METRICS)
    alone = ranking_metrics(scores[450:451], target[450:451], metrics=METRICS)
    assert all(torch.equal(together[name][450:451], alone[name]) for name in METRICS)


@needs_cpp
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc to forget a peak of memory"
)
def test_strided_rows_are_not_copied():
    """A column-major matrix of 400 MB needs a row more of memory, not another matrix."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

    scores = torch.zeros(1000, 50_000, dtype=torch.float64).T  # (50000, 1000)
    target = torch.zeros(50_000, dtype=torch.long)
    scores[:, 1] = 1
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak()
    found = ranking_metrics(scores, target, metrics=["hr@1"], reduce="sum", backend="cpp")
    assert found["rows"].item() == 50_000
    assert peak() - before < 50e6


@needs_cpp
@pytest.mark.parametrize("output", [0, 1, 2])
def test_opcheck(device, output):
    scores, target = torch.randn(2, 3, 9, device=device), torch.zeros(2, 3, dtype=torch.long)
    excluded = torch.zeros(2, 3, 9, dtype=torch.bool, device=device)
    arguments = (scores, target.to(device), None, None, excluded, [0, 7], [3, 0], 0, output)
    torch.library.opcheck(torch.ops.lcr_fast.ranking_metrics.default, arguments)
    arguments = (scores[0], scores[1], target[0].to(device), None, [0, 7], [3, 0], 0, output)
    torch.library.opcheck(torch.ops.lcr_fast.catalogue_metrics.default, arguments)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_compiles_without_graph_breaks(device, backend):
    scores = torch.randn(4, 2, 9, device=device, requires_grad=True)
    target = torch.tensor([0, 3, -1, 8], device=device)

    def run(scores):
        rewards = ranking_metrics(scores * 2, target[:, None], metrics=["ndcg@5"], backend=backend)[
            "ndcg@5"
        ]
        means = ranking_metrics(scores[:, 0], target, reduce="mean", backend=backend)
        ranks = catalogue_rank(scores[:, 0], scores[:, 1], target.clamp(max=3), backend=backend)
        return group_advantages(rewards), means["mrr"], ranks

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(scores)
    for fast, eager in zip(compiled, run(scores), strict=True):
        assert not fast.requires_grad
        torch.testing.assert_close(fast, eager)


@st.composite
def catalogues(draw):
    """Vectors of small integers, whose products are exact in every order of summation."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    B, d = draw(st.integers(0, 9)), draw(st.sampled_from((0, 1, 3, 16, 65)))
    n_items = draw(st.sampled_from((1, 2, 31, 32, 33, 511, 512, 513, 1100)))
    dtype = draw(st.sampled_from(DTYPES))
    users = torch.randint(-3, 4, (B, d), generator=g).to(dtype)
    items = torch.randint(-3, 4, (n_items, d), generator=g).to(dtype)
    if draw(st.booleans()):
        users, items = users.T.contiguous().T, torch.cat([items, items], -1)[:, :d]
    case = {"users": users, "items": items}
    case["target"] = torch.randint(-1, n_items, (B,), generator=g)
    if draw(st.booleans()):
        S = draw(st.integers(0, 70))
        case["seen"] = torch.randint(-1, n_items, (B, S), generator=g)
    return case


@needs_cpp
@fuzz
@given(catalogues(), st.sampled_from(TIES), st.sampled_from(("none", "sum")))
def test_catalogue_matches_reference(device, case, ties, reduce):
    case = {name: tensor.to(device) for name, tensor in case.items()}
    options = {"metrics": METRICS, "ties": ties, "reduce": reduce}
    fast = catalogue_metrics(**case, **options, backend="cpp")
    exact = catalogue_metrics(**case, **options, backend="reference")
    torch.testing.assert_close(fast, exact, rtol=1e-6, atol=1e-7)
    ranks = [catalogue_rank(**case, ties=ties, backend=b) for b in ("cpp", "reference")]
    torch.testing.assert_close(*ranks, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_item_vectors_tie_wherever_they_stand(device, backend, dtype):
    """A collapsed model, all of whose items are one vector, must rank the target last."""
    g = torch.Generator().manual_seed(0)
    users = torch.randn(37, 50, generator=g, dtype=dtype).to(device)
    items = torch.randn(1, 50, generator=g, dtype=dtype).to(device).repeat(1037, 1)
    target = torch.arange(37, device=device) * 28
    assert (catalogue_rank(users, items, target, backend=backend) == 1037).all()
    optimistic = catalogue_rank(users, items, target, ties="optimistic", backend=backend)
    assert (optimistic == 1).all()
    # Seen items tie as well, so leaving them out is exact.
    seen = torch.arange(500, device=device).expand(37, 500)
    rank = catalogue_rank(users, items, target, seen=seen, backend=backend)
    assert torch.equal(rank, 537 + (target < 500).long())


@needs_cpp
def test_catalogue_ranks_random_vectors_as_float64_does(device):
    """A rank may differ from the exact one only through scores closer than rounding."""
    g = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, 64, generator=g).to(device) for n in (50, 3000))
    target = torch.randint(0, 3000, (50,), generator=g).to(device)
    scores = users.double() @ items.double().T
    wanted = scores.gather(1, target[:, None])
    rank = catalogue_rank(users, items, target)
    assert (rank >= (scores > wanted + 1e-4).sum(1)).all()
    assert (rank <= (scores > wanted - 1e-4).sum(1)).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_catalogue_names_bad_rows(backend):
    users, items = torch.ones(3, 4), torch.ones(6, 4)
    target = torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match=r"target\[1\] is 6, expected an index below 6"):
        catalogue_rank(users, items, torch.tensor([0, 6, 1]), backend=backend)
    with pytest.raises(RuntimeError, match=r"seen\[2\] has an item out of range"):
        catalogue_rank(users, items, target, seen=torch.tensor([[0], [1], [6]]), backend=backend)
    users[1] = torch.inf
    items[4] = -1
    items[4, 0] = 0
    with pytest.raises(RuntimeError, match=r"users\[1\] gives a NaN score"):
        catalogue_rank(users, items, target, backend=backend)
    with pytest.raises(ValueError, match="must share d and a dtype"):
        catalogue_rank(users, items[:, :3], target, backend=backend)
    with pytest.raises(ValueError, match=r"seen must be \[B, S\]"):
        catalogue_rank(users, items, target, seen=target, backend=backend)


def test_a_gpu_that_nothing_was_built_for_is_an_obstacle(monkeypatch):
    errors = {0: 0, 1: 209}
    monkeypatch.setattr(ranking, "has_gpu", lambda: True)
    monkeypatch.setattr(ranking, "_error_of", errors.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    sentences = []
    for index in errors:
        monkeypatch.setattr(torch.cuda, "current_device", lambda i=index: i)
        sentences.append(ranking._obstacle(ranking.RankingCase("cuda")))
    assert sentences == [
        None,
        "the C++ extension has no code for GPU 1, of compute capability 7.0 (CUDA error 209): "
        "build it with that in TORCH_CUDA_ARCH_LIST",
    ]


@pytest.mark.gpu
@on_cuda
def test_relevance_on_cuda_is_the_references():
    scores = torch.randn(3, 50, device="cuda")
    relevance = scores > 1
    with pytest.raises(ValueError, match="by target, not by relevance, on CUDA tensors"):
        ranking_metrics(scores, relevance=relevance, backend="cpp")
    found = ranking_metrics(scores, relevance=relevance)
    exact = ranking_metrics(scores.cpu(), relevance=relevance.cpu(), backend="reference")
    torch.testing.assert_close({name: t.cpu() for name, t in found.items()}, exact)


@pytest.mark.gpu
@on_cuda
def test_bad_rows_on_cuda_become_nan_unless_validated():
    scores = torch.randn(4, 5000, device="cuda")
    scores[1, 4000] = torch.nan
    target = torch.tensor([0, 0, 5000, 3], device="cuda")
    found = ranking_metrics(scores, target, metrics=["mrr"], backend="cpp")["mrr"]
    assert found.isnan().tolist() == [False, True, True, False]
    assert target_rank(scores, target).tolist()[1:3] == [-1, -1]
    assert ranking_metrics(scores, target, reduce="mean")["mrr"].isnan()
    with pytest.raises(RuntimeError, match=r"target\[2\] is 5000"):
        ranking_metrics(scores, target, validate=True)
    with pytest.raises(RuntimeError, match=r"scores\[1\] has a NaN"):
        ranking_metrics(scores[:2], target[:2], validate=True)
