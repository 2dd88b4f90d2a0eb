"""One request, and a batch, beside other engines with the same weights and inputs, on a CPU.

Ours is the Scorer, one call from ids to scores; "op by op" is the model's own forward. ONNX Runtime
and OpenVINO run what ``lcr_fast.export`` writes. Each in float32, and in bfloat16 where it has that
for this model and this CPU; each on one thread and on two. The busy neighbours are as many
processes that compute without end as there are cores. The last recommends from a catalogue with
texts, which ``LCRSER.projected`` has projected before.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import harness
from lcr_fast import export
from lcr_fast.config import LCRConfig
from lcr_fast.serving.scorer import Scorer
from lcr_fast.testing import random_batch, random_model

D, L, C = 64, 30, 100
SIZES = {"n_items": 20_000, "n_users": 1000, "n_terms": 5000}
INPUT_SETS = 4
BUSY_SECONDS = 120  # at most
BFLOAT16 = " in bfloat16"  # behind an engine's name


@pytest.fixture(autouse=True)
def _on_a_cpu(device):
    if device != "cpu":
        pytest.skip("the engines compared here run on a CPU")


@pytest.fixture(params=[0, 5], ids="K={}".format, scope="module")
def model(request):
    config = LCRConfig(**SIZES, dim=D, steps=request.param, max_search_len=L, max_rec_len=L)
    return random_model(config, torch.Generator().manual_seed(0), torch.float32)


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory):
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        return None
    path = tmp_path_factory.mktemp("onnx") / "scorer.onnx"
    export.save(model, path, "onnx")
    return path


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(model, n_users):
    return [
        random_batch(model.config, n_users, C, torch.Generator().manual_seed(seed))
        for seed in range(INPUT_SETS)
    ]


def engines(path, n_threads):
    """Load the ONNX file in what is installed: functions of a Batch.

    ONNX Runtime multiplies no bfloat16 on such CPUs.
    """
    found = {}
    if path and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]

        def ort(batch):
            feed = {name: getattr(batch, name).numpy() for name in names}
            return torch.from_numpy(session.run(["scores"], feed)[0])

        found["ONNX Runtime"] = ort
    if path and importlib.util.find_spec("openvino"):
        import openvino

        core = openvino.Core()
        found["OpenVINO"] = openvino_scores(core, path, n_threads, "f32")
        if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            found["OpenVINO" + BFLOAT16] = openvino_scores(core, path, n_threads, "bf16")
    return found


def openvino_scores(core, path, n_threads, precision):
    settings = {
        "INFERENCE_NUM_THREADS": n_threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(path, "CPU", settings)
    asked = compiled.create_infer_request()
    inputs = [value.get_any_name() for value in compiled.inputs]

    def scores(batch):
        answer = asked.infer({name: getattr(batch, name).numpy() for name in inputs})
        return torch.from_numpy(answer[0].copy())

    return scores


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("n_users", [1, 64])
@pytest.mark.benchmark(group="request, other engines")
@torch.inference_mode()
def test_request_beside_other_engines(benchmark, race, small, model, onnx_file, n_users, n_threads):
    n_users = min(n_users, 2) if small else n_users
    with threads(n_threads):
        functions = {
            "": Scorer(model, n_threads),
            "ours" + BFLOAT16: Scorer(model, n_threads, dtype=torch.bfloat16),
            "op by op": model,
        }
        functions |= engines(onnx_file, n_threads)
        inputs = batches(model, n_users)
        expected = model(inputs[0])
        for name, function in functions.items():
            bound = harness.rounding_bound("bf16" if name.endswith(BFLOAT16) else "fp32")
            harness.assert_close(name, function(inputs[0]), expected, bound)
        sets = [(batch,) for batch in inputs]
        turns = {name: harness.rotate(f, sets) for name, f in functions.items()}
        K = model.config.steps
        benchmark.extra_info |= {
            "case": f"K = {K}, {n_users} x {C}, threads {n_threads}",
            "device": "cpu",
            "users": n_users,
            "axes": {"K": K, "B": n_users, "C": C, "threads": n_threads},
        }
        ours = turns.pop("")
        others = {name: (f, 1.0) for name, f in turns.items()}
        race(ours, others, rounds=300, seconds=4.0, single=True)


@contextlib.contextmanager
def busy_neighbours(n: int) -> Iterator[None]:
    """Keep n processes busy meanwhile."""
    code = f"import time; end = time.time() + {BUSY_SECONDS}\nwhile time.time() < end: pass"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(n)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize("n_neighbours", [0, os.cpu_count() or 1])
@pytest.mark.benchmark(group="request, busy neighbours")
@torch.inference_mode()
def test_request_beside_busy_neighbours(benchmark, race, small, model, n_neighbours):
    n_neighbours = 0 if small else n_neighbours
    with threads(2), busy_neighbours(n_neighbours):
        sets = [(batch,) for batch in batches(model, 1)]
        K = model.config.steps
        benchmark.extra_info |= {
            "case": f"K = {K}, 1 x {C}, busy neighbours {n_neighbours}",
            "device": "cpu",
            "users": 1,
            "axes": {"K": K, "neighbours": n_neighbours},
        }
        race(
            harness.rotate(Scorer(model), sets),
            {
                "two threads": (harness.rotate(Scorer(model, 2), sets), 1.0),
                "op by op": (harness.rotate(model, sets), 1.0),
            },
            rounds=300,
            seconds=10.0,
            single=True,
        )


@pytest.mark.parametrize("text_dim", [64, 384])
@pytest.mark.benchmark(group="recommend, items with texts")
@torch.inference_mode()
def test_recommend_items_with_texts(benchmark, race, small, text_dim):
    """One user's ten best items: their texts projected once, or in every pass over them."""
    n_items = 2000 if small else 200_000
    sizes = SIZES | {"n_items": n_items, "max_search_len": L, "max_rec_len": L}
    generator = torch.Generator().manual_seed(0)
    model = random_model(LCRConfig(**sizes, dim=D, item_text_dim=text_dim), generator).float()
    model.set_text(item_text=torch.randn(n_items + 1, text_dim, generator=generator))
    projected, batch = model.projected(), batches(model, 1)[0]
    with threads(1):
        found, expected = (m.recommend(batch, 10)[1] for m in (projected, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        benchmark.extra_info |= {
            "case": f"K = {model.config.steps}, 1 x {n_items:,}, texts of {text_dim} numbers",
            "device": "cpu",
            "users": 1,
            "axes": {"texts": text_dim},
        }
        others = {"projected in the pass": (lambda: model.recommend(batch, 10), 1.0)}
        race(lambda: projected.recommend(batch, 10), others, rounds=15, seconds=15.0, single=True)
