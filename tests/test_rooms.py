"""The package is a row of rooms: CONTRIBUTING.md names them in their order."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
ROW = re.search(r"^`(checks, .*)`", (HOME / "CONTRIBUTING.md").read_text(), re.M)[1].split(", ")
FILES = sorted((HOME / "cmlab").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(HOME / "cmlab").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports when it is imported itself."""
    rooms = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cmlab":
            rooms |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
    return rooms


def test_every_room_stands_in_the_row():
    assert sorted(ROW) == sorted({room_of(path) for path in FILES} - {"__init__"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(HOME).as_posix())
def test_a_room_imports_only_from_those_before_it(path):
    room = room_of(path)
    before = ROW[: ROW.index(room)] if room in ROW else []
    assert imported(path) - {room} <= set(before)


def test_the_package_is_found_from_the_folder_above_a_clone(tmp_path):
    """There, Python sees a folder called cmlab: the clone."""
    (tmp_path / "cmlab").symlink_to(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", "import cmlab; cmlab.load"], cwd=tmp_path, check=True)
