"""Noise levels: the Karras grid, index <-> sigma, the curricula N(k) and mu(k), sigma samplers and loss weightings.

Grids descend: index 0 is sigma_max and index n - 1 is sigma_min, as in the released code (the paper's text counts upwards).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmlab.checks import known, positive, same_shape, sigma_range, whole
from cmlab.streams import rand, randint, randn


def add_noise(images: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """images + sigma noise: one noise level an image. images, noise (B, …); sigma (B,). Song et al. (2023), sec. 3: x_t = x + t z.

    Raises ValueError for shapes that do not fit.
    """
    same_shape("noise", noise, images.shape)
    same_shape("sigma", torch.as_tensor(sigma), images.shape[:1])
    return images + sigma.to(images.dtype).reshape(-1, *[1] * (images.ndim - 1)) * noise


# --- the grid -------------------------------------------------------------------------------------------------------


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The n noise levels of Karras et al. (2022), eq. 5, descending from sigma_max to sigma_min, end points exact.

    Returns a float64 tensor of shape (n,): dense where images form, sparse where only noise is left; n = 1 gives sigma_max.
    Raises ValueError unless n >= 1 and 0 < sigma_min <= sigma_max and rho > 0.
    """
    whole("n", n)
    sigmas = sigma_at(torch.arange(n, dtype=torch.float64), n, sigma_min, sigma_max, rho)
    sigmas[-1] = sigma_min  # exact: f(x, sigma_min) = x must hold bit for bit
    sigmas[0] = sigma_max
    return sigmas


