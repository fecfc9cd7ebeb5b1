"""Runs of notebooks: what is kept, what is said when something fails, and that Ctrl-C loses nothing."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from cmlab.batch import RunFolder, execute, read, usable_folder
from cmlab.committed import problems, refresh
from cmlab.lessons import RESULTS_MIME
from cmlab.pages import duration, readable, with_mathml
from cmlab.tour import find_lessons, plan_sweep, run_sweep, run_tour

PARAMETERS = "fast: bool = False  # CI size\nseed: int = 0\nscale: float = 1.0"
# What report() and plots.show() put into an output, without the seconds that importing torch takes.
PUBLISH = f"""from IPython.display import display
display({{"text/plain": "published", "{RESULTS_MIME}": {{"one_step_fd": 0.25 * scale, "seed": seed}}}}, raw=True)"""
PICTURE = """import io
from IPython.display import Image, display
from PIL import Image as Picture
buffer = io.BytesIO()
Picture.new("RGB", (60, 30), "orange").save(buffer, "PNG")
display(Image(buffer.getvalue(), alt="an orange field", metadata={"alt": "an orange field"}))"""


def write_notebook(path: Path, *sources: str) -> Path:
    """A notebook with a title, the parameters cell and the given code cells, not executed."""
    cells = [new_markdown_cell(f"# Lesson *{path.stem}*\n\nIt holds that $x^2 \\ge 0$.")]
    cells += [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """A tour of three tiny lessons, of which the second fails."""
    folder = tmp_path_factory.mktemp("tour")
    write_notebook(folder / "notebooks" / "00_start.ipynb", "print('fast' if fast else 'slow')", PICTURE, PUBLISH)
    write_notebook(folder / "notebooks" / "01_fails.ipynb", PICTURE, "raise ValueError('sigma is <negative>')", "1 + 1")
    write_notebook(folder / "notebooks" / "02_last.ipynb", PUBLISH)
    return run_tour(fast=True, output=folder / "run", notebooks=folder / "notebooks")


# --- a tour ---------------------------------------------------------------------------------------------------------


def test_a_failing_lesson_does_not_stop_the_others(tour):
    assert [job.status for job in tour.jobs] == ["done", "failed", "done"]
    assert [job.name for job in tour.failed] == ["01_fails"]


def test_the_page_shows_the_error_with_its_cell_and_number(tour):
    error = tour.jobs[1].error
    assert error["source"] == "raise ValueError('sigma is <negative>')"
    assert error["cell"] == "In [4]"  # parameters, the injected ones, the picture, this
    page = (tour.folder / "index.html").read_text()
    for text in ("In [4]", "ValueError: sigma is &lt;negative&gt;", "raise ValueError(&#x27;sigma is &lt;negative&gt;"):
        assert text in page
    assert "<negative>" not in page


def test_key_numbers_and_figures_are_collected(tour):
    state = json.loads((tour.folder / "results.json").read_text())
    first, second, _ = state["jobs"]
    assert first["results"] == {"one_step_fd": 0.25, "seed": 0}
    assert first["figures"] == [{"file": "figures/00_start-01.png", "alt": "an orange field"}]
    assert (tour.folder / first["figures"][0]["file"]).read_bytes().startswith(b"\x89PNG")
    assert second["figures"], "what a failing lesson drew before it failed is kept too"
    assert first["seconds"] > 0 and state["fast"] is True


def test_the_page_has_thumbnails_titles_times_and_links(tour):
    page = (tour.folder / "index.html").read_text()
    assert page.count("<article") == 3 and page.count('alt="an orange field"') == 2
    for text in ("Lesson 00_start", "0.25", 'href="00_start.html"', 'href="00_start.ipynb"', "CI size"):
        assert text in page
    assert duration(tour.jobs[0].seconds) in page
    for link in ("00_start.html", "00_start.ipynb", "01_fails.html"):
        assert (tour.folder / link).exists()


def test_the_pages_ask_for_nothing_from_the_network(tour):
    for page in tour.folder.glob("*.html"):
        text = page.read_text()
        assert "<script src" not in text and "cdnjs" not in text and "unpkg" not in text
        assert 'src="http' not in text and "url(http" not in text
    assert "<math" in (tour.folder / "00_start.html").read_text()


def test_fast_reaches_the_lesson(tour):
    assert "fast\n" in [o.get("text") for c in read(tour.folder / "00_start.ipynb").cells for o in c.get("outputs", [])]


def test_resuming_runs_only_what_is_not_done(tour, tmp_path):
    source = write_notebook(tmp_path / "01_fails.ipynb", "print('mended')")
    run = RunFolder.load(tour.folder)
    run.folder = tmp_path / "copy"
    for job in run.jobs:
        job.notebook = str(source) if job.status == "failed" else "a lesson that is done is not even read"
    (run.folder / "figures").mkdir(parents=True)
    for job in run.jobs:
        for figure in job.figures:
            (run.folder / figure["file"]).write_bytes((tour.folder / figure["file"]).read_bytes())
    run.save()
    again = run_tour(resume=run.folder)
    assert [job.status for job in again.jobs] == ["done"] * 3 and not again.failed
    assert again.jobs[0].seconds == tour.jobs[0].seconds


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path):
    write_notebook(tmp_path / "notebooks" / "00_quick.ipynb", PUBLISH)
    pid = tmp_path / "kernel.pid"
    waits = f"import os, time, pathlib\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    write_notebook(tmp_path / "notebooks" / "01_long.ipynb", waits)
    write_notebook(tmp_path / "notebooks" / "02_never.ipynb", "1")
    process = start_cmlab(tmp_path, "tour", "--output", "run")
    wait_for(pid.exists, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "1 of 3 notebooks are done" in errors and "cmlab tour --resume run" in errors and "Traceback" not in errors
    state = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [job["status"] for job in state["jobs"]] == ["done", "interrupted", "waiting"]
    assert state["jobs"][0]["results"]["one_step_fd"] == 0.25
    assert "cmlab tour --resume run" in (tmp_path / "run" / "index.html").read_text()
    wait_until_gone(int(pid.read_text()))  # the kernel must not outlive the tour


def start_cmlab(folder: Path, *arguments: str, **options) -> subprocess.Popen:
    """The command line as a process of its own, in a folder whose notebooks/ is the series."""
    code = """import sys, cmlab.tour, cmlab.cli
