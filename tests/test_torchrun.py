"""Two processes are one with the same global batch: run under torchrun with gloo, in processes of their own."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import CMLAB, run_ranks, start_ranks
from test_training import OBJECTIVES, SMALL, losses

from cmlab import checkpoints
from cmlab.data import load_data
from cmlab.run import Run, TrainingDiverged

NAMES = ["edm", "cd with a target network", "ct without a target network"]


def recipe_of(name):
    """Without dropout, of which every rank draws its own."""
    objective = OBJECTIVES.get(name, OBJECTIVES["ct with both curricula"])
    if name not in OBJECTIVES:
        objective = type(objective)(sigma_max=20.0, end=10, mu_0=0.0)
    return SMALL.replace(objective=objective, network=dict(SMALL.network, dropout=0.0))


# In parts that the ranks share out whole, dropout does not depend on them either.
IN_PARTS = SMALL.replace(micro_batches=4)


def trained(folder):
    """What every rank does: the losses of each recipe, how a broken gradient ends, and what is left at the end of all."""
    left = Path(folder, f"{os.environ['RANK']}.left")
    atexit.register(
        lambda: left.write_text(f"in a group: {torch.distributed.is_initialized()}")
    )  # the first comes last
    seen = {name: losses(recipe_of(name)) for name in NAMES}
    seen["in parts"] = losses(IN_PARTS)
    run = Run(SMALL, load_data("digits"), None, "cpu", 0)
    next(run.student.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    try:
        run.advance(None)
    except TrainingDiverged as error:
        seen["broken"] = str(error)
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    run_ranks(__file__, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_have_the_losses_of_one_process(ranks, name):
    alone = losses(recipe_of(name))
    for rank in ranks:
        assert rank[name] == pytest.approx(alone, rel=1e-5)


def test_micro_batches_have_the_same_dropout_on_any_number_of_ranks(ranks):
    for rank in ranks:
        assert rank["in parts"] == pytest.approx(losses(IN_PARTS), rel=1e-5)


def test_every_rank_leaves_the_group_before_its_interpreter_ends(ranks, folder):
    """Else threads of gloo are left running, and now and then abort it."""
    assert [(folder / f"{rank}.left").read_text() for rank in (0, 1)] == ["in a group: False"] * 2


def test_a_gradient_that_is_not_finite_stops_every_rank(ranks):
    assert all(rank["broken"].startswith("gradient is not finite at step 1; no checkpoint") for rank in ranks)


def training(folder):
    """The command that trains a small recipe, or goes on with it."""
    train = ["train", "moons-edm", "--iterations", "300", "--device", "cpu", "--save-every", "20", "--tracker", "none"]
    return [*CMLAB, *train, "--output", str(folder), "--resume", "auto"]


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def test_when_one_rank_is_killed_the_job_says_how_to_go_on_and_does(tmp_path):
    job = start_ranks(*training(tmp_path / "killed"))
    while job.poll() is None and saved_step(tmp_path / "killed") < 40:
        time.sleep(0.05)
    assert job.poll() is None, job.communicate()[1]
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    _, errors = job.communicate()
    assert job.returncode != 0 and "another process of this training has ended" in errors
    assert "start all of them again with --resume auto" in errors
    reached = saved_step(tmp_path / "killed")
    assert 40 <= reached < 300
    for folder in ("killed", "whole"):
        run_ranks(*training(tmp_path / folder))
    one, two = (checkpoints.load(tmp_path / folder / "model").net for folder in ("killed", "whole"))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def saved_step(folder):
    """The step of the last saved state; -1: none."""
    path = folder / "state.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else -1


if __name__ == "__main__":
    trained(sys.argv[1])
