"""Write the reports of benchmarks and checks while they run.

It imports nothing of grutrace, so that a check can report a grutrace that cannot be imported.
"""

from __future__ import annotations

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a process that is killed leaves the old text or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
