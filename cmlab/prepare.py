"""From pictures as they come to a data set to train on: cropped to one size, one Arrow data set, memory-mapped when read.

The work is cut into shards. A shard that is written is whole, so that a preparation that was stopped goes on with the next one.
What cannot be read as a picture is skipped here, once, counted and listed: training never meets it.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from cmlab.checks import known, whole
from cmlab.files import write_text
from cmlab.sources import Item, Source, find_source, picture

FACTS, PLAN = "prepared.json", "plan.json"
CONTENT = ("pictures", "digest")  # what a plan knows of the pictures themselves
SHARD = 2000  # pictures: a few seconds to minutes of work
MODES = {"rgb": "RGB", "grey": "L"}


def prepare(
    source: str | Path,
    output: str | Path,
    size: int,
    colour: str = "rgb",
    flip: bool = False,
    split: str = "train",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Prepares the pictures of a source (sources.find_source) as a data set in the folder output; returns the folder.

    size       height and width in pixels; every picture is cropped to its middle square and resized as ADM does
    colour     "rgb" or "grey"
    flip       mark the data set as one whose pictures may be mirrored at random in training (photographs, not text)
    split      of a hub data set
    workers    processes; every core without it

    The folder is what datasets.load_from_disk reads: columns image (PNG) and label, where the source has classes; prepared.json
    names the source, the classes and every picture that was skipped. Stopped, it goes on where it was when called again with the
    same arguments. Raises ValueError for a source without pictures or that cannot be read, if output holds another data set or the
    pictures are others than when it was begun, if no picture could be read; OSError if output cannot be written.
    """
    known("colour", colour, MODES)
    output, chosen = Path(output).absolute(), find_source(source, split)
    settings = dict(source=str(source), split=split, size=whole("size", size), colour=colour, flip=flip)
    items = chosen.items()
    if not items:
        raise ValueError(f"no pictures in {source}")
    _begin(output, settings | dict(source=chosen.address, pictures=len(items), digest=chosen.digest(items)))
    if not (output / FACTS).is_file():
        classes = chosen.classes(items)
        skipped = _convert(chosen, items, output, settings, classes, workers or usable_cores(), progress)
        _finish(output, settings, classes, len(items), skipped)
    return output


def _begin(output: Path, plan: dict) -> None:
    """Makes the folder, or checks that it holds this very preparation."""
    path = output / PLAN
    if path.is_file():
        found = json.loads(path.read_text())
        if found != plan and found | {key: plan[key] for key in CONTENT} == plan:
            raise ValueError(
                f"the pictures of {plan['source']} have changed since their preparation in {output} began; "
                "remove that folder, or name another output folder"
            )
        if found != plan:
            raise ValueError(f"{output} holds another data set ({json.dumps(found)}); name another output folder")
    else:
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} holds other files; name a new folder")
        output.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(plan))


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _convert(source: Source, items: list[Item], output: Path, settings: dict, classes, workers, progress) -> list:
    """Writes the shards that are not there yet; returns [(name, reason)] of all that was skipped."""
    shards = [items[k : k + SHARD] for k in range(0, len(items), SHARD)]
    missing = [k for k in range(len(shards)) if not _shard(output, k, len(shards)).is_file()]
    jobs = [
        (source, shards[k], _shard(output, k, len(shards)), settings["size"], settings["colour"], classes)
        for k in missing
    ]
    done = len(items) - sum(len(shards[k]) for k in missing)
    with tqdm(total=len(items), initial=done, unit="picture", disable=not progress) as bar:
        for count in _run(jobs, min(workers, len(jobs))):
            bar.update(count)
    lists = (_shard(output, k, len(shards)).with_suffix(".json") for k in range(len(shards)))
    return [skipped for path in lists for skipped in json.loads(path.read_text())]


