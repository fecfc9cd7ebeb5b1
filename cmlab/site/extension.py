"""What Sphinx learns for the site: formulas as MathML, which needs no script, and docstrings as they are written here."""

from __future__ import annotations

import html
import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

SPECIAL = re.compile(r"([*|\\`]|_(?=\W|$))")


def setup(app) -> dict:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    app.connect("autodoc-process-docstring", _plain)
    app.connect("autodoc-skip-member", _skip)
    app.config.html_static_path.append(str(Path(__file__).parent / "static"))
    app.add_css_file("cmlab.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(translator, node) -> None:
    translator.body.append(f'<span class="math">{mathml(node.astext(), "inline")}</span>')
    raise nodes.SkipNode


def _block(translator, node) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def mathml(formula: str, display: str) -> str:
    """A TeX formula as MathML; its source where the converter does not know it."""
    try:
        return convert(formula.replace(r"\big\|", r"\big‖"), display=display)  # of which it knows the second only
    except Exception:  # of a converter of other people's, anything
        return f"<code>{html.escape(formula)}</code>"


def _skip(app, what, name, found, skip, options) -> bool | None:
    """The fields of a NamedTuple, which its own docstring explains."""
    return True if (getattr(found, "__doc__", "") or "").startswith("Alias for field number") else None


def _plain(app, what, name, found, options, lines: list[str]) -> None:
    """Docstrings are plain text: what would be mark-up is escaped, `names` are code, and tables keep their columns."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines[:] = "\n\n".join(_paragraph(text) for text in paragraphs if text.strip()).splitlines() + [""]


def _paragraph(text: str) -> str:
    rows = text.splitlines()
    if any(row.startswith("    ") or re.search(r"\S {2,}\S", row) for row in rows):
        return "\n".join(f"| {escaped(row.strip())}" for row in rows)
    return "\n".join(escaped(row) for row in rows)


def escaped(text: str) -> str:
    """A line without mark-up but for `code` and *emphasis*."""
    parts = re.split(r"(`[^`]+`|(?<![\w*])\*\w[^*]*\*(?![\w*]))", text)
    return "".join(_marked(part) if k % 2 else SPECIAL.sub(r"\\\1", part) for k, part in enumerate(parts))


def _marked(text: str) -> str:
    return f"`{text}`" if text.startswith("`") else text
