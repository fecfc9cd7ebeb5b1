"""group_norm_silu once more, in CUDA C++ (norm.cu): compiled by nvcc when it is first called, to be compared with Triton's in lesson 08."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cmlab.kernels.norm import check

SOURCE = Path(__file__).with_name("norm.cu")
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HELD = 56_000  # floats of a group in an H100's shared memory (227 KiB), beside those of the threads


def group_norm_silu(x, weight, bias, groups=32, eps=1e-5, scale=None, shift=None) -> Tensor:
    """As kernels.group_norm_silu, on CUDA tensors of one precision, without gradients. x is read as contiguous.

    Raises ValueError for what does not fit, RuntimeError without nvcc or where the GPU refuses the launch.
    """
    check(x, weight, bias, groups, scale, shift)
    given = [None if t is None else t.detach().contiguous() for t in (x, weight, bias, scale, shift)]
    if any(t is not None and not t.is_cuda for t in given):
        raise ValueError(f"x and all beside it must be on a GPU, got x on {x.device}")
    if any(t is not None and t.dtype != x.dtype for t in given) or x.dtype not in KINDS:
        raise ValueError(f"x and all beside it must be of one dtype of {list(KINDS)}, got x in {x.dtype}")
    batch, channels = x.shape[:2]
    each, pixels = channels // groups, x[0, 0].numel()
    if each * pixels > HELD:
        raise ValueError(f"a group must have at most {HELD} elements, got {each * pixels}")
    y = torch.empty_like(given[0])
    pointers = [None if t is None else t.data_ptr() for t in (given[0], y, *given[1:])]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = library(torch.cuda.get_device_capability()).group_norm_silu_launch(
            KINDS[x.dtype], *pointers, batch, groups, each, pixels, ctypes.c_float(eps), ctypes.c_void_p(stream)
        )
    if error:
        raise RuntimeError(f"the GPU refused group_norm_silu: CUDA error {error}")
    return y


@cache
def library(capability: tuple[int, int]) -> ctypes.CDLL:
    """The compiled norm.cu, loaded."""
    loaded = ctypes.CDLL(str(compiled(capability)))
    pointers, numbers = [ctypes.c_void_p] * 6, [ctypes.c_int] * 4
    loaded.group_norm_silu_launch.argtypes = [ctypes.c_int, *pointers, *numbers, ctypes.c_float, ctypes.c_void_p]
    return loaded


def compiled(capability: tuple[int, int], folder: Path | None = None) -> Path:
    """norm.cu as a shared library for GPUs of this compute capability; made once, kept in ~/.cache/cmlab (or folder).

    Raises RuntimeError if there is no nvcc, or with what it says.
    """
    nvcc = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )
    if nvcc is None:
        raise RuntimeError("nvcc is missing: install NVIDIA's CUDA toolkit, or set CUDA_HOME to where it is")
    architecture = f"sm_{capability[0]}{capability[1]}"
    folder = folder or Path.home() / ".cache" / "cmlab"
    path = folder / f"norm-{architecture}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        command = [nvcc, "-O3", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC", "-o", partial, SOURCE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc cannot compile {SOURCE.name}:\n{done.stderr or done.stdout}")
        partial.rename(path)
    return path
