"""The kernels on this machine's GPU, against float64: a program of its own, since Triton must not interpret (test_kernels runs it)."""

import itertools
import os
import shutil

import torch
from test_kernels import (
    ROUNDING,
    SMALL_UNET,
    attention_case,
    by_function,
    by_reference,
    norm_case,
    off,
    results,
    step_case,
)  # fmt: skip
from toys import draws

from cmlab import kernels
from cmlab.kernels import dispatch, jvp, step, twin
from cmlab.models.unet import UNet
from cmlab.scaling import ConsistencyModel


def on_gpu(function):
    """The function for tensors that are on the CPU, computed on the GPU."""

    def call(*given):
        outputs = function(*(None if x is None else x.cuda() for x in given))
        return tuple(x.cpu() for x in outputs) if isinstance(outputs, tuple) else outputs.cpu()

    return call


def norms(dtype: torch.dtype, wrap=lambda f: f) -> float:
    """The largest error of values and gradients, over shapes, formats and ways to cut them."""
    shapes, worst = [(2, 64, 5, 7), (1, 96, 64, 64), (16, 192, 32, 32), (2, 64, 65, 129), (2, 64, 9)], 0.0
    for shape, last, adaptive in itertools.product(shapes, (False, True), (False, True)):
        if last and len(shape) != 4:
            continue
        inputs, towards = norm_case(shape, dtype, last, adaptive)
        got = results(on_gpu(wrap(by_function)), inputs, towards, dtype)
        right = results(by_reference, inputs, towards, torch.float64)
        worst = max(worst, *(off(a, b) for a, b in zip(got, right, strict=True)))
    return worst


def attentions(dtype: torch.dtype, wrap=lambda f: f) -> float:
    worst = 0.0
    for shape in ((1, 2, 70, 24), (2, 1, 33, 80), (1, 2, 256, 64), (1, 2, 300, 128), (1, 1, 1000, 16)):
        inputs, towards = attention_case(shape, dtype)
        got = results(on_gpu(wrap(kernels.jvp_attention)), inputs, towards, dtype)
        right = results(jvp.reference, inputs, towards, torch.float64)
        worst = max(worst, *(off(a, b) for a, b in zip(got, right, strict=True)))
    return worst


def steps(dtype: torch.dtype) -> float:
    worst = 0.0
    for shape in ((3, 3, 5, 7), (2, 1), (1, 4, 33, 33)):
        x, output, numbers, seeds = step_case(shape, dtype)
        coefficients = torch.stack(
            [step._of_each("", v, x) for v in (*numbers["scalings"], *list(numbers.values())[1:])]
        )
        got = torch.ops.cmlab.fused_step(x.cuda(), output.cuda(), coefficients.cuda(), seeds.cuda(), 4, True)
        worst = max(worst, off(got.cpu(), step.reference(x, output, coefficients, seeds, 4, True).double()))
    return worst


def twins(dtype: torch.dtype) -> float:
    inputs, _ = norm_case((2, 96, 33, 31), dtype, False, True)
    x, weight, bias, scale, shift = (v.cuda() for v in inputs)
    return off(
        twin.group_norm_silu(x, weight, bias, 32, 1e-5, scale, shift).cpu(), by_reference(*(v.double() for v in inputs))
    )


def same_picture() -> float:
    """The U-Net with kernels off, on, compiled, and as a CUDA graph: the largest difference."""
    torch.manual_seed(0)
    net = UNet(**SMALL_UNET)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = ConsistencyModel(net.cuda().eval().requires_grad_(False).to(memory_format=torch.channels_last))
    given = 80 * draws(2, 3, 8, 8).cuda(), torch.full((2,), 80.0, device="cuda"), torch.tensor([1, 2], device="cuda")
    os.environ["CMLAB_KERNELS"] = "0"
    plain = model(*given)
    os.environ["CMLAB_KERNELS"] = "1"
    pictures = [model(*given), torch.compile(model, fullgraph=True)(*given)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pictures.append(model(*given))
    graph.replay()
    return max(float((p - plain).abs().max()) for p in pictures)


def main() -> None:
    torch.backends.cudnn.allow_tf32 = False
    assert not dispatch.INTERPRETED
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for dtype, rounding in ROUNDING.items():
        compiled = lambda f: torch.compile(f, fullgraph=True, dynamic=False)  # noqa: E731
        found = dict(norm=norms(dtype), attention=attentions(dtype), step=steps(dtype))
        if shutil.which("nvcc"):
            found |= dict(twin=twins(dtype))
        else:
            print("norm.cu not run: there is no nvcc")
        torch._dynamo.config.recompile_limit = 64
        found |= dict(norm_compiled=norms(dtype, compiled), attention_compiled=attentions(dtype, compiled))
        print(dtype, {name: f"{error:.1e}" for name, error in found.items()}, flush=True)
        for name, error in found.items():
            assert error < (3e-6 if name == "step" else 2 * rounding), f"{name} in {dtype}: {error}"
    torch.use_deterministic_algorithms(False)
    apart = same_picture()
    print(f"the U-Net's pictures differ by {apart:.1e}")
    assert apart < 1e-4


if __name__ == "__main__":
    main()