cmlab.tour.__file__ = "/none/cmlab/tour.py"  # as if installed: then the working folder's notebooks are the series
sys.exit(cmlab.cli.main())"""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def wait_until_gone(pid: int, seconds: float = 20) -> None:
    """A process that was told to end does so soon after its parent, not in the same instant."""
    deadline = time.monotonic() + seconds
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there after {seconds} s"
        time.sleep(0.05)


def wait_for(condition, process: subprocess.Popen) -> None:
    """Returns once condition() holds; fails if the process ends before."""
    while not condition():
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"ended too early: {process.communicate()}")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# --- single notebooks -----------------------------------------------------------------------------------------------


def test_a_cell_that_takes_too_long_is_named(tmp_path):
    source = write_notebook(tmp_path / "slow.ipynb", "1", "import time; time.sleep(60)", "2")
    error = execute(source, tmp_path / "out.ipynb", timeout=2)
    assert error["source"] == "import time; time.sleep(60)"
    assert "timed out" in error["message"] and "2 seconds" in error["message"]


def test_a_kernel_that_dies_is_named(tmp_path):
    source = write_notebook(tmp_path / "dies.ipynb", "import os; os._exit(3)", "2")
    error = execute(source, tmp_path / "out.ipynb", timeout=60)
    assert error["source"] == "import os; os._exit(3)" and "died" in error["message"]


def test_a_notebook_runs_in_its_own_folder(tmp_path):
    source = write_notebook(tmp_path / "here" / "a.ipynb", "import os; assert os.path.exists('a.ipynb')")
    assert execute(source, tmp_path / "out.ipynb") is None


def test_progress_counts_the_cells(tmp_path):
    counts = []
    source = write_notebook(tmp_path / "a.ipynb", "1", "2")
    execute(source, tmp_path / "out.ipynb", on_cell=counts.append)
    assert counts[-1] == 4 and counts == sorted(counts)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_an_unwritable_folder_is_refused_before_anything_runs(tmp_path):
    write_notebook(tmp_path / "notebooks" / "00_a.ipynb", "1")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the output folder .*file/run: Not a directory"):
        run_tour(output=tmp_path / "file" / "run", notebooks=tmp_path / "notebooks")


def test_a_full_disk_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"is full: \d+ MB free, 1000000000000 MB needed"):
        usable_folder(tmp_path, needed_mb=10**12)


def test_trying_a_folder_leaves_none_behind(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "runs" / "new"):
        assert usable_folder(folder) == folder
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_folder_that_holds_a_run_is_not_overwritten(tour):
    with pytest.raises(ValueError, match="holds a run already: .*--resume"):
        run_tour(output=tour.folder, notebooks=Path(tour.jobs[0].notebook).parent)


def test_resuming_nothing_or_nonsense_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run_tour(resume=tmp_path)
    (tmp_path / "results.json").write_text('{"jobs": [')
    with pytest.raises(ValueError, match="is not a run's results.json"):
        run_tour(resume=tmp_path)


def test_an_unknown_lesson_names_the_nearest(tour):
    folder = Path(tour.jobs[0].notebook).parent
    assert [path.stem for path in find_lessons(["2", "00_start"], folder)] == ["00_start", "02_last"]
    with pytest.raises(ValueError, match="unknown lesson '01_fail'. Did you mean '01_fails'"):
        find_lessons(["01_fail"], folder)


def test_a_file_that_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "00_text.ipynb").write_text("not JSON")
    with pytest.raises(ValueError, match="00_text.ipynb cannot be read as a notebook"):
        run_tour(output=tmp_path / "run", notebooks=tmp_path)


# --- sweeps ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path):
    """Writes sweep.yaml beside a notebook and returns its path."""

    def write(text: str) -> Path:
        write_notebook(tmp_path / "lesson.ipynb", PUBLISH)
        path = tmp_path / "sweep.yaml"
        path.write_text(f"notebook: lesson.ipynb\n{text}")
        return path

    return write


def test_a_sweep_runs_every_combination_and_writes_a_table(sweep, tmp_path):
    run = run_sweep(sweep("parameters: {fast: true}\ngrid: {seed: [3, 4], scale: [2.0]}"), tmp_path / "run")
    with open(run.folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["scale"], row["one_step_fd"], row["status"]) for row in rows] == [
        ("3", "2.0", "0.5", "done"), ("4", "2.0", "0.5", "done")]  # fmt: skip


def test_a_finished_sweep_resumes_without_running(sweep, tmp_path):
    path = sweep("grid: {seed: [3]}")
    run = run_sweep(path, tmp_path / "run")
    for job in run.jobs:
        job.seconds = 12.5
    run.save()
    assert [job.seconds for job in run_sweep(path, resume=tmp_path / "run").jobs] == [12.5]
    with pytest.raises(ValueError, match="belongs to another sweep"):
        run_sweep(sweep("grid: {seed: [5]}"), resume=tmp_path / "run")
    with pytest.raises(ValueError, match="run holds a run already: .*--resume"):
        run_sweep(path, tmp_path / "run")
    with pytest.raises(ValueError, match="--resume: leave out output"):
        run_sweep(path, tmp_path / "other", resume=tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {sed: [1]}", "unknown parameter 'sed'. Did you mean 'seed'"),
        ("parameters: {scal: 1}", "unknown parameter 'scal'. Did you mean 'scale'"),
        ("grd: {seed: [1]}", "unknown key 'grd'. Did you mean 'grid'"),
        ("grid: {scale: [1e-4]}", r"scale: 1e-4 is a text to YAML 1.1, not a number; write 1.0e-4"),
        ("grid: {scale: [2.5e3]}", r"write 2.5e\+3"),
        ("grid: {seed: [0.5]}", "seed must be of type int, got 0.5"),
        ("grid: {fast: [1]}", "fast must be of type bool, got 1"),
        ("grid: {seed: 1}", "every entry of grid must be a list"),
        ("grid: [1", "is no YAML file"),
        ("grid: 3", r"sweep.yaml: grid must be names with values, such as grid: \{seed: \[0, 1, 2\]\}, got 3"),
        ("parameters: 3", "sweep.yaml: parameters must be names with values, such as parameters: {fast: true}, got 3"),
        ("timeout: soon", "sweep.yaml: timeout must be a whole number, got 'soon'"),
        ("timeout: -5", "sweep.yaml: timeout must be at least 1, got -5"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep, text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        plan_sweep(sweep(text))


def test_a_sweep_over_a_missing_notebook_is_refused(tmp_path):
    (tmp_path / "sweep.yaml").write_text("notebook: nowhere.ipynb")
    with pytest.raises(FileNotFoundError, match="names a notebook that does not exist: nowhere.ipynb"):
        plan_sweep(tmp_path / "sweep.yaml")


# --- committed notebooks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory):
    source = "import os\nprint(os.environ.get('CMLAB_FAST'))"
    return refresh(write_notebook(tmp_path_factory.mktemp("refresh") / "00_a.ipynb", source))


def test_refresh_runs_at_lesson_size_and_leaves_a_committable_notebook(refreshed):
    notebook = read(refreshed)
    assert notebook.cells[2].outputs[0].text == "None\n"
    assert list(problems(refreshed)) == []
    assert [cell.id for cell in notebook.cells] == ["cell-00", "cell-01", "cell-02"]
    assert "papermill" not in refreshed.read_text() and "iopub" not in refreshed.read_text()
    assert [path.name for path in refreshed.parent.iterdir()] == [refreshed.name], "nothing else may stay behind"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", r"left as it was: In \[2\] failed with ZeroDivisionError"),
        ("import os; print(os.path.expanduser('~/data'))", "left as it was: cell 3 prints the path"),
    ],
)
def test_refresh_keeps_the_notebook_where_the_new_one_is_no_good(tmp_path, source, message):
    path = write_notebook(tmp_path / "00_a.ipynb", source)
    before = path.read_bytes()
    with pytest.raises((RuntimeError, ValueError), match=message):
        refresh(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def spoil(path: Path, refreshed: Path, change) -> list[str]:
    notebook = read(refreshed)
    change(notebook)
    nbformat.write(notebook, path)
    return list(problems(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda nb: nb.cells[2].update(execution_count=None), "cell 3 has the count None, expected 2"),
        (lambda nb: nb.cells[2].update(execution_count=5), "cell 3 has the count 5, expected 2"),
        (lambda nb: nb.cells[1].metadata.clear(), "one cell must be tagged 'parameters', got 0"),
        (lambda nb: nb.cells[2].update(source="x = 1\n" * 31), "cell 3 has 31 lines"),
        (lambda nb: nb.cells[0].update(source="![a](https://a.org/b.png)"), "cell 1 shows a picture from the network"),
        (lambda nb: nb.cells[0].update(source='<img alt="" src="https://a.org/b.png">'), "cell 1 shows a picture"),
        (lambda nb: nb.cells[2].outputs[0].update(text="x" * 2**21), "the file has 2.0 MB"),
        (lambda nb: nb.metadata.kernelspec.update(name="conda"), "the kernel must be 'python3', got 'conda'"),
        (
            lambda nb: nb.cells[2].outputs.append(new_output("error", ename="E", evalue="v", traceback=[])),
            "cell 3 ended in E: v",
        ),
    ],
)
def test_the_guard_finds_what_must_not_be_committed(tmp_path, refreshed, change, message):
    found = spoil(tmp_path / "spoilt.ipynb", refreshed, change)
    assert len(found) == 1 and message in found[0]


def test_the_guard_is_a_command(tmp_path, refreshed):
    spoil(tmp_path / "spoilt.ipynb", refreshed, lambda nb: nb.cells[2].update(execution_count=None))
    command = [sys.executable, "-m", "cmlab.batch", "check"]
    good = subprocess.run([*command, refreshed], capture_output=True, text=True)
    bad = subprocess.run([*command, refreshed, tmp_path / "spoilt.ipynb"], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert bad.returncode == 1 and "spoilt.ipynb: cell 3 has the count None" in bad.stderr


# --- small things ---------------------------------------------------------------------------------------------------


def test_formulas_become_mathml_and_dollars_in_code_stay():
    text = with_mathml("$a_1$ and `cost $x$` and\n$$\\frac{a}{b}$$\nfor 5$ or 6$")
    assert text.count("<math") == 2 and "`cost $x$`" in text and "5$ or 6$" in text and "<mfrac>" in text


def test_durations_read_as_a_person_says_them():
    assert [duration(s) for s in (4.23, 38.4, 59.7, 185)] == ["4.2 s", "38 s", "1 min 00 s", "3 min 05 s"]


def test_numbers_are_shown_with_four_digits_that_count():
    assert [readable(value) for value in (0.123456, 35.0, 12345.6, "seed 0")] == ["0.1235", "35", "12,346", "seed 0"]


# --- what a tour opens ----------------------------------------------------------------------------------------------


def browser(folder: Path) -> dict[str, str]:
    """An environment whose web browser writes the page it is told to open into <folder>/opened."""
    program = folder / "browser"
    program.write_text(f"#!/bin/sh\necho \"$1\" > '{folder}/asked'\ncp \"${{1#file://}}\" '{folder}/opened'\n")
    program.chmod(0o755)
    return os.environ | {"BROWSER": f"{program} %s", "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}


def test_open_shows_the_page_in_the_browser(tmp_path):
    write_notebook(tmp_path / "notebooks" / "00_start.ipynb", PUBLISH)
    process = start_cmlab(tmp_path, "tour", "--output", "run", "--open", env=browser(tmp_path))
    assert process.communicate()[0] and process.returncode == 0
    assert (tmp_path / "asked").read_text().strip() == (tmp_path / "run" / "index.html").as_uri()


def test_lab_starts_at_the_first_lesson_for_this_machine_only(tmp_path):
    write_notebook(tmp_path / "notebooks" / "00_start.ipynb", PUBLISH)
    process = start_cmlab(tmp_path, "tour", "--lab", env=browser(tmp_path), start_new_session=True)
    opened = tmp_path / "opened"
    try:
        wait_for(lambda: opened.exists() and "</html>" in opened.read_text(), process)
        address = re.search(r"http://[^\"?]+", opened.read_text()).group()
        assert re.fullmatch(r"http://(127\.0\.0\.1|localhost):\d+/lab/tree/00_start\.ipynb", address)
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the server too
        process.communicate(timeout=30)
