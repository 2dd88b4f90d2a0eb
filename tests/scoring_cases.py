"""Cases of scoring, and what any backend must make of them."""

import contextlib
from collections.abc import Callable

import torch

from lcr_fast import ops
from lcr_fast.config import LCRConfig
from lcr_fast.testing import assert_parity, every_op_rounded, random_streams, random_weights
from lcr_fast.weights import ScoringWeights

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


def case_with(case: Case, **tensors) -> Case:
    case.tensors.update(tensors)
    return case


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


def assert_serves_no_user_and_no_candidate(draw: Callable[..., Case], backend: str) -> None:
    empty, nothing = draw(n_users=0).run(backend), draw(n_candidates=0).run(backend)
    assert empty["scores"].shape == (0, 5)
    assert nothing["scores"].shape == (6, 0)
    for results in (empty, nothing):
        for name, value in results.items():
            assert not value.any(), name


def assert_only_inputs_and_ids_are_kept(case: Case, backend: str) -> None:
    leaves = {k: v.contiguous().requires_grad_() for k, v in case.tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.call(backend, leaves)
    pointers = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *case.lengths)}
    new = [t for t in kept if t.untyped_storage().data_ptr() not in pointers]
    n_ids = case.upstream.shape[0] * case.upstream.shape[-1]
    assert all(t.dtype == torch.int64 and t.numel() <= n_ids for t in new)


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
        t["target_weight"], *mlp, torch.arange(n_users, device=device), 1000,
        torch.tensor(7, device=device), True,
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
