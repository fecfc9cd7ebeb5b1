"""Zero-shot editing: Song et al. (2023), algorithm 4, once, over tasks that are small linear operators.

A task knows an orthogonal projection P onto what the measurement fixes (pixels, luminance, block means). Algorithm 4's
A^-1[(A y)(1 - Omega) + (A x) Omega] is x - P x + P y for any such task: what is known comes from y, the rest from x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cmlab.checks import finite, positive, same_shape, whole
from cmlab.ode import trajectory
from cmlab.sampling import Draws, State, end_of, levels_of, levels_within, renoise_std, sample_onestep
from cmlab.streams import randn_like

LUMINANCE = (0.2989, 0.5870, 0.1140)  # ITU-R BT.601, as in the released code


class Task:
    """What a measurement fixes and where the edit starts. Subclasses define project, and more where they differ."""

    def project(self, images: Tensor) -> Tensor:
        """P images: the part that the measurement fixes, (B, C, H, W). Default: nothing."""
        return torch.zeros_like(images)

    def measure(self, images: Tensor, generator=None) -> Tensor:
        """The measurement y of images (B, C, H, W): image-shaped. generator draws its noise, where it has any."""
        self.check(finite("images", images))
        return self.project(images)

    def start(self, measurement: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """The first input of the network: pure noise at sigma, as in the released code.

        The paper adds the measurement to it, which makes no difference at sigma 80.
        """
        return sigma * noise

    def combine(self, measurement: Tensor, x: Tensor) -> Tensor:
        """x with its known part replaced by the measurement's."""
        return x - self.project(x) + self.project(measurement)

    def check(self, images: Tensor) -> None:
        """Raises ValueError if images (B, C, H, W) do not fit the task."""
        if images.ndim != 4:
            raise ValueError(f"{type(self).__name__} takes images (B, C, H, W), got shape {tuple(images.shape)}")

    def check_levels(self, sigmas: list[float]) -> None:
        """Raises ValueError if the task cannot start at sigmas[0]."""


@dataclass(frozen=True)
class Inpaint(Task):
    """Fill in where mask is 0, keep where it is 1. mask broadcasts to (B, C, H, W); bool, or numbers 0 and 1."""

    mask: Tensor

    def __post_init__(self):
        if not isinstance(self.mask, Tensor):
            raise TypeError(f"mask must be a torch tensor, got {type(self.mask).__name__}")
        if not ((self.mask == 0) | (self.mask == 1)).all():
            raise ValueError("mask must hold only 0 (fill in) and 1 (keep)")

    def project(self, images: Tensor) -> Tensor:
        """The known pixels, 0 elsewhere."""
        return self.mask.to(images) * images

    def measure(self, images: Tensor, generator=None) -> Tensor:
        """The images with the unknown pixels at -1, as the released code shows them."""
        self.check(finite("images", images))
        return self.combine(images, -torch.ones_like(images))

    def check(self, images: Tensor) -> None:
        """As Task.check; the mask must fit the images."""
        super().check(images)
        padded = (1,) * (4 - self.mask.ndim) + tuple(self.mask.shape)
        fits = self.mask.ndim >= 2 and padded[2:] == tuple(images.shape[2:])
        fits = fits and all(m in (1, size) for m, size in zip(padded, images.shape, strict=False))
        if self.mask.ndim > 4 or not fits:
            raise ValueError(f"mask of shape {tuple(self.mask.shape)} does not fit images {tuple(images.shape)}")


@dataclass(frozen=True)
class Colorize(Task):
    """Give colour to a grey picture: the luminance 0.2989 R + 0.5870 G + 0.1140 B is kept. 3 channels only."""

    def project(self, images: Tensor) -> Tensor:
        """The part of each colour along the luminance weights; what is left over is the colour to find."""
        direction = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device)
        direction = (direction / direction.norm()).reshape(3, 1, 1)
        return (images * direction).sum(1, keepdim=True) * direction

    def check(self, images: Tensor) -> None:
        """As Task.check; 3 channels."""
        super().check(images)
        if images.shape[1] != 3:
            raise ValueError(f"Colorize takes images of 3 channels, got {images.shape[1]}")


@dataclass(frozen=True)
class SuperResolve(Task):
    """Enlarge: the mean of every factor x factor block is kept. Height and width must be multiples of factor."""

    factor: int

    def __post_init__(self):
        whole("factor", self.factor, 2)

    def project(self, images: Tensor) -> Tensor:
        """Block means, each over its whole block."""
        return F.interpolate(F.avg_pool2d(images, self.factor), scale_factor=self.factor, mode="nearest")

    def check(self, images: Tensor) -> None:
        """As Task.check; factor must divide height and width."""
        super().check(images)
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"factor {self.factor} does not divide the image size {height} x {width}")


@dataclass(frozen=True)
class _FromLevel(Task):
    """A task that starts at its own noise level and fixes nothing exactly."""

    sigma: float

    def __post_init__(self):
        positive("sigma", self.sigma)

    def check_levels(self, sigmas: list[float]) -> None:
        if not math.isclose(sigmas[0], self.sigma, rel_tol=1e-5):
            raise ValueError(f"sigmas must begin with the task's sigma {self.sigma:g}, got {sigmas[0]:g}")


