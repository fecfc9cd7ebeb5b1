"""Training objectives: EDM, consistency distillation and training (CD, CT, iCT, ECT), progressive distillation.

Every objective draws its own noise levels and is then a small callable:

    levels = objective.levels(batch_size, step, total, generator)      # tuple of (B,): sigmas, highest first
    loss = objective(student, images, labels, noise, *levels, target=..., teacher=...)      # (B,)

images, noise (B, …); labels (B,) or None; student, target, teacher are called as model(x, sigma, labels).
target=None stands for the student itself without gradient (mu = 0).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmlab.checks import known, positive, same_shape, sigma_range, whole, within
from cmlab.distances import PseudoHuber, l2
from cmlab.noise import (
    WEIGHTING_NAMES,
    LogNormal,
    add_noise,
    karras_sigmas,
    lognormal_index,
    mu_adaptive,
    scales_doubling,
    scales_halving,
    scales_sqrt,
    sigma_at,
    uniform_index,
    weighting,
)
from cmlab.ode import get_solver
from cmlab.scaling import ConsistencyModel, Denoiser
from cmlab.streams import RandomState


class SharedDropout(RandomState):
    """Lets a second network see the dropout mask of the first, on every device.

        dropout = SharedDropout(images.device)
        ahead = student(…)
        with dropout.replayed():
            behind = target(…)         # the same mask, if the layers are the same

    Saving only the CPU's random state, as the released code does, shares nothing on a GPU.
    """

    @contextmanager
    def replayed(self):
        """Inside, random numbers start again where they stood when this object was made; outside they go on as before."""
        after = RandomState(self.device)
        self.restore()
        try:
            yield
        finally:
            after.restore()


@dataclass(frozen=True)
class Objective:
    """What all objectives share: the range of noise levels and the loss weight."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    weight: str = "uniform"
    needs_teacher = False
    kind = ConsistencyModel  # of the model that it trains

    def __post_init__(self):
        sigma_range(self.sigma_min, self.sigma_max)
        if self.sigma_min == self.sigma_max:
            raise ValueError(f"sigma_min must lie below sigma_max to train on a range, got {self.sigma_min} for both")
        positive("rho", self.rho)
        known("weighting", self.weight, self._weightings())

    def _weightings(self) -> list[str]:
        return [name for name in WEIGHTING_NAMES if name != "inverse-gap"]  # which wants two levels

    def model(self, net: nn.Module, sigma_data: float) -> Denoiser:
        """What this objective trains, over a network."""
        return self.kind(net, sigma_data, self.sigma_min, self.sigma_max)

    def scales(self, step: int, total: int) -> int | None:
        """N(k), the number of grid levels at this step; None where the levels are continuous."""
        return None

    def mu(self, step: int, total: int) -> float:
        """mu(k), the target network's EMA decay; 0: the target is the student itself."""
        return 0.0

    def _grid(self, scales: int) -> Tensor:
        return karras_sigmas(scales, self.sigma_min, self.sigma_max, self.rho)


@dataclass(frozen=True)
class EDM(Objective):
    """Denoising score matching: E[w(sigma) |D(y + sigma z, sigma) - y|^2 / d]. Karras et al. (2022), eq. 2 and table 1."""

    weight: str = "karras"
    sigmas: LogNormal = LogNormal()
    kind = Denoiser

    def levels(self, n: int, step: int = 0, total: int = 1, generator=None) -> tuple[Tensor]:
        """One sigma an image, log-normal, cut to the model's range."""
        return (self.sigmas(n, generator).clamp(self.sigma_min, self.sigma_max),)

    def __call__(self, student, images, labels, noise, sigma, target=None, teacher=None) -> Tensor:
        same_shape("noise", noise, images.shape)
        denoised = student(add_noise(images, noise, sigma), sigma, labels)
        return weighting(self.weight, sigma, student.sigma_data) * l2(denoised, images)


