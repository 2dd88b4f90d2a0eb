"""Scoring of candidates and of the catalogue in C++: against the reference, and its facts."""

import pytest
import torch

from lcr_fast import ops
from lcr_fast.ops import ranking, scoring
from lcr_fast.ops._extension import extension_error
from lcr_fast.ops.noise import Dropout
from lcr_fast.testing import assert_parity
from lcr_fast.weights import ScoringWeights
from scoring_cases import (
    EXCLUDED,
    HEADS,
    Case,
    all_scores,
    assert_counted,
    assert_full_sort,
    assert_matches,
    assert_only_inputs_and_ids_are_kept,
    assert_padding_and_strides_change_no_bit,
    assert_serves_no_user_and_no_candidate,
    case_with,
    catalogue_case,
    check_registered_ops,
    parity_case,
)

pytestmark = pytest.mark.skipif(
    extension_error() is not None, reason=f"lcr_fast._C is not built: {extension_error()}"
)


@pytest.mark.parametrize("n_candidates", [1, 5, 19, 100, 250])
@pytest.mark.parametrize("head", HEADS)
def test_parity_of_scores_and_gradients(head, n_candidates):
    assert_matches(parity_case(head, n_candidates))


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 64, "max_search_len": 30, "max_rec_len": 30, "mlp_hidden": (200, 80)},
        {"dim": 128, "n_users": 5},
        {"dim": 20, "max_search_len": 1, "max_rec_len": 40, "mlp_hidden": (7, 3)},
        {"trajectories": 4},
        {"trajectories": 3, "n_candidates": 130},
        {"trajectories": 3, "n_candidates": 130, "score": "mlp_dot"},
        {"n_users": 1, "n_candidates": 300},
        {"n_users": 60, "n_candidates": 3},
    ],
    ids=str,
)
def test_parity_in_other_shapes(changes):
    assert_matches(Case(**changes))


def test_parity_of_a_single_layer_and_the_dot_product():
    """The layer's row of scores is the one to which the dot product is added."""
    case = Case("mlp and dot")
    g = torch.Generator().manual_seed(1)
    weights = (torch.randn(1, 128, generator=g),), (torch.randn(1, generator=g),)
    case.weights = ScoringWeights(case.weights.target_weight, *weights, dot=True)
    kept = {k: v for k, v in case.tensors.items() if not k.startswith(("weight", "bias"))}
    case.tensors = kept | {"weight 0": weights[0][0], "bias 0": weights[1][0]}
    assert_matches(case)


@pytest.mark.parametrize("n_candidates", [3, 40, 150])
def test_parity_with_dropout(n_candidates):
    """The mask of a unit depends on the user's row and the column, not on the tile."""
    case = Case(n_candidates=n_candidates, n_users=9)
    rows = torch.tensor([5, 2**40 + 1, 0, 7, 7, 3, 1, 2, 11])
    assert_matches(case, dropout=Dropout(0.3, 2**60 + 5, rows))


def test_ids_are_rows_of_the_table():
    """Duplicates and row 0 included; the table's gradient adds up, in the same bits each time."""
    case = Case(n_candidates=19)
    g = torch.Generator().manual_seed(3)
    case.tensors["candidates"] = torch.randn(11, 32, generator=g)
    ids = torch.randint(0, 11, (6, 19), generator=g)
    assert_matches(case, ids=ids)
    once, twice = case.run("cpp", ids=ids), case.run("cpp", ids=ids)
    gathered = case.call("cpp", {**case.tensors, "candidates": case.tensors["candidates"][ids]})
    assert torch.equal(once["scores"], gathered)
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name


@pytest.mark.parametrize("by_id", [False, True])
def test_candidates_shared_by_all_users(by_id):
    case = Case(n_candidates=19, trajectories=2)
    if by_id:
        assert_matches(case_with(case, candidates=case.items[0]), ids=torch.arange(19)[None])
    else:
        assert_matches(case_with(case, candidates=case.items[:1]))


