"""The demo without a page: which models it offers, what its buttons do, and what it makes of uploads."""

import dataclasses
import io
import os
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import gradio
import numpy as np
import pytest
import torch
from gradio.data_classes import FileData
from PIL import Image

from cmlab import checkpoints, karras_sigmas, load, sample_onestep
from cmlab.demo import choices, page, uploads, work
from cmlab.demo import results as kept
from cmlab.demo.choices import choose
from cmlab.demo.results import Results
from cmlab.sampling import end_of
from cmlab.streams import get_generator


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No runs but those that a test makes, and no released models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMLAB_CHECKPOINTS", str(tmp_path / "checkpoints"))


# --- models ---------------------------------------------------------------------------------------------------------


def test_the_embedded_models_of_pictures_are_offered_and_the_released_ones_named_with_their_command():
    assert list(choices.choices())[:3] == ["digits-cd", "digits-ct", "digits-edm"]
    assert not any("moons" in name or "classifier" in name for name in choices.choices())
    assert len(choices.missing()) == 12
    assert "`cmlab fetch cd_imagenet64_lpips`" in page.models_table()
    with pytest.raises(ValueError, match="cd_cat256_l2 is not on this disk yet: cmlab fetch cd_cat256_l2"):
        choose("cd_cat256_l2")


def test_a_fetched_model_is_offered_with_its_classes_and_published_levels(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "cd_imagenet64_l2.pt").touch()
    choice = choose("cd_imagenet64_l2")
    assert (choice.consistency, choice.shape, choice.num_classes) == (True, (3, 64, 64), 1000)
    assert page.describe_plan("cd_imagenet64_l2", "multistep", 2, "").startswith("2 steps, at noise levels σ = 80, ")
    assert len(choices.missing()) == 11
    assert "cmlab fetch cd_imagenet64_l2`" not in page.models_table()


def test_own_runs_are_offered_and_a_link_that_leads_out_is_not(tmp_path):
    shutil.copytree(checkpoints.EMBEDDED_FOLDER / "digits-cd", tmp_path / "runs" / "mine" / "model")
    shutil.copytree(checkpoints.EMBEDDED_FOLDER / "digits-cd", tmp_path / "secret" / "model")
    (tmp_path / "runs" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "runs" / "broken" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "model" / "config.json").write_text("{")
    assert [name for name in choices.choices() if "/" in name] == ["runs/mine/model"]
    assert end_of(work.generate("runs/mine/model", num=2)).images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    "name", ["../secret/model", "/etc/passwd", "runs/../secret/model", "digits-classifier", "moons-cd", "", "openai/x"]
)
def test_no_name_leads_out_of_the_list(name, tmp_path):
    shutil.copytree(checkpoints.EMBEDDED_FOLDER / "digits-cd", tmp_path / "secret" / "model")
    with pytest.raises(ValueError, match="unknown model"):
        choose(name)


def test_a_name_typed_into_a_menu_and_an_empty_class_are_no_traceback():
    for follow in (page.for_model, page.classes_of):
        with pytest.raises(gradio.Error, match="unknown model"):
            follow("mine")
    assert page.read_classes(None) == page.read_classes("") == ()


def test_a_model_that_was_trained_anew_is_read_anew(tmp_path):
    folder = tmp_path / "runs" / "mine" / "model"
    shutil.copytree(checkpoints.EMBEDDED_FOLDER / "digits-cd", folder)
    first = end_of(work.generate("runs/mine/model", num=2)).images
    shutil.rmtree(folder)
    shutil.copytree(checkpoints.EMBEDDED_FOLDER / "digits-ct", folder)
    assert not torch.equal(end_of(work.generate("runs/mine/model", num=2)).images, first)


# --- generate, compare, edit ----------------------------------------------------------------------------------------


def test_generated_pictures_are_those_of_the_model_and_the_cost_is_counted():
    made = end_of(work.generate("digits-cd", "onestep", labels=(3, 5), seed=4, num=6))
    noise = get_generator("determ-indiv", 6, 4).randn(6, 1, 8, 8)
    expected = sample_onestep(load("digits-cd"), noise, torch.tensor([3, 5] * 3), clip_denoised=True)
    assert torch.allclose(made.images, expected, atol=1e-6)
    assert (made.count, made.calls, made.levels) == (6, 1, [20.0]) and made.seconds > 0
    assert made.said.startswith("6 pictures, 1 network call each, 0.")


