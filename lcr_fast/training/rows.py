"""Large tables: gradients, clipping and AdamW for the rows alone that a batch touches.

A step's time and the gradient's memory then do not grow with the table. ``docs/scale.md`` says
where the result differs from that of dense gradients.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcr_fast.model import LCRSER

_LAST = "last"  # int32 [rows]: the step that moved a row's moments last


def use_rows(model: LCRSER, wanted: bool) -> None:
    """Let the tables of a model have sparse gradients, or dense ones again."""
    for table in (model.item_embedding, model.user_embedding, model.query_embedding):
        if table is not None:
            table.sparse = wanted


def merged(gradient: Tensor) -> Tensor:
    """Add up a table's sparse gradient by row: coalesced, the same bits each time on any device."""
    rows, places = gradient._indices()[0].unique(return_inverse=True)
    # Sorts the rows or splits them: no atomics.
    values = torch.ops.aten.embedding_dense_backward(
        gradient._values(), places, len(rows), -1, False
    )
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, gradient.shape, is_coalesced=True, check_invariants=False
    )


def merge_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Merge the gradients that are sparse, as clipping and the optimizer take them."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = merged(parameter.grad)


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scale all gradients, sparse ones merged, to a common norm of at most ``largest``."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    values = [g.values() if g.is_sparse else g for g in gradients]
    norm = torch.nn.utils.get_total_norm(values)
    torch._foreach_mul_(values, (largest / (norm + 1e-6)).clamp(max=1.0))


def flat(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Flatten the gradients that several losses have of one parameter, so that they compare.

    Sparse ones hold the rows that any of them touches; None is zeros.
    """
    touched = [g._indices()[0] for g in gradients if g is not None and g.is_sparse]
    if not touched:
        return [torch.zeros_like(like).flatten() if g is None else g.flatten() for g in gradients]
    rows = torch.cat(touched).unique()
    found = []
    for gradient in gradients:
        values = like.new_zeros(len(rows), *like.shape[1:])
        if gradient is not None:
            own = merged(gradient)
            values[torch.searchsorted(rows, own.indices()[0])] = own.values()
        found.append(values.flatten())
    return found


class RowAdamW(torch.optim.AdamW):
    """AdamW whose step costs as much as the rows that sparse, merged gradients touch.

    A row's moments decay over the steps that missed it as they would have with zero gradients; the
    row itself stays, where AdamW would let it coast on its momentum. Rows touched by every step
    are AdamW's, bit for bit on CPU. Dense gradients are AdamW's own. Raises ValueError where a
    table has weight decay, which would need every row.
    """

    #: Read by torch's fused step, which leaves everything as it is where this is 1.
    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update what has a gradient; a sparse one is used up."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._step_rows(parameter, group)
                    parameter.grad = None
        return super().step(closure)

    def _step_rows(self, table: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            raise ValueError("tables whose rows are updated alone can have no weight decay")
        state = self.state[table]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(table)
            state["exp_avg_sq"] = torch.zeros_like(table)
            state[_LAST] = torch.zeros(len(table), dtype=torch.int32, device=table.device)
        state["step"] += 1
        step = int(state["step"])
        rows, gradient = table.grad.indices()[0], table.grad.values()  # type: ignore[union-attr]
        missed = (step - 1 - state[_LAST][rows]).double().unsqueeze(1)
        first, second = (
            state[name][rows] * (beta**missed).to(table.dtype)
            for name, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True)
        )
        # From here on operation by operation as torch's AdamW, for the same bits.
        beta1, beta2 = group["betas"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        moved = table[rows].addcdiv_(first, spread, value=-group["lr"] / (1 - beta1**step))
        table.index_copy_(0, rows, moved)
        state["exp_avg"].index_copy_(0, rows, first)
        state["exp_avg_sq"].index_copy_(0, rows, second)
        state[_LAST][rows] = step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, whose integers torch would make floats."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            if _LAST in state:
                parameter = parameters[index]
                self.state[parameter][_LAST] = state[_LAST].to(parameter.device)
