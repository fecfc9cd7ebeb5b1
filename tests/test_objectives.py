import dataclasses
import math

import pytest
import torch
from toys import draws, random_model, random_net

from cmlab.distances import PseudoHuber, l2
from cmlab.exact import DatasetDenoiser
from cmlab.noise import add_noise
from cmlab.objectives import (
    EDM,
    ConsistencyDistillation,
    ConsistencyTraining,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    ProgressiveDistillation,
    SharedDropout,
)
from cmlab.scaling import ConsistencyModel, Denoiser

ALL = [
    EDM(),
    ConsistencyDistillation(),
    ConsistencyTraining(),
    ImprovedConsistencyTraining(),
    EasyConsistencyTuning(),
    ProgressiveDistillation(),
]
PAIRED = ALL[1:5]


def batch(n=16, shape=(1, 8, 8), seed=0):
    return draws(n, *shape, seed=seed).clamp(-1, 1), None, draws(n, *shape, seed=seed + 1)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_levels_descend_within_the_range(objective):
    levels = objective.levels(5000, 300, 1000, torch.Generator().manual_seed(0))
    assert all(v.shape == (5000,) and (v >= 0.002).all() and (v <= 80.0).all() for v in levels)
    assert all((high > low).all() for high, low in zip(levels, levels[1:], strict=False))


@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_losses_are_one_a_sample_and_reach_every_weight(objective):
    student = objective.model(random_net(), 0.5).train()
    levels = objective.levels(16, 500, 1000, torch.Generator().manual_seed(0))
    loss = objective(student, *batch(), *[v.float() for v in levels], teacher=random_model(Denoiser))
    assert loss.shape == (16,) and (loss >= 0).all()
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_no_gradient_flows_through_the_target():
    student = ConsistencyModel(random_net()).train()
    images, labels, noise = batch()
    high, low = torch.full((16,), 2.0), torch.full((16,), 1.0)
    ConsistencyTraining()(student, images, labels, noise, high, low).sum().backward()
    got = student.net.leave.weight.grad.clone()
    frozen = random_model()
    student.zero_grad()
    ahead = student(add_noise(images, noise, high), high)
    l2(ahead, frozen(add_noise(images, noise, low), low)).sum().backward()
    assert torch.allclose(got, student.net.leave.weight.grad, atol=1e-6)


def test_at_sigma_min_the_target_is_the_noised_image_itself():
    """With low = sigma_min the boundary condition makes consistency training plain denoising."""
    student, (images, labels, noise) = random_model(), batch()
    high, low = torch.full((16,), 1.0), torch.full((16,), 0.002)
    loss = ConsistencyTraining()(student, images, labels, noise, high, low)
    expected = l2(student(add_noise(images, noise, high), high), add_noise(images, noise, low))
    assert torch.allclose(loss, expected)


def test_distillation_from_one_image_is_training():
    """The exact denoiser of a single image always says that image: then CD's Euler step is CT's shared noise."""
    image = draws(1, 1, 8, 8).clamp(-1, 1)
    images, noise = image.expand(16, -1, -1, -1), draws(16, 1, 8, 8, seed=1)
    student, teacher = random_model(), DatasetDenoiser(image)
    high, low = torch.full((16,), 3.0), torch.full((16,), 2.0)
    ct = ConsistencyTraining()(student, images, None, noise, high, low)
    for solver in ("euler", "heun", "dpm2"):
        cd = ConsistencyDistillation(solver=solver, substeps=2)(
            student, images, None, noise, high, low, teacher=teacher
        )
        assert torch.allclose(cd, ct, rtol=1e-3)


def test_ct_gradient_approaches_cd_gradient_with_the_exact_teacher_as_the_grid_gets_finer():
    """Song et al. (2023), theorem 2. The expectation over what x came from is taken exactly, so that no sampling noise is left."""
    data, high = 0.3 * draws(5, 1, 8, 8), torch.full((5 * 64,), 1.0)
    x = data[torch.arange(64) % 5] + draws(64, 1, 8, 8, seed=1)
    share = (-(x[:, None] - data).flatten(2).square().sum(2) / 2).softmax(1)  # (64, 5): where x may have come from
    images, x = data.repeat(64, 1, 1, 1), x.repeat_interleave(5, 0)

    def gradient(objective, gap):
        student = ConsistencyModel(random_net()).train()
        loss = objective(student, images, None, x - images, high, high - gap, teacher=DatasetDenoiser(data))
        (share.flatten() * loss / gap).sum().backward()
        return torch.cat([p.grad.flatten() for p in student.parameters()])

    def disagreement(gap):
        ct, cd = gradient(ConsistencyTraining(), gap), gradient(ConsistencyDistillation(), gap)
        return float((ct - cd).norm() / cd.norm())

    assert disagreement(0.4) > 2.5 * disagreement(0.1) > 6 * disagreement(0.025)


