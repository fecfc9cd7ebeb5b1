"""Other people's weights: fetched from their address, checked, and read without running code that may be in the file."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch
from torch import Tensor


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
    try:
        weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in weights.values()):
            raise TypeError("something in it is no tensor")
    except Exception as error:  # a foreign file can fail in any way
        raise ValueError(
            f"{path} holds something else than weights, or cannot be read ({type(error).__name__}); none of it was run. "
            f"Remove it and fetch {address} again."
        ) from error
    return weights


def hub_path(address: str) -> Path:
    """Where torch's hub folder keeps the file of an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]


def _fetch(address: str, path: Path, digits: str, need: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), hash_prefix=digits)
    except (OSError, RuntimeError) as error:  # URLError and HTTPError are OSErrors; RuntimeError: not the expected hash
        raise FileNotFoundError(
            f"{need}, which are not in {path.parent} and could not be fetched ({error}). "
            f"Fetch {address} on a machine with internet and put it there."
        ) from error
