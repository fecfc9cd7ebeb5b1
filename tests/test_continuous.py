"""Continuous time: TrigFlow and MeanFlow as models, and the objectives sCT, sCD and MeanFlow."""

import math

import pytest
import torch
from toys import draws, random_model, random_net

import cmlab
from cmlab import sampling
from cmlab.continuous import (
    ContinuousDistillation,
    ContinuousTraining,
    LogWeight,
    MeanFlowTraining,
    jvp,
    tangent,
)
from cmlab.distances import l2
from cmlab.exact import DatasetDenoiser
from cmlab.metrics import frechet_distance
from cmlab.models import build
from cmlab.models.small import fourier, retimed
from cmlab.noise import add_noise
from cmlab.objectives import ConsistencyDistillation, ConsistencyTraining
from cmlab.ode import velocity
from cmlab.scaling import ConsistencyModel, Denoiser, MeanFlow, TrigFlow, angle_of, column, sigma_of

SIGMAS = torch.logspace(-2, 1.5, 12, dtype=torch.float64)
ALL = [ContinuousTraining(), ContinuousDistillation(), MeanFlowTraining()]


def wide_net(jumps=False, seed=0):
    """A random network in float64, for derivatives to be compared by finite differences."""
    net = random_net(jumps=jumps, seed=seed)
    return net.double()


def batch(n=12, seed=0):
    return draws(n, 1, 8, 8, seed=seed).double().clamp(-1, 1), draws(n, 1, 8, 8, seed=seed + 1).double()


# --- the models -------------------------------------------------------------------------------------------------------


def test_angles_and_levels_are_each_others_inverse():
    angles = angle_of(SIGMAS, 0.7)
    assert torch.allclose(sigma_of(angles, 0.7), SIGMAS, rtol=1e-9) and angle_of(0.0) == 0
    assert ((angles > 0) & (angles < math.pi / 2)).all() and (angles.diff() > 0).all()


@pytest.mark.parametrize("angle", [-0.1, math.pi / 2, float("nan")])
def test_an_angle_without_a_level_is_refused(angle):
    with pytest.raises(ValueError, match="angle must lie in"):
        sigma_of(angle)


def test_trigflow_is_the_papers_formula_in_the_coordinates_of_all_models():
    """f = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t): Lu & Song (2024), eq. 6."""
    model, (images, noise) = TrigFlow(wide_net(), 0.7), batch()
    t = column(angle_of(SIGMAS, 0.7), images)
    x_t = t.cos() * images + t.sin() * 0.7 * noise
    by_paper = t.cos() * x_t - t.sin() * 0.7 * model.velocity(x_t, 250 * SIGMAS.log())
    assert torch.allclose(model(images + column(SIGMAS, images) * noise, SIGMAS), by_paper, atol=1e-9)
    cos, sin = model.cos_sin(SIGMAS, images)
    assert torch.allclose(cos, t.cos()) and torch.allclose(sin, t.sin())


def test_a_denoisers_weights_are_a_trigflow_whose_f_is_its_velocity():
    """dx_t/dt = sigma_data F along the denoiser's own probability-flow ODE: Lu & Song (2024), sec. 3."""
    net, (images, noise) = wide_net(), batch()
    model, denoiser = TrigFlow(net, 0.7), Denoiser(net, 0.7)
    x = images + column(SIGMAS, images) * noise
    cos, sin = model.cos_sin(SIGMAS, x)
    slope = velocity(denoiser, x, SIGMAS)  # dx/dsigma; x_t = cos(t) x and sigma = sigma_data tan(t)
    by_angle = cos * slope * 0.7 / cos**2 - sin * x
    assert torch.allclose(0.7 * model.velocity(cos * x, 250 * SIGMAS.log()), by_angle, atol=1e-6)
    assert torch.equal(model(x, SIGMAS), denoiser(x, SIGMAS))


@pytest.mark.parametrize("kind", [TrigFlow, MeanFlow])
def test_at_level_zero_a_picture_is_left_alone(kind):
    model, x = kind(wide_net(jumps=kind is MeanFlow), 0.7), batch()[0]
    gone = [float((model(x, sigma) - x).detach().abs().max()) for sigma in (1e-3, 1e-6)]
    assert gone[1] < 1e-4 and gone[1] < gone[0] / 500


