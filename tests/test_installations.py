"""installations.sh itself, on machines made of small programs on PATH: a driver, a toolkit, a disk, an interpreter.

The fake interpreter notes what pip is asked for and leaves importable stand-ins for torch and torchvision behind, so
the script's own checks (versions, imports, reaching the GPU) run for real. One test uses the real pip on a closed port.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PYTORCH = "https://download.pytorch.org/whl"
TOOLS = "awk bash cat cksum cp dirname git grep head ln mkdir mktemp rm sed sort touch tr".split()

PYTHON = f"""#!/bin/bash
# An interpreter: `-m venv` and `-m pip` are played, everything else is a real Python that sees only $site.
here=$(cd "$(dirname "$0")" && pwd)
site=${{here%/bin}}/site
case "$*" in
    --version) echo "Python ${{FAKE_PYTHON:-3.11.7}}" ;;
    *sys.prefix*) echo "${{here%/bin}}" ;;
    "-m venv"*) echo "$*" >>"$STATE/venv"; mkdir -p .venv/bin .venv/site; cp "$0" .venv/bin/python ;;
    "-m pip --version") ;;
    "-m pip install"*)
        echo "$*" >>"$STATE/pip"
        if [ -n "${{FAKE_PIP_ERROR:-}}" ]; then
            while [ "$1" != --log ]; do shift; done
            echo "ERROR: $FAKE_PIP_ERROR" | tee -a "$2" >&2
            exit 1
        fi
        "{Path(sys.executable).resolve()}" -S "$STATE/install.py" "$site" "$@" ;;
    *) PYTHONPATH=$site:$STATE/only_pip:$STATE/editable exec "{Path(sys.executable).resolve()}" -S "$@" ;;
esac
"""

INSTALL = '''
"""What a pip install leaves behind: a module and its metadata."""
import re, shutil, sys
from pathlib import Path

site = Path(sys.argv[1])
site.mkdir(exist_ok=True)


def leave(name, version, requires=(), source=None):
    for old in site.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    (folder / "METADATA").write_text("\\n".join(lines) + "\\n\\n")
    if source is not None:
        (site / f"{name}.py").write_text(source)


TORCH = """
import os
__version__ = "{}"
class ones:
    def __init__(self, count, device="cpu"):
        if device == "cuda" and not os.environ.get("GPU_IN_REACH"):
            raise RuntimeError("no GPU in reach")
    def add(self, other): return self
    def cpu(self): return self
"""
for argument in sys.argv[2:]:
    if found := re.match(r"(torch|torchvision)(?:==(.*)|>=.*)$", argument):
        name, version = found[1], found[2] or {"torch": "2.15.0", "torchvision": "0.29.2"}[found[1]]
        leave(name, version, source=TORCH.format(version) if name == "torch" else "")
    if argument == ".[test]":
        leave("cmlab", "0.1.0", ["torch>=2", "torchvision", "tqdm"])
        leave("tqdm", "4.70")
'''

SMI = """#!/bin/bash
case "$*" in
    *compute_cap*) printf '%s\\n' {capability} ;;
    *) cat <<'TABLE'