@pytest.mark.parametrize(
    ("sampler", "steps", "calls"), [("heun", 5, 9), ("euler", 5, 5), ("dpm", 5, 10), ("ancestral", 5, 5)]
)
def test_a_diffusion_model_is_asked_as_often_as_its_sampler_says(sampler, steps, calls):
    assert end_of(work.generate("digits-edm", sampler, steps, num=2)).calls == calls


def test_a_large_job_goes_in_parts_and_says_how_far_it_is(monkeypatch):
    whole = end_of(work.generate("tinted-digits-cd", steps=2, num=7)).images
    monkeypatch.setattr(work, "BATCH_NUMBERS", 2 * 3 * 16 * 16)
    shares = []
    made = end_of(work.generate("tinted-digits-cd", steps=2, num=7), shares.append)
    assert len(shares) == 1 + 4 * 2 and shares == sorted(shares) and shares[-1] == 1
    assert made.calls == 2 and torch.allclose(made.images, whole, atol=1e-5)


def test_a_job_that_is_no_longer_asked_ends_between_two_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(work.Watched, "__call__", lambda self, x, *rest: calls.append(1) or torch.zeros_like(x))
    job = work.generate("digits-edm", "euler", 80, num=2)
    for _ in range(3):  # the first is for the model that was read
        next(job)
    job.close()
    assert len(calls) == 2


@pytest.mark.parametrize("generator", ["determ", "determ-indiv"])
def test_seeded_generators_repeat_themselves_and_dummy_does_not(generator):
    def draw(name):
        return end_of(work.generate("digits-cd", generator=name, num=3)).images

    assert torch.equal(draw(generator), draw(generator))
    assert not torch.equal(draw("dummy"), draw("dummy"))


def test_dropout_changes_pictures_repeatably_and_leaves_the_model_as_it_was():
    def draw(rate):
        return end_of(work.generate("digits-cd", dropout=rate, num=4)).images

    still = draw(0.0)
    assert not torch.equal(draw(0.3), still) and torch.equal(draw(0.3), draw(0.3))
    assert torch.equal(draw(0.0), still)


