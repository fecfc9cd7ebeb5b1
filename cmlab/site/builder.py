"""From notebooks, README and docstrings to HTML, by MyST-NB on Sphinx. Nothing is run and nothing is fetched."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

from cmlab.batch import usable_folder
from cmlab.site.links import dead_links
from cmlab.site.manuscript import write_sources
from cmlab.tour import lessons_folder

NEEDED = ("myst_nb", "sphinx_book_theme")
SETTINGS = {
    "project": "Consistency models, step by step",
    "html_title": "Consistency models, step by step",
    "author": "the cmlab authors",
    "language": "en",
    "extensions": ["myst_nb", "sphinx.ext.autodoc", "cmlab.site.extension"],
    "html_theme": "sphinx_book_theme",
    "html_theme_options": {
        "show_toc_level": 2,
        "use_download_button": True,
        "use_fullscreen_button": False,
        "navbar_persistent": [],
    },
    "html_context": {"default_mode": "auto"},  # dark where the reader's system is
    "html_math_renderer": "mathml",
    "nb_execution_mode": "off",  # the notebooks come executed
    "nb_merge_streams": True,
    "myst_enable_extensions": ["dollarmath", "amsmath"],
    "myst_heading_anchors": 3,
    "suppress_warnings": ["myst.header", "mystnb.unknown_mime_type"],
    "autodoc_member_order": "bysource",
    "autodoc_typehints": "signature",
    "add_module_names": False,
}


def build(output: Path, home: Path | None = None) -> Path:
    """Builds the site into output, which it replaces, and returns its index.html.

    home is the folder with README.md and notebooks/, the repository's without it. Raises ValueError where Sphinx is missing or output
    holds something else than a site, RuntimeError with the warnings of the build and for links that lead nowhere; output is then left
    as it was.
    """
    home = home or lessons_folder().parent
    _check(home, output)
    usable_folder(output.absolute().parent)
    with tempfile.TemporaryDirectory(prefix="cmlab-site-") as work:
        sources, fresh = Path(work) / "sources", Path(work) / "html"
        write_sources(home, sources)
        _run_sphinx(sources, fresh, Path(work) / "doctrees")
        shutil.copytree(home / "notebooks", fresh / "_sources" / "lessons", dirs_exist_ok=True, ignore=_no_notebook)
        dead = dead_links(fresh)
        if dead:
            raise RuntimeError("links that lead nowhere: " + "; ".join(dead))
        if output.exists():
            shutil.rmtree(output)
        shutil.copytree(fresh, output)
    return output / "index.html"


def _check(home: Path, output: Path) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"the site needs {', '.join(missing)}: pip install 'cmlab[site]'")
    if not (home / "README.md").is_file():
        raise ValueError(f"the site is built from a copy of the repository: there is no README.md in {home}")
    if output.exists() and any(output.iterdir()) and not (output / "searchindex.js").is_file():
        raise ValueError(f"{output} holds something else than a site; name another folder, or empty it")


def _no_notebook(folder: str, names: list[str]) -> list[str]:
    """What is not given to download beside a lesson: all but the notebooks themselves, as they are."""
    return [
        name
        for name in names
        if (Path(folder) / name).is_file() and not name.endswith(".ipynb") or name.startswith(".")
    ]


def _run_sphinx(sources: Path, output: Path, doctrees: Path) -> None:
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")  # the same notebooks give the same pages
    told = io.StringIO()
    with docutils_namespace(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tools to each other
        app = Sphinx(sources, None, output, doctrees, "html", SETTINGS, status=None, warning=told, freshenv=True)
        app.build()
    if told.getvalue().strip():
        raise RuntimeError(f"the site was built with warnings:\n{told.getvalue().strip()}")
