"""Pictures into files and out of them: what `cmlab edit` and `evaluate` do with the rooms."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmlab import checkpoints, editing, plots
from cmlab.batch import usable_folder
from cmlab.checks import known, whole
from cmlab.data import Data, load_data
from cmlab.drawing import STRIDE, levels_for, shares
from cmlab.files import write_file
from cmlab.noise import karras_sigmas
from cmlab.prepared import Prepared
from cmlab.sampling import end_of
from cmlab.scaling import ONE_CALL, ConsistencyModel, Denoiser
from cmlab.sources import picture
from cmlab.streams import Streams

REGIONS = ["lower", "upper", "left", "right", "center"]
TASKS = ["inpaint", "colorize", "super-resolve", "denoise", "stroke", "interpolate"]


def load_model(name: str, device: str | None = None) -> Denoiser | ConsistencyModel:
    """A saved model of pictures. Raises ValueError for one of points, and as checkpoints.load does."""
    model = checkpoints.load(name, device)
    if len(model.info["shape"]) != 3:
        raise ValueError(f"{name} draws points of shape {tuple(model.info['shape'])}, not pictures")
    return model


# --- editing --------------------------------------------------------------------------------------------------------


def edit_picture(
    model, task: str, images: tuple[str, ...], mask: str = "lower", label: int | None = None, denoiser: str | None = None,
    **options,
) -> Tensor:  # fmt: skip
    """As edited, of pictures by their names (see read_picture), a mask by its (see read_mask), and a diffusion model by its."""
    check_edit(model, task, len(images))
    read = [read_picture(model, image) for image in images]
    classes = edit_labels(model, [label if label is not None else own for _, own in read])
    options["teacher"] = None if denoiser is None else load_model(denoiser)
    if task == "inpaint":
        options["mask"] = read_mask(mask, *model.info["shape"][1:])
    return end_of(edited(model, task, torch.stack([picture for picture, _ in read]), classes, **options))


def edited(
    model, task: str, pictures: Tensor, labels: Tensor | None, mask: Tensor | None = None, factor: int = 4,
    sigma: float = 1.0, steps: int = 10, num: int = 8, seed: int = 0, teacher: Denoiser | None = None,
    batch: int | None = None,
) -> Iterator[float]:  # fmt: skip
    """Edits a picture (1, C, H, W), yields the share that is done, and returns (num + 2, C, H, W): it, what is known of it, num results.

    interpolate takes two pictures and puts num between them, with teacher, a diffusion model, to find their noises. mask (H, W),
    0 where inpaint fills in; labels as many as pictures, or None; batch: results a network call.
    Raises ValueError for what does not fit.
    """
    check_edit(model, task, len(pictures))
    whole("num", num)
    whole("steps", steps)
    device = next(model.parameters()).device
    pictures, labels = pictures.to(device), None if labels is None else labels.to(device)
    if task == "interpolate":
        return (yield from _between(model, pictures, labels, teacher, num, steps))
    if task in ("denoise", "stroke") and not model.sigma_min < sigma <= model.sigma_max:
        raise ValueError(
            f"sigma must lie above {model.sigma_min:g}, up to the model's {model.sigma_max:g}, got {sigma:g}"
        )
    operator = _operator(task, None if mask is None else mask.to(device), factor, sigma)
    measured = operator.measure(pictures, torch.Generator().manual_seed(seed))
    levels = levels_for(model, steps, sigma if task in ("denoise", "stroke") else model.sigma_max)
    # what is hidden in grey: black may be a picture's own
    shown = operator.project(pictures) if task == "inpaint" else measured
    stream, row = Streams(num, seed, stride=STRIDE), [pictures, shown]
    for first in range(0, num, batch or num):
        stream.set_done_samples(first)
        count = min(batch or num, num - first)
        given = measured.repeat(count, 1, 1, 1), levels, None if labels is None else labels.repeat(count)
        states = editing.edit_states(model, operator, *given, generator=stream)
        row.append((yield from shares(states, steps, first, count, num)))
    return torch.cat(row).cpu()


def check_edit(model, task: str, pictures: int) -> None:
    """Raises ValueError for a task that is none, a model that cannot edit, and for too many pictures or too few."""
    known("task", task, TASKS)
    if model.kind not in ONE_CALL:
        raise ValueError(f"editing needs a consistency model, got a {model.kind}")
    wanted = 2 if task == "interpolate" else 1
    if pictures != wanted:
        raise ValueError(f"{task} takes {wanted} picture{'s' * (wanted > 1)}, got {pictures}")


def read_picture(model, name: str) -> tuple[Tensor, int | None]:
    """A picture (C, H, W) in [-1, 1] of the model's size, and its label if it has one.

    name: held-out:N, a picture that the model has not seen, or a file, whose middle square is scaled to the model's
    size.
    """
    if name.startswith("held-out:"):
        data, number = load_data(model.info["data"]), name.removeprefix("held-out:")
        if not isinstance(data, Data):
            raise ValueError(f"{name} is not there: of {data.name} nothing was held back; name a picture file")
        if not number.isdigit() or int(number) >= len(data.held_out):
            raise ValueError(f"held-out:N takes a number 0 … {len(data.held_out) - 1}, got {name!r}")
        return data.held_out[int(number)], int(data.held_out_labels[int(number)])
    return fitted(open_picture(name), model.info["shape"]) / 127.5 - 1, None


def fitted(image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """The middle square of an image, scaled to shape (C, H, W), C being 1 (grey) or 3: pixels in [0, 255]."""
    channels, height, width = shape
    image, side = image.convert("L" if channels == 1 else "RGB"), min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((width, height), Image.Resampling.BOX, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1).float()


def open_picture(path: str) -> Image.Image:
    """A picture file, as sources.picture sees it. Raises FileNotFoundError, or ValueError for no picture or half of one."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no such picture: {path} (held-out:N takes one of the model's data set)")
    try:
        return picture(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {str(error).removeprefix('no picture: ')}") from error


def edit_labels(model, labels: list[int | None]) -> Tensor | None:
    """The classes of the pictures to edit, (N,); None for a model without classes. Raises ValueError where one is missing."""
    count = model.info.get("num_classes")
    if count is None:
        return None
    if None in labels:
        raise ValueError(f"this model is class-conditional: say what the picture shows, label 0 … {count - 1}")
    if not all(0 <= label < count for label in labels):
        raise ValueError(f"labels must lie in 0 … {count - 1}, got {' '.join(map(str, labels))}")
    return torch.tensor(labels)


def _operator(task: str, mask: Tensor | None, factor: int, sigma: float) -> editing.Task:
    if task == "inpaint":
        return editing.Inpaint(mask)
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
    image = open_picture(name).convert("L")
    if image.size != (width, height):
        raise ValueError(f"mask {name} must be {width} x {height} pixels, got {image.width} x {image.height}")
    return (torch.from_numpy(np.array(image)) >= 128).float()


def _between(
    model, pictures: Tensor, labels: Tensor | None, teacher: Denoiser | None, num: int, steps: int
) -> Iterator[float]:
    """The two pictures, and num on the way between them through the noises that a diffusion model finds."""
    if teacher is None:
        raise ValueError(
            "interpolate needs a denoiser: a diffusion model of the same data (digits-edm) to find the noises"
        )
    if teacher.kind in ONE_CALL:
        raise ValueError("denoiser must be a diffusion model, got a consistency model")
    sigmas = karras_sigmas(max(steps, 2), model.sigma_min, model.sigma_max)
    if labels is not None and labels[0] != labels[1]:
        raise ValueError(f"interpolate needs two pictures of one class, got {labels[0]} and {labels[1]}")
    noises, way = (yield from editing.noise_states(teacher, pictures, sigmas, labels)), []
    for weight in torch.linspace(0, 1, num):
        way.append(
            editing.interpolate(model, noises[:1], noises[1:], weight, None if labels is None else labels[:1])[0]
        )
        yield 1.0
    return torch.cat([pictures[:1], *way, pictures[1:]]).cpu()


# --- files ----------------------------------------------------------------------------------------------------------


def target(path: Path, suffix: str) -> Path:
    """path, if a file can be written there. Raises ValueError for another suffix, OSError for an unusable folder: before the work."""
    if path.suffix != suffix:
        raise ValueError(f"the output is a {suffix} file, got {path}")
    usable_folder(path.absolute().parent)
    return path


def free_file(stem: str, suffix: str) -> Path:
    """A file name in runs/ that is not taken: what was made before with other settings is kept."""
    names = (Path("runs") / f"{stem}{'' if k == 1 else f'-{k}'}{suffix}" for k in itertools.count(1))
    return next(name for name in names if not name.exists())


def save_sheet(path: Path, images: Tensor, columns: int = 10) -> None:
    """Writes images (N, C, H, W) in [-1, 1] as one .png, enlarged by a whole number, so that a picture is 64 pixels or more a side."""
    sheet = Image.fromarray(plots.tile(images, columns).squeeze())
    scale = -(-64 // images.shape[-1])
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    write_file(path, lambda file: sheet.save(file, "PNG"))


def read_samples(path: Path) -> tuple[Tensor, Tensor | None]:
    """Pixels (N, C, H, W) uint8 and labels (N,) or None, from an .npz with arr_0 uint8 (N, H, W, C) and arr_1."""
    if not path.exists():
        raise FileNotFoundError(f"no such samples: {path}")
    try:
        with np.load(path) as file:
            pixels, labels = file["arr_0"], file["arr_1"] if "arr_1" in file else None
    except (ValueError, OSError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz of samples with an array arr_0, or it is damaged") from error
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[3] not in (1, 3):
        raise ValueError(f"{path}: arr_0 must be uint8 (N, H, W, 1 or 3), got {pixels.dtype} {pixels.shape}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), None if labels is None else torch.from_numpy(labels).long()


def batches(pixels: Tensor, size: int = 1000) -> Iterator[Tensor]:
    """Pixels (N, C, H, W) uint8 as images in [-1, 1], a batch after the other: as floats all of them take four times the memory."""
    for part in pixels.split(size):
        yield part.float() / 127.5 - 1


def read_reference(name: str) -> tuple[Iterable[Tensor], tuple[Tensor, Tensor] | None]:
    """Real images in batches (B, C, H, W): of an .npz, or of a data set (its training part, or name:held-out); and moments or None.

    ADM's reference batches hold 10,000 images for precision and recall and, as mu (D,) and sigma (D, D), the moments of the
    Inception features of their whole data set for the FID (guided-diffusion, evaluations/).
    """
    if name.endswith(".npz"):
        pixels, _ = read_samples(Path(name))
        with np.load(name) as file:
            found = "mu" in file and "sigma" in file
            moments = tuple(torch.from_numpy(file[key]).double() for key in ("mu", "sigma")) if found else None
        return batches(pixels), moments
    data, _, part = name.partition(":")
    known("part of a data set", part, ["", "held-out"])
    loaded = load_data(data)
    if not part:
        return some_of(loaded, loaded.count), None
    if not isinstance(loaded, Data):
        raise ValueError(
            f"{name} is not there: of {data} nothing was held back; name it without :held-out, or another data set"
        )
    return loaded.held_out.split(1000), None


def some_of(data: Data | Prepared, count: int) -> Iterator[Tensor]:
    """count random training images of a data set (all, if it has fewer), in batches (B, C, H, W); always the same ones."""
    order = torch.randperm(data.count, generator=torch.Generator().manual_seed(0))[:count]
    for index in order.split(1000):
        yield data.images[index] if isinstance(data, Data) else data.batch(index, torch.Generator().manual_seed(0))[0]
