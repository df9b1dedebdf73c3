"""What is exported appears under its name whole, or not at all; nothing is overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grutrace.errors import GrutraceError, TraceFileError
from grutrace.storage.faults import in_brief
from grutrace.storage.placing import put_in_place, room_for


@contextmanager
def made_whole(path: Path, *, folder: bool) -> Iterator[Path]:
    """Where to make a file or folder; it takes its place when all went well.

    Raises:
        TraceFileError: There is something in its place, or it cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise TraceFileError(f"{path} exists: name another place to export to")
    new = room_for(path, "w")
    try:
        with _writing(path):
            if folder:
                new.mkdir()
            yield new
            if folder:
                # Unlike a file, a folder does not replace another one that has something in it.
                new.rename(path)
            else:
                put_in_place(new, path, "w")
    finally:
        shutil.rmtree(new, ignore_errors=True)
        new.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except GrutraceError:
        # The trace cannot be read: an error that names another file.
        raise
    except OSError as error:
        # Without the name of the file that is being made, which is a temporary one.
        raise TraceFileError(f"{path} cannot be written: {in_brief(error)}") from error
