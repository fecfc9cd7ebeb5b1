"""What `cmlab train` does around the loop: where it writes, what it logs and looks at, and how it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tqdm.auto import tqdm

from cmlab import drawing, metrics, pictures, training
from cmlab.batch import Interrupted, free_name, usable_folder
from cmlab.checks import alone, known
from cmlab.data import load_data
from cmlab.recipes import Recipe
from cmlab.training import Record, on_interrupt

TRACKERS = ["tensorboard", "wandb", "none"]
EXTRACTORS = {"digits": "digits-classifier", "tinted-digits": "tinted-digits-classifier"}
LOG_EVERY = 10  # steps


def ranks() -> int:
    """How many processes torchrun or accelerate launch has started for this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def folder_of(recipe: str, output: Path | None, resume: str | None) -> Path:
    """The folder of a training. Raises ValueError where the options do not say which."""
    if resume not in (None, "auto"):
        alone("--resume", output=output)
        return Path(resume)
    if output is None and (resume == "auto" or ranks() > 1):
        raise ValueError("give --output: with --resume auto, or in several processes, the folder must have a name")
    folder = usable_folder(output or free_name(Path("runs"), f"train-{recipe}"))
    if output is None:
        folder.mkdir(parents=True)  # the name is taken now: another training may start in this second
    return folder


def run(
    plan: Recipe,
    folder: Path,
    resume: bool | str,
    tracker: str = "tensorboard",
    look_every: int | None = None,
    metrics_samples: int = 0,
    sheet: int = 64,
    **options,
) -> Path:
    """Trains a recipe into a folder, with a progress bar, and returns the path of its model.

    Losses go to the tracker; every look_every steps a sheet of so many samples goes to <folder>/samples and, with metrics_samples > 0, that
    many are measured against as many training images. On Ctrl-C one process saves what there is after the step at hand and raises
    Interrupted; a second Ctrl-C does not wait for that, nor do several processes, which keep the last saved state.
    Raises what training.train raises.
    """
    if known("tracker", tracker, TRACKERS) == "wandb" and find_spec("wandb") is None:
        raise ValueError("tracker wandb is not installed: pip install wandb, or leave --tracker out for tensorboard")
    watch, pressed = Watch(folder, tracker, metrics_samples, sheet), threading.Event()
    single = ranks() == 1  # torchrun ends its processes itself
    if single:
        options["stop"] = pressed.is_set
    before = signal.signal(signal.SIGTERM, told_to_stop) if ranks() > 1 else None
    try:
        records = training.train(plan, folder=folder, resume=resume, look_every=look_every, **options)
        with (
            tqdm(total=plan.iterations, unit="step", disable=not is_main()) as bar,
            on_interrupt(partial(stop_soon, pressed)) if single else nullcontext(),
        ):
            for record in records:
                bar.update(record.step - bar.n)
                bar.set_postfix_str(f"loss {record.loss:.4f}", refresh=False)
                if record.step == plan.iterations or not pressed.is_set():
                    watch.see(record)
    except KeyboardInterrupt:
        if not (folder / "state.pt").exists():
            raise  # there is nothing to go on from
        raise Interrupted(f"stopped at once: the last saved state is in {folder}") from None
    except RuntimeError as error:  # of the connection, or of told_to_stop
        if ranks() > 1 and any(word in str(error) for word in ("onnection", "Socket", "gloo", "NCCL")):
            raise RuntimeError(
                f"another process of this training has ended ({str(error).splitlines()[0]}); the last saved state is in {folder}: "
                "start all of them again with --resume auto"
            ) from error
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        watch.close()
    if record.step < plan.iterations:
        raise Interrupted(f"stopped after step {record.step} of {plan.iterations}; its state and model are in {folder}")
    return folder / "model"


class Watch:
    """Sees every record of a training, on the main process only."""

    def __init__(self, folder: Path, tracker: str, metrics_samples: int, sheet: int):
        self.folder, self.tracker, self.metrics_samples, self.sheet = folder, tracker, metrics_samples, sheet
        self.trackers: list | None = None

    def see(self, record: Record) -> None:
        """Logs the step, and looks at the model if the record brings one."""
        if not is_main():
            return
        if record.step % LOG_EVERY == 0 or record.model is not None:
            values = {"loss": record.loss, "lr": record.lr, "gradient norm": record.grad_norm, "mu": record.mu}
            values |= {"overflows": record.overflows} | ({} if record.scales is None else {"scales": record.scales})
            self._log(values, record.step)
        if record.model is not None and len(record.model.info["shape"]) == 3:
            self._look(record)

    def _look(self, record: Record) -> None:
        images, _ = drawing.draw(record.model, self.sheet)
        pictures.save_sheet(self.folder / "samples" / f"step-{record.step:08d}.png", images.clamp(-1, 1), columns=8)
        if self.metrics_samples:
            self._log(measure(record.model, self.metrics_samples), record.step)

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.trackers is None:  # not before the first record: accelerate's first state decides on the device
            self.trackers = list(_trackers(self.folder, self.tracker))
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Writes what is left."""
        for tracker in self.trackers or ():
            tracker.finish()


def stop_soon(pressed: threading.Event) -> None:
    """What the first Ctrl-C does."""
    pressed.set()
    os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print may be in the midst of printing


def told_to_stop(number, frame) -> None:
    """What torchrun's SIGTERM does, which may come before the connection to the rank that was killed breaks."""
    raise RuntimeError("Connection lost: this process was told to stop, SIGTERM")


def _trackers(folder: Path, name: str) -> Iterable:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if name == "none":
        return
    tracker = WandBTracker("cmlab") if name == "wandb" else TensorBoardTracker("tensorboard", logging_dir=folder)
    if hasattr(tracker, "start"):  # accelerate 1.7 and newer
        tracker.start()
    yield tracker


def measure(model, samples: int) -> dict[str, float]:
    """FD and the other metrics of so many samples against as many random training images of the model's data set, always the same."""
    data = load_data(model.info["data"])
    images, labels = drawing.draw(model, samples)
    extractor = EXTRACTORS.get(data.name, "inception")
    device = str(next(model.parameters()).device)
    return metrics.evaluate(
        images.split(500),
        pictures.some_of(data, samples),
        extractor,
        None if extractor == "inception" else labels,
        device=device,
    )
