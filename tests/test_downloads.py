import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess

import pytest
from served import serving

from cmlab import downloads
from cmlab.downloads import DownloadError, digest, download

DATA = random.Random(0).randbytes(3_000_000)  # the same in a child process
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    monkeypatch.setattr(downloads, "CHUNK", 1 << 16)
    with serving({"/model.pt": DATA}) as served:
        yield served


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_three_cuts_at_a_third_of_what_is_left_are_resumed_bit_for_bit(site, tmp_path):
    site.cuts = [900_000, 630_000, 441_000]
    path = download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False)
    assert path.read_bytes() == DATA
    assert [r for _, r in site.requests] == [None, "bytes=900000-", "bytes=1530000-", "bytes=1971000-"]
    assert names(tmp_path) == ["model.pt"] and not list(tmp_path.glob(".*.tag"))


def test_a_file_that_is_there_is_checked_and_not_fetched_again(site, tmp_path):
    for _ in range(2):
        download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False)
    assert len(site.requests) == 1


def test_a_killed_download_goes_on_where_it_stopped(site, tmp_path):
    site.cuts = [1_000_000, 0, 0, 0, 0, 0]
    with pytest.raises(DownloadError, match="does not answer .*; 1,000,000 bytes have arrived and are kept"):
        download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False)
    assert names(tmp_path) == ["model.pt.part"]
    assert download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False).read_bytes() == DATA
    assert site.requests[-1][1] == "bytes=1000000-"


def test_a_part_that_is_whole_already_only_gets_its_name(site, tmp_path):
    (tmp_path / "model.pt.part").write_bytes(DATA)
    assert download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False).read_bytes() == DATA
    assert [wanted for _, wanted in site.requests] == [f"bytes={len(DATA)}-"]


def test_a_part_that_is_longer_than_the_file_is_fetched_afresh(site, tmp_path):
    (tmp_path / "model.pt.part").write_bytes(DATA + b"more")
    assert download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False).read_bytes() == DATA


def test_a_server_that_cannot_resume_starts_again(site, tmp_path):
    site.ranges, site.cuts = False, [900_000]
    assert download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False).read_bytes() == DATA


@pytest.mark.parametrize("tags", [True, False])
def test_a_part_of_another_version_never_ends_up_in_the_file(site, tmp_path, tags):
    """With a version tag the server says so and sends the whole; without one the digest finds out."""
    site.tags, site.cuts = tags, [900_000, 0, 0, 0, 0, 0]
    with pytest.raises(DownloadError):
        download(f"{site.url}/model.pt", tmp_path / "model.pt", progress=False)
    site.files["/model.pt"] = other = os.urandom(3_000_000)
    sha = hashlib.sha256(other).hexdigest()
    if not tags:
        with pytest.raises(ValueError, match="is damaged or another file"):
            download(f"{site.url}/model.pt", tmp_path / "model.pt", sha, progress=False)
        assert names(tmp_path) == []
    assert download(f"{site.url}/model.pt", tmp_path / "model.pt", sha, progress=False).read_bytes() == other


def test_a_wrong_digest_is_refused_and_nothing_is_kept(site, tmp_path):
    with pytest.raises(
        ValueError, match=rf"what {site.url}/model.pt gives is damaged .* SHA-256 is {SHA}, expected: 0{{64}}"
    ):
        download(f"{site.url}/model.pt", tmp_path / "model.pt", "0" * 64, progress=False)
    assert names(tmp_path) == []


def test_the_first_digest_is_recorded_and_another_file_refused_later(site, tmp_path):
    path = download(f"{site.url}/model.pt", tmp_path / "model.pt", progress=False)
    assert subprocess.run(["sha256sum", "-c", "model.pt.sha256"], cwd=tmp_path, capture_output=True).returncode == 0
    path.unlink()
    site.files["/model.pt"] = b"another model"
    with pytest.raises(ValueError, match=r"recorded in .*model.pt.sha256 when it was first fetched: " + SHA):
        download(f"{site.url}/model.pt", path, progress=False)
    assert names(tmp_path) == ["model.pt.sha256"]


def test_a_damaged_file_is_named_and_left_where_it_is(site, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/model.pt \(from {site.url}/model.pt\) is damaged or another file"
    ):
        download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False)
    assert (tmp_path / "model.pt").read_bytes() == b"damaged"


def test_a_missing_file_is_not_asked_for_twice(site, tmp_path):
    with pytest.raises(DownloadError, match="nothing.pt answered 404 Not Found"):
        download(f"{site.url}/nothing.pt", tmp_path / "nothing.pt", progress=False)
    assert len(site.requests) == 1 and names(tmp_path) == []


def test_a_busy_server_is_asked_again(site, tmp_path):
    site.status = [503, 429, 200]
    assert download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False).exists()
    assert len(site.requests) == 3


def test_an_address_where_nobody_answers_fails_at_once(tmp_path):
    with pytest.raises(DownloadError, match="http://127.0.0.1:9/model.pt does not answer .*Connection refused"):
        download("http://127.0.0.1:9/model.pt", tmp_path / "model.pt", progress=False)


def test_a_full_disk_is_noticed_before_anything_is_written(site, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 2**20))
    with pytest.raises(DownloadError, match=r"the disk is full: model.pt needs 3 MB more, .* has 1 MB free"):
        download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False)
    assert not (tmp_path / "model.pt.part").exists()


def test_a_disk_that_fills_up_on_the_way_keeps_what_has_arrived(site, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(DownloadError, match=r"model.pt cannot be written \(.*File too large.*\); what has arrived"):
            download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA, progress=False).read_bytes() == DATA
    assert site.requests[-1][1] is not None


def test_a_folder_that_cannot_be_written_is_named(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="file/model.pt cannot be written"):
        download(f"{site.url}/model.pt", tmp_path / "file" / "model.pt", progress=False)
    assert site.requests == []


def fetch(url, path):
    download(url, path, SHA, progress=False)


def test_of_several_processes_one_fetches(site, tmp_path):
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=fetch, args=(f"{site.url}/model.pt", tmp_path / "model.pt")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(site.requests) == 1 and digest(tmp_path / "model.pt") == SHA


def test_progress_shows_rate_and_time_left(site, tmp_path, capsys):
    download(f"{site.url}/model.pt", tmp_path / "model.pt", SHA)
    shown = capsys.readouterr().err
    assert "model.pt" in shown and "2.86M/2.86M" in shown and "B/s" in shown
