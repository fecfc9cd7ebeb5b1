"""fused_step: all of a sampler's step that is not the network, in one pass: preconditioning, solver step or fresh noise.

For samplers of your own on a GPU (lesson 08 writes one); cmlab.sampling keeps to PyTorch, and to the released code's random numbers.

    denoised = c_skip x + c_out output                        (clamped to [-1, 1] if asked for)
    next     = keep x + (1 - keep) denoised + add z           z ~ N(0, 1)

keep = next_sigma / sigma, add = 0 is an Euler step of the probability-flow ODE; keep = 0, add = sqrt(sigma^2 - sigma_min^2) the
re-noising of multistep consistency sampling; keep = sigma_down / sigma, add = sigma_up an ancestral step; 0 and 0 the last step.

z comes from a counter (Philox4x32-10: Salmon et al. 2011), keyed by the sample's own seed: element e of draw k of a sample is a function
of (seed, k, e) and of nothing else, so that a picture does not depend on the batch, on the number of devices or on what was drawn before.

Bytes: x float32, output in half precision, next float32: 10 an element, where eager takes 10 passes, some 40. Operations: about 60 an
element, mostly integer ones of the ten rounds: 6 a byte, well below the 20 or so that an H100 balances.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmlab.checks import floating, same_shape, whole
from cmlab.kernels.dispatch import enabled, jit, launching, tl, triton

ROUND_A, ROUND_B, KEY_A, KEY_B = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85  # Salmon et al. (2011), sec. 3.3
WORD = 0xFFFFFFFF
NAMES = ("c_skip", "c_out", "keep", "add")
BLOCK = 512  # counters a program: four elements each


def fused_step(
    x: Tensor,
    output: Tensor,
    scalings: tuple,
    keep=0.0,
    add=0.0,
    seeds: Tensor | None = None,
    draw: int = 0,
    clip_denoised: bool = False,
) -> Tensor:
    """The next state of a sampler: x (B, …) float32, output (B, …) what the network made of c_in x -> (B, …) float32.

    scalings is (c_skip, c_out); they, keep and add are numbers or tensors of B elements. seeds (B,) int64, one for each sample, and
    draw, the number of the noise among the sample's, are needed where noise is added. Gradients flow into x and output.
    Raises ValueError for shapes that do not fit and for noise without seeds.
    """
    floating("x", x)
    same_shape("output", output, x.shape)
    if seeds is not None:
        same_shape("seeds", seeds, x.shape[:1])
        if seeds.dtype != torch.int64 or seeds.device != x.device:
            raise ValueError(f"seeds must be int64 on {x.device}, got {seeds.dtype} on {seeds.device}")
    elif isinstance(add, Tensor) or add != 0:
        raise ValueError(f"seeds are needed to add noise, got seeds=None and add={add}")
    coefficients = torch.stack([_of_each(*pair, x) for pair in zip(NAMES, (*scalings, keep, add), strict=True)])
    whole("draw", draw, 0)
    if x.numel() and x.dtype == torch.float32 and enabled(x, output):
        return torch.ops.cmlab.fused_step(x, output, coefficients, seeds, draw, clip_denoised)
    return reference(x, output, coefficients, seeds, draw, clip_denoised)


def normal(shape: tuple[int, ...], seeds: Tensor, draw: int = 0) -> Tensor:
    """N(0, 1) of shape (B, …), float32, on the device of seeds (B,) int64: what fused_step adds as the draw of that number."""
    nothing = torch.zeros(shape, device=seeds.device)
    return fused_step(nothing, nothing, (0.0, 0.0), add=1.0, seeds=seeds, draw=draw)


def _of_each(name: str, value, x: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float32, device=x.device).flatten()
    if len(value) not in (1, len(x)):
        raise ValueError(f"{name} must be a number or have {len(x)} elements, got {len(value)}")
    return value.expand(len(x))


def reference(x, output, coefficients, seeds, draw, clip_denoised) -> Tensor:
    """The same in PyTorch's own operations."""
    c_skip, c_out, keep, add = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in coefficients)
    denoised = c_skip * x + c_out * output.float()
    if clip_denoised:
        denoised = denoised.clamp(-1, 1)
    stepped = keep * x + (1 - keep) * denoised
    return stepped if seeds is None else stepped + add * _counted(x, seeds, draw)