def test_a_meanflow_jump_over_no_way_is_the_velocity_and_over_all_of_it_the_model():
    model, (images, noise) = MeanFlow(wide_net(jumps=True), 0.7), batch()
    t = SIGMAS / (1 + SIGMAS)
    z, x = add_noise(images, noise - images, t), images + column(SIGMAS, images) * noise
    assert torch.allclose(z, column(1 - t, x) * x)
    whole = z - column(t, z) * model.average_velocity(z, torch.zeros_like(t), t)
    assert torch.allclose(whole, model(x, SIGMAS), atol=1e-9)
    denoised = model(x, SIGMAS, way=torch.zeros_like(t))
    slope = (x - denoised) / column(SIGMAS, x) - denoised  # of the straight line: noise minus picture
    assert torch.allclose(model.average_velocity(z, t, t), slope, atol=1e-9)


def test_the_network_of_a_jump_must_be_told_its_way():
    x, sigma = draws(2, 1, 8, 8), torch.ones(2)
    with pytest.raises(ValueError, match="way is missing.*jumps=True"):
        Denoiser(random_net(jumps=True))(x, sigma)
    with pytest.raises(ValueError, match="way must be left out.*jumps=False"):
        MeanFlow(random_net())(x, sigma)


# --- tangents ---------------------------------------------------------------------------------------------------------


def by_differences(function, t, step=1e-4):
    """d function / dt by central differences, (B, …); float32 inside the network's embedding bounds their accuracy."""
    return (function(t + step) - function(t - step)) / (2 * step)


@pytest.mark.parametrize("r", [1.0, 0.0, 0.3])
def test_the_tangent_is_the_derivative_along_the_trajectory(r):
    """g = cos(t) df/dt / sigma_data for r = 1; r takes away a share of what holds dF/dt."""
    model, (images, noise) = TrigFlow(wide_net(), 0.7), batch()
    sigmas = torch.logspace(-1, 1, len(images), dtype=torch.float64)
    angle = angle_of(sigmas, 0.7)

    def at(t):
        return column(t.cos(), images) * images + column(t.sin(), images) * 0.7 * noise

    def flow(t):
        return model.velocity(at(t), 250 * sigma_of(t, 0.7).log())

    cos, sin = column(angle.cos(), images), column(angle.sin(), images)
    slope = cos * 0.7 * noise - sin * images
    first = -(cos**2) * (flow(angle) - slope / 0.7)
    second = -cos * sin * (at(angle) / 0.7 + by_differences(flow, angle))
    got_flow, got = tangent(model, at(angle), slope, sigmas, None, r)
    assert torch.allclose(got_flow, flow(angle))
    assert torch.allclose(got, first + r * second, atol=2e-3 * float(second.abs().max()))
    if r == 1:
        along = cos / 0.7 * by_differences(lambda t: model(at(t) / column(t.cos(), images), sigma_of(t, 0.7)), angle)
        assert torch.allclose(got, along, atol=2e-3 * float(along.abs().max()))


def test_the_tangent_of_a_perfect_model_vanishes():
    """Of one image every trajectory ends in it: f = image, so nothing is to change."""
    image = draws(1, 1, 8, 8).double()

    class Perfect(torch.nn.Module):
        def forward(self, x, c_noise, labels):  # F so that c_skip x + c_out F = image
            sigma = column((c_noise / 250).exp(), x)
            return (image - 0.49 / (sigma**2 + 0.49) * x * (sigma**2 + 0.49).sqrt()) / (
                sigma * 0.7 / (sigma**2 + 0.49).sqrt()
            )

    model, noise = TrigFlow(Perfect(), 0.7), draws(12, 1, 8, 8, seed=1).double()
    cos, sin = model.cos_sin(SIGMAS, noise)
    x_t, slope = cos * image + sin * 0.7 * noise, cos * 0.7 * noise - sin * image
    assert torch.allclose(model(x_t / cos, SIGMAS), image.expand_as(noise), atol=1e-9)
    _, g = tangent(model, x_t, slope, SIGMAS, None)
    assert g.abs().max() < 1e-9


