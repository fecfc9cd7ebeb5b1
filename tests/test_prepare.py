import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import datasets
from cmlab import doctor
from cmlab.data import load_data
from cmlab.prepare import FACTS, crop, extract, prepare, usable_cores
from cmlab.prepared import Prepared
from cmlab.sources import Folder, Tar, picture


def pixels(k: int, width=20, height=24) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(k: int, kind="PNG", **size) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(k, **size)).save(file, kind)
    return file.getvalue()


def expected(k: int, size=8) -> torch.Tensor:
    image = np.asarray(crop(Image.fromarray(pixels(k)), size))
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture
def pictures(tmp_path):
    """Two folders of two pictures each."""
    for k in range(4):
        path = tmp_path / "pictures" / ("cats" if k < 2 else "dogs") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(k))
    return tmp_path / "pictures"


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def all_of(folder, flip=False) -> tuple[torch.Tensor, torch.Tensor | None]:
    data = Prepared(folder)
    return data.batch(torch.arange(data.count), torch.Generator().manual_seed(0))


def test_a_folder_with_subfolders_becomes_a_labelled_data_set(pictures, tmp_path):
    data = Prepared(prepare(pictures, tmp_path / "out", 8, workers=2, progress=False))
    images, labels = all_of(data.folder)
    assert torch.equal(images, torch.stack([expected(k) for k in range(4)])) and labels.tolist() == [0, 0, 1, 1]
    assert (data.count, data.shape, data.num_classes, data.facts["classes"]) == (4, (3, 8, 8), 2, ["cats", "dogs"])


def test_a_flat_folder_has_no_labels(pictures, tmp_path):
    images, labels = all_of(prepare(pictures / "cats", tmp_path / "out", 8, workers=1, progress=False))
    assert len(images) == 2 and labels is None


def test_datasets_reads_what_was_prepared(pictures, tmp_path):
    rows = datasets.load_from_disk(str(prepare(pictures, tmp_path / "out", 8, workers=1, progress=False)))
    assert rows.features["label"].names == ["cats", "dogs"] and rows[3]["image"].size == (8, 8)
    assert rows.cache_files, "memory-mapped from the files, not copied"


def in_folder(tmp_path, names) -> Folder:
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(b"")
    return Folder(tmp_path / "tree")


def in_tar(tmp_path, names) -> Tar:
    (tmp_path / "tree.tar").write_bytes(tar_of(dict.fromkeys(names, b"")))
    return Tar(tmp_path / "tree.tar")


@pytest.mark.parametrize("source", [in_folder, in_tar])
@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a.png", "b.png"], [None, None]),
        (["cats/a.png", "cats/b.png"], [None, None]),
        (["cats/a.png", "dogs/b.png"], ["cats", "dogs"]),
        (["pets/cats/a.png", "pets/dogs/b.png"], ["cats", "dogs"]),
        (["pets/cats/kittens/a.png", "pets/cats/old/b.png", "pets/dogs/c.png"], ["cats", "cats", "dogs"]),
        (["cats/1/a.png", "dogs/1/b.png"], ["cats", "dogs"]),
    ],
)
def test_the_classes_are_the_first_folders_that_not_all_pictures_share(source, names, labels, tmp_path):
    assert [item.label for item in source(tmp_path, names).items()] == labels


@pytest.mark.parametrize("source", [in_folder, in_tar])
def test_a_picture_beside_the_class_folders_is_refused(source, tmp_path):
    mixed = source(tmp_path, ["pets/cats/a.png", "pets/loose.png", "pets/dogs/b.png", "pets/more.png"])
    message = (
        "pets/loose.png lies in no class, while pets/cats/a.png .*: move it into a folder of its class, or all out"
    )
    with pytest.raises(ValueError, match=message):
        mixed.items()


@pytest.mark.parametrize("source", [in_folder, in_tar])
def test_what_is_hidden_is_no_picture_and_no_class(source, tmp_path):
    hidden = [".git/a.png", "cats/.thumbnails/a.png", "cats/._a.png", "__MACOSX/cats/a.png"]
    found = source(tmp_path, [*hidden, "cats/a.png", "dogs/b.png"]).items()
    assert [(item.name, item.label) for item in found] == [("cats/a.png", "cats"), ("dogs/b.png", "dogs")]


