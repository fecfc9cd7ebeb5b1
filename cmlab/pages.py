"""The HTML pages of a run: an index and a page a notebook. Each is one file that needs nothing from outside."""

from __future__ import annotations

import base64
import copy
import html
import importlib.util
import io
import re
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from cmlab.batch import Job, RunFolder

THUMBNAIL = (640, 360)  # pixels: twice the size on the page, for fine screens

INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="about">{about}</p>
{notice}
</header>
<main>
{cards}
</main>
<footer>Key numbers of all notebooks: <a href="results.json">results.json</a>.
Figures: <a href="figures/">figures/</a>.</footer>
</body>
</html>
"""

STYLE = """
:root { --page: #f6f5f2; --card: #fff; --ink: #1d1d1b; --quiet: #63625c; --line: #dfddd6; --accent: #b34700;
  --bad: #b3261e; --bad-back: #fdf0ee; --good: #00664a; }
@media (prefers-color-scheme: dark) { :root { --page: #171716; --card: #222220; --ink: #eceae4; --quiet: #a3a199;
  --line: #3a3935; --accent: #ff9a57; --bad: #ff8a80; --bad-back: #33201e; --good: #5fd0a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 2rem; letter-spacing: -.02em; line-height: 1.2; }
.about { margin: .4rem 0 0; color: var(--quiet); }
.notice { margin: 1rem 0 0; padding: .6rem .9rem; border-left: 4px solid var(--bad); border-radius: 4px;
  background: var(--bad-back); }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr));
  gap: 1.5rem; margin: 2rem 0; }
article { display: flex; flex-direction: column; overflow: hidden; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; }
article.failed { border-color: var(--bad); }
.picture { display: flex; align-items: center; justify-content: center; height: 11.5rem; background: #fff;
  border-bottom: 1px solid var(--line); }
