import copy

import pytest
import torch
import torch.nn.functional as F
from golden_tools import (
    arrays,
    assert_close,
    assert_same_direction,
    facts,
    tiny_consistency_model,
    tiny_denoiser,
    tiny_unet,
)

from cmlab.distances import LPIPS, l1, l2
from cmlab.noise import LogNormal, add_noise
from cmlab.objectives import EDM, ConsistencyDistillation, ConsistencyTraining, ProgressiveDistillation
from cmlab.ode import euler_step
from cmlab.scaling import ConsistencyModel, Denoiser

SETTING = facts("losses")
DISTANCES = {
    "l1": l1,
    "l2": l2,
    "l2-32": lambda a, b: l2(*(F.interpolate(v, size=32, mode="bilinear") for v in (a, b))),
    "lpips-standin": LPIPS(metric=lambda a, b: ((a - b) ** 2 * (1 + a)).flatten(1).mean(1)),
}


def objective(kind: str, num_scales: int = 0, **options):
    """Our objective with the reference's settings, and the (step, total) at which its grid has num_scales."""
    if kind == "ct":
        return ConsistencyTraining(start=num_scales, end=num_scales, **options), (0, 1)
    if kind == "cd":
        return ConsistencyDistillation(num_scales=num_scales, solver="heun", **options), (0, 1)
    if kind == "edm":
        return EDM(**options), (0, 1)
    halvings = 2 if num_scales == 1 else 0  # the one-step stage follows two times the two-step stage
    return ProgressiveDistillation(start=max(num_scales, 2), stage_steps=1, **options), (halvings, 4)


def trainable(kind: str):
    """A student with gradients. kind "progdist" and "edm" train denoisers."""
    wrap = Denoiser if kind in ("progdist", "edm") else ConsistencyModel
    return wrap(copy.deepcopy(tiny_unet(SETTING["model"])).requires_grad_(True))


def target():
    return tiny_consistency_model(scale=SETTING["target_scale"])


def teacher():
    return tiny_denoiser(scale=SETTING["teacher_scale"])


def loss_of(kind: str, prefix: str, distance: str, weight: str, student):
    """Our (B,) loss on the reference's images, noise and levels."""
    golden, num_scales = arrays(f"losses_{kind}"), int(prefix[1:])
    ours, at = objective(kind, num_scales, distance=DISTANCES[distance], weight=weight)
    torch.manual_seed(seed_of(kind, prefix))
    levels = ours.levels(4, *at)
    batch = golden["x_start"], golden["y"], golden["noise"]
    return ours(student, *batch, *levels, target=None if kind == "progdist" else target(), teacher=teacher())


def seed_of(kind: str, prefix: str) -> int:
    return next(case["torch_seed"] for case in SETTING["cases"][kind] if case["prefix"] == prefix)


def named(kind: str, part: str) -> list[tuple[str, ...]]:
    """(prefix, norm, weighting) of every golden entry <prefix>/<part>/<norm>/<weighting>."""
    found = {tuple(key.split("/")) for key in arrays(f"losses_{kind}")}
    return [(kind, key[0], key[2], key[3]) for key in sorted(found) if len(key) == 4 and key[1] == part]


PAIRED = ("ct", "cd", "progdist")
LOSSES = [entry for kind in PAIRED for entry in named(kind, "loss")]
GRADIENTS = [(k, p, n, w.removesuffix("_l2norm_per_param")) for kind in PAIRED for k, p, n, w in named(kind, "grad")]
CASES = [(kind, case["prefix"], case["num_scales"]) for kind in PAIRED for case in SETTING["cases"][kind]]


@pytest.mark.parametrize(("kind", "prefix", "num_scales"), CASES)
def test_levels_equal_the_reference(kind, prefix, num_scales):
    golden = arrays(f"losses_{kind}")
    ours, at = objective(kind, num_scales)
    assert ours.scales(*at) == num_scales
    torch.manual_seed(seed_of(kind, prefix))
    high, lower, *_ = ours.levels(4, *at)
    assert_close(high, golden[f"{prefix}/t"])
    assert_close(lower, golden[f"{prefix}/t2"])  # for progressive distillation the half step


