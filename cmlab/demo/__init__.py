"""The demo in the browser (`cmlab app`): generate, compare and edit with the models that are on this disk."""

import atexit
import os
import shutil
import tempfile

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: it asks its makers' addresses otherwise
os.environ.setdefault("GRADIO_SSR_MODE", "False")  # no node server beside it
if "GRADIO_TEMP_DIR" not in os.environ:  # uploads and results: nobody else's to read, and gone at the end
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="cmlab-app-")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
os.makedirs(os.environ["GRADIO_TEMP_DIR"], exist_ok=True)

from cmlab.demo.page import build, launch  # noqa: E402

__all__ = ["build", "launch"]
