"""Trajectories of the probability-flow ODE, to point at and to walk along."""

from __future__ import annotations

import ipywidgets
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from cmlab import sampling
from cmlab.noise import karras_sigmas
from cmlab.plots import ACCENT, PALETTE, QUIET, tile
from cmlab.streams import randn
from cmlab.widgets.explore import explore, sentence, status, to_device_of
from cmlab.widgets.sketch import Sketch, source
from cmlab.widgets.surface import Surface

SIDE, EDGE = 4.6, 0.12  # inches; the share of the figure that axis labels take, on the left and below
STEPS = 18


class OdeExplorer(ipywidgets.VBox):
    """A cloud of the plane at a noise level, and from any point that is clicked the ways back to the data.

    points (N, 2) are the data; exact and learned are denoisers whose ODEs are walked by Heun's method in 18 steps, model a
    consistency model, whose one jump is drawn. sigma_max: the slider's highest level; limit: the plot's half width.
    """

    def __init__(
        self, points: Tensor, exact, learned, model, sigma_max: float = 2.0, limit: float = 3.0, seed: int = 0
    ):
        self._points = points[:600]
        self._noise = randn(tuple(self._points.shape), torch.Generator().manual_seed(seed))
        self._ways, self._model, self._limit = {"exact": exact, "learned": learned}, model, limit
        self._sketch = self._draw_still()
        self.sigma = ipywidgets.FloatLogSlider(
            value=min(1.0, sigma_max), min=-1.3, max=float(torch.tensor(sigma_max).log10()), step=0.05, description="sigma",
            readout_format=".2f",
        )  # fmt: skip
        self.surface = Surface(
            label="A cloud of noised points. Click, or use the arrow keys, to choose a point to start from.", step=0.02,
            touch=[0.75, 0.3, 0.0],
        )  # fmt: skip
        self.said = sentence()
        super().__init__([self.sigma, self.surface, self.said])
        self.sigma.observe(self._redraw, names="value")
        self.surface.observe(self._redraw, names="touch")
        self._redraw()

    def _draw_still(self) -> Sketch:
        figure = plt.figure(figsize=(SIDE, SIDE), layout="none")
        ax = figure.add_axes((EDGE, EDGE, 1 - EDGE - 0.01, 1 - EDGE - 0.01))
        ax.set(xlim=(-self._limit, self._limit), ylim=(-self._limit, self._limit), xlabel="$x_1$", ylabel="$x_2$")
        ax.scatter(*self._points.T, s=3, color="#D0D0D0", label="data")
        (self._cloud,) = ax.plot([], [], ".", ms=3, color=QUIET, label="data + noise")
        self._lines = {
            name: ax.plot([], [], style, color=color, label=f"{name} ODE")[0]
            for name, style, color in (("exact", "-", PALETTE[1]), ("learned", "--", PALETTE[2]))
        }
        (self._jump,) = ax.plot([], [], "X-", lw=0.8, ms=8, color=ACCENT, label="one jump", markevery=[1])
        (self._start,) = ax.plot([], [], "o", ms=6, color="black", label="start")
        legend = ax.legend(loc="upper left", fontsize=7, frameon=True)
        return Sketch(figure, [self._cloud, *self._lines.values(), self._jump, self._start, legend])

    def picture(self) -> bytes:
        """What is shown now, as PNG bytes."""
        return self._sketch.png()

    def _place(self) -> Tensor:
        """What the pointer points at, in the plot's coordinates (1, 2)."""
        x, y, _ = self.surface.touch
        inside = ((x - EDGE) / (0.99 - EDGE), (1 - y - EDGE) / (0.99 - EDGE))  # y is counted from the top
        return torch.tensor([[(2 * min(max(share, 0), 1) - 1) * self._limit for share in inside]])

    @torch.no_grad()
    def _redraw(self, change=None) -> None:
        sigma, start = self.sigma.value, self._place()
        self._cloud.set_data(*(self._points + sigma * self._noise).T)
        self._start.set_data(*start.T)
        ends = {name: self._walk(name, start, sigma) for name in self._ways}
        end = self._model(to_device_of(self._model, start), sigma).cpu()
        self._jump.set_data(*torch.cat([start, end]).T)
        off = {
            name: float((place - ends["exact"]).norm())
            for name, place in (("learned ODE", ends["learned"]), ("one jump", end))
        }
        text = (
            f"From ({start[0, 0]:.2f}, {start[0, 1]:.2f}) at sigma {sigma:.2f} the exact ODE ends at "
            f"({ends['exact'][0, 0]:.2f}, {ends['exact'][0, 1]:.2f}). "
            + ", ".join(f"{name}: {distance:.2f} off" for name, distance in off.items())
        )
        self.surface.set_trait("alt", text)
        self.surface.source, self.said.value = source(self._sketch.png()), status(text + ".")

    def _walk(self, name: str, start: Tensor, sigma: float) -> Tensor:
        """Draws the way from start (1, 2) at noise level sigma by one of the denoisers; returns its end (1, 2)."""
        denoiser, grid = self._ways[name], karras_sigmas(STEPS, self._model.sigma_min, sigma)
        start = to_device_of(denoiser, start)
        way: list[Tensor] = []
        end = sampling.sample_heun(denoiser, start / sigma, grid, callback=lambda state: way.append(state.x))
        self._lines[name].set_data(*torch.cat([*way, end]).cpu().T)
        return end.cpu()