def test_the_class_is_the_inner_tars_name_whatever_folders_there_are(tmp_path):
    inner = {name: tar_of({"x/a.png": b"", "y/b.png": b""}) for name in ("train/n01.tar", "train/._n01.tar")}
    (tmp_path / "outer.tar").write_bytes(tar_of(inner))
    assert [(i.name, i.label) for i in Tar(tmp_path / "outer.tar").items()] == [("x/a.png", "n01"), ("y/b.png", "n01")]
    (tmp_path / "outer.tar").write_bytes(tar_of(inner | {"train/z.png": b""}))
    with pytest.raises(ValueError, match="train/z.png lies in no class, while x/a.png"):
        Tar(tmp_path / "outer.tar").items()


def test_tars_in_a_tar_are_read_in_place(tmp_path):
    """As ImageNet's training set: one inner tar a class, named by its WordNet id."""
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{k}.JPEG": encoded(k) for k in ks})
        for wnid, ks in (("n02", (2, 3)), ("n01", (0, 1)))
    }
    (tmp_path / "train.tar").write_bytes(tar_of(inner))
    folder = prepare(tmp_path / "train.tar", tmp_path / "out", 8, workers=2, progress=False)
    images, labels = all_of(folder)
    assert torch.equal(images, torch.stack([expected(k) for k in range(4)])) and labels.tolist() == [0, 0, 1, 1]
    assert Prepared(folder).facts["classes"] == ["n01", "n02"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.tar"], "nothing was unpacked"


def test_a_hostile_member_of_a_tar_is_only_a_name(tmp_path):
    (tmp_path / "evil.tar").write_bytes(tar_of({"../../evil.png": encoded(0), "/etc/evil.png": encoded(1)}))
    images, _ = all_of(prepare(tmp_path / "evil.tar", tmp_path / "out", 8, workers=1, progress=False))
    assert len(images) == 2 and not Path("/etc/evil.png").exists() and not (tmp_path.parent / "evil.png").exists()


def test_an_lmdb_as_lsun_has_it(tmp_path):
    with lmdb.open(str(tmp_path / "bedroom_train_lmdb"), map_size=1 << 24) as environment:
        with environment.begin(write=True) as transaction:
            for k in range(4):
                transaction.put(f"key{k}".encode(), encoded(k, "WEBP" if k == 3 else "PNG"))
    images, labels = all_of(prepare(tmp_path / "bedroom_train_lmdb", tmp_path / "out", 8, workers=2, progress=False))
    assert torch.equal(images[:3], torch.stack([expected(k) for k in range(3)])) and len(images) == 4 and labels is None


def test_a_data_set_of_the_hub(tmp_path):
    rows = {"img": [Image.fromarray(pixels(k)) for k in range(4)], "label": [1, 0, 1, 0]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "hub")
    folder = prepare(tmp_path / "hub", tmp_path / "out", 8, workers=1, progress=False)
    images, labels = all_of(folder)
    assert torch.equal(images, torch.stack([expected(k) for k in range(4)]))
    assert labels.tolist() == [1, 0, 1, 0] and Prepared(folder).facts["classes"] == ["b", "a"]


def test_a_missing_split_is_refused_with_those_there_are(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [Image.fromarray(pixels(0))]})
    datasets.DatasetDict({"training": rows, "test": rows}).save_to_disk(tmp_path / "hub")
    with pytest.raises(ValueError, match="unknown split of .*hub 'train'. .*Known: training, test"):
        prepare(tmp_path / "hub", tmp_path / "out", 8, workers=1, progress=False)


