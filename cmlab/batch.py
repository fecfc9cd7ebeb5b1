"""Runs notebooks with papermill, each in a process of its own, and keeps what comes out of them.

A run folder holds executed notebooks, their pages and figures, results.json and index.html. `python -m cmlab.batch
check PATHS` says what is wrong with notebooks that are to be committed.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmlab.files import write_text
from cmlab.lessons import RESULTS_MIME

CELL_TIMEOUT = 1800  # seconds: no cell of the series takes a third of it on 2 cores
NEEDED_MB = 100  # free disk space to insist on: ten times what the whole series writes


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: what was done is kept. The message says how to go on."""


@dataclass
class Job:
    """One notebook to run, and what became of it. status: waiting, done, failed or interrupted."""

    name: str  # of its files in the run folder
    notebook: str
    parameters: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    status: str = "waiting"
    seconds: float = 0.0
    results: dict[str, float | str] = field(default_factory=dict)  # what the notebook published with report()
    figures: list[dict[str, str]] = field(default_factory=list)  # file (relative to the run folder) and alt
    error: dict[str, str] | None = None  # cell, source, message, traceback


# --- one notebook ---------------------------------------------------------------------------------------------------


def execute(
    source: Path | str,
    target: Path | str,
    parameters: dict[str, Any] | None = None,
    timeout: int = CELL_TIMEOUT,
    on_cell: Callable[[int], None] | None = None,
    environment: dict[str, str] | None = None,
) -> dict[str, str] | None:
    """Runs a notebook in its own folder and writes the executed one to target, whether it succeeds or not.

    Returns None, or what failed: cell ("In [7]"), source, message, traceback. timeout is in seconds a cell; on_cell is
    called with the number of cells that are done. A KeyboardInterrupt ends the kernel before it goes on.
    """
    job = dict(source=str(source), target=str(target), parameters=parameters or {}, timeout=timeout)
    command = [sys.executable, "-m", "cmlab.batch", "execute", json.dumps(job)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        start_new_session=True,  # Ctrl-C in the terminal reaches us only: we decide what becomes of the child
    )  # fmt: skip
    last, failed = 0, "the process that ran the notebook ended without a word"
    try:
        for line in child.stdout:
            message = json.loads(line)
            failed = message.get("failed", failed)
            last = message.get("cell", last)
            if on_cell is not None and "cell" in message:
                on_cell(last)
    finally:
        _end(child)
    return None if child.returncode == 0 else _failure(Path(target), last, failed)


def _end(child: subprocess.Popen) -> None:
    """Ends the child, and its kernel with it: it stops when its standard input closes."""
    try:
        child.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()


def _failure(executed: Path, last: int, message: str) -> dict[str, str]:
    """What the page shows of a failed run: the cell with the error or, if the kernel died, the one that was running."""
    cells = read(executed).cells if executed.exists() else []
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
                timed_out = message.startswith("CellTimeoutError")  # then the error in the cell is our interruption
                text = message if timed_out else f"{output.ename}: {output.evalue}"
                return dict(cell=f"In [{cell.execution_count}]", source=cell.source, message=text, traceback=trace)
    source = cells[last].source if last < len(cells) else ""
    return dict(cell=f"cell {last + 1} of {len(cells)}", source=source, message=message, traceback="")


def _execute_here(job: dict[str, Any]) -> int:
    """The child's part: runs the notebook, writes a JSON line for every finished cell."""
    _stop_with_parent()
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the kernel's libraries print goes elsewhere

    def tell(**message):
        lines.write(json.dumps(message) + "\n")

    import papermill
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, manager, kernel_name, **options):
            finished = manager.cell_complete

            def cell_complete(cell, cell_index=None, **rest):
                finished(cell, cell_index=cell_index, **rest)
                ran = sys.exc_info()[0] is None  # after a time-out or the kernel's death this is the cell that did it
                tell(cell=cell_index + ran)

            manager.cell_complete = cell_complete
            return super().execute_managed_notebook(manager, kernel_name, **options)

    papermill_engines.register("cmlab", Engine)
    _poll_in_slices()
    source = Path(job["source"]).resolve()
    try:
        papermill.execute_notebook(
            str(source), str(Path(job["target"]).resolve()), job["parameters"], engine_name="cmlab",
            kernel_name="python3", cwd=str(source.parent), execution_timeout=job["timeout"], start_timeout=120,
            progress_bar=False,
        )  # fmt: skip
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        tell(failed=f"{type(error).__name__}: {first}")
        return 1
    return 0


