"""Before a long training starts: what it will be (parameters, memory, cost), and whether it runs at all on a shrunken copy."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cmlab import checkpoints
from cmlab.checks import known, positive
from cmlab.continuous import ContinuousTraining, MeanFlowTraining
from cmlab.data import Data, Prepared, load_data
from cmlab.distances import LPIPS
from cmlab.models import build
from cmlab.objectives import EDM, ConsistencyDistillation, ProgressiveDistillation
from cmlab.parallel import PARALLEL
from cmlab.prepare import prepare
from cmlab.recipes import PRECISIONS, Recipe
from cmlab.run import parts_of, precision_on
from cmlab.scaling import Denoiser
from cmlab.streams import seeded
from cmlab.training import train

GPU_TFLOPS = 100.0  # what a good training keeps of an A100's 312 in half precision: about a third


def forward_flops(network: dict) -> float:
    """Floating-point operations of one network call on one image, a multiplication with its addition counting two."""
    with torch.device("meta"):
        net, arguments = build(network), _image(network, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*arguments)
    return float(counter.get_total_flops())


def _image(network: dict, n: int) -> tuple[Tensor | None, ...]:
    """n images, noise levels, labels and where it jumps the ways that a network takes, in the current device."""
    shape = network.get("shape") or [network["in_channels"], network["image_size"], network["image_size"]]
    labels = None if network.get("num_classes") is None else torch.zeros(n, dtype=torch.long)
    ways = (torch.ones(n),) if network.get("jumps") else ()
    return torch.zeros(n, *shape), torch.zeros(n), labels, *ways


def network_calls(recipe: Recipe) -> float:
    """Forward passes' worth of work for one training image: a backward pass is two, checkpointing one more."""
    objective, own = recipe.objective, 3.0 + recipe.checkpointing
    if isinstance(objective, EDM):
        return own
    if isinstance(objective, ProgressiveDistillation):
        return own + 2
    if isinstance(objective, ConsistencyDistillation):
        return own + 1 + objective.substeps * (1 if objective.solver == "euler" else 2)
    if isinstance(objective, ContinuousTraining | MeanFlowTraining):
        return own + 2 + objective.needs_teacher  # a pass that carries tangents is two
    return own + 1


def activation_bytes(recipe: Recipe) -> float:
    """What autograd keeps of one image's forward pass, by running it on the meta device."""
    kept: dict[int, Tensor] = {}
    with torch.device("meta"):
        net, arguments = build(recipe.network).to(PRECISIONS[recipe.precision]), _image(recipe.network, 1)
        net.checkpointing = recipe.checkpointing

        def keep(tensor: Tensor) -> Tensor:
            root = tensor if tensor._base is None else tensor._base  # of views, what they look at
            if not isinstance(root, nn.Parameter):
                kept[id(root)] = root  # holding it keeps its id its own
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net.train()(*arguments)
    return float(sum(tensor.numel() * tensor.element_size() for tensor in kept.values()))


def memory_bytes(recipe: Recipe, ranks: int, parallel: str = "ddp") -> dict[str, float]:
    """An estimate of what one of so many devices holds, by what it is for.

    With "fsdp" each holds its share of what lasts from step to step; gradients of several micro-batches add up whole before they
    are shared out. Raises ValueError for an unknown parallel.
    """
    shares = ranks if known("parallel", parallel, PARALLEL) == "fsdp" else 1
    with torch.device("meta"):
        weights = 4.0 * sum(p.numel() for p in build(recipe.network).parameters())
    has_target = recipe.objective.mu(recipe.iterations, recipe.iterations) > 0
    copies = 1 + len(recipe.emas) + has_target + (recipe.teacher not in (None, "exact"))
    gradients = weights if recipe.micro_batches > ranks else weights / shares
    at_once = recipe.batch / max(recipe.micro_batches, ranks)
    return {
        "weights of student, averages, target, teacher": copies * weights / shares,
        "gradients and optimizer": gradients + 2 * weights / shares,
        "the student's weights in half precision": weights / 2 * (recipe.precision != "fp32"),
        f"activations of {at_once:g} images": at_once * activation_bytes(recipe),
    }


