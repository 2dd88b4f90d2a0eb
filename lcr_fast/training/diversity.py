"""How sure a model's rankings are, and how much of the catalogue they reach."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lcr_fast import grpo
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.training.evaluation import make_batcher, padded_seen, sample_batches

TAIL_SHARE = 0.8  # of the items, the least popular ones
# Most (user, item) pairs scored for the lists; beyond it a fixed random sample of users gets one.
_LIST_PAIRS = 20_000_000


class Diversity(NamedTuple):
    """Statistics of a model's rankings over the users of a split."""

    entropy: float  # mean entropy of softmax over the target and its stored negatives, in nats
    coverage: float  # share of the catalogue that stands in at least one user's top k
    tail: float  # share of the places in the top k that tail items take
    n: int  # users with a top-k list


def tail_items(data: PreparedData) -> NDArray[np.bool_]:
    """Mark the 80 % of the items that occur least often in training: [I + 1]; of equals by id."""
    order = np.argsort(-np.asarray(data.item_count[1:], dtype=np.int64), kind="stable") + 1
    tail = np.zeros(data.n_items + 1, dtype=bool)
    tail[order[data.n_items - round(TAIL_SHARE * data.n_items) :]] = True
    return tail


@torch.inference_mode()
def list_diversity(
    model: LCRSER, data: PreparedData, split: str = "test", k: int = 10
) -> Diversity:
    """Measure the ranking distribution's entropy, and coverage of top-k lists of the catalogue.

    Lists leave out what the user has seen. Raises ValueError for a split without stored negatives.
    """
    model.eval()
    batcher = make_batcher(data, split, model)
    samples = batcher.samples
    if samples.negatives is None:
        raise ValueError("only valid and test have stored negatives")
    device = model.head.target_weight.device
    listed = np.zeros(len(samples), dtype=bool)
    n_lists = max(_LIST_PAIRS // data.n_items, 1)
    listed[np.random.default_rng(0).permutation(len(samples))[:n_lists]] = True
    entropy, shown = 0.0, np.zeros(data.n_items + 1, dtype=np.int64)
    for batch in sample_batches(model, batcher, negatives=True):
        entropy += float(grpo.entropy(model(batch).double()).sum())
        rows = batch.row.cpu().numpy()
        rows = rows[listed[rows]]
        if len(rows):
            users, times = samples.users[rows], samples.times[rows]
            nothing = np.zeros((len(rows), 0), dtype=np.int64)
            batch = batcher.gather(rows, nothing, np.full(len(rows), -1)).to(device)
            seen = torch.from_numpy(padded_seen(data, users, times)).to(device)
            items, _ = model.recommend(batch, k, exclude=seen)
            shown += np.bincount(items.flatten().cpu().numpy(), minlength=len(shown))
    shown[0] = 0  # places that no item was left for
    places = max(int(shown.sum()), 1)
    return Diversity(
        entropy / max(len(samples), 1),
        float((shown > 0).sum() / data.n_items),
        float(shown[tail_items(data)].sum() / places),
        int(listed.sum()),
    )
