"""The training loop: a generator of typed records around one Run (which see), the same on a CPU, one GPU or many."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cmlab.checks import untaken, whole
from cmlab.data import Data, Prepared, load_data
from cmlab.recipes import Recipe, get_recipe
from cmlab.run import Run
from cmlab.scaling import Denoiser


@dataclass(frozen=True)
class Record:
    """One training step: its number (from 1), the batch's mean loss, and how the run stands."""

    step: int
    total: int
    loss: float
    lr: float
    grad_norm: float
    scales: int | None  # N(k), None for continuous levels
    mu: float  # decay of the target network
    seconds: float  # since the run (or its resumption) began
    overflows: int = 0  # steps left out so far because their float16 gradients overflowed
    model: Denoiser | None = None  # the averaged model, on the last record and at every look


def train(
    recipe: Recipe | str,
    data: Data | Prepared | None = None,
    teacher: Callable | str | Path | None = None,
    device: str | None = None,
    folder: str | Path | None = None,
    resume: bool | str = False,
    save_every: int = 500,
    seed: int | None = None,
    look_every: int | None = None,
    parallel: str = "ddp",
    stop: Callable[[], bool] | None = None,
) -> Iterator[Record]:
    """Trains a recipe; yields a Record a step. `*_, last = train("digits-cd")` gives the model as last.model.

    The call itself checks, loads and saves the first state; the iterator that it returns trains.
    data and teacher default to the recipe's own (the teacher: an embedded model or "exact", the data's own denoiser); any
    denoiser serves as teacher, or the name or path of one.
    With a folder the state is saved every save_every steps and at the end (state.pt, atomically), and the final model as
    <folder>/model; resume=True goes on from the state found there, resume="auto" does if there is one and else begins. Every
    look_every steps the record carries the averaged model so far. stop() is asked after every step: the one after which it says True
    is the last, and ends the run as the recipe's last step does; its state is one to go on from. device is that of the whole process:
    the first run's stays.
    parallel is what several processes do with the models: "ddp", a whole copy on each, or "fsdp", a share of every weight, average
    and optimizer state on each. One process has nothing to share out and trains the same under either, and a state that was saved
    under one goes on under the other, on any number of processes.
    Raises FileNotFoundError if there is nothing to resume, ValueError for an unknown parallel, for resume without folder, if the state
    belongs to another recipe, if a folder to start in holds a run or if a teacher is missing, TrainingDiverged when the loss or its
    gradient is not finite.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    whole("save_every", save_every)
    if look_every is not None:
        whole("look_every", look_every)
    if folder is not None and resume is False:
        untaken(Path(folder), "state.pt")
    seed = recipe.seed if seed is None else seed
    run = Run(recipe, data or load_data(recipe.data), teacher, device, seed, parallel)
    if resume == "auto":
        resume = run.agreed(folder is not None and (Path(folder) / "state.pt").exists())
    if resume:
        run.restore(folder)
        if run.step >= recipe.iterations:
            raise ValueError(f"{folder} holds a finished run; its model is {Path(folder) / 'model'}")
    elif folder is not None:
        run.save(folder)  # an unwritable folder is found out now, not after an hour
    return _steps(run, folder, save_every, look_every, stop)


def _steps(
    run: Run, folder: str | Path | None, save_every: int, look_every: int | None, stop: Callable[[], bool] | None
) -> Iterator[Record]:  # fmt: skip
    recipe, begun, done = run.recipe, time.perf_counter(), False
    while not done:
        loss, grad_norm, lr = run.advance(folder)
        done = run.step == recipe.iterations or (stop is not None and run.agreed(stop()))
        seconds = time.perf_counter() - begun
        look = done or (look_every is not None and run.step % look_every == 0)
        # the model before the state: a cut between the two repeats a step
        model = run.finish(folder if done else None, seconds) if look else None
        if folder is not None and (done or run.step % save_every == 0):
            run.save(folder)
        scales, mu = (f(run.step - 1, recipe.iterations) for f in (recipe.objective.scales, recipe.objective.mu))
        yield Record(run.step, recipe.iterations, loss, lr, grad_norm, scales, mu, seconds, run.overflows, model)


@contextmanager
def on_interrupt(call: Callable[[], object]):
    """Inside, the first Ctrl-C does call() and no more: for train's stop. A second one does what it did before.

    Where SIGINT is ignored, and outside the main thread, which gets no signals, it changes nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    if before in (None, signal.SIG_IGN):
        yield
        return

    def first(number, frame) -> None:
        signal.signal(signal.SIGINT, before)
        call()

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
