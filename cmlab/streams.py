"""Random streams: every draw takes a generator, so that a seed means the same picture whatever the batch size.

A generator is None (torch's global one), a torch.Generator, or one of the streams below, which carry the names of the
released code: "dummy", "determ" and "determ-indiv". Training draws take the first two: there, samples have no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cmlab.checks import known, whole


class RandomState:
    """Where torch's global generators of the CPU and of one device stand; restore() puts them back there."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.cpu = torch.get_rng_state()
        self.accelerator = None if self.device.type == "cpu" else self._module.get_rng_state(*self._place)

    @property
    def _module(self):
        return torch.get_device_module(self.device)

    @property
    def _place(self) -> tuple[torch.device, ...]:
        return () if self.device.type == "mps" else (self.device,)  # of which there is one, and its functions take none

    def restore(self) -> None:
        """Random numbers go on from where they stood."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            self._module.set_rng_state(self.accelerator, *self._place)


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, torch's global numbers start from seed, on the CPU and the device; outside they go on as if nothing had been."""
    before = RandomState(device)
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every other device too
        if before.accelerator is not None:
            torch.get_device_module(device).manual_seed(seed)
        yield
    finally:
        before.restore()


def randn(shape: tuple[int, ...], generator=None, device=None, dtype=None) -> Tensor:
    """Standard normal draws of the given shape from any generator. Raises TypeError for what is none."""
    _check(generator)
    if hasattr(generator, "randn"):
        return generator.randn(*shape).to(device=device, dtype=dtype)
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)


def randn_like(x: Tensor, generator=None) -> Tensor:
    """Standard normal draws with the shape, dtype and device of x."""
    return randn(tuple(x.shape), generator, x.device, x.dtype)


def _check(generator, streams: str = " or a stream of get_generator") -> None:
    if not (generator is None or isinstance(generator, torch.Generator) or (streams and hasattr(generator, "randn"))):
        raise TypeError(
            f"generator must be None, a torch.Generator{streams}, got {generator!r}; "
            "for a seed write torch.Generator().manual_seed(seed)"
        )


def _check_plain(generator) -> None:
    _check(generator, streams="")


def rand(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Uniform draws in [0, 1) of the given shape, from torch's global generator or a torch.Generator."""
    _check_plain(generator)
    return torch.rand(shape, generator=generator, device=None if generator is None else generator.device)


def randint(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Uniform integers in [low, high) of the given shape, from torch's global generator or a torch.Generator."""
    _check_plain(generator)
    return torch.randint(low, high, shape, generator=generator, device=None if generator is None else generator.device)


class Streams:
    """Draws that belong to samples, not to batches: sample i of num_samples gets the same numbers in any batch, on any rank.

    individual=True ("determ-indiv") keeps one generator a sample, seeded i + stride seed; stride is num_samples, as in the
    released code, unless given: with a stride of its own a sample is the same however many there are. individual=False ("determ")
    draws for all samples at once and hands out the rows asked for. set_done_samples(k) says that the next batch starts at
    sample k (times world_size ranks, interleaved). Numbers come from torch's CPU generator, so they do not depend on the device.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        individual: bool = True,
        rank: int = 0,
        world_size: int = 1,
        stride: int | None = None,
    ):
        self.num_samples, self.seed = whole("num_samples", num_samples), whole("seed", seed, 0)
        self.stride = num_samples if stride is None else whole("stride", stride, num_samples)
        self.rank, self.world_size, self.individual = rank, world_size, individual
        self.done = 0
        self._seed_all()

    def _seed_all(self) -> None:
        self._generators: dict[int, torch.Generator] = {}  # made when first drawn from: there may be 50,000

    def _generator(self, sample: int) -> torch.Generator:
        if sample not in self._generators:
            seed = self.stride * self.seed + sample if self.individual else self.seed
            seed %= 2**32  # the bits that the CPU's generator keeps
            self._generators[sample] = torch.Generator().manual_seed(seed)
        return self._generators[sample]

    def set_done_samples(self, done: int) -> None:
        """The next draws are for samples done, done + 1, …; "determ" starts its one stream again, as the released code does."""
        self.done = whole("done", done, 0)
        if not self.individual:
            self._seed_all()

    def _draw(self, draw, shape: tuple[int, ...]) -> Tensor:
        first, count = self.done + self.rank, shape[0]
        rows = range(first, first + count * self.world_size, self.world_size)
        if len(rows) and rows[-1] >= self.num_samples:
            raise ValueError(f"samples {rows[0]} … {rows[-1]} asked of streams for num_samples = {self.num_samples}")
        if self.individual:
            return torch.cat([draw((1, *shape[1:]), self._generator(i)) for i in rows])
        return draw((self.num_samples, *shape[1:]), self._generator(0))[list(rows)]

    def randn(self, *shape: int) -> Tensor:
        """Standard normal draws; the first dimension counts samples."""
        return self._draw(lambda s, g: torch.randn(s, generator=g), shape)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal draws with the shape, dtype and device of x."""
        return randn_like(x, self)

    def randint(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        """Uniform integers in [low, high), for example class labels."""
        return self._draw(lambda s, g: torch.randint(low, high, s, generator=g), shape)


class GlobalStream:
    """torch's global generator behind the same calls: the released code's "dummy"."""

    def randn(self, *shape: int) -> Tensor:
        """Standard normal draws."""
        return torch.randn(shape)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal draws with the shape, dtype and device of x."""
        return torch.randn_like(x)

    def randint(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        """Uniform integers in [low, high)."""
        return torch.randint(low, high, shape)

    def set_done_samples(self, done: int) -> None:
        """The global stream has no samples to count."""


def get_generator(name: str, num_samples: int = 1, seed: int = 0, rank: int = 0, world_size: int = 1):
    """A random stream by the released code's name: "dummy", "determ" or "determ-indiv" (use the last: it is the cheapest that is exact)."""
    known("generator", name, ["dummy", "determ", "determ-indiv"])
    if name == "dummy":
        return GlobalStream()
    return Streams(num_samples, seed, name == "determ-indiv", rank, world_size)
