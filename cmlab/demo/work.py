"""What the demo's buttons do, without a page: generators that yield the share that is done and return what was made.

A handler that stops asking ends the work there: that is how Cancel works, between two network calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from cmlab import drawing, pictures
from cmlab.checks import whole, within
from cmlab.demo.choices import Choice, choose, teacher_of
from cmlab.noise import karras_sigmas
from cmlab.sampling import relayed
from cmlab.streams import seeded

MOST_PICTURES, MOST_STEPS, LARGEST_SEED = 64, 80, 2**31 - 1
BATCH_NUMBERS = 50_000  # pixels and channels a network call draws at once: a cancelled job ends after one


@dataclass(frozen=True)
class Made:
    """Pictures (N, C, H, W) in [-1, 1], their labels (N,) or None, how many were asked for, and what one cost: calls and seconds.

    teacher_calls: those of the diffusion model that found the noises of two pictures.
    """

    images: Tensor
    labels: Tensor | None
    count: int
    calls: int
    seconds: float
    levels: list[float]
    teacher_calls: int = 0

    @property
    def said(self) -> str:
        """The cost, as a sentence."""
        pictures = f"{self.count} picture{'s' * (self.count != 1)}"
        calls = f"{self.calls} network call{'s' * (self.calls != 1)} each"
        found = f", after {self.teacher_calls} of the diffusion model" if self.teacher_calls else ""
        return f"{pictures}, {calls}{found}, {self.seconds:.2f} s"


class Watched:
    """A model that counts its calls and drops out at a rate of one's own, with masks from a seed (None: torch's global numbers)."""

    def __init__(self, model, dropout: float = 0.0, seed: int | None = 0):
        self.model, self.dropout, self.seed, self.calls = model, dropout, seed, 0

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, x: Tensor, sigma, labels: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.dropout == 0:
            return self.model(x, sigma, labels)
        with dropping(self.model, self.dropout):
            if self.seed is None:
                return self.model(x, sigma, labels)
            with seeded(self.seed + self.calls, x.device):
                return self.model(x, sigma, labels)


@contextmanager
def dropping(model: nn.Module, rate: float):
    """Inside, the dropout layers of a model drop at this rate; everything else of it stays as in evaluation."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    before = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = rate
            layer.train()
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p
            layer.eval()


def read_timesteps(text: str | None, sigma_min: float, sigma_max: float) -> tuple[float, ...] | None:
    """The noise levels that the released code's --ts means: "0,22,39" on a grid of 40, "0,106,200 of 201" on another.

    As there, no call is made at the last index, which must be the grid's last one. None for an empty text. Raises ValueError for
    what does not look so, and for more calls than MOST_STEPS.
    """
    if not (text or "").strip():
        return None
    head, _, grid = text.partition("of")
    try:
        steps, ts = int(grid or 40), [int(part) for part in head.split(",")]
    except ValueError:
        raise ValueError(f"timesteps must look like 0,22,39 or 0,106,200 of 201, got {text!r}") from None
    within("the grid of timesteps", steps, 2, 10_000)
    if len(ts) < 2 or ts != sorted(set(ts)) or ts[0] != 0 or ts[-1] != steps - 1:
        raise ValueError(f"timesteps must rise from 0 to {steps - 1}, the last of {steps}, got {text!r}")
    within("the number of timesteps before the last", len(ts) - 1, 1, MOST_STEPS)
    return tuple(karras_sigmas(steps, sigma_min, sigma_max)[ts[:-1]].tolist())


def levels_of(choice: Choice, timesteps: str) -> tuple[float, ...] | None:
    """read_timesteps for a model. Raises ValueError if it is a diffusion model, and timesteps are given."""
    levels = read_timesteps(timesteps, choice.sigma_min, choice.sigma_max)
    if levels is not None and not choice.consistency:
        raise ValueError(f"timesteps are for consistency models; {choice.name} takes steps")
    return levels