@pytest.mark.parametrize(
    "error", [datasets.exceptions.DatasetNotFoundError("doesn't exist"), ConnectionError("no line")]
)
def test_a_name_that_is_no_folder_and_not_on_the_hub_is_told_both(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(ValueError, match=f"no such folder here: my/pictures; nor does the hub give it: {error}"):
        prepare("my/pictures", "out", 8, workers=1, progress=False)


@pytest.mark.parametrize("label", [-1, None])
def test_an_unlabelled_split_of_the_hub_is_refused(label, tmp_path):
    rows = {"image": [Image.fromarray(pixels(k)) for k in range(2)], "label": [1, label]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "hub")
    with pytest.raises(ValueError, match=f"row 1 of the split 'test' of .*hub has the label {label}, .* is unlabelled"):
        prepare(tmp_path / "hub", tmp_path / "out", 8, split="test", workers=1, progress=False)


def test_grey_pictures_have_one_channel(pictures, tmp_path):
    data = Prepared(prepare(pictures, tmp_path / "out", 8, colour="grey", workers=1, progress=False))
    assert data.shape == (1, 8, 8) and all_of(data.folder)[0].shape == (4, 1, 8, 8)


def test_what_is_no_picture_is_counted_listed_and_skipped(pictures, tmp_path):
    (pictures / "cats" / "broken.png").write_bytes(encoded(9)[:300])
    (pictures / "dogs" / "empty.jpg").write_bytes(b"")
    data = Prepared(prepare(pictures, tmp_path / "out", 8, workers=2, progress=False))
    assert data.count == 4 and [name for name, _ in data.facts["skipped"]] == ["cats/broken.png", "dogs/empty.jpg"]
    assert all(reason.startswith("no picture: ") for _, reason in data.facts["skipped"])


def test_a_source_without_one_good_picture_is_refused(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="none of the 1 pictures could be read; the first: a.png: no picture: "):
        prepare(tmp_path / "pictures", tmp_path / "out", 8, workers=1, progress=False)
    assert not list((tmp_path / "out").iterdir()), "the same call may succeed on repaired files"
    (tmp_path / "pictures" / "a.png").write_bytes(encoded(0))
    assert Prepared(prepare(tmp_path / "pictures", tmp_path / "out", 8, workers=1, progress=False)).count == 1


def test_colour_profiles_are_not_copied_into_every_picture(tmp_path):
    (tmp_path / "pictures").mkdir()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels(0)).save(tmp_path / "pictures" / "a.png", icc_profile=profile)
    folder = prepare(tmp_path / "pictures", tmp_path / "out", 8, workers=1, progress=False)
    assert "icc_profile" not in datasets.load_from_disk(str(folder))[0]["image"].info


def test_the_crop_is_adms():
    """Written out once more: halve by averages, then bicubic, then the middle."""
    image = Image.fromarray(pixels(0, 301, 200))
    half = image.resize((150, 100), Image.Resampling.BOX).resize((75, 50), Image.Resampling.BOX)
    small = half.resize((round(75 * 32 / 50), 32), Image.Resampling.BICUBIC)
    assert crop(image, 32).tobytes() == small.crop((8, 0, 40, 32)).tobytes()
    assert crop(Image.fromarray(pixels(0, 10, 5)), 16).size == (16, 16), "small pictures are enlarged"


def test_a_second_call_has_nothing_to_do_and_another_plan_is_refused(pictures, tmp_path):
    folder = prepare(pictures, tmp_path / "out", 8, workers=1, progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare(pictures, tmp_path / "out", 8, workers=1, progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="out holds another data set .*; name another output folder"):
        prepare(pictures, tmp_path / "out", 16, workers=1, progress=False)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="taken holds other files; name a new folder"):
        prepare(pictures, tmp_path / "taken", 8, workers=1, progress=False)


@pytest.mark.parametrize("finished", [True, False])
def test_changed_pictures_are_refused_finished_or_not(finished, pictures, tmp_path):
    def again():
        prepare(pictures, tmp_path / "out", 8, workers=1, progress=False)

    again()
    if not finished:
        for path in [tmp_path / "out" / FACTS, *(tmp_path / "out").glob("data-*")]:
            path.unlink()
    first, second = pictures / "cats" / "0.png", pictures / "cats" / "1.png"
    kept, message = first.read_bytes(), "pictures of .*pictures have changed since .*out began; remove that folder"
    first.write_bytes(kept + b"another")
    with pytest.raises(ValueError, match=message):
        again()
    first.rename(pictures / "dogs" / "0.png")
    with pytest.raises(ValueError, match=message):
        again()
    (pictures / "dogs" / "0.png").unlink()
    first.write_bytes(kept)
    second.rename(pictures / "cats" / "renamed.png")
    with pytest.raises(ValueError, match=message):
        again()
    (pictures / "cats" / "renamed.png").rename(second)
    again()


def test_a_replaced_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"a.png": encoded(0)}))
    prepare(tmp_path / "a.tar", tmp_path / "out", 8, workers=1, progress=False)
    (tmp_path / "a.tar").write_bytes(tar_of({"a.png": encoded(0, width=30)}))
    with pytest.raises(ValueError, match="have changed since"):
        prepare(tmp_path / "a.tar", tmp_path / "out", 8, workers=1, progress=False)


