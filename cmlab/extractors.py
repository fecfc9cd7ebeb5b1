"""The eyes of the metrics: from images to the features and class probabilities that quality is measured in."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmlab.checkpoints import load_classifier
from cmlab.checks import finite, known
from cmlab.weights import weights_at

# The FID network of Heusel et al. (2017), ported by torch-fidelity. The name ends in the file's SHA-256, its first 8 digits.
INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class Features(NamedTuple):
    """What an extractor sees in a batch, on the CPU: features (B, D), and class probabilities (B, K) in [0, 1]."""

    features: Tensor
    probabilities: Tensor


def get_extractor(name: str, device: str | None = None) -> Callable[[Tensor], Features]:
    """A feature extractor, images (B, C, H, W) in [-1, 1] -> Features, by name.

    "digits-classifier" (images (B, 1, 8, 8)) and "tinted-digits-classifier" ((B, 3, 16, 16)) travel with the package:
    64 features, 10 classes. "inception" (C is 1 or 3, any size) is torch-fidelity's port of the network of Heusel et al.
    (2017): 2048 features, 1008 classes; it sees 8-bit colours, and fetches its weights when they are first needed.
    Raises ValueError for another name; for Inception's weights FileNotFoundError if they are missing and cannot be
    fetched, ValueError if the file is damaged, another one, or holds code. The extractor raises TypeError for images
    that are not floats, ValueError for another shape, NaN, or values far outside [-1, 1].
    """
    known("extractor", name, ["digits-classifier", "tinted-digits-classifier", "inception"])
    return _inception(device) if name == "inception" else _classifier(name, device)


def _classifier(name: str, device: str | None) -> Callable[[Tensor], Features]:
    model = load_classifier(name, device)
    return lambda images: _seen(model, _images(images), 1024)


def _inception(device: str | None) -> Callable[[Tensor], Features]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    clean = (
        io.BytesIO()
    )  # torch-fidelity unpickles what it is given: so it is given what we have just written ourselves
    torch.save(weights_at(INCEPTION, "FID needs Inception's weights"), clean)
    clean.seek(0)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then overwritten
        model = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=clean
        ).to(device)

    def extract(images: Tensor) -> Features:
        if _images(images).shape[1] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels for inception, got shape {tuple(images.shape)}")
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
        return _seen(model, pixels.expand(-1, 3, -1, -1), 64)

    return extract


def _images(images: Tensor) -> Tensor:
    """Checks images (B, C, H, W): about in [-1, 1], where "about" catches the 0 … 255 of an unscaled picture."""
    if finite("images", images).ndim != 4 or len(images) == 0:
        raise ValueError(f"images must have shape (B, C, H, W) with B >= 1, got {tuple(images.shape)}")
    if images.abs().max() > 10:
        raise ValueError(f"images must lie in [-1, 1], got values up to {float(images.abs().max()):g}")
    return images


@torch.no_grad()
def _seen(model: nn.Module, images: Tensor, chunk: int) -> Features:
    """What a model with outputs (features, logits) sees, chunk by chunk; on the CPU, which has float64 everywhere."""
    device = next(model.parameters()).device
    features, logits = zip(*(model(part.to(device)) for part in images.split(chunk)), strict=True)
    return Features(torch.cat(features).cpu(), torch.cat(logits).softmax(1).cpu())
