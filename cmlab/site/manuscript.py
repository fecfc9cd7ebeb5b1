"""What Sphinx reads: copies of the lessons with figures as files, formulas and names as links, and pages for the reference."""

from __future__ import annotations

import base64
import importlib
import re
from pathlib import Path

import nbformat

from cmlab.lessons import RESULTS_MIME

# The reference, in the order in which one meets the rooms. Rooms that only serve the command and the checks are left out.
REFERENCE = {
    "Models and noise": ["noise", "scaling", "exact", "streams", "models.unet", "models.small", "models.winograd"],
    "Drawing and editing": ["ode", "sampling", "drawing", "editing", "pictures"],
    "Training": ["distances", "objectives", "continuous", "recipes", "training", "planning"],
    "Data and files": ["data", "sources", "prepare", "prepared", "checkpoints", "released", "interop", "downloads"],
    "GPU kernels": ["kernels.norm", "kernels.jvp", "kernels.step", "kernels.twin", "kernels.dispatch"],
    "Measuring and showing": ["metrics", "extractors", "plots", "widgets.paths", "widgets.curves", "widgets.samples", "widgets.live"],
}  # fmt: skip
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"^(HBox\(children=\(HTML|.*\b\d+%\|)")
LIVE = "*Here is a live control when the lesson runs in JupyterLab. The figures beside it stand still.*"
NAME = re.compile(r"(?<!`)`(cmlab(?:\.\w+)+)(?:\(\))?`(?!`)")
LESSON = re.compile(r"(?<![\[\w])[Ll]essons? (0\d)\b(?![^\[]*\]\()")
LESSON_AS_CODE = re.compile(r"(?<!`)`(0\d\w*)`(?!`)")


