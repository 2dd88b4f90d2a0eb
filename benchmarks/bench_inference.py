"""From ids to scores: the latency of one request, and the throughput of a batch, for K = 0 .. 5.

d = 64, 100 candidates; one user with 30 + 30 events, or a batch with random numbers of events.
"eager" is the reference everywhere; "repeated history" is eager too, but copies each history to
all of its candidates before it pools, as the published code of UniSAR and GSERec does. On a GPU in
three precisions, and "captured" and "captured eager" replay CUDA graphs. The model is the paper's
plain reading; one request of the default model, with its bonus of seen items, is timed on GPUs.
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
BATCH = {"cpu": (64,), "cuda": (32, 1024)}
INPUT_SETS = 4
REQUESTS = 300


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("--device")
    # On a CPU one request is compiled; on a GPU that and the largest batch, in float32.
    n_compiled = {1, max(BATCH["cuda"])} if device == "cuda" else {1}
    steps, sizes = STEPS, BATCH[device]
    if metafunc.function is not test_batch:
        sizes = (1,)
    if metafunc.function is test_latency_of_the_default_model:
        steps = (max(STEPS),) if device == "cuda" else ()
    cases = [
        pytest.param(
            n_users,
            K,
            marks=[pytest.mark.extended] * (K not in QUICK_STEPS)
            + [pytest.mark.compiled] * (max(STEPS) == K and n_users in n_compiled),
        )
        for n_users in sizes
        for K in steps
    ]
    metafunc.parametrize(("n_users", "K"), cases)


class Scorers:
    """The same random model on each path; ``reading`` is of its config."""

    def __init__(self, K: int, precision: str, device: str, reading: dict) -> None:
        sizes = {"n_items": 20_000, "n_users": 1000, "n_terms": 5000}
        config = LCRConfig(**sizes, dim=D, steps=K, max_search_len=L, max_rec_len=L, **reading)
        generator = torch.Generator().manual_seed(0)
        self.eager = random_model(config.replace(backend="reference"), generator, torch.float32)
        self.ours = LCRSER(config).eval()
        self.ours.load_state_dict(self.eager.state_dict())
        self.ours.to(device, harness.DTYPES[precision])
        self.eager.to(device, harness.DTYPES[precision])
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
            *copies,
            *lengths,
            model.item_vectors(batch.candidates).flatten(0, 1).unsqueeze(1),
            model.user_vectors(batch.user).repeat_interleave(C, 0),
            model.head.weights(),
            backend="reference",
        )
        return scores.view(len(batch), C)


@pytest.fixture
def prepare(benchmark, compiles, capture, device):
    """Return a function that makes all variants, held to the reference, and the batches."""

    def prepare(K: int, n_users: int, precision: str, default: bool = False):
        scorers = Scorers(K, precision, device, {} if default else harness.PLAIN_READING)
        functions = {"": scorers.ours, "eager": scorers.eager}
        if not default:
            functions["repeated history"] = scorers.repeated
        if compiles:
            torch.compiler.reset()
            functions["torch.compile"] = torch.compile(scorers.eager, dynamic=False)
        batches = scorers.batches(n_users)
        expected, bound = scorers.eager(batches[0]), harness.rounding_bound(precision)
        for name, function in functions.items():
            harness.assert_close(name, function(batches[0]), expected, bound)
        sets = [(batch,) for batch in batches]
        turns = {name: harness.rotate(f, sets) for name, f in functions.items()}
        for name, replay in capture(functions, sets).items():
            harness.assert_close(name, replay(), expected, bound)
            turns[name] = replay
        benchmark.extra_info |= {
            "case": f"K = {K}, {n_users} x {C}" + f", {precision}" * (precision != "fp32"),
            "device": device,
            "users": n_users,
            "axes": {"K": K, "B": n_users, "C": C, "d": D, "L": L, "dtype": precision},
        }
        return turns, batches

    return prepare


def _race_requests(prepare, race, precision: str, n_users: int, K: int, **options) -> None:
    with harness.multiplying_in(precision):
        turns, _ = prepare(K, n_users, precision, **options)
        ours = turns.pop("")
        race(
            ours,
            {name: (f, 1.0) for name, f in turns.items()},
            rounds=REQUESTS,
            seconds=4.0,
            single=True,
        )


@pytest.mark.benchmark(group="inference, one request")
@torch.inference_mode()
def test_latency(prepare, race, precision, n_users, K):
    _race_requests(prepare, race, precision, n_users, K)


@pytest.mark.benchmark(group="inference, one request of the default model")
@torch.inference_mode()
def test_latency_of_the_default_model(prepare, race, precision, n_users, K):
    _race_requests(prepare, race, precision, n_users, K, default=True)


@pytest.mark.benchmark(group="inference, batch")
@torch.inference_mode()
def test_batch(benchmark, prepare, race, small, ceilings, device, precision, n_users, K):
    n_users = 2 if small else n_users
    with harness.multiplying_in(precision):
        turns, batches = prepare(K, n_users, precision)
        ours = turns.pop("")
        race(ours, {name: (f, 1.0) for name, f in turns.items()}, rounds=15, seconds=1.0)
        peaks = {
            name: harness.peak_bytes(f, device)
            for name, f in {"": ours, **turns}.items()
            if benchmark.enabled and name not in harness.CAPTURED.values()
        }
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
        rate = flops / harness.work_seconds(benchmark) / 1e9
        benchmark.extra_info |= {
            "FLOPs": flops,
            "GFLOP/s": rate,
            "peak bytes": peaks,
            "share of matmul rate": rate / ceilings[f"matmul {precision} GFLOP/s"],
        }
