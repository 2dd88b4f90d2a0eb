"""Whether float32 products may be TF32's, by torch's settings."""

import torch

from lcr_fast.dynamo import constant


@constant  # torch.compile cannot trace it, and compiles again where the answer changes
def allows_tf32() -> bool:
    """Whether torch may multiply float32 on a GPU in TF32.

    torch has two ways to say so, of which the older, ``torch.get_float32_matmul_precision()``,
    raises where the newer one was used. So this reads what both of them write:
    ``torch.backends.cuda.matmul.fp32_precision`` is ``tf32`` after
    ``torch.set_float32_matmul_precision("high")`` (or ``"medium"``),
    ``torch.backends.cuda.matmul.allow_tf32 = True`` and
    ``torch.backends.fp32_precision = "tf32"``, and ``ieee`` or ``none``, the default, elsewhere.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