def _stop_with_parent() -> None:
    """Ends this process (nbclient ends the kernel) once standard input closes: the parent asks for it, or is gone."""
    import signal
    import threading

    def watch():
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _poll_in_slices(seconds: float = 0.5) -> None:
    """After an Output widget was written nbclient can miss the wake-up for a reply and wait for ever (jupyter/nbclient
    issue 312): ask the channel again every half second."""
    from queue import Empty

    from jupyter_client.channels import AsyncZMQSocketChannel

    async def get_msg(channel, timeout=None):
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while not await channel.socket.poll(1000 * min(seconds, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                raise Empty
        return await channel._recv()

    AsyncZMQSocketChannel.get_msg = get_msg


# --- what a notebook is and what came out of it ---------------------------------------------------------------------


def read(path: Path | str):
    """A notebook as nbformat gives it. Raises ValueError for a file that is none, FileNotFoundError for none at all."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a notebook: {error}") from error


def title_of(path: Path | str) -> str:
    """The first heading of a notebook, or its file name."""
    for cell in read(path).cells:
        heading = re.search(r"^#+\s+(.+)$", cell.source, re.M) if cell.cell_type == "markdown" else None
        if heading:
            return re.sub(r"[*`$]", "", heading[1]).strip()
    return Path(path).stem


def published(notebook) -> dict[str, float | str]:
    """The key numbers that the cells of an executed notebook published with report(), in their order."""
    numbers = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            numbers.update(output.get("data", {}).get(RESULTS_MIME, {}))
    return numbers


def pictures(notebook) -> Iterator[tuple[bytes, str]]:
    """The PNG outputs of an executed notebook with their alternative texts."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {}).get("image/png")
            if data:
                about = output.get("metadata", {})
                yield base64.b64decode(data), about.get("image/png", {}).get("alt", "")


# --- a folder of runs -----------------------------------------------------------------------------------------------


@dataclass
class RunFolder:
    """Notebooks that run one after the other, and their folder. Everything that is done is on disk at once."""

    folder: Path
    title: str
    command: str  # that goes on with it: "cmlab tour --resume FOLDER"
    jobs: list[Job]
    fast: bool = False
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M"))
    machine: str = field(default_factory=lambda: f"{os.cpu_count()} cores, Python {platform.python_version()}")

    @classmethod
    def load(cls, folder: Path | str) -> RunFolder:
        """Reads results.json back. Raises FileNotFoundError or ValueError where there is nothing to go on with."""
        path = Path(folder) / "results.json"
        if not path.exists():
            raise FileNotFoundError(f"nothing to resume: {path} does not exist")
        try:
            state = json.loads(path.read_text())
            return cls(**state | {"folder": Path(folder), "jobs": [Job(**job) for job in state["jobs"]]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a run's results.json: {error}") from error

    def save(self) -> None:
        """Writes results.json and index.html; a cut leaves the previous ones."""
        from cmlab.pages import index_page

        state = asdict(self)
        del state["folder"]
        write_text(self.folder / "results.json", json.dumps(state, indent=1))
        write_text(self.folder / "index.html", index_page(self))

    @property
    def failed(self) -> list[Job]:
        """The jobs that ended in an error."""
        return [job for job in self.jobs if job.status == "failed"]

    def run(self, timeout: int = CELL_TIMEOUT) -> None:
        """Runs every job that is not done. Raises OSError at once for an unusable folder, Interrupted on Ctrl-C."""
        from tqdm.auto import tqdm

        usable_folder(self.folder)
        todo = [job for job in self.jobs if job.status != "done"]
        cells = {job.name: len(read(job.notebook).cells) for job in todo}
        self.save()
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} cells, {elapsed}"  # what is left cannot be told: some cells train for minutes
        with tqdm(total=sum(cells.values()), bar_format=form) as bar:
            for k, job in enumerate(todo):
                bar.set_description(f"{k + 1}/{len(todo)} {job.name}")
                end = bar.n + cells[job.name]
                try:
                    self._run_one(job, timeout, lambda done, end=end: bar.update(bar.n < end))
                except KeyboardInterrupt:
                    job.status = "interrupted"
                    self.save()
                    raise Interrupted(self._how_to_go_on()) from None
                bar.update(end - bar.n)
                bar.write(f"{job.status:<6} {job.seconds:6.1f} s  {job.name}", file=sys.stdout)

    def _how_to_go_on(self) -> str:
        done = sum(job.status == "done" for job in self.jobs)
        return (
            f"stopped: {done} of {len(self.jobs)} notebooks are done and kept in {self.folder}\n"
            f"go on with: {self.command} --resume {self.folder}"
        )

    def _run_one(self, job: Job, timeout: int, on_cell: Callable[[int], None]) -> None:
        executed = self.folder / f"{job.name}.ipynb"
        executed.unlink(missing_ok=True)
        begun = time.perf_counter()
        job.error = execute(job.notebook, executed, job.parameters, timeout, on_cell)
        job.seconds = round(time.perf_counter() - begun, 1)
        job.status = "done" if job.error is None else "failed"
        if executed.exists():
            self._collect(job, executed)
        self.save()

    def _collect(self, job: Job, executed: Path) -> None:
        """Key numbers, figures and the page of an executed notebook."""
        from cmlab.pages import notebook_page

        notebook = read(executed)
        job.results, job.figures = published(notebook), []
        for k, (picture, alt) in enumerate(pictures(notebook), 1):
            file = Path("figures") / f"{job.name}-{k:02d}.png"
            (self.folder / file).parent.mkdir(exist_ok=True)
            (self.folder / file).write_bytes(picture)
            job.figures.append(dict(file=file.as_posix(), alt=alt))
        write_text(self.folder / f"{job.name}.html", notebook_page(notebook, job.title))


def usable_folder(folder: Path, needed_mb: int = NEEDED_MB) -> Path:
    """Returns the folder. Raises OSError, now and not in an hour, if it cannot be made, cannot be written to, or is full.

    Makes nothing: a command that fails leaves no empty folder, and processes that ask at once do not meet.
    """
    try:
        place = folder.absolute()
        there = next(p for p in (place, *place.parents) if p.exists())
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(bytes(1 << 16))
            probe.flush()
        free = shutil.disk_usage(there).free >> 20
    except OSError as error:
        raise OSError(
            f"cannot write to the output folder {folder}: {error.strerror}. Choose another with --output"
        ) from error
    if free < needed_mb:
        raise OSError(f"the disk of the output folder {folder} is full: {free} MB free, {needed_mb} MB needed")
    return folder


def free_name(parent: Path, stem: str) -> Path:
    """A folder name that is not taken: parent/stem-<time>, with a number where two start in one second."""
    base = parent / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (base if k == 1 else base.with_name(f"{base.name}-{k}") for k in range(1, 1000))
    return next(name for name in names if not name.exists())


def main(arguments: list[str]) -> int:
    """`python -m cmlab.batch`: check notebooks (exit code 1 if one may not be committed), or run one as a child of execute."""
    if len(arguments) == 2 and arguments[0] == "execute":
        return _execute_here(json.loads(arguments[1]))
    if len(arguments) >= 2 and arguments[0] == "check":
        from cmlab.committed import problems

        found = [f"{path}: {problem}" for path in arguments[1:] for problem in problems(path)]
        print("\n".join(found), file=sys.stderr, end="\n" if found else "")
        return 1 if found else 0
    print("usage: python -m cmlab.batch check NOTEBOOK ...", file=sys.stderr)
    return errno.EINVAL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