def _run(jobs: list[tuple], workers: int) -> Iterator[int]:
    """Does the jobs of write_shard, here or in processes of their own; yields how many pictures each was."""
    if workers <= 1:
        yield from (write_shard(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        for job in as_completed([pool.submit(write_shard, *job) for job in jobs]):
            yield job.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _shard(output: Path, k: int, count: int) -> Path:
    return output / f"data-{k:05d}-of-{count:05d}.arrow"


def write_shard(source: Source, items: list[Item], path: Path, size: int, colour: str, classes: list[str]) -> int:
    """Converts some items of a source into one Arrow file, beside it a list of what was skipped; returns how many items."""
    from datasets.arrow_writer import ArrowWriter

    partial, skipped = path.with_suffix(".partial"), []
    writer = ArrowWriter(path=str(partial), features=_features(classes))
    for item in items:
        try:
            image = crop(picture(source.read(item.place)).convert(MODES[colour]), size)
        except (ValueError, OSError) as error:
            skipped.append((item.name, str(error)))
            continue
        row = {"image": {"bytes": _png(image), "path": None}}
        writer.write(row | ({"label": classes.index(item.label)} if classes else {}))
    writer.finalize()
    write_text(path.with_suffix(".json"), json.dumps(skipped))
    os.replace(partial, path)  # last: a shard that is there is whole
    return len(items)


def crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image at size x size: halved by averaging while it is twice too large, then bicubic.

    As ADM prepares its data (center_crop_arr of Dhariwal & Nichol 2021's code), so that FIDs can be compared.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3, icc_profile=None)  # which would stand in every one of the pictures
    return file.getvalue()


def _features(classes: list[str]):
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    return Features({"image": ImageFeature()} | ({"label": ClassLabel(names=classes)} if classes else {}))


def _finish(output: Path, settings: dict, classes: list[str], pictures: int, skipped: list) -> None:
    """Writes what datasets.load_from_disk wants to see, and last our own facts, which say that all is there."""
    from datasets import DatasetInfo

    if len(skipped) == pictures:
        for path in [*output.glob("data-*-of-*"), output / PLAN]:  # the same call may succeed on repaired files
            path.unlink()
        raise ValueError(f"none of the {pictures} pictures could be read; the first: {skipped[0][0]}: {skipped[0][1]}")
    DatasetInfo(features=_features(classes)).write_to_directory(str(output))
    files = [{"filename": path.name} for path in sorted(output.glob("data-*.arrow"))]
    state = dict.fromkeys(("_format_columns", "_format_type", "_split")) | {"_format_kwargs": {}}
    state |= {"_data_files": files, "_fingerprint": output.name, "_output_all_columns": False}
    write_text(output / "state.json", json.dumps(state))
    facts = settings | dict(count=pictures - len(skipped), classes=classes, skipped=skipped)
    write_text(output / FACTS, json.dumps(facts, indent=1))
    for path in output.glob("data-*.json"):
        path.unlink()


def extract(archive: Path, folder: Path) -> Iterator[str]:
    """Unpacks a zip below folder, file by file; yields each name. What is there in full size already is left alone.

    Raises ValueError, before anything is written, for a zip that is cut off or holds a member that would land elsewhere.
    """
    try:
        members = zipfile.ZipFile(archive).infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is cut off or is no zip ({error}); {fetch_again(archive)}") from error
    root = folder.absolute()
    for member in members:
        place = Path(os.path.normpath(root / member.filename))
        link = member.external_attr >> 28 == 0xA
        if link or not place.is_relative_to(root) or "\\" in member.filename:
            raise ValueError(
                f"{archive} holds {member.filename!r}, which would land outside {folder}; nothing was unpacked"
            )
    with zipfile.ZipFile(archive) as file:
        for member in (m for m in members if not m.is_dir()):
            place = root / member.filename
            if not (place.is_file() and place.stat().st_size == member.file_size):
                place.parent.mkdir(parents=True, exist_ok=True)
                _unpack(archive, file, member, place)
            yield member.filename


def fetch_again(archive: Path) -> str:
    """What to do about a bad download: its digest, recorded when it was first fetched, would refuse the good file."""
    return f"remove it and {archive.with_name(f'{archive.name}.sha256')}, then fetch it again"


def _unpack(archive: Path, file: zipfile.ZipFile, member: zipfile.ZipInfo, place: Path) -> None:
    try:
        with file.open(member) as source, open(f"{place}.partial", "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:  # its checksum, its deflated stream, its end
        raise ValueError(f"{member.filename} in {archive} is damaged ({error}); {fetch_again(archive)}") from error
    os.replace(f"{place}.partial", place)
