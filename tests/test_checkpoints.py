import json
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from golden_tools import tiny_unet
from safetensors.torch import load_file, save_file
from torch import nn
from toys import draws, random_model, random_net

from cmlab import checkpoints
from cmlab.models.classifier import DigitsClassifier
from cmlab.scaling import ConsistencyModel, Denoiser


@pytest.fixture
def folder(tmp_path):
    """A saved consistency model with random weights."""
    return checkpoints.save(random_model(num_classes=10), tmp_path / "model", data="digits", recipe="digits-cd")


def parts(folder):
    return sorted(path.name for path in folder.iterdir())


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", [Denoiser, ConsistencyModel])
def test_a_loaded_model_computes_what_the_saved_one_did(kind, tmp_path):
    model, x = kind(random_net(num_classes=10), 0.75, 0.01, 20.0), draws(3, 1, 8, 8)
    checkpoints.save(model, tmp_path / "a")
    loaded, labels = checkpoints.load(tmp_path / "a"), torch.tensor([0, 5, 9])
    assert type(loaded) is kind and (loaded.sigma_min, loaded.sigma_max) == (0.01, 20.0)
    assert torch.equal(loaded(x, 2.0, labels), model(x, 2.0, labels))


def test_a_loaded_model_is_ready_to_use_and_knows_where_it_comes_from(folder):
    model = checkpoints.load(str(folder))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.info["data"] == "digits" and model.info["facts"] == {"recipe": "digits-cd"}
    assert model.info["shape"] == [1, 8, 8] and model.info["num_classes"] == 10


def test_the_u_net_survives_the_round_trip(tmp_path):
    model = ConsistencyModel(tiny_unet("ssn_class"))
    loaded = checkpoints.load(checkpoints.save(model, tmp_path / "unet"))
    assert loaded.info["shape"] == [3, 16, 16] and loaded.net.config == model.net.config
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_classifier_survives_the_round_trip(tmp_path):
    model, images = DigitsClassifier(3, 16).eval(), draws(2, 3, 16, 16)
    loaded = checkpoints.load_classifier(checkpoints.save(model, tmp_path / "c", data="tinted-digits"))
    assert torch.equal(loaded(images)[1], model(images)[1]) and loaded.info["shape"] == [3, 16, 16]


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path):
    model, x = random_model(), draws(2, 1, 8, 8)
    full, half = checkpoints.save(model, tmp_path / "f"), checkpoints.save(model, tmp_path / "h", dtype=torch.float16)
    sizes = [(f / "model.safetensors").stat().st_size for f in (full, half)]
    assert 0.5 < sizes[1] / sizes[0] < 0.6
    loaded = checkpoints.load(half)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.allclose(loaded(x, 1.0), model(x, 1.0), atol=5e-3) and not torch.equal(loaded(x, 1.0), model(x, 1.0))


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-5)])
def test_a_model_works_in_the_precision_it_is_loaded_in(dtype, close):
    x, labels = draws(4, 1, 8, 8), torch.arange(4)
    model = checkpoints.load("digits-cd", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = checkpoints.load("digits-cd")(x, 1.0, labels)
    out = model(x, 1.0, labels)
    assert out.dtype == torch.float32 and (out - expected).abs().max() < close  # only the network is in dtype
    assert (model(x.to(dtype), 1.0, labels) - expected).abs().max() < 2 * close


def test_a_folder_called_like_an_embedded_model_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.save(random_model(), "digits-cd")
    assert checkpoints.load("./digits-cd").info["network"]["width"] == 32
    assert checkpoints.load("digits-cd").info["network"]["width"] == 512


def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    checkpoints.load(folder)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", checkpoints.EMBEDDED)
def test_every_embedded_model_loads_and_is_small(name):
    load = checkpoints.load_classifier if name.endswith("-classifier") else checkpoints.load
    model = load(name)
    assert all(p.isfinite().all() for p in model.parameters())
    assert (checkpoints.EMBEDDED_FOLDER / name / "model.safetensors").stat().st_size <= 6_000_000


def test_saving_again_replaces_the_model_and_leaves_nothing_else(folder):
    new = checkpoints.save(random_model(Denoiser, seed=7), folder)
    assert new == folder and isinstance(checkpoints.load(folder), Denoiser)
    assert parts(folder) == ["config.json", "model.safetensors"] and parts(folder.parent) == ["model"]


def test_a_model_in_a_place_that_is_no_folder_is_refused(folder):
    inside = folder / "config.json" / "model"
    with pytest.raises(OSError, match="cannot save to .*config.json/model: .*What was there before is untouched"):
        checkpoints.save(random_model(), inside)
    checkpoints.load(folder)


@contextmanager
def disk_of(size):
    """No file may grow beyond size bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_previous_version(folder):
    before = (folder / "model.safetensors").read_bytes()
    with disk_of(10_000), pytest.raises(OSError, match="cannot save to .*model: .*What was there before is untouched"):
        checkpoints.save(random_model(seed=3), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert parts(folder.parent) == ["model"]


def test_a_save_between_its_two_renames_can_be_read_and_is_healed_by_the_next_save(folder):
    folder.rename(folder.with_name(".model.previous"))  # the state at that moment
    assert isinstance(checkpoints.load(folder), ConsistencyModel)
    assert parts(folder.parent) == [".model.previous"], "reading must not rename under a save that goes on"
    checkpoints.save(random_model(Denoiser), folder)
    assert isinstance(checkpoints.load(folder), Denoiser) and parts(folder.parent) == ["model"]


KILLED = """
import sys, itertools
sys.path.insert(0, sys.argv[2])
from toys import random_model
from cmlab import checkpoints
print("ready", flush=True)
for seed in itertools.count():
    checkpoints.save(random_model(seed=seed), sys.argv[1], number=seed)
    print(seed, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_model(tmp_path, request):
    target = tmp_path / "model"
    command = [sys.executable, "-c", KILLED, str(target), str(request.path.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        finished = [process.stdout.readline() for _ in range(6)]  # "ready", "0" … "4"
        process.kill()
    number = checkpoints.load(target).info["facts"]["number"]
    assert number >= int(finished[-1])
    expected = random_model(seed=number).net.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in load_file(target / "model.safetensors").items())


def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OSError, match="cannot save to .*it holds 'thesis.tex', which is no part of a saved model"):
        checkpoints.save(random_model(), tmp_path)
    assert parts(tmp_path) == ["thesis.tex"]


def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path):
    model = random_model()
    with pytest.raises(TypeError, match=r"model must be one of \['Denoiser', .*\], got Linear"):
        checkpoints.save(nn.Linear(1, 1), tmp_path / "m")
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(model, tmp_path / "m", when=object())
    with pytest.raises(ValueError, match="dtype must be one of .*float16, got torch.int8"):
        checkpoints.save(model, tmp_path / "m", dtype=torch.int8)
    model.net.enter.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match="weight enter.weight is not finite in torch.float16"):
        checkpoints.save(model, tmp_path / "m", dtype=torch.float16)
    assert parts(tmp_path) == []


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\x00")


