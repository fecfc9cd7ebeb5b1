"""From a folder of one's own pictures to a trained one-step model: recipes on other data sets, by the library and by the command."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmlab import planning
from cmlab.checkpoints import load, save
from cmlab.cli import main
from cmlab.data import load_data
from cmlab.models import build
from cmlab.pictures import read_picture, some_of
from cmlab.prepared import Prepared
from cmlab.recipes import fitted, get_recipe
from cmlab.training import train

TEACHER = "runs/mine/model"


@pytest.fixture
def spots(tmp_path, monkeypatch):
    """A prepared data set of soft spots, 3 x 16 x 16, of two classes; the test works in an empty folder beside it."""
    folder = planning._pictures(tmp_path / "pictures", 16, 2)
    assert main(["data", "prepare", str(folder), "--size", "16", "--output", str(tmp_path / "spots")]) == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "spots"


def test_a_fully_connected_network_takes_the_shape_and_the_classes_of_the_data(spots):
    recipe = fitted(get_recipe("digits-edm"), Prepared(spots))
    assert recipe.network == get_recipe("digits-edm").network | {"shape": [3, 16, 16], "num_classes": 2}
    own = get_recipe("digits-edm")
    assert recipe.replace(data="digits", network=own.network, cost=own.cost, expected=own.expected) == own


def test_a_unet_takes_the_size_the_channels_and_the_classes_of_the_data(spots):
    network = fitted(get_recipe("edm-imagenet64"), Prepared(spots)).network
    assert (network["image_size"], network["in_channels"], network["out_channels"]) == (16, 3, 3)
    assert network["num_classes"] == 2
    with torch.device("meta"):
        build(network)  # it exists
    grey = fitted(get_recipe("edm-bedroom256"), load_data("digits")).network
    assert (grey["in_channels"], grey["num_classes"]) == (1, 10), "the published one is coloured and unconditional"


@pytest.mark.parametrize(
    ("name", "teacher", "roles"),
    [
        ("digits-edm", None, (None, None)),
        ("digits-cd", TEACHER, (TEACHER, TEACHER)),
        ("digits-ct", TEACHER, (None, TEACHER)),
        ("digits-ct", None, (None, None)),  # from random weights
        ("moons-cd", None, ("exact", None)),  # the exact denoiser is that of whatever data there are
    ],
)
def test_the_named_teacher_takes_the_place_of_every_model_that_knows_other_pictures(name, teacher, roles):
    recipe = fitted(get_recipe(name), load_data("tinted-digits"), teacher)
    assert (recipe.teacher, recipe.init_from) == roles


@pytest.mark.parametrize(
    ("name", "data", "teacher", "message"),
    [
        ("digits-cd", "tinted-digits", None, "teacher is missing: digits-cd distils digits-edm, which does not know tinted"),
        ("digits-edm", "tinted-digits", TEACHER, "teacher must be left out, got 'runs/mine/model': digits-edm takes none"),
        ("edm-imagenet64", "moons", None, r"data must be square pictures for a U-Net, got moons of shape \(2,\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(name, data, teacher, message):
    with pytest.raises(ValueError, match=message):
        fitted(get_recipe(name), load_data(data), teacher)


def test_the_command_trains_a_teacher_and_distils_it_on_a_folder_of_ones_own(spots, capsys):
    brief = ["--data", str(spots), "--iterations", "2", "--batch", "4", "--tracker", "none"]
    assert main(["train", "tinted-digits-edm", *brief, "--lr", "0.002", "--sigma-data", "0.6", "--output", "edm"]) == 0
    assert main(["train", "tinted-digits-cd", *brief, "--teacher", "edm/model", "--output", "cd"]) == 0
    assert main(["sample", "cd/model", "--num", "3", "--output", "three.npz"]) == 0
    model = load("cd/model")
    assert model.info["shape"] == [3, 16, 16] and model.net.num_classes == 2 and model.info["data"] == str(spots)
    with pytest.raises(
        ValueError, match="held-out:0 is not there: of .*spots nothing was held back; name a picture file"
    ):
        read_picture(model, "held-out:0")
    assert load("edm/model").sigma_data == 0.6 and model.sigma_data == 0.5
    state = torch.load("edm/state.pt", weights_only=True)["recipe"]
    assert (state["lr"], state["batch"], state["iterations"]) == (0.002, 4, 2)


def test_the_command_tells_what_a_training_on_a_folder_of_ones_own_would_be(spots, capsys):
    assert main(["train", "edm-imagenet64", "--data", str(spots), "--dry-run"]) == 0
    assert '"image_size": 16' in capsys.readouterr().out
    assert main(["train", "digits-cd", "--data", str(spots), "--teacher", "nowhere/model", "--smoke"]) == 0


def test_samples_are_measured_against_prepared_pictures_of_every_class(spots, capsys):
    """Prepared pictures are sorted by class: the first few would be of one."""
    data = Prepared(spots)
    order = torch.cat([batch for batch in some_of(data, data.count)])
    assert len(order) == 8 and not torch.equal(order, data.batch(torch.arange(8), torch.Generator())[0])
    assert torch.equal(torch.cat(list(some_of(data, 3))), order[:3])
    pixels = ((order + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez("samples.npz", arr_0=pixels)
    assert main(["evaluate", "samples.npz", str(spots)]) == 0
    assert re.search(r"^fd +-?0\.0000", capsys.readouterr().out, re.M), "against themselves"
    assert main(["evaluate", "samples.npz", f"{spots}:held-out"]) != 0
    assert "nothing was held back" in capsys.readouterr().err


def test_a_folder_is_known_by_its_whole_path_and_never_hides_a_prepared_name(spots, tmp_path, monkeypatch):
    monkeypatch.setenv("CMLAB_DATA", str(tmp_path))
    Path("spots").mkdir()  # an unrelated folder of that name, here
    assert load_data("spots").count == 8
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMLAB_DATA", str(tmp_path / "elsewhere"))
    assert load_data("spots").name == load_data(str(spots)).name == str(spots)


def test_a_start_or_a_teacher_of_another_kind_is_named(spots):
    brief = fitted(get_recipe("tinted-digits-cd"), Prepared(spots), "tinted-digits-edm").replace(batch=4, iterations=1)
    with pytest.raises(
        ValueError, match="the model to start from, tinted-digits-edm, has another network than the recipe"
    ):
        next(train(brief))
    unet = get_recipe("tinted-unet-edm").replace(init_from="tinted-digits-edm", batch=4, iterations=1)
    with pytest.raises(ValueError, match="the model to start from, tinted-digits-edm, has another network"):
        next(train(unet))
    with pytest.raises(ValueError, match="teacher must be a denoiser, whose ODE is walked; got a consistency model"):
        next(train(get_recipe("digits-cd"), teacher=load("digits-cd")))


def test_options_without_effect_are_refused(capsys):
    for arguments, names in (
        (["train", "digits-classifier", "--dry-run", "--precision", "fp32"], "precision, dry_run"),
        (["data", "prepare", "cat256", "--colour", "grey", "--split", "x"], "colour, split"),
    ):
        assert main(arguments) != 0
        assert f"leave out {names}" in capsys.readouterr().err


def test_the_command_refuses_a_folder_that_holds_no_prepared_pictures(tmp_path, capsys):
    assert main(["train", "digits-edm", "--data", str(tmp_path), "--dry-run"]) != 0
    assert "holds no prepared data set; make one with cmlab data prepare" in capsys.readouterr().err


def test_nothing_of_the_users_is_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    assert main(["export", "tinted-unet-cd", "notes.txt"]) != 0
    assert "it is a file; name a folder" in capsys.readouterr().err and Path("notes.txt").read_text() == "mine"
    Image.new("L", (8, 8)).save("me.png")
    before = Path("me.png").read_bytes()
    assert main(["edit", "digits-cd", "inpaint", "me.png", "--label", "3", "--output", "me.png"]) != 0
    assert "output must not be the picture itself" in capsys.readouterr().err and Path("me.png").read_bytes() == before


def test_mistakes_are_met_with_the_way_out(spots, capsys):
    Path("run").mkdir()
    save(load("digits-cd"), "run/model")
    for arguments, message in (
        (["sample", "run"], "config.json is missing; there is one in"),
        (["train", "digits-edm", "--data", "datasets/mine", "--dry-run"], "there is no folder datasets/mine"),
        (["batch", "sweep.yaml"], "no such sweep file: sweep.yaml"),
        (["train", "moons-edm", "--tracker", "wandb", "--output", "w"], "tracker wandb is not installed"),
    ):
        assert main(arguments) != 0
        assert message in capsys.readouterr().err
