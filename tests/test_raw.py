"""The real scripts that fetch ImageNet and LSUN, against small archives served on 127.0.0.1."""

import io
import zipfile
from pathlib import Path

import lmdb
import pytest
from processes import run_script
from served import serving
from test_prepare import encoded, tar_of

from cmlab.prepared import Prepared

HOME = Path(__file__).parents[1]


def script(name, folder, **variables):
    """Runs datasets/<name>/fetch_<name>.sh with the data folder in place of the repository's."""
    fetch = HOME / "datasets" / name / f"fetch_{name}.sh"
    without = ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "CMLAB_IMAGENET")
    return run_script(fetch, "--workers", "1", without=without, **{"CMLAB_DATA": str(folder)} | variables)


def lsun_zip(tmp_path, name, count) -> bytes:
    with lmdb.open(str(tmp_path / name), map_size=1 << 20) as environment:
        with environment.begin(write=True) as transaction:
            for k in range(count):
                transaction.put(f"key{k}".encode(), encoded(k, "WEBP"))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in (tmp_path / name).iterdir():
            archive.write(path, f"{name}/{path.name}")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "zips"),
    [
        ("lsun_bedroom", "bedroom256", {"train": "scenes/bedroom_train_lmdb", "val": "scenes/bedroom_val_lmdb"}),
        ("lsun_cat", "cat256", {"train": "objects/cat"}),
    ],
)
def test_lsun_is_fetched_over_a_bad_line_unpacked_and_prepared(name, data, zips, tmp_path):
    files = {f"/{zips[part]}.zip": lsun_zip(tmp_path, Path(zips[part]).name, 3) for part in zips}
    with serving(files) as site:
        site.cuts = [2000, 2000, 2000]
        done = script(name, tmp_path / "sets", CMLAB_LSUN_URL=site.url)
        assert done.returncode == 0, done.stderr
        requests = len(site.requests)
        again = script(name, tmp_path / "sets", CMLAB_LSUN_URL=site.url)
        assert again.returncode == 0 and len(site.requests) == requests == len(zips) + 3
    for part in zips:
        found = Prepared(tmp_path / "sets" / (data if part == "train" else f"{data}-{part}"))
        assert found.count == 3 and found.shape == (3, 256, 256) and found.facts["flip"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n", b"a digest\n", None])
def test_a_digest_file_without_a_digest_is_named(content, tmp_path):
    record = tmp_path / "sets" / "raw" / "cat.zip.sha256"
    record.parent.mkdir(parents=True)
    record.mkdir() if content is None else record.write_bytes(content)
    with serving({"/objects/cat.zip": lsun_zip(tmp_path, "cat", 1)}) as site:
        done = script("lsun_cat", tmp_path / "sets", CMLAB_LSUN_URL=site.url)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = "cannot be read (Is a directory)" if content is None else f"holds {content!r}, not a SHA-256"
    assert f"{record} {said}" in done.stderr and "remove it to record the digest again" in done.stderr


def test_a_wrong_archive_can_be_replaced_as_the_message_says(tmp_path):
    file, archive = io.BytesIO(), tmp_path / "sets" / "raw" / "cat.zip"
    zipfile.ZipFile(file, "w").close()
    with serving({"/objects/cat.zip": file.getvalue()}) as site:
        done = script("lsun_cat", tmp_path / "sets", CMLAB_LSUN_URL=site.url)
    assert done.returncode == 1 and f"{archive} of {site.url}/objects/cat.zip holds no LMDB" in done.stderr
    assert f"remove it and {archive}.sha256, then fetch it again" in done.stderr
    archive.unlink()
    archive.with_name("cat.zip.sha256").unlink()
    with serving({"/objects/cat.zip": lsun_zip(tmp_path, "cat", 1)}) as site:
        assert script("lsun_cat", tmp_path / "sets", CMLAB_LSUN_URL=site.url).returncode == 0


def test_a_hostile_lsun_zip_is_refused(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../evil.mdb", b"evil")
    with serving({"/objects/cat.zip": file.getvalue()}) as site:
        done = script("lsun_cat", tmp_path / "sets", CMLAB_LSUN_URL=site.url)
    assert done.returncode == 1 and "which would land outside" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("evil.mdb"))


def test_a_server_that_does_not_have_it_is_named(tmp_path):
    with serving({}) as site:
        done = script("lsun_cat", tmp_path / "sets", CMLAB_LSUN_URL=site.url)
    assert done.returncode == 1 and f"{site.url}/objects/cat.zip answered 404" in done.stderr


def test_imagenet_from_the_tars_that_one_has(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    inner = {f"{wnid}.tar": tar_of({f"{wnid}_0.JPEG": encoded(k)}) for k, wnid in enumerate(("n02", "n01"))}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    missing = script("imagenet", tmp_path / "sets", CMLAB_IMAGENET=str(folder))
    assert (
        missing.returncode == 1
        and "ILSVRC2012_img_val.tar is missing: log in at https://image-net.org" in missing.stderr
    )
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of({"ILSVRC2012_val_00000001.JPEG": encoded(5)}))
    done = script("imagenet", tmp_path / "sets", CMLAB_IMAGENET=str(folder))
    assert done.returncode == 0, done.stderr
    train, val = Prepared(tmp_path / "sets" / "imagenet64"), Prepared(tmp_path / "sets" / "imagenet64-val")
    assert (
        train.facts["classes"] == ["n01", "n02"]
        and train.shape == (3, 64, 64)
        and val.count == 1
        and not val.num_classes
    )


def test_who_has_logged_in_to_the_hub_has_access_to_imagenet(tmp_path):
    (tmp_path / "token").write_text("hf_of_nobody")
    done = script("imagenet", tmp_path / "sets", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "needs your own access" not in done.stderr
    assert "nor does the hub give it: Couldn't reach 'ILSVRC/imagenet-1k' on the Hub" in done.stderr


def test_without_access_to_imagenet_the_missing_step_is_said(tmp_path):
    done = script("imagenet", tmp_path / "sets", HF_HOME=str(tmp_path))
    assert done.returncode == 1 and "ImageNet needs your own access. Either accept its terms" in done.stderr
    assert "hf auth login or set HF_TOKEN" in done.stderr and "set CMLAB_IMAGENET to their folder" in done.stderr
