"""What is compiled of the encoders' kernels."""

from collections.abc import Iterator

import torch

from lcr_fast.kernels.encoding.config import constants
from lcr_fast.kernels.encoding.forward import EncoderStream, encode_fwd_kernel
from lcr_fast.kernels.gpu import GPUS
from lcr_fast.kernels.launch import TYPES, Variant, describe
from lcr_fast.kernels.reasoning.ahead_of_time import argument_types, weight_types
from lcr_fast.kernels.reasoning.backward import (
    BackwardStream,
    ffn_bwd_kernel,
    recompute_self_kernel,
    self_bwd_kernel,
)
from lcr_fast.kernels.reasoning.weights import LayerWeights

_CALLS = (  # width, events, dtype, precision
    (64, 30, torch.bfloat16, "ieee"),
    (64, 50, torch.bfloat16, "ieee"),
    (128, 30, torch.bfloat16, "ieee"),
    (64, 30, torch.float32, "bf16x6"),
    (64, 50, torch.float32, "bf16x6"),
)


def variants(arch: str) -> Iterator[Variant]:
    """Yield what encoders with two heads and F = D launch, in inference and in training.

    Training drops, and its forward pass differs in that alone. On architectures without wgmma the
    two kernels that hold most, over the longer history.
    """
    train = {"DROPOUT": True, "NOISE": False, "POOL": False}
    for dim, size, dtype, precision in _CALLS:
        kind = TYPES[dtype] + (f"-{precision}" if dtype == torch.float32 else "")
        of_step = weight_types(dtype, torch.float32, precision)
        weights = LayerWeights(of_step.self_attention, of_step.ffn, of_step.norms)
        launched = [
            ("fwd", "fwd-train", encode_fwd_kernel, train | {"SAVE": False}),
            ("bwd", "self_bwd-train", self_bwd_kernel, train),
        ]
        if arch == "sm_90":
            launched += [
                ("fwd", "fwd-infer", encode_fwd_kernel, {"DROPOUT": False, "SAVE": False}),
                ("fwd", "recompute_self-train", recompute_self_kernel, train),
                ("bwd", "ffn_bwd-train", ffn_bwd_kernel, train),
            ]
        elif size == 30:
            continue
        for which, name, kernel, switches in launched:
            stream = EncoderStream if kernel is encode_fwd_kernel else BackwardStream
            types = argument_types(dtype, torch.float32, precision, stream) | {"weights": weights}
            compiled = constants(which, dim, dim, 2, size, dtype, precision, GPUS[arch]) | switches
            yield describe(f"{name}-{kind}-d{dim}-L{size}", kernel, dtype, types, compiled)
