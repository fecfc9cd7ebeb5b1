"""Tests that need something beside the package are collected only where it is."""

from reference_code import FOLDER

collect_ignore = [] if (FOLDER / "cm" / "unet.py").is_file() else ["test_reference.py"]
