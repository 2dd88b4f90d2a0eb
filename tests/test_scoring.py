"""Scoring of candidates and of the catalogue: fused against the reference, and its facts."""

import contextlib
import copy
import importlib.util
from collections.abc import Callable

import pytest
import torch

import tensor_core
from lcr_fast import ops
from lcr_fast.config import LCRConfig
from lcr_fast.ops import ranking, scoring
from lcr_fast.ops._extension import extension_error
from lcr_fast.ops.noise import Dropout
from lcr_fast.testing import (
    assert_parity,
    assert_parity_with_luck,
    every_op_rounded,
    neighbours,
    random_streams,
    random_weights,
)
from lcr_fast.weights import ScoringWeights

needs_cpp = pytest.mark.skipif(
    extension_error() is not None, reason=f"lcr_fast._C is not built: {extension_error()}"
)
pytestmark = needs_cpp

HEADS = {
    "mlp": {},
    "mlp without user": {"user_embedding": False},
    "dot": {"score": "dot"},
    "three hidden layers": {"mlp_hidden": (40, 24, 9)},
    "mlp and dot": {"score": "mlp_dot"},
}


class Case:
    """Random inputs of one call, padding NaN; the first users have the corners of lengths."""

    def __init__(self, head="mlp", n_users=6, n_candidates=5, trajectories=0, seed=0, **changes):
        options = {"dim": 32, "max_search_len": 9, "max_rec_len": 14, "mlp_hidden": (56, 24)}
        options |= {"score": "mlp", "user_embedding": True, "seen_bonus": False}
        config = LCRConfig(n_items=9, n_users=9, **(options | HEADS[head] | changes))
        g = torch.Generator().manual_seed(seed)
        self.weights = random_weights(config, g, torch.float32)[2]
        search, rec, *self.lengths = random_streams(config, n_users, g, torch.float32)
        if trajectories:
            search, rec = (
                x.unsqueeze(1) + 0.1 * torch.randn(n_users, trajectories, *x.shape[1:], generator=g)
                for x in (search, rec)
            )
        self.items = torch.randn(n_users, n_candidates, config.dim, generator=g)
        user = torch.randn(n_users, config.dim, generator=g) if config.user_embedding else None
        self.tensors = {
            "search": search,
            "rec": rec,
            "candidates": self.items,
            "user": user,
            "target_weight": self.weights.target_weight,
            **{f"weight {i}": w for i, w in enumerate(self.weights.mlp_weights)},
            **{f"bias {i}": b for i, b in enumerate(self.weights.mlp_biases)},
        }
        self.tensors = {k: v.detach() for k, v in self.tensors.items() if v is not None}
        shape = (n_users, trajectories, n_candidates) if trajectories else (n_users, n_candidates)
        self.upstream = torch.randn(shape, generator=g)

    def to(self, device):
        """Move everything, in place."""
        self.tensors = {k: v.to(device) for k, v in self.tensors.items()}
        self.lengths = [n.to(device) for n in self.lengths]
        self.upstream = self.upstream.to(device)
        w = self.weights
        self.weights = ScoringWeights(
            w.target_weight.to(device),
            tuple(x.to(device) for x in w.mlp_weights),
            tuple(x.to(device) for x in w.mlp_biases),
            w.dot,
        )
        return self

    def call(self, backend, tensors=None, **options):
        t = tensors or self.tensors
        n = len(self.weights.mlp_weights)
        weights = ScoringWeights(
            t["target_weight"],
            tuple(t[f"weight {i}"] for i in range(n)),
            tuple(t[f"bias {i}"] for i in range(n)),
            self.weights.dot,
        )
        return ops.score(
            t["search"], t["rec"], *self.lengths, t["candidates"], t.get("user"), weights,
            backend=backend, **options,
        )  # fmt: skip

    def run(self, backend, dtype=torch.float32, **options):
        """Scores and the gradient of every tensor."""
        leaves = {k: v.to(dtype).requires_grad_() for k, v in self.tensors.items()}
        scores = self.call(backend, leaves, **options)
        gradients = torch.autograd.grad(
            scores, list(leaves.values()), self.upstream.to(dtype), allow_unused=True
        )
        gradients = {k: g for k, g in zip(leaves, gradients, strict=True) if g is not None}
        return {"scores": scores.detach(), **gradients}

    def catalogue(self, function, *arguments, backend="cpp", items=None, **options):
        t = self.tensors
        return function(
            t["search"], t["rec"], *self.lengths, t["table"] if items is None else items,
            t.get("user"), self.weights, *arguments, backend=backend, **options,
        )  # fmt: skip


def assert_matches(case: Case, backend="cpp", dtype=torch.float32, **options):
    fused = case.run(backend, dtype, **options)
    with every_op_rounded() if dtype.itemsize < 4 else contextlib.nullcontext():
        eager = case.run("reference", dtype, **options)
    exact = case.run("reference", torch.float64, **options)
    assert fused.keys() >= exact.keys()
    for name in fused:
        if name not in exact:  # what the head does not read
            assert not fused[name].any()
            continue
        # Chains of 32 round about as the blocks of a matrix library do, not equally: with factor 2
        # one tensor in fifty fails by chance. With 3, of eight bugs planted in the kernels (a term
        # of exp dropped, a softmax off by 1e-6, a row or column forgotten, wrong dropout) seven
        # are caught; the eighth moves exp by one ulp.
        assert_parity(name, fused[name], eager[name], exact[name], factor=3)


