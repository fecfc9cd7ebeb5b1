"""group_norm_silu: SiLU((1 + scale) GroupNorm(x) + shift) in one go, forward and backward, for the U-Net.

With x of n elements, s bytes each, eager PyTorch reads and writes whole tensors for the norm (2 reads, 1 write: statistics, then the
result), for the scale and the shift (2 reads, 2 writes) and for SiLU (1 read, 1 write): 9 n s bytes. What has to move is 2 n s: one read,
one write. The kernels come to

    forward, some whole groups a program     2 n s    (and n s from a cache, if the groups being worked on fit there; else 3 n s)
    forward, a group split among programs    3 n s    (statistics, then the result: few large images)
    backward                                 5 n s    (x and dy twice, dx once)

and about 10 (forward) and 20 (backward) operations an element: some two operations a byte in half precision, where an H100, without
its matrix units, balances at about 20. Memory alone sets the time.

Every sum over pixels is kept by channel, so that one pair of numbers a channel serves the norm and the gradients of weight, bias,
scale and shift alike. Both memory formats are the same code: a tile of channels by pixels, with the strides given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cmlab.checks import same_shape, whole
from cmlab.kernels.dispatch import enabled, forward_mode, jit, launching, tl, triton
from cmlab.kernels.tiles import Tiles, dense, groups_at_once, like, whole_group_blocks


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """SiLU((1 + scale) GroupNorm(x) + shift): x (B, C, …), weight and bias (C,), scale and shift (B, C) or both None -> like x.

    GroupNorm: Wu & He (2018), eq. 1; with scale and shift, the adaptive one of Dhariwal & Nichol (2021), sec. 3. Statistics are
    float32 whatever the precision of x. Raises ValueError for shapes that do not fit.
    """
    check(x, weight, bias, groups, scale, shift)
    given = [t for t in (x, weight, bias, scale, shift) if t is not None]
    if x.numel() and not forward_mode() and enabled(*given):
        return torch.ops.cmlab.group_norm_silu(x, weight, bias, scale, shift, groups, eps)[0]
    return reference(x, weight, bias, groups, eps, scale, shift)


def reference(x, weight, bias, groups=32, eps=1e-5, scale=None, shift=None) -> Tensor:
    """The same in PyTorch's own operations."""
    h = torch.group_norm(x, groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + _beside(scale, x)) + _beside(shift, x)
    return F.silu(h)


def check(x, weight, bias, groups, scale, shift) -> None:
    if x.ndim < 2 or x.shape[1] % whole("groups", groups):
        raise ValueError(f"groups must divide the channels of x (B, C, …), got {groups} and shape {tuple(x.shape)}")
    same_shape("weight", weight, (x.shape[1],))
    same_shape("bias", bias, (x.shape[1],))
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together, got only one of them")
    if scale is not None:
        same_shape("scale", scale, x.shape[:2])
        same_shape("shift", shift, x.shape[:2])


