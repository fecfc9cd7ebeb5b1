"""A run against a loop written out by hand: no accelerate, no AveragedModel, no objective, grids and curricula spelt out."""

import copy
import math

import pytest
import torch
from toys import random_net

from cmlab.checkpoints import save
from cmlab.data import load_data
from cmlab.objectives import EDM, ConsistencyDistillation, ConsistencyTraining
from cmlab.recipes import Recipe
from cmlab.run import Run
from cmlab.scaling import ConsistencyModel, Denoiser

LOW, HIGH, TOTAL, STEPS = 0.002, 20.0, 9, 8  # RAdam leaves its unrectified first steps at step 6
NET = random_net(num_classes=10, dropout=0.3)
BOTH_CURRICULA = ConsistencyTraining(sigma_max=HIGH, start=2, end=10, mu_0=0.9)
DISTILLATION = ConsistencyDistillation(sigma_max=HIGH, num_scales=6, mu_0=0.7)


def column(sigma):
    return sigma[:, None, None, None]


def squares(a, b):
    return (a - b).square().mean((1, 2, 3))


def grid(n):
    ramp = torch.arange(n, dtype=torch.float64) / (n - 1)
    return ((HIGH ** (1 / 7) * (1 - ramp) + LOW ** (1 / 7) * ramp) ** 7).float()


def scales_by_hand(objective, k):
    if objective is DISTILLATION:
        return 6
    return math.ceil(math.sqrt(k / TOTAL * (11**2 - 2**2) + 2**2) - 1) + 1


def mu_by_hand(objective, k):
    return 0.7 if objective is DISTILLATION else math.exp(2 * math.log(0.9) / (scales_by_hand(objective, k) - 1))


def heun_by_hand(teacher, x, high, low, labels):
    with torch.no_grad():
        slope = (x - teacher(x, high, labels)) / column(high)
        ahead = x + column(low - high) * slope
        return x + column(low - high) * (slope + (ahead - teacher(ahead, low, labels)) / column(low)) / 2


def loss_by_hand(objective, k, student, target, teacher, drawn, dropout_seed):
    images, labels, noise, (sigma, *_) = drawn
    torch.manual_seed(dropout_seed)
    if target is None:
        denoised = student(images + column(sigma) * noise, sigma, labels)
        return ((1 / sigma**2 + 1 / student.sigma_data**2) * squares(denoised, images)).mean()
    levels = grid(scales_by_hand(objective, k))
    index = (sigma[:, None] - levels).abs().argmin(1)
    high, low = levels[index], levels[index + 1]
    x_high = images + column(high) * noise
    ahead = student(x_high, high, labels)
    x_low = images + column(low) * noise if teacher is None else heun_by_hand(teacher, x_high, high, low, labels)
    torch.manual_seed(dropout_seed)
    with torch.no_grad():
        behind = target(x_low, low, labels)
    return squares(ahead, behind).mean()


def average_by_hand(averaged, model, decay):
    with torch.no_grad():
        for a, p in zip(averaged.parameters(), model.parameters(), strict=True):
            a.copy_(decay * a + (1 - decay) * p)


def clip_by_hand(model, largest):
    norm = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt()
    for p in model.parameters():
        p.grad *= min(1.0, largest / float(norm))
    return float(norm)


def by_hand(run, recipe, teacher):
    """Yields (loss, norm, lr), student, EMA and target after every step; only the draws come from the run."""
    objective = recipe.objective
    kind = Denoiser if isinstance(objective, EDM) else ConsistencyModel
    student = kind(copy.deepcopy(NET), run.data.sigma_data, LOW, HIGH).train()
    ema, target = copy.deepcopy(student), None if kind is Denoiser else copy.deepcopy(student).train()
    optimizer = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[recipe.optimizer](
        student.parameters(), betas=recipe.betas, weight_decay=0
    )
    for k in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr = recipe.lr_at(k)
        with torch.random.fork_rng(devices=[]):
            loss = loss_by_hand(objective, k, student, target, teacher, run._draw(0, 0, 1), run._number(1))
        optimizer.zero_grad()
        loss.backward()
        norm = clip_by_hand(student, recipe.clip)
        optimizer.step()
        # the EMA begins with the weights after the first step
        average_by_hand(ema, student, min(recipe.ema, (1 + k) / (10 + k)) if k else 0)
        if target is not None:
            average_by_hand(target, student, mu_by_hand(objective, k))
        yield (loss.item(), norm, lr), student, ema, target


def assert_equal_weights(model, expected):
    """Up to rounding: Adam divides by the gradient's size, so that of a weight's error a share of the step may remain."""
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
@pytest.mark.parametrize(
    "objective", [EDM(sigma_max=HIGH), BOTH_CURRICULA, DISTILLATION], ids=lambda o: type(o).__name__
)
def test_a_run_takes_the_steps_of_the_loop_written_by_hand(objective, optimizer, tmp_path):
    init = save(ConsistencyModel(NET), tmp_path / "init")
    recipe = Recipe(
        "by-hand", "digits", NET.config, objective, iterations=TOTAL, batch=16, lr=0.01, warmup=3, betas=(0.8, 0.95),
        optimizer=optimizer, ema=0.3, clip=0.2, precision="fp32", init_from=str(init),
    )  # fmt: skip
    teacher = None
    if objective.needs_teacher:
        teacher = Denoiser(random_net(num_classes=10, dropout=0.3, seed=1), sigma_data=0.75)
    frozen = copy.deepcopy(teacher).eval() if teacher else None
    run = Run(recipe, load_data("digits"), teacher.train() if teacher else None, "cpu", 3)
    for expected, student, ema, target in by_hand(run, recipe, frozen):
        assert run.advance(None) == pytest.approx(expected, rel=1e-5)
        assert_equal_weights(run.student, student)
        assert_equal_weights(run.ema.module, ema)
        assert (run.target is None) == (target is None)
        if target is not None:
            assert_equal_weights(run.target.module, target)
