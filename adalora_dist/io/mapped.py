"""Files that are mapped into memory, and what of them is resident.

Pages of a mapped file stay with the process until the system wants them for something else, so that a pass over a large
file looks, to whoever counts, as if all of it had been read into memory. They can be given back at once: the file
cache may keep them, and whoever reads them again gets them again.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_READ_ONLY = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r--[ps] \S+ \S+ [1-9]\d*\s+(/.*)")
_DONT_NEED = 4  # MADV_DONTNEED, on Linux


def release_mapped(suffix: str) -> None:
    """Give back the resident pages of files with this suffix that are mapped for reading. Linux; elsewhere, nothing.

    Only mappings without the right to write, so that nothing is in them but what the files have.
    """
    if sys.platform != "linux" or not _MAPS.exists():
        return
    madvise = ctypes.CDLL(None).madvise
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        if (found := _READ_ONLY.fullmatch(line)) and found[3].removesuffix(" (deleted)").endswith(suffix):
            start, end = int(found[1], 16), int(found[2], 16)
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)