@pytest.mark.parametrize(("kind", "prefix", "norm", "weight"), LOSSES)
def test_losses_equal_the_reference(kind, prefix, norm, weight):
    loss = loss_of(kind, prefix, norm, weight, trainable(kind).requires_grad_(False))
    assert_close(loss, arrays(f"losses_{kind}")[f"{prefix}/loss/{norm}/{weight}"])


@pytest.mark.parametrize(("kind", "prefix", "norm", "weight"), GRADIENTS)
def test_gradients_equal_the_reference(kind, prefix, norm, weight):
    student = trainable(kind)
    loss_of(kind, prefix, norm, weight, student).mean().backward()
    assert_gradients(student, arrays(f"losses_{kind}"), f"{prefix}/grad/{norm}/{weight}")


def assert_gradients(student, golden: dict, key: str) -> None:
    gradients = {name: parameter.grad for name, parameter in student.net.named_parameters()}
    for name in ("out.2.weight", "time_embed.0.weight", "middle_block.1.norm.weight"):
        assert_same_direction(gradients[name], golden[f"{key}/{name}"])
    norms = torch.stack([gradients[name].norm() for name in SETTING["param_order"]])
    assert_same_direction(norms, golden[f"{key}_l2norm_per_param"])


@pytest.mark.parametrize(("kind", "prefix", "num_scales"), CASES[:4])
def test_both_points_of_a_pair_and_both_answers_equal_the_reference(kind, prefix, num_scales):
    golden = arrays(f"losses_{kind}")
    images, noise, labels = golden["x_start"], golden["noise"], golden["y"]
    high, low = golden[f"{prefix}/t"], golden[f"{prefix}/t2"]
    x_high = add_noise(images, noise, high)
    assert_close(x_high, golden[f"{prefix}/x_t"])
    ours, _ = objective(kind, num_scales)
    x_low = ours.step_down(x_high, images, noise, high, low, labels, teacher())
    assert_close(x_low, golden[f"{prefix}/x_t2"])
    assert_close(tiny_consistency_model()(x_high, high, labels), golden[f"{prefix}/distiller"])
    assert_close(target()(x_low, low, labels), golden[f"{prefix}/distiller_target"])


@pytest.mark.parametrize("prefix", ["n8", "n1"])
def test_the_teachers_first_half_step_equals_the_reference(prefix):
    golden = arrays("losses_progdist")
    high, middle, labels = golden[f"{prefix}/t"], golden[f"{prefix}/t2"], golden["y"]
    x_high = add_noise(golden["x_start"], golden["noise"], high)
    assert_close(x_high, golden[f"{prefix}/x_t"])
    assert_close(euler_step(teacher(), x_high, high, middle, labels), golden[f"{prefix}/x_t2"])
    assert_close(tiny_denoiser()(x_high, high, labels), golden[f"{prefix}/denoised"])


def test_edm_noise_levels_equal_the_reference():
    golden = arrays("losses_edm")
    torch.manual_seed(SETTING["cases"]["edm"]["torch_seed"])
    sigmas = LogNormal()(4)
    assert_close((sigmas.log() + 1.2) / 1.2, golden["normal_draw"])
    assert_close(sigmas, golden["sigmas"])


@pytest.mark.parametrize("weight", ["karras", "uniform", "snr", "snr+1", "truncated-snr"])
def test_edm_losses_equal_the_reference(weight):
    golden = arrays("losses_edm")
    ours, _ = objective("edm", weight=weight)
    loss = ours(tiny_denoiser(), golden["x_start"], golden["y"], golden["noise"], golden["sigmas"])
    assert_close(loss, golden[f"loss/{weight}"])


def test_edm_gradients_equal_the_reference():
    golden, student = arrays("losses_edm"), trainable("edm")
    EDM()(student, golden["x_start"], golden["y"], golden["noise"], golden["sigmas"]).mean().backward()
    assert_gradients(student, golden, "grad/karras")
