"""Training and sampling on the CPU beside straightforward PyTorch of the same network: ratios of one run, in one table.

    python benchmarks/speed.py                    # some 3 minutes; writes benchmarks/SPEED.md
    python benchmarks/speed.py --small            # a dry run with a small network

A training step: ours as `cmlab train` does it (precision of the recipe, fused optimizer, averages), the other as a short script would:
float32, AdamW, a loop for the average, and the loss written out below. Both see the same numbers, and their losses must agree.
"""

from __future__ import annotations

import copy
import datetime
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from unet import seconds

from cmlab import load_data
from cmlab.continuous import ContinuousTraining, MeanFlowTraining, tangent
from cmlab.exact import DatasetDenoiser
from cmlab.noise import karras_sigmas
from cmlab.objectives import EDM, ConsistencyDistillation, ProgressiveDistillation
from cmlab.recipes import MLP, get_recipe
from cmlab.run import Run
from cmlab.sampling import sample_heun, sample_onestep
from cmlab.scaling import ConsistencyModel, Denoiser, TrigFlow

RECIPES = [
    "digits-edm", "digits-cd-short", "digits-ct-short", "digits-ict-short", "digits-ect-short", "digits-pd-short",
    "digits-sct-short", "digits-scd-short", "digits-meanflow-short",
]  # fmt: skip


def pixelwise(v: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return v[:, None, None, None]


def huber(a: Tensor, b: Tensor, c: float = 0.03) -> Tensor:
    """Pseudo-Huber of whole images."""
    return ((a - b).flatten(1).square().sum(1) + c**2).sqrt() - c


def heun(teacher, x, high, low, labels):
    """One step of the probability-flow ODE."""
    slope = (x - teacher(x, high, labels)) / pixelwise(high)
    there = x + pixelwise(low - high) * slope
    return x + pixelwise(low - high) * (slope + (there - teacher(there, low, labels)) / pixelwise(low)) / 2


def loss_by_hand(objective, student, target, teacher, images, labels, noise, levels) -> Tensor:
    """The mean loss of a batch, as a script would write it."""
    high, low = levels[0], levels[-1]
    x = images + pixelwise(high) * noise
    if isinstance(objective, EDM):
        weight = 1 / high**2 + 1 / student.sigma_data**2
        return (weight * F.mse_loss(student(x, high, labels), images, reduction="none").mean((1, 2, 3))).mean()
    if isinstance(objective, ContinuousTraining):
        return trigflow_by_hand(objective, student, teacher, images, labels, noise, *levels)
    if isinstance(objective, MeanFlowTraining):
        return meanflow_by_hand(student, images, labels, noise, high, low)
    with torch.no_grad():
        if isinstance(objective, ProgressiveDistillation):
            middle = levels[1]
            there = x + pixelwise(middle - high) * (x - teacher(x, high, labels)) / pixelwise(high)
            there = there + pixelwise(low - middle) * (there - teacher(there, middle, labels)) / pixelwise(middle)
            aim = x - pixelwise(high) * (there - x) / pixelwise(low - high)
        elif isinstance(objective, ConsistencyDistillation):
            root = [high ** (1 / 7) + k / 2 * (low ** (1 / 7) - high ** (1 / 7)) for k in range(3)]
            between = [r**7 for r in root]
            aim = target(heun(teacher, heun(teacher, x, *between[:2], labels), *between[1:], labels), low, labels)
        else:
            aim = target(images + pixelwise(low) * noise, low, labels)
    if isinstance(objective, ProgressiveDistillation):
        weight = (high**-2).clamp(min=1)
        return (weight * F.mse_loss(student(x, high, labels), aim, reduction="none").mean((1, 2, 3))).mean()
    weight = 1 / (high - low) if objective.weight == "inverse-gap" else torch.ones_like(high)
    return (weight * huber(student(x, high, labels), aim)).mean()


def trigflow_by_hand(objective, student, teacher, images, labels, noise, sigma, r) -> Tensor:
    """sCT and sCD."""
    scale, t = student.sigma_data, torch.atan(sigma / student.sigma_data)
    cos, sin, c_noise = pixelwise(t.cos()), pixelwise(t.sin()), 250 * sigma.log()
    x = cos * images + sin * scale * noise
    with torch.no_grad():
        slope = (cos * x - teacher(x / cos, sigma, labels)) / sin if teacher else cos * scale * noise - sin * images
        along = (cos * sin * slope / scale, torch.full_like(sigma, 250.0))
        still, change = torch.func.jvp(lambda x, c: -student.net(x, c, labels), (x / scale, c_noise), along)
        g = -(cos**2) * (still - slope / scale) - pixelwise(r) * (cos * sin * x / scale + change)
        g = g / (g.square().mean((1, 2, 3), keepdim=True).sqrt() + objective.normalize)
    weight = student.log_weight(c_noise) if objective.weight == "adaptive" else torch.zeros_like(sigma)
    error = (-student.net(x / scale, c_noise, labels) - still - g).square().mean((1, 2, 3))
    return (weight.exp() * error - weight).mean()


def meanflow_by_hand(student, images, labels, noise, high, low) -> Tensor:
    """MeanFlow."""
    t, r, v = high / (1 + high), low / (1 + low), noise - images
    z = (1 - pixelwise(t)) * images + pixelwise(t) * noise
    with torch.no_grad():
        _, change = torch.func.jvp(
            lambda z, t: student.average_velocity(z, r, t, labels), (z, t), (v, torch.ones_like(t))
        )
    error = (student.average_velocity(z, r, t, labels) - v + pixelwise(t - r) * change).square().sum((1, 2, 3))
    return (error / (error.detach() + 1e-3)).mean()


class Script:
    """The straightforward training of the same networks on the same numbers."""

    def __init__(self, run: Run):
        self.run, self.objective = run, run.recipe.objective
        self.student, self.teacher = copy.deepcopy(run.student), run.teacher
        self.ema = copy.deepcopy(run.student)
        self.target = None if run.target is None else copy.deepcopy(run.student)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-3, weight_decay=0.0)

    def advance(self) -> float:
        """One step; returns its loss."""
        images, labels, noise, levels = self.run._draw(0, 0, 1)
        target = self.student if self.target is None else self.target
        loss = loss_by_hand(self.objective, self.student, target, self.teacher, images, labels, noise, levels)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 10.0)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.student.parameters(), strict=True):
                average.mul_(0.999).add_(parameter, alpha=0.001)
            if self.target is not None:
                mu = self.objective.mu(self.run.step, self.run.recipe.iterations)
                for average, parameter in zip(self.target.parameters(), self.student.parameters(), strict=True):
                    average.mul_(mu).add_(parameter, alpha=1 - mu)
        return loss.item()


