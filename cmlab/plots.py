"""Static figures in one style: fixed sizes, a colour-blind palette, a caption under each, alternative text for screen readers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

# Okabe & Ito (2008): told apart by all common kinds of colour vision. The first is the accent.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ACCENT, QUIET = PALETTE[0], "#8A8A8A"
WIDTH = 7.0  # inches: every figure is this wide


def style() -> None:
    """Sets matplotlib up for the series: call once, at the top of a notebook."""
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.0),
            "figure.dpi": 80,
            "savefig.dpi": 80,
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "lines.linewidth": 1.6,
        }
    )


def show(figure, caption: str) -> None:
    """Displays a figure, or PNG bytes, in a notebook with its caption: what to see in it, and the picture's alternative text too."""
    from IPython.display import Image, display

    data = figure if isinstance(figure, bytes) else png(figure)
    display(Image(data, alt=caption, metadata={"alt": caption}))
    print(f"Figure: {caption}")


def png(figure) -> bytes:
    """The figure as PNG bytes; closes it, so that figures do not pile up in memory."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C); values outside are clamped. C is 1 or 3."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return pixels.permute(0, 2, 3, 1).byte().cpu().numpy()


def tile(images: Tensor, columns: int = 10, gap: int = 1) -> np.ndarray:
    """Images (N, C, H, W) as one picture (rows H + gaps, columns W + gaps, C) uint8, on white."""
    pixels = to_pixels(images)
    n, height, width, channels = pixels.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for k, picture in enumerate(pixels):
        top, left = k // columns * (height + gap), k % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def draw_images(axes, images: Tensor, title: str = "", columns: int = 10) -> None:
    """Draws a sheet of images (N, C, H, W) into an axes."""
    sheet = tile(images, columns)
    axes.imshow(sheet.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title)
    axes.axis("off")


def image_rows(rows: dict[str, Tensor], columns: int = 10, height: float = 0.75, titles: Sequence[str] = ()):
    """A figure with one labelled row of images a key: {label: (N, C, H, W)}, and a title above each column. Returns the figure."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(WIDTH, height * len(rows)), squeeze=False)
    for ax, (label, images) in zip(axes[:, 0], rows.items(), strict=True):
        draw_images(ax, images[:columns], columns=columns)
        ax.text(-0.01, 0.5, label, ha="right", va="center", transform=ax.transAxes, fontsize=8)
    for k, title in enumerate(titles):
        place = dict(ha="center", va="bottom", transform=axes[0, 0].transAxes, fontsize=8)
        axes[0, 0].text((k + 0.5) / len(titles), 1.03, title, **place)
    return figure


def sheets(groups: dict[str, Tensor], columns: int = 8, height: float = 2.4):
    """A figure with one titled sheet of images a key, side by side: {title: (N, C, H, W)}. Returns the figure."""
    figure, axes = plt.subplots(1, len(groups), figsize=(WIDTH, height), squeeze=False)
    for ax, (title, images) in zip(axes[0], groups.items(), strict=True):
        draw_images(ax, images, title, columns)
    return figure


def draw_points(
    axes, points: Tensor, title: str = "", color: str = PALETTE[1], limit: float = 1.6, size: float = 3
) -> None:
    """Draws points of the plane (N, 2) into a square axes of the given half width."""
    x, y = points.detach().cpu().T
    axes.scatter(x, y, s=size, color=color, alpha=0.5, linewidths=0)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title, xlabel="$x_1$", ylabel="$x_2$")


def clouds(groups: dict[str, Tensor], colors: Sequence[str] = PALETTE[1:], limit: float = 1.6):
    """A figure with one titled cloud of points a key, side by side: {title: (N, 2)}. Returns the figure."""
    figure, axes = plt.subplots(1, len(groups), figsize=(WIDTH, WIDTH / max(len(groups), 2) + 0.2), squeeze=False)
    for ax, (title, points), color in zip(axes[0], groups.items(), colors, strict=False):
        draw_points(ax, points, title, color, limit)
    return figure


def draw_paths(axes, paths: Iterable[Tensor], color: str = QUIET, label: str | None = None) -> None:
    """Draws trajectories into an axes: paths is a sequence of (N, 2) states, one a noise level."""
    states = np.stack([p.detach().cpu().numpy() for p in paths])  # (levels, N, 2)
    for k in range(states.shape[1]):
        axes.plot(states[:, k, 0], states[:, k, 1], color=color, lw=0.8, alpha=0.8, label=label if k == 0 else None)
