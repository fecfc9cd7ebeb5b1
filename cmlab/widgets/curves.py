"""Curves with a marker that a slider moves: the curricula of a training, and quality against compute."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import ScalarFormatter
from torch import Tensor

from cmlab.plots import ACCENT, PALETTE, tile
from cmlab.widgets.explore import explore
from cmlab.widgets.sketch import Sketch

EDGES = np.linspace(-3, 2, 31)  # of the histogram of noise levels, log10
COLOURS = (PALETTE[1], ACCENT, PALETTE[2])
DRAWN, HIGHEST = 800, 250  # pairs of levels; the histogram's upper end, which a coarse grid's bars pass


def _coloured(argument: str, names: Collection[str]) -> dict[str, str]:
    """A colour for each name. Raises ValueError for none, and for more than there are colours."""
    if not 1 <= len(names) <= len(COLOURS):
        raise ValueError(f"{argument} must be one to {len(COLOURS)}, got {len(names)}")
    return dict(zip(names, COLOURS, strict=False))


class CurriculumViewer(ipywidgets.VBox):
    """What objectives do as training goes: the number of levels N(k), the target's decay mu(k), and the levels that are drawn.

    objectives: {label: objective}, three at most; the slider is the share k/K of the training that is done.
    """

    def __init__(self, objectives: dict, total: int = 1000, seed: int = 0):
        self._objectives, self._total, self._seed = objectives, total, seed
        self._colours = _coloured("objectives", objectives)
        self._sketch = self._draw_still()
        self.progress = ipywidgets.FloatSlider(value=0.3, min=0, max=1, step=0.02, description="k/K")
        caption = "Number of levels, target decay and the noise levels that are drawn, at this point of training."
        super().__init__([explore(self._draw, caption, progress=self.progress)])

    def _draw_still(self) -> Sketch:
        figure = plt.figure(figsize=(7, 2.7), layout="none")
        ax_n, ax_mu, self._ax = (figure.add_axes((left, 0.2, 0.24, 0.68)) for left in (0.07, 0.4, 0.74))
        shares = np.linspace(0, 1, 101)
        steps = [min(int(share * self._total), self._total - 1) for share in shares]
        self._marks, self._hist = [], {}
        for label, aim in self._objectives.items():
            colour = self._colours[label]
            if aim.scales(0, self._total) is not None:
                ax_n.plot(shares, [aim.scales(k, self._total) for k in steps], color=colour, label=label)
            ax_mu.plot(shares, [aim.mu(k, self._total) for k in steps], color=colour, label=label)
            (self._hist[label],) = self._ax.step(
                EDGES[:-1], np.zeros(len(EDGES) - 1), where="post", color=colour, label=label
            )
        for ax, name in ((ax_n, "levels $N(k)$"), (ax_mu, r"decay $\mu(k)$")):
            ax.set(xlabel="share of training $k/K$", title=name)
            self._marks.append(ax.axvline(0, color="black", lw=1, ls=":"))
        ax_n.set_yscale("log", base=2)
        ax_n.yaxis.set_major_formatter(ScalarFormatter())
        ax_mu.set_ylim(-0.03, 1.03)
        self._ax.set(xlabel=r"$\log_{10}$ of the upper level", title=f"pairs drawn, of {DRAWN}", ylim=(0, HIGHEST))
        self._ax.legend(fontsize=7, loc="upper left")
        return Sketch(figure, [*self._marks, *self._hist.values()])

    def picture(self) -> bytes:
        """What is shown now, as PNG bytes."""
        return self._sketch.png()

    def _draw(self, progress: float) -> tuple[bytes, str]:
        step = min(int(progress * self._total), self._total - 1)
        said = []
        for label, aim in self._objectives.items():
            generator = torch.Generator().manual_seed(self._seed)
            high = aim.levels(DRAWN, step, self._total, generator)[0]
            counts, _ = np.histogram(high.log10().numpy(), EDGES)
            self._hist[label].set_ydata(counts)
            n = aim.scales(step, self._total)
            levels = f"{n} levels" if n else "continuous levels"
            said.append(
                f"{label}: {levels}, mu {aim.mu(step, self._total):.2f}, median sigma {float(high.median()):.2g}"
            )
        for mark in self._marks:
            mark.set_xdata([progress, progress])
        return self._sketch.png(), f"At k/K = {progress:.2f} {'; '.join(said)}."


class Point(NamedTuple):
    """A generator's setting: its network calls a picture, its score (lower is better), and some of its pictures (n, C, H, W)."""

    calls: int
    score: float
    images: Tensor


class QualityExplorer(ipywidgets.VBox):
    """Quality against compute: curves = {model: [Point, …]}, three at most; a menu and a slider choose a point and its pictures."""

    def __init__(self, curves: dict[str, list[Point]], score: str = "FD", floor: float | None = None):
        self._curves, self._score = {name: [Point(*p) for p in points] for name, points in curves.items()}, score
        self._floor = floor
        self._sketch = self._draw_still()
        self.model = ipywidgets.Dropdown(options=list(curves), description="model")
        self.setting = ipywidgets.IntSlider(value=0, min=0, description="setting")
        self._limit()
        caption = f"{score} against network calls, and pictures of the chosen setting."
        self.model.observe(self._limit, names="value")  # before the picture follows
        super().__init__([explore(self._draw, caption, name=self.model, setting=self.setting)])

    def _limit(self, change=None) -> None:
        """The slider ends at the chosen model's last setting."""
        self.setting.max = len(self._curves[self.model.value]) - 1

    def _draw_still(self) -> Sketch:
        figure = plt.figure(figsize=(7, 3.0), layout="none")
        ax, self._sheet = figure.add_axes((0.09, 0.17, 0.43, 0.78)), figure.add_axes((0.56, 0.06, 0.43, 0.84))
        colours = _coloured("curves", self._curves)
        for name, points in self._curves.items():
            ax.loglog([p.calls for p in points], [p.score for p in points], "o-", ms=4, color=colours[name], label=name)
        if self._floor is not None:
            ax.axhline(self._floor, color="black", lw=1, ls=":", label="real pictures")
        ax.set(xlabel="network calls a picture", ylabel=self._score)
        ax.legend(fontsize=7)
        (self._mark,) = ax.plot([], [], "o", ms=12, mfc="none", mec="black", mew=1.5)
        first = next(iter(self._curves.values()))[0].images
        self._image = self._sheet.imshow(self._tiled(first), cmap="gray", vmin=0, vmax=255)
        self._title = self._sheet.set_title(" ", fontsize=8)
        self._sheet.axis("off")
        return Sketch(figure, [self._mark, self._image, self._title])

    def picture(self) -> bytes:
        """What is shown now, as PNG bytes."""
        return self._sketch.png()

    @staticmethod
    def _tiled(images: Tensor) -> np.ndarray:
        return tile(images[:40], columns=8).squeeze()

    def _draw(self, name: str, setting: int) -> tuple[bytes, str]:
        point = self._curves[name][setting]
        self._mark.set_data([point.calls], [point.score])
        self._image.set_data(self._tiled(point.images))
        calls = f"{point.calls} network call{'s' * (point.calls > 1)}"
        self._title.set_text(f"{name}, {calls}: {point.score:.3g}")
        text = f"{name}, {calls}: {self._score} {point.score:.3g}"
        return self._sketch.png(), text + "."
