"""What torch.compile builds its kernels with. Imports no torch."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec


def missing_build_tool(on_gpu: bool) -> str:
    """What torch.compile needs on this machine and would not find, in words; empty: all is there."""
    if on_gpu and find_spec("triton") is None:
        return "Triton (pip install triton)"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return "" if shutil.which(compiler) else f"a C++ compiler ({compiler})"
