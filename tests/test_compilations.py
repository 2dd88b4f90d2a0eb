"""What batches and requests of one class of lengths differ in is compiled into no kernel.

Classes are powers of two, here 17 to 32 events and up to 16 candidates.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Launches nothing; what kernels would compute is whatever the memory holds.
_COUNT = """
import collections, json, sys
import torch
from triton.runtime import driver, jit
from ptx_emulation import gpu as emulation

class Compiled:
    function = 0
    metadata = None
    packed_metadata = ()
    def launch_metadata(self, *_): return None
    def run(self, *_): pass

now, compiled = None, collections.defaultdict(list)

def note(self, key, signature, device, *_):
    kernels, *_ = self.device_caches[device]
    compiled[self.fn.__name__].append(now)
    kernels[key] = Compiled()
    return kernels[key]

emulation.install("sm_90")
jit.JITFunction._do_compile = note

import lcr_fast.ops.scoring
from lcr_fast import LCRSER, LCRConfig
from lcr_fast.testing import random_batch

lcr_fast.ops.scoring._raise_nan = lambda *_: None
dtype = getattr(torch, sys.argv[1])
config = LCRConfig(
    n_items=500, n_terms=50, dim=64, max_search_len=32, max_rec_len=32, max_clicks=3,
    backend="triton", dropout=0.2,
)
model = LCRSER(config).to(dtype)
generator = torch.Generator().manual_seed(0)
for now, (users, candidates, searches, events, excluded, k) in enumerate((
    (2, 10, 17, 18, 5, 3),
    (1, 10, 17, 18, 5, 3),  # what is 1 would be compiled in
    (16, 10, 32, 32, 16, 16),  # and what divides by 16 be known to
    (33, 7, 30, 17, 0, 32), (5, 16, 17, 32, 300, 1),
)):
    sizes = config.replace(max_search_len=searches, max_rec_len=events)
    batch = random_batch(sizes, users, candidates, generator)
    assert batch.search_queries.shape[1] == searches and batch.rec_items.shape[1] == events
    scores = model.train()(batch).masked_fill(batch.candidates == 0, 0.0)
    scores.float().sum().backward()
    with torch.no_grad():
        model.eval()(batch)
        model.rollout(model.encode(batch), batch, 4, 0.1, 1)
        exclude = torch.zeros(users, excluded, dtype=torch.int64)
        model.recommend(batch, k, exclude=exclude)
        target = torch.ones(users, dtype=torch.int64)
        model.target_rank(model.final_states(batch), batch, target, exclude)
print(json.dumps(compiled))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_batch_or_request_compiles_nothing(dtype):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, dtype],
        cwd=Path(__file__).parent,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    assert {"self_bwd_kernel", "state_bwd_kernel", "score_topk_kernel"} <= compiled.keys()
    assert {name: batches for name, batches in compiled.items() if any(batches)} == {}
