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

MARK = ".cmlab-site"  # in a folder that may be replaced
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
    """Builds the site into output, a folder that it replaces with all that was added to it, and returns its index.html.

    home is the folder with README.md and notebooks/, the repository's without it. Raises ValueError where Sphinx is missing or output
    holds something else than a site, RuntimeError with the warnings of the build and for links that lead nowhere; output is then left
    as it was.
    """
    home = home or lessons_folder().parent
    output = output.resolve()  # the folder that a link leads to is replaced, not the link
    _check(home, output)
    usable_folder(output.parent)
    with tempfile.TemporaryDirectory(prefix="cmlab-site-") as work:
        sources, fresh = Path(work) / "sources", Path(work) / "html"
        write_sources(home, sources)
        _run_sphinx(sources, fresh, Path(work) / "doctrees")
        for page in (fresh / "_sources" / "lessons").rglob("*.ipynb"):  # to download: the notebooks as they are
            shutil.copyfile(home / "notebooks" / page.relative_to(fresh / "_sources" / "lessons"), page)
        dead = dead_links(fresh)
        if dead:
            raise RuntimeError("links that lead nowhere: " + "; ".join(dead))
        (fresh / MARK).touch()
        _put(fresh, output)
    return output / "index.html"


def _put(fresh: Path, output: Path) -> None:
    """Copies a built site beside output, and only then gives it the name."""
    partial, previous = (output.with_name(f".{output.name}.{kind}") for kind in ("partial", "previous"))
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
    shutil.copytree(fresh, partial)
    if output.exists():
        output.rename(previous)
    partial.rename(output)
    shutil.rmtree(previous, ignore_errors=True)


def _check(home: Path, output: Path) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"the site needs {', '.join(missing)}: pip install -e '.[site]' in the repository")
    if not (home / "README.md").is_file():
        raise ValueError(f"the site is built from a copy of the repository: there is no README.md in {home}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; name a folder for the site")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    others = {name for name in names if name.startswith(".")} - {MARK, ".buildinfo"}
    if names and (others or MARK not in names):
        raise ValueError(f"{output} holds something else than a site of this command; name another folder, or empty it")


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
