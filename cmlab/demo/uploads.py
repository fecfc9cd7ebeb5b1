"""Pictures that come from a browser or a program: nothing about them is believed."""

from __future__ import annotations

from pathlib import Path

import gradio
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmlab.pictures import fitted
from cmlab.sources import picture

LARGEST_BYTES, LARGEST_PIXELS = 10 * 2**20, 25_000_000
EMPTY = {"background": None, "layers": [], "composite": None}  # a canvas on which there is nothing
SIDE = 320  # screen pixels of the canvas
COLOURS = ["#ffffff", "#000000", "#e4572e", "#2e86ab", "#3fa34d", "#f2c14e"]


def decode(data: bytes) -> Image.Image:
    """The picture in an upload, RGBA and upright. Raises ValueError for what is none, damaged, or too large to be decoded safely."""
    if len(data) > LARGEST_BYTES:
        raise ValueError(f"the picture has {len(data) / 2**20:.1f} MB; {LARGEST_BYTES >> 20} MB are accepted at most")
    try:
        return picture(data, LARGEST_PIXELS, alpha=True)
    except ValueError as error:
        if str(error).startswith("no picture"):
            raise ValueError("this is no picture (PNG, JPEG, WebP, GIF, BMP, TIFF), or it is damaged") from error
        raise


def canvas(value: dict, **options) -> gradio.ImageEditor:
    """gradio's picture to upload, paint on and erase, which decodes by our rules. Its value: background, layers, composite."""
    editor = gradio.ImageEditor(
        value, type="pil", image_mode="RGBA", sources=("upload", "clipboard"), transforms=(), layers=False, height=420,
        brush=gradio.Brush(default_size=40, colors=COLOURS), **options,
    )  # fmt: skip
    editor.convert_and_format_image = _of_canvas  # a subclass would make gradio write a stub file into the package
    return editor


def _of_canvas(file, flatten_on_white: bool = False) -> Image.Image | None:
    """One of a canvas's pictures, RGBA; None where there is none. Raises gradio.Error for what is no picture."""
    if file is None:
        return None
    try:
        return decode(file if isinstance(file, bytes) else Path(file.path).read_bytes())
    except (ValueError, OSError) as error:
        raise gradio.Error(str(error), print_exception=False) from error


def read_canvas(value: dict | None, shape: tuple[int, int, int], painted_is_mask: bool) -> tuple[Tensor, Tensor | None]:
    """A canvas as a picture (1, C, H, W) in [-1, 1], and a mask (H, W), 0 where paint covers half of a pixel or more.

    Without painted_is_mask the paint is part of the picture, and the mask None. Transparent parts are white. Raises ValueError for an
    empty canvas, for a mask that hides nothing, and for layers of another size.
    """
    background, layers = (value or {}).get("background"), (value or {}).get("layers") or []
    if background is None and not layers:
        raise ValueError("the canvas is empty: upload a picture, take a held-out one, or draw one")
    size = (background or layers[0]).size
    if any(layer.size != size for layer in layers):
        raise ValueError(f"paint of {layers[0].size} pixels does not fit a picture of {size}")
    paint = Image.new("RGBA", size)
    for layer in layers:
        paint = Image.alpha_composite(paint, layer)
    image = Image.alpha_composite(Image.new("RGBA", size, "white"), background or Image.new("RGBA", size))
    if not painted_is_mask:
        image = Image.alpha_composite(image, paint)
    return fitted(image, shape)[None] / 127.5 - 1, _mask(paint, shape) if painted_is_mask else None


def _mask(paint: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    covered = Image.fromarray((np.asarray(paint.getchannel("A")) > 0).astype(np.uint8) * 255)
    mask = (fitted(covered, (1, *shape[1:]))[0] < 127.5).float()
    if mask.all():
        raise ValueError("nothing is painted over: paint on the picture what is to be filled in")
    return mask


def on_canvas(image: Tensor | None) -> dict:
    """A picture (C, H, W) in [-1, 1] as a canvas's new value, enlarged; None: a black one to draw on."""
    if image is None:
        background = Image.new("RGB", (SIDE, SIDE))
    else:
        pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        background = Image.fromarray(pixels.squeeze()).convert("RGB")
        background = background.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return EMPTY | {"background": background}
