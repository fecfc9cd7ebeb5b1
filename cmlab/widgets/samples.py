"""Pictures that models draw while one watches: a mask to paint, a sampler to play with."""

from __future__ import annotations

import ipywidgets
import numpy as np
import torch
from torch import Tensor

from cmlab import editing, sampling
from cmlab.noise import karras_sigmas
from cmlab.plots import tile
from cmlab.scaling import ConsistencyModel
from cmlab.streams import randn
from cmlab.widgets.explore import explore, image, sentence, status, to_device_of
from cmlab.widgets.sketch import encoded, source
from cmlab.widgets.surface import Surface

ZOOM = 14  # screen pixels a pixel of the picture that is painted on


def enlarged(images: Tensor, zoom: int, columns: int = 8) -> bytes:
    """Images (N, C, H, W) in [-1, 1] in rows, every pixel a square, as PNG bytes."""
    sheet = tile(images, columns)
    return encoded(np.repeat(np.repeat(np.broadcast_to(sheet, (*sheet.shape[:2], 3)), zoom, 0), zoom, 1))


class MaskPainter(ipywidgets.VBox):
    """Paint away part of a picture and see it repaired: inpainting with a mask of one's own (Song et al. 2023, algorithm 4).

    pictures (N, C, H, W) are those to choose from. What is painted over is unknown to the model; six repairs are drawn beside it,
    with as many network calls as the slider says, at Karras levels.
    """

    def __init__(self, model, pictures: Tensor, repairs: int = 6, brush: int = 3, calls: int = 9, seed: int = 0):
        self._model, self._pictures, self._repairs, self._brush = model, pictures, repairs, brush
        height, width = pictures.shape[-2:]
        self.mask = torch.ones(height, width)  # 1: known, 0: to fill in
        self._last = (0.0, height // 2, width // 2)  # stroke, row, column
        self.choice = ipywidgets.IntSlider(value=0, min=0, max=len(pictures) - 1, description="picture")
        self.calls = ipywidgets.IntSlider(value=calls, min=1, max=17, description="calls")
        self.seed = ipywidgets.IntSlider(value=seed, min=0, max=max(20, seed), description="seed")
        self.clear = ipywidgets.Button(description="clear mask", tooltip="Make the whole picture known again")
        self.surface = Surface(
            label="The picture to paint on. Drag to paint over it; arrow keys move the brush, space paints.",
            step=1 / width,
        )
        self.repaired, self.said = ipywidgets.HTML(), sentence()
        row = ipywidgets.HBox([self.surface, self.repaired], layout=ipywidgets.Layout(align_items="center"))
        super().__init__([self.choice, self.calls, self.seed, self.clear, row, self.said])
        for control in (self.choice, self.calls, self.seed):
            control.observe(self._redraw, names="value")
        self.surface.on_mark(self._mark)
        self.surface.observe(self._touched, names="touch")
        self.clear.on_click(self._cleared)
        self._redraw()

    def paint(self, top: int, bottom: int, left: int, right: int) -> None:
        """Paints over the rows top … bottom - 1 and the columns left … right - 1."""
        self.mask[top:bottom, left:right] = 0
        self._redraw()

    def picture(self) -> bytes:
        """The painted picture and its repairs in a row, as PNG bytes."""
        return enlarged(torch.cat([self._seen, self._repaired]), ZOOM // 2)

    def _cleared(self, button=None) -> None:
        self.mask.fill_(1)
        self._redraw()

    def _touched(self, change) -> None:
        self._mark(*change["new"])
        self._redraw()

    def _mark(self, x: float, y: float, stroke: float) -> None:
        height, width = self.mask.shape
        row, column = int(y * height), int(x * width)
        if stroke:
            # a fast pointer skips pixels: paint the line from where this stroke was before
            before = self._last[1:] if self._last[0] == stroke else (row, column)
            for share in np.linspace(0, 1, 1 + max(abs(row - before[0]), abs(column - before[1]))):
                self._paint(*(round(a + share * (b - a)) for a, b in zip(before, (row, column), strict=True)))
        self._last = (stroke, row, column)

    def _paint(self, row: int, column: int) -> None:
        low, high = self._brush // 2, self._brush - self._brush // 2
        self.mask[max(row - low, 0) : row + high, max(column - low, 0) : column + high] = 0

    @torch.no_grad()
    def _redraw(self, change=None) -> None:
        picture = to_device_of(self._model, self._pictures[self.choice.value : self.choice.value + 1])
        task, calls = editing.Inpaint(to_device_of(self._model, self.mask.clone())), self.calls.value
        measured = task.measure(picture)
        levels = karras_sigmas(calls + 1, self._model.sigma_min, self._model.sigma_max)[:-1]
        repairs = editing.edit(
            self._model, task, measured.expand(self._repairs, -1, -1, -1), levels,
            generator=torch.Generator().manual_seed(self.seed.value),
        ).cpu()  # fmt: skip
        hidden = float((self.mask == 0).float().mean())
        there = (repairs - repairs.mean(0))[..., self.mask == 0]
        differ = float(there.square().mean().sqrt()) if hidden else 0.0
        cost = f"{calls} network call{'s' * (calls != 1)} each"
        text = f"{hidden:.0%} painted over; {self._repairs} repairs with {cost}, which differ by {differ:.2f} there."
        self.surface.set_trait("alt", f"The picture, {hidden:.0%} of it painted over.")
        self._seen, self._repaired = self._masked(measured.cpu()), repairs
        self.surface.source = source(enlarged(self._seen, ZOOM))
        self.repaired.value = image(enlarged(repairs, ZOOM // 2, columns=3), text)
        self.said.value = status(text)

    def _masked(self, measured: Tensor) -> Tensor:
        """What the model is told, in colours, the unknown in mid-grey, with the brush as a brighter pixel."""
        seen = torch.where(self.mask == 1, measured, torch.zeros(()))
        _, row, column = self._last
        seen[..., min(row, seen.shape[-2] - 1), min(column, seen.shape[-1] - 1)] += 0.6
        return seen.clamp(-1, 1)


class SamplerPlayground(ipywidgets.VBox):
    """One batch of noise through any sampler: models = {name: Denoiser or ConsistencyModel}, all of one shape.

    Consistency models sample by Algorithm 1, with a second call (at the level of the slider) from two calls on; denoisers by Heun's
    method. After the second call each level is half the last. labels (n,) where the models are conditional. most: the slider's
    highest number of steps, for every model: a denoiser's calls take time.
    """

    def __init__(
        self,
        models: dict,
        shape: tuple[int, ...],
        labels: Tensor | None = None,
        count: int = 4,
        most: int = 4,
        seed: int = 0,
    ):
        self._models, self._shape, self._labels, self._count = models, tuple(shape), labels, count
        top = max(model.sigma_max for model in models.values())
        self.model = ipywidgets.Dropdown(options=list(models), description="model")
        self.steps = ipywidgets.IntSlider(value=1, min=1, max=most, description="steps")
        self.level = ipywidgets.FloatLogSlider(
            value=top / 40,
            min=-2,
            max=float(np.log10(top / 2)),
            step=0.1,
            description="2nd level",
            readout_format=".2f",
        )
        self.seed = ipywidgets.IntSlider(value=seed, min=0, max=max(50, seed), description="seed")
        controls = dict(name=self.model, steps=self.steps, level=self.level, seed=self.seed)
        super().__init__([explore(self._draw, "Samples of the chosen model.", **controls)])

    def picture(self) -> bytes:
        """What is shown now, as PNG bytes."""
        return self._draw(self.model.value, self.steps.value, self.level.value, self.seed.value)[0]

    @torch.no_grad()
    def _draw(self, name: str, steps: int, level: float, seed: int) -> tuple[bytes, str]:
        model, generator = self._models[name], torch.Generator().manual_seed(seed)
        noise = to_device_of(model, randn((self._count, *self._shape), generator))
        labels = to_device_of(model, self._labels)
        if isinstance(model, ConsistencyModel):
            levels = self._levels(model, steps, level)
            images = sampling.sample_multistep(model, noise, levels, labels, generator=generator, clip_denoised=True)
            calls, how = len(levels), "at sigma " + ", ".join(f"{v:.3g}" for v in levels)
        else:
            grid = karras_sigmas(steps, model.sigma_min, model.sigma_max)
            images = sampling.sample_heun(model, noise, grid, labels, clip_denoised=True)
            calls, how = 2 * steps - 1, f"in {steps} Heun step{'s' * (steps > 1)}"
        zoom = max(1, 512 // (self._count * self._shape[-1]))
        return enlarged(images.cpu(), zoom), f"{name}: {calls} network call{'s' * (calls > 1)} a picture, {how}."

    @staticmethod
    def _levels(model, steps: int, level: float) -> list[float]:
        """sigma_max, the chosen level, and from there on halved for every further call."""
        later = [level * 0.5**k for k in range(steps - 1)]
        return [model.sigma_max, *(v for v in later if model.sigma_min < v < model.sigma_max)]
