"""The files that visitors download: a sheet and an .npz for every job."""

from __future__ import annotations

import atexit
import secrets
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from cmlab.demo.work import Made
from cmlab.files import write_file
from cmlab.pictures import save_sheet
from cmlab.plots import to_pixels

KEPT = 3600  # seconds


class Results:
    """A new folder of results inside another, each under a name that nobody can guess.

    Those of an hour ago go, and all when the process ends.
    """

    def __init__(self, inside: Path):
        self.folder, self._made = Path(tempfile.mkdtemp(prefix="results-", dir=inside)), []
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    def keep(self, made: Made, columns: int = 10) -> tuple[Path, Path]:
        """Writes what was made: the paths of the .png sheet, and of the .npz (arr_0: uint8, N x H x W x C; arr_1: labels)."""
        folder = self.folder / secrets.token_urlsafe(16)
        sheet, samples = folder / "pictures.png", folder / "pictures.npz"
        save_sheet(sheet, made.images, columns)
        arrays = {"arr_0": to_pixels(made.images)} | ({} if made.labels is None else {"arr_1": made.labels.numpy()})
        write_file(samples, lambda file: np.savez_compressed(file, **arrays))
        self._made.append((time.monotonic(), folder))
        while self._made[0][0] < time.monotonic() - KEPT:
            shutil.rmtree(self._made.pop(0)[1], ignore_errors=True)
        return sheet, samples
