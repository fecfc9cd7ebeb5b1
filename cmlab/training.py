"""The training loop: a generator of typed records over accelerate, with EMA, clipping, save and exact resume.

Every random number of a step comes from (seed, step), never from what happened before, so that a run that was killed goes
on bit for bit as if it had not been, and so that the draws do not depend on the number of processes.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cmlab import checkpoints
from cmlab.checks import untaken, whole
from cmlab.data import Data, load_data
from cmlab.exact import DatasetDenoiser
from cmlab.models import build
from cmlab.objectives import ProgressiveDistillation
from cmlab.recipes import Recipe, get_recipe
from cmlab.scaling import Denoiser
from cmlab.streams import randint, randn, seeded

LARGEST_SEED = 2**32  # beyond it (seed, step) would not fit into the 64 bits of torch's seeds


@dataclass(frozen=True)
class Record:
    """One training step: its number (from 1), the batch's mean loss, and how the run stands. The last one carries the model."""

    step: int
    total: int
    loss: float
    lr: float
    grad_norm: float
    scales: int | None  # N(k), None for continuous levels
    mu: float  # decay of the target network
    seconds: float  # since the run (or its resumption) began
    model: Denoiser | None = None  # the EMA model, on the last record


class TrainingDiverged(RuntimeError):
    """The loss or its gradient stopped being finite. The message names the step, the noise levels and the last good checkpoint."""


