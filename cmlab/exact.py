"""Exact denoisers in closed form, the ground truth: of a finite data set and of a Gaussian mixture. Same call as Denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlab.checks import finite, positive, same_shape, whole
from cmlab.scaling import per_image


class DatasetDenoiser:
    """D(x, sigma) = sum_i w_i y_i with w = softmax(-|x - y_i|^2 / (2 sigma^2)): the best denoiser of a finite data set.

    Karras et al. (2022), app. B.3, eq. 57. data (M, …); labels (M,) int64 make it class-conditional. Float64 inside, with a
    running log-sum-exp over chunks of the data, so that sigma from 1e-4 to 1e3 is stable and 50,000 images fit.
    """

    def __init__(self, data: Tensor, labels: Tensor | None = None, chunk: int = 4096):
        self.data, self.labels, self.chunk = finite("data", data), labels, whole("chunk", chunk)
        if len(data) == 0:
            raise ValueError("data must hold at least one item, got 0")
        if labels is not None and tuple(labels.shape) != (len(data),):
            raise ValueError(f"labels must have shape ({len(data)},), got {tuple(labels.shape)}")

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """x (B, …) at noise level sigma, a number or (B,); labels (B,) restrict to a class -> E[y | x] (B, …)."""
        if x.shape[1:] != self.data.shape[1:]:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.data.shape[1:]))}), got {tuple(x.shape)}")
        finite("x", x)
        if labels is not None and self.labels is None:
            raise ValueError("labels were given, but this denoiser was made without labels")
        if labels is not None:
            same_shape("labels", labels, (len(x),))
        points = x.double().flatten(1)  # (B, D)
        precision = 0.5 / per_image(sigma, x).double().reshape(-1, 1) ** 2  # (B, 1)
        top = torch.full((len(x), 1), -torch.inf, dtype=torch.float64, device=x.device)
        mass, total = torch.zeros_like(top), torch.zeros_like(points)
        for start in range(0, len(self.data), self.chunk):
            part = self.data[start : start + self.chunk].to(x.device).double().flatten(1)  # (M', D)
            logits = -precision * squared_distances(points, part)  # (B, M')
            if labels is not None:
                own = self.labels[start : start + self.chunk].to(x.device)
                logits = logits.masked_fill(own[None] != labels[:, None], -torch.inf)
            new_top = torch.maximum(top, logits.max(1, keepdim=True).values)
            shift = torch.where(new_top.isfinite(), new_top, torch.zeros_like(new_top))  # a class not seen yet: -inf
            weights, kept = (logits - shift).exp(), (top - shift).exp()
            mass, total, top = mass * kept + weights.sum(1, keepdim=True), total * kept + weights @ part, new_top
        if (mass == 0).any():
            raise ValueError(f"labels must be classes of the data, got {labels[(mass == 0).flatten()][0].item()}")
        return (total / mass).reshape(x.shape).to(x.dtype)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 for a (N, D), b (M, D) -> (N, M), by one matrix product; never below 0."""
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp(min=0)


class GaussianMixtureDenoiser:
    """E[y | x] for y ~ sum_k weights_k N(means_k, stds_k^2 I), noised by sigma.

    means (K, …); stds a number or (K,) at or above 0; weights (K,) or None for equal ones. Each component denoises to its posterior
    mean, (stds^2 x + sigma^2 mean) / (stds^2 + sigma^2), and has a share by how well it explains x.
    """

    def __init__(self, means: Tensor, stds: Tensor | float, weights: Tensor | None = None):
        self.means = finite("means", means)
        stds = torch.as_tensor(stds, dtype=torch.float64)
        self.stds = stds.expand(len(means)) if stds.ndim == 0 else stds
        self.weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        for name, value in (("stds", self.stds), ("weights", self.weights)):
            if tuple(value.shape) != (len(means),) or not ((value >= 0) & value.isfinite()).all():
                raise ValueError(f"{name} must be {len(means)} finite numbers, none negative, got {value.tolist()}")
        positive("the sum of weights", float(self.weights.sum()))

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """x (B, …) at noise level sigma, a number or (B,) -> E[y | x] (B, …). labels must be None."""
        finite("x", x)
        if labels is not None:
            raise ValueError("a Gaussian mixture has no labels; pass labels=None")
        points, means = x.double().flatten(1), self.means.to(x.device).double().flatten(1)  # (B, D), (K, D)
        stds, prior = (v.to(x.device).double() for v in (self.stds, self.weights))
        noise = per_image(sigma, x).double().reshape(-1, 1) ** 2  # (B, 1)
        variance = stds**2 + noise  # (B, K)
        logits = prior.log() - points.shape[1] / 2 * variance.log() - squared_distances(points, means) / (2 * variance)
        share = logits.softmax(1)  # (B, K)
        denoised = (share * stds**2 / variance).sum(1, keepdim=True) * points + (share * noise / variance) @ means
        return denoised.reshape(x.shape).to(x.dtype)
