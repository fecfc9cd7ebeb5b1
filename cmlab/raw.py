"""The data sets of the released models, from their makers: fetched, unpacked and prepared as the models saw them.

LSUN (Yu et al. 2015) is open; ImageNet (Russakovsky et al. 2015) wants an account of your own, and its terms accepted. Both hold
photographs of people and are meant for research.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from cmlab.checks import known
from cmlab.downloads import download
from cmlab.prepare import extract, fetch_again, prepare
from cmlab.prepared import Prepared, data_folder

LSUN = "http://dl.yf.io/lsun"
IMAGENET_TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
IMAGENET_HUB = "ILSVRC/imagenet-1k"
HUB_SPLITS = {"train": "train", "val": "validation"}


@dataclass(frozen=True)
class Raw:
    """A data set by its maker's files: zips of LMDBs by part ("train", "val"), or, for ImageNet, none that is open to all."""

    size: int
    zips: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """What it comes in."""
        return list(self.zips or IMAGENET_TARS)


RAW = {
    "imagenet64": Raw(64),
    "bedroom256": Raw(256, {"train": "scenes/bedroom_train_lmdb.zip", "val": "scenes/bedroom_val_lmdb.zip"}),
    "cat256": Raw(256, {"train": "objects/cat.zip"}),
}


def fetch_and_prepare(name: str, workers: int | None = None, progress: bool = True) -> list[Prepared]:
    """Fetches and prepares a data set of the released models, all its parts; "val" becomes <name>-val.

    Stopped, it goes on where it was. LSUN's zips come from CMLAB_LSUN_URL (its maker's server) into data_folder()/raw. ImageNet is
    taken from CMLAB_IMAGENET, a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or else from the hub with the token
    of hf auth login or in HF_TOKEN. Raises ValueError that says which step is missing, and as download, extract and prepare do.
    """
    raw = RAW[known("data set", name, RAW)]
    find: Callable[[str], tuple[str | Path, str]] = _lsun(raw, progress) if raw.zips else _imagenet()
    found = []
    for part in raw.parts:
        source, split = find(part)
        folder = data_folder() / (name if part == "train" else f"{name}-{part}")
        found.append(Prepared(prepare(source, folder, raw.size, "rgb", True, split, workers, progress)))
    return found


def _lsun(raw: Raw, progress: bool) -> Callable[[str], tuple[Path, str]]:
    def find(part: str) -> tuple[Path, str]:
        address = f"{os.environ.get('CMLAB_LSUN_URL', LSUN).rstrip('/')}/{raw.zips[part]}"
        archive = data_folder() / "raw" / Path(raw.zips[part]).name
        download(address, archive, progress=progress)
        unpacked = archive.with_suffix("")
        for _ in tqdm(extract(archive, unpacked), desc=f"unpacking {archive.name}", unit="file", disable=not progress):
            pass
        found = sorted(path.parent for path in unpacked.rglob("data.mdb"))
        if not found:
            raise ValueError(f"{archive} of {address} holds no LMDB (no data.mdb); {fetch_again(archive)}")
        return found[0], part

    return find


def _imagenet() -> Callable[[str], tuple[str | Path, str]]:
    from huggingface_hub import get_token

    folder = os.environ.get("CMLAB_IMAGENET")

    def find(part: str) -> tuple[str | Path, str]:
        if folder is None:
            return IMAGENET_HUB, HUB_SPLITS[part]
        path = Path(folder).expanduser() / IMAGENET_TARS[part]
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: log in at https://image-net.org, download {IMAGENET_TARS[part]} (ILSVRC2012) and put it there"
            )
        return path, part

    if folder is None and not get_token():
        raise ValueError(
            f"ImageNet needs your own access. Either accept its terms at https://huggingface.co/datasets/{IMAGENET_HUB} and log in with "
            f"hf auth login or set HF_TOKEN to a token of yours, or download {' and '.join(IMAGENET_TARS.values())} from "
            "https://image-net.org and set CMLAB_IMAGENET to their folder."
        )
    return find