def write_sources(home: Path, folder: Path) -> None:
    """Writes index, lessons, solutions and reference into a folder, for Sphinx."""
    lessons = sorted((home / "notebooks").glob("0*.ipynb"))
    solutions = sorted((home / "notebooks" / "solutions").glob("0*.ipynb"))
    pages = {name: path.stem for path in lessons for name in (path.stem[:2], path.stem)}
    for path in [*lessons, *solutions]:
        _write_notebook(path, folder / "lessons" / path.relative_to(home / "notebooks"), pages)
    for room in (room for rooms in REFERENCE.values() for room in rooms):
        _write(folder / "reference" / f"{room}.md", _reference_page(room))
    _write(folder / "reference" / "index.md", _reference_index())
    _write(folder / "contributing.md", (home / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    _write(folder / "index.md", _index(home, lessons, solutions))
    picture = folder / "images" / "readme.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes((home / "cmlab" / "embedded" / "readme.png").read_bytes())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# --- index ----------------------------------------------------------------------------------------------------------


def _index(home: Path, lessons: list[Path], solutions: list[Path]) -> str:
    """The README, whose links lead to the site's pages, and the table of contents."""
    text = (home / "README.md").read_text(encoding="utf-8")
    text = text.replace("](notebooks/", "](lessons/").replace("](cmlab/embedded/", "](images/")
    contents = {
        "Lessons": [f"lessons/{path.stem}" for path in lessons],
        "Solutions": [f"lessons/solutions/{path.stem}" for path in solutions],
        "Package": ["reference/index", "contributing"],
    }
    trees = [_tree(caption, pages) for caption, pages in contents.items()]
    return linked_names(text) + "\n\n" + "\n".join(trees)


def _tree(caption: str, pages: list[str], hidden: bool = True) -> str:
    options = [f":caption: {caption}", ":maxdepth: 1", *([":hidden:"] if hidden else [])]
    return "\n".join(["```{toctree}", *options, "", *pages, "```", ""])


# --- notebooks ------------------------------------------------------------------------------------------------------


def _write_notebook(path: Path, target: Path, pages: dict[str, str]) -> None:
    """A copy of an executed notebook: its text with links, its figures as files with their descriptions."""
    notebook = nbformat.read(path, 4)
    notebook.metadata.pop("widgets", None)
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            cell.source = linked_names(linked_lessons(cell.source, pages, path.stem))
        else:
            cell.outputs = _outputs(cell.outputs, target, number)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def _outputs(outputs: list, target: Path, cell: int) -> list:
    """Outputs for the page: figures as files, live controls as a note, progress bars and data for the tour left out."""
    kept = []
    for output in outputs:
        data = output.get("data", {})
        data.pop(RESULTS_MIME, None)
        if "image/png" in data:
            kept.append(_figure(output, target, f"{target.stem}-{cell}-{len(kept)}.png"))
        elif WIDGET in data:
            if not PROGRESS.match(data.get("text/plain", "")):
                kept.append(_markdown(LIVE))
        else:
            kept.append(_without_caption(output))
    return [output for output in kept if output.output_type != "stream" or output.text]


def _figure(output, target: Path, name: str):
    """A figure as Markdown that names a file beside the notebook; its description is alternative text and caption."""
    picture = target.parent / "images" / name
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(base64.b64decode(output.data["image/png"]))
    alt = output.metadata.get("image/png", {}).get("alt")
    if not alt:
        raise ValueError(f"{target.name}: a figure has no description; plots.show gives it one")
    alt = re.sub(r"([\[\]*_`$\\<])", r"\\\1", alt)
    return _markdown(f"![{alt}](images/{name})\n\n*{alt}*")


def _markdown(text: str):
    return nbformat.v4.new_output("display_data", {"text/markdown": text})


def _without_caption(output):
    """An output without the lines that plots.show prints below figures, for who sees no metadata."""
    if output.output_type == "stream":
        output.text = re.sub(r"^Figure: .*\n?", "", output.text, flags=re.M)
    return output


def linked_lessons(text: str, pages: dict[str, str], own: str) -> str:
    """Text in which "lesson 02", `02` and `02_consistency_distillation` lead there."""
    folder = "../" if own.endswith("_solution") else ""

    def link(found: re.Match) -> str:
        page = pages.get(found[1])
        return found[0] if page is None or page == own else f"[{found[0]}]({folder}{page}.ipynb)"

    return _outside_code(LESSON, link, _outside_code(LESSON_AS_CODE, link, text, keep_spans=False))


def linked_names(text: str) -> str:
    """Text in which `cmlab.sampling.search_sigmas` leads to its place in the reference, if it has one."""

    def link(found: re.Match) -> str:
        place = _place_of(found[1])
        return found[0] if place is None else f"{{py:obj}}`{found[1]} <{place}>`"

    return _outside_code(NAME, link, text, keep_spans=False)


def _outside_code(pattern: re.Pattern, replace, text: str, keep_spans: bool = True) -> str:
    """Substitutes in Markdown, but not in its blocks of code, formulas and links, nor (keep_spans) in its code spans."""
    blocks = r"```.*?```|\$\$.*?\$\$|\[[^\]]*\]\([^)]*\)" + (r"|`[^`\n]*`" if keep_spans else "")
    parts = re.split(f"({blocks})", text, flags=re.S)
    return "".join(part if k % 2 else pattern.sub(replace, part) for k, part in enumerate(parts))


def _place_of(name: str) -> str | None:
    """The full name under which the reference has an object; None if it has not."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        place = (
            f"{found.__module__}.{found.__qualname__}"
            if hasattr(found, "__qualname__")
            else getattr(found, "__name__", "")
        )
        module = getattr(found, "__module__", place).removeprefix("cmlab.")
        return place if module in {room for rooms in REFERENCE.values() for room in rooms} else None
    return None


# --- reference ------------------------------------------------------------------------------------------------------


def _reference_page(room: str) -> str:
    return f"# {room}\n\n```{{eval-rst}}\n.. automodule:: cmlab.{room}\n   :members:\n```\n"


def _reference_index() -> str:
    text = "# Reference\n\nEvery public function and class, from its docstring: shapes, ranges, errors, and where it comes from.\n"
    trees = [_tree(caption, rooms, hidden=False) for caption, rooms in REFERENCE.items()]
    return text + "\n" + "\n".join(trees)