def generate(
    model: str, sampler: str | None = None, steps: int | None = None, timesteps: str = "", generator: str = "determ-indiv",
    dropout: float = 0.0, labels: tuple[int, ...] = (), seed: int = 0, num: int = 16,
) -> Iterator[float]:  # fmt: skip
    """Pictures of a model by name, as Made. Raises ValueError for what does not fit, and for more than the demo's limits."""
    choice = choose(model)
    within("dropout", dropout, 0, 0.9)
    within("seed", whole("seed", seed, 0), 0, LARGEST_SEED)
    within("num", whole("num", num), 1, MOST_PICTURES)
    if steps is not None:
        within("steps", whole("steps", steps), 1, MOST_STEPS)
    loaded = choice.load()
    yield 0.0
    levels = levels_of(choice, timesteps)
    if levels is not None:
        sampler, steps = "multistep" if len(levels) > 1 else "onestep", len(levels)
    watched = Watched(loaded, dropout, None if generator == "dummy" else seed)
    batch = _batch(choice)
    plan = drawing.Drawing(watched, num, steps, sampler, seed, labels, batch, generator, levels)
    begun = time.perf_counter()
    images, classes = yield from plan.drawn(0, num)
    calls = watched.calls // -(-num // batch)
    return Made(images, classes, num, calls, time.perf_counter() - begun, plan.plan()[1])


def _batch(choice: Choice) -> int:
    return max(1, BATCH_NUMBERS // math.prod(choice.shape))


def compare(model: str, labels: tuple[int, ...] = (), seed: int = 0, num: int = 8, teacher_steps: int = 18) -> Iterator:
    """The same noise through one call, two calls, and the teacher: {what: Made}, in this order. Raises as generate does."""
    choice = choose(model)
    if not choice.consistency:
        raise ValueError(f"comparing begins with a consistency model, {model} is a diffusion model")
    teacher = teacher_of(choice)
    jobs = {"one call": dict(model=model, steps=1), "two calls": dict(model=model, steps=2)}
    if teacher is not None:
        jobs[f"the teacher {teacher.name}"] = dict(model=teacher.name, steps=teacher_steps)
    results = {}
    for k, (what, job) in enumerate(jobs.items()):
        shares = generate(labels=labels, seed=seed, num=num, **job)
        results[what] = yield from relayed(shares, lambda _, share, k=k: (k + share) / len(jobs))
    return results


def edit(
    model: str, task: str, images: Tensor, mask: Tensor | None = None, labels: tuple[int, ...] = (), factor: int = 4,
    sigma: float = 1.0, steps: int = 10, num: int = 6, seed: int = 0,
) -> Iterator[float]:  # fmt: skip
    """A picture (1, C, H, W), or two to interpolate, edited: Made, whose images are it, what is known, and num results."""
    choice = choose(model)
    within("steps", whole("steps", steps), 1, MOST_STEPS)
    within("num", whole("num", num), 1, 16)
    within("seed", whole("seed", seed, 0), 0, LARGEST_SEED)
    if not choice.consistency:
        raise ValueError(f"editing needs a consistency model, {model} is a diffusion model")
    teacher = teacher_of(choice) if task == "interpolate" else None
    if task == "interpolate" and teacher is None:
        raise ValueError(f"interpolating needs a diffusion model of the same data as {model}, and none is here")
    watched, finder = Watched(choice.load()), None if teacher is None else Watched(teacher.load())
    if len(labels) > 1:
        raise ValueError(f"a picture is of one class, got {labels}")
    classes = pictures.edit_labels(watched, [labels[0] if labels else None] * len(images))
    yield 0.0
    begun, batch = time.perf_counter(), _batch(choice)
    row = yield from pictures.edited(
        watched, task, images, classes, mask, factor, sigma, steps, num, seed, finder, batch
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    if finder is None:
        return Made(row, None, num, watched.calls // -(-num // batch), seconds, [])
    return Made(row, None, num, 1, seconds, [], teacher_calls=finder.calls)
