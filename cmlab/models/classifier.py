"""A small convolutional classifier: its features are the eyes of the metrics on the embedded data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmlab.checks import same_shape, whole
from cmlab.data import Data, Prepared, load_data
from cmlab.streams import seeded


class DigitsClassifier(nn.Module):
    """Convolutions at size, size / 2, … 4, then a layer of 64 features and one of classes. size: a power of 2, >= 8."""

    kind = "classifier"

    def __init__(self, in_channels: int = 1, size: int = 8, num_classes: int = 10):
        super().__init__()
        if whole("size", size, least=8) & (size - 1):
            raise ValueError(f"size must be a power of two, got {size}")
        self.config = dict(in_channels=in_channels, size=size, num_classes=num_classes)
        self.shape = (in_channels, size, size)
        layers = [convolution(in_channels, 32)]
        for _ in range(size.bit_length() - 4):  # halve down to 8 x 8
            layers += [nn.MaxPool2d(2), convolution(32, 32)]
        layers += [convolution(32, 64), nn.MaxPool2d(2), convolution(64, 64)]  # 4 x 4
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU())
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) in [-1, 1] -> features (B, 64) and logits (B, num_classes)."""
        same_shape("images", images, (len(images), *self.shape))
        features = self.body(images)
        return features, self.head(features)


def convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    """3 x 3, normalised over groups (so that an image's features do not depend on its batch), rectified."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.GroupNorm(8, out_channels), nn.ReLU())


def train_classifier(
    data: str | Data | Prepared, steps: int = 600, seed: int = 0, batch: int = 128
) -> DigitsClassifier:
    """Trains a classifier on a data set with classes, of square pictures; 8x8 to 16x16 take 20 s on 2 CPU cores.

    data names one, or is one. Returns it in eval mode, frozen. The same seed gives the same weights. Raises ValueError for a data
    set without classes, or whose pictures' size is no power of two from 8 on.
    """
    data = load_data(data) if isinstance(data, str) else data
    if data.num_classes is None:
        raise ValueError(f"data must have classes to tell apart, got {data.name}, which has none")
    with seeded(seed):
        model = DigitsClassifier(data.shape[0], data.shape[1], data.num_classes)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=whole("steps", steps), pct_start=0.1)
    for _ in range(steps):
        index = torch.randint(0, data.count, (batch,), generator=generator)
        images, labels = data.batch(index, generator)
        loss = F.cross_entropy(model(shifted(images, generator))[1], labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) moved by -1, 0 or 1 pixel along either axis, its border repeated."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    views = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    choice = torch.randint(0, 9, (len(images),), generator=generator)
    return torch.stack(views)[choice, torch.arange(len(images))]


@torch.no_grad()
def accuracy(model: DigitsClassifier, data: Data) -> float:
    """The share of held-out images that the classifier names rightly, in [0, 1]."""
    return float((model(data.held_out)[1].argmax(1) == data.held_out_labels).float().mean())