+-----------------------------------------------------------------------------+
| NVIDIA-SMI 470.57       Driver Version: 470.57       {line} |
|-------------------------------+----------------------+----------------------+
TABLE
esac
"""

NVCC = """#!/bin/bash
echo "nvcc: NVIDIA (R) Cuda compiler driver"
echo "Cuda compilation tools, release {0}, V{0}.89"
"""


class Machine:
    """A clone of the repository and a PATH that holds nothing but what the test puts there."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.clone = folder, folder / "bin", folder / "clone"
        for path in (self.bin, self.clone / "cmlab"):
            path.mkdir(parents=True)
        for name in ("installations.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.clone)
        (self.clone / "cmlab" / "__init__.py").touch()
        (folder / "install.py").write_text(INSTALL)
        (folder / "editable").symlink_to(self.clone)
        (folder / "only_pip").mkdir()
        # Found without importing it: pip takes setuptools' distutils away from all that is imported later.
        (folder / "only_pip" / "pip").symlink_to(distribution("pip").locate_file("pip"))
        for tool in TOOLS + ["tee"]:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.program("python3", PYTHON)
        self.program("uname", "#!/bin/bash\necho Linux\n")
        self.program("curl", '#!/bin/bash\ncase "$*" in *${DEAD:-nothing}*) exit 28 ;; esac\n')
        self.free_gb(100)

    def program(self, name: str, text: str):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def driver(self, cuda: str | None, capability: str = "8.6"):
        line = f"CUDA Version: {cuda}" if cuda else "CUDA Version: N/A "
        self.program("nvidia-smi", SMI.format(line=line, capability=capability))

    def free_gb(self, count: int):
        self.program(
            "df", f"#!/bin/bash\necho Filesystem 1024-blocks Used Available\necho disk 0 0 {count * 1048576}\n"
        )

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(self.bin), "STATE": str(self.folder), "HOME": str(self.folder), **environment}
        command = [shutil.which("bash"), "installations.sh", *options]
        return subprocess.run(command, cwd=self.clone, env=environment, capture_output=True, text=True, timeout=120)

    def install(self, *options: str, **environment: str) -> str:
        done = self.run(*options, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refuse(self, *options: str, **environment: str) -> str:
        """The one line that a failing run ends with."""
        done = self.run(*options, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr.splitlines()[-1]

    def noted(self, kind: str) -> list[str]:
        path = self.folder / kind
        return path.read_text().splitlines() if path.exists() else []

    @property
    def torch_call(self) -> str:
        calls = [call for call in self.noted("pip") if " torch" in call]
        assert len(calls) == 1, calls
        return calls[0]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


# ---- which torch build


@pytest.mark.parametrize(
    "cuda, index, torch, torchvision",
    [
        ("11.4", "cu118", "torch==2.7.1", "torchvision==0.22.1"),
        ("11.8", "cu118", "torch==2.7.1", "torchvision==0.22.1"),
        ("12.1", "cu118", "torch==2.7.1", "torchvision==0.22.1"),
        ("12.4", "cu124", "torch==2.6.0", "torchvision==0.21.0"),
        ("12.6", "cu126", "torch>=2.6,<3", "torchvision>=0.21,<1"),
        ("12.8", "cu128", "torch==2.11.0", "torchvision==0.26.0"),
        ("13.0", "cu130", "torch>=2.6,<3", "torchvision>=0.21,<1"),
        ("14.1", "cu132", "torch>=2.6,<3", "torchvision>=0.21,<1"),
    ],
)
def test_the_drivers_cuda_version_decides_the_build(machine, cuda, index, torch, torchvision):
    machine.driver(cuda)
    reason = f"the newest build for a driver that runs CUDA up to {cuda}"
    assert f"{torch} {torchvision} from {PYTORCH}/{index}: {reason}\n" in machine.install("--plan")


def test_pip_gets_torch_and_torchvision_together_and_leaves_them_alone_later(machine):
    machine.driver("11.4")
    machine.install(GPU_IN_REACH="1")
    first, second = machine.noted("pip")
    assert first.endswith(f" torch==2.7.1 torchvision==0.22.1 --index-url {PYTORCH}/cu118")
    assert "--editable .[test]" in second and "--constraint" in second and "torch" not in second


def test_without_a_driver_the_cpu_wheels_are_taken(machine):
    said = machine.install()
    assert machine.torch_call.endswith(f"--index-url {PYTORCH}/cpu")
    assert "neither nvidia-smi nor nvcc" in said and "no usable NVIDIA GPU" in said


def test_a_toolkit_without_a_driver_is_no_gpu(machine):
    machine.program("nvcc", NVCC.format("11.8"))
    said = machine.install("--plan")
    assert "nvcc has CUDA 11.8, but there is no nvidia-smi" in said and f"from {PYTORCH}/cpu" in said


def test_the_driver_limits_and_not_the_toolkit(machine):
    machine.driver("11.4")
    machine.program("nvcc", NVCC.format("12.4"))
    assert f"from {PYTORCH}/cu118" in machine.install("--plan")


def test_a_driver_that_does_not_tell_its_version_is_taken_for_the_toolkits(machine):
    machine.driver(None)
    machine.program("nvcc", NVCC.format("12.4"))
    said = machine.install("--plan")
    assert "CUDA 12.4 is assumed (that of nvcc)" in said and f"from {PYTORCH}/cu124" in said


def test_a_broken_driver_is_no_gpu(machine):
    machine.program("nvidia-smi", "#!/bin/bash\necho couldn\\'t communicate with the NVIDIA driver\nexit 9\n")
    said = machine.install("--plan")
    assert "finds no working driver" in said and f"from {PYTORCH}/cpu" in said


def test_a_driver_older_than_every_build_means_the_cpu(machine):
    machine.driver("10.2")
    said = machine.install("--plan")
    assert "no torch build runs under a driver of CUDA 10.2" in said and f"from {PYTORCH}/cpu" in said


def test_a_gpu_before_turing_gets_the_last_cuda_line_that_knows_it(machine):
    machine.driver("13.0", capability="8.6 5.2")
    said = machine.install("--plan")
    assert f"from {PYTORCH}/cu126: the last CUDA line with code for a GPU of compute capability 5.2" in said


def test_the_override_wins_over_the_driver(machine):
    machine.driver("12.8")
    said = machine.install(TORCH_INDEX_URL="https://mirror.example/torch")
    assert machine.torch_call.endswith("--index-url https://mirror.example/torch")
    assert "TORCH_INDEX_URL says so" in said


def test_a_torch_that_cannot_reach_the_gpu_is_reported(machine):
    machine.driver("12.4")
    assert "cannot reach it and will run on the CPU" in machine.install()


# ---- indexes that do not answer


def test_a_silent_cpu_index_means_the_package_indexs_build(machine):
    said = machine.install(DEAD=f"{PYTORCH}/cpu")
    assert "--index-url" not in machine.torch_call
    assert "from the package index" in said and f"{PYTORCH}/cpu does not answer within seconds" in said


def test_a_silent_cuda_index_ends_the_run_where_no_other_build_would_do(machine):
    machine.driver("12.4")
    line = machine.refuse(DEAD=PYTORCH)
    assert line.startswith("error: ") and "cu124 does not answer" in line and "TORCH_INDEX_URL" in line
    assert machine.noted("pip") == []


def test_a_silent_cuda_index_does_not_matter_under_a_new_driver(machine):
    machine.driver("13.0")
    machine.install(DEAD=PYTORCH)
    assert "--index-url" not in machine.torch_call


def test_a_silent_override_is_named(machine):
    line = machine.refuse(TORCH_INDEX_URL="https://mirror.example/x", DEAD="mirror.example")
    assert line == "error: TORCH_INDEX_URL=https://mirror.example/x does not answer; check the address and the network"


def test_an_unreachable_package_index_ends_in_one_clear_line(machine):
    """The real interpreter and the real pip, against a port where nobody listens."""
    closed = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "DEAD": PYTORCH}
    line = machine.refuse(PYTHON=str(Path(sys.executable).resolve()), **closed)
    assert line.startswith("error: the package index does not answer")


# ---- other things that go wrong


def test_a_full_disk_is_noticed_before_anything_is_installed(machine):
    machine.free_gb(1)
    line = machine.refuse()
    assert line.startswith("error: disk full: the installation needs 3 GB, 1 GB are free in ")
    assert machine.noted("pip") == [] and machine.noted("venv") == []


def test_a_cuda_build_asks_for_more_disk(machine):
    machine.driver("12.8")
    machine.free_gb(5)
    assert "needs 8 GB, 5 GB are free" in machine.refuse()


def test_the_disk_to_insist_on_can_be_set(machine):
    assert "needs 1000 GB, 100 GB are free" in machine.refuse(CMLAB_NEED_GB="1000")


def test_a_disk_that_fills_up_under_pip_is_named(machine):
    line = machine.refuse(FAKE_PIP_ERROR="Could not install packages: [Errno 28] No space left on device")
    assert line.startswith("error: disk full: pip ran out of space")


def test_a_python_too_new_for_the_driver_is_told_what_to_use(machine):
    machine.driver("11.4")
    line = machine.refuse(FAKE_PYTHON="3.14.1", FAKE_PIP_ERROR="No matching distribution found for torch==2.7.1")
    assert "cu118 has no fitting build for Python 3.14" in line and "PYTHON=python3.12" in line


@pytest.mark.parametrize("old", ["2.7.18", "3.8.10", "3.9.19"])
def test_a_python_too_old_is_refused(machine, old):
    line = machine.refuse(FAKE_PYTHON=old)
    assert f"python3 is Python {old.rpartition('.')[0]}, too old: cmlab needs Python 3.10 or newer" in line
    assert machine.noted("venv") == []


def test_a_machine_without_python_is_told_so(machine):
    (machine.bin / "python3").unlink()
    assert machine.refuse().startswith("error: no python3 found")


def test_an_unknown_option_names_the_known_ones(machine):
    assert machine.refuse("--sytem") == (
        "error: unknown option --sytem; known: --system, --with-reference, --plan, --help"
    )


# ---- what is there already


def test_a_second_run_installs_nothing(machine):
    machine.install()
    before = machine.noted("pip"), machine.noted("venv")
    assert "nothing to install" in machine.install(DEAD="http")
    assert (machine.noted("pip"), machine.noted("venv")) == before


def test_a_second_run_repairs_what_is_missing(machine):
    machine.install()
    shutil.rmtree(machine.clone / ".venv/site/tqdm-4.70.dist-info")
    machine.install()
    assert sum("--editable" in call for call in machine.noted("pip")) == 2
    assert machine.torch_call


def test_a_changed_pyproject_is_installed_again(machine):
    machine.install()
    with open(machine.clone / "pyproject.toml", "a") as file:
        file.write("# another bound\n")
    machine.install()
    assert sum("--editable" in call for call in machine.noted("pip")) == 2


def test_a_broken_environment_is_made_anew(machine):
    machine.install()
    (machine.clone / ".venv/bin/python").unlink()
    machine.install()
    assert len(machine.noted("venv")) == 2


def test_another_python_makes_the_environment_anew(machine):
    machine.install()
    machine.program("python3.12", PYTHON.replace("FAKE_PYTHON:-3.11.7", "FAKE_PYTHON:-3.12.1"))
    assert "Python   3.12, in .venv" in machine.install(PYTHON="python3.12")
    assert len(machine.noted("venv")) == 2
    assert "nothing to install" in machine.install()


def test_a_new_driver_brings_a_new_torch(machine):
    machine.install()
    machine.driver("12.4")
    machine.install()
    assert "--force-reinstall" in machine.noted("pip")[2] and machine.noted("pip")[2].count("cu124") == 1


def lay_out_torch(machine: Machine, torch: str, torchvision: str):
    """What a Gradient or Colab machine comes with."""
    subprocess.run(
        [sys.executable, machine.folder / "install.py", machine.folder / "site", torch, torchvision], check=True
    )


def test_system_uses_the_current_interpreter_and_its_working_torch(machine):
    machine.driver("12.4")
    lay_out_torch(machine, "torch==2.6.0+cu124", "torchvision==0.21.0+cu124")
    said = machine.install("--system", GPU_IN_REACH="1")
    assert "2.6.0+cu124 is there and works: kept" in said
    assert [" torch" in call for call in machine.noted("pip")] == [False]
    assert not (machine.clone / ".venv").exists()


def test_system_replaces_a_torch_below_the_bounds(machine):
    machine.driver("11.4")
    lay_out_torch(machine, "torch==1.13.1", "torchvision==0.14.1")
    machine.install("--system", GPU_IN_REACH="1")
    assert " torch==2.7.1 " in machine.torch_call and machine.torch_call.endswith("cu118 --force-reinstall")


# ---- options


def test_plan_tells_and_installs_nothing(machine):
    machine.driver("12.4")
    assert f"torch==2.6.0 torchvision==0.21.0 from {PYTORCH}/cu124" in machine.install("--plan")
    assert machine.noted("pip") == [] and not (machine.clone / ".venv").exists()


def test_plan_tells_that_a_working_torch_stays(machine):
    machine.install()
    assert "2.15.0 is there and works: kept" in machine.install("--plan")
    assert len(machine.noted("pip")) == 2


def test_the_reference_is_cloned_once_from_where_one_says(machine, tmp_path):
    source = tmp_path / "source"
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet", str(source)], check=True)
    (source / "setup.py").write_text("# the original\n")
    subprocess.run([*git, "add", "."], cwd=source, check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "original"], cwd=source, check=True)

    assert "cloned from" in machine.install("--with-reference", REFERENCE_URL=str(source))
    assert (machine.clone / "consistency_models/setup.py").exists()
    assert "consistency_models is there" in machine.install("--with-reference", REFERENCE_URL="/nowhere")


