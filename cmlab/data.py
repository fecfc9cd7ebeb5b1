"""Data sets: the embedded ones, real and without a download. Images are float32 (N, C, H, W) in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cmlab.checks import known, same_shape, whole
from cmlab.prepare import FACTS
from cmlab.prepared import Prepared, data_folder
from cmlab.streams import randint


@dataclass(frozen=True)
class Data:
    """A data set in memory, split once and for all into a training and a held-out part.

    images (N, …) float32, labels (N,) int64 or None; sigma_data is the standard deviation that the scalings use.
    render(images, generator) -> images, where given, draws a fresh variant of each training image from source (N, …).
    """

    name: str
    images: Tensor
    labels: Tensor | None
    held_out: Tensor
    held_out_labels: Tensor | None
    sigma_data: float
    num_classes: int | None = None
    source: Tensor | None = None
    render: Callable[[Tensor, torch.Generator], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.images.shape[1:])

    @property
    def count(self) -> int:
        """How many training images there are."""
        return len(self.images)

    def choose(self, n: int, generator: torch.Generator, first: int = 0, seed: int = 0) -> Tensor:
        """The indices of n training images: drawn with replacement, whatever was drawn before."""
        return randint(0, self.count, (n,), generator)

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The training images and labels at the given indices (B,), rendered afresh where the data set can."""
        labels = None if self.labels is None else self.labels[index]
        if self.render is None:
            return self.images[index], labels
        return self.render(self.source[index], generator), labels


def load_data(name: str) -> Data | Prepared:
    """An embedded data set, "digits" (1, 8, 8), "tinted-digits" (3, 16, 16) or "moons" (points of the plane), or a prepared one.

    A prepared one is named by its folder, or by its name in prepared.data_folder().
    digits: scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998), 1,437 to train on and 360 held out, the same split everywhere.
    Raises ValueError for an unknown name, with the nearest known one, and for a folder that holds no prepared data set.
    """
    if name in _LOADERS:
        return _LOADERS[name]()
    if (data_folder() / name / FACTS).is_file():
        return Prepared(data_folder() / name, name)
    if Path(name).is_dir():
        return Prepared(name, str(Path(name).absolute()))  # a name that a run can be resumed by from anywhere
    if "/" in name or name.startswith("."):
        raise ValueError(f"no such data set: there is no folder {name}")
    if name in BIG:
        raise ValueError(f"{name} is not in {data_folder()} yet: {BIG[name]} fetches and prepares it")
    known("data set", name, [*_LOADERS, *BIG])


@cache
def _digits() -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1  # 0 … 16 -> -1 … 1
    labels = torch.from_numpy(classes).long()
    train, held_out = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=360, stratify=classes, random_state=0
    )
    return Data("digits", images[train], labels[train], images[held_out], labels[held_out], 0.75, 10)


@cache
def _tinted_digits() -> Data:
    digits, generator = _digits(), torch.Generator().manual_seed(0)
    train, held_out = tint(digits.images, generator), tint(digits.held_out, generator)
    return Data("tinted-digits", train, digits.labels, held_out, digits.held_out_labels, 0.6, 10, digits.images, tint)


@cache
def _moons() -> Data:
    generator = torch.Generator().manual_seed(0)
    train, held_out = moons(4000, generator), moons(4000, generator)
    return Data("moons", train, None, held_out, None, 0.5, source=train, render=lambda x, g: moons(len(x), g))


def tint(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Digits (N, 1, 8, 8) in [-1, 1] -> (N, 3, 16, 16): each drawn in one random colour on another, every pixel doubled.

    The two colours of a picture differ in luminance by at least 0.8 (of a range of 2), so that every digit can be read.
    """
    same_shape("digits", digits, (len(digits), 1, 8, 8))
    ink = (F.interpolate(digits, scale_factor=2, mode="nearest") + 1) / 2  # (N, 1, 16, 16) in [0, 1]
    paper, pen = _colour_pairs(len(digits), generator)
    return paper + ink * (pen - paper)


def _colour_pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    luminance = torch.tensor([0.2989, 0.5870, 0.1140])
    colours = torch.rand(n, 64, 2, 3, generator=generator) * 2 - 1  # 64 tries a picture
    apart = ((colours[:, :, 0] - colours[:, :, 1]) @ luminance).abs() > 0.8  # (n, 64)
    if not apart.any(1).all():  # one picture in thirty thousand
        return _colour_pairs(n, generator)
    pair = colours[torch.arange(n), apart.float().argmax(1)]  # (n, 2, 3): the first pair that is far enough apart
    return pair[:, 0].reshape(n, 3, 1, 1), pair[:, 1].reshape(n, 3, 1, 1)


def moons(n: int, generator: torch.Generator, width: float = 0.05) -> Tensor:
    """n points (n, 2) on two interleaved arcs, with Gaussian width; centred, standard deviation about 0.5 an axis."""
    whole("n", n)
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    points = torch.stack([x * 0.58, y], 1)  # the moons are wider than high: 0.58 evens out the axes
    return points + width * torch.randn(n, 2, generator=generator)


BIG = {
    "imagenet64": "datasets/imagenet/fetch_imagenet.sh",
    "bedroom256": "datasets/lsun_bedroom/fetch_lsun_bedroom.sh",
    "cat256": "datasets/lsun_cat/fetch_lsun_cat.sh",
}
_LOADERS = {"digits": _digits, "tinted-digits": _tinted_digits, "moons": _moons}
