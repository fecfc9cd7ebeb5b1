import json
import re

import pytest
import torch

from cmlab import planning
from cmlab.cli import main
from cmlab.models import build
from cmlab.recipes import RECIPES, get_recipe
from cmlab.released import IMAGENET64
from cmlab.training import train

from test_scripts import PUBLISHED  # isort: skip

MLP = dict(name="mlp", shape=[1, 8, 8], width=32, depth=2, num_classes=10, embedding=16)


def test_operations_of_a_network_of_matrices_are_two_a_weight():
    net = build(MLP)
    matrices = [p for name, p in net.named_parameters() if p.ndim == 2 and not name.startswith("label")]
    assert planning.forward_flops(MLP) == 2 * sum(p.numel() for p in matrices)


def test_the_imagenet_network_needs_some_two_hundred_gigaflop_an_image():
    assert 200e9 < planning.forward_flops(dict(name="unet", **IMAGENET64)) < 230e9


@pytest.mark.parametrize(
    ("recipe", "calls"),
    [
        ("edm-imagenet64", 3),  # forward, and a backward pass of two
        ("cd-imagenet64-l2", 3 + 1 + 2),  # target, and two calls of the teacher in a Heun step
        ("ct-imagenet64", 3 + 1),
        ("digits-cd", 3 + 1 + 4),  # two substeps
        ("digits-pd-short", 3 + 2),
        ("digits-scd-short", 3 + 2 + 1),  # a pass that carries tangents, and the teacher
        ("digits-meanflow-short", 3 + 2),
    ],
)
def test_network_calls_of_a_training_image(recipe, calls):
    assert planning.network_calls(get_recipe(recipe)) == calls
    assert planning.network_calls(get_recipe(recipe).replace(checkpointing=True)) == calls + 1


def test_activations_are_those_that_autograd_keeps():
    """On the CPU, where the tensors are real: the same count by the same hooks, less what is a weight."""
    recipe = get_recipe("digits-edm").replace(network=MLP, precision="fp32")
    kept, net = {}, build(MLP)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net.train()(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    real = sum(t.numel() * t.element_size() for t in kept.values())
    assert planning.activation_bytes(recipe) == pytest.approx(real, rel=0.5)


def test_checkpointing_and_micro_batches_save_memory():
    recipe = get_recipe("cd-imagenet64-l2")
    assert planning.activation_bytes(recipe.replace(checkpointing=True)) < 0.5 * planning.activation_bytes(recipe)
    few, many = (sum(planning.memory_bytes(recipe.replace(micro_batches=n), 1).values()) for n in (64, 256))
    assert many < 0.7 * few
    assert sum(planning.memory_bytes(recipe, 128).values()) < few, "more devices than parts share one"


def test_what_lasts_is_divided_by_the_processes_that_share_it_out(capsys, monkeypatch, tmp_path):
    recipe, lasting = get_recipe("cd-imagenet64-l2"), "weights of student, averages, target, teacher"
    parts = recipe.replace(micro_batches=8)
    whole, shared = planning.memory_bytes(parts, 8), planning.memory_bytes(parts, 8, "fsdp")
    for what in (lasting, "gradients and optimizer"):
        assert shared[what] == whole[what] / 8
    several = planning.memory_bytes(recipe, 8, "fsdp")["gradients and optimizer"]
    assert several == pytest.approx((1 + 2 / 8) / 3 * whole["gradients and optimizer"]), "they add up whole"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("CMLAB_DATA", str(tmp_path))
    monkeypatch.setenv("CMLAB_CHECKPOINTS", str(tmp_path))
    assert main(["train", recipe.name, "--dry-run", "--parallel", "fsdp"]) == 0
    assert f"{planning.amount(shared[lasting])}   {lasting}" in (told := capsys.readouterr().out)
    assert "missing          imagenet64 is not in" in told and "missing          edm_imagenet64 is not in" in told
    with pytest.raises(ValueError, match="unknown parallel 'fsdp2'"):
        planning.memory_bytes(recipe, 8, "fsdp2")


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in PUBLISHED])  # test_scripts runs those
def test_every_recipe_trains_three_steps_of_a_shrunken_copy(name, capsys):
    assert main(["train", name, "--smoke", "--tracker", "none"]) == 0
    assert f"{name}: 3 steps of a shrunken copy ran" in capsys.readouterr().out


