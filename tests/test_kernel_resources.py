"""The Triton kernels compile for real GPUs, here without one, and fit them.

All variants are compiled by ``python -m lcr_fast.kernels.resources``, into the committed table that
these tests read. A few are compiled again here, in a process of its own, as interpreted kernels
cannot be compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from lcr_fast.kernels import resources  # noqa: E402
from lcr_fast.kernels.resources import SHARED_BYTES, Usage  # noqa: E402

TABLE = Path(__file__).parents[1] / "docs" / "kernel-resources.md"
FINGERPRINTS, ROWS = resources.from_markdown(TABLE.read_text())
NAMES = [name for name, _ in resources.all_variants()]
REFRESH = "run `python -m lcr_fast.kernels.resources -o docs/kernel-resources.md`"


def assert_fits(row: Usage) -> None:
    """Shared memory and tensor cores always; no spills where the default models run."""
    assert row.shared <= SHARED_BYTES[row.arch], row
    if "no-dot" not in row.kernel:
        assert row.tensor_cores != "-", row
    if re.search(r"d(32|64)\b", row.kernel):
        assert row.spilled == 0, row


def test_the_table_lists_what_exists():
    assert {(row.kernel, row.arch) for row in ROWS} == {
        (name, arch) for name in NAMES for arch in SHARED_BYTES
    }, REFRESH
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("module", resources.kernel_modules())
def test_the_table_is_of_these_sources(module):
    current = resources.fingerprint(module, resources.kernel_modules()[module])
    assert FINGERPRINTS[module] == current, REFRESH


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.arch}-{row.kernel}")
def test_the_table_obeys_the_limits(row):
    assert_fits(row)
