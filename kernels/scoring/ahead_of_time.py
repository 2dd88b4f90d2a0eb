"""What is compiled of the scoring kernels."""

import functools
from collections.abc import Iterator

import torch
import triton

from lcr_fast.kernels.gpu import GPUS
from lcr_fast.kernels.launch import TYPES, Type, Variant, describe
from lcr_fast.kernels.scoring.backward import (
    candidate_bwd_kernel,
    head_bwd_kernel,
    state_bwd_kernel,
    user_bwd_kernel,
)
from lcr_fast.kernels.scoring.catalogue import score_rank_kernel, score_topk_kernel
from lcr_fast.kernels.scoring.config import USER_CONFIG, catalogue_config, config, constants
from lcr_fast.kernels.scoring.forward import score_fwd_kernel
from lcr_fast.kernels.scoring.tile import HeadShape, Mlp, Stream
from lcr_fast.kernels.weight_gradients import Columns, columns_product_kernel
from lcr_fast.kernels.weight_gradients import constants as product_constants

_INT64 = ("ids", "user_rows", "seed", "exclude", "ceiling", "target", "best", "ahead")
_FLOAT32 = ("softmax", "sums", "bonus")


def _types(dtype: torch.dtype) -> dict[str, Type]:
    """Types of arguments that are not numbers of the states' dtype, nor int32."""
    pointer = f"*{TYPES[dtype]}"
    stream = Stream(pointer, "*i64", "i32")
    return {
        **{f"{name}_ptr": "*i64" for name in _INT64},
        **{f"{name}_ptr": "*fp32" for name in _FLOAT32},
        **dict.fromkeys(("search", "rec", "stream"), stream),
        "mlp": Mlp(*[pointer] * len(Mlp._fields)),
        "scale": "fp32",
    }


def variants(arch: str) -> Iterator[Variant]:
    """Yield what a model launches, in training (C 5) and in phase 2 (C 100).

    L is the longer history, k the length of a list. Names that say no head are of ``mlp`` with a
    user vector; ``mlp_dot``, at the default width, is without one.
    """
    for variant in _variants_of_one_head(arch):
        yield variant
        head = variant.constexprs.get("HEAD")
        if variant.constexprs.get("D") == 64 and head is not None and not head.DOT:
            name = variant.name.replace("-", "-mlp_dot-", 1)
            both = head._replace(DOT=True, HAS_USER=False)
            yield variant._replace(name=name, constexprs=variant.constexprs | {"HEAD": both})


def _variants_of_one_head(arch: str) -> Iterator[Variant]:
    gpu = GPUS[arch]
    shapes = ((32, 20), (64, 30), (64, 50), (128, 200))
    for precision, dtype, served in (
        ("ieee", torch.bfloat16, shapes),
        ("bf16x3", torch.float32, shapes[2:3]),
        ("bf16x6", torch.float32, shapes[2:]),
    ):
        kind = TYPES[dtype] if dtype != torch.float32 else f"{TYPES[dtype]}-{precision}"
        variant = functools.partial(describe, dtype=dtype, types=_types(dtype))
        for dim, n_events in served:
            suffix = f"{kind}-d{dim}-L{n_events}"
            user = torch.empty(1, dim, device="meta")
            layers = [torch.empty(n, device="meta") for n in (200, 80)]
            for n_candidates, threshold in ((5, 6554), (100, 0)):
                sizes = (dim, n_candidates, n_events, dtype, precision, gpu)
                call = constants(dim, dtype, user, layers, threshold, False)
                call["PRECISION"] = precision
                head: HeadShape = call["HEAD"]
                of_this = f"{suffix}-C{n_candidates}"
                forward = call | config("score_fwd", *sizes)
                yield variant(f"score_fwd-{of_this}", score_fwd_kernel, compiled=forward)
                if n_candidates == 100:
                    forward["HEAD"] = head._replace(H1=0, DOT=True, HAS_USER=False)
                    yield variant(f"score_fwd-dot-{of_this}", score_fwd_kernel, compiled=forward)
                backward = call | config("head_bwd", *sizes)
                yield variant(f"head_bwd-{of_this}", head_bwd_kernel, compiled=backward)
                backward = call | config("attention_bwd", *sizes)
                yield variant(f"candidate_bwd-{of_this}", candidate_bwd_kernel, compiled=backward)
                yield variant(f"state_bwd-{of_this}", state_bwd_kernel, compiled=backward)
            scan = call | catalogue_config(dim, n_events, dtype, precision, gpu)
            for k in (10, 100):
                top = scan | {"K_TILE": triton.next_power_of_2(k), "X_BLOCK": 128}
                name = f"score_topk-{suffix}-k{k}"
                yield variant(name, score_topk_kernel, compiled=top)
            yield variant(f"score_rank-{suffix}", score_rank_kernel, compiled=scan)
        if precision != "bf16x3":
            call = {"D": 64, "H1": 200, "H2": 80, **USER_CONFIG}
            yield variant(f"user_bwd-no-dot-{kind}-d64", user_bwd_kernel, compiled=call)
        if precision == "bf16x6":
            layer = Columns(0, 200, 0, 3 * 64)  # of rows as wide
            call = product_constants([layer], layer.out, layer.width, precision)
            yield variant(f"columns_product-{kind}-d64", columns_product_kernel, compiled=call)
