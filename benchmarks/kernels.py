"""The GPU kernels beside eager PyTorch, torch.compile and their published peers, as shares of what the card can do: one run, one table.

    python benchmarks/kernels.py                  # on a GPU: some 8 minutes; writes benchmarks/KERNELS-<card>.md
    python benchmarks/kernels.py --small          # a dry run of the same script at tiny sizes, on a CPU too (eager only)

The peer of jvp_attention is the package jvp_flash_attention, of the network diffusers' UNet2DModel: compared where installed. Every
row is the median of several runs. A share is of the copy bandwidth or matrix rate that this script measures first.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from unet import SMALL, networks, seconds

from cmlab import kernels
from cmlab.data import Data
from cmlab.kernels import dispatch, jvp, norm, twin
from cmlab.objectives import ConsistencyTraining
from cmlab.recipes import get_recipe
from cmlab.released import IMAGENET64
from cmlab.run import Run
from cmlab.scaling import ConsistencyModel

HALF = torch.bfloat16


CANNOT = (RuntimeError, ImportError, ValueError, torch._dynamo.exc.TorchDynamoException)
if dispatch.triton is not None:
    CANNOT += (dispatch.triton.errors.TritonError,)


class Bench:
    """Times calls on one device and keeps the rows of the table."""

    def __init__(self, device: str, small: bool):
        self.device, self.small, self.lines = device, small, []
        size, side = (1 << 16, 64) if small else (1 << 29, 8192)
        a, m = normal(self, size // 2), normal(self, side, side)  # of zeros a product is faster than of other numbers
        b = torch.empty_like(a)
        self.bandwidth = 2 * size / self.time(lambda: b.copy_(a))
        self.rate = 2 * side**3 / self.time(lambda: m @ m)

    def time(self, call: Callable, rounds: int = 20, whole: bool = False) -> float:
        """The median of some runs, after two that warm up or compile. On a GPU by its own clock, with a cold cache.

        whole: the time in which Python launches the kernels is in it; else the GPU is kept waiting until all are launched.
        """
        rounds = 2 if self.small else rounds
        call(), call()
        if self.device != "cuda":
            return median(seconds(call, self.device) for _ in range(rounds))
        flush, times = torch.empty(64 << 20, dtype=torch.int32, device="cuda"), []
        for _ in range(rounds):
            flush.zero_()
            if not whole:
                torch.cuda._sleep(4_000_000)  # cycles: 2 ms or so
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return median(times)

    def compiled(self, function: Callable) -> Callable:
        """torch.compile; in a dry run without its compiler, which would take minutes."""
        return torch.compile(function, backend="aot_eager" if self.small else "inductor", dynamic=False)

    def table(self, title: str, columns: list[str]) -> None:
        """Begins a table, and prints its head."""
        print(f"\n{title}\n{' | '.join(columns)}")
        self.lines += ["", f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]

    def row(self, *cells) -> None:
        """Adds a row and prints it."""
        line = "| " + " | ".join(str(c) for c in cells) + " |"
        self.lines.append(line)
        print(line, flush=True)

    def attempt(self, call: Callable, whole: bool = False) -> float | None:
        """The time of a call; None where this machine cannot run it (no kernel, no compiler, no memory, no package)."""
        try:
            return self.time(call, whole=whole)
        except CANNOT as error:
            print(f"  not run: {type(error).__name__}: {str(error).splitlines()[0][:110]}")
            return None


def close(name: str, got, right) -> None:
    """Raises AssertionError where a way gives other numbers than the first, beyond half precision's rounding."""
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, right)), strict=True):
        apart = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6))
        assert apart < 0.03, f"{name} differs by {apart:.2%}"


