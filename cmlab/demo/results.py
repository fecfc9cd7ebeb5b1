"""The files that visitors download: a sheet and an .npz for every job, of which the newest are kept."""

from __future__ import annotations

import itertools
import shutil
from collections import deque
from pathlib import Path

import numpy as np

from cmlab.demo.work import Made
from cmlab.files import write_file
from cmlab.pictures import save_sheet
from cmlab.plots import to_pixels

KEPT = 50  # jobs


class Results:
    """A folder of results. The oldest go when there are more than KEPT."""

    def __init__(self, folder: Path):
        self.folder, self._numbers, self._kept = folder, itertools.count(), deque()

    def keep(self, made: Made, columns: int = 10) -> tuple[Path, Path]:
        """Writes what was made: the paths of the .png sheet, and of the .npz (arr_0: uint8, N x H x W x C; arr_1: labels)."""
        folder = self.folder / f"{next(self._numbers):06d}"
        sheet, samples = folder / "pictures.png", folder / "pictures.npz"
        save_sheet(sheet, made.images, columns)
        arrays = {"arr_0": to_pixels(made.images)} | ({} if made.labels is None else {"arr_1": made.labels.numpy()})
        write_file(samples, lambda file: np.savez_compressed(file, **arrays))
        self._kept.append(folder)
        while len(self._kept) > KEPT:
            shutil.rmtree(self._kept.popleft(), ignore_errors=True)
        return sheet, samples
