"""What is compiled of the lookups."""

from collections.abc import Iterator

import torch

from lcr_fast.kernels.launch import TYPES, Type, Variant, describe
from lcr_fast.kernels.lookup import embed_backward
from lcr_fast.kernels.lookup.embed import Events, config, embed_kernel
from lcr_fast.kernels.lookup.embed_backward import (
    Entries,
    Gradients,
    join_runs_kernel,
    number_entries_kernel,
    sum_runs_kernel,
)
from lcr_fast.kernels.lookup.seen import (
    CONFIG,
    Seen,
    seen_bonus_bwd_kernel,
    seen_bonus_fwd_kernel,
)


def variants(arch: str) -> Iterator[Variant]:
    """Yield what a model of one dtype launches, which is the same on every ``arch``."""
    for dtype in (torch.float32, torch.bfloat16):
        pointer = f"*{TYPES[dtype]}"
        events = Events("*i64", "*i64", pointer, pointer)
        of_backward: dict[str, Type] = {
            "entries": Entries(*["*i64"] * len(Entries._fields)),
            "gradients": Gradients(*[pointer] * len(Gradients._fields)),
            "keys_ptr": "*i32", "order_ptr": "*i64", "shares_ptr": "*fp32", "ends_ptr": "*fp32",
        }  # fmt: skip
        for dim in (64, 128):
            yield describe(
                f"embed-{TYPES[dtype]}-d{dim}", embed_kernel, dtype,
                {"search": events, "rec": events}, config(dim),
            )  # fmt: skip
            for name, kernel in (("sum", sum_runs_kernel), ("join", join_runs_kernel)):
                yield describe(
                    f"embed_{name}-{TYPES[dtype]}-d{dim}", kernel, dtype, of_backward,
                    embed_backward.config(dim),
                )  # fmt: skip
        if dtype == torch.float32:  # which it does not know
            yield describe(
                "embed_number", number_entries_kernel, dtype, of_backward,
                embed_backward.NUMBER_CONFIG,
            )  # fmt: skip
        seen = Seen(*["*i64"] * len(Seen._fields))
        types: dict[str, Type] = {"factor": "fp32", "seen": seen, "dbonus_ptr": "*fp32"}
        for name, kernel in (("fwd", seen_bonus_fwd_kernel), ("bwd", seen_bonus_bwd_kernel)):
            yield describe(f"seen_bonus_{name}-{TYPES[dtype]}", kernel, dtype, types, CONFIG)
