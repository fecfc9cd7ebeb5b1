"""Which block sizes are the fastest on this card? Each candidate of the kernels that leave a choice, timed; the best five of each.

    python benchmarks/blocks.py                   # on a GPU: some 5 minutes, nearly all compiling; writes benchmarks/BLOCKS-<card>.md
    python benchmarks/blocks.py --small           # a dry run at tiny sizes; on a CPU with TRITON_INTERPRET=1

What cmlab.kernels uses is in tiles.py, whole_group_blocks, and in jvp.py, FORWARD and BACKWARD.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import tyro
from kernels import Bench, heading, normal

from cmlab.kernels import dispatch, jvp, norm, tiles


def swept(bench: Bench, what: str, candidates: dict[str, Callable], work: float, limit: float) -> None:
    """The rows of the five fastest, and of what is in use; a candidate that does not fit the card is left out."""
    times = {name: bench.attempt(call) for name, call in candidates.items()}
    best = sorted((taken, name) for name, taken in times.items() if taken is not None)
    for taken, name in best[:5] + [row for row in best[5:] if row[1].endswith(", in use")]:
        bench.row(what, name, f"{1e6 * taken:.1f} µs", f"{work / taken / limit:.0%}")


def copying(bench: Bench) -> None:
    """What any share is to be read beside: a copy of few bytes does not reach the bandwidth either."""
    bench.table("copying", ["bytes", "time", "of the copy bandwidth"])
    for size in (1,) if bench.small else (8, 24, 48, 96, 192):
        x = normal(bench, size << 19)
        taken = bench.time(partial(torch.empty_like(x).copy_, x))
        bench.row(f"{size} MiB", f"{1e6 * taken:.1f} µs", f"{2 * (size << 20) / taken / bench.bandwidth:.0%}")


def norms(bench: Bench) -> None:
    bench.table("group_norm_silu, whole groups, bfloat16", ["shape", "candidate", "time", "of copy bandwidth"])
    large = [(16, 192, 64, 64), (64, 192, 64, 64), (16, 384, 32, 32)]
    for shape in [(2, 64, 4, 4)] if bench.small else large:
        for layout in (torch.contiguous_format, torch.channels_last):
            x, last = normal(bench, *shape).to(memory_format=layout), layout == torch.channels_last
            name = f"{shape}{' channels last' if last else ''}"
            swept(bench, name, norm_candidates(bench, x, last), 2 * x.numel() * x.element_size(), bench.bandwidth)


def norm_candidates(bench: Bench, x: torch.Tensor, last: bool) -> dict[str, Callable]:
    """Calls of the kernel over groups a program, elements a tile, warps and stages; what cmlab uses is among them."""
    batch, channels = x.shape[:2]
    given = [torch.empty(4, batch, channels, device=x.device), *(normal(bench, channels) for _ in range(2))]
    given += [normal(bench, batch, channels) for _ in range(2)]
    options = ((4, 8, 16) if last else (1,), (4096, 8192, 16384), (8, 16), (1, 3))
    found = {}
    for groups, tile, warps, stages in [(1, 32, 1, 1)] if bench.small else itertools.product(*options):
        block_c = dispatch.triton.next_power_of_2(groups * channels // 32)
        block_p = min(tile // block_c, dispatch.triton.next_power_of_2(x[0, 0].numel()))
        sizes = dict(GROUPS=groups, BLOCK_C=block_c, BLOCK_P=block_p, STAGES=stages, num_warps=warps)
        name = f"{groups} groups, tile {block_c} x {block_p}, {warps} warps, {stages} stages"
        used = sizes == tiles.whole_group_blocks(x, 32, tiles.groups_at_once(x, 32) or 1)
        constants = dict(ADAPTIVE=True) | sizes
        call = partial(norm._launch_whole, x, torch.empty_like(x), given, 32, 1e-5, constants)
        found[name + ", in use" if used else name] = call
    return found


def attention(bench: Bench) -> None:
    """Operations a pair of tokens and channel: 12 forward, 24 and 18 backward."""
    bench.table("jvp_attention, bfloat16, 16 heads of 64", ["kernel", "candidate", "time", "of matmul rate"])
    tokens = 32 if bench.small else 2048
    given = [normal(bench, 1, 16, tokens, 64) for _ in range(8)]
    given = [x.float() for x in given] if bench.device == "cpu" else given
    outputs = [torch.empty_like(given[0]) for _ in range(4)]
    rows = [torch.zeros(1, 16, tokens, device=bench.device) for _ in range(4)]
    sizes = (tokens, 64, 64**-0.5, jvp.LOG2E)
    kernels = {
        "forward": (jvp._attend, [*given[:6], *outputs[:2], *rows[:2], *sizes], 12, jvp.FORWARD),
        "gradients of keys and values": (jvp._key_gradients, [*given, *rows, *outputs, *sizes], 24, jvp.BACKWARD),
        "gradients of queries": (jvp._query_gradients, [*given, *rows, *outputs[:2], *sizes], 18, jvp.BACKWARD),
    }
    options = [(32, 32, 4, 1)] if bench.small else itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4))
    options = list(options)  # Triton's own choice, which cmlab leaves to it, is 4 warps and 3 stages
    for name, (kernel, arguments, operations, used) in kernels.items():
        candidates = {
            f"{r} rows, {c} columns, {warps} warps, {stages} stages{', in use' if (r, c, warps, stages) == (*used, 4, 3) else ''}": partial(
                kernel[(16, dispatch.triton.cdiv(tokens, r))], *arguments,
                ROWS=r, COLUMNS=c, BLOCK_D=64, PRECISION="ieee" if bench.device == "cpu" else "tf32", num_warps=warps, num_stages=stages,
            )
            for r, c, warps, stages in options
        }  # fmt: skip
        swept(bench, name, candidates, operations * 16 * tokens**2 * 64, bench.rate)


def main(small: bool = False, output: Path | None = None) -> None:
    """Times every candidate and writes the tables.

    Args:
        small: Tiny sizes and one candidate each, to see that it runs.
        output: The file to write, instead of benchmarks/BLOCKS-<card>.md (of a dry run: runs/BLOCKS-dry-run.md).
    """
    bench, path = heading("BLOCKS", "Block sizes", small, output)
    for part in (copying, norms, attention):
        part(bench)
        path.write_text("\n".join(bench.lines) + "\n", encoding="utf-8")  # what is measured is kept
    print(f"written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