def test_timesteps_mean_the_levels_of_the_released_sampler():
    levels = work.read_timesteps("0,22,39", 0.002, 80.0)
    grid = karras_sigmas(40, 0.002, 80.0)
    assert levels == tuple(grid[[0, 22]].tolist())
    assert work.read_timesteps(" ", 0.002, 80.0) is work.read_timesteps(None, 0.002, 80.0) is None
    assert len(work.read_timesteps("0,106,200 of 201", 0.002, 80.0)) == 2
    assert end_of(work.generate("digits-cd", timesteps="0,22,39", num=2)).calls == 2


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "0",
        "0,39,22",
        "0,22",
        "-1,39",
        "5,39",
        "0,39 of x",
        "0,5 of 1",
        "0,1 of 99999999999",
        ",".join(map(str, range(82))) + " of 82",
    ],
)
def test_timesteps_that_mean_nothing_are_refused(text):
    with pytest.raises(ValueError, match="timesteps"):
        work.read_timesteps(text, 0.002, 80.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num=0), "num must be at least 1"), (dict(num=65), r"num must lie in \[1, 64\]"), (dict(seed=-1), "seed"),
        (dict(seed=2**31), "seed must lie in"), (dict(steps=81), "steps must lie in"), (dict(sampler="heun"), "unknown sampler"),
        (dict(generator="best"), "unknown generator"), (dict(dropout=1.0), "dropout must lie in"),
        (dict(labels=(10,)), "labels must lie"), (dict(labels=(10**20,)), "labels must lie"),
        (dict(sampler="onestep", steps=3), "makes one step"), (dict(model="digits-edm", timesteps="0,39"), "timesteps are for"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        end_of(work.generate(**dict(model="digits-cd") | options))


def test_comparing_shows_one_noise_three_times():
    made = end_of(work.compare("digits-cd", labels=(3,), num=4))
    assert list(made) == ["one call", "two calls", "the teacher digits-edm"]
    assert [one.calls for one in made.values()] == [1, 2, 35]
    one, two, teacher = (one.images for one in made.values())
    assert (one - teacher).square().mean() < 0.3 * (one - teacher.roll(1, 0)).square().mean()
    with pytest.raises(ValueError, match="begins with a consistency model"):
        end_of(work.compare("digits-edm"))


def test_an_inpainted_picture_keeps_what_was_not_painted():
    picture = page.held_out(choose("tinted-digits-cd"), 3)[0][None]
    mask = torch.ones(16, 16)
    mask[8:] = 0
    made = end_of(work.edit("tinted-digits-cd", "inpaint", picture, mask, num=3))
    assert made.images.shape == (5, 3, 16, 16) and (made.count, made.calls) == (3, 10)
    assert torch.allclose(made.images[2:, :, :8], picture[..., :8, :].expand(3, -1, -1, -1), atol=1e-6)
    assert (made.images[2:, :, 8:] - picture[..., 8:, :]).abs().max() > 0.1


def test_interpolating_says_what_the_noises_cost():
    pictures = torch.stack([page.held_out(choose("tinted-digits-cd"), k)[0] for k in (3, 4)])
    made = end_of(work.edit("tinted-digits-cd", "interpolate", pictures, num=4))
    assert made.said.startswith("4 pictures, 1 network call each, after 18 of the diffusion model, ")
    with pytest.raises(ValueError, match="takes 2 pictures"):
        end_of(work.edit("tinted-digits-cd", "interpolate", pictures[:1]))


def test_a_cancelled_job_does_not_reach_into_the_next(monkeypatch):
    """gradio begins the next job while the cancelled one is in its last call: with dropout, which is a state of the model."""
    undisturbed = end_of(work.generate("digits-cd", num=4)).images
    inside, go_on, call = threading.Event(), threading.Event(), work.Watched.__call__

    def slow(self, *inputs):
        if self.dropout:
            with work.dropping(self.model, self.dropout):
                inside.set()
                go_on.wait(20)
        return call(self, *inputs)

    monkeypatch.setattr(work.Watched, "__call__", slow)
    job = page.told(lambda rate: work.generate("digits-cd", dropout=rate, num=4))
    cancelled = threading.Thread(target=lambda: list(job(0.5, lambda *told, **more: None)))
    cancelled.start()
    inside.wait(20)
    results = []
    other = threading.Thread(target=lambda: results.extend(job(0.0, lambda *told, **more: None)))
    other.start()
    other.join(2)  # time enough to draw, if nothing held it back
    go_on.set()
    cancelled.join()
    other.join()
    assert torch.equal(results[-1].images, undisturbed)


def test_a_teacher_takes_the_same_pictures_and_classes():
    assert choices.teacher_of(choose("tinted-unet-cd")).name == "tinted-unet-edm"
    assert choices.teacher_of(choose("tinted-digits-cd")).name == "tinted-digits-edm"
    assert choices.teacher_of(dataclasses.replace(choose("digits-cd"), num_classes=None)) is None
    assert choices.teacher_of(dataclasses.replace(choose("digits-cd"), data=None)) is None


def test_a_large_edit_goes_in_parts_and_says_how_far_it_is(monkeypatch):
    picture = page.held_out(choose("tinted-digits-cd"), 3)[0][None]
    whole = end_of(work.edit("tinted-digits-cd", "colorize", picture, num=5, steps=3))
    monkeypatch.setattr(work, "BATCH_NUMBERS", 2 * 3 * 16 * 16)
    shares = []
    made = end_of(work.edit("tinted-digits-cd", "colorize", picture, num=5, steps=3), shares.append)
    assert len(shares) == 1 + 3 * 3 and shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert made.calls == whole.calls == 3 and torch.allclose(made.images, whole.images, atol=1e-5)


def test_a_conditional_model_is_told_the_class_to_edit():
    picture = page.held_out(choose("digits-cd"), 3)[0][None]
    with pytest.raises(ValueError, match="say what the picture shows, label 0 … 9"):
        end_of(work.edit("digits-cd", "denoise", picture))
    with pytest.raises(ValueError, match="of one class"):
        end_of(work.edit("digits-cd", "denoise", picture, labels=(1, 2)))
    assert end_of(work.edit("digits-cd", "denoise", picture, labels=(1,))).images.shape == (8, 1, 8, 8)


def test_results_are_whole_files_that_nobody_guesses_and_go_after_an_hour(tmp_path, monkeypatch):
    results, made = Results(tmp_path), end_of(work.generate("digits-cd", num=3, labels=(7,)))
    sheet, samples = results.keep(made)
    with np.load(samples) as file:
        assert file["arr_0"].shape == (3, 8, 8, 1) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [7] * 3
    assert Image.open(sheet).format == "PNG" and len(sheet.parent.name) >= 20
    later = kept.time.monotonic() + kept.KEPT + 1
    monkeypatch.setattr(kept.time, "monotonic", lambda: later)
    other, _ = results.keep(made)
    assert other.exists() and not sheet.exists()


def test_an_app_that_ends_removes_its_own_results_alone(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.txt").write_text("mine")
    script = f"from pathlib import Path; from cmlab.demo.results import Results; print(Results(Path({str(tmp_path)!r})).folder)"
    env = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path)}
    own = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(own).parent == tmp_path and not Path(own).exists()
    assert (tmp_path / "results" / "thesis.txt").read_text() == "mine"