def parity_case(head: str, n_candidates: int) -> Case:
    """Enough rows for errors to be comparable, few enough for no hidden unit to be almost 0.

    There the gradient of ReLU jumps, and rounding decides.
    """
    return Case(head, n_users=24 if n_candidates < 20 else 6, n_candidates=n_candidates)


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


def case_with(case: Case, **tensors) -> Case:
    case.tensors.update(tensors)
    return case


@pytest.mark.parametrize("n_candidates", [1, 19, 130])
def test_order_copies_and_neighbours_change_no_bit(n_candidates):
    """A score depends on its own user and item: permuted, duplicated, or the user alone."""
    case = Case(n_candidates=n_candidates)
    scores = case.call("cpp")
    order = torch.randperm(n_candidates)
    permuted = case.call("cpp", {**case.tensors, "candidates": case.items[:, order]})
    assert torch.equal(permuted, scores[:, order])
    for b in range(6):
        t = case.tensors
        one = slice(b, b + 1)
        alone = ops.score(
            t["search"][one], t["rec"][one], *(n[one] for n in case.lengths),
            t["candidates"][one], t["user"][one], case.weights, backend="cpp",
        )  # fmt: skip
        assert torch.equal(alone[0], scores[b])


def assert_padding_and_strides_change_no_bit(case: Case, backend: str) -> None:
    expected = case.run(backend)
    for name in ("search", "rec"):
        x = case.tensors[name]
        assert x.isnan().any()
        assert not expected[name][x.isnan()].any()
        case.tensors[name] = torch.where(x.isnan(), torch.inf, x)
    x = case.tensors["candidates"]
    case.tensors["candidates"] = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not case.tensors["candidates"].is_contiguous()
    for name, value in case.run(backend).items():
        assert torch.equal(value, expected[name]), name


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


def assert_serves_no_user_and_no_candidate(draw: Callable[..., Case], backend: str) -> None:
    empty, nothing = draw(n_users=0).run(backend), draw(n_candidates=0).run(backend)
    assert empty["scores"].shape == (0, 5)
    assert nothing["scores"].shape == (6, 0)
    for results in (empty, nothing):
        for name, value in results.items():
            assert not value.any(), name


def test_no_user_and_no_candidate():
    assert_serves_no_user_and_no_candidate(Case, "cpp")


def assert_only_inputs_and_ids_are_kept(case: Case, backend: str) -> None:
    leaves = {k: v.contiguous().requires_grad_() for k, v in case.tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.call(backend, leaves)
    pointers = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *case.lengths)}
    new = [t for t in kept if t.untyped_storage().data_ptr() not in pointers]
    n_ids = case.upstream.shape[0] * case.upstream.shape[-1]
    assert all(t.dtype == torch.int64 and t.numel() <= n_ids for t in new)


def test_nothing_of_the_size_of_the_hidden_layers_is_kept():
    assert_only_inputs_and_ids_are_kept(Case(n_candidates=100), "cpp")


def check_registered_ops(prefix: str, case: Case):
    """Hold a backend's four ops to torch's rules, with the head that adds the dot product."""
    forward, backward, topk, rank = (
        getattr(torch.ops.lcr_fast, f"{prefix}_score_{name}").default
        for name in ("fwd", "bwd", "topk", "rank")
    )
    t = {k: v.nan_to_num() for k, v in case.tensors.items()}
    n_users, dim = t["user"].shape
    device = t["user"].device
    mlp = [t[f"weight {i}"] for i in range(3)], [t[f"bias {i}"] for i in range(3)]
    table = torch.randn(9, dim, device=device)
    ids = torch.randint(0, 9, (n_users, 4), device=device)
    arguments = (
        t["search"][:, None], t["rec"][:, None], *case.lengths, table, ids, t["user"],
        t["target_weight"], *mlp, torch.arange(n_users, device=device), 1000, 7, True,
    )  # fmt: skip
    torch.library.opcheck(forward, arguments)
    upstream = torch.randn(n_users, 1, 4, device=device)
    torch.library.opcheck(backward, (upstream, *arguments))
    pass_ = (t["search"], t["rec"], *case.lengths, table, t["user"], t["target_weight"], *mlp)
    exclude = torch.randint(0, 9, (n_users, 2), device=device)
    torch.library.opcheck(topk, (*pass_, 4, exclude, True))
    target = torch.tensor([1, 0, 5], device=device)[:n_users]
    bonus = torch.randn(n_users, device=device)
    torch.library.opcheck(rank, (*pass_, target, bonus, exclude, True))


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


# -- the catalogue --------------------------------------------------------------------------------


