"""What every test and notebook kernel sees: the CI size, two threads, no display; and nbval's numeric tolerance."""

import math
import os
import re
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("CMLAB_FAST", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is first imported

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.\d+(?:[eE][-+]?\d+)?(?![\w.])")


def pytest_addoption(parser):
    parser.addini("nbval_rtol", "relative tolerance of numbers in notebook outputs", default="0")
    parser.addini("nbval_atol", "absolute tolerance of numbers in notebook outputs", default="0")


def pytest_configure(config):
    quiet_kernels(config)
    tolerant_notebooks(float(config.getini("nbval_rtol")), float(config.getini("nbval_atol")))


def quiet_kernels(config):
    """ipykernel warns about unencrypted loopback traffic in each kernel; a profile of our own silences it."""
    if "IPYTHONDIR" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="ipython-"))
    profile = folder / "profile_default"
    profile.mkdir()
    (profile / "ipython_kernel_config.py").write_text('c.IPKernelApp.log_level = "ERROR"\n')
    os.environ["IPYTHONDIR"] = str(folder)
    config.add_cleanup(lambda: (os.environ.pop("IPYTHONDIR"), shutil.rmtree(folder, ignore_errors=True)))


def same_but_for_rounding(stored: str, now: str, rtol: float, atol: float) -> bool:
    """True when two texts differ in nothing but decimal numbers, and those agree within the tolerances."""
    if NUMBER.sub("0.0", stored) != NUMBER.sub("0.0", now):
        return False
    before, after = NUMBER.findall(stored), NUMBER.findall(now)
    return len(before) == len(after) and all(
        math.isclose(float(a), float(b), rel_tol=rtol, abs_tol=atol) for a, b in zip(before, after, strict=True)
    )


def tolerant_notebooks(rtol: float, atol: float):
    """Let nbval accept texts that are the same but for rounding: another CPU or torch prints another last digit."""
    from nbval.plugin import IPyNbCell

    compare = IPyNbCell.compare_outputs
    if hasattr(compare, "exactly"):  # pytest run twice in one process
        compare = compare.exactly

    def compare_outputs(cell, now, stored, *args, **kwargs):
        for ours, theirs in zip(now, stored, strict=False):
            if ours.output_type == theirs.output_type:
                adopt_rounding(cell, ours, theirs, rtol, atol)
        return compare(cell, now, stored, *args, **kwargs)

    compare_outputs.exactly = compare
    IPyNbCell.compare_outputs = compare_outputs


def adopt_rounding(cell, now, stored, rtol: float, atol: float):
    """Replace each text of one output by the stored one where only the rounding differs."""
    if now.output_type == "stream":
        texts = [(now, stored, "text")]
    else:
        mimes = set(now.get("data", {})) & set(stored.get("data", {}))
        texts = [(now.data, stored.data, mime) for mime in mimes if mime.startswith("text/")]
    for ours, theirs, key in texts:
        if same_but_for_rounding(cell.sanitize(theirs[key]), cell.sanitize(ours[key]), rtol, atol):
            ours[key] = theirs[key]