def sigma_at(
    index: Tensor | float, n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """The noise level at an index of the n-level grid; fractions lie between levels. float64, the shape of index.

    Raises ValueError for an index outside 0 … n - 1 (n = 1 has only index 0), or a bad range.
    """
    whole("n", n)
    sigma_range(sigma_min, sigma_max)
    positive("rho", rho)
    index = torch.as_tensor(index, dtype=torch.float64)
    if not ((index >= 0) & (index <= n - 1)).all():  # this way round NaN is refused as well
        raise ValueError(f"index must lie in 0 … {n - 1}, got {index.min():g} … {index.max():g}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + index / max(n - 1, 1) * (low - high)) ** rho


def index_of(
    sigma: Tensor | float, n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """The (fractional) index of a noise level on the n-level grid: the inverse of sigma_at. float64, the shape of sigma.

    Raises ValueError for a sigma outside [sigma_min, sigma_max], n < 2 or a bad range.
    """
    whole("n", n, 2)
    sigma_range(sigma_min, sigma_max)
    positive("rho", rho)
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    slack = 1e-6  # sigmas that went through float32
    if not ((sigma >= sigma_min * (1 - slack)) & (sigma <= sigma_max * (1 + slack))).all():  # NaN is refused as well
        raise ValueError(f"sigma must lie in [{sigma_min}, {sigma_max}], got {sigma.min():g} … {sigma.max():g}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return ((sigma ** (1 / rho) - high) / (low - high) * (n - 1)).clamp(0, n - 1)


# --- curricula: how many levels N(k), how slow a target mu(k), at training step k of K -------------------------------


def scales_sqrt(step: int, total: int, start: int = 2, end: int = 150) -> int:
    """N(k) of Song et al. (2023), app. C: ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1, from s0 = start to s1 + 1.

    The number of levels grows with the square root of training time. Matches the released code, which also never goes
    below 2 levels. Raises ValueError unless 0 <= step <= total and 1 <= start <= end.
    """
    _check_curriculum(step, total, start, end)
    grown = math.sqrt(step / total * ((end + 1) ** 2 - start**2) + start**2)
    return max(math.ceil(grown - 1), 1) + 1


def scales_doubling(step: int, total: int, start: int = 10, end: int = 1280) -> int:
    """N(k) of Song & Dhariwal (2023, iCT), sec. 3.4: min(s0 2^floor(k/K'), s1) + 1 with K' = floor(K / (log2 floor(s1/s0) + 1)).

    start, 2 start, 4 start … up to end, in stages of equal length where end / start is a power of two.

    Raises ValueError unless 0 <= step <= total and 1 <= start <= end.
    """
    _check_curriculum(step, total, start, end)
    stage_length = max(1, math.floor(total / (math.log2(end // start) + 1)))
    return min(start * 2 ** (step // stage_length), end) + 1


def scales_halving(step: int, steps_per_stage: int, start: int) -> int:
    """The student's number of steps in progressive distillation (Salimans & Ho 2022), as the released code counts it.

    start, start/2, … for steps_per_stage each, then 2 and 1 for twice as long each. start is best a power of two.
    Raises ValueError unless start >= 2, steps_per_stage >= 1 and step >= 0.
    """
    whole("start", start, 2)
    whole("steps_per_stage", steps_per_stage)
    whole("step", step, 0)
    scales = max(start // 2 ** (step // steps_per_stage), 2)
    if scales > 2:
        return scales
    late = max(step - steps_per_stage * (math.log2(start) - 1), 0) // (2 * steps_per_stage)
    return max(int(2 // 2**late), 1)


def mu_adaptive(scales: int, start: int = 2, mu_0: float = 0.95) -> float:
    """mu(k) = exp(s0 log(mu_0) / (N - 1)): the target's EMA decay, slower as the grid gets finer.

    Song et al. (2023), app. C writes N(k); the released code divides by N(k) - 1, and so do we (the released models were
    trained with it). scales is N >= 2. Raises ValueError unless 0 < mu_0 <= 1.
    """
    whole("scales", scales, 2)
    whole("start", start)
    if not 0 < mu_0 <= 1:
        raise ValueError(f"mu_0 must lie in (0, 1], got {mu_0}")
    return math.exp(start * math.log(mu_0) / (scales - 1))


def _check_curriculum(step: int, total: int, start: int, end: int) -> None:
    whole("total", total)
    whole("start", start)
    if not 0 <= step <= total:
        raise ValueError(f"step must lie in 0 … {total}, got {step}")
    if end < start:
        raise ValueError(f"end must be at least start = {start}, got {end}")


# --- which noise levels to train on ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogNormal:
    """log(sigma) ~ N(mean, std^2). Karras et al. (2022), table 1: mean -1.2, std 1.2 for images of sigma_data 0.5."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        positive("std", self.std)

    def __call__(self, n: int, generator=None) -> Tensor:
        """n noise levels, float64 of shape (n,)."""
        return (self.mean + self.std * randn((n,), generator).double()).exp()


def uniform_index(n: int, scales: int, generator=None) -> Tensor:
    """n indices i, uniform over the scales - 1 intervals (sigma[i], sigma[i + 1]) of a grid. Song et al. (2023), algorithms 2 and 3.

    Raises ValueError for scales < 2.
    """
    return randint(0, whole("scales", scales, 2) - 1, (n,), generator)


def lognormal_index(n: int, sigmas: Tensor, mean: float = -1.1, std: float = 2.0, generator=None) -> Tensor:
    """n indices of intervals, distributed as a log-normal cut at the grid's levels. Song & Dhariwal (2023, iCT), sec. 3.5.

    sigmas (N,) descending; interval i lies between sigmas[i] and sigmas[i + 1] and gets the mass of N(mean, std^2) between their logs.
    Raises ValueError for std <= 0.
    """
    positive("std", std)
    cdf = torch.erf((sigmas.double().log() - mean) / (std * math.sqrt(2)))
    mass = cdf[:-1] - cdf[1:]
    return torch.searchsorted(mass.cumsum(0) / mass.sum(), rand((n,), generator).double()).clamp(max=len(mass) - 1)


# --- loss weightings ------------------------------------------------------------------------------------------------

WEIGHTINGS = {
    "uniform": lambda snr, sigma_data: torch.ones_like(snr),
    "snr": lambda snr, sigma_data: snr,
    "snr+1": lambda snr, sigma_data: snr + 1,
    "karras": lambda snr, sigma_data: snr + 1 / sigma_data**2,
    "truncated-snr": lambda snr, sigma_data: snr.clamp(min=1),
}
WEIGHTING_NAMES = [*WEIGHTINGS, "inverse-gap"]


def weighting(name: str, sigma: Tensor, sigma_data: float = 0.5, lower: Tensor | None = None) -> Tensor:
    """The loss weight at each noise level: same shape as sigma.

    "uniform", "snr" (sigma^-2), "snr+1", "karras" (1/sigma^2 + 1/sigma_data^2: Karras et al. 2022, table 1), "truncated-snr", or
    "inverse-gap", 1/(sigma - lower), which needs the lower level of each pair (Song & Dhariwal 2023, sec. 3.1).
    Raises ValueError for an unknown name, a sigma <= 0 or lower=None where it is needed.
    """
    known("weighting", name, WEIGHTING_NAMES)
    if not (sigma > 0).all():
        raise ValueError(f"sigma must be above 0, got {sigma.min():g}")
    if name == "inverse-gap":
        if lower is None:
            raise ValueError("weighting 'inverse-gap' needs the lower level of each pair, got lower=None")
        return 1 / (sigma - lower)
    return WEIGHTINGS[name](sigma**-2, sigma_data)
