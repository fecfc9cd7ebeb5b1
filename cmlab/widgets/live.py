"""A training to watch while its cell runs, with a button that ends it and keeps the model."""

from __future__ import annotations

import time
from collections.abc import Callable

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from cmlab.plots import ACCENT, draw_images, png, show
from cmlab.recipes import Recipe, get_recipe
from cmlab.training import Record, on_interrupt, train
from cmlab.widgets.explore import image, sentence, status

PAUSE = 0.5  # seconds between two drawings: they cost some 60 ms each


def train_live(
    recipe: Recipe | str, draw: Callable[[object], Tensor] | None = None, looks: int = 10, **options
) -> tuple[Record, list[float]]:
    """Trains a recipe in a notebook cell, which shows the loss and a sheet of samples as it goes; returns the last record and all losses.

    draw(model) -> images (n, C, H, W) is asked at so many looks. The Stop button ends the training after the step at hand, and the last
    record carries the averaged model so far. So does the notebook's interrupt button, where the front end delivers no clicks to a
    kernel that is busy; a second interrupt is one. options go to training.train.
    """
    from IPython.display import display

    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    view = LiveView(recipe)
    display(view)
    reach_while_busy(view.stop)
    look_every = max(1, recipe.iterations // looks) if draw else None
    with on_interrupt(view.stop.click):
        for record in train(recipe, look_every=look_every, stop=view.stopped, **options):
            view.see(record, draw)
    view.settle()
    return record, view.losses


def reach_while_busy(widget: ipywidgets.Widget) -> None:
    """Lets the clicks on a widget come in by the front end's own subshell, beside the cell that is running.

    ipykernel 7.4 leads them to the shell in which the widget was made, and that one waits for the cell to end.
    """
    vars(widget.comm).pop("_reply_subshell_id", None)


class LiveView(ipywidgets.VBox):
    """The loss so far, the newest samples, and the Stop button."""

    def __init__(self, recipe: Recipe):
        self.losses: list[float] = []
        self._first = 1  # the step of the first loss: a resumed training begins later
        self._images, self._drawn, self._stop = None, 0.0, False
        self.stop = ipywidgets.Button(
            description="Stop", tooltip="End this training now and keep the model", icon="stop"
        )
        self.bar = ipywidgets.IntProgress(max=recipe.iterations, description=recipe.name)
        self.picture, self.said = ipywidgets.HTML(), sentence("starting …")
        super().__init__([ipywidgets.HBox([self.bar, self.stop]), self.picture, self.said])
        self.stop.on_click(self._pressed)

    def _pressed(self, button=None) -> None:
        self._stop = True

    def stopped(self) -> bool:
        """Whether the button was pressed."""
        return self._stop

    def see(self, record: Record, draw: Callable | None) -> None:
        """Takes a record in, and draws if something is new to see and the last drawing is a while ago."""
        if not self.losses:
            self._first = record.step
        self.losses.append(record.loss)
        if record.model is not None and draw is not None:
            self._images = draw(record.model)
        last = record.step == record.total or self._stop
        if last or record.model is not None or time.perf_counter() - self._drawn > PAUSE:
            self._redraw(record)
        if last:
            self.stop.disabled = True

    def settle(self) -> None:
        """Leaves the last picture as a static figure, for who reads the notebook without a kernel."""
        self.picture.value = ""
        show(
            self._figure(),
            "The loss of every step, faint, and smoothed" + "; and the newest samples." * (self._images is not None),
        )

    def _redraw(self, record: Record) -> None:
        text = f"Step {record.step} of {record.total}, loss {np.mean(self.losses[-50:]):.4f}, {record.seconds:.0f} s."
        self.bar.value = record.step
        self.picture.value = image(
            png(self._figure()), f"The loss of every step so far, and the newest samples. {text}"
        )
        self.said.value = status(text + " Stopped; the model is kept." * self._stop)
        self._drawn = time.perf_counter()

    def _figure(self):
        figure, axes = plt.subplots(
            1, 1 if self._images is None else 2, figsize=(7, 2.4), squeeze=False, layout="tight"
        )
        steps = self._first + np.arange(len(self.losses))
        axes[0, 0].plot(steps, self.losses, lw=0.6, color=ACCENT, alpha=0.4)
        width = max(1, len(self.losses) // 30)
        smooth = np.convolve(self.losses, np.ones(width) / width, "valid")
        axes[0, 0].plot(steps[width - 1 :], smooth, color=ACCENT)
        positive = min(self.losses) > 0  # an adaptively weighted loss is not
        axes[0, 0].set(xlabel="step", ylabel="loss", yscale="log" if positive else "linear")
        if self._images is not None:
            draw_images(axes[0, 1], self._images, "samples now", columns=8)
        return figure