@dataclass(frozen=True)
class Denoise(_FromLevel):
    """Clean a picture that carries Gaussian noise of the known level sigma. edit's sigmas begin with it."""

    def measure(self, images: Tensor, generator=None) -> Tensor:
        """The images with noise of level sigma on them."""
        self.check(finite("images", images))
        return images + self.sigma * randn_like(images, generator)

    def start(self, measurement: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """The noisy picture itself: it is at the first level already."""
        return measurement


@dataclass(frozen=True)
class Stroke(_FromLevel):
    """Turn a rough painting into a picture (SDEdit, Meng et al. 2021): noise it to sigma, then go down. Low sigma keeps more of it."""

    def measure(self, images: Tensor, generator=None) -> Tensor:
        """The painting itself: the guide needs no operator."""
        self.check(finite("images", images))
        return images

    def start(self, measurement: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """The painting, noised to the first level."""
        return measurement + sigma * noise


def edit(
    model, task: Task, measurement: Tensor, sigmas, labels=None, noises=None, generator=None, clip_denoised=True
) -> Tensor:
    """Zero-shot editing, Song et al. (2023), algorithm 4: jump to an image, put back what is known, put noise back, jump again.

    measurement (B, C, H, W) is image-shaped (task.measure makes one); sigmas descend, one network call each; noises
    (len(sigmas), B, C, H, W) injects the start and one draw for every later call. Returns (B, C, H, W), in which the known
    part is the measurement's. Raises ValueError for a measurement, mask, factor or channel count that does not fit.
    """
    return end_of(edit_states(model, task, measurement, sigmas, labels, noises, generator, clip_denoised))


@torch.no_grad()
def edit_states(
    model, task: Task, measurement: Tensor, sigmas, labels=None, noises=None, generator=None, clip_denoised=True
) -> Iterator[State]:
    """The states of edit, which takes the same arguments: denoised has the known part put back."""
    if not isinstance(task, Task):
        raise TypeError(f"task must be a Task, such as Inpaint(mask), got {task!r}")
    task.check(finite("measurement", measurement))
    levels = levels_within(model, sigmas)
    task.check_levels(levels)
    draw = Draws(noises, generator, len(levels), measurement)
    image = measurement
    for k, sigma in enumerate(levels):
        z = draw(k, image)
        x = image + renoise_std(sigma, model.sigma_min) * z if k else task.start(measurement, z, sigma)
        image = model(x, sigma, labels)
        image = task.combine(measurement, image.clamp(-1, 1) if clip_denoised else image)
        yield State(k, sigma, x, image)
    return image


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation from a (weight 0) to b (weight 1), with an angle *for each sample*. a, b (B, …) -> (B, …).

    Song et al. (2023), app. D. Raises ValueError for two shapes.
    """
    same_shape("b", b, a.shape)
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = F.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.acos().clamp(min=1e-6)[:, None]  # equal noises: the limit is linear
    mixed = (((1 - weight) * angle).sin() * flat_a + (weight * angle).sin() * flat_b) / angle.sin()
    return mixed.reshape(a.shape).to(a.dtype)


@torch.no_grad()
def interpolate(model, noise_a: Tensor, noise_b: Tensor, weights, labels=None) -> Tensor:
    """Pictures on the way between two, through their noises: Song et al. (2023), app. D. One network call a picture.

    noise_a, noise_b (B, C, H, W) are N(0, 1), the noises that the two pictures come from; weights (K,) in [0, 1].
    Returns (K, B, C, H, W). Raises ValueError for weights outside [0, 1] and noises of two shapes.
    """
    weights = torch.as_tensor(weights, dtype=torch.float64).flatten().tolist()
    if not weights or not all(0 <= w <= 1 for w in weights):
        raise ValueError(f"weights must be one or more numbers in [0, 1], got {weights}")
    return torch.stack([sample_onestep(model, slerp(noise_a, noise_b, w), labels) for w in weights])


def noise_of(denoiser, images: Tensor, sigmas, labels=None) -> Tensor:
    """The noise that a given picture comes from: the probability-flow ODE followed *upwards*, then scaled to N(0, 1).

    images (B, C, H, W); sigmas descend, as everywhere, and are walked from their end. A consistency model has no such way
    up, so this wants a diffusion denoiser. Returns (B, C, H, W). Raises ValueError for images or sigmas that are not finite.
    """
    return end_of(noise_states(denoiser, images, sigmas, labels))


def noise_states(denoiser, images: Tensor, sigmas, labels=None) -> Iterator[float]:
    """As noise_of, which it returns; yields the share of the way that is done."""
    upwards = levels_of(sigmas, 2)[::-1]
    for k, state in enumerate(trajectory(denoiser, finite("images", images), upwards, labels)):
        x = state
        yield k / (len(upwards) - 1)
    return x / upwards[-1]
