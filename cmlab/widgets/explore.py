"""Controls over one picture."""

from __future__ import annotations

import html
from collections.abc import Callable

import ipywidgets
import matplotlib.figure
import torch
from torch import Tensor

from cmlab.plots import png
from cmlab.widgets.sketch import source


def explore(draw: Callable, caption: str, **controls):
    """A column of ipywidgets controls over a picture: draw(**values) is called whenever one changes.

    draw returns a matplotlib figure, or PNG bytes and a sentence on what they show. The picture is an <img> with the caption (and
    the sentence) as alternative text; the sentence stands below it, where screen readers announce a change.
    """
    picture, said = ipywidgets.HTML(), sentence()

    def redraw(change=None) -> None:
        drawn = draw(**{name: control.value for name, control in controls.items()})
        data, text = (png(drawn), "") if isinstance(drawn, matplotlib.figure.Figure) else drawn
        picture.value, said.value = image(data, f"{caption} {text}".strip()), status(text)

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*controls.values(), picture, said])


def to_device_of(model, x: Tensor | None) -> Tensor | None:
    """x, or None, where a model computes; an exact denoiser, which has no parameters, takes it where it is."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    device = next((parameter.device for parameter in parameters), None)
    return x if x is None or device is None else x.to(device)


def image(data: bytes, alt: str) -> str:
    """PNG bytes as an <img> that carries them."""
    return f'<img alt="{html.escape(alt)}" src="{source(data)}">'


def sentence(text: str = "") -> ipywidgets.HTML:
    """The line below a picture that says what it shows."""
    return ipywidgets.HTML(status(text))


def status(text: str) -> str:
    """Text that screen readers announce when it changes."""
    return f'<p role="status" aria-live="polite" style="margin: 0">{html.escape(text)}</p>' if text else ""
