"""Live controls for the lessons: sliders beside a picture that follows them."""

from __future__ import annotations

from collections.abc import Callable

from cmlab.plots import img_tag


def explore(draw: Callable, caption: str, **controls):
    """A column of ipywidgets controls over a figure: draw(**values) -> matplotlib figure is called whenever one changes.

    The picture is an <img> with the caption as alternative text; nothing is kept outside the widget that is returned.
    """
    import ipywidgets

    picture = ipywidgets.HTML()

    def redraw(change=None) -> None:
        picture.value = img_tag(draw(**{name: control.value for name, control in controls.items()}), caption)

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*controls.values(), picture])