@pytest.mark.parametrize("n_candidates", [1, 10, 19, 130])
def test_order_copies_and_neighbours_change_no_bit(n_candidates):
    """A score depends on its own user and item: permuted, or the user alone, without padding.

    What is folded is chosen by lengths: with 10 candidates some users' histories are.
    """
    case = Case(n_candidates=n_candidates)
    scores = case.call("cpp")
    order = torch.randperm(n_candidates)
    permuted = case.call("cpp", {**case.tensors, "candidates": case.items[:, order]})
    assert torch.equal(permuted, scores[:, order])
    for b in range(6):
        t = case.tensors
        one = slice(b, b + 1)
        n_search, n_rec = (n[b] for n in case.lengths)
        alone = ops.score(
            t["search"][one, :n_search], t["rec"][one, :n_rec], *(n[one] for n in case.lengths),
            t["candidates"][one], t["user"][one], case.weights, backend="cpp",
        )  # fmt: skip
        assert torch.equal(alone[0], scores[b])


def test_padding_and_strides_change_no_bit():
    assert_padding_and_strides_change_no_bit(Case(n_candidates=19), "cpp")


@pytest.mark.parametrize("n_candidates", [5, 100])
def test_threads_change_no_bit(n_candidates):
    """Neither of the scores nor of any gradient, more users than sums over them or not."""
    cases = [Case(n_users=n, n_candidates=n_candidates) for n in (3, 200)]
    before, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 3):
            torch.set_num_threads(n)
            runs.append([case.run("cpp") for case in cases])
    finally:
        torch.set_num_threads(before)
    for others in runs[1:]:
        for first, other in zip(runs[0], others, strict=True):
            for name, value in first.items():
                assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_converted_and_rounded_once(dtype):
    case = Case(n_candidates=19)
    tensors = {k: v.to(dtype) for k, v in case.tensors.items()}
    scores = case.call("cpp", tensors)
    exact = case.call("reference", {k: v.double() for k, v in tensors.items()})
    eager = case.call("reference", tensors)
    assert_parity("scores", scores, eager, exact)


def test_no_user_and_no_candidate():
    assert_serves_no_user_and_no_candidate(Case, "cpp")


def test_nothing_of_the_size_of_the_hidden_layers_is_kept():
    assert_only_inputs_and_ids_are_kept(Case(n_candidates=100), "cpp")


def test_registered_ops():
    check_registered_ops("cpu", Case(n_users=3, dim=8, mlp_hidden=(6, 5)))


