"""The GPU kernels, on the CPU: through Triton's interpreter against float64, and compiled for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from toys import draws

from cmlab import kernels
from cmlab.kernels import dispatch, jvp, norm, step, tiles
from cmlab.models.unet import ResBlock, UNet
from cmlab.scaling import ConsistencyModel, Denoiser

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # some roundings of each precision
EVERY = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
SMALL_UNET = dict(
    image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=[2], channel_mult=[1, 2],
    num_classes=3, num_head_channels=16, resblock_updown=True,
)  # fmt: skip

pytestmark = pytest.mark.skipif(dispatch.triton is None, reason="Triton is made for Linux only")


@pytest.fixture
def interpreted(monkeypatch):
    """CPU tensors go through the Triton kernels; memory that nobody has written holds NaN."""
    monkeypatch.setenv("CMLAB_KERNELS", "interpret")
    assert dispatch.INTERPRETED
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["kernel", "operation"])
def by(request):
    """Runs a test with the Triton kernels, and with what the same operations do on a CPU."""
    if request.param == "kernel":
        request.getfixturevalue("interpreted")
    return request.param


def off(got: torch.Tensor, right: torch.Tensor) -> float:
    """The relative error, of a tensor that should be zero the absolute one."""
    assert got.isfinite().all()
    size = float(right.norm())
    return float((got.double() - right).norm()) / (size if size > 1e-9 else 1.0)


def results(function, inputs, towards, dtype) -> list[torch.Tensor]:
    """Outputs and gradients of a function at these inputs in a precision; None stays None."""
    given_ = [None if x is None else x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    outputs = function(*given_)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [t.to(dtype) for t in towards])
    return [o.detach() for o in outputs] + [x.grad for x in given_ if x is not None]


# --- group_norm_silu --------------------------------------------------------------------------------------------------


def norm_case(shape, dtype, last, adaptive, seed=0, mean=1.0):
    x = mean + 2 * draws(*shape, seed=seed).to(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    pair = [(0.5 * draws(*shape[:2], seed=seed + k)).to(dtype) if adaptive else None for k in (1, 2)]
    weight, bias = ((1 + 0.5 * draws(shape[1], seed=seed + k)).to(dtype) for k in (3, 4))
    return [x, weight, bias, *pair], [draws(*shape, seed=seed + 5).to(dtype)]


def by_operation(x, weight, bias, scale, shift, groups=32):
    return torch.ops.cmlab.group_norm_silu(x, weight, bias, scale, shift, groups, 1e-5)[0]


def by_function(x, weight, bias, scale, shift, groups=32):
    return kernels.group_norm_silu(x, weight, bias, groups, scale=scale, shift=shift)


def by_reference(x, weight, bias, scale, shift, groups=32):
    return norm.reference(x, weight, bias, groups, scale=scale, shift=shift)


@EVERY
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 64, 5, 7), (1, 96, 8, 8)], ids=str)
def test_group_norm_silu_and_its_gradients_are_those_of_float64(by, shape, last, adaptive, dtype):
    inputs, towards = norm_case(shape, dtype, last, adaptive)
    got = results(by_operation, inputs, towards, dtype)
    right = results(by_reference, inputs, towards, torch.float64)
    assert all(off(a, b) < 2 * ROUNDING[dtype] for a, b in zip(got, right, strict=True))
    assert got[0].dtype == dtype and got[0].stride() == inputs[0].stride()


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels-last"])
def test_a_group_that_no_program_can_hold_is_split(interpreted, monkeypatch, last):
    monkeypatch.setattr(norm, "groups_at_once", lambda *_: 0)
    monkeypatch.setattr(tiles, "PROGRAMS", 64)
    inputs, towards = norm_case((2, 4, 50, 50), torch.float32, last, True)
    got = results(lambda *a: by_function(*a, groups=2), inputs, towards, torch.float32)
    right = results(lambda *a: by_reference(*a, groups=2), inputs, towards, torch.float64)
    assert tiles.Tiles(inputs[0]).splits > 1
    assert all(off(a, b) < 2e-6 for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize(
    ("shape", "last", "at_once"),
    [
        ((16, 192, 64, 64), False, 1),
        ((16, 192, 64, 64), True, 4),  # 128 programs, 48 bytes side by side
        ((64, 192, 64, 64), True, 16),
        ((1, 192, 64, 64), False, 0),  # 32 programs do not fill a GPU
        ((8, 192, 64, 64), True, 0),  # 24 bytes are less than memory gives at once
        ((1, 768, 8, 8), True, 1),  # so small that one launch is what counts
        ((4, 128, 32, 32), True, 1),  # likewise, in crumbs or not
        ((64, 64, 64, 64), True, 16),
        ((16, 6400, 8, 8), False, 0),  # no tile holds a group's 200 channels
    ],
)
def test_programs_take_as_many_groups_as_leave_a_gpu_filled(shape, last, at_once):
    x = torch.empty(shape, dtype=torch.bfloat16)
    assert tiles.groups_at_once(x.to(memory_format=torch.channels_last) if last else x, 32) == at_once


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels-last"])
def test_a_program_may_take_several_groups_and_several_tiles(interpreted, monkeypatch, last):
    monkeypatch.setattr(norm, "groups_at_once", lambda *_: 4)
    inputs, towards = norm_case((2, 30, 33, 32), torch.float32, last, True)  # 10 groups: two for the last program
    blocks = tiles.whole_group_blocks(inputs[0], 10, 4)
    assert blocks["BLOCK_P"] < 33 * 32 and blocks["BLOCK_C"] == 16
    got = results(lambda *a: by_function(*a, groups=10), inputs, towards, torch.float32)
    right = results(lambda *a: by_reference(*a, groups=10), inputs, towards, torch.float64)
    assert all(off(a, b) < 2e-6 for a, b in zip(got, right, strict=True))


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    each=st.integers(1, 5),
    groups=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    last=st.booleans(),
)
def test_group_norm_silu_takes_every_shape(batch, each, groups, height, width, last):
    inputs, _ = norm_case((batch, each * groups, height, width), torch.float32, last, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMLAB_KERNELS", "interpret")
        got = by_function(*inputs, groups=groups)
    right = by_reference(*(x.double() for x in inputs), groups=groups)
    single = each * height * width == 1  # a group of one element is its own mean: all rounding
    assert off(got, right) < (1e-3 if single else 2e-6)


def test_a_mean_far_from_zero_costs_no_accuracy(interpreted, monkeypatch):
    """Sums of squares would lose everything at a mean of 1000 deviations."""
    for at_once in (1, 0):
        monkeypatch.setattr(norm, "groups_at_once", lambda *_, at_once=at_once: at_once)
        inputs, _ = norm_case((1, 4, 16, 16), torch.float32, False, False, mean=2000.0)
        right = by_reference(*(None if x is None else x.double() for x in inputs), groups=2)
        assert off(by_function(*inputs, groups=2), right) < 1e-4


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_group_norm_silu_is_one_operation_to_torch_compile(interpreted, compiled):
    inputs, towards = norm_case((2, 32, 4, 4), torch.float32, False, True)

    def around(*given_):
        return by_function(*given_).mul(2)

    function = torch.compile(around, fullgraph=True, backend="aot_eager") if compiled else around
    got = results(function, inputs, towards, torch.float32)
    right = results(lambda *a: by_reference(*a).mul(2), inputs, towards, torch.float64)
    assert all(off(a, b) < 2e-6 for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(groups=5), "groups must divide the channels"),
        (dict(weight=torch.ones(3)), "weight must have shape"),
        (dict(scale=torch.ones(2, 8)), "scale and shift come together"),
        (dict(scale=torch.ones(8), shift=torch.ones(8)), "scale must have shape"),
    ],
)
def test_group_norm_silu_refuses_what_does_not_fit(change, message):
    call = dict(x=torch.ones(2, 8, 3, 3), weight=torch.ones(8), bias=torch.ones(8), groups=4) | change
    with pytest.raises(ValueError, match=message):
        kernels.group_norm_silu(**call)


# --- jvp_attention ----------------------------------------------------------------------------------------------------


def attention_case(shape, dtype, seed=0):
    return [draws(*shape, seed=seed + k).to(dtype) for k in range(6)], [
        draws(*shape, seed=seed + k).to(dtype) for k in (6, 7)
    ]


@EVERY
@pytest.mark.parametrize("shape", [(1, 2, 70, 24), (2, 1, 33, 80), (1, 1, 128, 16), (1, 3, 1, 8)], ids=str)
def test_jvp_attention_and_its_gradients_are_those_of_float64(by, shape, dtype):
    inputs, towards = attention_case(shape, dtype)
    got = results(lambda *a: torch.ops.cmlab.jvp_attention(*a)[:2], inputs, towards, dtype)
    right = results(jvp.reference, inputs, towards, torch.float64)
    for k, (a, b) in enumerate(zip(got, right, strict=True)):
        if shape[2] == 1 and k in (
            2,
            3,
            5,
            6,
        ):  # one token attends to itself: the gradients of q, k and their tangents are 0
            assert b.abs().max() < 1e-12 and a.abs().max() < 50 * ROUNDING[dtype]
        else:
            assert off(a, b) < 2 * ROUNDING[dtype]


def test_the_tangent_is_the_one_that_forward_mode_finds():
    """PyTorch's quadratic attention, differentiated by PyTorch."""
    (q, k, v, *tangents), _ = attention_case((2, 2, 19, 8), torch.float64)

    def quadratic(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)

    out, tangent = torch.func.jvp(quadratic, (q, k, v), tuple(tangents))
    got = kernels.jvp_attention(q, k, v, *tangents)
    assert torch.allclose(got[0], out) and torch.allclose(got[1], tangent)