def test_a_folder_is_the_same_however_its_path_is_written(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(pictures)
    folder = prepare("pictures", "out", 8, workers=1, progress=False)
    for name in (pictures, "./pictures", "pictures/cats/..", "~/pictures", "link"):
        assert prepare(name, "out", 8, workers=1, progress=False) == folder
    assert Prepared(folder).facts["source"] == "pictures", "the facts keep it as it was typed"


def test_a_killed_preparation_goes_on_where_it_was(tmp_path):
    (tmp_path / "pictures").mkdir()
    for k in range(60):
        (tmp_path / "pictures" / f"{k:02d}.png").write_bytes(encoded(k))
    code = """
import sys
from cmlab import prepare as room

if __name__ == "__main__":
    room.SHARD = 2
    room.prepare(sys.argv[1], sys.argv[2], 8, workers=2, progress=False)
"""
    (tmp_path / "job.py").write_text(code)
    child = subprocess.Popen([sys.executable, "job.py", "pictures", "out"], cwd=tmp_path, start_new_session=True)
    out = tmp_path / "out"
    while child.poll() is None and len(list(out.glob("data-*.arrow"))) < 3:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    written = {path: path.stat().st_mtime_ns for path in out.glob("data-*.arrow")}
    assert 3 <= len(written) < 30
    with pytest.raises(ValueError, match="holds no prepared data set: its preparation was not finished; run it again"):
        Prepared(out)
    done = subprocess.run([sys.executable, "job.py", "pictures", "out"], cwd=tmp_path)
    assert done.returncode == 0 and all(path.stat().st_mtime_ns == then for path, then in written.items())
    assert torch.equal(all_of(out)[0], torch.stack([expected(k) for k in range(60)]))


def test_doctor_counts_the_cores_that_prepare_uses_and_speaks_without_it(monkeypatch):
    cores = [finding.value for finding in doctor._machine() if finding.name == "cores"]
    assert cores == [f"{usable_cores()} usable of {os.cpu_count()}"] and 1 <= usable_cores() <= os.cpu_count()
    monkeypatch.setitem(sys.modules, "cmlab.prepare", None)  # as on a machine where a package is missing
    assert str(os.cpu_count()) in [finding.value for finding in doctor._machine() if finding.name == "cores"]


def test_every_epoch_has_every_picture_in_an_order_of_its_own(pictures, tmp_path):
    data = Prepared(prepare(pictures, tmp_path / "out", 8, workers=1, progress=False))
    seen = data.choose(12, None, first=0, seed=5).tolist()
    assert [sorted(seen[k : k + 4]) for k in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert seen[5:9] == data.choose(4, None, first=5, seed=5).tolist()
    assert len({tuple(data.choose(4, None, first=4 * k, seed=5).tolist()) for k in range(20)}) > 5


def test_pictures_are_mirrored_only_where_they_may_be(pictures, tmp_path):
    data = Prepared(prepare(pictures, tmp_path / "out", 8, flip=True, workers=1, progress=False))
    index = torch.zeros(200, dtype=torch.long)
    images, _ = data.batch(index, torch.Generator().manual_seed(0))
    plain = expected(0)
    mirrored = (images == plain.flip(-1)).flatten(1).all(1)
    assert ((images == plain).flatten(1).all(1) ^ mirrored).all() and 60 < mirrored.sum() < 140


def test_a_prepared_data_set_loads_by_name(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("CMLAB_DATA", str(tmp_path / "sets"))
    prepare(pictures, tmp_path / "sets" / "pets8", 8, workers=1, progress=False)
    assert load_data("pets8").name == "pets8" and load_data(str(tmp_path / "sets" / "pets8")).count == 4
    with pytest.raises(
        ValueError, match="imagenet64 is not in .*sets yet: datasets/imagenet/fetch_imagenet.sh fetches"
    ):
        load_data("imagenet64")
    with pytest.raises(ValueError, match="unknown data set 'digit'. Did you mean 'digits'"):
        load_data("digit")


NO_IDS = ("../nowhere", "./nowhere", ".hidden/nowhere", "~/nowhere", "/no/where", "/nowhere", "no/such/place", "a b/c")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        *((name, f"no such folder, .tar or hub data set: {name}") for name in ("nowhere", *NO_IDS)),
        ("file.txt", "file.txt is no source of pictures: give a folder, an LMDB, an uncompressed .tar or a hub id"),
        ("empty", "no pictures in empty"),
        ("cut.tar", "cut.tar is cut off or is no uncompressed tar"),
        ("bad_lmdb", "bad_lmdb is cut off or is no LMDB"),
    ],
)
def test_bad_sources_are_named(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    Path("file.txt").write_text("")
    Path("empty").mkdir()
    Path("bad_lmdb").mkdir()
    Path("bad_lmdb/data.mdb").write_bytes(b"x" * 5000)
    Path("cut.tar").write_bytes(tar_of({"a.png": encoded(0), "b.png": encoded(1)})[:1000])
    with pytest.raises(ValueError, match=message):
        prepare(source, "out", 8, workers=1, progress=False)
    assert not Path("out").exists()


@pytest.mark.parametrize("stored", range(1, 9))
def test_a_picture_that_a_camera_stored_turned_comes_out_upright(stored):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    as_stored = {  # the EXIF standard's eight orientations: how to get from upright to what is in the file
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T, 6: np.rot90(upright),
        7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }  # fmt: skip
    note, file = Image.Exif(), io.BytesIO()
    note[0x0112] = stored
    Image.fromarray(np.ascontiguousarray(as_stored[stored])).save(file, "PNG", exif=note)
    assert np.array_equal(np.asarray(picture(file.getvalue())), upright)


def test_a_picture_with_a_damaged_note_stays_as_it_is_stored():
    file = io.BytesIO()
    Image.fromarray(pixels(0)).save(file, "PNG", exif=b"Exif\0\0MM\0*\0\0")
    assert np.array_equal(np.asarray(picture(file.getvalue())), pixels(0))


def test_sixteen_bit_and_transparent_pictures_are_read():
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(file, "PNG")
    assert np.asarray(picture(file.getvalue())).max() == 255
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 20, 30, 128)).save(file, "PNG")
    assert picture(file.getvalue()).mode == "RGB"


