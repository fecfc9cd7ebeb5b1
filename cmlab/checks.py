"""Argument checks shared by every room: each raises one exception that names the argument, the value and what is accepted."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


def known(argument: str, value: str, options: Iterable[str]) -> str:
    """Returns value if it is one of the options; otherwise raises ValueError naming the nearest one and all of them."""
    options = list(options)
    if value in options:
        return value
    raise ValueError(unknown(argument, value, options))


def unknown(what: str, value: str, options: Iterable[str]) -> str:
    """The message for a name that is not there, with the nearest that is."""
    options = list(options)
    near = nearest(str(value), options)
    hint = "" if near is None else f" Did you mean {near!r}?"
    return f"unknown {what} {value!r}.{hint} Known: {', '.join(options)}"


def nearest(value: str, options: list[str]) -> str | None:
    """The option that begins so, or has the same letters, or else looks most alike; None if none is near."""
    alike = {o: difflib.SequenceMatcher(None, o, value).ratio() for o in options}
    sure = {o for o in options if value and (o.startswith(value) or sorted(o) == sorted(value))}
    return max((o for o in options if o in sure or alike[o] >= 0.4), key=lambda o: (o in sure, alike[o]), default=None)


def alone(what: str, **others) -> None:
    """Raises ValueError if any option was given beside one that leaves it without effect."""
    given = [name for name, value in others.items() if value not in (None, (), False)]
    if given:
        raise ValueError(f"{what}: leave out {', '.join(given)}, which would have no effect beside it")


def untaken(folder: Path, file: str) -> Path:
    """Returns folder, unless a run keeps its file there: then raises ValueError."""
    if (folder / file).exists():
        raise ValueError(
            f"{folder} holds a run already: go on with it with --resume {folder}, or choose another --output"
        )
    return folder


def whole(argument: str, value: int, least: int = 1) -> int:
    """Returns value if it is an integer >= least; otherwise raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{argument} must be at least {least}, got {value}")
    return int(value)


def within(argument: str, value: float, low: float, high: float) -> float:
    """Returns value if it is a number from low to high; otherwise raises ValueError."""
    if not low <= value <= high:
        raise ValueError(f"{argument} must lie in [{low:g}, {high:g}], got {value}")
    return value


def positive(argument: str, value: float) -> float:
    """Returns value if it is a finite number > 0; otherwise raises ValueError."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{argument} must be a finite number above 0, got {value}")
    return value


def sigma_range(sigma_min: float, sigma_max: float) -> None:
    """Raises ValueError unless 0 < sigma_min <= sigma_max < inf."""
    if not (0 < sigma_min <= sigma_max < math.inf):
        raise ValueError(f"need 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")


def floating(argument: str, x: Tensor) -> Tensor:
    """Returns x if it is a floating-point tensor; otherwise raises TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument} must be a torch tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"{argument} must be a floating-point tensor, got dtype {x.dtype} (images are floats in [-1, 1])"
        )
    return x


def finite(argument: str, x: Tensor) -> Tensor:
    """Returns x if it is floating-point and holds no NaN and no infinity; otherwise raises TypeError or ValueError."""
    floating(argument, x)
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{argument} must be finite, got {bad} NaN or infinite values of {x.numel()}")
    return x


def same_shape(argument: str, x: Tensor, expected: torch.Size | tuple[int, ...]) -> Tensor:
    """Returns x if its shape is as expected; otherwise raises ValueError."""
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{argument} must have shape {tuple(expected)}, got {tuple(x.shape)}")
    return x


def loaded(model):
    """Returns model if it can be called; a name or a path raises TypeError."""
    if not callable(model):
        raise TypeError(f"model must be a model, such as cmlab.load returns, got {model!r}")
    return model


def check_labels(labels: Tensor | None, batch: int, num_classes: int | None) -> None:
    """Raises unless labels fit the network: (batch,) integers in [0, num_classes), or None for an unconditional one.

    The range is looked at on the CPU only: on a GPU it would have to wait for the device, and under torch.compile it
    would break the graph.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError("labels were given to an unconditional network; pass labels=None")
        return
    if labels is None:
        raise ValueError(f"labels are missing: this network is conditional on {num_classes} classes")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch tensor ({batch},) of integers, got {labels!r}")
    if tuple(labels.shape) != (batch,) or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be ({batch},) integers, got shape {tuple(labels.shape)} of {labels.dtype}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(labels.min()), int(labels.max())) if batch else (0, 0)
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must lie in 0 … {num_classes - 1}, got {low if low < 0 else high}")
