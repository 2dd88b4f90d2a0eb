"""Where the tests' kernels run: on a GPU, in the emulation of one, or in Triton's interpreter."""

import os

import torch

COMPILED = os.environ.get("COMPILED")  # for which GPU, whose code is emulated (conftest.py)
if COMPILED:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a real one is left alone
GPU = torch.cuda.is_available()
INTERPRETED = not (GPU or COMPILED)
DEVICE = "cuda" if GPU else "cpu"
# The interpreter truncates float32 to bfloat16, and multiplies none.
HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
