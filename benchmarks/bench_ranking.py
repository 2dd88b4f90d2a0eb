"""HR@10 and NDCG@10 of one target a row, against what others use for it, on a CPU or on a GPU."""

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch

import harness
from lcr_fast.ops.ranking import ranking_metrics

K = 10
NAMES = ("hr@10", "ndcg@10")
# Rows that the slow ones are given, so that a call takes about a second at most.
ARGSORT_SCORES, TOPK_SCORES, RANX_SCORES, TORCHMETRICS_ROWS = 10**7, 4 * 10**7, 2 * 10**6, 200
GPU_ARGSORT_SCORES = 10**8
GPU_BYTES = 512 << 20  # of scores, several times what a GPU's cache holds


def means(rank):
    """HR@10 and NDCG@10 of ranks, scalars of the array library of ``rank``."""
    xp = torch if isinstance(rank, torch.Tensor) else np
    hit = rank <= K
    gain = xp.where(hit, 1 / xp.log2(rank + 1.0), 0.0)
    return (hit * 1.0).mean(), gain.mean()


def ours(scores, target, ties="pessimistic"):
    found = ranking_metrics(scores, target, metrics=NAMES, ties=ties, reduce="mean")
    return tuple(found[name] for name in NAMES)


def numpy_argsort(scores, target):
    """Sort every list, then find the target, as UniSAR evaluates."""
    order = np.argsort(-scores, axis=1)
    return means((order == target[:, None]).argmax(1) + 1)


def torch_argsort(scores, target):
    order = scores.argsort(1, descending=True)
    return means((order == target.unsqueeze(-1)).int().argmax(-1) + 1)


def torch_topk(scores, target):
    found = scores.topk(min(K, scores.shape[1])).indices == target.unsqueeze(-1)
    place = found.int().argmax(-1) + 1
    return means(torch.where(found.any(-1), place, K + 1))


def torch_comparison(scores, target):
    wanted = scores.gather(1, target.unsqueeze(-1))
    return means((scores >= wanted).sum(-1))


def torchmetrics(scores, target):
    retrieval = importlib.import_module("torchmetrics.functional.retrieval")
    hits, gains = [], []
    for row, t in zip(scores, target, strict=True):
        relevant = torch.arange(len(row)) == t
        hits.append(retrieval.retrieval_hit_rate(row, relevant, top_k=K))
        gains.append(retrieval.retrieval_normalized_dcg(row, relevant, top_k=K))
    return torch.stack(hits).mean(), torch.stack(gains).mean()


def ranx_evaluator(scores, target, threads):
    """Build ranx's own data, which is not timed, and return the evaluation, which is."""
    ranx, numba = importlib.import_module("ranx"), importlib.import_module("numba")
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    items = [str(i) for i in range(scores.shape[1])]
    rows = scores.tolist()
    run = ranx.Run({str(b): dict(zip(items, row, strict=True)) for b, row in enumerate(rows)})
    judged = ranx.Qrels({str(b): {str(t): 1} for b, t in enumerate(target.tolist())})

    def evaluate(scores, target):
        found = ranx.evaluate(judged, run, [f"hit_rate@{K}", f"ndcg@{K}"], make_comparable=False)
        return tuple(found.values())

    return evaluate


def draw(B: int, C: int, device: str = "cpu", seed: int = 0):
    """Draw scores [B, C] and targets [B], every third near the top, so that the cut-off is met."""
    generator = torch.Generator(device).manual_seed(seed)
    scores = torch.randn(B, C, generator=generator, device=device)
    target = torch.randint(0, C, (B,), generator=generator, device=device)
    some = target[::3]
    scores[torch.arange(0, B, 3, device=device), some] = torch.linspace(
        2, 5, len(some), device=device
    )
    return scores, target


def assert_means(name: str, function: Callable, inputs, judged) -> None:
    """Require the means of ours. Equal scores occur, and others resolve them in some order."""
    low, high = (ours(*judged, ties=ties) for ties in ("pessimistic", "optimistic"))
    for value, least, most in zip(function(*inputs), low, high, strict=True):
        assert float(least) - 1e-6 <= float(value) <= float(most) + 1e-6, name


