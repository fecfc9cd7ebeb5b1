import re
import subprocess
import sys
from pathlib import Path


def test_the_network_benchmark_runs_and_both_sides_agree():
    """Times are for who reads them; what must hold is that the two networks compute the same."""
    script = Path(__file__).parents[1] / "benchmarks" / "unet.py"
    done = subprocess.run([sys.executable, script, "--small", "--rounds", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    apart = [float(number) for number in re.findall(r"outputs differ by (\S+) of their", done.stdout)]
    assert len(apart) == 2 and apart[0] < 1e-4 and apart[1] < 0.1, "float32, bfloat16"
    assert done.stdout.count(" x as fast as diffusers") == 2 and "floor " in done.stdout


def test_the_widgets_benchmark_moves_every_control_of_a_lesson():
    """Times are for who reads them; what must hold is that the controls are found and moved."""
    script = Path(__file__).parents[1] / "benchmarks" / "widgets.py"
    done = subprocess.run([sys.executable, script, "00"], capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("00_start_here")]
    assert [row[1] for row in rows] == ["sigma"] and float(rows[0][2]) > 0, done.stderr[-2000:]


def test_the_kernels_benchmark_runs_dry_where_there_is_no_gpu(tmp_path):
    """Its figures mean something on a GPU only; here every part must run, and say what it could not."""
    script, table = Path(__file__).parents[1] / "benchmarks" / "kernels.py", tmp_path / "table.md"
    done = subprocess.run([sys.executable, script, "--small", "--output", table], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = table.read_text()
    assert text.count("\n## ") == 5 and "torch 2" in text and "commit" in text
    for way in ("kernel", "compiled", "math path", "diffusers compiled"):
        assert re.search(rf"\| {way} \| \d+\.\d+ ms \|", text), way
    assert "CUDA C++ | not run" in text and "CUDA graph | not run" in text


def test_the_block_sizes_benchmark_runs_dry_where_there_is_no_gpu(tmp_path):
    """With the interpreter in the place of a GPU: every kernel whose sizes are chosen has its rows."""
    script, table = Path(__file__).parents[1] / "benchmarks" / "blocks.py", tmp_path / "table.md"
    done = subprocess.run([sys.executable, script, "--small", "--output", table], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"^\| (.+) \| (.+) \| \d+\.\d µs \| \d+% \|$", table.read_text(), re.M)
    assert (
        len([way for _, way in rows if "stages" in way]) == 2 + 3
        and "## copying" in table.read_text()
        and "not run" not in done.stdout
    )


def test_the_speed_benchmark_agrees_with_losses_written_out(tmp_path):
    """Its ratios are for who reads them; what must hold is that both sides train the same: the script asserts that of each objective."""
    script, table = Path(__file__).parents[1] / "benchmarks" / "speed.py", tmp_path / "table.md"
    done = subprocess.run([sys.executable, script, "--small", "--output", table], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"^\| (digits-\S+) \| \d+ \| \d+ \| \d+ \| \d+\.\d\d \|$", table.read_text(), re.M)
    assert len(rows) == 9 and "| jvp |" in table.read_text() and "35 calls" in table.read_text()
