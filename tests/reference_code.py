"""The released code itself (openai/consistency_models), imported from a clone of it where there is one.

Clone it into consistency_models/ at the top of this repository, or let REFERENCE_DIR name another folder. It wants
MPI, flash-attn and more that no U-Net needs on a CPU: those imports get empty stand-ins, and its own exact attention
class takes the place of the one that runs on a GPU only.
"""

import importlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

FOLDER = Path(os.environ.get("REFERENCE_DIR", Path(__file__).parents[1] / "consistency_models"))
ABSENT = ["mpi4py", "blobfile", "piq", "flash_attn", "flash_attn.flash_attention", "einops"]


@contextmanager
def reference_modules():
    """Inside, importlib.import_module("cm.…") finds the released code; afterwards sys.modules is as before."""
    before = dict(sys.modules)
    sys.modules.update({name: MagicMock() for name in ABSENT})
    sys.path.insert(0, str(FOLDER))
    try:
        unet = importlib.import_module("cm.unet")
        unet.QKVFlashAttention = lambda channels, heads: unet.QKVAttention(heads)
        yield importlib.import_module
    finally:
        sys.path.remove(str(FOLDER))
        for name in set(sys.modules) - set(before):
            if name == "cm" or name.startswith("cm."):
                del sys.modules[name]
        for name in ABSENT:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]