def test_attention_carries_tangents_where_they_are_asked_for(by):
    (q, k, v, tangent_q, *_), _ = attention_case((1, 2, 20, 16), torch.float32)
    out, tangent = torch.func.jvp(lambda q: kernels.attention(q, k, v), (q,), (tangent_q,))
    none = torch.zeros_like(q)
    right = jvp.reference(*(x.double() for x in (q, k, v, tangent_q, none, none)))
    assert off(out, right[0]) < 1e-6 and off(tangent, right[1]) < 1e-6
    assert torch.allclose(kernels.attention(q, k, v), out, atol=1e-6)


def test_jvp_attention_is_one_operation_to_torch_compile(interpreted):
    inputs, towards = attention_case((1, 1, 20, 16), torch.float32)
    got = results(
        torch.compile(kernels.jvp_attention, fullgraph=True, backend="aot_eager"), inputs, towards, torch.float32
    )
    right = results(jvp.reference, inputs, towards, torch.float64)
    assert all(off(a, b) < 2e-6 for a, b in zip(got, right, strict=True))


def test_jvp_attention_refuses_what_does_not_fit():
    q = torch.ones(1, 1, 4, 8)
    with pytest.raises(ValueError, match="tangent_v must have shape"):
        kernels.jvp_attention(q, q, q, q, q, q[:, :, :2])
    with pytest.raises(ValueError, match=r"q must have shape \(B, heads"):
        kernels.jvp_attention(*[q[0]] * 6)