def test_images_a_second_are_those_of_the_very_training():
    """Against the clock of a training of its own: as many images again as a measurement foretells."""
    recipe = get_recipe("digits-edm").replace(network=MLP, batch=64)
    rate = planning.images_per_second(recipe, seconds=1.0)
    *_, last = train(recipe.replace(iterations=100))
    assert rate / 3 < 6400 / last.seconds < rate * 3, "the order of magnitude: other work shares the machine"
    in_parts = planning.images_per_second(recipe.replace(batch=64 * 10**6, micro_batches=10**6), seconds=0.2)
    assert rate / 3 < in_parts < rate * 3, "one part is measured, not a step of all"
    with pytest.raises(ValueError, match="seconds must be a finite number above 0, got 0"):
        planning.images_per_second(recipe, seconds=0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.2, "about a second"), (119, "119 seconds"), (120, "2.0 minutes"), (7200, "2.0 hours"), (1e9, "31.7 years")],
)
def test_a_time_is_told_in_the_largest_unit_of_which_it_holds_two(seconds, text):
    assert planning.duration(seconds) == text


def test_a_plan_tells_of_small_memory_in_megabytes_and_of_a_teacher_that_is_not_there(capsys):
    assert main("train digits-cd --teacher runs-nowhere --dry-run".split()) == 0
    told = capsys.readouterr().out
    assert re.search(r"^memory +\d+ MB   gradients and optimizer$", told, re.M) and "0.0 GB" not in told
    assert "missing          unknown model or folder 'runs-nowhere'" in told
    assert main("train digits-cd --dry-run".split()) == 0
    assert "missing" not in capsys.readouterr().out


def test_a_plan_is_told_once_and_only_for_processes_that_can_share_the_batch(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "edm-bedroom256", "--dry-run"]) == 0 and capsys.readouterr().out == "", (
        "the first process tells it"
    )
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert main(["train", "edm-bedroom256", "--dry-run"]) != 0
    assert "batch 256 in 64 micro-batches cannot be shared out over 6 processes" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    config, _, rest = out.partition("\n}\n")
    assert json.loads(config + "\n}", parse_constant=pytest.fail)["name"] == name  # JSON knows no Infinity
    assert all(word in rest for word in ("parameters ", "memory ", "work ", "cost ")) and not list(tmp_path.iterdir())
    assert ("note " in rest) == (name in PUBLISHED and bool(get_recipe(name).note))


def test_the_published_constants_are_the_commands():
    cd, ct, edm = (get_recipe(name) for name in ("cd-imagenet64-lpips", "ct-bedroom256", "edm-imagenet64"))
    assert (cd.batch, cd.lr, cd.iterations, cd.objective.num_scales, cd.objective.mu_0) == (
        2048,
        8e-6,
        600_000,
        40,
        0.95,
    )
    assert (cd.teacher, cd.optimizer, cd.precision, cd.emas[-1]) == (
        "edm_imagenet64",
        "radam",
        "fp16",
        0.9999432189950708,
    )
    assert (ct.batch, ct.lr, ct.iterations, ct.objective.start, ct.objective.end) == (256, 5e-5, 1_000_000, 2, 150)
    assert (edm.batch, edm.lr, edm.network["dropout"], edm.objective.weight) == (4096, 1e-4, 0.1, "karras")
    assert all(get_recipe(name).lr_at(k) == get_recipe(name).lr for name in PUBLISHED for k in (0, 1000)), "constant"
