"""Time and memory of a training step against the size of the catalogue, by kind of tables.

    python benchmarks/catalogue_step.py [--items 10000 1000000 7000000] [--phase 1|2]

The data is the default synthetic one with its items' numbers spread over catalogues of other sizes,
so that all sizes read the same histories; negatives come from the whole catalogue. One line a size
and kind of tables: the median step of ``--repeats``, in time of one core, and resident memory
afterwards.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.training.models import fit_config
from lcr_fast.training.trainer import Trainer

_COUNTS = ("item_count", "train_target_count")
_IDS = ("rec_items", "click_items")
OBJECTIVES = {1: "supervised", 2: "grpo"}


def spread(data: PreparedData, n_items: int) -> PreparedData:
    """Give the data's items other numbers, in the same order, in a catalogue of ``n_items``."""
    rng = np.random.default_rng(0)
    numbers = np.sort(rng.choice(n_items, data.n_items, replace=False)) + 1
    numbers = np.concatenate(([0], numbers)).astype(np.int32)
    arrays = dict(data.arrays)
    for name, array in data.arrays.items():
        if name in _IDS or name.endswith(("_items", "_negatives", "_impressions")):
            arrays[name] = numbers[array]
    for name in _COUNTS:
        arrays[name] = np.zeros(n_items + 1, dtype=data.arrays[name].dtype)
        arrays[name][numbers] = data.arrays[name]
    arrays["item_id_offsets"] = np.zeros(n_items + 2, dtype=np.int64)  # nameless
    arrays["item_id_bytes"] = np.zeros(0, dtype=np.uint8)
    arrays.pop("item_text", None)
    arrays.pop("query_text", None)
    return PreparedData(arrays, data.manifest)


def measure(
    data: PreparedData, tables: str, phase: int, users: int, repeats: int
) -> tuple[float, float]:
    """Return the median CPU seconds of a step, and the resident GiB after them."""
    torch.manual_seed(0)
    model = LCRSER(fit_config(data, LCRConfig(dim=64)))
    config = TrainConfig(tables=tables, rl_trainable="all")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, data, config, OBJECTIVES[phase], folder)
        rng = np.random.default_rng(0)
        seconds = []
        for _ in range(repeats + 2):
            rows = rng.integers(len(trainer.batcher), size=users)
            start = time.process_time()
            trainer.step(rows, rng)
            seconds.append(time.process_time() - start)
    return statistics.median(seconds[2:]), _resident()


def _resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("VmRSS"))
    return int(kilobytes) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000, 7_000_000])
    parser.add_argument("--tables", nargs="+", default=["dense", "rows"])
    parser.add_argument("--phase", type=int, choices=(1, 2), default=1)
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(synthetic.generate(synthetic.World()), Path(folder) / "data")
        data = PreparedData.open(Path(folder) / "data")
        for n_items in arguments.items:
            larger = spread(data, n_items)
            for tables in arguments.tables:
                seconds, memory = measure(
                    larger, tables, arguments.phase, arguments.users, arguments.repeats
                )
                lines.append((f"{n_items:,}", tables, f"{1000 * seconds:,.0f}", f"{memory:.1f}"))
                gc.collect()
    sys.stdout.write(
        tabulate(lines, ("items", "tables", "CPU ms", "GiB resident"), "github") + "\n"
    )


if __name__ == "__main__":
    main()