def compared(
    bench: Bench, what: str, calls: dict[str, Callable], work: float, limit: float, agreeing: bool = True
) -> None:
    """One row for each way: time, share of the limit, and how many times as fast as the first. agreeing: all give the same."""
    first, right = None, next(iter(calls.values()))()
    for name, call in calls.items():
        taken = bench.attempt(call)
        if taken is not None and agreeing:
            close(name, call(), right)
        first = first or taken
        if taken is None:
            bench.row(what, name, "not run", "", "")
        else:
            bench.row(what, name, f"{1e3 * taken:.3f} ms", f"{work / taken / limit:.0%}", f"{first / taken:.2f}")


def normal(bench: Bench, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, device=bench.device, dtype=dtype)


def group_norm_silu(bench: Bench) -> None:
    """In both memory formats. Work: the bytes that have to move."""
    bench.table(
        "group_norm_silu, bfloat16, with scale and shift", ["shape", "way", "time", "of copy bandwidth", "x eager"]
    )
    large = [(1, 192, 64, 64), (16, 192, 64, 64), (16, 384, 32, 32), (64, 192, 64, 64), (4, 256, 256, 256)]
    compiled = bench.compiled(norm.reference)
    for shape in [(2, 32, 4, 4)] if bench.small else large:
        for layout in (torch.contiguous_format, torch.channels_last):
            one_norm(bench, shape, layout, compiled)


def one_norm(bench: Bench, shape: tuple[int, ...], layout: torch.memory_format, compiled: Callable) -> None:
    """The rows of one shape: forward, and forward with backward."""
    name = f"{shape}{' channels last' if layout == torch.channels_last else ''}"
    x = normal(bench, *shape).to(memory_format=layout)
    inputs = [x, *(normal(bench, shape[1]) for _ in range(2)), *(normal(bench, *shape[:2]) for _ in range(2))]
    x, weight, bias, scale, shift = inputs = [t.requires_grad_() for t in inputs]
    dy, size = torch.randn_like(x), x.numel() * x.element_size()
    ways = {
        "eager": norm.reference,
        "compiled": compiled,
        "kernel": kernels.group_norm_silu,
        "CUDA C++": twin.group_norm_silu,
    }
    forward = {n: partial(f, x, weight, bias, 32, 1e-5, scale, shift) for n, f in ways.items()}
    with torch.no_grad():
        compared(bench, name, forward, 2 * size, bench.bandwidth)
    copying = bench.time(partial(torch.empty_like(x).copy_, x.detach()))
    bench.row(name, "a copy of x", f"{1e3 * copying:.3f} ms", f"{2 * size / copying / bench.bandwidth:.0%}", "")
    del forward["CUDA C++"]  # has no gradient
    backward = {n: lambda f=f: torch.autograd.grad(f(), inputs, dy) for n, f in forward.items()}
    compared(bench, f"{name}, with backward", backward, 5 * size, bench.bandwidth)


def jvp_attention(bench: Bench) -> None:
    """Against the quadratic form, differentiated by PyTorch and written out, and the published package."""
    bench.table("jvp_attention, bfloat16, 16 heads of 64", ["tokens", "way", "time", "of matmul rate", "x math path"])
    compiled = bench.compiled(jvp.reference)
    for tokens in (32,) if bench.small else (256, 1024, 2048, 4096):
        one_attention(bench, tokens, compiled)


