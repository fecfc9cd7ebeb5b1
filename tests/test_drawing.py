import itertools
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from processes import CMLAB, start_ranks
from test_released import network
from toys import saved

from cmlab import checkpoints, drawing
from cmlab.cli import main
from cmlab.drawing import Drawing, draw_to
from cmlab.noise import karras_sigmas
from cmlab.sampling import sample_multistep
from cmlab.streams import Streams

MODEL = checkpoints.load("digits-cd")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(drawing, "SHARD", 7)


def npz(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_shards_make_the_file_that_one_piece_makes(small_shards, tmp_path):
    draw_to(tmp_path / "a.npz", Drawing(MODEL, 30, seed=2), "digits-cd")
    found, (images, labels) = npz(tmp_path / "a.npz"), Drawing(MODEL, 30, seed=2).part()
    assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == (30, 8, 8, 1)
    assert np.abs(found["arr_0"][..., 0] - (images[:, 0].numpy() + 1) * 127.5).max() < 1
    assert found["arr_1"].tolist() == labels.tolist() and list(tmp_path.iterdir()) == [tmp_path / "a.npz"]


def test_the_file_does_not_depend_on_the_number_of_ranks(small_shards, tmp_path):
    draw_to(tmp_path / "one.npz", Drawing(MODEL, 30, steps=2), "digits-cd")
    for rank in (2, 1, 0):  # the last to come puts all together
        draw_to(tmp_path / "three.npz", Drawing(MODEL, 30, steps=2), "digits-cd", rank, 3)
    assert (tmp_path / "one.npz").read_bytes()[:2] == b"PK"
    one, three = npz(tmp_path / "one.npz"), npz(tmp_path / "three.npz")
    assert all(np.array_equal(one[name], three[name]) for name in ("arr_0", "arr_1"))


def test_the_folder_stays_until_every_rank_is_done(small_shards, tmp_path):
    """A rank without a shard of its own may come last: the folder that it opens must not outlive the job."""
    first = threading.Thread(target=draw_to, args=(tmp_path / "a.npz", Drawing(MODEL, 5), "digits-cd", 0, 2))
    first.start()
    while not list((tmp_path / "a.npz.shards").glob("*.npy")):
        time.sleep(0.01)
    first.join(0.5)
    assert first.is_alive() and not (tmp_path / "a.npz").exists()
    draw_to(tmp_path / "a.npz", Drawing(MODEL, 5), "digits-cd", 1, 2)
    first.join()
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"]


def test_a_picture_depends_on_its_number_only():
    many, few = Drawing(MODEL, 50, steps=2).part()[0], Drawing(MODEL, 12, steps=2, batch=5).part()[0]
    assert torch.allclose(many[:12], few, atol=1e-5)
    assert torch.allclose(Drawing(MODEL, 50, steps=2).part(20, 30)[0], many[20:30], atol=1e-5)


def test_what_is_drawn_is_not_drawn_again(small_shards, tmp_path, monkeypatch):
    """Stopped after three of five shards; the second run draws two."""
    part, drawn = Drawing.part, []

    def counted(self, start=0, stop=None, progress=False):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(start)
        return part(self, start, stop)

    monkeypatch.setattr(Drawing, "part", counted)
    with pytest.raises(KeyboardInterrupt):
        draw_to(tmp_path / "a.npz", Drawing(MODEL, 30), "digits-cd")
    assert sorted(path.suffix for path in (tmp_path / "a.npz.shards").iterdir()) == [".json", ".npy", ".npy", ".npy"]
    with pytest.raises(
        ValueError, match="a.npz.shards holds shards of another drawing .* go on with the same options, or"
    ):
        draw_to(tmp_path / "a.npz", Drawing(MODEL, 30, seed=1), "digits-cd")
    drawn[:] = []
    draw_to(tmp_path / "a.npz", Drawing(MODEL, 30), "digits-cd")
    assert drawn == [21, 28] and len(npz(tmp_path / "a.npz")["arr_0"]) == 30


def test_two_ranks_under_torchrun_share_the_pictures_out(tmp_path):
    job = start_ranks(*CMLAB, "sample", "digits-cd", "--num", "1200", "--output", str(tmp_path / "two.npz"))
    out, errors = job.communicate()
    assert job.returncode == 0 and out.count("samples: ") == 1, errors[-2000:]
    assert main(["sample", "digits-cd", "--num", "1200", "--output", str(tmp_path / "one.npz")]) == 0
    one, two = npz(tmp_path / "one.npz"), npz(tmp_path / "two.npz")
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1, "threads round differently"


def test_a_killed_sampling_goes_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "cmlab.cli",
        "sample",
        "digits-edm",
        "--num",
        "6000",
        "--output",
        str(tmp_path / "a.npz"),
    ]
    child, shards = subprocess.Popen(command, stderr=subprocess.DEVNULL), tmp_path / "a.npz.shards"
    while child.poll() is None and len(list(shards.glob("*.npy"))) < 2:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    written = {path: path.stat().st_mtime_ns for path in shards.glob("*.npy")}
    assert 2 <= len(written) < 12 and not (tmp_path / "a.npz").exists()
    again = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = {}
    while again.poll() is None:
        try:
            seen |= {path: path.stat().st_mtime_ns for path in shards.glob("*.npy") if path in written}
        except FileNotFoundError:  # just put together
            pass
        time.sleep(0.02)
    assert seen == written and len(npz(tmp_path / "a.npz")["arr_0"]) == 6000


def test_the_published_levels_are_taken_for_two_calls_of_a_released_model(tmp_path, monkeypatch):
    monkeypatch.setenv("CMLAB_CHECKPOINTS", str(tmp_path))
    (tmp_path / "cd_bedroom256_l2.pt").write_bytes(saved(network().state_dict()))
    model = checkpoints.load("cd_bedroom256_l2")
    images, _ = Drawing(model, 2, steps=2).part()
    stream = Streams(2, 0, stride=drawing.STRIDE)
    noise = stream.randn(2, 3, 16, 16)
    expected = sample_multistep(model, noise, karras_sigmas(40)[[0, 18]], generator=stream, clip_denoised=True)
    assert torch.allclose(images, expected, atol=1e-5)


def test_the_first_pictures_are_read_without_the_rest(tmp_path):
    draw_to(tmp_path / "a.npz", Drawing(MODEL, 30), "digits-cd")
    first = torch.stack(list(drawing.first_of(tmp_path / "a.npz", 4)))
    assert torch.allclose(first, Drawing(MODEL, 30).part()[0][:4].clamp(-1, 1), atol=1 / 127)
    assert len(list(drawing.first_of(tmp_path / "a.npz", 99))) == 30
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


@pytest.mark.parametrize("steps", [1, 2])
def test_another_seed_draws_other_pictures(steps):
    drawn = [drawing.draw(MODEL, 3, steps=steps, seed=seed)[0] for seed in (0, 1, 2, 1)]
    assert torch.equal(drawn[1], drawn[3])
    pictures = torch.cat(drawn[:3]).flatten(1)
    assert torch.pdist(pictures).min() > 1e-3, "nine pictures, no two of them the same"


def test_the_streams_of_a_thousand_seeds_lie_apart():
    """torch's CPU generator keeps 32 bits of a seed."""
    first = sorted(drawing.STRIDE * seed % 2**32 for seed in range(1000))
    assert min(b - a for a, b in itertools.pairwise([*first, first[0] + 2**32])) > 1_900_000
    assert torch.equal(*(torch.randn(2, generator=torch.Generator().manual_seed(s)) for s in (3, 2**32 + 3)))