class ConsistencyViewer(ipywidgets.VBox):
    """One trajectory of a denoiser's ODE from noise (1, C, H, W) to an image, and what both models answer along it.

    The slider walks it. Above: the noisy image, the denoiser's mean and the consistency model's picture at that level; below the
    latter at every level, and as a number how far they lie apart: spread, the root mean square of the answers' deviations from their
    mean, over pixels and levels; wander is the denoiser's. The noisy image is shown divided by sqrt(sigma^2 + 1).
    """

    def __init__(self, denoiser, model, noise: Tensor, labels: Tensor | None = None, steps: int = STEPS):
        grid = karras_sigmas(steps, model.sigma_min, model.sigma_max)
        with torch.no_grad():
            noise, own = to_device_of(denoiser, noise), to_device_of(denoiser, labels)
            states = list(sampling.heun_states(denoiser, noise, grid, own))
            x, levels = torch.cat([s.x for s in states]).cpu(), torch.tensor([s.sigma for s in states])
            everywhere = None if labels is None else labels.expand(len(levels))
            f = model(to_device_of(model, x), levels, to_device_of(model, everywhere)).cpu()
        means = torch.cat([s.denoised for s in states]).cpu()
        self._levels, self._answers = levels, f
        self._rows = {
            "noisy image": x / (levels**2 + 1).sqrt().view(-1, 1, 1, 1), "mean D": means,
            "answer f": f,
        }  # fmt: skip
        self._apart = (f - f[-1:]).flatten(1).square().mean(1).sqrt()
        self.spread = float((f - f.mean(0, keepdim=True)).square().mean().sqrt())
        self.wander = float(means.sub(means.mean(0, keepdim=True)).square().mean().sqrt())
        self._sketch = self._draw_still()
        self.level = ipywidgets.IntSlider(value=steps // 3, min=0, max=steps - 1, description="level")
        caption = "A noisy image, the denoiser's mean and the consistency model's answer along one trajectory."
        super().__init__([explore(self._draw, caption, level=self.level)])

    def _draw_still(self) -> Sketch:
        figure = plt.figure(figsize=(6.4, 3.2), layout="none")
        self._images, self._titles = [], []
        for k, (title, images) in enumerate(self._rows.items()):
            ax = figure.add_axes((0.02 + 0.33 * k, 0.36, 0.3, 0.54))
            self._images.append(ax.imshow(tile(images[:1]).squeeze(), cmap="gray", vmin=0, vmax=255))
            self._titles.append(ax.set_title(title, fontsize=9))
            ax.axis("off")
        strip = figure.add_axes((0.02, 0.02, 0.96, 0.26))
        strip.imshow(tile(self._answers, columns=len(self._answers), gap=1).squeeze(), cmap="gray", vmin=0, vmax=255)
        strip.set_title("f at every level of the trajectory, from noise to image", fontsize=8)
        strip.axis("off")
        width, height = self._answers.shape[-1], self._answers.shape[-2]
        self._frame = strip.add_patch(plt.Rectangle((0, -0.5), width, height, fill=False, ec=ACCENT, lw=2))
        return Sketch(figure, [*self._images, self._titles[0], self._frame])

    def picture(self) -> bytes:
        """What is shown now, as PNG bytes."""
        return self._sketch.png()

    def _draw(self, level: int) -> tuple[bytes, str]:
        sigma = float(self._levels[level])
        for artist, images in zip(self._images, self._rows.values(), strict=True):
            artist.set_data(tile(images[level : level + 1]).squeeze())
        self._titles[0].set_text(f"noisy image, σ = {sigma:.3g}")
        self._frame.set_x(level * (self._answers.shape[-1] + 1) - 0.5)
        text = (
            f"At sigma {sigma:.3g} the answer is {float(self._apart[level]):.3f} from the one at the end; "
            f"all answers of the trajectory spread by {self.spread:.3f}."
        )
        return self._sketch.png(), text
