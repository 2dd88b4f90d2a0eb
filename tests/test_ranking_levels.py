"""The instruction sets of the CPU path, each forced in a process of its own."""

import pytest

from lcr_fast.ops import ranking
from lcr_fast.ops._extension import extension_error

pytestmark = pytest.mark.skipif(
    extension_error() is not None, reason=f"lcr_fast._C is not built: {extension_error()}"
)

PARITY = """
import torch
from lcr_fast.metrics import TIES
from lcr_fast.ops import ranking

assert ranking.cpu_level() == {level!r}
metrics = ("hr@3", "ndcg_exp@5", "mrr", "map@5", "rank")
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    for C in (1, 7, 131, 2049):
        scores = torch.randn(3, C, generator=g).mul(20).round().to(dtype)
        target = torch.randint(0, C, (3,), generator=g)
        excluded = torch.rand(3, C, generator=g) < 0.3
        nan = torch.where(torch.arange(C) == C - 1, torch.nan, scores)
        for ties in TIES:
            for mask in (None, excluded):
                for kind in ({{"target": target}}, {{"relevance": scores > 30}})[: 1 + (C != 2049)]:
                    found = [
                        ranking.ranking_metrics(
                            scores, **kind, metrics=metrics, excluded=mask, ties=ties, backend=b
                        )
                        for b in ("cpp", "reference")
                    ]
                    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
            try:
                ranking.target_rank(nan, target, ties=ties)
            except RuntimeError:
                continue
            raise AssertionError("NaN went unnoticed")
    # Longer than what int16 lanes can count at a time.
    scores, target = torch.randn(1, 300_001, generator=g).to(dtype), torch.tensor([9])
    ranks = [ranking.target_rank(scores, target, backend=b) for b in ("cpp", "reference")]
    assert torch.equal(*ranks)
    users, items = (torch.randint(-3, 4, (n, 17), generator=g).to(dtype) for n in (6, 700))
    target = torch.randint(0, 700, (6,), generator=g)
    ranks = [ranking.catalogue_rank(users, items, target, backend=b) for b in ("cpp", "reference")]
    assert torch.equal(*ranks)
"""


@pytest.mark.parametrize("level", ranking.CPU_LEVELS)
def test_forced_level_matches_reference(run_code, level):
    done = run_code(PARITY.format(level=level), LCR_FAST_CPU=level)
    if "instructions that this CPU does not have" in done.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stderr


def test_unknown_level_is_an_error(run_code):
    code = "from lcr_fast.ops import ranking; ranking.cpu_level()"
    done = run_code(code, LCR_FAST_CPU="sse9")
    assert "LCR_FAST_CPU must be baseline, avx2, avx512 or avx512bf16" in done.stderr