@pytest.fixture
def finish(request, benchmark, race):
    """Time a case on a device, and keep its bandwidth beside that of a copy."""

    def finish(function, others, B: int, C: int, device: str) -> None:
        size = 4 * B * C
        benchmark.extra_info |= {
            "case": f"{B:,} x {C:,}",
            "bytes": size,
            "device": device,
            "axes": {"B": B, "C": C},
        }
        medians = race(function, others, seconds=2.0, on=device)
        if medians:
            # A copy reads and writes every byte, we only read. On a GPU ours is replayed: the copy
            # that it is compared with is so large that its launch takes nothing of its time.
            rate = size / harness.work_seconds(benchmark)
            best = 2 * size / medians["memory copy"]
            if device == "cuda":
                best = request.getfixturevalue("ceilings")["copy GB/s"] * 1e9
            benchmark.extra_info |= {"GB/s": rate / 1e9, "share of copy bandwidth": rate / best}

    return finish


LARGE = [(8_000, 10_000), (256, 1_000_000)]


@pytest.mark.benchmark(group="ranking")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("B", "C"),
    [(200_000, 100), *(pytest.param(*sizes, marks=pytest.mark.extended) for sizes in LARGE)],
    ids=lambda n: f"{n:,}",
)
def test_on_cpu(finish, small, device, B, C, threads):
    if device != "cpu":
        pytest.skip("a GPU is benchmarked")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    B = min(B, 200) if small else B
    try:
        # 80 MB to 1 GB: no cache holds it, so one set of inputs is enough.
        scores, target = draw(B, C)
        others = {}

        def enter(name, function, n_rows):
            n = max(1, min(B, n_rows))
            judged = inputs = scores[:n], target[:n]
            if name == "ranx":
                function = ranx_evaluator(*inputs, threads)
            if name.startswith("numpy"):
                inputs = inputs[0].numpy(), inputs[1].numpy()
            assert_means(name, function, inputs, judged)
            others[name] = (lambda: function(*inputs)), n / B

        enter("numpy argsort", numpy_argsort, ARGSORT_SCORES // C)
        enter("torch.topk", torch_topk, TOPK_SCORES // C)
        enter("torch comparison", torch_comparison, B)
        for name, function, n_rows in (
            ("torchmetrics", torchmetrics, min(TORCHMETRICS_ROWS, ARGSORT_SCORES // C)),
            ("ranx", None, RANX_SCORES // C),
        ):
            if importlib.util.find_spec(name):
                enter(name, function, n_rows)
        copy = torch.empty_like(scores)
        others["memory copy"] = (lambda: copy.copy_(scores)), 1.0
        finish(lambda: ours(scores, target), others, B, C, "cpu")
    finally:
        torch.set_num_threads(before)


@pytest.mark.benchmark(group="ranking")
@pytest.mark.parametrize(("B", "C"), [(200_000, 100), *LARGE], ids=lambda n: f"{n:,}")
def test_on_gpu(finish, capture, small, device, B, C):
    if device != "cuda":
        pytest.skip("a CPU is benchmarked")
    B = min(B, 200) if small else B
    n_sets = -(-GPU_BYTES // (4 * B * C)) if not small else 1
    sets = [draw(B, C, "cuda", seed) for seed in range(n_sets)]
    others = {}
    for name, function, n_rows in (
        ("torch.topk", torch_topk, B),
        ("torch comparison", torch_comparison, B),
        ("torch argsort", torch_argsort, min(B, GPU_ARGSORT_SCORES // C)),
    ):
        parts = [(scores[:n_rows], target[:n_rows]) for scores, target in sets]
        assert_means(name, function, parts[0], parts[0])
        others[name] = harness.rotate(function, parts), n_rows / B
    copy = torch.empty_like(sets[0][0])
    others["memory copy"] = harness.rotate(lambda scores, _: copy.copy_(scores), sets), 1.0
    for name, replay in capture({"": ours}, sets).items():
        assert_means(name, lambda *_, replay=replay: replay(), sets[0], sets[0])
        others[name] = replay, 1.0
    finish(harness.rotate(ours, sets), others, B, C, "cuda")