# --- fused_step -------------------------------------------------------------------------------------------------------


def step_case(shape=(3, 3, 5, 7), dtype=torch.float32):
    output = (2 * draws(*shape, seed=1)).to(dtype)
    numbers = dict(scalings=(draws(shape[0], seed=2), 0.3), keep=0.2, add=draws(shape[0], seed=3).abs())
    return draws(*shape), output, numbers, torch.tensor([1, 2**40 + 3, 7])[: shape[0]]


@EVERY
@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 1), (1, 4, 33, 33)], ids=str)
def test_fused_step_does_what_it_says(interpreted, shape, clip, dtype):
    x, output, numbers, seeds = step_case(shape, dtype)
    got = kernels.fused_step(x, output, **numbers, seeds=seeds, draw=4, clip_denoised=clip)

    def each(v):
        return torch.as_tensor(v).double().expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))

    denoised = each(numbers["scalings"][0]) * x + each(numbers["scalings"][1]) * output.double()
    denoised = denoised.clamp(-1, 1) if clip else denoised
    noise = kernels.normal(x.shape, seeds, draw=4).double()
    right = each(numbers["keep"]) * x + (1 - each(numbers["keep"])) * denoised + each(numbers["add"]) * noise
    assert off(got, right) < 1e-6


def test_the_kernel_and_its_reference_draw_the_same_noise(monkeypatch):
    shape, seeds = (3, 2, 9, 5), torch.tensor([0, 5, 2**62 + 1])
    plain = kernels.normal(shape, seeds, draw=3)
    monkeypatch.setenv("CMLAB_KERNELS", "interpret")
    assert torch.allclose(kernels.normal(shape, seeds, draw=3), plain, atol=2e-6)  # another sine and logarithm