def by_math(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's quadratic attention, carried forwards by PyTorch: the only one of its attentions that can be."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(F.scaled_dot_product_attention, inputs[:3], inputs[3:])


def by_peer(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The package from PyPI."""
    from jvp_flash_attention.jvp_attention import JVPAttn

    with forward_ad.dual_level():
        pairs = zip(inputs[:3], inputs[3:], strict=True)
        return tuple(forward_ad.unpack_dual(JVPAttn.fwd_dual(*(forward_ad.make_dual(*pair) for pair in pairs))))


def one_attention(bench: Bench, tokens: int, compiled: Callable) -> None:
    """The rows of one number of tokens. Work: 12 N^2 d operations forward, 42 more backward."""
    inputs = [normal(bench, 1, 16, tokens, 64) for _ in range(6)]
    operations = 12 * 16 * tokens**2 * 64
    ways = {"math path": by_math, "written out": jvp.reference, "written out, compiled": compiled}
    ways |= {"jvp_flash_attention": by_peer, "kernel": kernels.jvp_attention}
    with torch.no_grad():
        compared(bench, tokens, {n: partial(f, *inputs) for n, f in ways.items()}, operations, bench.rate)
    wanted = [x.detach().requires_grad_() for x in inputs]
    towards = [torch.randn_like(x) for x in wanted[:2]]
    pair = {"written out": jvp.reference, "kernel": kernels.jvp_attention}
    backward = {n: lambda f=f: torch.autograd.grad(f(*wanted), wanted, towards) for n, f in pair.items()}
    compared(bench, f"{tokens}, with backward", backward, operations * 54 / 12, bench.rate)


def fused_step(bench: Bench) -> None:
    """A re-noising step of multistep sampling. Work: the bytes that have to move."""
    bench.table("fused_step, output bfloat16", ["shape", "way", "time", "of copy bandwidth", "x eager"])

    def eager(x, output, *_):
        return (0.3 * x + 0.7 * output.float()).clamp(-1, 1) + 0.5 * torch.randn_like(x)

    def kernel(x, output, coefficients, seeds):
        return torch.ops.cmlab.fused_step(x, output, coefficients, seeds, 1, True)

    ways = {"eager": eager, "compiled": bench.compiled(eager), "kernel": kernel}
    for shape in [(2, 3, 8, 8)] if bench.small else [(16, 3, 64, 64), (256, 3, 64, 64), (64, 3, 256, 256)]:
        x, seeds = normal(bench, *shape, dtype=torch.float32), torch.arange(shape[0], device=bench.device)
        coefficients = torch.tensor([0.3, 0.7, 0.0, 0.5], device=bench.device)[:, None].expand(4, shape[0]).contiguous()
        given = (x, normal(bench, *shape), coefficients, seeds)
        compared(
            bench,
            shape,
            {n: partial(f, *given) for n, f in ways.items()},
            10 * x.numel(),
            bench.bandwidth,
            agreeing=False,
        )


def sampling(bench: Bench) -> None:
    """One-step sampling of the ImageNet-64 network with random weights."""
    columns = ["batch", "way", "time", "images / s", "x diffusers compiled"]
    bench.table("one-step ImageNet-64 sampling, bfloat16, channels last", columns)
    ours, theirs = networks(SMALL if bench.small else IMAGENET64)
    ours, theirs = (n.to(bench.device, HALF, memory_format=torch.channels_last) for n in (ours, theirs))
    size, their = ours.config["image_size"], bench.compiled(theirs)

    class Peer(torch.nn.Module):
        def forward(self, x, t, y):
            return their(x.to(HALF), t, class_labels=y, return_dict=False)[0].float()

    model, peer = ConsistencyModel(ours), ConsistencyModel(Peer())
    fast = bench.compiled(model)
    for batch in (1,) if bench.small else (1, 16, 256):
        x = 80 * normal(bench, batch, 3, size, size, dtype=torch.float32).to(memory_format=torch.channels_last)
        given = x, torch.full((batch,), 80.0, device=bench.device), torch.arange(batch, device=bench.device)
        calls = {"diffusers compiled": partial(peer, *given), "eager": partial(model, *given)}
        calls |= {"compiled": partial(fast, *given), "CUDA graph": graphed(partial(fast, *given), bench.device)}
        with torch.no_grad():
            times = {name: bench.attempt(call, whole=True) for name, call in calls.items()}
        for name, taken in times.items():
            bench.row(batch, name, *cells(taken, batch, times["diffusers compiled"]))


def cells(taken: float | None, batch: int, base: float | None) -> tuple[str, str, str]:
    """Time, images a second, and how many times as fast as the base."""
    if taken is None:
        return "not run", "", ""
    return f"{1e3 * taken:.2f} ms", f"{batch / taken:.1f}", f"{base / taken:.2f}" if base else ""


def graphed(call: Callable, device: str) -> Callable:
    """The call recorded once as a CUDA graph and replayed; recorded when it is first called."""
    graph = []

    def replay():
        if device != "cuda":
            raise RuntimeError("a CUDA graph needs a GPU")
        if not graph:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            graph.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graph[0]):
                call()
        graph[0].replay()

    return replay


def training(bench: Bench) -> None:
    """Steps of consistency training of the ImageNet-64 network, kernels off and on."""
    bench.table("CT training step, ImageNet-64 network, bfloat16", ["batch", "kernels", "time", "images / s", "memory"])
    network = dict(name="unet", **(SMALL if bench.small else IMAGENET64))
    recipe = get_recipe("ct-imagenet64").replace(
        network=network, batch=2 if bench.small else 16, micro_batches=1, init_from=None, precision="bf16", ema=0.999,
        objective=ConsistencyTraining(),
    )  # fmt: skip
    for mode in ("0", "1"):
        os.environ["CMLAB_KERNELS"] = mode
        run = Run(recipe, pictures(network["image_size"]), None, bench.device, 0)
        if bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = bench.attempt(partial(run.advance, None), whole=True)
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if bench.device == "cuda" else ""
        bench.row(recipe.batch, "off" if mode == "0" else "on", *cells(taken, recipe.batch, None)[:2], memory)
        del run
    del os.environ["CMLAB_KERNELS"]


def pictures(size: int) -> Data:
    """Random pictures in the place of ImageNet."""
    images = torch.rand(64, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(64)
    return Data("noise", images, labels, images[:2], labels[:2], sigma_data=0.5, num_classes=1000)


def heading(kind: str, title: str, small: bool, output: Path | None) -> tuple[Bench, Path]:
    """A bench with the first lines of its file (card, date, versions, limits), and where that goes."""
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU, dry run"
    here = dict(capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **here)
    bench = Bench(device, small)
    bench.lines = [
        f"# {title} on: {card}", "",
        f"{datetime.date.today()}, torch {torch.__version__}, Triton {getattr(dispatch.triton, '__version__', 'missing')}, "
        f"commit {commit.stdout.strip() or 'unknown'}; "
        f"copy {bench.bandwidth / 1e9:.0f} GB/s, bfloat16 matrix product {bench.rate / 1e12:.2f} Tflop/s. "
        f"`python benchmarks/{kind.lower()}.py`",
    ]  # fmt: skip
    print(bench.lines[-1])
    if device == "cpu":
        print("There is no GPU here: this is a dry run, whose times and shares mean nothing.")
    dry = Path("runs") / f"{kind}-dry-run.md"
    path = output or (dry if device == "cpu" else Path(__file__).with_name(f"{kind}-{card.replace(' ', '-')}.md"))
    path.parent.mkdir(parents=True, exist_ok=True)
    return bench, path


Part = Literal["norm", "attention", "step", "sampling", "training"]
PARTS = dict(norm=group_norm_silu, attention=jvp_attention, step=fused_step, sampling=sampling, training=training)


def main(small: bool = False, output: Path | None = None, parts: tuple[Part, ...] = get_args(Part)) -> None:
    """Runs everything there is a device for, prints the table and writes it.

    Args:
        small: Tiny sizes, to see that it runs.
        output: The file to write, instead of benchmarks/KERNELS-<card>.md (of a dry run: runs/KERNELS-dry-run.md).
        parts: Which tables.
    """
    bench, path = heading("KERNELS", "Kernels", small, output)
    torch._dynamo.config.recompile_limit = 64  # a shape each; beyond the limit torch.compile quietly runs eagerly
    for part in parts:
        torch._dynamo.reset()
        PARTS[part](bench)
        path.write_text("\n".join(bench.lines) + "\n", encoding="utf-8")  # what is measured is kept
    print(f"written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
