"""The static site: what is in it, and what stops it from being built."""

import re
from pathlib import Path

import nbformat
import pytest

from cmlab.cli import main
from cmlab.site import build, dead_links, manuscript
from cmlab.site.extension import escaped, mathml

HOME = Path(__file__).parents[1]
LESSONS = sorted((HOME / "notebooks").glob("0*.ipynb"))


def words(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_its_page_with_every_figure_described_and_its_notebook_to_download(lesson, site):
    page = (site / "lessons" / f"{lesson.stem}.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img alt="([^"]*)" src="\.\./_images/', page)
    figures = [
        o
        for cell in nbformat.read(lesson, 4).cells
        for o in cell.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    assert len(shown) == len(figures) > 0 and all(len(alt.split()) > 4 for alt in shown)
    assert (site / "_sources" / "lessons" / lesson.name).read_bytes() == lesson.read_bytes()
    assert f"solutions/{lesson.stem}_solution.html" in page
    controls = [name for name in ("explore(", "train_live(", "Explorer(", "Viewer(", "MaskPainter(", "Playground(") for cell in
                nbformat.read(lesson, 4).cells if cell.cell_type == "code" and name in cell.source]  # fmt: skip
    assert page.count("Here is a live control") == len(controls), "a note for each control, none for a progress bar"
    assert not re.search(r"<m[ino][^>]*>[^<]*\\", page), "a formula holds TeX that was not understood"


def test_no_link_leads_nowhere(site):
    assert dead_links(site) == []


def test_a_link_to_nothing_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html">b</a><a href="#here">h</a><p id="there"><a href="#there">t</a><img src="c.png">'
    )
    assert dead_links(tmp_path) == ["a.html: b.html", "a.html: #here", "a.html: c.png"]


def test_lessons_lead_to_each_other_and_to_the_reference(site):
    distillation = (site / "lessons" / "02_consistency_distillation.html").read_text()
    assert 'href="03_consistency_training.html"' in distillation
    assert 'href="../reference/editing.html#cmlab.editing.edit"' in (site / "lessons" / "05_editing.html").read_text()


def test_the_reference_holds_the_docstrings(site):
    page = words(site / "reference" / "sampling.html")
    assert "Multistep consistency sampling, Song et al. (2023), algorithm 1" in page
    assert "Alias for field" not in page
    assert "c_skip" in words(site / "reference" / "scaling.html")


def test_the_rooms_of_the_reference_exist_and_those_that_lessons_import_are_in_it():
    rooms = {room for rooms in manuscript.REFERENCE.values() for room in rooms}
    assert all((HOME / "cmlab" / f"{room.replace('.', '/')}.py").is_file() for room in rooms)
    text = "".join(path.read_text() for path in LESSONS)
    used = set(re.findall(r"from cmlab import ([\w, ]+)", text)) | set(re.findall(r"from cmlab\.(\w+) import", text))
    used = {name.strip() for names in used for name in names.split(",")} - {
        "lessons",
        "batch",
        "widgets",
        "models",
        "files",
    }
    modules = {name for name in used if (HOME / "cmlab" / f"{name}.py").is_file()}
    assert modules <= rooms


def test_formulas_are_drawn_and_unknown_ones_shown_as_they_are():
    assert mathml(r"\frac{x}{\sigma}", "inline").startswith("<math")
    assert "‖" in (drawn := mathml(r"\big\| x \big\|", "inline")) and "\\" not in drawn
    assert mathml(r"\begin{nowhere", "inline") == r"<code>\begin{nowhere</code>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f(x)**2 and a_ | b", r"f(x)\*\*2 and a\_ \| b"), ("the `steps` of *one*", "the ``steps`` of *one*"), ("2*a*b", r"2\*a\*b"),
        ("c_skip", "c_skip"),
    ],
)  # fmt: skip
def test_docstrings_are_plain_text_with_code_and_emphasis(text, expected):
    assert escaped(text) == expected


def test_code_and_formulas_are_no_links():
    pages = dict.fromkeys(["02", "02_consistency_distillation"], "02_consistency_distillation")
    text = "lesson 02 but `lesson 02`, [lesson 02](x.ipynb), [`02`](x.ipynb), ```\n`02`\n``` and $$lesson 02$$"
    assert manuscript.linked_lessons(text, pages, "01_x").count("](02_consistency_distillation.ipynb)") == 1
    for name in pages:
        assert manuscript.linked_lessons(f"`{name}`", pages, "01_x") == f"[`{name}`](02_consistency_distillation.ipynb)"
    assert manuscript.linked_lessons("`02`", pages, "02_consistency_distillation") == "`02`"
    assert manuscript.linked_names("`cmlab.sampling.sample_ts`").startswith("{py:obj}`")
    assert manuscript.linked_names("`cmlab.nothing.here`") == "`cmlab.nothing.here`"
    assert manuscript.linked_names("```\n`cmlab.train`\n```") == "```\n`cmlab.train`\n```"


@pytest.mark.parametrize("others", [["mine.txt"], ["searchindex.js"], [".cmlab-site", ".git"]])
def test_a_folder_with_something_else_is_left_alone(others, tmp_path, capsys):
    for name in others:
        (tmp_path / name).write_text("mine")
    assert main(["site", "--output", str(tmp_path)]) == 1
    assert "holds something else than a site" in capsys.readouterr().err
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_a_broken_reference_stops_the_build_and_the_old_site_stays(tmp_path, monkeypatch):
    output = tmp_path / "html"
    output.mkdir()
    (output / ".cmlab-site").touch()
    (output / "searchindex.js").write_text("old")
    monkeypatch.setattr("cmlab.site.builder.write_sources", lambda home, folder: few_sources(folder))
    with pytest.raises(RuntimeError, match="with warnings(.|\n)*nowhere"):
        build(output, HOME)
    assert (output / "searchindex.js").read_text() == "old"


def test_a_linked_folder_is_filled_where_it_leads_again_and_again(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    link = tmp_path / "site"
    link.symlink_to("real")
    monkeypatch.setattr("cmlab.site.builder.write_sources", lambda home, folder: few_sources(folder, "Two."))
    for _ in range(2):
        build(link, HOME)
    assert link.is_symlink() and (tmp_path / "real" / "index.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "site"]


def test_a_file_is_no_folder_for_a_site(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="is a file"):
        build(tmp_path / "mine.txt", HOME)


def few_sources(folder: Path, text: str = "[two](nowhere.md)") -> None:
    folder.mkdir()
    (folder / "index.md").write_text(f"# One\n\n{text}\n")
