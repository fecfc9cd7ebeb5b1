"""How group_norm_silu's tensors are cut: as tiles of channels by pixels, in either memory format."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlab.kernels.dispatch import triton

# Programs that keep a GPU busy, about one for each multiprocessor of an H100: with fewer, groups are split.
FILLED = 128
# What they are split into: in half precision some 2 MB on their way, an H100's bandwidth times its latency (by count, not measured).
PROGRAMS = 528


def channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    return x if channels_last(x) else x.contiguous()


def like(dy: Tensor, x: Tensor) -> Tensor:
    return dy.contiguous(memory_format=torch.channels_last) if channels_last(x) else dy.contiguous()


class Tiles:
    """How a tensor is cut: strides, tile sizes, and over how many programs the pixels of one channel are split."""

    def __init__(self, x: Tensor):
        self.batch, self.channels = x.shape[:2]
        self.pixels = x[0, 0].numel()
        last = channels_last(x)
        self.strides = (x.stride(0), 1, self.channels) if last else (x.stride(0), self.pixels, 1)
        self.block_c = min(64, triton.next_power_of_2(self.channels)) if last else 1
        self.block_p = min(triton.next_power_of_2(self.pixels), (2048 if last else 1024) // self.block_c)
        self.rows = self.batch * triton.cdiv(self.channels, self.block_c)
        wanted = max(1, PROGRAMS // self.rows)
        self.splits = min(wanted, triton.cdiv(self.pixels, self.block_p), 64)
        self.chunk = triton.cdiv(triton.cdiv(self.pixels, self.splits), self.block_p) * self.block_p
        self.splits = triton.cdiv(self.pixels, self.chunk)

    @property
    def sizes(self) -> tuple:
        return self.channels, self.pixels, *self.strides

    @property
    def blocks(self) -> dict:
        return dict(BLOCK_C=self.block_c, BLOCK_P=self.block_p)


def groups_at_once(x: Tensor, groups: int) -> int:
    """How many whole groups one program takes, so that the GPU is filled and memory is not read in crumbs; 0: split them."""
    each, last = x.shape[1] // groups, channels_last(x)
    fitting = [n for n in (16, 8, 4, 2, 1) if n <= groups and n * each <= 128 and (n == 1 or last)]
    for n in fitting:
        if len(x) * triton.cdiv(groups, n) >= FILLED and (not last or n * each * x.element_size() >= 32):
            return n
    return 1 if fitting and each * x[0, 0].numel() <= 8192 else 0  # so small that the number of launches counts


def whole_group_blocks(x: Tensor, groups: int, at_once: int) -> dict:
    """The fastest of a sweep in half precision on an H100, or nearly (benchmarks/blocks.py)."""
    block_c, last = triton.next_power_of_2(at_once * x.shape[1] // groups), channels_last(x)
    block_p = min(triton.next_power_of_2(x[0, 0].numel()), max(128, (8192 if last else 4096) // block_c))
    ahead = 3 if last and x.element_size() == 2 else 1  # float32 twice over does not fit every GPU's shared memory
    warps = min(16, max(1, block_c * block_p // 512))
    return dict(GROUPS=at_once, BLOCK_C=block_c, BLOCK_P=block_p, STAGES=ahead, num_warps=warps)