def test_the_generator_is_philox():
    """The known answers of Random123 (kat_vectors, philox 4x32 10)."""
    ones = 2**32 - 1
    for key, counter, right in ((0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),):
        assert tuple(int(w) for w in step.philox(torch.tensor([key]), torch.tensor([counter]), 0)) == right
    high, low = step._product(torch.tensor([ones]), ones)
    assert (int(high) << 32) + int(low) == ones * ones


def test_the_noise_of_a_sample_depends_on_its_seed_and_the_draw_alone():
    together = kernels.normal((3, 2, 4), torch.tensor([5, 6, 7]), draw=1)
    assert torch.equal(together[1:2], kernels.normal((1, 2, 4), torch.tensor([6]), draw=1))
    assert not torch.allclose(together[0], together[1])
    assert not torch.allclose(together, kernels.normal((3, 2, 4), torch.tensor([5, 6, 7]), draw=2))


def test_the_noise_is_standard_normal():
    noise = kernels.normal((50, 4001), torch.arange(50))
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert noise.corrcoef().fill_diagonal_(0).abs().max() < 0.08  # five standard deviations of 4,001 pairs


def test_gradients_pass_through_a_step(by):
    x, output, numbers, seeds = step_case()
    values = (*numbers["scalings"], numbers["keep"], numbers["add"])
    coefficients = torch.stack([step._of_each("", v, x) for v in values])
    towards = [draws(*x.shape, seed=9)]
    got = results(
        lambda x, o: torch.ops.cmlab.fused_step(x, o, coefficients, seeds, 2, True), [x, output], towards, torch.float32
    )
    right = results(
        lambda x, o: step.reference(x, o, coefficients, seeds, 2, True), [x, output], towards, torch.float32
    )
    assert all(off(a, b) < 1e-6 for a, b in zip(got, right, strict=True))


