"""Pictures that come from a browser or a program: nothing about them is believed."""

from __future__ import annotations

from pathlib import Path

import gradio
import numpy as np
from PIL import Image
from torch import Tensor

from cmlab.pictures import fitted
from cmlab.plots import to_pixels
from cmlab.sources import picture

LARGEST_BYTES, LARGEST_PIXELS = 10 * 2**20, 25_000_000
LARGEST_SIDE, MOST_LAYERS = 1024, 4  # of what is kept of a picture
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow knows others, among them one that runs a program
EMPTY = {"background": None, "layers": [], "composite": None}  # a canvas on which there is nothing
SIDE = 320  # screen pixels of the canvas
COLOURS = ["#ffffff", "#000000", "#e4572e", "#2e86ab", "#3fa34d", "#f2c14e"]


def decode(data: bytes) -> Image.Image:
    """The picture in an upload, RGBA and upright. Raises ValueError for what is none, damaged, or too large to be decoded safely."""
    if len(data) > LARGEST_BYTES:
        raise ValueError(f"the picture has {len(data) / 2**20:.1f} MB; {LARGEST_BYTES >> 20} MB are accepted at most")
    try:
        return picture(data, LARGEST_PIXELS, FORMATS, alpha=True)
    except ValueError as error:
        if "DecompressionBomb" in str(error):
            raise ValueError(f"the picture has too many pixels; {LARGEST_PIXELS:,} are accepted at most") from error
        if str(error).startswith("no picture"):
            raise ValueError(f"this is no picture ({', '.join(FORMATS)}), or it is damaged") from error
        raise


def canvas(value: dict, **options) -> gradio.ImageEditor:
    """gradio's picture to upload, paint on and erase, which is read by our rules: see read_upload.

    An update of the component would bring gradio's own back: hide what is around it instead.
    """
    editor = gradio.ImageEditor(
        value, type="pil", image_mode="RGBA", sources=("upload", "clipboard"), transforms=(), layers=False, height=420,
        brush=gradio.Brush(default_size=40, colors=COLOURS), **options,
    )  # fmt: skip
    editor.preprocess = read_upload  # a subclass would make gradio write a stub file into the package
    editor.accept_blobs = None  # another way in, which the page does not use and which keeps what it is given
    return editor


def read_upload(payload) -> dict | None:
    """What the page or a program sends for a canvas: {"background": RGBA or None, "layers": [RGBA, …]}.

    Pictures of more than LARGEST_SIDE pixels a side are shrunk at once. Raises gradio.Error for what is no picture, and for many layers.
    """
    if payload is None:
        return None
    try:
        if payload.id is not None or len(payload.layers) > MOST_LAYERS:
            raise ValueError(f"a canvas has {MOST_LAYERS} layers of paint at most, and no id")
        return {"background": _shrunk(payload.background), "layers": [_shrunk(layer) for layer in payload.layers]}
    except (ValueError, OSError) as error:
        raise gradio.Error(str(error), print_exception=False) from error


def _shrunk(file) -> Image.Image | None:
    if file is None:
        return None
    image = decode(Path(file.path).read_bytes())
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image


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
        return EMPTY | {"background": Image.new("RGB", (SIDE, SIDE))}
    pixels = Image.fromarray(to_pixels(image[None])[0].squeeze()).convert("RGB")
    return EMPTY | {"background": pixels.resize((SIDE, SIDE), Image.Resampling.NEAREST)}
