"""Tests that need something beside the package are collected only where it is."""

import os
import shutil

import pytest
from reference_code import FOLDER

collect_ignore = [] if (FOLDER / "cm" / "unet.py").is_file() else ["test_reference.py"]
if not (os.environ.get("CHROMIUM") or shutil.which("chromium")):
    collect_ignore.append("test_tour_browser.py")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty torch home without network; returns where it keeps weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there: no network, at once
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    return tmp_path / "torch" / "hub" / "checkpoints"