def test_noise_without_seeds_is_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="seeds are needed to add noise"):
        kernels.fused_step(x, x, (1.0, 1.0), add=0.5)
    with pytest.raises(ValueError, match="seeds must have shape"):
        kernels.fused_step(x, x, (1.0, 1.0), add=0.5, seeds=torch.tensor([1]))
    with pytest.raises(ValueError, match="seeds must be int64 on cpu, got torch.int32"):
        kernels.fused_step(x, x, (1.0, 1.0), add=0.5, seeds=torch.tensor([1, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="keep must be a number or have 2 elements, got 3"):
        kernels.fused_step(x, x, (1.0, 1.0), keep=torch.ones(3))


def test_seeds_need_not_lie_side_by_side(interpreted):
    seeds = torch.tensor([5, 0, 6, 0])[::2]
    assert torch.equal(kernels.normal((2, 3, 4), seeds), kernels.normal((2, 3, 4), torch.tensor([5, 6])))


def test_the_reference_of_attention_stays_in_float32_under_autocast():
    inputs, _ = attention_case((1, 2, 20, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernels.jvp_attention(*inputs)
    assert off(got[1], jvp.reference(*(x.double() for x in inputs))[1]) < 1e-6


# --- together ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unet():
    torch.manual_seed(0)
    net = UNet(**SMALL_UNET)
    for parameter in net.parameters():  # the last layers start at zero: nothing would be seen through them
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


def test_a_unet_draws_the_same_picture_with_kernels_on_and_off(unet, monkeypatch):
    model, noise, labels = ConsistencyModel(unet), draws(1, 3, 8, 8), torch.tensor([1])
    monkeypatch.setenv("CMLAB_KERNELS", "0")
    plain = model(80 * noise, 80.0, labels)
    monkeypatch.setenv("CMLAB_KERNELS", "interpret")
    launch, launched = norm._launch_forward, []
    monkeypatch.setattr(norm, "_launch_forward", lambda *given: launched.append(1) or launch(*given))
    assert torch.allclose(model(80 * noise, 80.0, labels), plain, atol=1e-5)
    assert len(launched) == 1 + 2 * sum(isinstance(layer, ResBlock) for layer in unet.modules())


def test_a_unet_can_be_differentiated_forwards(unet):
    """As continuous time needs it: through norms, attention and resampling, against central differences."""
    model, x, labels = Denoiser(unet.double()), draws(1, 3, 8, 8).double(), torch.tensor([2])
    along = draws(1, 3, 8, 8, seed=1).double()
    _, got = torch.func.jvp(lambda x: model(x, 0.5, labels), (x,), (along,))
    by_differences = (model(x + 1e-4 * along, 0.5, labels) - model(x - 1e-4 * along, 0.5, labels)) / 2e-4
    assert torch.allclose(got, by_differences, atol=1e-5)


NORM_INPUTS = (draws(2, 32, 4, 4).requires_grad_(), draws(32, seed=1).requires_grad_(), draws(32), None, None, 32, 1e-5)
OPERATIONS = {
    "group_norm_silu": NORM_INPUTS,
    "jvp_attention": tuple(draws(1, 1, 17, 16, seed=k).requires_grad_() for k in range(6)),
    "fused_step": (draws(2, 5).requires_grad_(), draws(2, 5, seed=1), draws(4, 2), torch.tensor([1, 2]), 0, True),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_torch_finds_the_operations_well_registered(by, operation):
    """Schema, gradient, fake tensors and tracing: torch.library's own check."""
    torch.library.opcheck(getattr(torch.ops.cmlab, operation).default, OPERATIONS[operation])


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("CMLAB_KERNELS", "off")
    with pytest.raises(ValueError, match="unknown CMLAB_KERNELS 'off'"):
        kernels.group_norm_silu(torch.ones(1, 2, 3, 3), torch.ones(2), torch.ones(2), groups=2)


@pytest.mark.parametrize(("interpreted_by_triton", "launched"), [(True, False), (False, True)])
def test_where_triton_interprets_a_gpu_keeps_to_pytorch(monkeypatch, interpreted_by_triton, launched):
    """Else a test run on a machine with a GPU would send every picture through the interpreter."""
    monkeypatch.setattr(dispatch, "INTERPRETED", interpreted_by_triton)
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32)
    assert dispatch.enabled(on_gpu) is launched


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_are_right_on_a_gpu():
    """In a process of its own, whose Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CMLAB_KERNELS")}
    script = Path(__file__).with_name("kernels_on_gpu.py")
    run = subprocess.run([sys.executable, "-W", "ignore", script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]


COMPILING = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sys.path.insert(0, "tests")
from kernel_signatures import SIGNATURES
for kernel, kinds, constants in SIGNATURES:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else k for n, k in zip(names, [*kinds, *[None] * len(constants)])}
    binary = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", int(sys.argv[1]), 32))
    print(len(binary.asm["cubin"]), binary.metadata.shared)
"""


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_kernels_compile_for_ampere_and_hopper(dtype, tmp_path):
    """Triton's own compiler and the ptxas that comes with it need no GPU."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CMLAB_KERNELS")}
    env |= dict(TRITON_CACHE_DIR=str(tmp_path), KERNEL_DTYPE=dtype)
    shared_memory = {"80": 163 * 1024, "90": 227 * 1024}  # a multiprocessor's, bytes
    command = [sys.executable, "-W", "ignore", "-c", COMPILING]
    pipes = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    runs = [subprocess.Popen([*command, capability], **pipes) for capability in shared_memory]  # side by side
    for run, most in zip(runs, shared_memory.values(), strict=True):
        out, errors = run.communicate()
        assert run.returncode == 0, errors[-3000:]
        made = [[int(number) for number in line.split()] for line in out.splitlines()]
        assert len(made) == 10 and all(size > 1000 and shared <= most for size, shared in made)