def catalogue_case(n_items: int, head="mlp", copies=False, **options) -> Case:
    case = Case(head, **options)
    g = torch.Generator().manual_seed(5)
    table = torch.randn(n_items + 1, case.items.shape[-1], generator=g)
    if copies:  # every vector several times, far apart: exact ties
        table = table[torch.randint(1, n_items // 4 + 2, (n_items + 1,), generator=g)]
    case.tensors["table"] = table
    return case


def all_scores(case: Case, backend="cpp"):
    """Every score as the catalogue pass computes it: top-k of the whole catalogue, by id."""
    n = len(case.tensors["table"]) - 1
    ids, scores = case.catalogue(ops.score_topk, n, backend=backend)
    table = torch.full((len(ids), n + 1), torch.nan)
    return table.scatter(1, ids.cpu(), scores.cpu())


EXCLUDED = torch.tensor(
    [[0, 3, 3, 2000], [1, 2, 4, 5], [7, -1, 0, 0], [9, 9, 9, 9], [0, 0, 0, 0], [11, 1, 12, 13]]
)


def assert_full_sort(case: Case, scores: torch.Tensor, k: int, backend: str) -> None:
    """Hold the k best to a sort of ``scores`` [6, I + 1]; of equal ones the lower id is first."""
    exclude = EXCLUDED.to(case.upstream.device)
    ids, top = case.catalogue(ops.score_topk, k, exclude=exclude, backend=backend)
    for b in range(6):
        out = {0, *EXCLUDED[b].tolist()}
        pairs = sorted((-s, i) for i, s in enumerate(scores[b].tolist()) if i not in out)
        expected = [i for _, i in pairs[:k]]
        assert ids[b].tolist() == expected + [0] * (k - len(expected))
        assert top[b, : len(expected)].tolist() == [-s for s, _ in pairs[:k]]
        assert torch.isneginf(top[b, len(expected) :]).all()


def assert_counted(case, scores, target, bonus, backend: str) -> None:
    """Hold ranks to a count in ``scores`` [6, I + 1]; the first user has no target."""
    device = case.upstream.device
    rank = case.catalogue(
        ops.score_rank,
        target.to(device),
        bonus=None if bonus is None else bonus.to(device),
        exclude=EXCLUDED.to(device),
        backend=backend,
    )
    assert rank[0] == 0
    for b in range(1, 6):
        out = {0, *EXCLUDED[b].tolist(), int(target[b])}
        wanted = scores[b, target[b]] + (0 if bonus is None else bonus[b])
        ahead = [i for i in range(1, scores.shape[1]) if i not in out and scores[b, i] >= wanted]
        assert rank[b] == 1 + len(ahead)


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


# -- the Triton kernels, on a GPU where there is one, else in the interpreter ---------------------

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALVES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]  # interpreted, it truncates
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
        {"max_search_len": 0, "n_candidates": 17},
        {"trajectories": 3, "n_users": 5, "score": "mlp_dot", "user_embedding": False},
    ],
    ids=str,
)
def test_triton_parity_in_other_shapes(changes):
    assert_kernels_match(kernel_case(**changes))


@triton_installed
@pytest.mark.skipif(GPU, reason="a GPU has tensor cores")
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
    assert (error > 1e-4) == (precision == "high")  # the model multiplies, and as it was asked


@on_triton
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("changes", [{}, {"trajectories": 3}, {"score": "mlp_dot"}], ids=str)
def test_triton_parity_of_halves(changes, dtype):
    assert_kernels_match(kernel_case(**changes), dtype)


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
    """One user of scratch at a time, and one program for all trajectories of a tile."""
    from lcr_fast.kernels.scoring import backward, forward

    case = kernel_case(trajectories=3, max_rec_len=9, n_users=5)
    expected = case.run("triton")
    monkeypatch.setattr(backward, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(forward, "PROGRAMS", 1)
    for name, value in case.run("triton").items():
        if "weight" in name or "bias" in name:  # sums over users, in other groups
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(value, expected[name]), name


@on_triton
def test_triton_reads_no_padding_and_keeps_only_its_inputs():
    case = kernel_case()
    assert_padding_and_strides_change_no_bit(case, "triton")
    assert_only_inputs_and_ids_are_kept(case, "triton")


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
def test_triton_names_a_nan():
    case = exact_case(n_items=20)
    case.tensors["search"][2, 0] = torch.nan
    for function, argument in (
        (ops.score_topk, 3),
        (ops.score_rank, torch.full((6,), 2, device=DEVICE)),
    ):
        with pytest.raises(ValueError, match="user 2 of the batch has a NaN score"):
            case.catalogue(function, argument, backend="triton")


# -- instruction sets, refusals -------------------------------------------------------------------

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


def test_small_gpus_get_small_tiles():
    configs = pytest.importorskip("lcr_fast.kernels.scoring.config")
    gpus = pytest.importorskip("lcr_fast.kernels.gpu")
    case = (64, 100, 50, torch.float32, "tf32x3")
    large = configs.config("score_fwd", *case, gpus.GPUS["sm_80"])
    small = configs.config("score_fwd", *case, gpus.Gpu(8, 99 << 10))
    assert (large["CANDIDATES"], small["CANDIDATES"]) == (64, 16)
