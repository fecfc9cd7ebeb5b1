"""Pictures into files and out of them: what `cmlab sample`, `edit` and `evaluate` do with the rooms."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from cmlab import checkpoints, editing, plots, sampling
from cmlab.batch import usable_folder
from cmlab.checks import known, whole
from cmlab.data import load_data
from cmlab.noise import karras_sigmas
from cmlab.released import RELEASED
from cmlab.scaling import ConsistencyModel, Denoiser
from cmlab.streams import Streams

BATCH, PIXELS = 250, 200_000  # pictures a network call; fewer where they have more numbers than this together
STRIDE = 1 << 32  # between the seeds of two --seed: no two pictures of any two share their noise
DIFFUSION = {
    "heun": sampling.sample_heun,
    "euler": sampling.sample_euler,
    "dpm": sampling.sample_dpm,
    "ancestral": sampling.sample_ancestral,
}
CONSISTENCY = ["onestep", "multistep"]
REGIONS = ["lower", "upper", "left", "right", "center"]
TASKS = ["inpaint", "colorize", "super-resolve", "denoise", "stroke", "interpolate"]


def load_model(name: str, device: str | None = None) -> Denoiser | ConsistencyModel:
    """A saved model of pictures. Raises ValueError for one of points, and as checkpoints.load does."""
    model = checkpoints.load(name, device)
    if len(model.info["shape"]) != 3:
        raise ValueError(f"{name} draws points of shape {tuple(model.info['shape'])}, not pictures")
    return model


def levels_for(model, steps: int, start: float) -> Tensor:
    """Noise levels for `steps` calls of a consistency model: start, then geometrically down, stopping short of sigma_min."""
    return start * (model.sigma_min / start) ** (torch.arange(steps, dtype=torch.float64) / steps)


# --- drawing --------------------------------------------------------------------------------------------------------


def draw(
    model, num: int, steps: int | None = None, sampler: str | None = None, seed: int = 0, labels: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor | None]:
    """num pictures (num, C, H, W) and their labels (num,) or None. A picture depends on seed and number only."""
    classes = _classes(model, whole("num", num), labels)
    sampled = _sampler(model, steps, sampler)
    stream, device = Streams(num, seed, stride=STRIDE), next(model.parameters()).device
    images, batch = [], max(1, min(BATCH, PIXELS // math.prod(model.info["shape"])))
    for start in tqdm(range(0, num, batch), unit="batch", disable=None if num > batch else True):
        stream.set_done_samples(start)
        some = slice(start, min(start + batch, num))
        noise = stream.randn(some.stop - start, *model.info["shape"]).to(device)
        chosen = None if classes is None else classes[some].to(device)
        images.append(sampled(noise, chosen, stream).cpu())
    return torch.cat(images), classes


def _classes(model, num: int, labels: tuple[int, ...]) -> Tensor | None:
    """The classes to draw, in turn: those asked for, or all that the model knows."""
    count = model.info.get("num_classes")
    if count is None:
        if labels:
            raise ValueError("labels were given to a model without classes; leave --labels out")
        return None
    chosen = torch.tensor(labels or tuple(range(count)))
    if not ((chosen >= 0) & (chosen < count)).all():
        raise ValueError(f"labels must lie in 0 … {count - 1}, got {' '.join(map(str, labels))}")
    return chosen.repeat(num // len(chosen) + 1)[:num]


def _sampler(model, steps: int | None, name: str | None) -> Callable:
    """(noise, labels, stream) -> images, for what the model is."""
    consistency = isinstance(model, ConsistencyModel)
    steps = whole("steps", steps if steps is not None else 1 if consistency else 18)
    name = name or ("heun" if not consistency else "onestep" if steps == 1 else "multistep")
    known(f"sampler for a {model.kind} model:", name, CONSISTENCY if consistency else DIFFUSION)
    if consistency:
        if name == "onestep" and steps != 1:
            raise ValueError(f"the onestep sampler makes one step, got steps {steps}; use multistep")
        sigmas = _published_levels(model, steps) or levels_for(model, steps, model.sigma_max)
        return lambda noise, labels, stream: sampling.sample_multistep(
            model, noise, sigmas, labels, generator=stream, clip_denoised=True
        )
    sigmas = karras_sigmas(steps, model.sigma_min, model.sigma_max)
    random = {"ancestral": lambda stream: {"generator": stream}}.get(name, lambda stream: {})
    return lambda noise, labels, stream: DIFFUSION[name](
        model, noise, sigmas, labels, clip_denoised=True, **random(stream)
    )


def _published_levels(model, steps: int) -> list[float] | None:
    """The two levels that were published with a released model, which were searched for; None for anything else."""
    one = RELEASED.get(model.info["facts"].get("released"))
    if one is None or one.ts is None or steps != len(one.ts) - 1:
        return None
    return karras_sigmas(one.steps, model.sigma_min, model.sigma_max)[list(one.ts[:-1])].tolist()


# --- editing --------------------------------------------------------------------------------------------------------


def edit_picture(
    model, task: str, images: tuple[str, ...], mask: str = "lower", factor: int = 4, sigma: float = 1.0,
    label: int | None = None, steps: int = 10, num: int = 8, seed: int = 0, denoiser: str | None = None,
) -> Tensor:  # fmt: skip
    """The picture, what the task knows of it, and num results in a row: (num + 2, C, H, W).

    interpolate: the two pictures with num between them. Raises ValueError for what does not fit.
    """
    known("task", task, TASKS)
    if not isinstance(model, ConsistencyModel):
        raise ValueError(f"editing needs a consistency model, got a {model.kind}")
    wanted = 2 if task == "interpolate" else 1
    if len(images) != wanted:
        raise ValueError(f"{task} takes {wanted} picture{'s' * (wanted > 1)}, got {len(images)}")
    read = [read_picture(model, image) for image in images]
    pictures = torch.stack([picture for picture, _ in read])
    classes = _edit_labels(model, [label if label is not None else own for _, own in read])
    if task == "interpolate":
        return _between(model, pictures, classes, denoiser, whole("num", num), whole("steps", steps))
    if task in ("denoise", "stroke") and not model.sigma_min < sigma <= model.sigma_max:
        raise ValueError(
            f"sigma must lie above {model.sigma_min:g}, up to the model's {model.sigma_max:g}, got {sigma:g}"
        )
    operator = _operator(task, pictures, mask, factor, sigma)
    stream = Streams(whole("num", num), seed, stride=STRIDE)
    measured = operator.measure(pictures, torch.Generator().manual_seed(seed))
    start = sigma if task in ("denoise", "stroke") else model.sigma_max
    results = editing.edit(
        model, operator, measured.repeat(num, 1, 1, 1), levels_for(model, whole("steps", steps), start),
        labels=None if classes is None else classes.repeat(num), generator=stream,
    )  # fmt: skip
    return torch.cat([pictures, measured, results])


def read_picture(model, name: str) -> tuple[Tensor, int | None]:
    """A picture (C, H, W) in [-1, 1] of the model's size, and its label if it has one.

    name: held-out:N, a picture that the model has not seen, or a file, whose middle square is scaled to the model's
    size.
    """
    channels, height, width = model.info["shape"]
    if name.startswith("held-out:"):
        data, number = load_data(model.info["data"]), name.removeprefix("held-out:")
        if not number.isdigit() or int(number) >= len(data.held_out):
            raise ValueError(f"held-out:N takes a number 0 … {len(data.held_out) - 1}, got {name!r}")
        return data.held_out[int(number)], int(data.held_out_labels[int(number)])
    picture = open_picture(name).convert("L" if channels == 1 else "RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.resize((width, height), Image.Resampling.BOX, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(picture)).reshape(height, width, channels)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1, None


def open_picture(path: str) -> Image.Image:
    """A picture file, read whole. Raises FileNotFoundError, or ValueError for no picture or half of one."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no such picture: {path} (held-out:N takes one of the model's data set)")
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return picture


