"""The `cmlab` command: what it prints, where its results are, and what it says about bad input and Ctrl-C."""

import inspect
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmlab import checkpoints, doctor, drawing, pictures
from cmlab.checkpoints import load
from cmlab.cli import COMMANDS, main
from cmlab.data import load_data
from cmlab.extractors import get_extractor
from cmlab.recipes import RECIPES, get_recipe
from cmlab.training import train


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command, each with its lines joined."""
    capsys.readouterr()
    try:
        code = main(list(arguments))
    except SystemExit as end:  # of tyro: help and misuse
        code = end.code
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


# --- help and misuse ------------------------------------------------------------------------------------------------


def test_help_explains_each_command_with_an_example_without_loading_torch():
    code = "import sys; from cmlab.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    help_text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    flat = " ".join(help_text.replace("│", " ").split())
    for name in COMMANDS:
        assert f"• {name}" in flat and f"Example: cmlab {name}" in flat


def test_every_option_of_every_command_is_explained():
    for name, command in COMMANDS.items():
        explained = re.findall(r"^        (\w+): \w", command.__doc__, re.M)
        assert explained == list(inspect.signature(command).parameters), name


def test_misuse_exits_with_2(capsys):
    assert outcome(capsys, "tuor")[0] == 2
    assert outcome(capsys, "sample")[0] == 2
    assert outcome(capsys, "tour", "--fsat")[0] == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train digits-ed", "unknown recipe 'digits-ed'. Did you mean 'digits-edm'"),
        ("train digits-edm --iterations 0", "iterations must be at least 1, got 0"),
        ("train digits-edm --resume nowhere", "nothing to resume: nowhere/state.pt does not exist"),
        ("train digits-edm --output file/run", "cannot write to the output folder file/run: Not a directory"),
        ("tour --resume nowhere", "nothing to resume: nowhere/results.json does not exist"),
        ("sample digit-cd", "unknown model or folder 'digit-cd'. Did you mean 'digits-cd'"),
        ("sample file", "file is no model: that is a .pt file in the released form"),
        ("sample digits-cd --num 0", "num must be at least 1, got 0"),
        ("sample digits-cd --labels 3 10", "labels must lie in 0 … 9, got 3 10"),
        (
            "sample digits-cd --sampler huen",
            "unknown sampler for a consistency model: 'huen'. Known: onestep, multistep",
        ),
        ("sample digits-edm --sampler huen", "Did you mean 'heun'"),
        ("sample digits-cd --steps 2 --sampler onestep", "the onestep sampler makes one step, got steps 2"),
        ("sample digits-cd --output samples.npy", "the output is a .npz file, got samples.npy"),
        ("sample digits-cd --num 1 --output file/a.npz", "cannot write to the output folder"),
        ("edit digits-cd inpaint held-out:0 --output a.jpg", "the output is a .png file, got a.jpg"),
        ("edit digits-cd inpaint held-out:0 --output file/a.png", "cannot write to the output folder"),
        ("sample digits-cd --device cuda", "device 'cuda' is not usable: this torch"),
        ("train moons-edm --output run --resume run", "--resume: leave out output, which would have no effect"),
        ("train digits-classifier --iterations 5 --seed 1", "digits-classifier: leave out iterations, seed"),
        ("tour --resume run --fast --only 02", "--resume: leave out only, fast"),
        ("tour --lab --fast", "--lab: leave out fast"),
        ("edit digits-cd inpait held-out:0", "unknown task 'inpait'. Did you mean 'inpaint'"),
        ("edit digits-edm inpaint held-out:0", "editing needs a consistency model, got a denoiser"),
        ("edit digits-cd inpaint held-out:360", "held-out:N takes a number 0 … 359, got 'held-out:360'"),
        ("edit digits-cd inpaint nowhere.png", "no such picture: nowhere.png"),
        ("edit digits-cd inpaint file", "file cannot be read as a picture"),
        ("edit digits-cd inpaint half.png", "half.png cannot be read as a picture"),
        ("edit digits-cd inpaint grey.png", "say what the picture shows, label 0 … 9"),
        ("edit digits-cd inpaint held-out:0 --label 10", "labels must lie in 0 … 9, got 10"),
        ("edit digits-cd inpaint held-out:0 --mask lowr", "unknown mask 'lowr'. Did you mean 'lower'"),
        ("edit digits-cd inpaint held-out:0 --mask grey.png", "mask grey.png must be 8 x 8 pixels, got 20 x 10"),
        ("edit digits-cd super-resolve held-out:0 --factor 3", "factor 3 does not divide the image size 8 x 8"),
        ("edit digits-cd colorize held-out:0", "Colorize takes images of 3 channels, got 1"),
        ("edit digits-cd denoise held-out:0 --sigma 0", "sigma must lie above 0.002, up to the model's 20, got 0"),
        ("edit digits-cd stroke held-out:0 --sigma 21", "sigma must lie above 0.002, up to the model's 20, got 21"),
        ("edit digits-cd interpolate held-out:0", "interpolate takes 2 pictures, got 1"),
        ("edit digits-cd interpolate held-out:0 held-out:0", "interpolate needs a denoiser"),
        ("evaluate nowhere.npz digits", "no such samples: nowhere.npz"),
        ("evaluate file digits", "file is no .npz of samples"),
        ("evaluate floats.npz digits", "arr_0 must be uint8 (N, H, W, 1 or 3), got float64 (2, 8, 8, 1)"),
        ("evaluate pixels.npz tinted-digits", "the reference images do not suit the extractor: images must have shape"),
        ("sample digits-dc", "Did you mean 'digits-cd'"),
        ("evaluate pixels.npz digit", "unknown data set 'digit'. Did you mean 'digits'"),
        ("evaluate pixels.npz digits:heldout", "Did you mean 'held-out'"),
        ("batch nowhere.yaml", "no such sweep file: nowhere.yaml"),
        ("refresh", "name lessons (cmlab refresh 02) or give --all"),
        ("refresh nowhere.ipynb", "No such file or directory: 'nowhere.ipynb'"),
    ],
)
def test_bad_input_gives_one_clear_line_and_exit_code_1(here, capsys, command, message):
    (here / "file").write_text("neither a folder nor a picture")
    Image.new("L", (20, 10), 128).save(here / "grey.png")
    Image.effect_noise((64, 64), 50).save(here / "noise.png")
    (here / "half.png").write_bytes((here / "noise.png").read_bytes()[:1000])
    np.savez(here / "floats.npz", np.zeros((2, 8, 8, 1)))
    np.savez(here / "pixels.npz", np.zeros((8, 8, 8, 1), np.uint8))
    code, _, error = outcome(capsys, *command.split())
    assert code == 1 and message in error and "Traceback" not in error


def test_debug_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setenv("CMLAB_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown recipe"):
        main(["train", "digits-ed"])


# --- sample, edit, evaluate -----------------------------------------------------------------------------------------


def test_samples_are_pixels_with_labels_and_do_not_depend_on_their_number(here, capsys):
    code, out, _ = outcome(capsys, "sample", "digits-cd", "--num", "12", "--steps", "2", "--output", "a.npz")
    assert code == 0 and str(here / "a.npz") in out and str(here / "a.png") in out
    outcome(capsys, "sample", "digits-cd", "--num", "5", "--steps", "2", "--output", "b.npz")
    with np.load("a.npz") as a, np.load("b.npz") as b:
        assert a["arr_0"].shape == (12, 8, 8, 1) and a["arr_0"].dtype == np.uint8
        assert a["arr_1"].tolist() == [*range(10), 0, 1]
        assert np.abs(a["arr_0"][:5].astype(int) - b["arr_0"]).max() <= 1  # matrix products round by batch size
    assert Image.open("a.png").size[0] > 8 * 10


def test_pictures_beyond_one_batch_have_noises_of_their_own():
    images, _ = drawing.draw(load("digits-cd"), drawing.BATCH + 2, labels=(3,))
    alone, _ = drawing.draw(load("digits-cd"), drawing.BATCH + 1, labels=(3,))
    assert torch.allclose(images[drawing.BATCH], alone[drawing.BATCH], atol=1e-5)
    assert not torch.allclose(images[drawing.BATCH], images[0], atol=1e-2)


@pytest.mark.parametrize("sampler", sorted(drawing.DIFFUSION))
def test_every_diffusion_sampler_draws_digits_of_the_class_asked_for(sampler):
    images, labels = drawing.draw(load("digits-edm"), 20, steps=18, sampler=sampler)
    _, logits = checkpoints.load_classifier("digits-classifier")(images)
    assert (logits.argmax(1) == labels).sum() >= 18


def test_evaluate_measures_samples_against_a_data_set(here, capsys):
    outcome(capsys, "sample", "digits-cd", "--num", "200", "--output", "a.npz")
    code, out, _ = outcome(capsys, "evaluate", "a.npz", "digits:held-out")
    numbers = dict(line.split() for line in out.splitlines())
    assert code == 0 and numbers["extractor"] == "digits-classifier"
    assert (numbers["samples"], numbers["reference"]) == ("200", "360")
    assert float(numbers["accuracy"]) > 0.9 and 0 < float(numbers["fd"]) < 10


def test_a_reference_batch_brings_the_moments_of_its_whole_data_set(here, capsys):
    """The layout of ADM's: images for precision and recall, mu and sigma for the Fréchet distance."""
    outcome(capsys, "sample", "digits-cd", "--num", "200", "--output", "a.npz")
    train = load_data("digits").images
    features = get_extractor("digits-classifier")(train).features.double().numpy()
    pixels = ((train[:50] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez("part.npz", arr_0=pixels)
    np.savez("batch.npz", arr_0=pixels, mu=features.mean(0), sigma=np.cov(features, rowvar=False), mu_s=1, sigma_s=1)
    np.savez("other.npz", arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048))
    part, batch, whole = (
        dict(line.split() for line in outcome(capsys, "evaluate", "a.npz", reference)[1].splitlines())
        for reference in ("part.npz", "batch.npz", "digits")
    )
    assert batch["fd"] == whole["fd"] != part["fd"] and batch["recall"] == part["recall"] != whole["recall"]
    code, _, error = outcome(capsys, "evaluate", "a.npz", "other.npz")
    assert code == 1 and "the second mean must have shape (64,), got (2048,)" in error


def test_what_was_made_before_is_kept_and_every_training_has_a_name_of_its_own(here, capsys):
    assert "runs/samples-digits-cd.npz" in outcome(capsys, "sample", "digits-cd", "--num", "20")[1]
    assert "runs/samples-digits-cd-2.npz" in outcome(capsys, "sample", "digits-cd", "--num", "4")[1]
    with np.load("runs/samples-digits-cd.npz") as file:
        assert len(file["arr_0"]) == 20
    shutil.copytree(checkpoints.EMBEDDED_FOLDER / "digits-cd", here / "runs" / "mine" / "model")
    assert "runs/samples-mine.npz" in outcome(capsys, "sample", "runs/mine/model", "--num", "4")[1]


def test_inpainting_keeps_the_known_half_in_the_written_picture(here, capsys):
    code, out, _ = outcome(capsys, "edit", "digits-cd", "inpaint", "held-out:4", "--mask", "lower", "--num", "3")
    assert code == 0 and str(here / "runs" / "edit-inpaint.png") in out
    sheet = np.asarray(Image.open(here / "runs" / "edit-inpaint.png"))[::8, ::8]  # one pixel of each enlarged one
    original, *results = (sheet[:, k : k + 8] for k in (0, 18, 27, 36))
    assert all((result[:4] == original[:4]).all() for result in results)
    assert any((result[4:] != original[4:]).any() for result in results)


def test_every_task_edits_a_tinted_digit():
    model = load("tinted-digits-cd")
    for task in ("inpaint", "colorize", "super-resolve", "denoise", "stroke"):
        row = pictures.edit_picture(model, task, ("held-out:1",), num=2)
        assert row.shape == (4, 3, 16, 16) and row.isfinite().all()
        assert not torch.equal(row[2], row[3]), "two results from two noises"


def test_interpolation_begins_and_ends_near_the_two_pictures():
    row = pictures.edit_picture(
        load("digits-cd"), "interpolate", two_of_a_class(), num=5, steps=18, denoiser="digits-edm"
    )
    first, *way, last = row
    near, far = (way[0] - first).norm() + (way[-1] - last).norm(), (way[0] - last).norm() + (way[-1] - first).norm()
    assert near < 0.7 * far


def two_of_a_class() -> tuple[str, str]:
    labels = load_data("digits").held_out_labels
    return tuple(f"held-out:{k}" for k in torch.nonzero(labels == labels[0]).flatten()[:2].tolist())


def test_a_picture_file_is_cut_square_and_scaled(here):
    picture = Image.new("RGB", (64, 32), "white")
    picture.paste("black", (16, 0, 48, 16))  # the upper half of the middle square
    picture.save("wide.png")
    pixels, label = pictures.read_picture(load("digits-cd"), "wide.png")
    assert label is None and pixels.shape == (1, 8, 8)
    assert (pixels[:, :4] == -1).all() and (pixels[:, 4:] == 1).all()


@pytest.mark.parametrize(("size", "scale"), [(8, 8), (24, 3), (48, 2), (64, 1), (100, 1)])
def test_a_sheet_is_enlarged_until_a_picture_has_64_pixels_a_side(here, size, scale):
    pictures.save_sheet(Path("sheet.png"), torch.zeros(1, 3, size, size), columns=1)
    assert Image.open("sheet.png").size == (size * scale, size * scale)


def test_masks_fill_in_the_region_they_name(here):
    assert pictures.read_mask("left", 4, 4).tolist() == [[0, 0, 1, 1]] * 4
    assert pictures.read_mask("upper", 4, 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert pictures.read_mask("center", 8, 8).sum() == 64 - 16
    Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).save("mask.png")
    assert pictures.read_mask("mask.png", 2, 2).tolist() == [[0, 1], [1, 0]]


# --- recipes, doctor, train -----------------------------------------------------------------------------------------


def test_recipes_are_listed(capsys):
    code, out, _ = outcome(capsys, "recipes")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == list(RECIPES)


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    code = "import sys; from cmlab.cli import main; sys.exit(main())"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code, "recipes"], **pipes) as process:
        process.stdout.close()  # as `| head` does, before anything is written
        assert process.stderr.read() == "cmlab: who read the output has gone\n"
    assert process.returncode == 1


