"""Print a hash of what each C++ operator gives, at every instruction set that this CPU has.

Which products and sums are fused is the source's choice, not the compiler's: the output is the
same whichever compiler built the extension. ``.ci/run`` compares two.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

import scoring_cases
import test_cpu_reasoning
import test_request
from lcr_fast import ops
from lcr_fast.ops import ranking
from lcr_fast.serving.scorer import DTYPES as REQUEST_DTYPES
from lcr_fast.serving.scorer import Scorer
from lcr_fast.testing import random_encoder, random_reasoning, run_encoder, run_reasoning

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = test_cpu_reasoning.REASONING | test_cpu_reasoning.PAIRS


def results() -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Yield the name and the results of one case after another."""
    rows = torch.arange(3)
    yield "noise", [ops.normal_noise(rows, 7, 2, 1, 5, 31, backend="cpp")]
    for dtype in DTYPES:
        for name, reasoning in CASES.items():
            call = random_reasoning(reasoning).to(dtype)
            yield f"reasoning {dtype} {name}", run_reasoning(call, "cpp").values()
        for name, encoder in test_cpu_reasoning.ENCODERS.items():
            call = random_encoder(encoder).to(dtype)
            yield f"encode {dtype} {name}", run_encoder(call, "cpp").values()
    for head in scoring_cases.HEADS:
        for n_candidates in (5, 130):
            case = scoring_cases.parity_case(head, n_candidates)
            yield f"score {n_candidates}, {head}", case.run("cpp").values()
        case = scoring_cases.catalogue_case(300, head)
        yield f"catalogue, {head}", case.catalogue(ops.score_topk, 300)
    for changes in test_request.CONFIGS:
        model = test_request.make(**changes)
        for dtype in REQUEST_DTYPES:
            scorer = Scorer(model, dtype=dtype)
            yield f"request {dtype} {changes}", map(scorer, test_request.batches(model.config))
    g = torch.Generator().manual_seed(0)
    for dtype in (*DTYPES, torch.float64):
        users, items = (torch.randn(n, 33, generator=g).to(dtype) for n in (6, 3000))
        target = torch.randint(0, 3000, (6,), generator=g)
        yield f"ranks {dtype}", [ranking.catalogue_rank(users, items, target, backend="cpp")]


def main() -> None:
    """Print the hashes of the level that LCR_FAST_CPU names; of each level where it is unset."""
    if "LCR_FAST_CPU" in os.environ:
        for name, tensors in results():
            total = hashlib.sha256()
            for tensor in tensors:
                total.update(tensor.detach().contiguous().view(torch.uint8).numpy())
            print(ranking.cpu_level(), name, total.hexdigest()[:16])
        return
    for level in ranking.CPU_LEVELS[: ranking.CPU_LEVELS.index(ranking.cpu_level()) + 1]:
        subprocess.run(
            [sys.executable, __file__], env=os.environ | {"LCR_FAST_CPU": level}, check=True
        )


if __name__ == "__main__":
    main()
