"""Objectives in continuous time: sCT and sCD (consistency models without a grid) and MeanFlow, their neighbour.

They are called like those of the room objectives. A tangent, a derivative along a trajectory, takes the place of the lower level:
it comes with the network's output from one pass in forward mode (jvp).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmlab.checks import positive, same_shape, within
from cmlab.models.small import fourier, zeroed
from cmlab.noise import LogNormal, add_noise
from cmlab.objectives import Objective, SharedDropout
from cmlab.scaling import Denoiser, MeanFlow, TrigFlow, column


def jvp(function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """function(*at) and its derivative in the direction `along`, both without a graph: (B, …), (B, …)."""
    with torch.no_grad(), warnings.catch_warnings():  # no_grad stops reverse mode only
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch's own, at the first derivative
        return torch.func.jvp(function, at, along)


class LogWeight(nn.Module):
    """w of adaptive weighting, a function of the noise level that starts at 0: Lu & Song (2024, sCM), sec. 4.2. float32 throughout."""

    FEATURES = 64

    def __init__(self):
        super().__init__()
        self.leave = zeroed(nn.Linear(self.FEATURES, 1))

    def forward(self, c_noise: Tensor) -> Tensor:
        """c_noise (B,) = 250 ln(sigma) -> (B,)."""
        with torch.autocast(c_noise.device.type, enabled=False):
            return self.leave(fourier(c_noise / 250, self.FEATURES, highest=2.0)).flatten()


@dataclass(frozen=True)
class ContinuousTraining(Objective):
    """sCT, Lu & Song (2024, sCM), algorithm 1: consistency training in the limit of neighbouring levels, in TrigFlow's form.

    F is to move by its normalised tangent g: loss e^w / D |F(x_t, t) - F-(x_t, t) - g|^2 - w, with F- the target without gradient
    and w learned (weight="adaptive") or 0 ("uniform").
    tangent_warmup: over this share of the run the part of g that holds dF/dt grows from 0, where the objective is a diffusion
    model's, to all. normalize: the c of g / (rms(g) + c), with g in units of sigma_data and its root mean square in the place of the
    paper's norm, so that c means the same for all sizes; None leaves g as it is (unstable, to be seen in lesson 07). A target
    network (mu_0 above 0) is not in the paper.
    """

    sigmas: LogNormal = LogNormal(-1.0, 1.4)
    weight: str = "adaptive"
    tangent_warmup: float = 0.1
    normalize: float | None = 0.1
    mu_0: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        within("tangent_warmup", self.tangent_warmup, 0, 1)
        within("mu_0", self.mu_0, 0, 1)
        if self.normalize is not None:
            positive("normalize", self.normalize)

    def _weightings(self) -> list[str]:
        return ["uniform", "adaptive"]

    def model(self, net: nn.Module, sigma_data: float) -> Denoiser:
        """A TrigFlow; with the layer that learns its loss weight, if that is wanted."""
        log_weight = LogWeight() if self.weight == "adaptive" else None
        return TrigFlow(net, sigma_data, self.sigma_min, self.sigma_max, log_weight)

    def mu(self, step: int, total: int) -> float:
        """mu_0, throughout."""
        return self.mu_0

    def levels(self, n: int, step: int, total: int, generator=None) -> tuple[Tensor, Tensor]:
        """(sigma, r): log-normal levels, and the share r of the tangent's second part at this step, the same for all."""
        sigma = self.sigmas(n, generator).clamp(self.sigma_min, self.sigma_max)
        r = min(1.0, step / (self.tangent_warmup * total)) if self.tangent_warmup else 1.0
        return sigma, torch.full_like(sigma, r)

    def __call__(self, student, images, labels, noise, sigma, r, target=None, teacher=None) -> Tensor:
        same_shape("noise", noise, images.shape)
        cos, sin = student.cos_sin(sigma, images)
        x_t = cos * images + sin * student.sigma_data * noise
        c_noise = student.scalings(sigma)[3]
        with torch.no_grad():
            dx_t = self.slope(student, x_t, images, noise, sigma, labels, teacher)
        dropout = SharedDropout(images.device)
        moving = student.velocity(x_t, c_noise, labels)
        with dropout.replayed():
            still, g = tangent(student if target is None else target, x_t, dx_t, sigma, labels, r)
        aim = still + self.normalized(g)
        log_weight = self.log_weight(student, c_noise)
        return log_weight.exp() * (moving - aim).square().flatten(1).mean(1) - log_weight  # (B,)

    def slope(self, student, x_t, images, noise, sigma, labels, teacher) -> Tensor:
        """dx_t/dt, estimated from the image and the noise that x_t was made of: cos(t) sigma_data z - sin(t) y."""
        cos, sin = student.cos_sin(sigma, x_t)
        return cos * student.sigma_data * noise - sin * images

    def log_weight(self, student, c_noise: Tensor) -> Tensor:
        """w of each sample: what the student's layer says, or 0. Raises ValueError for a student without the layer."""
        if self.weight == "uniform":
            return torch.zeros_like(c_noise)
        if student.log_weight is None:
            raise ValueError(
                "weight 'adaptive' needs a student with log_weight=LogWeight(), as model() makes it; got log_weight=None"
            )
        return student.log_weight(c_noise)

    def normalized(self, g: Tensor) -> Tensor:
        """g / (rms(g) + c), by the root mean square of each image."""
        if self.normalize is None:
            return g
        return g / (column(g.flatten(1).square().mean(1).sqrt(), g) + self.normalize)


