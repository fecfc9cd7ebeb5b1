"""Every training script runs: three steps of a shrunken copy on synthetic pictures, by the path that the real training takes."""

import os
import re
from pathlib import Path

import pytest
from processes import run_script

from cmlab.recipes import RECIPES

HOME = Path(__file__).parents[1]
SCRIPTS = sorted(HOME.glob("scripts/train_*/*.sh"))
PUBLISHED = [name for name in RECIPES if name.endswith(("64", "256", "-l2", "-lpips"))]


def run(script, *options, **variables):
    threads = "1" if "PROCESSES" in variables else "2"
    return run_script(script, *options, without=("CMLAB_DATA",), **{"OMP_NUM_THREADS": threads} | variables)


def test_every_published_training_has_its_script():
    named = [re.search(r"^launch (\S+)", script.read_text(), re.M)[1] for script in SCRIPTS]
    assert len(SCRIPTS) == 12 and sorted(named) == sorted(PUBLISHED)
    assert all(os.access(script, os.X_OK) for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"{script.parent.name}-{script.stem}")
def test_a_script_trains_a_shrunken_copy(script, tmp_path):
    done = run(script, "--smoke", "--tracker", "none", OUTPUT=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert ": 3 steps of a shrunken copy ran" in done.stdout


def test_a_script_starts_several_processes(tmp_path):
    script = HOME / "scripts/train_cd/train_imagenet_l2.sh"
    done = run(script, "--smoke", PROCESSES="2", OUTPUT=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("3 steps of a shrunken copy ran") == 1, "one process speaks for both"
    assert "on each of 2 devices" in run(script, "--dry-run", PROCESSES="2", OUTPUT=str(tmp_path)).stdout


@pytest.mark.parametrize("processes", [{}, {"PROCESSES": "2"}], ids=["one", "two"])
def test_without_its_data_a_script_says_how_to_get_it(processes, tmp_path):
    script = HOME / "scripts/train_edm/train_lsun_bedroom.sh"
    done = run(script, **processes, CMLAB_DATA=str(tmp_path), OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert (
        "bedroom256 is not in" in done.stderr and "datasets/lsun_bedroom/fetch_lsun_bedroom.sh fetches" in done.stderr
    )


def test_a_script_plans(tmp_path):
    done = run(HOME / "scripts/train_ct/train_imagenet.sh", "--dry-run", OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 0 and "295,899,267" in done.stdout and not (tmp_path / "out").exists()


def test_a_number_of_processes_that_is_none_is_named(tmp_path):
    done = run(HOME / "scripts/train_ct/train_lsun_cat.sh", "--dry-run", PROCESSES="two", OUTPUT=str(tmp_path))
    assert done.returncode == 1 and done.stderr == "PROCESSES must be a whole number from 1 on, got two\n"
