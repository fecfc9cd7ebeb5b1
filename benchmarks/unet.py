"""How fast is our U-Net beside diffusers' UNet2DModel? Same weights, same input, alternating in one run, each at its best setting.

    python benchmarks/unet.py                     # the full ImageNet-64 network, batch 4, on the CPU: some minutes
    python benchmarks/unet.py --compile           # torch.compile as a further setting of both: some minutes more
    python benchmarks/unet.py --small             # a small network, to see that it runs

Ours has one more on a CPU, Winograd convolutions: fewer products, so that it can go below the floor that stands beside the times.
The floor is the network's operations over the rate of a large matrix product measured in the same run.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable

import torch
import tyro

from cmlab.interop import unet_to_diffusers, weights_to_diffusers
from cmlab.models import UNet
from cmlab.models.winograd import winograd
from cmlab.planning import forward_flops
from cmlab.released import IMAGENET64

SMALL = IMAGENET64 | dict(image_size=16, model_channels=32, num_res_blocks=1, num_head_channels=32, channel_mult=(1, 2))
SMALL["attention_resolutions"] = (2,)


def networks(arguments: dict) -> tuple[UNet, torch.nn.Module]:
    """Our network with random weights, and diffusers' with the same."""
    from diffusers import UNet2DModel

    ours = UNet(**arguments).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    theirs = UNet2DModel.from_config(unet_to_diffusers(ours.config)).eval().requires_grad_(False)
    theirs.load_state_dict(weights_to_diffusers(ours.config, ours.state_dict()))
    return ours, theirs


def settings(
    ours, theirs, batch: int, dtype: torch.dtype, device: str, compiled: bool
) -> dict[tuple[str, str], Callable]:
    """A call for each setting and side: {(setting, side): call}. All see the same input."""
    size, calls = ours.config["image_size"], {}
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, 3, size, size, generator=generator).to(device=device, dtype=dtype)
    t, y = torch.full((batch,), 100.0, device=device), torch.arange(batch, device=device)
    for name, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
        x = noise.to(memory_format=layout)
        mine, other = (copy.deepcopy(n).to(device=device, dtype=dtype, memory_format=layout) for n in (ours, theirs))
        for way in ("", ", compiled") if compiled else ("",):
            f, g = (torch.compile(net) if way else net for net in (mine, other))
            calls[name + way, "cmlab"] = lambda f=f, x=x: f(x, t, y)
            calls[name + way, "diffusers"] = lambda g=g, x=x: g(x, t, class_labels=y, return_dict=False)[0]
    if device == "cpu":
        fewer = winograd(copy.deepcopy(ours).to(dtype=dtype, memory_format=torch.channels_last))
        calls["channels last, Winograd", "cmlab"] = lambda: fewer(x, t, y)
    return calls


def seconds(call: Callable, device: str) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def matmul_rate(dtype: torch.dtype, device: str, size: int, rounds: int = 5) -> float:
    """Operations a second of a square matrix product: the best of some."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(rounds))


def main(batch: int = 4, rounds: int = 3, compile: bool = False, small: bool = False, device: str = "cpu") -> None:
    """Prints the table. rounds alternate between the settings and sides; the best of each counts."""
    warnings.filterwarnings("ignore")
    ours, theirs = networks(SMALL if small else IMAGENET64)
    flops = forward_flops(ours.config) * batch
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {batch}, {flops / batch / 1e9:.1f} GFLOP an image"
    )
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            calls = settings(ours, theirs, batch, dtype, device, compile)
            outputs = [call().float() for call in calls.values()]  # the first calls warm up, or compile
            times = {key: [] for key in calls}
            for _ in range(rounds):
                for key, call in calls.items():
                    times[key].append(seconds(call, device))
        apart = max(float((out - outputs[0]).abs().max() / outputs[0].std()) for out in outputs)
        report(
            str(dtype).removeprefix("torch."), times, apart, flops, matmul_rate(dtype, device, 256 if small else 2048)
        )


def report(dtype: str, times: dict, apart: float, flops: float, rate: float) -> None:
    """One block of the table."""
    print(f"\n{dtype}: floor {flops / rate:.3f} s (matrix products at {rate / 1e9:.0f} GFLOP/s)")
    print(f"  outputs differ by {apart:.1e} of their deviation at most")
    best = {}
    for (setting, side), values in times.items():
        print(
            f"  {side:10s} {setting:24s} best {min(values):7.3f} s   median {sorted(values)[len(values) // 2]:7.3f} s"
        )
        best[side] = min(best.get(side, (math.inf, "")), (min(values), setting))
    (mine, how), (other, their) = best["cmlab"], best["diffusers"]
    print(f"  cmlab ({how}) is {other / mine:.2f} x as fast as diffusers ({their})")


if __name__ == "__main__":
    tyro.cli(main)
