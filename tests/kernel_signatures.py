"""What the compiler is told of each kernel, as the launchers call it: types of the arguments, and constants."""

import os

import torch

from cmlab.kernels import jvp, norm, step

KIND = os.environ["KERNEL_DTYPE"]
X, F = f"*{KIND}", "*fp32"
TILE, STRIDES = dict(BLOCK_C=1, BLOCK_P=1024), ["i32"] * 6
HEADS = torch.empty(1, 1, 1, 64, dtype={"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[KIND])
FORWARD, BACKWARD = jvp._blocks(HEADS, *jvp.FORWARD), jvp._blocks(HEADS, *jvp.BACKWARD)
NUMBERS = ["i32", "i32", "fp32", "fp32"]
SIGNATURES = [
    (
        norm._by_groups, [X, X, F, X, X, X, X, *["i32"] * 7, "fp32"],
        dict(ADAPTIVE=True, GROUPS=16, BLOCK_C=128, BLOCK_P=128, STAGES=1 if KIND == "fp32" else 3),
    ),
    (norm._moments, [X, F, *STRIDES, "i32"], TILE),
    (norm._fold_moments, [F, F, X, X, X, X, *["i32"] * 5, "fp32"], dict(ADAPTIVE=True, BLOCK_S=4, BLOCK_C=8)),
    (norm._apply, [X, X, F, *STRIDES], TILE),
    (norm._sums, [X, X, F, F, *STRIDES, "i32"], TILE),
    (norm._input_gradient, [X, X, X, F, F, *STRIDES], TILE),
    (jvp._attend, [*[X] * 8, F, F, *NUMBERS], FORWARD),
    (jvp._key_gradients, [*[X] * 8, *[F] * 4, *[X] * 4, *NUMBERS], BACKWARD),
    (jvp._query_gradients, [*[X] * 8, *[F] * 4, *[X] * 2, *NUMBERS], BACKWARD),
    (step._advance, [F, X, F, "*i64", F, "i32", "i32", "i32"], dict(NOISY=True, CLIP=True, BLOCK=512)),
]  # fmt: skip
