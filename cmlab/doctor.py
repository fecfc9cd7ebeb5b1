"""`cmlab doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

SETUP = "run: bash installations.sh"


class Finding(NamedTuple):
    """One line of the report. state: ok, missing (optional) or BROKEN (required)."""

    state: str
    name: str
    value: str
    advice: str = ""


def examine() -> int:
    """Prints the findings; returns 1 if something required is missing or broken, else 0."""
    findings = [*_machine(), *_packages(), *_models(), *_optional()]
    width = max(len(f.name) for f in findings)
    for f in findings:
        print(f"{f.state:<8} {f.name:<{width}}  {f.value}")
        if f.advice:
            print(f"{'':<8} {'':<{width}}  -> {f.advice}")
    broken = [f.name for f in findings if f.state == "BROKEN"]
    print(f"not ready: {', '.join(broken)}" if broken else "ready: start with cmlab tour --fast, or cmlab tour --lab")
    return 1 if broken else 0


def _machine() -> Iterator[Finding]:
    old = sys.version_info < (3, 10)
    yield Finding(
        "BROKEN" if old else "ok", "Python", platform.python_version(), "Python 3.10 or newer is needed" * old
    )
    yield Finding("ok", "system", f"{platform.system()} {platform.machine()}")
    yield Finding("ok", "cores", _cores())
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        few = gigabytes < 4
        yield Finding(
            "missing" if few else "ok", "memory", f"{gigabytes:.1f} GB", "4 GB are comfortable for the lessons" * few
        )
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    full = free < 0.1
    yield Finding(
        "BROKEN" if full else "ok", "free disk here", f"{free:.1f} GB", "a tour writes up to 0.1 GB: make room" * full
    )


def _cores() -> str:
    try:
        from cmlab.prepare import usable_cores
    except Exception:  # a package is missing or broken: the next findings say which
        return str(os.cpu_count())
    return f"{usable_cores()} usable of {os.cpu_count()}"


def _packages() -> Iterator[Finding]:
    for name in required():
        found = _version(name)
        yield Finding("ok" if found else "BROKEN", name, found or "not installed", "" if found else SETUP)
    try:
        import torch
        import torchvision  # noqa: F401  (a torchvision of another build than torch's fails here)
    except Exception as error:
        yield Finding(
            "BROKEN", "torch imports", str(error).splitlines()[0], f"torch and torchvision do not fit; {SETUP}"
        )
        return
    yield Finding("ok", "CUDA build", torch.version.cuda or "none: a CPU build")
    yield Finding("ok", "threads", str(torch.get_num_threads()))
    yield _bf16(torch)
    yield _gpu(torch)


def _bf16(torch) -> Finding:
    from cmlab.run import multiplies

    fast = multiplies("bf16", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Finding("ok", "bfloat16", "used in training" if fast else "emulated here: training computes in float32")


def _gpu(torch) -> Finding:
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Finding("ok", "GPU", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GB")
    if shutil.which("nvidia-smi"):
        advice = (
            "nvidia-smi is there, but this torch cannot use a GPU: bash installations.sh --plan tells which build fits"
        )
        return Finding("missing", "GPU", "not usable", advice)
    return Finding(
        "missing", "GPU", "none: everything runs on the CPU", "nothing to do: the series is made for 2 CPU cores"
    )


def required() -> list[str]:
    """The packages that pyproject.toml names, as the installed cmlab tells; cmlab itself where it is not installed."""
    try:
        lines = requires("cmlab") or []
    except PackageNotFoundError:
        return ["cmlab"]
    wanted = map(Requirement, lines)
    return [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _models() -> Iterator[Finding]:
    """Every embedded model is read, whole."""
    try:
        from cmlab import checkpoints
    except Exception as error:
        yield Finding("BROKEN", "embedded models", str(error).splitlines()[0], SETUP)
        return
    for name in checkpoints.EMBEDDED:
        read = checkpoints.load_classifier if "classifier" in name else checkpoints.load
        try:
            model = read(name)
        except (ValueError, OSError) as error:
            yield Finding("BROKEN", name, str(error), f"bring the file back: git checkout cmlab/embedded/{name}")
        else:
            yield Finding("ok", name, f"{sum(p.numel() for p in model.parameters()):,} parameters, intact")


def _optional() -> Iterator[Finding]:
    yield _command("chromium", ["chromium", "chromium-browser", "google-chrome"], "CHROMIUM",
                   "only the browser tests need it: apt-get install chromium")  # fmt: skip
    for package, use in {
        "diffusers": "interoperation with diffusers", "myst-nb": "cmlab site", "sphinx-book-theme": "cmlab site",
    }.items():  # fmt: skip
        found = _version(package)
        yield Finding(
            "ok" if found else "missing",
            package,
            found or "not installed",
            "" if found else f"for {use}: pip install {package}",
        )
    yield _weights("inception weights", "FID on real images")
    yield _weights("lpips weights", "the LPIPS distance")
    clone = Path(__file__).parents[1] / "consistency_models"
    advice = "to compare with the original code in the tests: bash installations.sh --with-reference"
    there = (clone / "cm").is_dir()
    yield Finding(
        "ok" if there else "missing", "reference clone", str(clone) if there else "none", "" if there else advice
    )


def _command(name: str, programs: list[str], variable: str, advice: str) -> Finding:
    found = os.environ.get(variable) or next(filter(None, map(shutil.which, programs)), None)
    return Finding("ok" if found else "missing", name, found or "none", "" if found else advice)


def _weights(name: str, use: str) -> Finding:
    """Weights that libraries keep in torch's hub folder."""
    if importlib.util.find_spec("torch") is None:
        return Finding("missing", name, "no torch to keep them", SETUP)
    from cmlab import distances, extractors
    from cmlab.weights import hub_path

    address = {"inception weights": extractors.INCEPTION, "lpips weights": distances.BACKBONES["vgg"]}[name]
    path = hub_path(address)
    if path.exists():
        return Finding("ok", name, str(path))
    return Finding("missing", name, "not here", f"for {use}: fetch {address} and put it into {path.parent}")
