"""Pictures drawn from a model, with noise that belongs to each picture: at once, or in shards that survive a stop and share ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
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
from cmlab.scaling import ONE_CALL
from cmlab.streams import Streams, get_generator

BATCH, PIXELS = 250, 200_000  # pictures a network call; fewer where they have more numbers than this together
SHARD, SHARD_PIXELS = 500, 4_000_000  # pictures a file, in the same way
# Between the seeds of two --seed. torch's CPU generator keeps 32 bits: 2^32 over the golden ratio leaves 1,000 seeds 1.9 million
# apart, so that no two of so many pictures share their noise.
STRIDE = 0x9E3779B1
DIFFUSION = {
    "heun": sampling.heun_states,
    "euler": sampling.euler_states,
    "dpm": sampling.dpm_states,
    "ancestral": sampling.ancestral_states,
}
CONSISTENCY = {"onestep": sampling.multistep_states, "multistep": sampling.multistep_states}
RANDOM = [*CONSISTENCY, "ancestral"]  # draw noise on the way


@dataclass(frozen=True)
class Drawing:
    """num pictures of a model, and how to draw them: a picture depends on seed and number only, whatever is drawn beside it.

    steps: network calls of a consistency model (1 without it), steps of a diffusion sampler (18); levels: the noise levels themselves
    instead. labels are drawn in turn; all classes without them. batch is how many a network call draws. generator: a stream by the
    released code's name, with which pictures depend on num too ("dummy": on everything). Raises ValueError for what does not fit the
    model.
    """

    model: torch.nn.Module
    num: int
    steps: int | None = None
    sampler: str | None = None
    seed: int = 0
    labels: tuple[int, ...] = ()
    batch: int | None = None
    generator: str | None = None
    levels: tuple[float, ...] | None = None

    def __post_init__(self):
        whole("num", self.num)
        whole("seed", self.seed, 0)
        _classes(self.model, 1, self.labels)
        self.plan()
        self._stream()
        if self.batch is not None:
            whole("batch", self.batch)

    def plan(self) -> tuple[str, list[float]]:
        """The sampler's name and its noise levels, one for every step."""
        name, levels = plan(self.model, self.steps, self.sampler)
        return name, levels if self.levels is None else sampling.levels_of(self.levels)

    def _stream(self):
        if self.generator is None:
            return Streams(self.num, self.seed, stride=STRIDE)
        return get_generator(self.generator, self.num, self.seed)

    def part(self, start: int = 0, stop: int | None = None, progress: bool = False) -> tuple[Tensor, Tensor | None]:
        """Pictures start … stop - 1 (N, C, H, W) and their labels (N,), or None: on the CPU."""
        stop = self.num if stop is None else stop
        drawn = self.drawn(start, stop)
        with tqdm(total=stop - start, unit="picture", disable=not progress) as bar:
            return sampling.end_of(drawn, lambda share: bar.update(int(share * (stop - start)) - bar.n))

    def drawn(self, start: int, stop: int) -> Iterator[float]:
        """As part, which it returns; yields the share that is done after every step of the sampler."""
        classes, (name, levels) = _classes(self.model, self.num, self.labels), self.plan()
        device, stream, images = next(self.model.parameters()).device, self._stream(), []
        batch = self.batch or _fitting(self.model, BATCH, PIXELS)
        for first in range(start, stop, batch):
            stream.set_done_samples(first)
            some = slice(first, min(first + batch, stop))
            noise = stream.randn(some.stop - first, *self.model.info["shape"]).to(device)
            chosen = None if classes is None else classes[some].to(device)
            states = sampler_states(self.model, name, levels, noise, chosen, stream)
            image = yield from shares(states, len(levels), first - start, some.stop - first, stop - start)
            images.append(image.cpu())
        return torch.cat(images), None if classes is None else classes[start:stop]


def shares(states: Iterator, steps: int, before: int = 0, count: int = 1, total: int = 1) -> Iterator[float]:
    """Yields the share of total pictures that is done, after each state of a batch of count; returns what the states return."""
    return sampling.relayed(states, lambda k, _: (before + count * k / steps) / total)


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
    if not all(0 <= label < count for label in labels):
        raise ValueError(f"labels must lie in 0 … {count - 1}, got {' '.join(map(str, labels))}")
    chosen = torch.tensor(labels or tuple(range(count)))
    return chosen.repeat(num // len(chosen) + 1)[:num]


def plan(model, steps: int | None = None, sampler: str | None = None) -> tuple[str, list[float]]:
    """The sampler's name and its noise levels, as Drawing takes them. Raises ValueError for what does not fit the model."""
    consistency = model.kind in ONE_CALL
    steps = whole("steps", steps if steps is not None else 1 if consistency else 18)
    name = sampler or ("heun" if not consistency else "onestep" if steps == 1 else "multistep")
    known(f"sampler for a {model.kind} model:", name, CONSISTENCY if consistency else DIFFUSION)
    if not consistency:
        return name, karras_sigmas(steps, model.sigma_min, model.sigma_max).tolist()
    if name == "onestep" and steps != 1:
        raise ValueError(f"the onestep sampler makes one step, got steps {steps}; use multistep")
    return name, _published_levels(model, steps) or levels_for(model, steps, model.sigma_max).tolist()


def sampler_states(model, sampler: str, levels: list[float], noise, labels, stream) -> Iterator[sampling.State]:
    """The states of a sampler by its name, which return the pictures. Every output is clamped to [-1, 1]."""
    random = {"generator": stream} if sampler in RANDOM else {}
    return (CONSISTENCY | DIFFUSION)[sampler](model, noise, levels, labels, clip_denoised=True, **random)


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
