"""Downloads that survive: resumed after a cut (HTTP ranges), checked, safe beside each other, never half a file under its name."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock
from tqdm.auto import tqdm

from cmlab.files import write_text

CHUNK = 1 << 20  # bytes
SILENCE = 30  # seconds without a byte, then the connection counts as cut
PATIENCE = 5  # connections in a row that bring nothing
PAUSE = 1.0  # seconds before the second of them, doubled from one to the next
CUT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class DownloadError(OSError):
    """A file could not be fetched. What has arrived is kept: the next try goes on from there."""


def download(url: str, path: str | Path, sha256: str | None = None, progress: bool = True) -> Path:
    """Fetches url to path and returns the path; a file that is there already is only checked.

    What has arrived stands beside it as <name>.part until it is whole: a cut, Ctrl-C or a full disk costs nothing but the
    rest. sha256 is the expected digest, or its first digits. Without it the digest of the first download is recorded in
    <name>.sha256 (`sha256sum -c` reads it), and a later file must have it too. Of several processes that ask for the same
    file one fetches it and the others wait.
    Raises DownloadError if the address does not give the file or the disk does not take it, ValueError if the digest is
    another than expected (such a file is not kept), or if a recorded one cannot be read.
    """
    path = Path(path).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            expected = _expected(path, sha256)  # before hours of fetching
            if path.exists():
                _check(url, path, path, *expected)
                return path
            _fetch(url, path, progress)
            _check(url, _part(path), path, *expected)
            os.replace(_part(path), path)
            _tag(path).unlink(missing_ok=True)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(f"{path} cannot be written ({error}); what has arrived of {url} is kept") from error
    return path


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    running = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            running.update(chunk)
    return running.hexdigest()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _tag(path: Path) -> Path:
    """Holds the server's name for the version of the file that <name>.part is of."""
    return path.with_name(f".{path.name}.tag")


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch(url: str, path: Path, progress: bool) -> None:
    """Brings <name>.part to its full length, however many connections that takes."""
    failures, answered = 0, False
    while True:
        before = _length(_part(path))
        try:
            return _stream(url, path, progress)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is not shorter than the file
                if error.headers.get("Content-Range") == f"bytes */{before}":
                    return None  # it is the whole file
                _part(path).unlink()
            elif error.code < 500 and error.code not in (408, 429):
                raise DownloadError(f"{url} answered {error.code} {error.reason}") from error
            answered, reason = True, error
        except CUT as error:
            answered, reason = answered or not isinstance(error, urllib.error.URLError), error
        arrived = _length(_part(path))
        failures = 0 if arrived > before else failures + 1
        if failures >= (PATIENCE if answered else 1):
            raise DownloadError(f"{url} does not answer ({reason}); {arrived:,} bytes have arrived and are kept")
        time.sleep(PAUSE * (2**failures - 1))


def _stream(url: str, path: Path, progress: bool) -> None:
    """One connection: adds to <name>.part what it brings. Raises ConnectionError if it ends early."""
    part, have = _part(path), _length(_part(path))
    with urllib.request.urlopen(_request(url, path, have), timeout=SILENCE) as answer:
        if answer.status != 206:  # another version of the file, or a server that cannot resume: from the start
            have = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        _enough_room(path, 0 if total is None else total - have)
        _tag(path).write_text(_version(answer.headers))
        bar = tqdm(
            desc=path.name,
            initial=have,
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not progress,
        )
        with open(part, "ab" if have else "wb") as file, bar:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _length(part) < total:
        raise ConnectionError(f"the connection ended after {_length(part):,} of {total:,} bytes")


def _request(url: str, path: Path, have: int) -> urllib.request.Request:
    headers = {"Accept-Encoding": "identity", "User-Agent": "cmlab"}
    if have:
        headers["Range"] = f"bytes={have}-"
        version = _tag(path).read_text() if _tag(path).exists() else ""
        if version:
            headers["If-Range"] = version  # a server with another version sends the whole of it
    return urllib.request.Request(url, headers=headers)


def _version(headers) -> str:
    tag = headers.get("ETag") or ""
    return headers.get("Last-Modified") or "" if tag.startswith("W/") or not tag else tag  # weak ones do not resume


def _enough_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise DownloadError(
            f"the disk is full: {path.name} needs {needed / 2**20:,.0f} MB more, {path.parent} has {free / 2**20:,.0f} MB free"
        )


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _expected(path: Path, sha256: str | None) -> tuple[str | None, str]:
    """The digest that the file must have, None if that is not known yet; and where it is from."""
    record = _record(path)
    if sha256 is None and record.exists():
        return _recorded(record), f"recorded in {record} when it was first fetched"
    return sha256, "expected"


def _check(url: str, file: Path, path: Path, sha256: str | None, source: str) -> None:
    """Compares with the expected digest, or records it. A wrong download is removed, a wrong file is not."""
    found = digest(file)
    if sha256 is None:
        write_text(_record(path), f"{found}  {path.name}\n")
    elif not found.startswith(sha256):
        if file != path:
            file.unlink()
        place = f"what {url} gives" if file != path else f"{path} (from {url})"
        raise ValueError(f"{place} is damaged or another file: its SHA-256 is {found}, {source}: {sha256}")


def _recorded(path: Path) -> str:
    """The digest in a file that a first download left. Raises ValueError for one without."""
    try:
        found = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); remove it to record the digest again") from error
    if not re.match(rb"[0-9a-f]{64}\s", found):
        raise ValueError(
            f"{path} holds {found[:80]!r}, not a SHA-256 in 64 hexadecimal digits; remove it to record the digest again"
        )
    return found[:64].decode()