def _beside(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(*v.shape, *[1] * (x.ndim - 2))


# --- the operations, as torch sees them: CPU, CUDA, shapes alone, gradient --------------------------------------------


@torch.library.custom_op("cmlab::group_norm_silu", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """y, and (4, B, C) for the backward pass: mean, 1 / deviation, and slope and offset of h = slope (x - mean) + offset, y = silu(h)."""
    if launching(x):
        with torch.cuda.device_of(x):
            return _launch_forward(dense(x), weight, bias, scale, shift, groups, eps)
    coefficients = _coefficients(x, weight, bias, scale, shift, groups, eps)
    mean, _, slope, offset = (_beside(v, x) for v in coefficients)
    return F.silu(slope * (x.float() - mean) + offset).to(x.dtype), coefficients


@_forward.register_fake
def _(x, weight, bias, scale, shift, groups, eps):
    return torch.empty_like(dense(x)), x.new_empty((4, *x.shape[:2]), dtype=torch.float32)


@torch.library.custom_op("cmlab::group_norm_silu_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, coefficients: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """dx, and of each channel the sums over pixels of dh and of dh times the normalised x, h being SiLU's argument: (2, B, C)."""
    if launching(x):
        with torch.cuda.device_of(x):
            return _launch_backward(like(dy, x), dense(x), coefficients, groups)
    mean, rstd, slope, offset = (_beside(v, x) for v in coefficients)
    normal = (x.float() - mean) * rstd
    dh = dy.float() * _silu_slope(slope * (x.float() - mean) + offset)
    sums = torch.stack([dh.flatten(2).sum(2), (dh * normal).flatten(2).sum(2)])
    one, two = (_beside(v, x) for v in _group_means(sums, coefficients, x, groups))
    return (rstd * (dh * slope / rstd - one - normal * two)).to(x.dtype), sums


@_backward.register_fake
def _(dy, x, coefficients, groups):
    return torch.empty_like(dense(x)), torch.empty_like(coefficients[:2])


def _keep(ctx, inputs, output) -> None:
    x, weight, bias, scale, _, ctx.groups, _ = inputs
    ctx.save_for_backward(x, weight, bias, scale, output[1])


def _gradients(ctx, dy: Tensor, _):
    """From the two sums of each channel: all small tensors (B, C) but dx."""
    x, weight, bias, scale, coefficients = ctx.saved_tensors
    dx, (one, two) = torch.ops.cmlab.group_norm_silu_backward(dy, x, coefficients, ctx.groups)
    grown = 1.0 if scale is None else 1 + scale.float()
    d_weight, d_bias = (grown * two).sum(0).to(weight.dtype), (grown * one).sum(0).to(bias.dtype)
    if scale is None:
        return dx, d_weight, d_bias, None, None, None, None
    return dx, d_weight, d_bias, (weight * two + bias * one).to(scale.dtype), one.to(scale.dtype), None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _coefficients(x, weight, bias, scale, shift, groups, eps) -> Tensor:
    grouped = x.float().reshape(len(x), groups, -1)
    var, mean = torch.var_mean(grouped, dim=2, correction=0)
    mean, rstd = (v.repeat_interleave(x.shape[1] // groups, dim=1) for v in (mean, (var + eps).rsqrt()))
    grown, moved = (1.0, 0.0) if scale is None else (1 + scale.float(), shift.float())
    return torch.stack(
        [mean, rstd, rstd * weight.float() * grown, bias.float() * grown + moved + torch.zeros_like(mean)]
    )


def _silu_slope(h: Tensor) -> Tensor:
    s = h.sigmoid()
    return s * (1 + h * (1 - s))


def _group_means(sums: Tensor, coefficients: Tensor, x: Tensor, groups: int) -> Tensor:
    """The means over a group of w dh and of w dh times the normalised x, w = slope x deviation: (2, B, C), equal within a group."""
    weighed = (sums * coefficients[2] / coefficients[1]).reshape(2, len(x), groups, -1)
    means = weighed.sum(3) / (x[0].numel() // groups)
    return means.repeat_interleave(x.shape[1] // groups, dim=2)


# --- how the kernels are launched --------------------------------------------------------------------------------------


def _launch_forward(x, weight, bias, scale, shift, groups, eps) -> tuple[Tensor, Tensor]:
    y, coefficients = torch.empty_like(x), x.new_empty((4, *x.shape[:2]), dtype=torch.float32)
    adaptive, flags = (scale, shift) if scale is not None else (weight, bias), dict(ADAPTIVE=scale is not None)
    given = [coefficients, *(t.contiguous() for t in (weight, bias, *adaptive))]
    at_once = groups_at_once(x, groups)
    if at_once:
        _launch_whole(x, y, given, groups, eps, flags | whole_group_blocks(x, groups, at_once))
    else:
        _launch_split(x, y, given, groups, eps, flags)
    return y, coefficients


def _launch_whole(x, y, given, groups, eps, constants) -> None:
    tiles = Tiles(x)
    grid = (tiles.batch * triton.cdiv(groups, constants["GROUPS"]),)
    numbers = tiles.batch, groups, tiles.channels // groups, tiles.pixels, *tiles.strides
    _by_groups[grid](x, y, *given, *numbers, eps, **constants)


def _launch_split(x, y, given, groups, eps, flags) -> None:
    """Moments of channels and chunks of pixels, joined, applied."""
    tiles, each, coefficients = Tiles(x), x.shape[1] // groups, given[0]
    parts = x.new_empty((2, tiles.splits, *x.shape[:2]), dtype=torch.float32)
    _moments[(tiles.rows, tiles.splits)](x, parts, tiles.batch, *tiles.sizes, tiles.chunk, **tiles.blocks)
    _fold_moments[(tiles.batch * groups,)](
        parts, *given, groups, each, tiles.pixels, tiles.splits, tiles.chunk, eps,
        **flags, BLOCK_S=triton.next_power_of_2(tiles.splits), BLOCK_C=triton.next_power_of_2(each),
    )  # fmt: skip
    grid = (triton.cdiv(tiles.pixels, tiles.block_p) * tiles.rows,)
    _apply[grid](x, y, coefficients, tiles.batch, *tiles.sizes, **tiles.blocks)


def _launch_backward(dy, x, coefficients, groups) -> tuple[Tensor, Tensor]:
    tiles, dx = Tiles(x), torch.empty_like(x)
    parts = x.new_empty((2, tiles.splits, *x.shape[:2]), dtype=torch.float32)
    _sums[(tiles.rows, tiles.splits)](
        x, dy, coefficients, parts, tiles.batch, *tiles.sizes, tiles.chunk, **tiles.blocks
    )
    sums = parts.sum(1)
    means = _group_means(sums, coefficients, x, groups)
    grid = (triton.cdiv(tiles.pixels, tiles.block_p) * tiles.rows,)
    _input_gradient[grid](x, dy, dx, coefficients, means, tiles.batch, *tiles.sizes, **tiles.blocks)
    return dx, sums


# --- the kernels ------------------------------------------------------------------------------------------------------


@jit
def _tile(row, C, BLOCK_C: tl.constexpr):
    """Image and channels of a row of tiles."""
    across = tl.cdiv(C, BLOCK_C)
    return row // across, (row % across) * BLOCK_C + tl.arange(0, BLOCK_C)


@jit
def _line(weight, bias, scale, shift, first, channel, known, ADAPTIVE: tl.constexpr):
    """What a channel's normalised numbers are multiplied by, and what is added. first: where the image begins in scale and shift."""
    slope = tl.load(weight + channel, mask=known, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0).to(tl.float32)
    if ADAPTIVE:
        grown = 1 + tl.load(scale + first + channel, mask=known, other=0).to(tl.float32)
        slope *= grown
        offset = offset * grown + tl.load(shift + first + channel, mask=known, other=0).to(tl.float32)
    return slope, offset


@jit
def _coefficient(coefficients, number: tl.constexpr, B, C, at, known):
    """One of the four numbers of each channel, beside its pixels: (BLOCK_C, 1)."""
    return tl.load(coefficients + number * B * C + at, mask=known, other=0)[:, None]


@jit
def _slope_of_silu(h):
    s = tl.sigmoid(h)
    return s * (1 + h * (1 - s))


@jit
def _store_coefficients(
    coefficients, weight, bias, scale, shift, mean, rstd, image, channel, known, B, C, ADAPTIVE: tl.constexpr
):
    at = image * C + channel
    slope, offset = _line(weight, bias, scale, shift, image * C, channel, known, ADAPTIVE)
    nothing = tl.zeros_like(slope)
    tl.store(coefficients + at, mean + nothing, mask=known)
    tl.store(coefficients + B * C + at, rstd + nothing, mask=known)
    tl.store(coefficients + 2 * B * C + at, rstd * slope, mask=known)
    tl.store(coefficients + 3 * B * C + at, offset, mask=known)


@jit
def _by_groups(
    x, y, coefficients, weight, bias, scale, shift, B, G, each, P, stride_b, stride_c, stride_p, eps,
    ADAPTIVE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program takes GROUPS groups of an image, and reads them twice: the first time it asks the cache to keep them (evict_last)."""
    across, own = tl.cdiv(G, GROUPS), tl.arange(0, BLOCK_C)
    image, C = tl.program_id(0) // across, G * each
    channel = tl.program_id(0) % across * GROUPS * each + own
    real = (own < GROUPS * each) & (channel < C)
    rows = x + image.to(tl.int64) * stride_b + channel * stride_c
    centre = tl.load(rows, mask=real, other=0).to(tl.float32)  # near the mean: squares stay small
    one, two = tl.zeros((BLOCK_C, BLOCK_P), tl.float32), tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for at in tl.range(0, P, BLOCK_P, num_stages=STAGES):
        pixel = at + tl.arange(0, BLOCK_P)
        known = real[:, None] & (pixel < P)[None, :]
        v = tl.load(rows[:, None] + (pixel * stride_p)[None, :], mask=known, other=0, eviction_policy="evict_last")
        v = tl.where(known, v.to(tl.float32) - centre[:, None], 0)
        one += v
        two += v * v
    one = tl.sum(one, 1) / P
    squares, means = tl.sum(two, 1) - P * one * one, centre + one
    same = (own[:, None] // each == own[None, :] // each) & real[None, :]  # channels of one group
    mean = tl.sum(tl.where(same, means[None, :], 0), 1) / each
    squares += P * (means - mean) * (means - mean)
    rstd = 1 / tl.sqrt(tl.sum(tl.where(same, squares[None, :], 0), 1) / (each * P) + eps)
    _store_coefficients(coefficients, weight, bias, scale, shift, mean, rstd, image, channel, real, B, C, ADAPTIVE)
    slope, offset = _line(weight, bias, scale, shift, image * C, channel, real, ADAPTIVE)
    for at in tl.range(0, P, BLOCK_P, num_stages=STAGES):
        pixel = at + tl.arange(0, BLOCK_P)
        known = real[:, None] & (pixel < P)[None, :]
        spot = image.to(tl.int64) * stride_b + (channel * stride_c)[:, None] + (pixel * stride_p)[None, :]
        v = tl.load(x + spot, mask=known, other=0, eviction_policy="evict_first").to(tl.float32)
        h = (slope * rstd)[:, None] * (v - mean[:, None]) + offset[:, None]
        tl.store(y + spot, h * tl.sigmoid(h), mask=known, eviction_policy="evict_first")


@jit
def _moments(x, parts, B, C, P, stride_b, stride_c, stride_p, chunk, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Mean, and sum of squared deviations from it, of each channel over one chunk of pixels. parts (2, splits, B, C)."""
    image, channel = _tile(tl.program_id(0), C, BLOCK_C)
    split, real = tl.program_id(1), channel < C
    begin = split * chunk
    end = tl.minimum(begin + chunk, P)
    rows = x + image.to(tl.int64) * stride_b + channel * stride_c
    centre = tl.load(rows + begin * stride_p, mask=real, other=0).to(tl.float32)  # near the mean: squares stay small
    one, two = tl.zeros((BLOCK_C, BLOCK_P), tl.float32), tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for at in range(begin, end, BLOCK_P):
        pixel = at + tl.arange(0, BLOCK_P)
        known = real[:, None] & (pixel < end)[None, :]
        v = tl.load(rows[:, None] + (pixel * stride_p)[None, :], mask=known, other=0).to(tl.float32)
        v = tl.where(known, v - centre[:, None], 0)
        one += v
        two += v * v
    one, two = tl.sum(one, 1) / (end - begin), tl.sum(two, 1)
    at = (split * B + image) * C + channel
    tl.store(parts + at, centre + one, mask=real)
    tl.store(parts + tl.num_programs(1) * B * C + at, two - one * one * (end - begin), mask=real)


@jit
def _fold_moments(
    parts, coefficients, weight, bias, scale, shift, G, each, P, splits, chunk, eps,
    ADAPTIVE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Joins the moments of a group's channels and chunks: Chan et al. (1979), eq. 2.1."""
    group, batch = tl.program_id(0), tl.num_programs(0) // G
    image, C = group // G, G * each
    split, own = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    channel = (group % G) * each + own
    known = (split < splits)[:, None] & (own < each)[None, :]
    at = (split[:, None] * batch + image) * C + channel[None, :]
    means = tl.load(parts + at, mask=known, other=0)
    squares = tl.load(parts + splits * batch * C + at, mask=known, other=0)
    pixels = tl.where(known, tl.minimum(chunk, P - split * chunk)[:, None], 0).to(tl.float32)
    mean = tl.sum(pixels * means) / (each * P)
    apart = tl.where(known, means - mean, 0)
    rstd = 1 / tl.sqrt(tl.sum(squares + pixels * apart * apart) / (each * P) + eps)
    _store_coefficients(
        coefficients, weight, bias, scale, shift, mean, rstd, image, channel, own < each, batch, C, ADAPTIVE
    )


@jit
def _apply(x, y, coefficients, B, C, P, stride_b, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """y = silu(slope (x - mean) + offset)."""
    across = tl.cdiv(P, BLOCK_P)  # tiles of pixels in a row; one axis of programs, the one without a limit
    image, channel = _tile(tl.program_id(0) // across, C, BLOCK_C)
    pixel = tl.program_id(0) % across * BLOCK_P + tl.arange(0, BLOCK_P)
    real, of = channel < C, image * C + channel
    mean, slope = _coefficient(coefficients, 0, B, C, of, real), _coefficient(coefficients, 2, B, C, of, real)
    offset = _coefficient(coefficients, 3, B, C, of, real)
    at = image.to(tl.int64) * stride_b + (channel * stride_c)[:, None] + (pixel * stride_p)[None, :]
    known = real[:, None] & (pixel < P)[None, :]
    h = slope * (tl.load(x + at, mask=known, other=0).to(tl.float32) - mean) + offset
    tl.store(y + at, h * tl.sigmoid(h), mask=known)


@jit
def _sums(
    x,
    dy,
    coefficients,
    parts,
    B,
    C,
    P,
    stride_b,
    stride_c,
    stride_p,
    chunk,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of each channel over one chunk of pixels: the sums of dh and of dh times the normalised x. parts (2, splits, B, C)."""
    image, channel = _tile(tl.program_id(0), C, BLOCK_C)
    split, real = tl.program_id(1), channel < C
    begin = split * chunk
    end = tl.minimum(begin + chunk, P)
    of = image * C + channel
    mean, rstd = _coefficient(coefficients, 0, B, C, of, real), _coefficient(coefficients, 1, B, C, of, real)
    slope, offset = _coefficient(coefficients, 2, B, C, of, real), _coefficient(coefficients, 3, B, C, of, real)
    rows = image.to(tl.int64) * stride_b + channel * stride_c
    one, two = tl.zeros((BLOCK_C, BLOCK_P), tl.float32), tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for first in range(begin, end, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        known = real[:, None] & (pixel < end)[None, :]
        at = rows[:, None] + (pixel * stride_p)[None, :]
        centred = tl.load(x + at, mask=known, other=0).to(tl.float32) - mean
        dh = tl.load(dy + at, mask=known, other=0).to(tl.float32) * _slope_of_silu(slope * centred + offset)
        one += dh
        two += dh * centred * rstd
    at = (split * B + image) * C + channel
    tl.store(parts + at, tl.sum(one, 1), mask=real)
    tl.store(parts + tl.num_programs(1) * B * C + at, tl.sum(two, 1), mask=real)


@jit
def _input_gradient(
    x, dy, dx, coefficients, means, B, C, P, stride_b, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """dx = slope dh - (mean of w dh + normalised x times mean of w dh normalised x) / deviation."""
    across = tl.cdiv(P, BLOCK_P)  # tiles of pixels in a row; one axis of programs, the one without a limit
    image, channel = _tile(tl.program_id(0) // across, C, BLOCK_C)
    pixel = tl.program_id(0) % across * BLOCK_P + tl.arange(0, BLOCK_P)
    real, of = channel < C, image * C + channel
    mean, rstd = _coefficient(coefficients, 0, B, C, of, real), _coefficient(coefficients, 1, B, C, of, real)
    slope, offset = _coefficient(coefficients, 2, B, C, of, real), _coefficient(coefficients, 3, B, C, of, real)
    one, two = _coefficient(means, 0, B, C, of, real), _coefficient(means, 1, B, C, of, real)
    at = image.to(tl.int64) * stride_b + (channel * stride_c)[:, None] + (pixel * stride_p)[None, :]
    known = real[:, None] & (pixel < P)[None, :]
    centred = tl.load(x + at, mask=known, other=0).to(tl.float32) - mean
    dh = tl.load(dy + at, mask=known, other=0).to(tl.float32) * _slope_of_silu(slope * centred + offset)
    tl.store(dx + at, slope * dh - rstd * (one + centred * rstd * two), mask=known)