def test_iCT_weighs_by_the_inverse_gap_and_measures_the_whole_vector():
    student, (images, labels, noise) = random_model(), batch()
    high, low = torch.full((16,), 2.0), torch.full((16,), 1.5)
    improved = ImprovedConsistencyTraining()(student, images, labels, noise, high, low)
    plain = dataclasses.replace(ConsistencyTraining(), distance=PseudoHuber())(
        student, images, labels, noise, high, low
    )
    assert torch.allclose(improved, plain / 0.5)


def test_ECT_begins_with_denoising_and_ends_with_neighbours():
    objective, total = EasyConsistencyTuning(), 1200
    first = objective.levels(2000, 0, total, torch.Generator().manual_seed(0))
    last = objective.levels(2000, total - 1, total, torch.Generator().manual_seed(0))
    assert (first[1] == objective.sigma_min).float().mean() > 0.5
    assert ((last[0] - last[1]) / last[0]).max() < 0.08


def test_PD_target_is_where_one_student_step_meets_two_teacher_steps():
    objective, teacher = ProgressiveDistillation(), random_model(Denoiser)
    x, high, middle, low = draws(4, 1, 8, 8), *(torch.full((4,), s) for s in (4.0, 3.0, 2.0))
    aim = objective.two_steps(teacher, x, high, middle, low, None)
    by_hand = x
    for sigma, after in ((4.0, 3.0), (3.0, 2.0)):
        by_hand = by_hand + (after - sigma) * (by_hand - teacher(by_hand, sigma)) / sigma
    assert torch.allclose(x + (2.0 - 4.0) * (x - aim) / 4.0, by_hand, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_student_and_target_share_their_dropout_mask(device):
    layer, x = torch.nn.Dropout(0.5), torch.ones(64, 64, device=device)
    shared = SharedDropout(torch.device(device))
    first, second = layer(x), None
    with shared.replayed():
        second = layer(x)
    after = layer(x)
    assert torch.equal(first, second) and not torch.equal(first, after)


def test_replaying_leaves_later_random_numbers_alone():
    torch.manual_seed(0)
    _, expected = torch.rand(3), torch.rand(3)
    torch.manual_seed(0)
    shared = SharedDropout(torch.device("cpu"))
    torch.rand(3)
    with shared.replayed():
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)


def test_a_teacher_that_draws_numbers_does_not_shift_the_shared_mask():
    student = ConsistencyModel(random_net(dropout=0.5)).train()
    images, labels, noise = batch()
    sigma = torch.full((16,), 1.0)

    def teacher(x, sigma, labels=None):
        return x + torch.rand_like(x)

    assert ConsistencyDistillation()(student, images, labels, noise, sigma, sigma, teacher=teacher).max() == 0


def test_a_model_agrees_with_itself_only_under_a_shared_mask():
    """With dropout and equal levels the consistency loss is zero if, and only if, both passes drop the same units."""
    student = ConsistencyModel(random_net(dropout=0.5)).train()
    images, labels, noise = batch()
    sigma = torch.full((16,), 1.0)
    assert ConsistencyTraining()(student, images, labels, noise, sigma, sigma).abs().max() < 1e-9
    x = add_noise(images, noise, sigma)
    assert l2(student(x, sigma), student(x, sigma)).min() > 1e-6


@pytest.mark.parametrize(
    "objective", [ConsistencyDistillation(), ProgressiveDistillation()], ids=lambda o: type(o).__name__
)
def test_distillation_without_a_teacher_is_refused(objective):
    levels = [v.float() for v in objective.levels(16, 0, 10)]
    with pytest.raises(ValueError, match="needs a teacher, got teacher=None"):
        objective(random_model(), *batch(), *levels)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise must have shape \(16, 1, 8, 8\), got \(15, 1, 8, 8\)"):
        EDM()(random_model(Denoiser), batch()[0], None, batch()[2][:15], torch.ones(16))


def test_iCT_draws_its_levels_from_the_papers_discretised_lognormal():
    """Doubling from 10 to 1280 intervals, and on the 40 of the third stage N(-1.1, 2^2) between the logs of the levels."""
    objective, n = ImprovedConsistencyTraining(), 1_000_000
    assert [objective.scales(k, 800) for k in (0, 100, 250, 799)] == [11, 21, 41, 1281]
    high, low = objective.levels(n, 250, 800, torch.Generator().manual_seed(0))
    ramp = torch.arange(41, dtype=torch.float64) / 40
    ends = (80 ** (1 / 7) * (1 - ramp) + 0.002 ** (1 / 7) * ramp) ** 7
    interval = (high[:, None] < 0.9999 * ends).sum(1)
    assert torch.allclose(high, ends[interval]) and torch.allclose(low, ends[interval + 1])
    cdf = torch.erf((ends.log() + 1.1) / (2 * math.sqrt(2)))
    share, mass = interval.bincount(minlength=40) / n, (cdf[:-1] - cdf[1:]) / (cdf[0] - cdf[-1])
    assert (share - mass).abs().max() < 1.2e-3  # five standard deviations of the largest share


