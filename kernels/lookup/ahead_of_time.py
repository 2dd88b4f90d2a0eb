"""What is compiled of the lookups."""

from collections.abc import Iterator

import torch

from lcr_fast.kernels.launch import TYPES, Type, Variant, describe
from lcr_fast.kernels.lookup.embed import Events, config, embed_kernel
from lcr_fast.kernels.lookup.seen import CONFIG, seen_bonus_kernel

_IDS = ("candidates", "clicks", "search_lengths", "rec_items", "rec_lengths")


def variants(arch: str) -> Iterator[Variant]:
    """Yield what a model of one dtype launches, which is the same on every ``arch``."""
    for dtype in (torch.float32, torch.bfloat16):
        pointer = f"*{TYPES[dtype]}"
        events = Events("*i64", "*i64", pointer, pointer, "i32", "i32", "i32", "i32")
        for dim in (64, 128):
            yield describe(
                f"embed-{TYPES[dtype]}-d{dim}", embed_kernel, dtype,
                {"search": events, "rec": events}, config(dim),
            )  # fmt: skip
        types: dict[str, Type] = {"factor": "fp32"}
        types |= {f"{name}_ptr": "*i64" for name in _IDS}
        yield describe(f"seen_bonus-{TYPES[dtype]}", seen_bonus_kernel, dtype, types, CONFIG)
