"""One training run: the networks, the optimizer, and one step after the other; saved and restored exactly.

Every random number of a step comes from (seed, step), never from what happened before, so that a run that was killed goes
on bit for bit as if it had not been, and so that the draws do not depend on the number of processes.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cmlab import checkpoints
from cmlab.checks import whole
from cmlab.data import Data, Prepared
from cmlab.exact import DatasetDenoiser
from cmlab.files import write_file
from cmlab.models import build
from cmlab.models.small import ResidualMLP, taken_over
from cmlab.objectives import Objective, ProgressiveDistillation
from cmlab.parallel import Sharing, accelerator_on, averaging, gathered, load_model, load_optimizer
from cmlab.recipes import PRECISIONS, Recipe
from cmlab.scaling import ConsistencyModel, Denoiser
from cmlab.streams import randn, seeded

LARGEST_SEED = 2**32 - 1  # torch's CPU generator keeps 32 bits: a larger one would repeat a smaller one
STREAMS = 1_009  # of random numbers a step: one of draws and one of dropout for every micro-batch, or share of one


class TrainingDiverged(RuntimeError):
    """The loss or its gradient stopped being finite. The message names the step, the noise levels and the last good checkpoint."""


class Loss(nn.Module):
    """An objective and the networks that it calls, as one module for the processes to share: one call, then its backward pass.

    Within it the student may be called twice and the target beside it, which no wrapper of the student alone would allow.
    """

    def __init__(self, objective: Objective, student: nn.Module, target: nn.Module | None, teacher: Callable | None):
        super().__init__()
        self.objective, self.student, self.target, self.teacher = objective, student, target, teacher

    def forward(self, images: Tensor, labels: Tensor | None, noise: Tensor, *levels: Tensor) -> Tensor:
        """(B, …), (B,) or None, (B, …) and the objective's levels (B,) -> losses (B,)."""
        return self.objective(self.student, images, labels, noise, *levels, target=self.target, teacher=self.teacher)


