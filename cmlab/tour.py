"""The series as one job, and sweeps: a grid of parameters over notebooks."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cmlab.batch import CELL_TIMEOUT, Job, RunFolder, free_name, title_of
from cmlab.checks import alone, unknown, untaken, whole
from cmlab.lessons import fast_mode


def lessons_folder() -> Path:
    """The folder of the numbered notebooks: beside the package, or in the working folder. Raises FileNotFoundError."""
    places = [Path(__file__).parents[1] / "notebooks", Path("notebooks").resolve()]
    for place in places:
        if any(place.glob("0*.ipynb")):
            return place
    raise FileNotFoundError(
        f"no numbered notebooks (00_….ipynb) in {' or '.join(map(str, places))}; run it in the repository"
    )


def find_lessons(only: Iterable[str] = (), folder: Path | None = None) -> list[Path]:
    """The numbered notebooks in order. only picks by number ("02") or name. Raises ValueError for an unknown one."""
    found = sorted((folder or lessons_folder()).glob("[0-9][0-9]_*.ipynb"))
    chosen = []
    for wanted in only:
        match = [path for path in found if path.stem == wanted or path.stem[:2] == f"{wanted:0>2}"]
        if not match:
            raise ValueError(unknown("lesson", wanted, [path.stem for path in found]))
        chosen += match
    return sorted(set(chosen)) or found


def run_tour(
    only: Iterable[str] = (),
    fast: bool = False,
    output: Path | None = None,
    resume: Path | None = None,
    notebooks: Path | None = None,
    timeout: int = CELL_TIMEOUT,
) -> RunFolder:
    """Runs the numbered notebooks one after the other into output (default: runs/tour-<time>) and returns the run.

    A lesson that fails does not stop the others. fast runs the CI size; resume goes on with a stopped run's folder,
    with the lessons and the size it began with. Raises ValueError, OSError before anything long starts, and
    Interrupted on Ctrl-C.
    """
    if resume is not None:
        alone("--resume", only=tuple(only), fast=fast, output=output)
        run = RunFolder.load(resume)
    else:
        fast = fast or fast_mode()
        jobs = [
            Job(path.stem, str(path), {"fast": True} if fast else {}, title_of(path))
            for path in find_lessons(only, notebooks)
        ]
        folder = untaken(output or free_name(Path("runs"), "tour"), "results.json")
        run = RunFolder(folder, "A tour of consistency models", "cmlab tour", jobs, fast)
    run.run(timeout)
    return run


# --- sweeps ---------------------------------------------------------------------------------------------------------

SWEEP_KEYS = ["notebook", "notebooks", "parameters", "grid", "timeout"]
SHAPES = {"parameters": "{fast: true}", "grid": "{seed: [0, 1, 2]}"}


def run_sweep(sweep: Path, output: Path | None = None, resume: Path | None = None) -> RunFolder:
    """Runs the notebooks of a YAML file once for every combination of its grid, into output (or runs/sweep-<time>).

        notebook: notebooks/02_consistency_distillation.ipynb     # or notebooks: [..., ...]
        parameters: {fast: true}                                  # for every run
        grid: {seed: [0, 1, 2], lr: [1.0e-3, 1.0e-4]}             # one run for every combination
        timeout: 600                                              # seconds a cell

    Writes results.csv (a row a run) beside results.json. Raises ValueError or TypeError for a file, parameter name or value that
    does not fit, before anything runs; Interrupted on Ctrl-C.
    """
    jobs, timeout = plan_sweep(sweep)
    if resume is not None:
        alone("--resume", output=output)
        run = RunFolder.load(resume)
        if [(job.name, job.parameters) for job in run.jobs] != [(job.name, job.parameters) for job in jobs]:
            raise ValueError(f"{resume} belongs to another sweep than {sweep}: start without --resume")
    else:
        folder = untaken(output or free_name(Path("runs"), "sweep"), "results.json")
        run = RunFolder(folder, f"Sweep {sweep.stem}", f"cmlab batch {sweep}", jobs)
    try:
        run.run(timeout)
    finally:
        write_table(run)
    return run


def plan_sweep(sweep: Path) -> tuple[list[Job], int]:
    """The runs that a sweep file asks for, checked against the notebooks' own parameters, and the timeout."""
    import yaml

    if not sweep.is_file():
        raise ValueError(f"no such sweep file: {sweep} (cmlab batch --help shows what one holds)")
    try:
        plan = yaml.safe_load(sweep.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{sweep} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(plan, dict):
        raise ValueError(f"{sweep} must hold keys and values (notebook: …, grid: …), got {type(plan).__name__}")
    for key in plan:
        if key not in SWEEP_KEYS:
            raise ValueError(f"{sweep}: {unknown('key', str(key), SWEEP_KEYS)}")
    named = plan.get("notebooks") or [plan.get("notebook")]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{sweep} must name its notebook: path, or notebooks: [path, …]")
    fixed, grid = plan.get("parameters") or {}, plan.get("grid") or {}
    for name, value in (("parameters", fixed), ("grid", grid)):
        if not isinstance(value, dict):
            raise ValueError(
                f"{sweep}: {name} must be names with values, such as {name}: {SHAPES[name]}, got {value!r}"
            )
    if not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"{sweep}: every entry of grid must be a list of values, such as seed: [0, 1, 2]")
    timeout = whole(f"{sweep}: timeout", plan.get("timeout", CELL_TIMEOUT))
    return list(_combinations([_beside(sweep, name) for name in named], fixed, grid)), timeout


