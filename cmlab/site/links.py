"""Links of a built site that lead nowhere. Addresses outside are not asked: a site is built without a network."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        for name, value in attributes:
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)
            if value and (name == "src" or (name == "href" and tag in ("a", "link"))):
                self.links.append(value)


def dead_links(folder: Path) -> list[str]:
    """Every link of a page in the folder to a file or an anchor that is not there, as "page: link"."""
    own = [path for path in folder.rglob("*.html") if "_static" not in path.parts]  # there the theme's templates lie
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in own}
    return [
        f"{path.relative_to(folder.resolve())}: {link}"
        for path, page in sorted(pages.items())
        for link in page.links
        if _is_dead(link, path, pages)
    ]


def _is_dead(link: str, path: Path, pages: dict[Path, _Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.exists():
        return True
    wanted = unquote(parts.fragment)
    return bool(wanted) and target in pages and wanted not in pages[target].anchors
