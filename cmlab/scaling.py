"""The one owner of c_skip, c_out, c_in and c_noise: wraps a network net(x, c_noise, labels) as Denoiser or ConsistencyModel."""

from __future__ import annotations

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
