"""Which implementation runs: the Triton kernel for CUDA tensors, plain PyTorch for the rest.

CMLAB_KERNELS=0 switches the kernels off; CMLAB_KERNELS=interpret sends CPU tensors through Triton's interpreter as well, slowly,
to be looked at and tested (it wants TRITON_INTERPRET=1 before this package is imported; if nothing is set, importing sets it).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cmlab.checks import known

if os.environ.get("CMLAB_KERNELS") == "interpret":
    os.environ.setdefault("TRITON_INTERPRET", "1")
try:
    import triton
    import triton.language as tl
except ImportError:  # torch builds for the CPU alone come without
    triton = tl = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = ("0", "1", "interpret")


def jit(function):
    """triton.jit where there is a Triton; else the function as it is, never to be called."""
    return function if triton is None else triton.jit(function)


def mode() -> str:
    """The value of CMLAB_KERNELS: "0", "1" (the default) or "interpret". Raises ValueError for another."""
    return known("CMLAB_KERNELS", os.environ.get("CMLAB_KERNELS", "1"), MODES)


def enabled(*tensors: Tensor) -> bool:
    """Whether a kernel takes these tensors: all of one device that it runs on, in a precision that it knows."""
    first = tensors[0]
    if mode() == "0" or triton is None or any(t.device != first.device or t.dtype not in DTYPES for t in tensors):
        return False
    return launching(first)


def forward_mode() -> bool:
    """Whether derivatives are being carried along (torch.func.jvp, forward_ad): PyTorch's own operations know how, a kernel does not."""
    return forward_ad._current_level >= 0


def launching(x: Tensor) -> bool:
    """Whether a Triton kernel is what runs for a tensor: on a GPU, or interpreted on a CPU if that is asked for.

    Where Triton interprets, it does so for a GPU's tensors too, thousands of times slower: they keep to PyTorch's operations.
    """
    return interpreting(x) or (x.is_cuda and not INTERPRETED)


def interpreting(x: Tensor) -> bool:
    """Whether CPU tensors go through Triton's interpreter."""
    return x.device.type == "cpu" and mode() == "interpret" and INTERPRETED
