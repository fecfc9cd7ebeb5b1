"""The CUDA C++ twin of group_norm_silu: compiled for GPUs by nvcc, and run on the CPU by the machine's C++ compiler."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from toys import draws

from cmlab.kernels import norm, twin

SOURCE = "cuda_on_cpu.cpp"


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, request):
    """The kernel as a program for this CPU."""
    program = tmp_path_factory.mktemp("twin") / "norm"
    here = request.path.parent
    command = ["g++", "-std=c++20", "-O1", "-pthread", f"-I{twin.SOURCE.parent}", "-o", program, here / SOURCE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 3, 1, 1), (3, 12, 8, 8)], ids=str)
def test_the_twin_computes_the_same(on_cpu, shape, adaptive):
    groups, x = 3, 1 + 2 * draws(*shape)
    weight, bias = (draws(shape[1], seed=k) for k in (1, 2))
    pair = [draws(*shape[:2], seed=k) for k in (3, 4)] if adaptive else []
    header = torch.tensor([shape[0], groups, shape[1] // groups, shape[2] * shape[3], 1e-5, float(adaptive)])
    told = b"".join(t.numpy().tobytes() for t in (header, x, weight, bias, *pair))
    done = subprocess.run([on_cpu], input=told, capture_output=True, check=True)
    got = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).reshape(shape)
    right = norm.reference(x.double(), weight.double(), bias.double(), groups, 1e-5, *(t.double() for t in pair))
    assert torch.allclose(
        got.double(), right, atol=1e-2 if shape[2] == 1 else 1e-5
    )  # a group of one element is all rounding


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs NVIDIA's compiler")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_nvcc_compiles_the_twin_once(capability, tmp_path):
    path = twin.compiled(capability, tmp_path)
    assert hasattr(ctypes.CDLL(str(path)), "group_norm_silu_launch")  # loads without a GPU
    made = path.stat().st_mtime_ns
    assert twin.compiled(capability, tmp_path) == path and path.stat().st_mtime_ns == made
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_without_nvcc_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="nvcc is missing: install NVIDIA's CUDA toolkit"):
        twin.compiled((9, 0), tmp_path)


def test_tensors_elsewhere_than_on_a_gpu_are_refused():
    with pytest.raises(ValueError, match="x and all beside it must be on a GPU"):
        twin.group_norm_silu(torch.ones(1, 4, 2, 2), torch.ones(4), torch.ones(4), 2)