.picture img { max-width: 100%; max-height: 100%; padding: .5rem; }
.picture.none { background: var(--page); color: var(--quiet); }
.text { display: flex; flex-direction: column; flex: 1; padding: 1rem 1.2rem 1.1rem; }
h2 { margin: 0; font-size: 1.1rem; line-height: 1.3; }
h2 a { color: inherit; text-decoration: none; } h2 a:hover { text-decoration: underline; }
.state { margin: .2rem 0 .7rem; color: var(--quiet); font-size: .9rem; }
.done b { color: var(--good); } .failed b, .interrupted b { color: var(--bad); }
table { width: 100%; border-collapse: collapse; font-size: .9rem; margin-bottom: .9rem; }
th { font-weight: normal; text-align: left; color: var(--quiet); overflow-wrap: anywhere; }
th, td { padding: .22rem 0; border-top: 1px solid var(--line); }
td { text-align: right; font-variant-numeric: tabular-nums; padding-left: 1rem; }
.links { margin: auto 0 0; font-size: .9rem; }
a { color: var(--accent); } .links a + a { margin-left: 1.1rem; }
.error { margin: 0 0 .6rem; color: var(--bad); overflow-wrap: anywhere; }
pre { max-height: 15rem; margin: .3rem 0 .8rem; padding: .7rem .9rem; overflow: auto; background: var(--page);
  border: 1px solid var(--line); border-radius: 6px;
  font: .82rem/1.45 ui-monospace, "Liberation Mono", "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; font-size: .9rem; margin-bottom: .6rem; }
footer { color: var(--quiet); font-size: .9rem; }
"""


def index_page(run: RunFolder) -> str:
    """The page of a run: a card a notebook with picture, status, run time, key numbers, or the error and its cell."""
    seconds = sum(job.seconds for job in run.jobs)
    about = [run.started, "CI size" if run.fast else "", run.machine, f"{duration(seconds)} in all"]
    return INDEX.format(
        title=html.escape(run.title), about=" · ".join(html.escape(part) for part in about if part), style=STYLE,
        notice=_notice(run), cards="\n".join(_card(job, run) for job in run.jobs),
    )  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 38 s, 3 min 05 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _notice(run: RunFolder) -> str:
    """What the reader must know first: failures, or notebooks still to run and how."""
    lines = []
    if run.failed:
        lines.append(
            f"{len(run.failed)} of {len(run.jobs)} failed: {', '.join(html.escape(job.name) for job in run.failed)}."
        )
    left = sum(job.status in ("waiting", "interrupted") for job in run.jobs)
    if left:
        lines.append(
            f"{left} not run yet. Go on with <code>{html.escape(f'{run.command} --resume {run.folder}')}</code>"
        )
    return f'<p class="notice">{"<br>".join(lines)}</p>' if lines else ""


def _card(job: Job, run: RunFolder) -> str:
    name, title = quote(job.name), html.escape(job.title or job.name)
    there = {kind: (run.folder / f"{job.name}.{kind}").exists() for kind in ("html", "ipynb")}
    heading = f'<a href="{name}.html">{title}</a>' if there["html"] else title
    state = {"done": "done", "failed": "failed", "interrupted": "interrupted", "waiting": "not run yet"}[job.status]
    time = f" in {duration(job.seconds)}" if job.seconds else ""
    links = f'<a href="{name}.html">Read</a>' * there["html"] + f'<a href="{name}.ipynb">Notebook</a>' * there["ipynb"]
    return (
        f'<article class="{job.status}" id="{html.escape(job.name)}">{_picture(job, run)}<div class="text">'
        f'<h2>{heading}</h2><p class="state"><b>{state}</b>{time} · {html.escape(job.name)}</p>'
        f'{_error(job)}{_numbers(job)}<p class="links">{links}</p></div></article>'
    )


def _picture(job: Job, run: RunFolder) -> str:
    if not job.figures:
        return '<div class="picture none">no figure</div>'
    from PIL import Image

    first, buffer = job.figures[0], io.BytesIO()
    picture = Image.open(run.folder / first["file"]).convert("RGBA")
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A"))
    flat.thumbnail(THUMBNAIL)
    flat.save(buffer, "PNG", optimize=True)
    source = base64.b64encode(buffer.getvalue()).decode()
    alt = html.escape(first["alt"] or f"First figure of {job.title or job.name}")
    return f'<div class="picture"><img alt="{alt}" src="data:image/png;base64,{source}"></div>'


def _numbers(job: Job) -> str:
    rows = "".join(
        f"<tr><th scope=row>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(readable(value))}</td></tr>"
        for name, value in (job.results or {}).items()
    )
    return f"<table>{rows}</table>" if rows else ""


def readable(value: float | str) -> str:
    """A key number with four digits that count; texts as they are."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _error(job: Job) -> str:
    if job.error is None:
        return ""
    where, message, source = (html.escape(job.error[key]) for key in ("cell", "message", "source"))
    trace = html.escape(job.error["traceback"])
    more = f"<details><summary>Traceback</summary><pre>{trace}</pre></details>" if trace else ""
    return f'<p class="error"><strong>{where}</strong> {message}</p><pre>{source}</pre>{more}'


# --- a notebook as a page -------------------------------------------------------------------------------------------


def notebook_page(notebook, title: str) -> str:
    """An executed notebook as one HTML file that can be read offline: formulas as MathML, no scripts from outside."""
    from nbconvert import HTMLExporter

    notebook = copy.deepcopy(notebook)
    notebook.metadata["title"] = title
    notebook.metadata.pop("widgets", None)  # live controls need a kernel: the static figure beside them stays
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
        for output in cell.get("outputs", []):
            _simplify(output)
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", widget_renderer_url="", mermaid_js_url="")
    page, _ = exporter.from_notebook_node(notebook)
    page = re.sub(
        r"<script\b.*?</script>", "", page, flags=re.S
    )  # loaders of MathJax and the like: nothing here needs one
    return page.replace("</head>", '<link rel="icon" href="data:,"></head>', 1)


def _simplify(output) -> None:
    """Widgets as their texts, pictures with the alternative text that nbconvert's template leaves out."""
    data, about = output.get("data", {}), output.get("metadata", {})
    data.pop("application/vnd.jupyter.widget-view+json", None)
    if "image/png" in data:
        alt = html.escape(about.get("image/png", {}).get("alt", "a figure without a description"))
        data["text/html"] = f'<img alt="{alt}" src="data:image/png;base64,{data.pop("image/png")}">'


# Code spans and blocks first: a dollar in them is a dollar.
_MATH = re.compile(
    r"(```.*?```|`[^`\n]*`)|(?<![\\$])\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<![\s\\])\$(?!\w)", re.S
)


def with_mathml(text: str) -> str:
    """Markdown with its $formulas$ as MathML, which browsers draw without MathJax; as they were where that fails."""
    if importlib.util.find_spec("latex2mathml") is None:
        return text
    from latex2mathml.converter import convert

    def replace(match: re.Match) -> str:
        code, display, inline = match.groups()
        if code is not None:
            return code
        try:
            mathml = convert(display or inline, display="block" if display else "inline")
        except Exception:  # what TeX knows and the converter does not
            return match[0]
        return re.sub(r"\s*\n\s*", " ", mathml)

    return _MATH.sub(replace, text)
