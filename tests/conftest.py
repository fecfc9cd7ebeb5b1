"""Tests that need something beside the package are collected only where it is."""

import os
import shutil

from reference_code import FOLDER

collect_ignore = [] if (FOLDER / "cm" / "unet.py").is_file() else ["test_reference.py"]
if not (os.environ.get("CHROMIUM") or shutil.which("chromium")):
    collect_ignore.append("test_tour_browser.py")
