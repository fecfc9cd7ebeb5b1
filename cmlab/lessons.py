"""What the notebooks call about themselves: their size, their key numbers, the check of an exercise."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

RESULTS_MIME = "application/vnd.cmlab.results+json"


def check(exercise: int, answer: Any, test: Callable[[Any], str | None]) -> bool:
    """Looks at the answer to an exercise and says what is wrong with it, not only that it is.

    test(answer) returns None if it is right, a sentence if not, or ... where the answer still has its blank. Returns whether
    it is right; an unanswered exercise is not, but stops nothing.
    """
    try:
        wrong = ... if answer is ... else test(answer)
    except Exception as error:  # the reader's code: whatever it raises is the message
        wrong = f"it raises {type(error).__name__}: {error}"
    if wrong is ...:
        print(f"Exercise {exercise}: not answered yet. Fill in the ... above and run both cells again.")
    else:
        print(f"Exercise {exercise}: {'right.' if wrong is None else f'not yet: {wrong}'}")
    return wrong is None


def fast_mode() -> bool:
    """Whether the environment asks for the CI size of the lessons: CMLAB_FAST=1."""
    return os.environ.get("CMLAB_FAST", "") not in ("", "0")


def report(**numbers: float) -> None:
    """Publishes a lesson's key numbers: as a line to read, and as data in the cell's output for `cmlab tour` to collect."""
    from IPython.display import display

    numbers = {name: value if isinstance(value, str) else float(value) for name, value in numbers.items()}
    text = "   ".join(
        f"{name} {value if isinstance(value, str) else format(value, '.4g')}" for name, value in numbers.items()
    )
    display({"text/plain": text, RESULTS_MIME: numbers}, raw=True)