# --- zips -----------------------------------------------------------------------------------------------------------


def zip_of(path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_zip_unpacks_and_goes_on_where_it_was(tmp_path):
    archive = zip_of(tmp_path / "a.zip", {"db/data.mdb": b"x" * 1000, "db/lock.mdb": b"y"})
    unpacking = extract(archive, tmp_path / "out")
    assert next(unpacking) == "db/data.mdb"
    unpacking.close()
    before = (tmp_path / "out/db/data.mdb").stat().st_mtime_ns
    assert list(extract(archive, tmp_path / "out")) == ["db/data.mdb", "db/lock.mdb"]
    assert (tmp_path / "out/db/data.mdb").stat().st_mtime_ns == before
    assert sorted(p.name for p in (tmp_path / "out/db").iterdir()) == ["data.mdb", "lock.mdb"]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil-member", "a/../../evil", "..\\evil"])
def test_a_member_that_would_land_outside_stops_everything(name, tmp_path):
    archive = zip_of(tmp_path / "a.zip", {"good": b"g", name: b"e"})
    with pytest.raises(ValueError, match="which would land outside .*; nothing was unpacked"):
        list(extract(archive, tmp_path / "inner" / "out"))
    assert not (tmp_path / "inner").exists()


def test_a_link_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc")
    with pytest.raises(ValueError, match="would land outside"):
        list(extract(tmp_path / "a.zip", tmp_path / "out"))


@pytest.mark.parametrize(
    ("compression", "header", "place", "damage"),
    [
        (zipfile.ZIP_STORED, b"PK\3\4", 34, b"some other"),  # behind the member's header: the checksum is wrong
        (zipfile.ZIP_DEFLATED, b"PK\3\4", 34, b"\xff" * 10),  # a block of type 3, which there is not
        (zipfile.ZIP_STORED, b"PK\1\2", 20, b"\xff\xff\xff\x7f" * 2),  # in the directory: longer than the file
    ],
)
def test_a_damaged_zip_is_named_with_all_that_must_go(compression, header, place, damage, tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", compression) as file:
        file.writestr("data", random.Random(0).randbytes(20) * 50)
    whole = archive.read_bytes()
    start = whole.index(header) + place
    archive.write_bytes(whole[:start] + damage + whole[start + len(damage) :])
    with pytest.raises(ValueError, match="data in .*a.zip is damaged .*; remove it and .*a.zip.sha256, then fetch it"):
        list(extract(archive, tmp_path / "out"))
    archive.write_bytes(whole[:50])
    with pytest.raises(ValueError, match="a.zip is cut off or is no zip .*; remove it and .*a.zip.sha256, then fetch"):
        list(extract(archive, tmp_path / "out"))
