"""HR@10 and NDCG@10 of one target a row, against what others use for it."""

import importlib.util

import numpy as np
import pytest
import torch

from lcr_fast.ops.ranking import ranking_metrics

K = 10
NAMES = ("hr@10", "ndcg@10")
# Rows that the slow ones are given, so that a call takes about a second at most.
ARGSORT_SCORES, TOPK_SCORES, RANX_SCORES, TORCHMETRICS_ROWS = 10**7, 4 * 10**7, 2 * 10**6, 200


def means(rank) -> tuple[float, float]:
    """HR@10 and NDCG@10 of ranks, in the array library of ``rank``."""
    xp = torch if isinstance(rank, torch.Tensor) else np
    hit = rank <= K
    gain = xp.where(hit, 1 / xp.log2(rank + 1.0), 0.0)
    return float((hit * 1.0).mean()), float(gain.mean())


def numpy_argsort(scores, target):
    """Sort every list, then find the target, as UniSAR evaluates."""
    order = np.argsort(-scores, axis=1)
    return means((order == target[:, None]).argmax(1) + 1)


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
    return float(torch.stack(hits).mean()), float(torch.stack(gains).mean())


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


@pytest.mark.benchmark(group="ranking")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("B", "C"),
    [(200_000, 100), pytest.param(8_000, 10_000, marks=pytest.mark.extended),
     pytest.param(256, 1_000_000, marks=pytest.mark.extended)],
    ids=lambda n: f"{n:,}",
)  # fmt: skip
def test_ranking(benchmark, race, B, C, threads):
    """On the CPU, whatever the device of the other benchmarks."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    B = min(B, 200) if benchmark.disabled else B
    try:
        # 80 MB to 1 GB: no cache holds it, so one set of inputs is enough.
        scores = torch.randn(B, C, generator=torch.Generator().manual_seed(0))
        # Every third target near the top, so that the cut-off is met.
        target = torch.randint(0, C, (B,), generator=torch.Generator().manual_seed(1))
        scores[torch.arange(0, B, 3), target[::3]] = torch.linspace(2, 5, len(target[::3]))

        def ours(scores=scores, target=target, ties="pessimistic"):
            found = ranking_metrics(scores, target, metrics=NAMES, ties=ties, reduce="mean")
            return tuple(found[name].item() for name in NAMES)

        others = {}

        def enter(name, function, n_rows):
            n = max(1, min(B, n_rows))
            inputs = scores[:n], target[:n]
            low, high = (ours(*inputs, ties=ties) for ties in ("pessimistic", "optimistic"))
            if name == "ranx":
                function = ranx_evaluator(*inputs, threads)
            if name.startswith("numpy"):
                inputs = inputs[0].numpy(), inputs[1].numpy()
            # Equal scores occur: the others resolve them in some order or other.
            for value, least, most in zip(function(*inputs), low, high, strict=True):
                assert least - 1e-6 <= value <= most + 1e-6, name
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

        size = scores.nbytes
        benchmark.extra_info |= {"case": f"{B:,} x {C:,}", "bytes": size, "device": "cpu"}
        medians = race(ours, others, seconds=2.0, on="cpu")
        if medians:
            # A copy reads and writes every byte, we only read.
            rate, best = size / benchmark.stats.stats.median, 2 * size / medians["memory copy"]
            benchmark.extra_info |= {"GB/s": rate / 1e9, "share of copy bandwidth": rate / best}
    finally:
        torch.set_num_threads(before)