def test_doctor_finds_this_environment_ready(capsys):
    code, out, _ = outcome(capsys, "doctor")
    assert code == 0 and "ready: start with cmlab tour" in out and "BROKEN" not in out
    for name in ("Python", "torch", "CUDA build", "GPU", "cores", "memory", "free disk", "chromium", "digits-cd"):
        assert any(name in line for line in out.splitlines())
    missing = [k for k, line in enumerate(out.splitlines()) if line.startswith("missing")]
    assert all("-> " in out.splitlines()[k + 1] for k in missing), "what is missing comes with what to do"


def test_doctor_looks_for_every_package_of_the_project_file():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    named = re.findall(r'^    "([\w-]+)', text.partition("\ndependencies")[2].partition("\n]")[0], re.M)
    assert "torch" in named and sorted(doctor.required()) == sorted(named)


def test_doctor_tells_a_missing_package_and_a_damaged_model(capsys, monkeypatch, tmp_path):
    shutil.copytree(checkpoints.EMBEDDED_FOLDER / "digits-cd", tmp_path / "digits-cd")
    weights = tmp_path / "digits-cd" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setattr(checkpoints, "EMBEDDED_FOLDER", tmp_path)
    monkeypatch.setattr(checkpoints, "EMBEDDED", ("digits-cd",))
    monkeypatch.setattr(doctor, "required", lambda: ["torch", "a-package-that-is-not-there"])
    code, out, _ = outcome(capsys, "doctor")
    assert code == 1 and "not ready: a-package-that-is-not-there, digits-cd" in out
    assert "run: bash installations.sh" in out and "git checkout cmlab/embedded/digits-cd" in out


