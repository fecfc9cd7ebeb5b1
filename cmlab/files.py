"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Calls write(file) on a partial file beside path, then gives it the name: a cut leaves the old one, power lost or not.

    Raises OSError that names the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the previous one's place
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """write_file for text in UTF-8."""
    write_file(path, lambda file: file.write(text.encode()))