def pickled_weights(folder):
    torch.save({"enter.weight": torch.zeros(1)}, folder / "model.safetensors")


def cut_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:-30])


def other_weights(folder):
    save_file({"conv.weight": torch.zeros(3)}, folder / "model.safetensors")


def one_shape_differs(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"enter.bias": torch.zeros(5)}, folder / "model.safetensors")


DAMAGES = [
    (cut_weights, "model.safetensors is cut off or is no safetensors file"),
    (cut_header, "model.safetensors is cut off or is no safetensors file"),
    (pickled_weights, "model.safetensors is cut off or is no safetensors file"),
    (lambda f: (f / "model.safetensors").unlink(), "is not a saved model: model.safetensors is missing"),
    (lambda f: (f / "config.json").unlink(), "is not a saved model: config.json is missing"),
    (cut_config, r"config.json cannot be read as JSON \(.*\); is it cut off\?"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json must hold a JSON object, got list"),
    (lambda f: (f / "config.json").write_text('{"_class_name": "UNet2DModel"}'), "is not a config of this package"),
    (lambda f: change_config(f, format=2), "format must be 1, got 2"),
    (lambda f: change_config(f, kind="consistancy"), "unknown kind .*'consistancy'. Did you mean 'consistency'"),
    (lambda f: (f / "config.json").write_text('{"format": 1, "kind": "denoiser"}'), "lacks network, shape, sigma_data"),
    (lambda f: change_config(f, sigma_data="half", network=[]), "lacks network, sigma_data, or has something else"),
    (lambda f: change_config(f, sigma_min=-1.0), "need 0 < sigma_min <= sigma_max, got -1.0"),
    (lambda f: change_config(f, network={"name": "mpl"}), "unknown network 'mpl'. Did you mean 'mlp'"),
    (lambda f: change_config(f, network={"name": "mlp", "shape": [2], "legs": 4}), "does not fit ResidualMLP.*'legs'"),
    (other_weights, r"does not fit its config: .* is missing; .* \(and \d+ more\)"),
    (one_shape_differs, r"does not fit its config: enter.bias has shape \(5,\), the network \(32,\)"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_or_foreign_folder_is_refused_with_the_reason(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(folder)


def test_a_device_that_is_not_there_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda:0' is not usable: this torch .* finds no GPU here; take 'cpu'"):
        checkpoints.load(folder, device="cuda:0")


def test_names_and_paths_that_are_no_model_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="'digits-edn'. Did you mean 'digits-edm'"):
        checkpoints.load("digits-edn")
    with pytest.raises(
        ValueError, match="config.json is no model: that is a .pt file in the released form, or a folder"
    ):
        checkpoints.load(folder / "config.json")
    with pytest.raises(ValueError, match="holds a classifier; load it with load_classifier"):
        checkpoints.load("digits-classifier")
    with pytest.raises(ValueError, match="holds a ConsistencyModel, no classifier; load it with load"):
        checkpoints.load_classifier(folder)
