"""Pictures drawn from a model, with noise that belongs to each picture: at once, or in shards that survive a stop and share ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from cmlab import plots, sampling
from cmlab.checks import known, whole
from cmlab.files import write_file, write_text
from cmlab.noise import karras_sigmas
from cmlab.released import RELEASED
from cmlab.scaling import ConsistencyModel
from cmlab.streams import Streams

BATCH, PIXELS = 250, 200_000  # pictures a network call; fewer where they have more numbers than this together
SHARD, SHARD_PIXELS = 500, 4_000_000  # pictures a file, in the same way
STRIDE = 1 << 32  # between the seeds of two --seed: no two pictures of any two share their noise
DIFFUSION = {
    "heun": sampling.sample_heun,
    "euler": sampling.sample_euler,
    "dpm": sampling.sample_dpm,
    "ancestral": sampling.sample_ancestral,
}
CONSISTENCY = ["onestep", "multistep"]


@dataclass(frozen=True)
class Drawing:
    """num pictures of a model, and how to draw them: a picture depends on seed and number only, whatever is drawn beside it.

    steps: network calls of a consistency model (1 without it), steps of a diffusion sampler (18). labels are drawn in turn; all
    classes without them. batch is how many a network call draws. Raises ValueError for what does not fit the model.
    """

    model: torch.nn.Module
    num: int
    steps: int | None = None
    sampler: str | None = None
    seed: int = 0
    labels: tuple[int, ...] = ()
    batch: int | None = None

    def __post_init__(self):
        whole("num", self.num)
        whole("seed", self.seed, 0)
        _classes(self.model, 1, self.labels)
        _sampler(self.model, self.steps, self.sampler)
        if self.batch is not None:
            whole("batch", self.batch)

    def part(self, start: int = 0, stop: int | None = None, progress: bool = False) -> tuple[Tensor, Tensor | None]:
        """Pictures start … stop - 1 (N, C, H, W) and their labels (N,), or None: on the CPU."""
        stop = self.num if stop is None else stop
        classes = _classes(self.model, self.num, self.labels)
        sampled, device = _sampler(self.model, self.steps, self.sampler), next(self.model.parameters()).device
        stream, images = Streams(self.num, self.seed, stride=STRIDE), []
        batch = self.batch or _fitting(self.model, BATCH, PIXELS)
        for first in tqdm(range(start, stop, batch), unit="batch", disable=not progress):
            stream.set_done_samples(first)
            some = slice(first, min(first + batch, stop))
            noise = stream.randn(some.stop - first, *self.model.info["shape"]).to(device)
            chosen = None if classes is None else classes[some].to(device)
            images.append(sampled(noise, chosen, stream).cpu())
        return torch.cat(images), None if classes is None else classes[start:stop]


def draw(model, num: int, steps=None, sampler=None, seed: int = 0, labels=()) -> tuple[Tensor, Tensor | None]:
    """The pictures (num, C, H, W) of a Drawing and their labels (num,) or None."""
    return Drawing(model, num, steps, sampler, seed, labels).part()


def _fitting(model, most: int, numbers: int) -> int:
    return max(1, min(most, numbers // math.prod(model.info["shape"])))


def levels_for(model, steps: int, start: float) -> Tensor:
    """Noise levels for `steps` calls of a consistency model: start, then geometrically down, stopping short of sigma_min."""
    return start * (model.sigma_min / start) ** (torch.arange(steps, dtype=torch.float64) / steps)


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


# --- many -----------------------------------------------------------------------------------------------------------


def draw_to(path: Path, drawing: Drawing, name: str, rank: int = 0, ranks: int = 1) -> None:
    """Draws into an .npz as ADM's evaluator reads it: arr_0 uint8 (num, H, W, C), arr_1 labels where there are classes.

    The pictures come in shards, in the folder <path>.shards until all are there: stopped, it goes on with those that are missing.
    Several ranks share them out and rank 0 puts them together; the file is the same for any number of them. name says in the plan
    which model it was. Raises ValueError if the folder holds shards of another drawing.
    """
    folder = path.with_name(f"{path.name}.shards")
    size = _fitting(drawing.model, SHARD, SHARD_PIXELS)
    shards = [(k, min(k + size, drawing.num)) for k in range(0, drawing.num, size)]
    _begin(
        folder, {key: value for key, value in vars(drawing).items() if key not in ("model", "batch")} | {"model": name}
    )
    files = [folder / f"{start:08d}.npy" for start, _ in shards]
    mine = [k for k in range(rank, len(shards), ranks) if not files[k].exists()]
    for k in tqdm(mine, unit="shard", disable=rank > 0 or len(shards) == 1):
        pixels = plots.to_pixels(drawing.part(*shards[k], progress=len(shards) == 1 and drawing.num > BATCH)[0])
        write_file(files[k], lambda file, pixels=pixels: np.save(file, pixels))
    if rank > 0:
        write_text(_done(folder, rank), "")
    else:
        while not all(_done(folder, other).exists() for other in range(1, ranks)):
            time.sleep(0.2)
        labels = _classes(drawing.model, drawing.num, drawing.labels)
        write_file(path, lambda file: _put_together(file, files, drawing.num, labels))
        shutil.rmtree(folder)


def _done(folder: Path, rank: int) -> Path:
    """Says that a rank will write no more, in this start of the job: only then may rank 0 remove the folder."""
    return folder / f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{rank}.done"


def _begin(folder: Path, plan: dict) -> None:
    """Makes the folder of shards, or checks that it holds this very drawing."""
    path, text = folder / "plan.json", json.dumps(plan, sort_keys=True)
    if path.exists() and path.read_text() != text:
        raise ValueError(
            f"{folder} holds shards of another drawing ({path.read_text()}): go on with the same options, or remove it"
        )
    write_text(path, text)


def _put_together(file: BinaryIO, shards: list[Path], num: int, labels: Tensor | None) -> None:
    """Writes the .npz shard by shard: 50,000 pictures need not fit into memory."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            shape = (num, *np.load(shards[0], mmap_mode="r").shape[1:])
            np.lib.format.write_array_header_1_0(entry, dict(descr="|u1", fortran_order=False, shape=shape))
            for shard in shards:
                entry.write(np.load(shard).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, labels.numpy())


def first_of(path: Path, count: int) -> Iterator[Tensor]:
    """The first pictures of an .npz, read without the rest: (C, H, W) in [-1, 1] each."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as entry:
        version = np.lib.format.read_magic(entry)
        shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(entry)
        for _ in range(min(count, shape[0])):
            pixels = np.frombuffer(entry.read(math.prod(shape[1:])), dtype).reshape(shape[1:])
            yield torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
