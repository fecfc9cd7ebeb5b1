"""The one owner of c_skip, c_out, c_in and c_noise: wraps a network net(x, c_noise, labels) as a model.

Denoiser, ConsistencyModel, and for continuous time TrigFlow and MeanFlow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cmlab.checks import floating, positive, sigma_range


def level_dtype(x: Tensor) -> torch.dtype:
    """The precision in which noise levels are kept beside x: float32, or float64 beside a float64 x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_image(sigma: Tensor | float, x: Tensor) -> Tensor:
    """sigma as (B, 1, …, 1), one level an image, in float32 (float64 for a float64 x) whatever the precision of x.

    Accepts a number, a 0-d tensor or a (B,) tensor. Raises ValueError for another shape, or for levels that are not finite
    and above 0 (looked at on the CPU only: on a GPU the check would wait for the device).
    """
    floating("x", x)
    sigma = torch.as_tensor(sigma, dtype=level_dtype(x), device=x.device)
    if sigma.ndim == 0:
        sigma = sigma.expand(x.shape[0])
    if tuple(sigma.shape) != (x.shape[0],):
        raise ValueError(f"sigma must be a number or have shape ({x.shape[0]},), got shape {tuple(sigma.shape)}")
    if sigma.device.type == "cpu" and not torch.compiler.is_compiling() and not ((sigma > 0) & sigma.isfinite()).all():
        raise ValueError(f"sigma must be finite and above 0, got {sigma[~((sigma > 0) & sigma.isfinite())][0]:g}")
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def column(v: Tensor, x: Tensor) -> Tensor:
    """v (B,) as (B, 1, …, 1) beside x, in its precision."""
    return v.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def edm_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in of Karras et al. (2022), table 1: unit-variance input and target for the network at every sigma."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()