@dataclass(frozen=True)
class SelfConsistency(Objective):
    """What CD, CT, iCT and ECT share: the model at a level is to agree with the target network at the lower one."""

    distance: Callable[[Tensor, Tensor], Tensor] = l2  # (B, …), (B, …) -> (B,)

    def _weightings(self) -> list[str]:
        return WEIGHTING_NAMES

    def levels(self, n: int, step: int, total: int, generator=None) -> tuple[Tensor, Tensor]:
        """Neighbours (high, low) on the grid of this step."""
        sigmas = self._grid(self.scales(step, total))
        index = self._index(n, sigmas, generator)
        return sigmas[index], sigmas[index + 1]

    def _index(self, n: int, sigmas: Tensor, generator) -> Tensor:
        return uniform_index(n, len(sigmas), generator)

    def __call__(self, student, images, labels, noise, high, low, target=None, teacher=None) -> Tensor:
        same_shape("noise", noise, images.shape)
        x_high = add_noise(images, noise, high)
        with torch.no_grad():
            x_low = self.step_down(x_high, images, noise, high, low, labels, teacher)
        dropout = SharedDropout(images.device)
        ahead = student(x_high, high, labels)
        with torch.no_grad(), dropout.replayed():
            behind = (student if target is None else target)(x_low, low, labels)
        weight = weighting(self.weight, high, student.sigma_data, low)
        return weight.to(ahead.dtype) * self.distance(ahead, behind)  # (B,)

    def step_down(self, x_high, images, noise, high, low, labels, teacher) -> Tensor:
        """The point one level lower on the estimated trajectory: the same image with less of the same noise."""
        return add_noise(images, noise, low)


@dataclass(frozen=True)
class ConsistencyTraining(SelfConsistency):
    """CT, Song et al. (2023), algorithm 3: no teacher; the score is estimated by the very noise that was added.

    The grid grows from start to end levels with the square root of time, mu follows it (mu_0 = 0: no target network).
    """

    start: int = 2
    end: int = 150
    mu_0: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        within("mu_0", self.mu_0, 0, 1)
        whole("end", self.end, whole("start", self.start))

    def scales(self, step: int, total: int) -> int:
        """N(k) of the square-root curriculum."""
        return scales_sqrt(step, total, self.start, self.end)

    def mu(self, step: int, total: int) -> float:
        """mu(k), which keeps start log(mu_0) spread over the levels; 0 for mu_0 = 0."""
        return mu_adaptive(self.scales(step, total), self.start, self.mu_0) if self.mu_0 else 0.0


@dataclass(frozen=True)
class ConsistencyDistillation(SelfConsistency):
    """CD, Song et al. (2023), algorithm 2: the target lies one solver step down the teacher's probability-flow ODE.

    The grid has num_scales levels throughout, mu is fixed. solver is "euler", "heun" or "dpm2", taken in substeps equal
    parts (in the grid's own spacing) of each interval. teacher is any denoiser, the exact one included.
    """

    num_scales: int = 18
    mu_0: float = 0.95
    solver: str = "heun"
    substeps: int = 1
    needs_teacher = True

    def __post_init__(self):
        super().__post_init__()
        within("mu_0", self.mu_0, 0, 1)
        whole("num_scales", self.num_scales, 2)
        whole("substeps", self.substeps)
        get_solver(self.solver)

    def scales(self, step: int, total: int) -> int:
        """num_scales, throughout."""
        return self.num_scales

    def mu(self, step: int, total: int) -> float:
        """mu_0, throughout."""
        return self.mu_0

    def step_down(self, x_high, images, noise, high, low, labels, teacher) -> Tensor:
        """Where the teacher's ODE takes x_high at the lower level."""
        if teacher is None:
            raise ValueError("consistency distillation needs a teacher, got teacher=None")
        step, x = get_solver(self.solver), x_high
        sigmas = self._between(high, low)
        for sigma, next_sigma in zip(sigmas, sigmas[1:], strict=False):
            x = step(teacher, x, sigma, next_sigma, labels)
        return x

    def _between(self, high: Tensor, low: Tensor) -> list[Tensor]:
        top, bottom = high ** (1 / self.rho), low ** (1 / self.rho)
        inner = [(top + k / self.substeps * (bottom - top)) ** self.rho for k in range(1, self.substeps)]
        return [high, *inner, low]


