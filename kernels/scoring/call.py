"""A call of scoring: its arguments as the kernels take them, and what both passes launch alike.

Its *rows* are the candidates of every trajectory of the users; see ``head.py``.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lcr_fast.kernels.core.noise import Dropout, dropout_arguments
from lcr_fast.kernels.core.product import n_parts
from lcr_fast.kernels.gpu import gpu_of
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.scoring.config import (
    PROGRAMS,
    config,
    constants,
    head_config,
    n_blocks,
    prepare,
)
from lcr_fast.kernels.scoring.head import Rows, hidden_kernel
from lcr_fast.kernels.scoring.pooling import pool_kernel
from lcr_fast.kernels.scoring.tile import HeadShape, Mlp, Stream

# Most bytes of rows that a call holds at once (but at least one user's).
SCRATCH_BYTES = 256 << 20


class ScoreCall(NamedTuple):
    """The arguments as the kernels take them; those of :func:`score_call`."""

    search: Stream  # [B, N, L, D]
    rec: Stream
    items: Tensor
    ids: Tensor  # [B or 1, C]
    target_weight: Tensor  # prepared
    mlp: Mlp  # prepared
    user: Tensor  # [B, D], or empty
    dropout_rows: Tensor
    dropout: Dropout
    compiled: dict[str, Any]  # what is compiled for the call, whatever the kernel
    parts: int  # of an operand

    @property
    def head(self) -> HeadShape:
        """What is compiled into the head."""
        return self.compiled["HEAD"]

    @property
    def sizes(self) -> tuple[int, int]:
        """L of both streams."""
        return self.search.states.shape[2], self.rec.states.shape[2]

    @property
    def rows_of_user(self) -> int:
        """Count the rows of a user."""
        return self.search.states.shape[1] * self.ids.shape[1]

    @property
    def ids_stride(self) -> int:
        """Numbers from a user's ids to the next's: none where all users have the same."""
        return self.ids.shape[1] if len(self.ids) > 1 else 0

    def configured(self, kernel: str) -> dict[str, Any]:
        """Choose the compile-time arguments and launch options of a kernel."""
        states = self.search.states
        return self.compiled | config(
            kernel, states.shape[-1], self.ids.shape[1], max(self.sizes), states.dtype,
            self.compiled["PRECISION"], gpu_of(states.device),
        )  # fmt: skip

    def of_head(self) -> dict[str, Any]:
        """Choose those of the head's kernels."""
        states = self.search.states
        return self.compiled | head_config(
            states.shape[-1], self.head, states.dtype, self.compiled["PRECISION"],
            gpu_of(states.device),
        )  # fmt: skip

    def most_candidates(self, bytes_of_row: int) -> int:
        """Count the candidates of a user whose rows :data:`SCRATCH_BYTES` holds, at least 1."""
        return max(1, SCRATCH_BYTES // (self.search.states.shape[1] * bytes_of_row))

    def chunks(self, bytes_of_user: int) -> Iterator[Rows]:
        """Go through the users, as many at a time as :data:`SCRATCH_BYTES` holds.

        Whoever takes a chunk lets go of what it made for it before the next.
        """
        n_users, n_candidates = len(self.search.states), self.ids.shape[1]
        most = max(1, SCRATCH_BYTES // max(bytes_of_user, 1))
        for first in range(0, n_users, most):
            n_rows = min(most, n_users - first) * self.rows_of_user
            yield Rows(n_rows, n_candidates, self.rows_of_user, first)

    def operand_of_rows(self, rows: Rows, width: int) -> Tensor:
        """Allocate an operand of all rows: [parts, R, width]."""
        dtype = self.search.states.dtype if self.parts == 1 else torch.bfloat16
        return self.items.new_empty(self.parts, rows.n_rows, width, dtype=dtype)

    def pool(
        self, rows: Rows, softmax: Tensor | None = None, candidates: Tensor | None = None
    ) -> Tensor:
        """Pool both streams for every row: an operand of inputs [R, 3D].

        For backward, ``candidates`` [users x C, 3D] get k_s, k_r and e, and ``softmax`` [2, 3, R]
        each stream's maxima and inverse sums, of the very logits that ``candidate_bwd_kernel``
        makes again: its tiles are the same, as others may round otherwise.
        """
        compiled = self.configured("attention")
        n_trajectories, dim = self.search.states.shape[1], self.search.states.shape[-1]
        inputs = self.operand_of_rows(rows, 3 * dim)
        users = rows.n_rows // rows.of_user
        n_tiles = triton.cdiv(rows.n_candidates, compiled["CANDIDATES"])
        n_run = n_trajectories if users * n_tiles >= PROGRAMS else 1
        launch(
            pool_kernel, (users * n_tiles * triton.cdiv(n_trajectories, n_run),),
            self.search, self.rec, *self.sizes, self.items, self.ids, self.target_weight, inputs,
            inputs if softmax is None else softmax, inputs if candidates is None else candidates,
            self.ids_stride, n_trajectories, rows.n_candidates, rows.n_rows, rows.first_user, n_run,
            FOR_BACKWARD=softmax is not None, **compiled,
        )  # fmt: skip
        return inputs

    def hide(self, inputs: Tensor, rows: Rows) -> Tensor:
        """Compute the first layer: an operand of hidden units [R, H1]."""
        compiled = self.of_head()
        hidden = self.operand_of_rows(rows, self.head.H1)
        launch(
            hidden_kernel, (tiles(rows, compiled) * n_blocks(self.head.H1, compiled),),
            inputs, self.mlp.w1, self.mlp.b1, self.user, self.dropout_rows, hidden, *rows,
            *self.dropout, **compiled,
        )  # fmt: skip
        return hidden


def tiles(rows: Rows, compiled: dict[str, Any]) -> int:
    """Count the tiles of rows."""
    return triton.cdiv(rows.n_rows, compiled["ROWS"])


def score_call(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    ids: Tensor,
    user: Tensor,
    target_weight: Tensor,
    mlp_weights: list[Tensor],
    mlp_biases: list[Tensor],
    dropout_rows: Tensor,
    dropout_threshold: int,
    dropout_seed: Tensor,
    dot: bool,
) -> ScoreCall:
    """Prepare the arguments of :func:`score_fwd`."""
    dim, dtype = search.shape[-1], search.dtype
    compiled = constants(dim, dtype, user, mlp_weights, dropout_threshold, dot)
    weight, mlp = prepare(target_weight, mlp_weights, mlp_biases, dtype)
    return ScoreCall(
        Stream(search.contiguous(), search_lengths.contiguous()),
        Stream(rec.contiguous(), rec_lengths.contiguous()),
        items.contiguous(), ids.contiguous(), weight, mlp, user.contiguous(),
        dropout_rows.contiguous(), dropout_arguments(dropout_threshold, dropout_seed), compiled,
        n_parts.fn(compiled["PRECISION"]),
    )  # fmt: skip
