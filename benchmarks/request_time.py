"""The least time of a request to a Scorer, on one thread: the table of docs/serving.md.

    python benchmarks/request_time.py [--turns 4] [--calls 3000] [--items 20000]

Requests of one user, and of 64, with full histories and 100 candidates, by a Scorer in float32 and
in bfloat16, with and without the kept part of the items' first layer. Each in turns; the least mean
of a turn counts, so that what else the machine does costs little. ``repeated``: four requests over
and over; ``different``: 500. Below: work of a request by :mod:`lcr_fast.flops`.
"""

import argparse
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from lcr_fast import Batch, LCRConfig
from lcr_fast.experiments.tables import markdown
from lcr_fast.flops import register
from lcr_fast.serving.scorer import Scorer
from lcr_fast.testing import random_batch, random_model

D, L, C = 64, 30, 100
CASES = {"repeated": (1, 4), "different": (1, 500), "64 users": (64, 4)}
KINDS = {
    "float32, nothing kept": {"keep_items": False},
    "float32": {"keep_items": True},
    "bfloat16, nothing kept": {"keep_items": False, "dtype": torch.bfloat16},
    "bfloat16": {"keep_items": True, "dtype": torch.bfloat16},
}


def microseconds(scorer: Scorer, batches: list[Batch], calls: int) -> float:
    """Time calls with one batch after the other; their mean."""
    start = time.perf_counter()
    for i in range(calls):
        scorer(batches[i % len(batches)])
    return 1e6 * (time.perf_counter() - start) / calls


@torch.inference_mode()
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--calls", type=int, default=3000, help="of one user in a turn")
    parser.add_argument("--items", type=int, default=20_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    register()
    rows: dict[str, list[str]] = {name: [] for name in KINDS}
    work = []
    for K in (0, 5):
        config = LCRConfig(
            n_items=arguments.items, n_users=1000, n_terms=5000, dim=D, steps=K, max_search_len=L,
            max_rec_len=L,
        )  # fmt: skip
        model = random_model(config, torch.Generator().manual_seed(0), torch.float32)
        scorers = {name: Scorer(model, **options) for name, options in KINDS.items()}
        for n_users, n_batches in CASES.values():
            batches = [
                random_batch(config, n_users, C, torch.Generator().manual_seed(seed))
                for seed in range(n_batches)
            ]
            found: dict[str, list[float]] = {name: [] for name in scorers}
            for _ in range(arguments.turns):
                for name, scorer in scorers.items():
                    calls = max(arguments.calls // n_users, 10)
                    found[name].append(microseconds(scorer, batches, calls))
            for name, measured in found.items():
                rows[name].append(f"{min(measured):,.0f}")
        with FlopCounterMode(display=False) as counter:
            scorers["float32"](batches[0].rows(slice(0, 1)))
        work.append(f"K = {K}: {counter.get_total_flops() / 1e6:.1f} MFLOP a request")
    headers = [f"{case}, K = {K}" for K in (0, 5) for case in CASES]
    print(markdown([[name, *cells] for name, cells in rows.items()], ["µs", *headers]))
    print("; ".join(work))


if __name__ == "__main__":
    main()
