"""Programs that tests start as a user would: the repository's scripts, and several ranks of one job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_script(script: Path, *options: str, without: tuple[str, ...] = (), **variables: str):
    """Runs one of the repository's scripts to its end, with this Python's cmlab on PATH and no variable of `without`."""
    kept = {key: value for key, value in os.environ.items() if key not in without}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run([script, *options], env=kept | {"PATH": path} | variables, capture_output=True, text=True)


def start_ranks(*command: str) -> subprocess.Popen:
    """Starts two ranks of `python …` under torchrun, a thread each; its outputs are pipes of text."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(torchrun, env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_ranks(*command: str) -> None:
    """Runs two ranks to their end; fails with all that they said, of which the cause is seldom the last."""
    job = start_ranks(*command)
    _, errors = job.communicate()
    assert job.returncode == 0, errors


CMLAB = ("-m", "cmlab.cli", "--")  # its options would be taken for torchrun's own
