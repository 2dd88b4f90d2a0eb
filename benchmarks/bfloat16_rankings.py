"""What bfloat16 does to rankings: the table of docs/serving.md.

    python benchmarks/bfloat16_rankings.py [--epochs 15]

Trains Base and LCR on the synthetic data without its text vectors, and ranks the test users in
float32, by a Scorer in bfloat16, and, for LCR, by an ordinary bfloat16 model, which rounds every
result. The catalogue is all items, seen ones too. A Markdown table goes to stdout.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments.comparison import VARIANTS, Job
from lcr_fast.experiments.tables import markdown
from lcr_fast.model import LCRSER
from lcr_fast.ops.ranking import target_rank
from lcr_fast.serving.scorer import Scorer
from lcr_fast.training.evaluation import make_batcher, sample_batches
from lcr_fast.training.models import fit_config, load_model
from lcr_fast.training.ranks import bootstrap, weighted_metric


@torch.inference_mode()
def scores(model: LCRSER, score, data: PreparedData) -> tuple[NDArray, NDArray]:
    """Score the test users' candidates, target first, and the catalogue: [n, 100], [n, I]."""
    listed, whole = [], []
    every = torch.arange(1, data.n_items + 1)
    for batch in sample_batches(model, make_batcher(data, "test", model), negatives=True):
        listed.append(score(batch).float())
        all_items = batch.replace(candidates=every.expand(len(batch), -1).contiguous())
        whole.append(score(all_items).float())
    return torch.cat(listed).numpy(), torch.cat(whole).numpy()


def shared(a: NDArray, b: NDArray, k: int) -> float:
    """Tell what part of the k best of two lists [n, C] is in both, on average."""
    best = [np.argsort(-x, axis=1, kind="stable")[:, :k] for x in (a, b)]
    return float(np.mean([len(set(x) & set(y)) / k for x, y in zip(*best, strict=True)]))


def column(exact: tuple[NDArray, NDArray], low: tuple[NDArray, NDArray]) -> list[str]:
    """Compare scores in float32 with those in bfloat16: the rows of the table."""
    first = torch.zeros(len(exact[0]), dtype=torch.int64)
    ranks = [target_rank(torch.from_numpy(x[0]), first).numpy() for x in (exact, low)]
    five, ten = ([weighted_metric(r, metric) for r in ranks] for metric in ("ndcg@5", "ndcg@10"))
    less = bootstrap(five[1] - five[0])
    error = np.abs(low[0] - exact[0]).mean() / exact[0].std()
    return [
        f"{five[0].mean():.4f}",
        f"{less.mean:+.4f} [{less.low:+.4f}, {less.high:+.4f}]",
        f"{ten[0].mean():.4f}, {ten[1].mean():.4f}",
        f"{np.mean(ranks[0] != ranks[1]):.1%}",
        f"{shared(exact[0], low[0], 10):.1%}",
        f"{shared(exact[1], low[1], 10):.1%}",
        f"{1 - shared(exact[1], low[1], 1):.1%}",
        f"{error:.2%}",
    ]


ROWS = (
    "NDCG@5, target + 99 negatives, float32", "NDCG@5 in bfloat16 less that [95 %]",
    "NDCG@10, float32 and bfloat16", "users whose target changes its place",
    "shared by the two top-10s of 100 candidates", "shared by the two top-10s of the catalogue",
    "users with another first item of the catalogue",
    "mean error of a score, of the scores' standard deviation",
)  # fmt: skip


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=TrainConfig().epochs)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        prepare(synthetic.generate(synthetic.World(text_dim=0)), out / "data")
        data = PreparedData.open(out / "data")
        config = fit_config(data, LCRConfig())
        train = TrainConfig(epochs=arguments.epochs)
        job = Job(data, config, train, out, report=lambda line: print(line, file=sys.stderr))
        for name in ("base", "lcr"):
            kind = VARIANTS[name]
            job.cell(name, kind.title, kind.objective, model=kind.model_changes,
                     train=kind.train_changes)  # fmt: skip
            model = load_model(out / name / "model.safetensors", data, "cpu").eval()
            exact = scores(model, Scorer(model), data)
            title = f"{kind.title.split(' ')[0]} (K = {model.config.steps})"
            columns[title] = column(exact, scores(model, Scorer(model, dtype=torch.bfloat16), data))
        rounded = copy.deepcopy(model).bfloat16()
        columns["LCR, `model.bfloat16()`"] = column(exact, scores(rounded, rounded, data))
    rows = [[row, *(values[i] for values in columns.values())] for i, row in enumerate(ROWS)]
    print(markdown(rows, ["", *columns]))


if __name__ == "__main__":
    main()
