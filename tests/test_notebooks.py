"""The lessons as committed: what each must hold, and that each, and its solutions, runs from the top at the CI size."""

import re
from pathlib import Path

import pytest

from cmlab.batch import execute, pictures, published, read
from cmlab.committed import problems

FOLDER = Path(__file__).parents[1] / "notebooks"
SERIES = [
    "00_start_here", "01_probability_flow_ode", "02_consistency_distillation", "03_consistency_training",
    "04_evaluation", "05_editing", "06_released_models", "07_continuous_time", "08_gpu_kernels",
    "09_your_own_data",
]  # fmt: skip
LESSONS = [FOLDER / f"{name}.ipynb" for name in SERIES]
SOLUTIONS = [FOLDER / "solutions" / f"{name}_solution.ipynb" for name in SERIES]
WIDGET = "application/vnd.jupyter.widget-view+json"

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
every_real_lesson = pytest.mark.parametrize("path", LESSONS[1:], ids=lambda path: path.stem)
every_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
every_notebook = pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda path: path.stem)


def sources(notebook, kind: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def exercises(notebook) -> set[str]:
    """The numbers of the exercises whose answers are checked."""
    return set(re.findall(r"\bcheck\(\s*(\d+)\s*,", "\n".join(sources(notebook, "code"))))


# --- as committed ---------------------------------------------------------------------------------------------------


def test_the_series_is_complete_and_nothing_is_left_over():
    assert sorted(FOLDER.rglob("*.ipynb")) == sorted(LESSONS + SOLUTIONS)


@every_notebook
def test_committed_notebooks_are_executed_small_and_free_of_this_machine(path):
    assert list(problems(path)) == []


@every_lesson
def test_a_lesson_is_a_real_lesson(path):
    words = len(re.findall(r"[^\W\d_]{2,}", " ".join(sources(read(path), "markdown"))))
    assert words >= (1000 if path.stem.startswith("00") else 1500)


@every_real_lesson
def test_a_lesson_draws_five_figures_or_more(path):
    assert len(list(pictures(read(path)))) >= 5


@every_lesson
def test_every_figure_has_an_alternative_text_that_says_what_to_see(path):
    assert [k for k, (_, alt) in enumerate(pictures(read(path))) if len(alt.split()) < 5] == []


@every_real_lesson
def test_a_lesson_has_three_exercises_or_more_that_wait_for_an_answer(path):
    notebook = read(path)
    assert len(exercises(notebook)) >= 3
    assert set(re.findall(r"Exercise (\d+): not answered yet", printed(notebook))) == exercises(notebook)


@every_solution
def test_a_solution_answers_every_exercise_of_its_lesson(path):
    lesson = read(FOLDER / f"{path.stem.removesuffix('_solution')}.ipynb")
    assert set(re.findall(r"Exercise (\d+): right", printed(read(path)))) == exercises(lesson)


@every_real_lesson
def test_a_lesson_has_a_live_control_with_a_static_figure_by_it(path):
    cells = read(path).cells
    live = [k for k, cell in enumerate(cells) if any(WIDGET in o.get("data", {}) for o in cell.get("outputs", []))]
    assert live
    near = [cell for k in live for cell in cells[max(0, k - 2) : k + 3]]
    assert any("image/png" in o.get("data", {}) for cell in near for o in cell.get("outputs", []))


@every_lesson
def test_a_lesson_opens_with_its_goals_and_measured_run_time_and_closes_with_references(path):
    texts = sources(read(path), "markdown")
    opening = texts[0] + texts[1]
    assert re.search(r"\d+(\.\d+)?\s*(s|seconds?|min|minutes?)\b", opening) and "CPU" in opening
    assert len(re.findall(r"^\s*(?:\d+\.|-) ", opening, re.M)) >= 3, "three goals or more"
    assert "arXiv" in "".join(texts[-2:])


@every_lesson
def test_a_lesson_has_the_parameters_that_batches_use(path):
    cells = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1
    assert "fast: bool = False" in cells[0].source and "seed: int = 0" in cells[0].source


@every_real_lesson
def test_a_lesson_states_its_theory_in_assertions_and_publishes_key_numbers(path):
    notebook = read(path)
    assert len(re.findall(r"^\s*assert |allclose\(", "\n".join(sources(notebook, "code")), re.M)) >= 3
    assert len(published(notebook)) >= 2


@every_lesson
def test_links_between_lessons_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#|attachment:)([^)#\s]+)", "\n".join(sources(read(path), "markdown")))
    assert [link for link in links if not (path.parent / link).exists()] == []


# --- as run ---------------------------------------------------------------------------------------------------------


@every_notebook
def test_notebooks_run_from_the_top_at_the_ci_size(path, tmp_path):
    executed = tmp_path / path.name
    error = execute(path, executed, {"fast": True}, timeout=300)
    assert error is None, f"{error['cell']}: {error['message']}\n{error['source']}"
    assert list(problems(executed)) == []
