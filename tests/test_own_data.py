"""From a folder of one's own pictures to a trained one-step model: recipes on other data sets, by the library and by the command."""

import pytest
import torch

from cmlab import planning
from cmlab.checkpoints import load
from cmlab.cli import main
from cmlab.data import load_data
from cmlab.pictures import read_picture
from cmlab.prepared import Prepared
from cmlab.recipes import fitted, get_recipe

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
    assert recipe.replace(data="digits", network=get_recipe("digits-edm").network) == get_recipe("digits-edm")


def test_a_unet_takes_the_size_the_channels_and_the_classes_of_the_data(spots):
    network = fitted(get_recipe("edm-bedroom256"), Prepared(spots)).network
    assert (network["image_size"], network["in_channels"], network["out_channels"]) == (16, 3, 3)
    assert network["num_classes"] == 2, "the published one is unconditional, these pictures have classes"
    assert fitted(get_recipe("edm-imagenet64"), load_data("digits")).network["in_channels"] == 1


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
    assert main(["train", "tinted-digits-edm", *brief, "--lr", "0.002", "--output", "edm"]) == 0
    assert main(["train", "tinted-digits-cd", *brief, "--teacher", "edm/model", "--output", "cd"]) == 0
    assert main(["sample", "cd/model", "--num", "3", "--output", "three.npz"]) == 0
    model = load("cd/model")
    assert model.info["shape"] == [3, 16, 16] and model.net.num_classes == 2 and model.info["data"] == str(spots)
    with pytest.raises(
        ValueError, match="held-out:0 is not there: of .*spots nothing was held back; name a picture file"
    ):
        read_picture(model, "held-out:0")
    state = torch.load("edm/state.pt", weights_only=True)["recipe"]
    assert (state["lr"], state["batch"], state["iterations"]) == (0.002, 4, 2)


def test_the_command_tells_what_a_training_on_a_folder_of_ones_own_would_be(spots, capsys):
    assert main(["train", "edm-imagenet64", "--data", str(spots), "--dry-run"]) == 0
    assert '"image_size": 16' in capsys.readouterr().out
    assert main(["train", "digits-cd", "--data", str(spots), "--teacher", "nowhere/model", "--smoke"]) == 0


def test_the_command_refuses_a_folder_that_holds_no_prepared_pictures(tmp_path, capsys):
    assert main(["train", "digits-edm", "--data", str(tmp_path), "--dry-run"]) != 0
    assert "holds no prepared data set; make one with cmlab data prepare" in capsys.readouterr().err