def test_forward_mode_goes_on_where_gradients_are_switched_off():
    x = draws(3, 4).requires_grad_()
    value, slope = jvp(lambda v: v.square(), (x,), (torch.ones(3, 4),))
    assert torch.equal(slope, 2 * x.detach()) and not value.requires_grad and not slope.requires_grad


# --- the objectives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_losses_are_one_a_sample_and_reach_every_weight(objective):
    student = objective.model(random_net(jumps=isinstance(objective, MeanFlowTraining)), 0.5).train()
    sigma, other = objective.levels(16, 500, 1000, torch.Generator().manual_seed(0))
    assert sigma.shape == other.shape == (16,) and (sigma >= 0.002).all() and (sigma <= 80.0).all()
    images, noise = (v.float() for v in batch(16))
    loss = objective(student, images, None, noise, sigma.float(), other.float(), teacher=random_model(Denoiser))
    assert loss.shape == (16,) and loss.isfinite().all()
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


@pytest.mark.parametrize("objective", [ContinuousTraining(weight="uniform"), ContinuousDistillation(weight="uniform")])
def test_the_loss_moves_f_by_its_tangent(objective):
    """The gradient by the student's F is -2 g / D: Lu & Song (2024), eq. 8."""
    student, (images, noise) = TrigFlow(wide_net(), 0.5), batch()
    teacher = DatasetDenoiser(images)
    x_t, slopes = None, []
    objective_slope = type(objective).slope

    class Watched(type(objective)):
        def slope(self, student, x_t, *rest):
            slopes.append((x_t, objective_slope(self, student, x_t, *rest)))
            return slopes[-1][1]

    loss = Watched(weight="uniform")(
        student, images, None, noise, SIGMAS, torch.full_like(SIGMAS, 0.6), teacher=teacher
    )
    x_t, slope = slopes[0]
    flow = student.velocity(x_t, 250 * SIGMAS.log())
    _, g = tangent(student, x_t, slope, SIGMAS, None, 0.6)
    (-2 * objective.normalized(g) / 64 * flow).sum().backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    loss.sum().backward()
    for parameter, e in zip(student.parameters(), expected, strict=True):
        assert (parameter.grad - e).norm() < 1e-6 * e.norm()


def test_without_the_second_part_the_objective_is_a_diffusion_models():
    """r = 0: F is drawn towards dx_t/dt alone, by a share cos(t)^2 of what is missing."""
    student, (images, noise) = TrigFlow(wide_net(), 0.5), batch()
    objective = ContinuousTraining(weight="uniform", normalize=None)
    loss = objective(student, images, None, noise, SIGMAS, torch.zeros_like(SIGMAS))
    denoised = student(images + column(SIGMAS, images) * noise, SIGMAS)
    cos, sin = student.cos_sin(SIGMAS, images)
    assert torch.allclose(loss, (cos**4 / (sin * 0.5) ** 2).flatten() * l2(denoised, images), rtol=1e-5)


