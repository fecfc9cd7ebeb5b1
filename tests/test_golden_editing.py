import pytest
from golden_tools import SigmasSeen, arrays, assert_close, facts, tiny_consistency_model

from cmlab.editing import Colorize, Inpaint, SuperResolve, edit
from cmlab.noise import karras_sigmas

SETTING = facts("editing")
TASKS = {
    "inpainting": lambda: Inpaint(arrays("editing")["mask"]),
    "colorization": Colorize,
    "superres": lambda: SuperResolve(SETTING["patch_size"]),
}


@pytest.mark.parametrize("name", TASKS)
def test_measurements_equal_the_reference(name):
    golden = arrays("editing")
    assert_close(TASKS[name]().measure(golden["images"]), golden[f"images_{name}"])


@pytest.mark.parametrize("name", TASKS)
def test_edits_equal_the_reference(name):
    golden, ts, model = arrays("editing"), SETTING["ts"], SigmasSeen(tiny_consistency_model(SETTING["model"]))
    assert ts[-1] == SETTING["steps"] - 1  # the reference's last draw is scaled by 0
    sigmas = karras_sigmas(SETTING["steps"], SETTING["t_min"], SETTING["t_max"], SETTING["rho"])[ts[:-1]]
    measurement, noises = golden[f"images_{name}"], golden[f"noise_{name}"][: len(sigmas)]
    image = edit(model, TASKS[name](), measurement, sigmas, noises=noises)
    assert_close(model.seen, golden[f"sigma_calls_{name}"])
    assert_close(image, golden[f"x_{name}"])
