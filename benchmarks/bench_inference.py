"""From ids to scores: the latency of one request, and the throughput of a batch, for K = 0 .. 5.

d = 64, 100 candidates; one user with 30 + 30 events, or a batch with random numbers of events.
"eager" is the reference everywhere; "repeated history" is eager too, but copies each history to
all of its candidates before it pools, as the published code of UniSAR and GSERec does.
"""

import pytest
import torch

import harness
import work
from lcr_fast import ops
from lcr_fast.config import LCRConfig
from lcr_fast.model import LCRSER
from lcr_fast.testing import random_batch, random_model

D, L, C = 64, 30, 100
STEPS = (0, 1, 2, 3, 4, 5)
QUICK_STEPS = (0, 5)
BATCH = {"cpu": 64, "cuda": 1024}
INPUT_SETS = 4
REQUESTS = 300


def each_k(test):
    cases = [pytest.param(K, marks=() if K in QUICK_STEPS else pytest.mark.extended) for K in STEPS]
    return pytest.mark.parametrize("K", cases)(test)


class Scorers:
    """The same random model on each path."""

    def __init__(self, K: int, device: str) -> None:
        sizes = {"n_items": 20_000, "n_users": 1000, "n_terms": 5000}
        config = LCRConfig(**sizes, dim=D, steps=K, max_search_len=L, max_rec_len=L)
        generator = torch.Generator().manual_seed(0)
        self.eager = random_model(config.replace(backend="reference"), generator, torch.float32)
        self.ours = LCRSER(config).eval()
        self.ours.load_state_dict(self.eager.state_dict())
        self.ours.to(device)
        self.eager.to(device)
        self.device = device

    def batches(self, n_users: int):
        return [
            random_batch(self.ours.config, n_users, C, torch.Generator().manual_seed(seed)).to(
                self.device
            )
            for seed in range(INPUT_SETS)
        ]

    def repeated(self, batch):
        """Copy each user's states to all candidates and score them one by one."""
        model = self.eager
        search, rec = model.final_states(batch)
        copies = [t.repeat_interleave(C, 0) for t in (search, rec)]
        lengths = [t.repeat_interleave(C) for t in (batch.search_lengths, batch.rec_lengths)]
        scores = ops.score(
            *copies, *lengths, model.item_vectors(batch.candidates).flatten(0, 1).unsqueeze(1),
            model.user_vectors(batch.user).repeat_interleave(C, 0), model.head.weights(),
            backend="reference",
        )  # fmt: skip
        return scores.view(len(batch), C)


@pytest.fixture
def prepare(benchmark, compiles, device):
    """Return a function that makes all variants, held to the reference, and the batches."""

    def prepare(K: int, n_users: int, compiled: bool):
        scorers = Scorers(K, device)
        functions = {"": scorers.ours, "eager": scorers.eager, "repeated history": scorers.repeated}
        if compiles and compiled:
            torch.compiler.reset()
            functions["torch.compile"] = torch.compile(scorers.eager, dynamic=False)
        batches = scorers.batches(n_users)
        expected = scorers.eager(batches[0])
        for name, function in functions.items():
            harness.assert_close(name, function(batches[0]), expected)
        sets = [(batch,) for batch in batches]
        turns = {name: harness.rotate(f, sets) for name, f in functions.items()}
        if device == "cuda":
            turns["CUDA graph"] = harness.graphed(scorers.eager, sets)
            harness.assert_close("CUDA graph", turns["CUDA graph"](), expected)
        benchmark.extra_info |= {
            "case": f"K = {K}, {n_users} x {C}", "device": device, "users": n_users,
            "axes": {"K": K, "B": n_users, "C": C, "d": D, "L": L},
        }  # fmt: skip
        return turns, batches

    return prepare


@pytest.mark.benchmark(group="inference, one request")
@each_k
@torch.inference_mode()
def test_latency(prepare, race, K):
    turns, _ = prepare(K, 1, compiled=max(STEPS) == K)
    ours = turns.pop("")
    race(
        ours, {name: (f, 1.0) for name, f in turns.items()}, rounds=REQUESTS, seconds=4.0,
        single=True,
    )  # fmt: skip


@pytest.mark.benchmark(group="inference, batch")
@each_k
@torch.inference_mode()
def test_batch(benchmark, prepare, race, ceilings, device, K):
    n_users = 2 if benchmark.disabled else BATCH[device]
    turns, batches = prepare(K, n_users, compiled=device == "cuda" and max(STEPS) == K)
    ours = turns.pop("")
    race(ours, {name: (f, 1.0) for name, f in turns.items()}, rounds=15, seconds=1.0)
    if benchmark.enabled:
        lengths = [
            torch.cat([getattr(b, name) for b in batches]).cpu()
            for name in ("search_lengths", "rec_lengths")
        ]
        flops = (
            work.encoder_flops(*lengths, D)
            + work.reasoning_flops(*lengths, D, K)
            + work.aggregation_flops(*lengths, C, D)
        ) / len(batches) + n_users * work.head_flops(C, (4 * D, 200, 80, 1))
        rate = flops / benchmark.stats.stats.median / 1e9
        share = rate / ceilings["matmul fp32 GFLOP/s"]
        benchmark.extra_info |= {
            "FLOPs": flops, "GFLOP/s": rate, "share of matmul rate": share,
            "peak bytes": {
                name: harness.peak_bytes(f, device) for name, f in {"": ours, **turns}.items()
            },
        }  # fmt: skip