def boundary_scalings(sigma: Tensor, sigma_data: float, sigma_min: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in of Song et al. (2023), app. C: c_skip = 1 and c_out = 0 exactly at sigma_min.

    Raises ValueError for a sigma below sigma_min, where no trajectory goes (looked at on the CPU only, as in per_image).
    """
    looked_at = sigma.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and (sigma < sigma_min * (1 - 1e-6)).any():  # sigma_min itself may have been rounded
        raise ValueError(f"sigma must be at least sigma_min = {sigma_min:g}, got {sigma.min():g}")
    above, total = sigma - sigma_min, sigma**2 + sigma_data**2
    c_skip = 1 / (1 + (above / sigma_data) ** 2)  # in this form exactly 1 at sigma_min, whatever sigma_data
    c_out = above * sigma_data / total.sqrt()  # zero at sigma_min: the network cannot move x there
    return c_skip, c_out, 1 / total.sqrt()


class Denoiser(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): the expected clean image. Karras et al. (2022), eq. 7.

    net is called as net(x, c_noise, labels) with c_noise = 250 ln(sigma), shape (B,), as the released models expect.
    sigma_data is the data's standard deviation; sigma_min and sigma_max are the range the model is trained for.
    """

    kind = "denoiser"

    def __init__(self, net: nn.Module, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0):
        super().__init__()
        sigma_range(sigma_min, sigma_max)
        self.net, self.sigma_data = net, positive("sigma_data", sigma_data)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, c_noise at the given levels: each with the shape of sigma."""
        return *edm_scalings(sigma, self.sigma_data), 250 * sigma.log()

    def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """x (B, …) at noise level sigma, a number or (B,) -> the model's clean image, the shape of x."""
        c_skip, c_out, c_in, c_noise = self.scalings(per_image(sigma, x))  # each (B, 1, 1, 1)
        return c_skip * x + c_out * self.net(c_in * x, c_noise.flatten(), labels)  # (B, C, H, W)


class ConsistencyModel(Denoiser):
    """f(x, sigma) = c_skip x + c_out F(c_in x, c_noise), with f(x, sigma_min) = x exactly (Song et al. 2023, eq. 5 and app. C).

    f maps any point of a probability-flow trajectory to that trajectory's end: one call makes an image.
    """

    kind = "consistency"

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, c_noise at the given levels: each with the shape of sigma."""
        return *boundary_scalings(sigma, self.sigma_data, self.sigma_min), 250 * sigma.log()


def angle_of(sigma: Tensor | float, sigma_data: float = 0.5) -> Tensor:
    """TrigFlow's time t = arctan(sigma / sigma_data), in [0, pi / 2): Lu & Song (2024, sCM), sec. 3. The shape of sigma."""
    return (torch.as_tensor(sigma) / positive("sigma_data", sigma_data)).atan()


def sigma_of(angle: Tensor | float, sigma_data: float = 0.5) -> Tensor:
    """The noise level sigma_data tan(t) of an angle in [0, pi / 2): the inverse of angle_of. Raises ValueError outside."""
    angle = torch.as_tensor(angle)
    if not ((angle >= 0) & (angle < math.pi / 2)).all():
        raise ValueError(f"angle must lie in [0, pi / 2), got {angle.min():g} … {angle.max():g}")
    return positive("sigma_data", sigma_data) * angle.tan()


class TrigFlow(ConsistencyModel):
    """f(x_t, t) = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t), with f = x_t at t = 0. Lu & Song (2024, sCM), eq. 6.

    x_t = cos(t) y + sin(t) sigma_data z turns from image to noise with the angle t = arctan(sigma / sigma_data); so x_t = cos(t) x
    in the coordinates of all models here, x = y + sigma z. Called with x and sigma like any of them, f then reads
    c_skip x + c_out net(c_in x, c_noise) with *EDM's* scalings and F = -net: the weights of a Denoiser are a TrigFlow whose F is
    the velocity dx_t/dt of the probability-flow ODE. The network is told ln(sigma), as everywhere here, not t.

    log_weight, if given, maps c_noise (B,) to (B,): the learned loss weight of adaptive weighting (sCM, sec. 4.2). It trains along
    and is not part of the model that is saved.
    """

    kind = "trigflow"

    def __init__(self, net, sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, log_weight: nn.Module | None = None):
        super().__init__(net, sigma_data, sigma_min, sigma_max)
        self.log_weight = log_weight

    scalings = Denoiser.scalings  # c_skip = cos(t)^2, c_out = sin(t) sigma_data, c_in = cos(t) / sigma_data

    def cos_sin(self, sigma: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos(t) and sin(t) as (B, 1, …, 1) beside x: without the angle, which near pi / 2 tells high levels apart poorly."""
        sigma = per_image(sigma, x)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return self.sigma_data / total, sigma / total

    def velocity(self, x_t: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """F(x_t / sigma_data, t), in units of sigma_data. x_t (B, …), c_noise (B,) = 250 ln(sigma) -> (B, …)."""
        return -self.net(x_t / self.sigma_data, c_noise, labels)


class MeanFlow(ConsistencyModel):
    """The average velocity u(z, r, t) over the straight-line flow's way from time t to r. Geng et al. (2025, MeanFlow), eq. 3.

    Straight lines z_t = (1 - t) y + t z have t = sigma / (1 + sigma) and z_t = (1 - t) x in the coordinates of all models here.
    A jump from t to r is z_r = z_t - (t - r) u; f(x, sigma) is the jump to r = 0. u = (z_t - G) / t, where G is a Denoiser's
    formula whose network is also told how much of the way the jump goes, 1 - r / t: net(x, c_noise, labels, way), way (B,).
    At way = 0, u is the velocity itself and G the denoiser; at way = 1, G is f.
    """

    kind = "meanflow"

    scalings = Denoiser.scalings

    def forward(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, way: Tensor | None = None
    ) -> Tensor:
        """G of x (B, …) at noise level sigma, a number or (B,); way (B,) in [0, 1], all of it (f itself) if left out."""
        c_skip, c_out, c_in, c_noise = self.scalings(per_image(sigma, x))
        way = torch.ones_like(c_noise.flatten()) if way is None else way
        return c_skip * x + c_out * self.net(c_in * x, c_noise.flatten(), labels, way)

    def average_velocity(self, z: Tensor, r: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """u(z, r, t) of z (B, …) at times 0 <= r <= t < 1, (B,) each -> (B, …)."""
        return (z - self(z / column(1 - t, z), t / (1 - t), labels, 1 - r / t)) / column(t, z)


ONE_CALL = tuple(
    kind.kind for kind in (ConsistencyModel, TrigFlow, MeanFlow)
)  # the kinds whose one call makes a picture