# --- uploads --------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


GOOD = encoded(Image.new("RGB", (40, 30), "red"))
NONE, MANY = "this is no picture", "pixels; 25,000,000 are accepted at most"
HOSTILE = {
    "empty": (b"", NONE), "text": (b"hello", NONE), "html": (b"<html><script>alert(1)</script>", NONE),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NONE), "pickle": (b"\x80\x04cos\nsystem\n.", NONE),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", NONE),
    "icon": (encoded(Image.new("RGB", (32, 32), "red"), "ICO"), NONE), "truncated": (GOOD[: len(GOOD) // 2], NONE),
    "header only": (GOOD[:33], NONE), "no pixels": (bomb(4000, 4000), NONE), "bomb": (bomb(60_000, 60_000), MANY),
    "wide": (bomb(10**9, 1), MANY), "large": (bomb(6000, 5000), MANY), "heavy": (GOOD + bytes(11 * 2**20), "10 MB are accepted"),
    "jpeg cut": (encoded(Image.new("RGB", (900, 900), "red"), "JPEG")[:2000], NONE),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_uploads_are_refused_with_a_reason(name):
    data, reason = HOSTILE[name]
    with pytest.raises(ValueError, match=reason):
        uploads.decode(data)


class Sent:
    """What gradio makes of a canvas that is sent: files, and perhaps an id."""

    def __init__(self, background=None, layers=(), id=None):
        self.background, self.layers, self.composite, self.id = background, list(layers), background, id


def test_a_canvas_keeps_little_of_what_is_sent_and_refuses_many_layers(tmp_path):
    (tmp_path / "me.png").write_bytes(encoded(Image.new("RGB", (3000, 1500), "red")))
    file = FileData(path=str(tmp_path / "me.png"))
    read = uploads.read_upload(Sent(file, [file]))
    assert read["background"].size == read["layers"][0].size == (1024, 512)
    for sent in (Sent(file, [file] * 5), Sent(file, id="stored")):
        with pytest.raises(gradio.Error, match="4 layers of paint at most, and no id"):
            uploads.read_upload(sent)


def test_a_picture_is_turned_as_its_note_says():
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    image.paste("white", (0, 0, 20, 20))
    exif[0x0112] = 6  # turn by 90 degrees
    upright = uploads.decode(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[0] > 240 and upright.getpixel((10, 35))[0] < 15


def test_transparent_parts_are_white_and_sixteen_bits_keep_their_brightness():
    glass = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image, _ = uploads.read_canvas({"background": uploads.decode(encoded(glass)), "layers": []}, (3, 16, 16), False)
    assert torch.allclose(image, torch.ones(1, 3, 16, 16))
    deep = Image.fromarray(np.full((16, 16), 256 * 100, np.uint16))
    image, _ = uploads.read_canvas({"background": uploads.decode(encoded(deep)), "layers": []}, (1, 16, 16), False)
    assert torch.allclose((image + 1) * 127.5, torch.full((1, 1, 16, 16), 100.0))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_every_kind_of_picture_is_read(mode):
    form = "TIFF" if mode == "CMYK" else "PNG"
    assert uploads.decode(encoded(Image.new(mode, (9, 9)), form)).mode == "RGBA"


def test_paint_is_a_mask_where_it_covers_half_a_pixel_or_part_of_the_picture():
    paint = Image.new("RGBA", (32, 32))
    paint.paste((255, 255, 255, 255), (0, 16, 32, 32))
    paint.paste((255, 255, 255, 255), (0, 0, 1, 1))  # a quarter of one pixel
    value = {"background": Image.new("RGBA", (32, 32), "black"), "layers": [paint]}
    image, mask = uploads.read_canvas(value, (3, 16, 16), True)
    assert image.max() == -1 and mask[:8].all() and not mask[8:].any()
    image, mask = uploads.read_canvas(value, (3, 16, 16), False)
    assert mask is None and image[..., 8:, :].min() == 1 and image[..., 1:8, :].max() == -1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "canvas is empty"), (uploads.EMPTY, "canvas is empty"),
        ({"background": Image.new("RGBA", (8, 8)), "layers": []}, "nothing is painted over"),
        ({"background": Image.new("RGBA", (8, 8)), "layers": [Image.new("RGBA", (9, 8), "red")]}, "does not fit"),
    ],
)  # fmt: skip
def test_a_canvas_without_a_mask_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        uploads.read_canvas(value, (3, 16, 16), True)