def _counted(x: Tensor, seeds: Tensor, draw: int) -> Tensor:
    size = x[0].numel()
    quarter = -(-size // 4)
    words = philox(seeds[:, None], torch.arange(quarter, device=x.device)[None], draw)
    return torch.cat(box_muller(*words), dim=1)[:, :size].reshape(x.shape)


def philox(seed: Tensor, counter: Tensor, draw: int) -> tuple[Tensor, ...]:
    """Four random words below 2^32 of a 64-bit key and the 128-bit counter (counter, draw, 0, 0): int64, broadcast."""
    key, other = seed & WORD, (seed >> 32) & WORD
    zero = torch.zeros_like(counter + seed)
    a, b, c, d = zero + counter, zero + draw, zero, zero
    for _ in range(10):
        high_a, low_a = _product(a, ROUND_A)
        high_c, low_c = _product(c, ROUND_B)
        a, b, c, d = high_c ^ b ^ key, low_c, high_a ^ d ^ other, low_a
        key, other = (key + KEY_A) & WORD, (other + KEY_B) & WORD
    return a, b, c, d


def _product(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, through 16-bit halves: int64 would overflow."""
    low, high = (a & 0xFFFF) * factor, (a >> 16) * factor  # below 2^48
    total = (low >> 16) + high
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def box_muller(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Four standard normal numbers of four words: Box & Muller (1958). float32; the largest is 6.7."""
    first, third = (_radius(w) for w in (a, c))
    second, fourth = (w.float() * (2 * math.pi / 2**32) for w in (b, d))
    return first * second.cos(), first * second.sin(), third * fourth.cos(), third * fourth.sin()


def _radius(word: Tensor) -> Tensor:
    return (-2 * ((word.float() + 1) / 2**32).log()).clamp(min=0).sqrt()


@torch.library.custom_op("cmlab::fused_step", mutates_args=())
def _step(
    x: Tensor, output: Tensor, coefficients: Tensor, seeds: Tensor | None, draw: int, clip_denoised: bool
) -> Tensor:
    """As fused_step, with c_skip, c_out, keep and add (4, B)."""
    if not launching(x):
        return reference(x, output, coefficients, seeds, draw, clip_denoised).contiguous()
    x, output, result = x.contiguous(), output.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    size = x[0].numel()
    quarter = -(-size // 4)
    grid = (len(x), triton.cdiv(quarter, BLOCK))
    noisy = seeds is not None
    given = x, output, coefficients.contiguous(), seeds.contiguous() if noisy else coefficients
    with torch.cuda.device_of(x):
        _advance[grid](*given, result, size, quarter, draw, NOISY=noisy, CLIP=clip_denoised, BLOCK=BLOCK)
    return result


@_step.register_fake
def _(x, output, coefficients, seeds, draw, clip_denoised):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.clipped = inputs[5]


def _gradients(ctx, d_next: Tensor):
    x, output, coefficients = ctx.saved_tensors
    c_skip, c_out, keep, _ = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in coefficients)
    through = (1 - keep) * d_next
    if ctx.clipped:
        through = through * ((c_skip * x + c_out * output.float()).abs() <= 1)
    return keep * d_next + c_skip * through, (c_out * through).to(output.dtype), None, None, None, None


_step.register_autograd(_gradients, setup_context=_keep)


@jit
def _advance(
    x, output, coefficients, seeds, result, size, quarter, draw, NOISY: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program a sample and block of counters. The four numbers of a counter go to the four quarters of the sample."""
    image, batch = tl.program_id(0), tl.num_programs(0)
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c_skip, c_out = tl.load(coefficients + image), tl.load(coefficients + batch + image)
    keep, add = tl.load(coefficients + 2 * batch + image), tl.load(coefficients + 3 * batch + image)
    start = image.to(tl.int64) * size
    if NOISY:
        nothing = tl.zeros((BLOCK,), tl.uint32)
        a, b, c, d = tl.philox(
            tl.load(seeds + image).to(tl.uint64), counter.to(tl.uint32), nothing + draw, nothing, nothing
        )
    for part in tl.static_range(4):
        at = part * quarter + counter
        known = (counter < quarter) & (at < size)
        v = tl.load(x + start + at, mask=known, other=0)
        denoised = c_skip * v + c_out * tl.load(output + start + at, mask=known, other=0).to(tl.float32)
        if CLIP:
            denoised = tl.minimum(tl.maximum(denoised, -1.0), 1.0)
        v = keep * v + (1 - keep) * denoised
        if NOISY:
            radius, angle = _polar(a, b) if part < 2 else _polar(c, d)
            v += add * radius * (tl.cos(angle) if part % 2 == 0 else tl.sin(angle))
        tl.store(result + start + at, v, mask=known)


@jit
def _polar(one, two):
    radius = tl.sqrt(tl.maximum(-2 * tl.log((one.to(tl.float32) + 1) * 2.3283064365386963e-10), 0.0))
    return radius, two.to(tl.float32) * 1.4629180792671596e-09  # 2^-32 and 2 pi 2^-32