def scramble(run: Run) -> None:
    """Adds the same random numbers to the weights of student and target."""
    for model in (run.student, *([] if run.target is None else [run.target])):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))


def alternating(calls: list[Callable], rounds: int) -> list[float]:
    """The median time of each call; they take turns, so that what disturbs one disturbs all."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for kept, call in zip(times, calls, strict=True):
            kept.append(seconds(call, "cpu"))
    return [median(kept) for kept in times]


def training(small: bool, rounds: int) -> list[str]:
    """A row for each objective."""
    rows = ["| objective | batch | ours, ms | script, ms | script / ours |", "| --- | --- | --- | --- | --- |"]
    for name in RECIPES:
        recipe = get_recipe(name).replace(seed=1)
        network = recipe.network | dict(dropout=0.0)  # whose random choices would hide a difference
        recipe = recipe.replace(network=network)
        if small:
            recipe = recipe.replace(network=network | dict(width=32, depth=1), init_from=None, batch=16)
        run, exact = (Run(r, load_data("digits"), None, "cpu", 0) for r in (recipe, recipe.replace(precision="fp32")))
        for one in (run, exact):  # in the midst of a run, with weights that are not zero: nothing hides
            one.step = recipe.iterations // 2
            scramble(one)
        script = Script(run)
        by_hand, ours = script.advance(), exact.advance(None)[0]
        assert abs(by_hand - ours) < 1e-3 * abs(ours) + 1e-5, f"{name}: the losses are {ours} and {by_hand}"
        run.advance(None)
        ours, other = alternating([lambda run=run: run.advance(None), script.advance], rounds)
        rows.append(f"| {name} | {recipe.batch} | {1e3 * ours:.0f} | {1e3 * other:.0f} | {other / ours:.2f} |")
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def sampling(small: bool, rounds: int) -> list[str]:
    """One step, and 18 of Heun's, beside loops written out."""
    from cmlab.models import build

    net = build(dict(**(MLP | (dict(width=32, depth=1) if small else {})), shape=[1, 8, 8])).eval()
    model, denoiser = ConsistencyModel(net, 0.75, 0.002, 20.0), Denoiser(net, 0.75, 0.002, 20.0)
    noise = torch.randn(64 if small else 1437, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, sigmas = torch.arange(len(noise)) % 10, karras_sigmas(18, 0.002, 20.0)

    def heun_loop():
        x, steps = noise * 20.0, [*sigmas.float().tolist(), 0.0]
        for now, then in zip(steps, steps[1:], strict=False):
            slope = (x - denoiser(x, now, labels)) / now
            there = x + (then - now) * slope
            x = there if then == 0 else x + (then - now) * (slope + (there - denoiser(there, then, labels)) / then) / 2
        return x

    assert torch.allclose(heun_loop(), sample_heun(denoiser, noise, sigmas, labels), atol=1e-4)
    pairs = {
        "one step": (lambda: sample_onestep(model, noise, labels), lambda: model(noise * 20.0, 20.0, labels)),
        "18 steps of Heun, 35 calls": (lambda: sample_heun(denoiser, noise, sigmas, labels), heun_loop),
    }
    rows = [f"| {len(noise)} digits | ours, ms | loop, ms | loop / ours |", "| --- | --- | --- | --- |"]
    for name, pair in pairs.items():
        ours, other = alternating(list(pair), rounds)
        rows.append(f"| {name} | {1e3 * ours:.1f} | {1e3 * other:.1f} | {other / ours:.2f} |")
        print(rows[-1], flush=True)
    return rows


def derivatives(small: bool, rounds: int) -> list[str]:
    """The tangent in one pass of forward mode, beside central differences of the model: time and error against float64."""
    from cmlab.models import build

    torch.manual_seed(0)
    net = (
        build(dict(**(MLP | (dict(width=32, depth=1) if small else {})), shape=[1, 8, 8])).eval().requires_grad_(False)
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    digits, n = load_data("digits"), 64 if small else 512
    images, labels = digits.images[:n], digits.labels[:n]
    sigma = torch.logspace(-1, 1, n)
    model, teacher = TrigFlow(net, 0.75, 0.002, 20.0), DatasetDenoiser(digits.images)
    cos, sin = model.cos_sin(sigma, images)
    x_t = cos * images + sin * 0.75 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    slope = (cos * x_t - teacher(x_t / cos, sigma)) / sin

    def differences(step: float) -> Tensor:
        ends = []
        for sign in (1, -1):
            angle = torch.atan(sigma / 0.75) + sign * step
            there = x_t + sign * step * slope
            ends.append(model(there / pixelwise(angle.cos()), 0.75 * angle.tan(), labels))
        return cos / 0.75 * (ends[0] - ends[1]) / (2 * step)

    def by_jvp() -> Tensor:
        return tangent(model, x_t, slope, sigma, labels)[1]

    wide = TrigFlow(copy.deepcopy(net).double(), 0.75, 0.002, 20.0)
    right = tangent(wide, x_t.double(), slope.double(), sigma.double(), labels)[1]
    rows = [f"| tangent of {n} digits | ms | x jvp | relative error |", "| --- | --- | --- | --- |"]
    ways = {"jvp": by_jvp} | {f"differences, step {h:g}": lambda h=h: differences(h) for h in (1e-2, 1e-3, 1e-4)}
    times = alternating(list(ways.values()), rounds)
    for (name, call), taken in zip(ways.items(), times, strict=True):
        error = float((call() - right).norm() / right.norm())
        rows.append(f"| {name} | {1e3 * taken:.1f} | {taken / times[0]:.2f} | {error:.1e} |")
        print(rows[-1], flush=True)
    return rows


def main(small: bool = False, rounds: int = 15, output: Path | None = None) -> None:
    """Runs all three parts, prints their tables and writes them."""
    warnings.filterwarnings("ignore")
    rounds = 2 if small else rounds
    lines = [
        "# Speed on a CPU, as ratios of one run", "",
        f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        "`python benchmarks/speed.py`; what is compared stands at its head.",
    ]  # fmt: skip
    for part in (training, sampling, derivatives):
        lines += ["", *part(small, rounds)]
    path = output or Path(__file__).with_name("SPEED.md")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
