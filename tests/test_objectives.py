import dataclasses

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
    kind = Denoiser if objective.model_kind == "denoiser" else ConsistencyModel
    student = kind(random_net()).train()
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