def tangent(
    model: TrigFlow, x_t: Tensor, dx_t: Tensor, sigma: Tensor, labels, r: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """F and g = cos(t) df/dt / sigma_data, (B, …) each: F + g takes f against its own change, to what it is at lower levels.

    g sigma_data = -cos^2 (sigma_data F - dx_t/dt) - r cos sin (x_t + sigma_data dF/dt): Lu & Song (2024), algorithm 1. The second part is
    scaled by r, (B,) or a number. cos sin d/dt is d/d ln(sigma), which the network is told: nothing here grows towards t = 0 or pi / 2.
    """
    cos, sin = model.cos_sin(sigma, x_t)
    c_noise = model.scalings(sigma)[3]
    along = cos * sin * dx_t, torch.full_like(c_noise, 250.0)  # of x_t and of 250 ln(sigma), by ln(sigma)
    flow, d_flow = jvp(lambda x, c: model.velocity(x, c, labels), (x_t, c_noise), along)
    r = column(torch.as_tensor(r, device=x_t.device).expand(len(x_t)), x_t)
    scale = model.sigma_data
    return flow, -(cos**2) * (flow - dx_t / scale) - r * (cos * sin * x_t / scale + d_flow)


@dataclass(frozen=True)
class ContinuousDistillation(ContinuousTraining):
    """sCD, Lu & Song (2024, sCM), algorithm 1: as sCT, along the trajectory of a teacher's probability-flow ODE.

    teacher is any denoiser, the exact one included.
    """

    sigmas: LogNormal = LogNormal(-0.8, 1.6)
    needs_teacher = True

    def slope(self, student, x_t, images, noise, sigma, labels, teacher) -> Tensor:
        """dx_t/dt of the teacher: with x = x_t / cos(t), (cos(t) x_t - D(x)) / sin(t)."""
        if teacher is None:
            raise ValueError("continuous-time distillation needs a teacher, got teacher=None")
        cos, sin = student.cos_sin(sigma, x_t)
        return (cos * x_t - teacher(x_t / cos, sigma, labels)) / sin


@dataclass(frozen=True)
class MeanFlowTraining(Objective):
    """MeanFlow, Geng et al. (2025), algorithm 1: u(z, r, t) is to be v - (t - r) du/dt, its derivative along the straight line.

    t and r are the larger and smaller of two logit-normal draws (t = sigma / (1 + sigma): log-normal sigmas), and equal for a share
    `same` of the batch, where u is the velocity itself. The loss of an image is |u - aim|^2 / (|u - aim|^2 + c)^p, the denominator
    without gradient (sec. 4.3).
    """

    sigmas: LogNormal = LogNormal(-0.4, 1.0)
    same: float = 0.75
    p: float = 1.0
    c: float = 1e-3
    kind = MeanFlow

    def __post_init__(self):
        super().__post_init__()
        within("same", self.same, 0, 1)
        within("p", self.p, 0, 2)
        positive("c", self.c)

    def _weightings(self) -> list[str]:
        return ["uniform"]  # its own is p

    def levels(self, n: int, step: int, total: int, generator=None) -> tuple[Tensor, Tensor]:
        """(high, low): two log-normal levels in order, the first round(same n) equal."""
        pair = self.sigmas(2 * n, generator).clamp(self.sigma_min, self.sigma_max).reshape(2, n)
        high, low = pair.amax(0), pair.amin(0)
        return high, torch.where(torch.arange(n) < round(self.same * n), high, low)

    def __call__(self, student, images, labels, noise, high, low, target=None, teacher=None) -> Tensor:
        same_shape("noise", noise, images.shape)
        t, r = high / (1 + high), low / (1 + low)
        z, v = add_noise(images, noise - images, t), noise - images  # z_t = (1 - t) y + t z
        dropout = SharedDropout(images.device)
        u = student.average_velocity(z, r, t, labels)
        with dropout.replayed():
            _, du = jvp(lambda z, t: student.average_velocity(z, r, t, labels), (z, t), (v, torch.ones_like(t)))
        error = (u - (v - column(t - r, z) * du)).square().flatten(1).sum(1)  # (B,)
        return error / (error.detach() + self.c) ** self.p
