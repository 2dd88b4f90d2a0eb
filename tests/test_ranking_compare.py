"""The same numbers as the tools that others use, and where and why theirs differ.

- ranx and trec_eval break ties by their own order (ranx: an unstable sort; trec_eval: document id,
  descending), so lists here have distinct scores.
- ranx and trec_eval count a user without a relevant item as 0; here it is left out of means.
- torchmetrics' retrieval MAP with top_k divides by the hits within k, not by all relevant items.
- trec_eval and ranx cut precision at k even where the list is shorter, as here.
- trec_eval has no exponential gain, and MRR only over the whole list.
"""

import pytest
import torch

from lcr_fast.ops.ranking import ranking_metrics

KS = (1, 5, 10)


@pytest.fixture(scope="module")
def case():
    """Distinct scores [60, 40] in float64 and grades 0 to 3, at least one relevant a row."""
    g = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.randperm(1000, generator=g)[:40] for _ in range(60)]) / 1000
    grades = torch.randint(0, 4, scores.shape, generator=g)
    grades *= torch.rand(scores.shape, generator=g) < 0.2
    grades[:, 0] += grades.sum(1) == 0
    return scores.double(), grades


def ours(case, names):
    scores, grades = case
    return ranking_metrics(scores, relevance=grades, metrics=names)


def test_ranx(case):
    """Compiles for a minute at its first run in an environment."""
    ranx = pytest.importorskip("ranx")
    scores, grades = case
    judged = {
        f"q{b:02}": {f"d{i}": int(g) for i, g in enumerate(row) if g > 0}
        for b, row in enumerate(grades)
    }
    run = {
        f"q{b:02}": {f"d{i}": float(s) for i, s in enumerate(row)} for b, row in enumerate(scores)
    }
    theirs = {
        "hr": "hit_rate",
        "ndcg": "ndcg",
        "ndcg_exp": "ndcg_burges",
        "mrr": "mrr",
        "recall": "recall",
        "precision": "precision",
        "map": "map",
    }
    names = [f"{name}@{k}" for name in theirs for k in KS]
    found = ours(case, names)
    expected = ranx.evaluate(
        ranx.Qrels(judged),
        ranx.Run(run),
        [f"{theirs[name]}@{k}" for name in theirs for k in KS],
        return_mean=False,
    )
    for name in names:
        kind, k = name.split("@")
        wanted = torch.tensor(expected[f"{theirs[kind]}@{k}"], dtype=torch.float32)
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-6, msg=name)


def test_torchmetrics(case):
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    scores, grades = case
    functions = {
        "hr": lambda s, g, k: retrieval.retrieval_hit_rate(s, g > 0, top_k=k),
        "ndcg": lambda s, g, k: retrieval.retrieval_normalized_dcg(s, g, top_k=k),
        "mrr": lambda s, g, k: retrieval.retrieval_reciprocal_rank(s, g > 0, top_k=k),
        "recall": lambda s, g, k: retrieval.retrieval_recall(s, g > 0, top_k=k),
        "precision": lambda s, g, k: retrieval.retrieval_precision(s, g > 0, top_k=k),
    }
    found = ours(case, [f"{name}@{k}" for name in functions for k in KS] + ["map"])
    for name, function in functions.items():
        for k in KS:
            wanted = torch.stack([function(s, g, k) for s, g in zip(scores, grades, strict=True)])
            torch.testing.assert_close(found[f"{name}@{k}"], wanted.float(), msg=f"{name}@{k}")
    whole = [
        retrieval.retrieval_average_precision(s, g > 0) for s, g in zip(scores, grades, strict=True)
    ]
    torch.testing.assert_close(found["map"], torch.stack(whole).float())


def test_pytrec_eval(case):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    scores, grades = case
    cuts = ",".join(map(str, KS))
    judged = {f"q{b}": {f"d{i}": int(g) for i, g in enumerate(row)} for b, row in enumerate(grades)}
    run = {f"q{b}": {f"d{i}": float(s) for i, s in enumerate(row)} for b, row in enumerate(scores)}
    theirs = {
        "hr": "success",
        "ndcg": "ndcg_cut",
        "recall": "recall",
        "precision": "P",
        "map": "map_cut",
    }
    measures = {f"{measure}.{cuts}" for measure in theirs.values()} | {"recip_rank", "map", "ndcg"}
    results = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run)
    pairs = {f"{kind}@{k}": f"{theirs[kind]}_{k}" for kind in theirs for k in KS}
    pairs |= {"mrr": "recip_rank", "map": "map", "ndcg": "ndcg"}
    found = ours(case, list(pairs))
    for name, measure in pairs.items():
        wanted = torch.tensor([results[f"q{b}"][measure] for b in range(len(scores))])
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6, msg=name)
