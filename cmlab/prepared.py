"""Data sets that `cmlab data prepare` wrote: Arrow files, memory-mapped, so that any size trains in little memory."""

from __future__ import annotations

import json
import os
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmlab.prepare import FACTS, MODES
from cmlab.sources import picture

SIGMA_DATA = 0.5  # of photographs in [-1, 1], as in EDM and CM


class Prepared:
    """A prepared data set, with what training asks of one: name, shape, count, num_classes, sigma_data, choose and batch.

    Without a name its whole path is its name, by which a saved model or state finds it again.

    Raises ValueError for a folder that holds none, or one whose preparation was not finished.
    """

    def __init__(self, folder: str | Path, name: str | None = None):
        self.folder = Path(folder).absolute()
        path = self.folder / FACTS
        if not path.is_file():
            unfinished = any(self.folder.glob("data-*.arrow"))
            raise ValueError(
                f"{self.folder} holds no prepared data set"
                + (
                    ": its preparation was not finished; run it again"
                    if unfinished
                    else "; make one with cmlab data prepare"
                )
            )
        self.facts = json.loads(path.read_text())
        self.name, self.count, self.sigma_data = name or str(self.folder), self.facts["count"], SIGMA_DATA
        self.num_classes = len(self.facts["classes"]) or None
        self.shape = (len(MODES[self.facts["colour"]]), self.facts["size"], self.facts["size"])

    @cached_property
    def _rows(self):
        import datasets

        return datasets.load_from_disk(str(self.folder)).cast_column("image", datasets.Image(decode=False))

    def choose(self, n: int, generator: torch.Generator, first: int = 0, seed: int = 0) -> Tensor:
        """The indices of the training images first … first + n - 1 of a run: epoch after epoch, each in an order of its own."""
        places = range(first, first + n)
        return torch.stack([_order(self.count, seed, place // self.count)[place % self.count] for place in places])

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The images (B, C, H, W) in [-1, 1] and the labels (B,) at the given indices, mirrored at random if they may be."""
        rows = self._rows[index.tolist()]
        pixels = np.stack([np.asarray(picture(cell["bytes"])).reshape(*self.shape[1:], -1) for cell in rows["image"]])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        if self.facts["flip"]:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return images, torch.tensor(rows["label"]) if "label" in rows else None


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def data_folder() -> Path:
    """Where prepared data sets are kept: CMLAB_DATA, or the repository's datasets/, or ~/.cache/cmlab/datasets."""
    if "CMLAB_DATA" in os.environ:
        return Path(os.environ["CMLAB_DATA"]).expanduser().absolute()
    home = Path(__file__).parents[1]
    # where the package is installed, another one called datasets lies beside it
    in_repository = (home / "pyproject.toml").is_file()
    return home / "datasets" if in_repository else Path.home() / ".cache" / "cmlab" / "datasets"
