"""The instruction sets that the compiled part can use on this processor."""

from __future__ import annotations

import os
import platform

from grutrace.native import library


def _available() -> tuple[str, ...]:
    """Return their names; at least ``none``, which stands for NumPy and torch."""
    before, names = os.environ.get(library.VARIABLE), [library.NONE]
    is_arm = platform.machine() in ("aarch64", "arm64")
    for name in ("neon",) if is_arm else ("portable", "avx2", "avx512"):
        os.environ[library.VARIABLE] = name
        library.load.cache_clear()
        if library.instruction_set() == name:
            names.append(name)
    os.environ.pop(library.VARIABLE)
    if before is not None:
        os.environ[library.VARIABLE] = before
    library.load.cache_clear()
    return tuple(names)


INSTRUCTION_SETS = _available()
