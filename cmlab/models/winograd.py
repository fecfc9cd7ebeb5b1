"""3 x 3 convolutions with half the multiplications or fewer, for sampling on a CPU (Winograd 1980; Lavin & Gray 2016).

A tile of m x m results needs 9 m^2 products of pixel and weight; the minimal filtering algorithm F(m x m, 3 x 3) gets
them from (m + 2)^2: 2.25 times fewer for m = 2, 4 times fewer for m = 4. In Lavin & Gray's notation

    Y = A^T [(G g G^T) * (B^T d B)] A

with g the weights, d a tile of (m + 2)^2 pixels, * elementwise. The products of all tiles and channels are (m + 2)^2
matrix products; the transforms are a few additions per pixel, which torch.compile fuses into one pass each.

Where the picture was enlarged twofold just before (nearest neighbour), the two middle pixels of a tile of m = 2 are equal:
one of its differences is zero, and 3^2 products give the four results, a quarter. UP's matrices act on the picture before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmlab.models.unet import ResBlock, Upsample

UP = 1  # the kind of a convolution after enlarging: tiles of one pixel before, of 2 x 2 after

INPUT = {  # B^T
    UP: ((1, -1, 0), (0, 1, 0), (0, 1, -1)),
    2: ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    4: (
        (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
    ),
}  # fmt: skip
WEIGHT = {  # G
    UP: ((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
    ),
}  # fmt: skip
OUTPUT = {  # A^T
    UP: ((1, 1, 0), (0, 1, -1)),
    2: ((1, 1, 1, 0), (0, 1, -1, -1)),
    4: ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
}


def combine(matrix: tuple, parts: list[Tensor]) -> list[Tensor]:
    """matrix @ parts, tensors of one shape, without the products by 0 and 1: additions are most of what a transform costs."""
    rows = []
    for row in matrix:
        terms = [part if factor == 1 else factor * part for factor, part in zip(row, parts, strict=True) if factor]
        rows.append(sum(terms[1:], terms[0]))
    return rows


def both_ways(matrix: tuple, grid: list[list[Tensor]]) -> list[list[Tensor]]:
    """matrix @ grid @ matrix^T."""
    rows = [combine(matrix, row) for row in grid]
    columns = [combine(matrix, column) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


@torch.compile(dynamic=True)
def transform_input(x: Tensor, kind: int) -> Tensor:
    """B^T d B of every tile of x (B, H, W, C), padded: (products, tiles, C)."""
    size = len(INPUT[kind])
    height, width = x.shape[1] - size + kind, x.shape[2] - size + kind
    grid = [[x[:, i : i + height : kind, j : j + width : kind].float() for j in range(size)] for i in range(size)]
    tiles = [tile.to(x.dtype) for row in both_ways(INPUT[kind], grid) for tile in row]
    return torch.stack(tiles).flatten(1, 3)


@torch.compile(dynamic=True)
def transform_output(products: Tensor, bias: Tensor, kind: int, rows: int, columns: int) -> Tensor:
    """A^T products A + bias: (products, B * rows * columns tiles, C) -> (B, C, H, W)."""
    size = len(INPUT[kind])
    grid = [[products[i * size + j].float() for j in range(size)] for i in range(size)]
    y = torch.stack([torch.stack(row, 1) for row in both_ways(OUTPUT[kind], grid)], 1) + bias  # (tiles, m, m, C)
    y = y.to(products.dtype).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return y.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def transform_weight(weight: Tensor, kind: int) -> Tensor:
    """G g G^T of weight (out, in, 3, 3): (products, in, out), computed in float64."""
    g = torch.tensor(WEIGHT[kind], dtype=torch.float64, device=weight.device)
    return torch.einsum("ia,ocab,jb->ijco", g, weight.double(), g).flatten(0, 1).to(weight.dtype).contiguous()


class WinogradConv2d(nn.Module):
    """conv (3 x 3, stride 1, padding 1), with fewer multiplications: x (B, C, H, W) -> (B, C', H, W).

    kind 2 or 4 is m; UP promises that every 2 x 2 pixels of x are equal.
    """

    def __init__(self, conv: nn.Conv2d, kind: int):
        super().__init__()
        self.kind = kind
        self.register_buffer("weight", transform_weight(conv.weight.detach(), kind))
        self.register_buffer("bias", conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), of the weights' dtype -> (B, C', H, W), channels last."""
        height, width = x.shape[2:]
        if self.kind == UP:
            x = x[..., ::2, ::2]
        rows, columns = -(-x.shape[2] // self.kind), -(-x.shape[3] // self.kind)
        below, right = 1 + rows * self.kind - x.shape[2], 1 + columns * self.kind - x.shape[3]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, right, 1, below))
        with torch._dynamo.config.patch(recompile_limit=64):  # kinds x dtypes x memory layouts: more than the usual 8
            products = torch.bmm(transform_input(padded, self.kind), self.weight)
            return transform_output(products, self.bias, self.kind, rows, columns)[..., :height, :width]


FEW = 16  # channels for which the transforms cost more than they save: the images' own
LARGE = (
    400 * 768
)  # pairs of channels over which m = 4's weights, four times as many, cost more memory than their speed is worth


def winograd(net: nn.Module) -> nn.Module:
    """Makes every 3 x 3 convolution of net a WinogradConv2d, in place, and returns net: for sampling on a CPU.

    In float32 m is 4 (and 2 in the deepest layers, whose weights are most of the network), in half precision always 2:
    the numbers of m = 4 are too far apart for it. The results are the convolutions' up to rounding, the state dict is
    no longer the checkpoint's. The first call compiles the transforms, so a C++ compiler is needed.
    """
    enlarged = {id(layer.conv) for layer in net.modules() if isinstance(layer, Upsample)}
    for layer in net.modules():
        if isinstance(layer, ResBlock) and isinstance(layer.resample, nn.Upsample):
            enlarged.add(id(layer.in_layers[-1]))
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d) and _fits(layer):
                setattr(parent, name, WinogradConv2d(layer, UP if id(layer) in enlarged else _m(layer.weight)))
    return net


def _fits(conv: nn.Conv2d) -> bool:
    plain = conv.kernel_size == (3, 3) and conv.stride == conv.padding == conv.dilation == (1, 1) and conv.groups == 1
    return plain and conv.bias is not None and min(conv.in_channels, conv.out_channels) > FEW


def _m(weight: Tensor) -> int:
    return 4 if weight.dtype == torch.float32 and weight[:, :, 0, 0].numel() <= LARGE else 2
