"""What ops launch, counted without a GPU, is what docs/fused-kernel.md says."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import launch_counts

PAGE = Path(__file__).parents[1] / "docs" / "fused-kernel.md"


def test_the_page_has_the_counts_of_this_code(capsys):
    launch_counts.main([])
    assert capsys.readouterr().out in PAGE.read_text()


@pytest.mark.parametrize(
    ("dtype", "gib", "groups"),
    [
        (torch.float32, 4, 5), (torch.float32, 40, 1),
        (torch.bfloat16, 2, 5), (torch.bfloat16, 40, 1),
    ],
)  # fmt: skip
def test_a_backward_is_two_launches_a_group_of_steps_and_three_a_step(dtype, gib, groups):
    """One more splits or casts the weights; in float32 one a group makes their gradients.

    How many steps make a group is the memory's.
    """
    backward = launch_counts.calls(64, dtype)["reason, backward"]
    of_group = 3 if dtype == torch.float32 else 2
    expected = of_group * groups + 3 * launch_counts.K + 1
    assert launch_counts.count(backward, gib << 30).kernels == expected


def test_views_and_allocations_do_not_count():
    x = torch.empty(4, 4, device="meta")
    call = lambda: (x.view(2, 8).transpose(0, 1), torch.empty_like(x), x + x, (x @ x).sum())  # noqa: E731
    assert launch_counts.count(call, 1) == (0, 3)
