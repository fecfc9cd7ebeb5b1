"""Figures that follow a slider: what stays is drawn once, what moves is drawn over it. A few milliseconds instead of a hundred."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image


class Sketch:
    """A figure of which only the given artists move. png() shows them where they are now."""

    def __init__(self, figure, moving: Sequence[Artist]):
        self.figure, self.moving = figure, list(moving)
        plt.close(figure)  # pyplot need not keep it
        self._canvas = FigureCanvasAgg(figure)
        for artist in self.moving:
            artist.set_animated(True)
        self._canvas.draw()
        self._still = self._canvas.copy_from_bbox(figure.bbox)

    def png(self) -> bytes:
        """The figure as PNG bytes."""
        self._canvas.restore_region(self._still)
        for artist in self.moving:
            self.figure.draw_artist(artist)
        return encoded(np.asarray(self._canvas.buffer_rgba())[..., :3])


def encoded(pixels: np.ndarray) -> bytes:
    """Pixels (H, W, 3) uint8 as PNG bytes, packed lightly: a slider waits for them."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def source(png: bytes) -> str:
    """PNG bytes as the address of a picture in a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