def test_compiles_as_one_graph():
    case = catalogue_case(40)
    ids = torch.randint(0, 41, (6, 5))

    def function(search):
        t = {**case.tensors, "search": search, "candidates": case.tensors["table"]}
        scores = case.call("cpp", t, ids=ids)
        top = case.catalogue(ops.score_topk, 3)
        return scores, *top, case.catalogue(ops.score_rank, torch.arange(6))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    search = case.tensors["search"].nan_to_num().requires_grad_()
    results = [function(search), compiled(search)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    gradients = [torch.autograd.grad(r[0].square().sum(), search)[0] for r in results]
    assert torch.equal(*gradients)


def test_compiles_for_every_k():
    case = catalogue_case(40)
    compiled = torch.compile(
        lambda k: case.catalogue(ops.score_topk, k), fullgraph=True, backend="aot_eager"
    )
    for k in (3, 5, 7):
        for a, b in zip(compiled(k), case.catalogue(ops.score_topk, k), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("n_items", [1, 13, 112, 1009, 2300])
def test_topk_is_a_full_sort(n_items, copies, backend):
    case = catalogue_case(n_items, copies=copies)
    scores = all_scores(case, backend)
    assert not scores[:, 1:].isnan().any()
    for k in (1, 7, n_items + 3):
        assert_full_sort(case, scores, k, backend)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("n_items", [13, 1009, 2300])
def test_ranks_are_counted(n_items, copies, backend):
    """The target's score has the bits of the pass, so that copies of it tie with it."""
    case = catalogue_case(n_items, copies=copies)
    scores = all_scores(case, backend)
    g = torch.Generator().manual_seed(1)
    for with_bonus in (False, True) * 2:
        target = torch.randint(1, n_items + 1, (6,), generator=g)
        target[0], target[3] = 0, 9  # none; one that is excluded
        bonus = torch.randn(6, generator=g) if with_bonus else None
        assert_counted(case, scores, target, bonus, backend)


@pytest.mark.parametrize("head", HEADS)
def test_the_catalogue_has_the_scores_of_the_candidates(head):
    case = catalogue_case(300, head, n_users=5)
    table = case.tensors["table"]
    tensors = {**case.tensors, "candidates": table}
    ids = torch.arange(1, 301)[None]
    exact = {k: v.double() for k, v in tensors.items()}
    assert_parity(
        head,
        all_scores(case)[:, 1:],
        case.call("reference", tensors, ids=ids),
        case.call("reference", exact, ids=ids),
        factor=3,
    )


def test_users_do_not_depend_on_their_block(monkeypatch):
    """More users than are folded at a time; one alone gives the same bits."""
    sizes = {"dim": 64, "max_search_len": 60, "max_rec_len": 60, "mlp_hidden": (200, 8)}
    case = catalogue_case(120, n_users=150, **sizes)
    ids, scores = case.catalogue(ops.score_topk, 5)
    t = case.tensors
    for b in (0, 63, 64, 149):
        one = slice(b, b + 1)
        alone = ops.score_topk(
            t["search"][one], t["rec"][one], *(n[one] for n in case.lengths), t["table"],
            t["user"][one], case.weights, 5, backend="cpp",
        )  # fmt: skip
        assert torch.equal(alone[0][0], ids[b])
        assert torch.equal(alone[1][0], scores[b])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_nan_is_an_error(backend):
    case = catalogue_case(1500)
    table = case.tensors["table"].clone()
    table[0] = torch.nan  # padding is never read
    case.catalogue(ops.score_topk, 3, items=table, backend=backend)
    table[1400] = torch.nan
    for function, argument in ((ops.score_topk, 3), (ops.score_rank, torch.full((6,), 2))):
        with pytest.raises(ValueError, match="user 0 of the batch has a NaN score"):
            case.catalogue(function, argument, items=table, backend=backend)
    bonus = torch.tensor([0.0, 0.0, 0.0, torch.nan, 0.0, 0.0])
    target = torch.full((6,), 2)
    with pytest.raises(ValueError, match="user 3 of the batch has a NaN score"):
        case.catalogue(ops.score_rank, target, bonus=bonus, backend=backend)
    nobody = target * (bonus == 0)
    case.catalogue(ops.score_rank, nobody, bonus=bonus, backend=backend)
    case.tensors["search"][2, 0] = torch.nan  # user 2 alone has it in a valid position
    assert case.lengths[0][2] > 0
    with pytest.raises(ValueError, match="user 2 of the batch"):
        case.catalogue(ops.score_topk, 3, backend=backend)


def test_the_catalogue_needs_no_memory_of_its_size(run_code):
    """Peak memory of a process grows by the item table, not by B x I scores."""
    code = """
import resource, torch
from lcr_fast import ops
from lcr_fast.weights import ScoringWeights
torch.set_num_threads(1)
B, D = 64, 8
draw = torch.randn
weights = ScoringWeights(draw(2, D, D), (draw(8, 3 * D), draw(1, 8)), (draw(8), draw(1)))
states = draw(B, 2, D), draw(B, 2, D), torch.full((B,), 2), torch.full((B,), 2)
def peak(n_items):
    ops.score_topk(*states, draw(n_items + 1, D), None, weights, 10, backend="cpp")
    ops.score_rank(*states, draw(n_items + 1, D), None, weights, torch.ones(B).long())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = peak(1000)
print(peak(200_000) - small)
"""
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    tables, scores = 2 * 200_000 * 8 * 4, 64 * 200_000 * 4
    assert int(done.stdout) < tables + scores / 4


LEVEL = """
import test_scoring as t
from lcr_fast.ops import ranking
assert ranking.cpu_level() == {level!r}
for head in t.HEADS:
    for n_candidates in (1, 5, 19, 130):
        t.assert_matches(t.parity_case(head, n_candidates))
t.test_parity_with_dropout(40)
for copies in (False, True):
    t.test_topk_is_a_full_sort(1009, copies, "cpp")
    t.test_ranks_are_counted(1009, copies, "cpp")
"""


@pytest.mark.parametrize("level", ranking.CPU_LEVELS)
def test_every_instruction_set(run_code, level):
    if level == ranking.cpu_level():
        pytest.skip("all other tests run with these")
    done = run_code(LEVEL.format(level=level), LCR_FAST_CPU=level)
    if "instructions that this CPU does not have" in done.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stderr


def test_refusals():
    case = catalogue_case(20)
    t = case.tensors
    ids = torch.ones(6, 2, dtype=torch.int64)
    table = {**t, "candidates": t["table"]}
    unbiased = catalogue_case(20)
    unbiased.weights = unbiased.weights._replace(mlp_biases=unbiased.weights.mlp_biases[:-1])
    for error, message, call in (
        (ValueError, r"candidates must be \[6 or 1, C, 32\]", lambda: case.call("cpp", table)),
        (ValueError, "with ids", lambda: case.call("cpp", ids=ids)),
        (ValueError, "ids must be int64", lambda: case.call("cpp", table, ids=ids.int())),
        (ValueError, "ids must be int64", lambda: case.call("cpp", table, ids=ids[:2])),
        (RuntimeError, r"ids must be in 0\.\.20", lambda: case.call("cpp", table, ids=ids * 21)),
        (ValueError, "cannot serve score: it computes float32", lambda: case.call(
            "cpp", {k: v.double() for k, v in t.items()})),
        (ValueError, "width 32", lambda: case.call("cpp", {**t, "candidates": t["rec"][..., :9]})),
        (ValueError, "user must be", lambda: case.call("cpp", {**t, "user": t["user"][:2]})),
        (ValueError, "one entry a layer, got 3 and 2", lambda: unbiased.catalogue(
            ops.score_topk, 1)),
        (ValueError, "k must be at least 1", lambda: case.catalogue(ops.score_topk, 0)),
        *(
            (ValueError, "k must be an integer", lambda k=k: case.catalogue(ops.score_topk, k))
            for k in (2.5, torch.tensor(2.5), "3")
        ),
        (ValueError, "exclude must be", lambda: case.catalogue(
            ops.score_topk, 1, exclude=EXCLUDED[:2])),
        (ValueError, r"target must be ids in 0\.\.20, got 21", lambda: case.catalogue(
            ops.score_rank, torch.full((6,), 21))),
        (ValueError, r"target must be int64 \[6\]", lambda: case.catalogue(
            ops.score_rank, torch.ones(6))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_lengths_out_of_range_are_refused():
    case = Case()
    case.lengths[0] = case.lengths[0] + 9
    with pytest.raises(RuntimeError, match=r"search_lengths must be in 0\.\.9"):
        case.call("cpp")


def test_auto_takes_cpp_for_float32_and_the_reference_for_float64():
    case = scoring.ScoringCase("cpu", torch.float32, 32, (8,))
    assert scoring.SCORE.choose("auto", case) == "cpp"
    exact = case._replace(dtype=torch.float64)
    assert scoring.SCORE.choose("auto", exact) == "reference"
