"""The probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma: its velocity, solver steps and whole trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cmlab.checks import known
from cmlab.scaling import level_dtype, per_image


def velocity(denoiser, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
    """dx/dsigma at (x, sigma). Karras et al. (2022), alg. 1, line 4. x (B, …); sigma above 0, a number or (B,)."""
    return (x - denoiser(x, sigma, labels)) / per_image(sigma, x)


def _level(sigma: Tensor | float, x: Tensor) -> Tensor:
    """sigma as (B, 1, …) or (1, 1, …) beside x; it may be 0."""
    return torch.as_tensor(sigma, dtype=level_dtype(x), device=x.device).reshape(-1, *[1] * (x.ndim - 1))


def _gap(sigma: Tensor | float, next_sigma: Tensor | float, x: Tensor) -> Tensor:
    return (_level(next_sigma, x) - _level(sigma, x)).to(x.dtype)


def _slope(denoiser, x: Tensor, sigma, labels: Tensor | None, denoised: Tensor | None) -> Tensor:
    return velocity(denoiser if denoised is None else lambda *_: denoised, x, sigma, labels)


def euler_step(denoiser, x: Tensor, sigma, next_sigma, labels: Tensor | None = None, denoised=None) -> Tensor:
    """First order: one network call. sigma > next_sigma >= 0, numbers or (B,).

    denoised (B, …): the denoiser's output at (x, sigma), where it is known already; saves the call.
    """
    return x + _gap(sigma, next_sigma, x) * _slope(denoiser, x, sigma, labels, denoised)


def heun_step(denoiser, x: Tensor, sigma, next_sigma, labels: Tensor | None = None, denoised=None) -> Tensor:
    """Second order, two network calls: Karras et al. (2022), algorithm 1. denoised as in euler_step.

    To the number 0 it is an Euler step (the slope there would divide by it), as in the algorithm; levels (B,) stay above 0.
    """
    gap, d = _gap(sigma, next_sigma, x), _slope(denoiser, x, sigma, labels, denoised)
    if isinstance(next_sigma, (int, float)) and next_sigma == 0:
        return x + gap * d
    d_next = velocity(denoiser, x + gap * d, next_sigma, labels)
    return x + gap * (d + d_next) / 2


def dpm2_step(denoiser, x: Tensor, sigma, next_sigma, labels: Tensor | None = None, denoised=None) -> Tensor:
    """Second order, two network calls, the second at a midpoint: DPM-Solver-2 with the rho = 3 midpoint of the released code.

    sigma > next_sigma >= 0, numbers or (B,). denoised as in euler_step.
    """
    low, high = (torch.as_tensor(s, dtype=level_dtype(x), device=x.device) ** (1 / 3) for s in (next_sigma, sigma))
    middle = ((low + high) / 2) ** 3
    halfway = euler_step(denoiser, x, sigma, middle, labels, denoised)
    return x + _gap(sigma, next_sigma, x) * velocity(denoiser, halfway, middle, labels)


SOLVERS = {"euler": euler_step, "heun": heun_step, "dpm2": dpm2_step}


def get_solver(name: str) -> Callable:
    """A solver step by name: "euler", "heun" or "dpm2". Raises ValueError for another name."""
    return SOLVERS[known("solver", name, SOLVERS)]


def trajectory(denoiser, x: Tensor, sigmas, labels: Tensor | None = None, step=heun_step) -> Iterator[Tensor]:
    """Yields x at every level of sigmas (above 0, in either direction), beginning with the x given, which lies at sigmas[0]."""
    yield x
    levels = [float(s) for s in sigmas]
    for sigma, next_sigma in zip(levels, levels[1:], strict=False):
        with torch.no_grad():
            x = step(denoiser, x, sigma, next_sigma, labels)
        yield x


def solve(denoiser, x: Tensor, sigmas, labels: Tensor | None = None, step=heun_step) -> Tensor:
    """Follows the ODE from x at sigmas[0] to sigmas[-1] > 0; returns the end point. Differs from a sampler: no step to sigma 0."""
    for end in trajectory(denoiser, x, sigmas, labels, step):
        x = end
    return x