def _edit_labels(model, labels: list[int | None]) -> Tensor | None:
    count = model.info.get("num_classes")
    if count is None:
        return None
    if None in labels:
        raise ValueError(f"this model is class-conditional: say what the picture shows with --label 0 … {count - 1}")
    return torch.tensor(labels)


def _operator(task: str, pictures: Tensor, mask: str, factor: int, sigma: float) -> editing.Task:
    if task == "inpaint":
        return editing.Inpaint(read_mask(mask, *pictures.shape[2:]))
    if task == "super-resolve":
        return editing.SuperResolve(factor)
    if task == "colorize":
        return editing.Colorize()
    return {"denoise": editing.Denoise, "stroke": editing.Stroke}[task](sigma)


def read_mask(name: str, height: int, width: int) -> Tensor:
    """A mask (H, W) for Inpaint, 0 where to fill in: a region by name, or a picture file of that size, black there."""
    if name in REGIONS:
        mask = torch.ones(height, width)
        rows = {
            "lower": slice(height // 2, None),
            "upper": slice(height // 2),
            "center": slice(height // 4, -(height // 4)),
        }
        columns = {
            "left": slice(width // 2),
            "right": slice(width // 2, None),
            "center": slice(width // 4, -(width // 4)),
        }
        mask[rows.get(name, slice(None)), columns.get(name, slice(None))] = 0
        return mask
    if not Path(name).exists():
        known("mask", name, [*REGIONS, "a picture file"])
    picture = open_picture(name).convert("L")
    if picture.size != (width, height):
        raise ValueError(f"mask {name} must be {width} x {height} pixels, got {picture.width} x {picture.height}")
    return (torch.from_numpy(np.array(picture)) >= 128).float()


def _between(model, pictures: Tensor, labels: Tensor | None, denoiser: str | None, num: int, steps: int) -> Tensor:
    """The two pictures, and num on the way between them through the noises that a diffusion model finds."""
    if denoiser is None:
        raise ValueError(
            "interpolate needs --denoiser: a diffusion model of the same data (digits-edm) to find the noises"
        )
    teacher = load_model(denoiser)
    if isinstance(teacher, ConsistencyModel):
        raise ValueError(f"--denoiser must be a diffusion model, got the consistency model {denoiser}")
    sigmas = karras_sigmas(max(steps, 2), model.sigma_min, model.sigma_max)
    if labels is not None and labels[0] != labels[1]:
        raise ValueError(f"interpolate needs two pictures of one class, got {labels[0]} and {labels[1]}")
    noises = editing.noise_of(teacher, pictures, sigmas, labels)
    way = editing.interpolate(
        model, noises[:1], noises[1:], torch.linspace(0, 1, num), None if labels is None else labels[:1]
    )
    return torch.cat([pictures[:1], way[:, 0], pictures[1:]])


# --- files ----------------------------------------------------------------------------------------------------------


def target(path: Path, suffix: str) -> Path:
    """path, if a file can be written there. Raises ValueError for another suffix, OSError for an unusable folder: before the work."""
    if path.suffix != suffix:
        raise ValueError(f"the output is a {suffix} file, got {path}")
    usable_folder(path.absolute().parent)
    return path


def save_samples(path: Path, images: Tensor, labels: Tensor | None) -> Path:
    """Writes images as .npz (arr_0 uint8 (N, H, W, C), arr_1 labels) and a sheet of the first 100; returns its path."""
    pixels = plots.to_pixels(images)
    arrays = [pixels] if labels is None else [pixels, labels.numpy()]
    _write(path, lambda file: np.savez_compressed(file, *arrays))
    sheet = path.with_suffix(".png")
    save_sheet(sheet, images[:100])
    return sheet


def save_sheet(path: Path, images: Tensor, columns: int = 10) -> None:
    """Writes images (N, C, H, W) in [-1, 1] as one .png, enlarged so that a picture is 64 pixels or more a side."""
    sheet = Image.fromarray(plots.tile(images, columns).squeeze())
    scale = max(1, 64 // images.shape[-1])
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    _write(path, lambda file: sheet.save(file, "PNG"))


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file so that a cut leaves the old one. Raises OSError that names the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def read_samples(path: Path) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) in [-1, 1] and labels (N,) or None, from an .npz with arr_0 uint8 (N, H, W, C) and arr_1."""
    if not path.exists():
        raise FileNotFoundError(f"no such samples: {path}")
    try:
        with np.load(path) as file:
            pixels, labels = file["arr_0"], file["arr_1"] if "arr_1" in file else None
    except (ValueError, OSError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz of samples with an array arr_0: {error}") from error
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[3] not in (1, 3):
        raise ValueError(f"{path}: arr_0 must be uint8 (N, H, W, 1 or 3), got {pixels.dtype} {pixels.shape}")
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, None if labels is None else torch.from_numpy(labels).long()


def read_reference(name: str) -> Tensor:
    """Real images (N, C, H, W): of an .npz, or of a data set (its training part, or name:held-out)."""
    if name.endswith(".npz"):
        return read_samples(Path(name))[0]
    data, _, part = name.partition(":")
    known("part of a data set", part, ["", "held-out"])
    loaded = load_data(data)
    return loaded.held_out if part else loaded.images