def train(
    recipe: Recipe | str,
    data: Data | None = None,
    teacher: Callable | None = None,
    device: str | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    save_every: int = 500,
    seed: int | None = None,
) -> Iterator[Record]:
    """Trains a recipe; yields a Record a step. `*_, last = train("digits-cd")` gives the model as last.model.

    data and teacher default to the recipe's own (the teacher: an embedded model or "exact", the data's own denoiser); any
    denoiser serves as teacher.
    With a folder the state is saved every save_every steps and at the end (state.pt, atomically), and the final model as
    <folder>/model; resume=True goes on from the state found there. Raises FileNotFoundError if there is none, ValueError if
    it belongs to another recipe, if a folder to start in holds a run or if a teacher is missing, TrainingDiverged when the
    loss or its gradient is not finite.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    if folder is not None and not resume:
        untaken(Path(folder), "state.pt")
    run = Run(recipe, data or load_data(recipe.data), teacher, device, recipe.seed if seed is None else seed)
    whole("save_every", save_every)
    if resume:
        run.restore(folder)
        if run.step >= recipe.iterations:
            raise ValueError(f"{folder} holds a finished run; its model is {Path(folder) / 'model'}")
    elif folder is not None:
        run.save(folder)  # an unwritable folder is found out now, not after an hour
    begun = time.perf_counter()
    while run.step < recipe.iterations:
        loss, grad_norm, lr = run.advance(folder)
        done, seconds = run.step == recipe.iterations, time.perf_counter() - begun
        model = run.finish(folder, seconds) if done else None  # before the state: a cut between the two repeats a step
        if folder is not None and (done or run.step % save_every == 0):
            run.save(folder)
        scales, mu = (f(run.step - 1, recipe.iterations) for f in (recipe.objective.scales, recipe.objective.mu))
        yield Record(run.step, recipe.iterations, loss, lr, grad_norm, scales, mu, seconds, model)


class Run:
    """The state of one training: student, target, EMA, optimizer and step."""

    def __init__(self, recipe: Recipe, data: Data, teacher: Callable | None, device: str | None, seed: int):
        self.recipe, self.data, self.seed, self.step = recipe, data, whole("seed", seed, 0), 0
        if seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most {LARGEST_SEED}, got {seed}")
        self.accelerator = accelerator_on(device)
        if recipe.batch % self.accelerator.num_processes:
            raise ValueError(f"batch {recipe.batch} does not divide over {self.accelerator.num_processes} processes")
        self.bf16 = recipe.bf16 and multiplies_bf16(self.accelerator.device)
        student = self._new_student()
        teacher = self._own_teacher() if teacher is None else copy.deepcopy(teacher)  # the caller's stays as it is
        if isinstance(teacher, nn.Module):  # an exact denoiser is a plain function
            teacher = teacher.eval().requires_grad_(False).to(self.accelerator.device)
        self.teacher, self.teacher_is_own = teacher, False
        self.ema = AveragedModel(student, multi_avg_fn=self._ema_average).to(self.accelerator.device)
        self.target = self._new_target(student)
        self.student, self.optimizer = self.accelerator.prepare(student, self._new_optimizer(student))

    def _new_student(self) -> Denoiser:
        r = self.recipe
        with seeded(self.seed):
            net = build(r.network)
        if r.init_from:
            net.load_state_dict(checkpoints.load(r.init_from).net.state_dict())
        return checkpoints.KINDS[r.objective.model_kind](
            net, self.data.sigma_data, r.objective.sigma_min, r.objective.sigma_max
        ).train()

    def _own_teacher(self) -> Callable | None:
        if self.recipe.teacher == "exact":
            return DatasetDenoiser(self.data.images, self.data.labels if self._conditional else None)
        if self.recipe.teacher is None and self.recipe.objective.needs_teacher:
            raise ValueError(f"recipe {self.recipe.name} distils and names no teacher: give one, train(…, teacher=…)")
        return checkpoints.load(self.recipe.teacher) if self.recipe.teacher else None

    @property
    def _conditional(self) -> bool:
        return self.recipe.network.get("num_classes") is not None

    def _new_target(self, student: nn.Module) -> AveragedModel | None:
        if self.recipe.objective.mu(self.recipe.iterations, self.recipe.iterations) == 0:
            return None
        target = AveragedModel(student, multi_avg_fn=self._target_average).train()
        target.n_averaged.fill_(1)  # of none, the first update would copy the student instead of averaging
        return target.to(self.accelerator.device).requires_grad_(False)

    def _new_optimizer(self, student: nn.Module) -> torch.optim.Optimizer:
        kind = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[self.recipe.optimizer]
        fused = {"fused": True} if self.recipe.optimizer == "adamw" else {}
        return kind(student.parameters(), lr=self.recipe.lr, betas=self.recipe.betas, weight_decay=0.0, **fused)

    def _ema_average(self, averages, parameters, count) -> None:
        count = int(count)
        decay = min(self.recipe.ema, (1 + count) / (10 + count))  # short runs: do not remember the initial weights
        get_ema_multi_avg_fn(decay)(averages, parameters, count)

    def _target_average(self, averages, parameters, count) -> None:
        get_ema_multi_avg_fn(self.recipe.objective.mu(self.step, self.recipe.iterations))(averages, parameters, count)

    def advance(self, folder: str | Path | None) -> tuple[float, float, float]:
        """One step: returns its loss, the gradient's norm before clipping, and the learning rate."""
        lr = self.recipe.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._change_teacher()
        losses, levels = self._losses()
        loss = losses.mean()
        bad = ~torch.isfinite(self.accelerator.gather(losses.detach()))
        if bad.any():
            self._stop("loss", f", sigma {self.accelerator.gather(levels[0])[bad].tolist()[:3]}", folder)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.recipe.clip)
        if not math.isfinite(norm):
            self._stop("gradient", "", folder)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.accelerator.unwrap_model(self.student))
        if self.target is not None:
            self.target.update_parameters(self.accelerator.unwrap_model(self.student))  # with this step's mu(k)
        self.step += 1
        return float(self.accelerator.reduce(loss.detach(), "mean")), float(norm), lr

    def _losses(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        images, labels, noise, levels = self._draw()
        target = None if self.target is None else self.target.module
        if target is None and self.accelerator.num_processes > 1:
            target = self.accelerator.unwrap_model(self.student)  # no second forward through the data-parallel wrapper
        device = self.accelerator.device
        with seeded(self._number(1 + self.accelerator.process_index), device):  # dropout
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                losses = self.recipe.objective(
                    self.student, images, labels, noise, *levels, target=target, teacher=self.teacher
                )
        return losses, levels

    def _draw(self):
        """The step's global batch from (seed, step), and of it this process's part."""
        generator = torch.Generator().manual_seed(self._number(0))
        n, rank, ranks = self.recipe.batch, self.accelerator.process_index, self.accelerator.num_processes
        index = randint(0, len(self.data.images), (n,), generator)
        images, labels = self.data.batch(index, generator)
        if not self._conditional:
            labels = None  # an unconditional network on data that has labels
        noise = randn(tuple(images.shape), generator)
        levels = self.recipe.objective.levels(n, self.step, self.recipe.iterations, generator)
        mine = slice(rank * n // ranks, (rank + 1) * n // ranks)
        levels = [v.float() for v in levels]  # before they move: some devices know no float64
        move = [None if t is None else t[mine].to(self.accelerator.device) for t in (images, labels, noise, *levels)]
        return move[0], move[1], move[2], move[3:]

    def _number(self, stream: int) -> int:
        return (self.seed * 1_000_003 + self.step) * 1_009 + stream

    def _change_teacher(self) -> None:
        """Progressive distillation: when the number of steps halves, the averaged student becomes the teacher.

        The student starts the next stage as its copy, with a fresh optimizer and average.
        """
        if not isinstance(self.recipe.objective, ProgressiveDistillation) or self.step == 0:
            return
        before, now = (self.recipe.objective.scales(k, self.recipe.iterations) for k in (self.step - 1, self.step))
        if before != now:
            self._take_over(self.ema.module.state_dict())
            self.accelerator.unwrap_model(self.student).load_state_dict(self.teacher.state_dict())
            self.optimizer.state.clear()
            self.ema.n_averaged.zero_()

    def _take_over(self, weights: dict[str, Tensor]) -> None:
        self.teacher, self.teacher_is_own = copy.deepcopy(self.ema.module).eval().requires_grad_(False), True
        self.teacher.load_state_dict(weights)

    def _stop(self, what: str, where: str, folder: str | Path | None) -> None:
        """Raises TrainingDiverged: the weights are still those before this step."""
        state = None if folder is None else Path(folder) / "state.pt"
        last = (
            f"the last good checkpoint is {state}" if state and state.exists() else "no checkpoint was kept (no folder)"
        )
        raise TrainingDiverged(f"{what} is not finite at step {self.step + 1}{where}; {last}")

    def save(self, folder: str | Path) -> None:
        """Writes <folder>/state.pt: all that the next step depends on. Atomic: a cut leaves the previous state."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(
            recipe=self.recipe.describe(), seed=self.seed, step=self.step,
            student=self.accelerator.unwrap_model(self.student).state_dict(), ema=self.ema.state_dict(),
            target=None if self.target is None else self.target.state_dict(),
            teacher=self.teacher.state_dict() if self.teacher_is_own else None,
            optimizer=self.optimizer.state_dict(),
        )  # fmt: skip
        partial = folder / "state.pt.partial"
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the previous one's place
        os.replace(partial, folder / "state.pt")

    def restore(self, folder: str | Path | None) -> None:
        """Reads <folder>/state.pt back, after checking that it belongs to this recipe and seed."""
        path = Path(folder or "") / "state.pt"
        if folder is None or not path.exists():
            raise FileNotFoundError(f"nothing to resume: {path} does not exist; start without resume")
        try:
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read as a training state ({type(error).__name__}); is it cut off?"
            ) from error
        mine = json.loads(json.dumps(self.recipe.describe()))
        told = ("cost", "expected")  # prose
        differs = [k for k, v in state["recipe"].items() if k not in told and mine.get(k) != json.loads(json.dumps(v))]
        if differs or state["seed"] != self.seed:
            raise ValueError(f"{path} belongs to another run: {', '.join(differs) or 'seed'} differ")
        self.step = state["step"]
        self.accelerator.unwrap_model(self.student).load_state_dict(state["student"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        if state["teacher"] is not None:
            self._take_over(state["teacher"])

    def finish(self, folder: str | Path | None, seconds: float) -> Denoiser:
        """The EMA model, ready to use; saved as <folder>/model where there is a folder."""
        model = copy.deepcopy(self.ema.module).eval().requires_grad_(False)
        if folder is not None and self.accelerator.is_main_process:
            facts = dict(recipe=self.recipe.name, seed=self.seed, seconds=round(seconds, 1))
            checkpoints.save(model, Path(folder) / "model", data=self.data.name, **facts)
        return model


def accelerator_on(device: str | None) -> Accelerator:
    """accelerate's side of a run. The first one in a process decides on the device: raises ValueError for another."""
    try:
        accelerator = Accelerator(cpu=device == "cpu")
        own, asked = accelerator.device, torch.device(device or accelerator.device)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"device {device!r} cannot be had: {error}") from error
    if asked.type != own.type or asked.index not in (None, own.index):
        raise ValueError(f"device {device!r} was asked for, this process runs on {own}")
    return accelerator


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products.

    A CPU without them (most laptops) emulates bfloat16 tens of times slower than it computes in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 and newer
        has = torch.cpu.get_capabilities()
        return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return False