def _beside(sweep: Path, name: str) -> Path:
    """A notebook named in a sweep: relative to the working folder or to the sweep file."""
    for path in (Path(name), sweep.parent / name):
        if path.exists():
            return path.resolve()
    raise FileNotFoundError(f"{sweep} names a notebook that does not exist: {name}")


def _combinations(notebooks: list[Path], fixed: dict[str, Any], grid: dict[str, list]) -> Iterable[Job]:
    for path in notebooks:
        check_parameters(path, [*fixed.items(), *((name, value) for name, values in grid.items() for value in values)])
        for k, values in enumerate(itertools.product(*grid.values()), 1):
            chosen = dict(zip(grid, values, strict=True))
            title = f"{title_of(path)}: " + ", ".join(f"{name} {value}" for name, value in chosen.items())
            yield Job(f"{path.stem}-{k:03d}", str(path), fixed | chosen, title if chosen else title_of(path))


def check_parameters(notebook: Path, given: Iterable[tuple[str, Any]]) -> None:
    """Raises ValueError for a parameter that the notebook lacks, naming the nearest, or a wrong kind of value."""
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    if not known:
        raise ValueError(f"{notebook.name} has no parameters: it needs a cell tagged 'parameters'")
    for name, value in given:
        if name not in known:
            raise ValueError(f"{notebook.name}: {unknown('parameter', str(name), list(known))}")
        _check_kind(name, value, known[name]["inferred_type_name"])


def _check_kind(name: str, value: Any, kind: str) -> None:
    accepted = {"int": int, "float": (int, float), "bool": bool, "str": str}.get(kind, object)
    if isinstance(value, accepted) and not (isinstance(value, bool) and kind in ("int", "float")):
        return
    number = re.fullmatch(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)", value) if isinstance(value, str) else None
    if number:
        whole, fraction, sign, power = number.groups()
        right = f"{whole}{fraction or '.0'}e{sign or '+'}{power}"
        raise ValueError(f"{name}: {value} is a text to YAML 1.1, not a number; write {right}")
    raise ValueError(f"{name} must be of type {kind}, got {value!r}")


def write_table(run: RunFolder) -> None:
    """results.csv: a row a run, with its parameters, status, run time and key numbers."""
    rows = [{"run": j.name, **j.parameters, "status": j.status, "seconds": j.seconds, **j.results} for j in run.jobs]
    columns = dict.fromkeys(itertools.chain(["run"], *rows))
    with open(run.folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), restval="")
        writer.writeheader()
        writer.writerows(rows)
