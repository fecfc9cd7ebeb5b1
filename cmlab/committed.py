"""Notebooks as they are committed: executed, small, free of what belongs to one machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat

from cmlab.batch import CELL_TIMEOUT, execute, read

LARGEST_MB = 2
LONGEST_CELL = 30  # lines
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
REMOTE_IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?https?:|<img[^>]+src\s*=\s*[\"']?https?:", re.I)


def problems(path: Path | str) -> Iterator[str]:
    """What is wrong with a notebook that is to be committed, a sentence each; none if it may be."""
    path = Path(path)
    try:
        notebook = read(path)
        nbformat.validate(notebook)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        yield str(error).strip().splitlines()[0]
        return
    megabytes = path.stat().st_size / 2**20
    if megabytes >= LARGEST_MB:
        yield f"the file has {megabytes:.1f} MB; it must stay below {LARGEST_MB}"
    if notebook.metadata.get("kernelspec", {}).get("name") != KERNEL["name"]:
        yield f"the kernel must be {KERNEL['name']!r}, got {notebook.metadata.get('kernelspec', {}).get('name')!r}"
    tagged = sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)
    if tagged != 1:
        yield f"one cell must be tagged 'parameters', got {tagged}"
    yield from _run_problems(notebook)
    yield from _text_problems(notebook)


def _run_problems(notebook) -> Iterator[str]:
    """Every code cell ran, in order, once, without an error."""
    ran = 0
    for k, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        ran += 1
        if cell.execution_count != ran:
            yield f"cell {k} has the count {cell.execution_count}, expected {ran}: run the notebook from the top"
            return
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {k} ended in {output.ename}: {output.evalue}"


def _text_problems(notebook) -> Iterator[str]:
    for k, cell in enumerate(notebook.cells, 1):
        lines = len(cell.source.splitlines())
        if cell.cell_type == "code" and lines > LONGEST_CELL:
            yield f"cell {k} has {lines} lines; split it, {LONGEST_CELL} at most"
        shown = [cell.source, *_texts(cell)]
        if any(REMOTE_IMAGE.search(text) for text in shown):
            yield f"cell {k} shows a picture from the network: it must be readable offline"
        for place in _private_places():
            if any(place in text for text in _texts(cell)):
                yield f"cell {k} prints the path {place} of this machine"


def _texts(cell) -> Iterator[str]:
    """Every text in the outputs of a cell."""
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield "\n".join(output.get("traceback", []))
        yield from (data for data in output.get("data", {}).values() if isinstance(data, str))


def _private_places() -> set[str]:
    """Folders that must not show in an output: the home folder and the repository's."""
    return {place for place in (os.path.expanduser("~") + "/", f"{Path(__file__).parents[1]}/") if place != "//"}


def refresh(path: Path | str, timeout: int = CELL_TIMEOUT, on_cell: Callable[[int], None] | None = None) -> Path:
    """Runs a notebook at lesson size and puts the executed one, tidied, in its place; returns its path.

    The notebook stays as it is unless every cell succeeds and the result may be committed: otherwise raises
    RuntimeError (the cell and its error) or ValueError (what is wrong with the result). Parameters keep the values
    that stand in their cell.
    """
    path = Path(path)
    read(path)
    fresh = path.with_name(f".{path.stem}.fresh.ipynb")
    try:
        lesson_size = {name: value for name, value in os.environ.items() if name != "CMLAB_FAST"}
        error = execute(path, fresh, None, timeout, on_cell, lesson_size)
        if error is not None:
            raise RuntimeError(f"{path} is left as it was: {error['cell']} failed with {error['message']}")
        nbformat.write(tidy(read(fresh)), fresh)
        found = list(problems(fresh))
        if found:
            raise ValueError(f"{path} is left as it was: {'; '.join(found)}")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def tidy(notebook):
    """The notebook without run times, papermill's notes and random cell ids: two runs differ in results only."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata["kernelspec"] = dict(KERNEL)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for k, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{k:02d}"
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
    return notebook
