"""How long does a live control of a lesson take to answer? Every lesson runs at the CI size, then every slider and picture is moved.

    python benchmarks/widgets.py                  # all lessons: some minutes
    python benchmarks/widgets.py 05               # one

Measured is what the kernel does between a control's new value and the new picture, without the way to the browser and back.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import ipywidgets
import nbformat
import tyro
from IPython.core.interactiveshell import InteractiveShell

from cmlab.widgets.surface import Surface

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
MOVES, LIMIT = 12, 100  # of each control; milliseconds


def run(path: Path) -> list[ipywidgets.Widget]:
    """Runs a lesson's code cells in this process; returns the panels that they end in."""
    shell, panels = InteractiveShell.instance(), []
    shell.user_ns.clear()
    shell.init_user_ns()
    os.chdir(path.parent)
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            result = shell.run_cell(cell.source, silent=False)
            result.raise_error()
            if isinstance(result.result, ipywidgets.Box):
                panels.append(result.result)
    return panels


def inside(widget: ipywidgets.Widget) -> Iterator[ipywidgets.Widget]:
    """A widget and all in it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from inside(child)


def values(control: ipywidgets.Widget) -> list:
    """Values to move a control through; none if it is no control."""
    shares = [(k * 0.618) % 1 for k in range(1, MOVES + 1)]  # all over the range
    if isinstance(control, Surface):
        return [[share, 1 - share / 2, k + 1.0] for k, share in enumerate(shares)]
    if isinstance(control, ipywidgets.FloatLogSlider):
        return [control.base ** (control.min + share * (control.max - control.min)) for share in shares]
    if isinstance(control, ipywidgets.FloatSlider):
        return [control.min + share * (control.max - control.min) for share in shares]
    if isinstance(control, ipywidgets.IntSlider):
        steps = (control.max - control.min) // control.step
        return [control.min + control.step * round(share * steps) for share in shares]
    return list(control.options) if isinstance(control, ipywidgets.Dropdown) else []


def times(control: ipywidgets.Widget) -> list[float]:
    """Milliseconds from each new value to the end of all that follows from it."""
    trait, taken = "touch" if isinstance(control, Surface) else "value", []
    for value in values(control):
        if value == getattr(control, trait):
            continue  # nothing would happen
        begun = time.perf_counter()
        setattr(control, trait, value)
        taken.append(1000 * (time.perf_counter() - begun))
    return taken


def main(lesson: tyro.conf.Positional[str] = "") -> None:
    """Prints one line for every control; the exit code is 1 if one takes more than 100 ms, by the median of its moves.

    Args:
        lesson: The number of one lesson; all of them without it.
    """
    os.environ["CMLAB_FAST"] = "1"
    rows = []
    for path in sorted(NOTEBOOKS.glob(f"{lesson or '0'}*.ipynb")):
        for panel in run(path):
            for control in inside(panel):
                if taken := times(control):
                    name = getattr(control, "description", "") or "picture"
                    rows.append((path.stem, name, statistics.median(taken), max(taken)))
    print(f"\n{'lesson':30s}{'control':12s}{'median ms':>10s}{'worst ms':>10s}")
    for stem, name, median, worst in rows:
        print(f"{stem:30s}{name:12s}{median:10.0f}{worst:10.0f}")
    if any(median > LIMIT for _, _, median, _ in rows):
        raise SystemExit(f"a control takes more than {LIMIT} ms")


if __name__ == "__main__":
    tyro.cli(main)