def test_the_target_of_CT_follows_its_grid_and_without_mu_0_there_is_none():
    scales = {0: 2, 100: 48, 500: 107, 1000: 151}  # ceil(sqrt(k / K (151^2 - 2^2) + 2^2) - 1) + 1
    objective = ConsistencyTraining(mu_0=0.9)
    assert {k: objective.scales(k, 1000) for k in scales} == scales
    assert [objective.mu(k, 1000) for k in scales] == pytest.approx([0.9 ** (2 / (n - 1)) for n in scales.values()])
    assert all(o.mu(k, 1000) == 0 for o in (ConsistencyTraining(mu_0=0), ImprovedConsistencyTraining()) for k in scales)


@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_CD_in_two_substeps_halves_the_interval_in_the_grids_spacing(rho):
    teacher, (images, _, noise) = random_model(Denoiser), batch(3)
    high, low = torch.tensor([20.0, 1.0, 0.1]), torch.tensor([5.0, 0.4, 0.002])
    middle = ((high ** (1 / rho) + low ** (1 / rho)) / 2) ** rho
    x = x_high = add_noise(images, noise, high)
    for sigma, after in ((high, middle), (middle, low)):
        gap, slope = (after - sigma)[:, None, None, None], (x - teacher(x, sigma)) / sigma[:, None, None, None]
        ahead = x + gap * slope
        x = x + gap / 2 * (slope + (ahead - teacher(ahead, after)) / after[:, None, None, None])
    objective = ConsistencyDistillation(substeps=2, rho=rho)
    assert torch.allclose(objective.step_down(x_high, images, noise, high, low, None, teacher), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "stage", "lows"),
    [  # n(0.01) = 4.980000, n(1) = 3.151531, n(5) = 1.053543 for k = 8, b = 1
        ({}, 0, [0.002, 0.002, 2.366143]),
        ({}, 2, [0.003775, 0.606059, 4.341536]),
        ({}, 5, [0.009222, 0.950757, 4.917692]),
        ({"k": 4.0}, 2, [0.006262, 0.740529, 4.358268]),
        ({"b": 2.0}, 2, [0.003800, 0.755797, 4.374773]),
        ({"q": 4.0}, 2, [0.009222, 0.950757, 4.917692]),
    ],
)
def test_ECT_maps_each_level_by_the_formula_of_its_stage(options, stage, lows):
    """low = high (1 - n / q^(stage + 1)), n(t) = 1 + k / (1 + e^(b t)), and never below 0.002."""
    highs = torch.tensor([0.01, 1.0, 5.0], dtype=torch.float64)
    objective = EasyConsistencyTuning(sigmas=lambda n, generator: highs, **options)
    for step in (100 * stage, 100 * stage + 99):
        high, low = objective.levels(3, step, 600)
        assert torch.equal(high, highs) and low.tolist() == pytest.approx(lows, abs=1e-6)


def test_PD_halves_a_step_of_its_grid_at_half_an_index():
    objective = ProgressiveDistillation(start=16, stage_steps=100)
    for step, intervals in ((0, 16), (150, 8), (250, 4)):
        levels = objective.levels(500, step, 1000, torch.Generator().manual_seed(0))
        high, middle, low = (
            intervals * (80 ** (1 / 7) - v ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7)) for v in levels
        )
        assert high.round().unique().tolist() == list(range(intervals)) and torch.allclose(high, high.round())
        assert torch.allclose(middle, high + 0.5) and torch.allclose(low, high + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EDM(weight="kharas"), "unknown weighting 'kharas'. Did you mean 'karras'"),
        (lambda: EDM(rho=0.0), "rho must be a finite number above 0, got 0"),
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "need 0 < sigma_min <= sigma_max, got 2.0 and 1.0"),
        (lambda: EDM(sigma_min=1.0, sigma_max=1.0), "sigma_min must lie below sigma_max to train on a range, got 1.0"),
        (lambda: EDM(weight="inverse-gap"), "unknown weighting 'inverse-gap'"),
        (lambda: ProgressiveDistillation(weight="inverse-gap"), "unknown weighting 'inverse-gap'"),
        (lambda: ConsistencyDistillation(mu_0=1.5), r"mu_0 must lie in \[0, 1\], got 1.5"),
        (lambda: ConsistencyTraining(mu_0=1.5), r"mu_0 must lie in \[0, 1\], got 1.5"),
        (lambda: ConsistencyTraining(start=20, end=10), "end must be at least 20, got 10"),
        (lambda: ConsistencyDistillation(num_scales=1), "num_scales must be at least 2, got 1"),
        (lambda: ConsistencyDistillation(substeps=0), "substeps must be at least 1, got 0"),
        (lambda: ConsistencyDistillation(solver="huen"), "Did you mean 'heun'"),
        (lambda: ImprovedConsistencyTraining(std=0.0), "std must be a finite number above 0, got 0"),
        (lambda: EasyConsistencyTuning(stages=0), "stages must be at least 1, got 0"),
        (lambda: EasyConsistencyTuning(q=0.0), "q must be a finite number above 0, got 0"),
        (lambda: ProgressiveDistillation(start=1), "start must be at least 2, got 1"),
        (lambda: ProgressiveDistillation(stage_steps=0), "stage_steps must be at least 1, got 0"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused_when_it_is_made(call, message):
    with pytest.raises(ValueError, match=message):
        call()