class Run:
    """The state of one training: student, target, averages, optimizer and step.

    A batch is micro_batches parts, each with random numbers of its own. The processes share the parts out and compute theirs one
    after the other, adding up gradients; where there are more processes than parts, several share one.
    """

    def __init__(
        self, recipe: Recipe, data: Data | Prepared, teacher: Callable | str | Path | None, device: str | None, seed: int,
        parallel: str = "ddp",
    ):  # fmt: skip
        self.recipe, self.data, self.seed, self.step = recipe, data, whole("seed", seed, 0), 0
        if seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most {LARGEST_SEED}, got {seed}")
        self.accelerator = accelerator_on(device)
        self.parts = parts_of(recipe, self.accelerator.process_index, self.accelerator.num_processes)
        self.precision, self.overflows = precision_on(recipe.precision, self.accelerator.device), 0
        self.sharing = Sharing(parallel, self.accelerator)
        self._assemble(
            self._new_student(),
            self._chosen_teacher(teacher),
            teacher_is_own=False,
        )
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self.precision == torch.float16)

    def _assemble(self, student: Denoiser, teacher: Callable | None, teacher_is_own: bool) -> None:
        """All that trains a student, from its weights on. Every model is placed before the next is copied: together they may not fit."""
        if isinstance(teacher, nn.Module):  # an exact denoiser is a plain function
            teacher = self.sharing.place(teacher.eval().requires_grad_(False))
        self.teacher, self.teacher_is_own = teacher, teacher_is_own
        self.emas = [self._averaged(student, partial(self._ema_average, rate)) for rate in self.recipe.emas]
        self.target = self._new_target(student)
        self.student = self.sharing.place(student)
        self.optimizer = self._new_optimizer()
        target = None if self.target is None else self.target.module
        self.loss = self.sharing.join(Loss(self.recipe.objective, self.student, target, self.teacher))

    def _averaged(self, student: Denoiser, average: Callable) -> AveragedModel:
        averaged = AveragedModel(student, multi_avg_fn=average)
        self.sharing.place(averaged.module.requires_grad_(False))
        return averaged

    @property
    def ema(self) -> AveragedModel:
        """The average that becomes the model: the last of the recipe's rates."""
        return self.emas[-1]

    def _new_student(self) -> Denoiser:
        with seeded(self.seed):
            student = self._model()
        if self.recipe.init_from:
            self._start_from(student)
        return student.train()

    def _start_from(self, student: Denoiser) -> None:
        start = checkpoints.load(self.recipe.init_from)
        both = isinstance(student.net, ResidualMLP) and isinstance(start.net, ResidualMLP)
        levels = student.sigma_min, student.sigma_max
        try:
            student.net.load_state_dict(taken_over(student.net, start.net, *levels) if both else start.net.state_dict())
        except RuntimeError:
            raise ValueError(
                f"the model to start from, {self.recipe.init_from}, has another network than the recipe: {start.net.config}, "
                f"not {student.net.config}"
            ) from None

    def _model(self) -> Denoiser:
        r = self.recipe
        net = build(r.network)
        net.checkpointing = r.checkpointing
        return r.objective.model(net, r.sigma_data or self.data.sigma_data)

    def _model_with(self, weights: dict[str, Tensor]) -> Denoiser:
        """A model of the student's kind with a copy of these weights."""
        with torch.device("meta"):
            model = self._model()
        model.to_empty(device=self.accelerator.device).load_state_dict(weights)
        return model

    def _own_teacher(self) -> Callable | None:
        if self.recipe.teacher == "exact":
            if not isinstance(self.data, Data):
                raise ValueError(
                    f"teacher 'exact' sums over all images, which {self.data.name} keeps on disk: name a model"
                )
            return DatasetDenoiser(self.data.images, self.data.labels if self._conditional else None)
        if self.recipe.teacher is None and self.recipe.objective.needs_teacher:
            raise ValueError(f"recipe {self.recipe.name} distils and names no teacher: give one, train(…, teacher=…)")
        return checkpoints.load(self.recipe.teacher) if self.recipe.teacher else None

    def _chosen_teacher(self, given: Callable | str | Path | None) -> Callable | None:
        if isinstance(given, (str, Path)):
            given = checkpoints.load(given)
        teacher = self._own_teacher() if given is None else copy.deepcopy(given)  # the caller's stays as it is
        if isinstance(teacher, ConsistencyModel):
            raise ValueError("teacher must be a denoiser, whose ODE is walked; got a consistency model, which jumps")
        return teacher

    @property
    def _conditional(self) -> bool:
        return self.recipe.network.get("num_classes") is not None

    def _new_target(self, student: Denoiser) -> AveragedModel | None:
        if self.recipe.objective.mu(self.recipe.iterations, self.recipe.iterations) == 0:
            return None
        target = self._averaged(student, self._target_average).train()
        target.n_averaged.fill_(1)  # of none, the first update would copy the student instead of averaging
        return target

    def _new_optimizer(self) -> torch.optim.Optimizer:
        kind = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[self.recipe.optimizer]
        fused = {"fused": True} if self.recipe.optimizer == "adamw" else {}
        return kind(self.student.parameters(), lr=self.recipe.lr, betas=self.recipe.betas, weight_decay=0.0, **fused)

    def _ema_average(self, rate: float, averages, parameters, count) -> None:
        count = int(count)
        decay = min(rate, (1 + count) / (10 + count))  # short runs: do not remember the initial weights
        get_ema_multi_avg_fn(decay)(averages, parameters, count)

    def _target_average(self, averages, parameters, count) -> None:
        get_ema_multi_avg_fn(self.recipe.objective.mu(self.step, self.recipe.iterations))(averages, parameters, count)

    def agreed(self, value):
        """The main process's value, on all processes."""
        return broadcast_object_list([value])[0]

    def advance(self, folder: str | Path | None) -> tuple[float, float, float]:
        """One step: returns its loss, the gradient's norm before clipping, and the learning rate."""
        lr = self.recipe.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._change_teacher()
        losses, sigmas = self._backward()
        bad = ~torch.isfinite(self.accelerator.gather(losses))
        if bad.any():
            self._stop("loss", f", sigma {self.accelerator.gather(sigmas)[bad].tolist()[:3]}", folder)
        norm = self._update(folder)
        self.step += 1
        return float(self.accelerator.reduce(losses.mean(), "mean")), norm, lr

    def _backward(self) -> tuple[Tensor, Tensor]:
        """Adds up the gradients of this process's parts of the batch; returns their losses and highest levels, (B',) each."""
        losses, sigmas = [], []
        mine = self.recipe.batch // self.accelerator.num_processes
        for k, part in enumerate(self.parts, 1):
            with averaging(self.loss, now=k == len(self.parts)):
                values, levels = self._losses(*part)
                self.scaler.scale(values.sum() / mine).backward()
            losses.append(values.detach())
            sigmas.append(levels[0])
        return torch.cat(losses), torch.cat(sigmas)

    def _update(self, folder: str | Path | None) -> float:
        """Clips, steps and averages; returns the norm before. In float16 a step whose gradients overflow is left out."""
        self.scaler.unscale_(self.optimizer)
        norm = float(gathered(nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.clip)))
        overflow = not math.isfinite(norm)
        if overflow and self.scaler.get_scale() <= 1:  # 1 where there is no scaling
            self._stop("gradient", "", folder)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.overflows += overflow
        if not overflow:
            for average in [*self.emas, self.target] if self.target else self.emas:  # the target with this step's mu(k)
                average.update_parameters(self.student)
        return norm

    def _losses(self, part: int, share: int, shares: int) -> tuple[Tensor, list[Tensor]]:
        images, labels, noise, levels = self._draw(part, share, shares)
        device = self.accelerator.device
        dropout = 1 + 2 * (part + self.recipe.micro_batches * share)
        with seeded(self._number(dropout), device):
            with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
                return self.loss(images, labels, noise, *levels), levels

    def _draw(self, part: int, share: int, shares: int):
        """A part of the step's batch from (seed, step, part), and of it one share of so many."""
        generator = torch.Generator().manual_seed(self._number(2 * part))
        n = self.recipe.batch // self.recipe.micro_batches
        index = self.data.choose(n, generator, self.step * self.recipe.batch + part * n, self.seed)
        images, labels = self.data.batch(index, generator)
        if not self._conditional:
            labels = None  # an unconditional network on data that has labels
        noise = randn(tuple(images.shape), generator)
        levels = self.recipe.objective.levels(n, self.step, self.recipe.iterations, generator)
        mine = slice(share * n // shares, (share + 1) * n // shares)
        levels = [v.float() for v in levels]  # before they move: some devices know no float64
        move = [None if t is None else t[mine].to(self.accelerator.device) for t in (images, labels, noise, *levels)]
        return move[0], move[1], move[2], move[3:]

    def _number(self, stream: int) -> int:
        return (self.seed * 1_000_003 + self.step) * STREAMS + stream

    def _change_teacher(self) -> None:
        """Progressive distillation: when the number of steps halves, the averaged student becomes the teacher.

        The student starts the next stage as its copy, with a fresh optimizer and average.
        """
        if not isinstance(self.recipe.objective, ProgressiveDistillation) or self.step == 0:
            return
        before, now = (self.recipe.objective.scales(k, self.recipe.iterations) for k in (self.step - 1, self.step))
        if before != now:
            student = self._model_with(gathered(self.ema.module.state_dict())).train()
            self._assemble(student, copy.deepcopy(student), teacher_is_own=True)

    def _stop(self, what: str, where: str, folder: str | Path | None) -> None:
        """Raises TrainingDiverged: the weights are still those before this step."""
        state = None if folder is None else Path(folder) / "state.pt"
        last = (
            f"the last good checkpoint is {state}" if state and state.exists() else "no checkpoint was kept (no folder)"
        )
        raise TrainingDiverged(f"{what} is not finite at step {self.step + 1}{where}; {last}")

    def save(self, folder: str | Path) -> None:
        """Writes <folder>/state.pt: all that the next step depends on. Atomic: a cut leaves the previous state."""
        main = self.accelerator.is_main_process
        state = dict(
            recipe=self.recipe.describe(), seed=self.seed, step=self.step,
            student=self.student.state_dict(), emas=[e.state_dict() for e in self.emas],
            target=None if self.target is None else self.target.state_dict(),
            teacher=self.teacher.state_dict() if self.teacher_is_own else None,
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), overflows=self.overflows,
        )  # fmt: skip
        state = gathered(state, keep=main)  # all processes take part, one writes
        if main:
            write_file(Path(folder) / "state.pt", lambda file: torch.save(state, file))

    def restore(self, folder: str | Path | None) -> None:
        """Reads <folder>/state.pt back, after checking that it belongs to this recipe and seed."""
        if folder is None:
            raise ValueError("resume needs folder, where the state of the run is")
        path = Path(folder) / "state.pt"
        if not path.exists():
            raise FileNotFoundError(f"nothing to resume: {path} does not exist; start without resume")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read as a training state ({type(error).__name__}); is it cut off?"
            ) from error
        mine = json.loads(json.dumps(self.recipe.describe()))
        told = ("cost", "expected", "note", "checkpointing")  # prose, and what changes no number
        differs = [k for k, v in state["recipe"].items() if k not in told and mine.get(k) != json.loads(json.dumps(v))]
        if differs or state["seed"] != self.seed:
            there = [f"{k} {state['recipe'][k]}, not {mine.get(k)}" for k in differs] or [
                f"seed {state['seed']}, not {self.seed}"
            ]
            raise ValueError(f"{path} belongs to another run: {', '.join(there)}; begin a new one in another folder")
        self.step = state["step"]
        if state["teacher"] is not None:
            self._assemble(self._new_student(), self._model_with(state["teacher"]), teacher_is_own=True)
        load_model(self.student, state["student"])
        for average, saved in zip(self.emas, state["emas"], strict=True):
            load_model(average, saved)
        if self.target is not None:
            load_model(self.target, state["target"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.overflows = state["overflows"]

    def finish(self, folder: str | Path | None, seconds: float) -> Denoiser:
        """The averaged model, ready to use. With a folder it is saved as <folder>/model, those of other rates as model-ema-<rate>."""
        names = [*(f"model-ema-{rate:g}" for rate in self.recipe.emas[:-1]), "model"]
        facts = dict(recipe=self.recipe.name, seed=self.seed, seconds=round(seconds, 1))
        averages = list(zip(names, self.emas, strict=True))
        for name, average in averages if folder is not None else averages[-1:]:
            weights = gathered(average.module.state_dict())  # all processes take part
            model = self._model_with(weights).eval().requires_grad_(False)
            model.info = checkpoints.describe(model) | {"data": self.data.name, "facts": {}}
            if folder is not None and self.accelerator.is_main_process:
                checkpoints.save(model, Path(folder) / name, data=self.data.name, **facts)
        return model


def parts_of(recipe: Recipe, rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """(micro-batch, share, shares) for all that a process of so many computes of a batch.

    Raises ValueError where the micro-batches cannot be shared out evenly.
    """
    parts, size = recipe.micro_batches, recipe.batch // recipe.micro_batches
    if 2 * max(parts, ranks) > STREAMS:
        raise ValueError(f"a batch has at most {STREAMS // 2} micro-batches or processes, got {parts} and {ranks}")
    if parts % ranks == 0:
        return [(k, 0, 1) for k in range(rank * parts // ranks, (rank + 1) * parts // ranks)]
    shares = ranks // parts
    if ranks % parts or size % shares:
        raise ValueError(f"batch {recipe.batch} in {parts} micro-batches cannot be shared out over {ranks} processes")
    return [(rank // shares, rank % shares, shares)]


NATIVE = {"bf16": ("amx_bf16", "avx512_bf16"), "fp16": ("amx_fp16", "avx512_fp16")}  # a CPU's instructions


def precision_on(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a recipe's precision on a device: a half precision only where the device multiplies it, else float32."""
    return PRECISIONS[name] if name == "fp32" or multiplies(name, device) else torch.float32


def multiplies(precision: str, device: torch.device) -> bool:
    """Whether the device has instructions for products in "bf16" or "fp16".

    A CPU without them (most laptops) emulates them tens of times slower than it computes in float32.
    """
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 and newer
        has = torch.cpu.get_capabilities()
        return any(has.get(instruction) for instruction in NATIVE[precision])
    return False