def test_a_reference_that_cannot_be_cloned_is_named(machine):
    line = machine.refuse("--with-reference", REFERENCE_URL="/nowhere")
    assert line.startswith("error: could not clone /nowhere")


def test_help_names_every_option_and_variable(machine):
    text = machine.install("--help")
    for word in "--system --with-reference --plan TORCH_INDEX_URL REFERENCE_URL PYTHON CMLAB_NEED_GB".split():
        assert word in text


# ---- one place for versions


def requirements() -> dict[str, Requirement]:
    texts = re.findall(r'^    "([a-zA-Z][^"]*[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return {Requirement(text).name: Requirement(text) for text in texts}


def test_every_build_of_the_table_is_within_the_bounds_of_pyproject():
    table = re.findall(r"^\d+\.\d+  cu\d+  ([\d.]+) +([\d.]+)$", (ROOT / "installations.sh").read_text(), re.MULTILINE)
    assert len(table) == 3
    for torch, torchvision in table:
        assert torch in requirements()["torch"].specifier
        assert torchvision in requirements()["torchvision"].specifier


def test_every_requirement_is_bounded_in_pyproject():
    assert len(requirements()) >= 25
    assert all(any(bound.operator == ">=" for bound in wanted.specifier) for wanted in requirements().values())


@pytest.mark.parametrize("name", ["environment.yml", "installations.sh", ".ci/run", ".pre-commit-config.yaml"])
def test_no_other_file_bounds_a_version(name):
    bounds = re.findall(r"[\w\]](?:[<>~!=]=|[<>])\d[\d.]*", (ROOT / name).read_text())
    assert bounds == []


def test_the_readmes_second_command_is_what_ci_runs():
    command = "bash installations.sh && .venv/bin/python -m pytest"
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci/run").read_text()
