"""What is compiled of the scoring kernels."""

import functools
from collections.abc import Iterator

import torch

from lcr_fast.kernels.gpu import GPUS, Gpu
from lcr_fast.kernels.launch import TYPES, Type, Variant, describe
from lcr_fast.kernels.scoring.backward import candidate_bwd_kernel, state_bwd_kernel
from lcr_fast.kernels.scoring.catalogue import (
    list_tile,
    score_rank_kernel,
    score_topk_kernel,
)
from lcr_fast.kernels.scoring.config import (
    USER_CONFIG,
    catalogue_config,
    config,
    constants,
    head_config,
)
from lcr_fast.kernels.scoring.forward import score_fwd_kernel
from lcr_fast.kernels.scoring.head import (
    hidden_bwd_kernel,
    hidden_kernel,
    inputs_bwd_kernel,
    output_bwd_kernel,
    output_kernel,
    user_bwd_kernel,
)
from lcr_fast.kernels.scoring.pooling import pool_kernel
from lcr_fast.kernels.scoring.tile import HeadShape, Mlp, Stream
from lcr_fast.kernels.weight_gradients import (
    Columns,
    columns_product_kernel,
    operands_config,
    operands_product_kernel,
)
from lcr_fast.kernels.weight_gradients import constants as product_constants

_INT64 = ("ids", "user_rows", "seed", "exclude", "ceiling", "target", "best", "ahead")
_FLOAT32 = ("softmax", "sums", "bonus", "dt1_sums")
_OPERANDS = ("target_weight", "w1", "w2", "inputs", "hidden", "dt1", "dt2")


def _types(dtype: torch.dtype) -> dict[str, Type]:
    """Types of arguments that are not numbers of the states' dtype, nor int32."""
    pointer = f"*{TYPES[dtype]}"
    operand = pointer if dtype != torch.float32 else "*bf16"  # its parts
    stream = Stream(pointer, "*i64")
    mlp = Mlp(*[pointer] * len(Mlp._fields))._replace(w1=operand, w2=operand)
    return {
        **{f"{name}_ptr": "*i64" for name in _INT64},
        **{f"{name}_ptr": "*fp32" for name in _FLOAT32},
        **{f"{name}_ptr": operand for name in _OPERANDS},
        **dict.fromkeys(("search", "rec", "stream"), stream),
        "mlp": mlp,
        "scale": "fp32",
    }


def variants(arch: str) -> Iterator[Variant]:
    """Yield what a model launches, in training (C 5) and in phase 2 (C 100), nearly.

    Triton compiles arguments in that are 1, such as the one trajectory of phase 1, and W1's and
    W2's gradients are of bf16x6 alone.

    L is the longer history, k the length of a list. Names that say no head are of ``mlp`` with a
    user vector; ``mlp_dot``, at the default width, is without one.
    """
    for variant in variants_of_one_head(GPUS[arch]):
        yield variant
        head = variant.constexprs.get("HEAD")
        if variant.constexprs.get("D") == 64 and head is not None and not head.DOT:
            name = variant.name.replace("-", "-mlp_dot-", 1)
            both = head._replace(DOT=True, HAS_USER=False)
            yield variant._replace(name=name, constexprs=variant.constexprs | {"HEAD": both})


def variants_of_one_head(
    gpu: Gpu, hidden: tuple[int, int] = (200, 80), every: bool = False
) -> Iterator[Variant]:
    """Yield those of an MLP of two hidden widths on a GPU, at ``every`` width or at common ones."""
    shapes = ((32, 20), (64, 50), (128, 200))
    for precision, dtype, served in (
        ("ieee", torch.bfloat16, shapes),
        ("bf16x3", torch.float32, shapes if every else shapes[1:2]),
        ("bf16x6", torch.float32, shapes if every else shapes[1:]),
    ):
        kind = TYPES[dtype] if dtype != torch.float32 else f"{TYPES[dtype]}-{precision}"
        variant = functools.partial(describe, dtype=dtype, types=_types(dtype))
        for dim, n_events in served:
            suffix = f"{kind}-d{dim}-L{n_events}"
            user = torch.empty(1, dim, device="meta")
            layers = [torch.empty(n, device="meta") for n in hidden]
            for n_candidates, threshold in ((5, 6554), (100, 0)):
                sizes = (dim, n_candidates, n_events, dtype, precision, gpu)
                call = constants(dim, dtype, user, layers, threshold, False)
                call["PRECISION"] = precision
                head: HeadShape = call["HEAD"]
                of_head = call | head_config(dim, head, dtype, precision, gpu)
                of_histories = call | config("attention", *sizes)
                of_tiles = call | config("score_fwd", *sizes)
                dot = of_tiles | {"HEAD": head._replace(H1=0, DOT=True, HAS_USER=False)}
                launched = [
                    ("pool", pool_kernel, of_histories | {"FOR_BACKWARD": True}),
                    ("candidate_bwd", candidate_bwd_kernel, of_histories),
                    ("state_bwd", state_bwd_kernel, call | config("state_bwd", *sizes)),
                    ("hidden", hidden_kernel, of_head),
                    ("output_bwd", output_bwd_kernel, of_head),
                    ("hidden_bwd", hidden_bwd_kernel, of_head),
                    ("inputs_bwd", inputs_bwd_kernel, of_head),
                ]
                if dtype == torch.float32:
                    without = of_histories | {"FOR_BACKWARD": False}
                    launched += [
                        ("pool-fwd", pool_kernel, without),
                        ("output", output_kernel, of_head),
                    ]
                else:
                    launched.append(("score_fwd", score_fwd_kernel, of_tiles))
                if n_candidates == 100:
                    launched.append(("score_fwd-dot", score_fwd_kernel, dot))
                for name, of, compiled in launched:
                    yield variant(f"{name}-{suffix}-C{n_candidates}", of, compiled=compiled)
            scan = call | catalogue_config(dim, n_events, dtype, precision, gpu)
            for k in (10, 100):
                top = scan | {"K_TILE": list_tile(k)}
                name = f"score_topk-{suffix}-k{k}"
                yield variant(name, score_topk_kernel, compiled=top)
            yield variant(f"score_rank-{suffix}", score_rank_kernel, compiled=scan)
        if precision != "bf16x3":
            of_user = call | USER_CONFIG  # of the last width
            yield variant(f"user_bwd-no-dot-{kind}-d128", user_bwd_kernel, compiled=of_user)
        if precision == "bf16x6":
            layer = Columns(0, 2 * 64, 0, 64)  # dkeys and e, of rows as wide
            call = product_constants([layer], layer.out, 3 * 64, precision)
            yield variant(f"columns_product-{kind}-d64", columns_product_kernel, compiled=call)
            types: dict[str, Type] = {"dy_ptr": "*bf16", "x_ptr": "*bf16", "sums_ptr": "*fp32"}
            for matrix, out, width in (("W1", hidden[0], 3 * 64), ("W2", hidden[1], hidden[0])):
                call = {"OUT": out, "WIDTH": width, "PRECISION": precision, **operands_config(gpu)}
                name = f"operands_product-{kind}-d64-{matrix}"
                yield describe(name, operands_product_kernel, dtype, types, call)