def matmul_flops(dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> float:
    """Floating-point operations a second of a large matrix product on this machine's CPU, measured now: the fastest of some."""
    a, fastest, begun = torch.ones(1024, 1024, dtype=dtype), math.inf, time.perf_counter()
    while (now := time.perf_counter()) - begun < seconds:
        a @ a
        fastest = min(fastest, time.perf_counter() - now)
    return 2 * 1024**3 / fastest


def images_per_second(
    recipe: Recipe,
    data: Data | Prepared | None = None,
    teacher: Callable | None = None,
    seconds: float = 3.0,
    device: str | None = None,
) -> float:
    """Training images a second on this machine, measured: real steps of the recipe, for so long after two to warm up.

    A batch of several parts is measured by one part. Raises what training.train raises.
    """
    positive("seconds", seconds)
    part = recipe.batch // recipe.micro_batches
    steps = train(recipe.replace(batch=part, micro_batches=1, iterations=10**9), data, teacher, device)
    begun = [next(steps) for _ in range(2)][-1].seconds
    done = next(record for record in steps if record.seconds > begun + seconds)
    return (done.step - 2) * part / (done.seconds - begun)


def report(recipe: Recipe, ranks: int = 1, parallel: str = "ddp") -> Iterator[str]:
    """The plan of a training over so many processes, line by line: resolved config, size, memory, cost (without that of LPIPS).

    Raises ValueError where its batch cannot be shared out over them.
    """
    parts_of(recipe, 0, ranks)  # found out now, not when all processes have started
    yield json.dumps(recipe.describe(), indent=1, ensure_ascii=False)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(recipe.network).parameters())
    yield f"parameters       {parameters:,}"
    memory = memory_bytes(recipe, ranks, parallel)
    for what, size in memory.items():
        yield f"memory           {amount(size)}   {what}"
    devices = f"{ranks} device{'s' * (ranks > 1)}"
    yield f"memory           {amount(sum(memory.values()))}   on {'each of ' * (ranks > 1)}{devices}, about; more micro-batches need less"
    calls, here = network_calls(recipe), matmul_flops(precision_on(recipe.precision, torch.device("cpu")))
    flops = forward_flops(recipe.network) * calls * recipe.batch * recipe.iterations
    yield f"work             {flops:.3g} operations: {recipe.iterations:,} steps of {recipe.batch:,} images, {calls:g} network calls each"
    yield f"cost             {duration(flops / (GPU_TFLOPS * 1e12) / ranks)} on {devices} that sustain {GPU_TFLOPS:g} TFLOP/s"
    yield f"cost             at least {duration(flops / here)} on this CPU: its matrix products reach {here / 1e9:.0f} GFLOP/s"
    if recipe.note:
        yield f"note             {recipe.note}"
    for error in _missing(recipe):
        yield f"missing          {error}"


def _missing(recipe: Recipe) -> Iterator[Exception]:
    """What the training would find missing: its data, or a model that it starts from or distils."""
    models = {recipe.teacher, recipe.init_from} - {None, "exact"}
    for load, name in [(load_data, recipe.data), *((checkpoints.load, name) for name in sorted(models))]:
        try:
            load(name)
        except (ValueError, OSError) as error:
            yield error


def duration(seconds: float) -> str:
    """A time in the largest unit of which it holds two."""
    for unit, size in (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "about a second"


def amount(size: float) -> str:
    """Bytes in MB or GB, to be set one below the other."""
    return f"{size / 2**30:8.1f} GB" if size >= 2**30 else f"{size / 2**20:8.0f} MB"


# --- a shrunken copy ------------------------------------------------------------------------------------------------


def smoke(recipe: Recipe, folder: Path) -> Recipe:
    """A shrunken copy of a recipe that trains 3 steps in seconds, by the same path, on synthetic pictures prepared in folder.

    The network keeps its levels, its attention and its conditioning, and loses width, depth and pixels; a teacher is one with random
    weights; LPIPS keeps its resizing and has a small backbone with random weights. Embedded data sets stay as they are.
    """
    network, changes = _shrunken(recipe.network), {}
    if recipe.network["name"] == "unet":
        classes = network["num_classes"] or 1
        size, colour = network["image_size"], "rgb" if network["in_channels"] == 3 else "grey"
        changes["data"] = str(
            prepare(
                _pictures(folder / "pictures", size, classes),
                folder / "data",
                size,
                colour,
                True,
                workers=1,
                progress=False,
            )
        )
    teacher = network | {"dropout": 0.1} if network["name"] == "unet" else network
    for role in ("teacher", "init_from"):
        if getattr(recipe, role) not in (None, "exact"):
            changes[role] = str(folder / "teacher")
    if changes.keys() & {"teacher", "init_from"}:
        with seeded(0):
            checkpoints.save(Denoiser(build(teacher)), folder / "teacher")
    objective = recipe.objective
    if isinstance(getattr(objective, "distance", None), LPIPS):
        objective = dataclasses.replace(objective, distance=LPIPS("squeeze", metric=_random_lpips()))
    parts = min(recipe.micro_batches, 2)
    return recipe.replace(
        network=network, objective=objective, iterations=3, batch=2 * parts, micro_batches=parts, **changes
    )


def _shrunken(network: dict) -> dict:
    if network["name"] != "unet":
        return network | {"width": 32, "depth": 1}
    width, size = 32, 8 * 2 ** (len(network["channel_mult"]) - 1)
    smaller = dict(image_size=min(size, network["image_size"], 32), model_channels=width, num_res_blocks=1)
    if network.get("num_head_channels"):
        smaller["num_head_channels"] = width
    return network | smaller | {"num_classes": network.get("num_classes") and min(network["num_classes"], 4)}


def _pictures(folder: Path, size: int, classes: int) -> Path:
    """Writes a few pictures of soft spots, some of each class, once; returns their folder."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for k in range(8):
        path = folder / f"class-{k % classes}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((size + 5, size + 3), Image.Resampling.BICUBIC).save(path)
    return folder


def _random_lpips() -> nn.Module:
    import lpips

    with seeded(0):
        network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval().requires_grad_(False)

    class Flat(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return network(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1), normalize=True).flatten()

    return Flat()
