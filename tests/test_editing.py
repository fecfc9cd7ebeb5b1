import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import draws, random_model

from cmlab.editing import Colorize, Denoise, Inpaint, Stroke, SuperResolve, edit, interpolate, noise_of, slerp
from cmlab.exact import GaussianMixtureDenoiser
from cmlab.noise import karras_sigmas
from cmlab.sampling import sample_heun, sample_onestep

MASK = torch.zeros(16, 16).index_fill(0, torch.arange(6), 1.0)
TASKS = [Inpaint(MASK), Inpaint(MASK.bool()[None]), Colorize(), SuperResolve(2), SuperResolve(8)]
SIGMAS = [80.0, 5.0, 0.5]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_what_is_known_is_kept_and_what_is_not_is_made(task):
    model, images = random_model(shape=(3, 16, 16)), draws(4, 3, 16, 16).clamp(-1, 1)
    y = task.measure(images)
    result = edit(model, task, y, SIGMAS, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(task.project(result), task.project(images), atol=1e-5)
    assert (result - images).abs().max() > 0.1


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_tasks_are_orthogonal_projections(task):
    a, b = draws(2, 3, 16, 16).double(), draws(2, 3, 16, 16, seed=1).double()
    assert torch.allclose(task.project(task.project(a)), task.project(a), atol=1e-6)
    assert torch.allclose((task.project(a) * b).sum(), (a * task.project(b)).sum(), atol=1e-4)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_true_image_is_a_fixed_point(task):
    """A peer's operator transforms only one of the two images it mixes: its error here is 1.9."""
    images = draws(2, 3, 16, 16).double()
    assert torch.allclose(task.combine(images, images), images, atol=1e-12)


def test_colorize_keeps_luminance_and_superresolve_block_means():
    images, other = draws(2, 3, 16, 16), draws(2, 3, 16, 16, seed=1)
    weights = torch.tensor([0.2989, 0.5870, 0.1140]).reshape(3, 1, 1)
    mixed = Colorize().combine(Colorize().measure(images), other)
    assert torch.allclose((mixed * weights).sum(1), (images * weights).sum(1), atol=1e-6)
    blocks = SuperResolve(4).combine(SuperResolve(4).measure(images), other)
    assert torch.allclose(
        blocks.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)),
        images.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)),
        atol=1e-6,
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("task", [Inpaint(MASK), SuperResolve(4), Denoise(0.5), Stroke(0.5)], ids=str)
def test_tasks_take_one_channel_and_three(task, channels):
    model, images = random_model(shape=(channels, 16, 16)), draws(2, channels, 16, 16)
    sigmas = [0.5] if isinstance(task, (Denoise, Stroke)) else SIGMAS
    assert edit(model, task, task.measure(images), sigmas).shape == images.shape


def test_every_image_may_have_its_own_mask():
    masks = torch.stack([MASK, 1 - MASK])[:, None]
    images = draws(2, 3, 16, 16)
    result = edit(random_model(shape=(3, 16, 16)), Inpaint(masks), images, SIGMAS)
    assert torch.equal(result * masks, images * masks)


def test_denoise_starts_from_the_measurement_itself():
    model, noisy = random_model(), draws(2, 1, 8, 8)
    assert torch.equal(edit(model, Denoise(0.7), noisy, [0.7], clip_denoised=False), model(noisy, 0.7))


def test_denoise_measures_a_picture_under_noise_of_its_level():
    images, generator = torch.zeros(4, 3, 32, 32), torch.Generator().manual_seed(0)
    assert float(Denoise(0.7).measure(images, generator).std()) == pytest.approx(0.7, rel=0.02)


def test_stroke_adds_noise_of_its_level():
    model, guide, z = random_model(), draws(2, 1, 8, 8), draws(1, 2, 1, 8, 8, seed=1)
    assert torch.equal(
        edit(model, Stroke(3.0), guide, [3.0], noises=z, clip_denoised=False), model(guide + 3.0 * z[0], 3.0)
    )


@given(weight=st.floats(0, 1), seed=st.integers(0, 100))
def test_slerp_keeps_the_length_and_takes_an_angle_for_each_sample(weight, seed):
    """A peer takes one angle for the whole batch; then a sample's way depends on its neighbours."""
    a, b = draws(3, 1, 8, 8, seed=seed), draws(3, 1, 8, 8, seed=seed + 1000)
    mixed = slerp(a, b, weight)
    assert torch.allclose(mixed[:1], slerp(a[:1], b[:1], weight), atol=1e-6)
    low, high = (
        torch.minimum(a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)),
        torch.maximum(a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)),
    )
    lengths = mixed.flatten(1).norm(dim=1)
    assert (lengths > 0.97 * low).all() and (lengths < 1.03 * high).all()


def test_interpolation_begins_and_ends_at_the_two_pictures():
    model, a, b = random_model(), draws(2, 1, 8, 8), draws(2, 1, 8, 8, seed=1)
    way = interpolate(model, a, b, [0.0, 0.5, 1.0])
    assert way.shape == (3, 2, 1, 8, 8)
    assert torch.allclose(way[0], sample_onestep(model, a), atol=1e-4)
    assert torch.allclose(way[2], sample_onestep(model, b), atol=1e-4)


def test_noise_of_a_picture_leads_back_to_it():
    data, sigmas = GaussianMixtureDenoiser(draws(3, 1, 4, 4).double(), 0.3), karras_sigmas(200, 0.01, 20.0)
    images = data.means + 0.1 * draws(3, 1, 4, 4, seed=1)
    assert torch.allclose(sample_heun(data, noise_of(data, images, sigmas), sigmas), images, atol=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, x: Inpaint(torch.ones(8, 8)).measure(x),
            r"mask of shape \(8, 8\) does not fit images \(2, 3, 16, 16\)",
        ),
        (lambda m, x: Inpaint(torch.full((16, 16), 0.5)), "mask must hold only 0"),
        (lambda m, x: Inpaint([[1]]), "mask must be a torch tensor, got list"),
        (lambda m, x: edit(m, "inpaint", x, SIGMAS), r"task must be a Task, such as Inpaint\(mask\), got 'inpaint'"),
        (lambda m, x: Inpaint(MASK).measure(x / 0), "images must be finite"),
        (lambda m, x: Colorize().measure(x[:, :1]), "Colorize takes images of 3 channels, got 1"),
        (lambda m, x: SuperResolve(5).measure(x), "factor 5 does not divide the image size 16 x 16"),
        (lambda m, x: SuperResolve(1), "factor must be at least 2, got 1"),
        (lambda m, x: Denoise(0.0), "sigma must be a finite number above 0, got 0.0"),
        (lambda m, x: edit(m, Stroke(3.0), x, [80.0, 1.0]), "sigmas must begin with the task's sigma 3, got 80"),
        (lambda m, x: edit(m, Colorize(), x[0], SIGMAS), r"takes images \(B, C, H, W\), got shape \(3, 16, 16\)"),
        (lambda m, x: edit(m, Colorize(), x, SIGMAS, noises=x), r"noises must have shape \(3, 2, 3, 16, 16\)"),
        (lambda m, x: edit(m, Colorize(), x, [0.5, 80.0]), "sigmas must descend"),
        (lambda m, x: edit(m, Colorize(), x, [500.0, 1.0]), "must not exceed the model's sigma_max = 80, got 500"),
        (lambda m, x: interpolate(m, x, x, [1.5]), r"weights must be one or more numbers in \[0, 1\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(random_model(shape=(3, 16, 16)), draws(2, 3, 16, 16))
