"""Files with weights and their configs: read with every error named, and without running code that may be in them."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cmlab.downloads import DownloadError, download


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError for a file that is cut off or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} cannot be read as JSON ({error}); is it cut off?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError for a file that is cut off or of another kind."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or is no safetensors file ({error})") from error


def read_pt(path: Path, source: Path | io.BytesIO | None = None, advice: str = "") -> dict[str, Tensor]:
    """The state dict that torch.save wrote to path (or to source, already read). Code in it is refused, and does not run.

    Raises ValueError, ending in advice, for a file that is cut off or holds anything but named tensors.
    """
    try:
        weights = torch.load(source or path, map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in weights.values()):
            raise TypeError("something in it is no tensor")
    except Exception as error:  # a foreign file can fail in any way
        raise ValueError(
            f"{path} holds something else than weights, or cannot be read ({type(error).__name__}); none of it was run"
            + advice
        ) from error
    return dict(weights)


def weights_at(address: str, need: str) -> dict[str, Tensor]:
    """The state dict at an address, kept in torch's hub folder, whose file name ends in its SHA-256's first digits.

    need begins the message when it is missing: "FID needs Inception's weights". Raises FileNotFoundError if the file is not
    there and cannot be fetched, ValueError if it is damaged, another one, or holds anything but tensors.
    """
    path = hub_path(address)
    digits = path.stem.rpartition("-")[2]
    if not path.exists():
        _fetch(address, path, digits, need)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(digits):
        raise ValueError(
            f"{path} is damaged or another file: its SHA-256 begins with {digest[: len(digits)]}, not {digits}. "
            f"Remove it and fetch {address} again."
        )
    return read_pt(path, io.BytesIO(data), f". Remove it and fetch {address} again.")


def hub_path(address: str) -> Path:
    """Where torch's hub folder keeps the file of an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]


def _fetch(address: str, path: Path, digits: str, need: str) -> None:
    try:
        download(address, path, digits)
    except (DownloadError, ValueError) as error:
        raise FileNotFoundError(
            f"{need}, which are not in {path.parent} and could not be fetched ({error}). "
            f"Fetch {address} on a machine with internet and put it there."
        ) from error