@dataclass(frozen=True)
class ImprovedConsistencyTraining(ConsistencyTraining):
    """iCT, Song & Dhariwal (2023): CT with no target network, pseudo-Huber, weight 1/(high - low), doubling grid, log-normal levels."""

    start: int = 10
    end: int = 1280
    mu_0: float = 0.0
    weight: str = "inverse-gap"
    distance: Callable[[Tensor, Tensor], Tensor] = PseudoHuber()
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        positive("std", self.std)

    def scales(self, step: int, total: int) -> int:
        """N(k) of the doubling curriculum."""
        return scales_doubling(step, total, self.start, self.end)

    def _index(self, n: int, sigmas: Tensor, generator) -> Tensor:
        return lognormal_index(n, sigmas, self.mean, self.std, generator)


@dataclass(frozen=True)
class EasyConsistencyTuning(SelfConsistency):
    """ECT, Geng et al. (2024): levels are continuous; the gap closes from all of sigma (half of it at high levels) to 1/q^stages.

    At stage a = 0, 1, … (stages of equal length) low = high (1 - n(high) / q^(a + 1)) with n(t) = 1 + k sigmoid(-b t),
    never below sigma_min. Start it from an EDM model.
    """

    weight: str = "inverse-gap"
    distance: Callable[[Tensor, Tensor], Tensor] = PseudoHuber()
    sigmas: LogNormal = LogNormal(-1.1, 2.0)
    stages: int = 6
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        whole("stages", self.stages)
        for name in ("q", "k", "b"):
            positive(name, getattr(self, name))

    def stage(self, step: int, total: int) -> int:
        """0 … stages - 1."""
        return min(step * self.stages // total, self.stages - 1)

    def levels(self, n: int, step: int, total: int, generator=None) -> tuple[Tensor, Tensor]:
        """(high, low): high log-normal, low by the mapping function of this step's stage."""
        high = self.sigmas(n, generator).clamp(2 * self.sigma_min, self.sigma_max)
        gap = (1 + self.k * torch.sigmoid(-self.b * high)) / self.q ** (self.stage(step, total) + 1)
        return high, (high * (1 - gap)).clamp(min=self.sigma_min)


@dataclass(frozen=True)
class ProgressiveDistillation(Objective):
    """PD, Salimans & Ho (2022), algorithm 2: one student step learns two teacher steps; then it teaches a copy of itself half the steps.

    On grids of num_scales + 1 levels, as in the released code: the student's step goes from high to low, the teacher's
    two Euler steps over the middle (half an index further).
    """

    start: int = 16
    stage_steps: int = 100
    distance: Callable[[Tensor, Tensor], Tensor] = l2
    weight: str = "truncated-snr"
    needs_teacher = True
    kind = Denoiser

    def __post_init__(self):
        super().__post_init__()
        whole("start", self.start, 2)
        whole("stage_steps", self.stage_steps)

    def scales(self, step: int, total: int) -> int:
        """The student's number of steps."""
        return scales_halving(step, self.stage_steps, self.start)

    def levels(self, n: int, step: int, total: int, generator=None) -> tuple[Tensor, Tensor, Tensor]:
        """(high, middle, low): the ends of a random student step, and its half."""
        scales = self.scales(step, total)
        index = uniform_index(n, scales + 1, generator)
        at = [sigma_at(index + part, scales + 1, self.sigma_min, self.sigma_max, self.rho) for part in (0, 0.5, 1)]
        return tuple(at)

    def __call__(self, student, images, labels, noise, high, middle, low, target=None, teacher=None) -> Tensor:
        same_shape("noise", noise, images.shape)
        if teacher is None:
            raise ValueError("progressive distillation needs a teacher, got teacher=None")
        x_high = add_noise(images, noise, high)
        with torch.no_grad():
            aim = self.two_steps(teacher, x_high, high, middle, low, labels)
        denoised = student(x_high, high, labels)
        weight = weighting(self.weight, high, student.sigma_data)
        return weight.to(denoised.dtype) * self.distance(denoised, aim)

    def two_steps(self, teacher, x_high, high, middle, low, labels) -> Tensor:
        """The clean image from which one Euler step would land where the teacher's two do: (B, …)."""
        euler = get_solver("euler")
        x_low = euler(teacher, euler(teacher, x_high, high, middle, labels), middle, low, labels)
        slope = add_noise(torch.zeros_like(x_high), x_low - x_high, 1 / (low - high))
        return add_noise(x_high, slope, -high)