def test_a_trained_model_can_be_sampled(here, capsys):
    code, out, _ = outcome(capsys, "train", "digits-edm", "--iterations", "2", "--output", "run", "--device", "cpu")
    assert code == 0 and str(here / "run" / "model") in out
    assert outcome(capsys, "sample", "run/model", "--num", "1", "--steps", "1")[0] == 0
    code, _, error = outcome(capsys, "train", "digits-edm", "--iterations", "2", "--output", "run")
    assert code == 1 and "run holds a run already: go on with it with --resume run" in error


def test_ctrl_c_in_train_keeps_every_step_and_says_how_to_go_on(here, capsys):
    command = "train moons-edm --iterations 100000 --device cpu --output run --save-every 50000".split()
    code = "import sys; from cmlab.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True)
    said = ""
    while not said.endswith("loss"):  # in the progress bar: it trains
        said += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    stopped = int(re.search(r"stopped after step (\d+) of 100000; its state and model are in run", errors)[1])
    assert (
        "go on with: cmlab train moons-edm --iterations 100000 --device cpu --save-every 50000 --resume run" in errors
    )
    plan = get_recipe("moons-edm").replace(iterations=100000)
    assert next(train(plan, device="cpu", folder=here / "run", resume=True)).step == stopped + 1
    assert load(here / "run" / "model").sigma_max == 10.0
