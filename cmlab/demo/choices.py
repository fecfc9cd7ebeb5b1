"""The models that the demo offers: the embedded ones, the released ones that have been fetched, and the user's own runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cmlab import checkpoints
from cmlab.checks import known
from cmlab.released import RELEASED, SCALINGS
from cmlab.scaling import ONE_CALL, Denoiser
from cmlab.weights import read_json

RUNS = Path("runs")
KEPT_BYTES = 5 << 30  # of models in memory, if more than one: the largest take 2.2 GB


@dataclass(frozen=True)
class Choice:
    """A model that can be chosen: its name, where it is, and what is known of it without its weights; enough for drawing.plan."""

    name: str
    path: Path
    kind: str
    shape: tuple[int, ...]
    num_classes: int | None
    data: str | None
    sigma_min: float
    sigma_max: float

    @property
    def info(self) -> dict:
        """What a model's info says, as far as it is known here."""
        facts = {"released": self.name}
        return {"data": self.data, "shape": self.shape, "num_classes": self.num_classes, "facts": facts}

    @property
    def consistency(self) -> bool:
        """Whether one call makes a picture."""
        return self.kind in ONE_CALL

    def load(self) -> Denoiser:
        """The model, on the GPU if there is one; the ones that were used last are kept."""
        key = (self.path, max(file.stat().st_mtime for file in [self.path, *self.path.glob("*")]))
        if key not in _kept:
            _kept[key] = checkpoints.load(self.path, "cuda" if torch.cuda.is_available() else None)
        _kept.move_to_end(key)
        while len(_kept) > 1 and sum(map(_size, _kept.values())) > KEPT_BYTES:
            _kept.popitem(last=False)
        return _kept[key]


_kept: OrderedDict[tuple, Denoiser] = OrderedDict()


def _size(model: Denoiser) -> int:
    return sum(weight.nbytes for weight in model.parameters())


def choices() -> dict[str, Choice]:
    """Every model of pictures that is here, by name: embedded, released and fetched, saved in runs/."""
    embedded = [_of_folder(name, checkpoints.EMBEDDED_FOLDER / name) for name in checkpoints.EMBEDDED]
    released = [_of_released(one) for one in RELEASED.values() if one.path.is_file()]
    own = [_of_folder(folder.as_posix(), folder) for folder in _own_folders()]
    return {choice.name: choice for choice in (*embedded, *released, *own) if choice is not None}


def choose(name: str) -> Choice:
    """The choice of that name. Raises ValueError for any other name, so that no path leads out of the list."""
    here = choices()
    if name in RELEASED and name not in here:
        raise ValueError(f"{name} is not on this disk yet: cmlab fetch {name}")
    return here[known("model", name, here)]


def missing() -> list[tuple[str, str]]:
    """(name, command that fetches it) of every released model that is not here."""
    return [(one.name, f"cmlab fetch {one.name}") for one in RELEASED.values() if not one.path.is_file()]


def teacher_of(choice: Choice) -> Choice | None:
    """A diffusion model that is here and takes the same pictures and classes: the namesake, or the first of the list; None without one."""
    fitting = [
        other
        for other in choices().values()
        if not other.consistency and choice.data is not None and _interface(other) == _interface(choice)
    ]
    namesake = choice.name.replace("-cd", "-edm").replace("-ct", "-edm")
    return next((other for other in fitting if other.name == namesake), next(iter(fitting), None))


def _interface(choice: Choice) -> tuple:
    return choice.data, choice.shape, choice.num_classes


def _own_folders() -> Iterator[Path]:
    """Saved models in runs/, whose files truly lie there: a link may not lead out."""
    for config in sorted(RUNS.glob(f"*/model/{checkpoints.CONFIG}")):
        files = config, config.with_name(checkpoints.WEIGHTS)
        if all(file.resolve().is_relative_to(RUNS.resolve()) for file in files):
            yield config.parent


def _of_folder(name: str, folder: Path) -> Choice | None:
    """None for what is no model of pictures, or is damaged: the list leaves it out."""
    try:
        config = read_json(folder / checkpoints.CONFIG)
        kind, shape, classes = config["kind"], tuple(config["shape"]), config["num_classes"]
        levels = float(config["sigma_min"]), float(config["sigma_max"])
    except (ValueError, KeyError, TypeError, OSError):
        return None
    if kind not in (Denoiser.kind, *ONE_CALL) or len(shape) != 3 or not isinstance(classes, int | None):
        return None
    return Choice(name, folder, kind, shape, classes, config.get("data"), *levels)


def _of_released(one) -> Choice:
    net = one.architecture
    shape = (net["in_channels"], net["image_size"], net["image_size"])
    levels = SCALINGS["sigma_min"], SCALINGS["sigma_max"]
    return Choice(one.name, one.path, one.kind, shape, net.get("num_classes"), one.data, *levels)