@pytest.mark.parametrize("distil", [False, True])
def test_the_discrete_gradient_approaches_the_continuous_one(distil):
    """Song et al. (2023), theorems 5 and 6: with L2, gradient / gap tends to that of f . df/dsigma, here from the tangent."""
    net, (images, noise) = wide_net(), batch()
    student, teacher, sigma = TrigFlow(net, 0.5), DatasetDenoiser(images), torch.full((12,), 0.8, dtype=torch.float64)

    def flat(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    cos, sin = student.cos_sin(sigma, images)
    x_t = cos * images + sin * 0.5 * noise
    one = ContinuousDistillation() if distil else ContinuousTraining()
    _, g = tangent(student, x_t, one.slope(student, x_t, images, noise, sigma, None, teacher), sigma, None)
    change = g * 0.5 * sin / column(sigma, g)  # df/dsigma: cos df/dt / sigma_data is g, and d/dln(sigma) = cos sin d/dt
    limit = flat((2 * student(x_t / cos, sigma) * change).flatten(1).mean(1).sum())

    def apart(gap):
        discrete = ConsistencyDistillation(solver="euler") if distil else ConsistencyTraining()
        loss = discrete(student, images, None, noise, sigma, sigma - gap, teacher=teacher)
        return float((flat(loss.sum() / gap) - limit).norm() / limit.norm())

    far, near = apart(0.04), apart(0.01)
    assert near < 0.05 and 3 < far / near < 5  # first order in the gap


def test_adaptive_weighting_evens_out_the_loss_of_all_levels():
    """The minimum of e^w L - w is w = -log L, where e^w L = 1."""
    weight, c_noise = LogWeight(), 250 * SIGMAS.float().log()
    assert torch.equal(weight(c_noise), torch.zeros(12))
    size = SIGMAS.float() ** 2
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        w = weight(c_noise)
        (w.exp() * size - w).mean().backward()
        optimizer.step()
    assert torch.allclose(weight(c_noise).exp() * size, torch.ones(12), atol=0.2)


def test_normalized_tangents_have_bounded_size_whatever_the_picture():
    objective, g = (
        ContinuousTraining(normalize=0.5),
        draws(3, 1, 8, 8) * torch.tensor([1e-3, 1.0, 1e4]).reshape(3, 1, 1, 1),
    )
    sizes = objective.normalized(g).square().flatten(1).mean(1).sqrt()
    size = g.square().flatten(1).mean(1).sqrt()
    assert torch.allclose(sizes, size / (size + 0.5)) and sizes.max() < 1


def test_the_warm_up_ends_after_its_share_of_the_run():
    objective = ContinuousTraining(tangent_warmup=0.2)
    assert [float(objective.levels(2, step, 1000)[1][0]) for step in (0, 100, 200, 900)] == [0, 0.5, 1, 1]
    assert ContinuousTraining(tangent_warmup=0.0).levels(1, 0, 1000)[1] == 1


def test_meanflow_aims_at_the_identity():
    """u = v - (t - r) du/dt: Geng et al. (2025), eq. 6; du/dt by finite differences here."""
    model, (images, noise) = MeanFlow(wide_net(jumps=True), 0.7), batch()
    high, low = torch.full((12,), 2.0, dtype=torch.float64), torch.full((12,), 0.5, dtype=torch.float64)
    loss = MeanFlowTraining(p=0.0)(model, images, None, noise, high, low)
    t, r = high / (1 + high), low / (1 + low)

    def u(t):
        return model.average_velocity(add_noise(images, noise - images, t), r, t)

    aim = noise - images - column(t - r, noise) * by_differences(u, t)
    assert torch.allclose(loss, (u(t) - aim).square().flatten(1).sum(1), rtol=1e-3)


def test_meanflow_levels_are_equal_for_the_share_asked_for():
    high, low = MeanFlowTraining(same=0.25).levels(1000, 0, 1, torch.Generator().manual_seed(0))
    assert (high >= low).all() and int((high == low).sum()) == 250


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContinuousTraining(normalize=0.0), "normalize must be"),
        (lambda: ContinuousTraining(tangent_warmup=1.5), "tangent_warmup must lie in"),
        (lambda: ContinuousTraining(weight="inverse-gap"), "unknown weighting 'inverse-gap'"),
        (lambda: MeanFlowTraining(same=-0.1), "same must lie in"),
        (lambda: MeanFlowTraining(c=0.0), "c must be"),
        (lambda: MeanFlowTraining(weight="adaptive"), "unknown weighting"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_adaptive_weight_without_its_layer_is_refused():
    student, (images, noise) = TrigFlow(wide_net()), batch()
    with pytest.raises(ValueError, match="needs a student with log_weight"):
        ContinuousTraining()(student, images, None, noise, SIGMAS, torch.ones_like(SIGMAS))


def test_a_slow_target_is_what_the_student_is_to_move_from():
    student, target, (images, noise) = TrigFlow(wide_net()), TrigFlow(wide_net(seed=1)), batch()
    objective = ContinuousTraining(weight="uniform")
    cos, sin = student.cos_sin(SIGMAS, images)
    x_t, slope = cos * images + sin * 0.5 * noise, cos * 0.5 * noise - sin * images
    still, g = tangent(target, x_t, slope, SIGMAS, None)
    loss = objective(student, images, None, noise, SIGMAS, torch.ones_like(SIGMAS), target=target)
    assert torch.allclose(loss, l2(student.velocity(x_t, 250 * SIGMAS.log()), still + objective.normalized(g)))


def test_distillation_without_a_teacher_is_refused():
    student, (images, noise) = TrigFlow(wide_net()), batch()
    with pytest.raises(ValueError, match="needs a teacher"):
        ContinuousDistillation()(student, images, None, noise, SIGMAS, torch.ones_like(SIGMAS))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-scd-short", "digits-sct-short", "digits-meanflow-short"])
def test_a_training_goes_on_where_it_was_cut_and_its_model_is_saved(name, tmp_path):
    network = dict(width=32, depth=1, embedding=16)
    recipe = cmlab.get_recipe(name)
    recipe = recipe.replace(network=recipe.network | network, init_from=None, iterations=6, batch=16, precision="fp32")
    *_, whole = cmlab.train(recipe, device="cpu")
    *_, _ = cmlab.train(recipe, device="cpu", folder=tmp_path, stop=stop_after(3))
    *_, last = cmlab.train(recipe, device="cpu", folder=tmp_path, resume=True)
    for a, b in zip(whole.model.parameters(), last.model.parameters(), strict=True):
        assert torch.equal(a, b)
    loaded, x, labels = cmlab.load(tmp_path / "model"), draws(4, 1, 8, 8), torch.arange(4)
    assert type(loaded) is type(last.model) and torch.allclose(
        loaded(x, 3.0, labels), last.model(x, 3.0, labels), atol=1e-6
    )


def stop_after(steps):
    done = iter([*[False] * (steps - 1), True])
    return lambda: next(done)


def test_sixty_steps_of_scd_leave_the_blur_of_the_diffusion_model_behind():
    """One call of digits-edm gives the mean of a class; sCD's short start must already be nearer to digits. Seeded."""
    recipe = cmlab.get_recipe("digits-scd-short").replace(iterations=60, batch=256, precision="fp32", ema=0.9)
    digits, extract = cmlab.load_data("digits"), cmlab.extractors.get_extractor("digits-classifier")
    *_, last = cmlab.train(recipe, device="cpu")
    noise = draws(*digits.images.shape)

    def distance(model):
        samples = sampling.sample_onestep(model, noise, digits.labels)
        return frechet_distance(extract(samples).features, extract(digits.images).features)

    assert distance(last.model) < 0.25 * distance(cmlab.load("digits-edm"))


def test_other_frequencies_leave_the_function_as_it_was():
    """digits-edm's first layer, fitted to frequencies ten times as slow: the same denoiser of digits to a few per cent."""
    model, digits = cmlab.load("digits-edm"), cmlab.load_data("digits")
    images, labels = digits.images[:200], digits.labels[:200]
    slow = build(model.net.config | {"highest": 1.0})
    slow.load_state_dict(retimed(model.net, 1.0, 0.002, 20.0))
    slow = Denoiser(slow.eval().requires_grad_(False), model.sigma_data)
    for sigma in (0.05, 0.5, 5.0):
        x = images + sigma * draws(*images.shape)
        right = model(x, sigma, labels)
        assert (slow(x, sigma, labels) - right).norm() < 0.1 * right.norm()


def test_a_slow_embedding_changes_slowly():
    t = torch.linspace(-6, 3, 500).requires_grad_()
    for highest in (1.0, 10.0):
        _, change = jvp(lambda t, h=highest: fourier(t, 64, h), (t,), (torch.ones_like(t),))
        assert abs(float(change.abs().max()) - highest) < 0.02 * highest


@pytest.mark.parametrize("kind", [TrigFlow, MeanFlow])
def test_they_sample_and_edit_like_any_consistency_model(kind):
    model = kind(random_net(jumps=kind is MeanFlow)).eval()
    assert isinstance(model, ConsistencyModel)
    noise = draws(4, 1, 8, 8)
    once = sampling.sample_onestep(model, noise)
    assert torch.equal(once, model(80 * noise, 80.0)) and once.shape == noise.shape
    assert sampling.sample_multistep(model, noise, [80.0, 1.0], generator=torch.Generator()).isfinite().all()
