"""Where pictures come from before they are a data set: folders, tars (also tars in tars), LSUN's LMDBs, the Hugging Face hub.

A source knows its pictures by items that are cheap to list and to send to another process, and reads one of them as the bytes
of a picture file. Archives are read where they are: nothing is unpacked, so no member can land anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cmlab.checks import known

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class Item(NamedTuple):
    """One picture: what to call it, its class by name (None: the source has no classes), and where its source finds it."""

    name: str
    label: str | None
    place: Any


class Listed:
    """What all sources share."""

    def classes(self, items: list[Item]) -> list[str]:
        """The names of the classes, in the order of their numbers; none for a source without."""
        return sorted({item.label for item in items} - {None})

    @property
    def address(self) -> str:
        """The source by its full name, the same from wherever it is called: an absolute path without links, or a hub id."""
        return str(self.path)

    def size(self, place: Any) -> int | None:
        """How many bytes a picture file has, where that is known without reading it."""
        return None

    def digest(self, items: list[Item]) -> str:
        """A SHA-256 that changes with the items: with their order, a name, a class or a size."""
        running = hashlib.sha256()
        for item in items:
            running.update(json.dumps([item.name, item.label, self.size(item.place)]).encode())
        return running.hexdigest()


def _hidden(path: PurePath) -> bool:
    """Whether a path lies in what file managers and archivers keep for themselves: .git, ._1.png, __MACOSX."""
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in path.parts)


def _is_picture(path: PurePath) -> bool:
    return path.suffix.lower() in PICTURES and not _hidden(path)


def _classes_of(paths: list[PurePath]) -> list[str | None]:
    """The class of every picture: its first folder after those that all share. None for all, if none has such a folder.

    Raises ValueError if some have one and some have none.
    """
    folders = [path.parts[:-1] for path in paths]
    shared = len(os.path.commonprefix(folders))  # of the parts
    labels = [folder[shared] if len(folder) > shared else None for folder in folders]
    _all_or_none(paths, labels)
    return labels


def _all_or_none(paths: list, labels: list[str | None]) -> None:
    loose = [path for path, label in zip(paths, labels, strict=True) if label is None]
    if 0 < len(loose) < len(labels):
        other = next(path for path, label in zip(paths, labels, strict=True) if label is not None)
        raise ValueError(
            f"{loose[0]} lies in no class, while {other} and others do: move it into a folder of its class, or all out of theirs"
        )


@dataclass
class Folder(Listed):
    """Picture files below a folder, in the order of their paths, with the classes that their folders tell (_classes_of)."""

    path: Path

    def items(self) -> list[Item]:
        """Every picture file."""
        below = sorted(file.relative_to(self.path) for file in self.path.rglob("*"))
        files = [file for file in below if _is_picture(file) and (self.path / file).is_file()]
        return [Item(str(file), label, str(file)) for file, label in zip(files, _classes_of(files), strict=True)]

    def read(self, place: str) -> bytes:
        """The bytes of one file."""
        return (self.path / place).read_bytes()

    def size(self, place: str) -> int:
        """The size of one file."""
        return (self.path / place).stat().st_size


@dataclass
class Tar(Listed):
    """Pictures in an uncompressed tar, or in tars inside it (ImageNet's training set: one a class, named by its WordNet id).

    The class is the inner tar's name, or else what the folders tell, as in a Folder.
    """

    path: Path
    _file: Any = field(default=None, repr=False, compare=False)

    def items(self) -> list[Item]:
        """Every picture, sorted by name; each with the place of its bytes in the file."""
        found = sorted(self._walk(self.path.open("rb"), 0, None), key=lambda item: (item.name, item.place))
        names, labels = [PurePosixPath(item.name) for item in found], [item.label for item in found]
        if any(labels):
            _all_or_none(names, labels)
            return found
        return [item._replace(label=label) for item, label in zip(found, _classes_of(names), strict=True)]

    def _walk(self, file, offset: int, label: str | None) -> Iterator[Item]:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    start, path = offset + member.offset_data, PurePosixPath(member.name)
                    if path.suffix == ".tar" and not _hidden(path):
                        yield from self._walk(tar.extractfile(member), start, path.stem)
                    elif _is_picture(path):
                        yield Item(member.name, label, (start, member.size))
        except tarfile.TarError as error:
            raise ValueError(f"{self.path} is cut off or is no uncompressed tar ({error})") from error

    def read(self, place: tuple[int, int]) -> bytes:
        """The bytes at one place."""
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(place[0])
        return self._file.read(place[1])

    def size(self, place: tuple[int, int]) -> int:
        """The size of one member."""
        return place[1]

    def __getstate__(self):
        return {"path": self.path, "_file": None}  # every process opens its own


@dataclass
class Lmdb(Listed):
    """The pictures of a folder with data.mdb, as LSUN has them: every value is a picture file."""

    path: Path
    _transaction: Any = field(default=None, repr=False, compare=False)

    def items(self) -> list[Item]:
        """Every key, in the order of the keys."""
        with self._open().begin() as transaction:
            return [Item(key.decode("latin-1"), None, key) for key in transaction.cursor().iternext(values=False)]

    def _open(self):
        import lmdb

        try:
            return lmdb.open(str(self.path), readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise ValueError(f"{self.path} is cut off or is no LMDB ({error})") from error

    def read(self, place: bytes) -> bytes:
        """The value of one key."""
        if self._transaction is None:
            self._transaction = self._open().begin()
        return self._transaction.get(place)

    def __getstate__(self):
        return {"path": self.path, "_transaction": None}


@dataclass
class Hub(Listed):
    """The pictures of a data set of the Hugging Face hub, or of one that `datasets` has saved: rows with an image, perhaps a label."""

    name: str
    split: str = "train"
    _rows: Any = field(default=None, repr=False, compare=False)

    @property
    def address(self) -> str:
        """The id, or the folder of a saved data set."""
        return self.name

    def items(self) -> list[Item]:
        """Every row."""
        rows, names = self._load(), self.classes([])
        if not names:
            return [Item(str(k), None, k) for k in range(len(rows))]
        labels = rows[self._column("ClassLabel")]
        return [Item(str(k), self._class(names, k, label), k) for k, label in enumerate(labels)]

    def _class(self, names: list[str], row: int, label: int | None) -> str:
        if label is None or not 0 <= label < len(names):
            raise ValueError(
                f"row {row} of the split {self.split!r} of {self.name} has the label {label}, not one of 0 … {len(names) - 1}: "
                "the split is unlabelled; choose another"
            )
        return names[label]

    def classes(self, items: list[Item]) -> list[str]:
        """The names that the data set gives its classes, in its own order."""
        column = self._column("ClassLabel", self._load())
        return list(self._load().features[column].names) if column else []

    def _load(self):
        if self._rows is None:
            import datasets

            rows = self._saved() if Path(self.name).is_dir() else self._fetched()
            self._rows = rows.cast_column(self._column("Image", rows), datasets.Image(decode=False))
        return self._rows

    def _saved(self):
        import datasets

        loaded = datasets.load_from_disk(self.name)
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        return loaded[known(f"split of {self.name}", self.split, loaded)]

    def _fetched(self):
        import datasets

        try:
            return datasets.load_dataset(self.name, split=self.split)
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            raise ValueError(f"no such folder here: {self.name}; nor does the hub give it: {error}") from error

    def _column(self, kind: str, rows=None) -> str | None:
        rows = self._rows if rows is None else rows
        found = [name for name, feature in rows.features.items() if type(feature).__name__ == kind]
        if not found and kind == "Image":
            raise ValueError(f"{self.name} has no column of images, only {', '.join(rows.features)}")
        return found[0] if found else None

    def read(self, place: int) -> bytes:
        """The bytes of one row's picture."""
        cell = self._load()[place][self._column("Image")]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def __getstate__(self):
        return {"name": self.name, "split": self.split, "_rows": None}


Source = Folder | Tar | Lmdb | Hub


def find_source(name: str | Path, split: str = "train") -> Source:
    """What a name stands for: a folder of pictures, of an LMDB or of a saved data set, a .tar, or an id of the hub.

    Only owner/name, in the characters that the hub allows, is tried as an id. Raises ValueError for a path that is none of them.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".tar":
            return Tar(path.resolve())
        raise ValueError(f"{path} is no source of pictures: give a folder, an LMDB, an uncompressed .tar or a hub id")
    if path.is_dir():
        if (path / "data.mdb").is_file():
            return Lmdb(path.resolve())
        saved = any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))
        return Hub(str(path.resolve()), split) if saved else Folder(path.resolve())
    if HUB_ID.fullmatch(str(name)):
        return Hub(str(name), split)
    raise ValueError(f"no such folder, .tar or hub data set: {name}")


def _tried(read: Callable) -> Any:
    try:
        return read()
    except Exception as error:  # of a damaged file, anything
        unknown = isinstance(error, UnidentifiedImageError)  # its text names a buffer of ours
        what = "no form of picture that is known" if unknown else f"{type(error).__name__}: {error}"
        raise ValueError(f"no picture: {what}") from error


def picture(
    data: bytes, most: int | None = None, formats: tuple[str, ...] | None = None, alpha: bool = False
) -> Image.Image:
    """The image, RGB or grey (L), that the bytes of a picture file hold, upright: turned as its EXIF note says.

    Transparency is dropped, or with alpha kept: RGBA. formats: those to try, of Pillow's names; all without it. Raises ValueError for
    bytes that hold no picture, or one of more than `most` pixels, which is not decoded.
    """
    image = _tried(lambda: Image.open(io.BytesIO(data), formats=formats))
    if most is not None and image.width * image.height > most:
        raise ValueError(f"the picture has {image.width} x {image.height} pixels; {most:,} are accepted at most")
    _tried(image.load)
    with contextlib.suppress(Exception):  # a damaged note: the picture as it is stored
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if alpha:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
