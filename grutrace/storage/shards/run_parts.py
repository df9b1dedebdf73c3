"""The parts of a run: one file for each set of modules that `grutrace run` discovered.

docs/format.md defines their names and the option that identifies them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grutrace.errors import TraceFileError
from grutrace.storage.format.header import read_root
from grutrace.storage.format.tables import Tables
from grutrace.storage.hdf5.errors import FormatError, translate_read_errors
from grutrace.storage.hdf5.handle import lock_readers
from grutrace.storage.hdf5.safe_open import open_for_reading
from grutrace.storage.read.file_source import FileSource
from grutrace.storage.shards.union import UnionSource
from grutrace.storage.write.claims import require_unclaimed
from grutrace.storage.write.overwrite import require_replaceable


@dataclass(frozen=True)
class RunPart:
    """The run of a file, and its part number.

    Attributes:
        run: Unique id of the run, the same in all its parts.
        part: Number of the part, from 1.
    """

    run: str
    part: int

    @property
    def options(self) -> dict[str, Any]:
        """The option that identifies the part in its file."""
        return {"run": {"id": self.run, "part": self.part}}


def run_part_of(options: Mapping[str, Any]) -> RunPart | None:
    """Return the run part in the options of a trace; None if it is not part of a run.

    Raises:
        FormatError: The option is malformed.
    """
    entry = options.get("run")
    if entry is None:
        return None
    if isinstance(entry, dict):
        run, part = entry.get("id"), entry.get("part")
        if isinstance(run, str) and type(part) is int and part > 0:
            return RunPart(run, part)
    raise FormatError("attribute 'options', run", "a text 'id' and a number 'part' from 1", entry)


def part_path(first_path: Path, number: int) -> Path:
    """Return the path of a part, numbered from 1, from the path of the first part."""
    if number == 1:
        return first_path
    return first_path.with_name(f"{first_path.stem}.part{number:04}{first_path.suffix}")


def part_files(path: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the existing files with names of later parts of this file, by number."""
    first_path = Path(os.path.realpath(path))
    name = re.compile(
        re.escape(f"{first_path.stem}.part") + r"([0-9]{4,9})" + re.escape(first_path.suffix),
        re.ASCII,
    )
    files = {}
    for file in first_path.parent.iterdir() if first_path.parent.is_dir() else ():
        match = name.fullmatch(file.name)
        if match and part_path(first_path, int(match[1])) == file and int(match[1]) > 1:
            files[int(match[1])] = file
    return dict(sorted(files.items()))


def read_run_part(path: Path) -> RunPart | None:
    """Read the run part of a file.

    Raises:
        TraceFileError: The file cannot be read as a trace.
    """
    with translate_read_errors(path), lock_readers(), open_for_reading(path) as file:
        return run_part_of(read_root(file)["options"])


def parts_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a run by its first part; for other files, the file alone.

    Raises:
        TraceFileError: A part cannot be read, or a part before the last is missing.
    """
    first_path = Path(os.path.realpath(path))
    run_part = read_run_part(first_path)
    if run_part is None or run_part.part != 1:
        return [first_path]
    numbers = [number for number, _ in _iter_run_parts(first_path, run_part.run)]
    for expected, number in enumerate(numbers, 2):
        if number != expected:
            raise TraceFileError(
                f"{path} is incomplete: {part_path(first_path, expected)} is missing, and "
                f"{part_path(first_path, number).name} exists. Each part can be opened separately"
            )
    return [part_path(first_path, number) for number in (1, *numbers)]


def require_same_folder(first_path: Path, file: Path) -> None:
    """Check that a part is not a link to another folder, which could point to any file.

    Raises:
        TraceFileError: The part is a link to another folder.
    """
    real = Path(os.path.realpath(file))
    if real.parent != first_path.parent:
        raise TraceFileError(
            f"{file} is a link to {real}, which is not in the folder of {first_path}"
        )


def _iter_run_parts(first_path: Path, run: str) -> Iterator[tuple[int, Path]]:
    for number, file in part_files(first_path).items():
        require_same_folder(first_path, file)
        run_part = read_run_part(file)
        if run_part is not None and run_part.run == run:
            if run_part.part != number:
                raise TraceFileError(
                    f"{file} is part {run_part.part} of its run, and its name is that of part "
                    f"{number}: rename it"
                )
            yield number, file


def check_writable(path: str | os.PathLike[str], mode: str) -> None:
    """Check before a run that its files can be written. Existing files are not changed.

    Raises:
        TraceFileError: A file exists or cannot be created; with "a", the file is not the first
            part of a run; with "overwrite", the file is not a trace, or a part is being written.
    """
    first_path = Path(os.path.realpath(path))
    run_part = read_run_part(first_path) if first_path.exists() and mode == "a" else None
    if first_path.exists() and mode == "w":
        raise TraceFileError(f"{path} exists: mode 'overwrite' replaces it, mode 'a' appends to it")
    if first_path.exists() and not first_path.is_file():
        raise TraceFileError(f"{path} cannot be replaced: it is not a file")
    if first_path.exists() and mode == "a" and (run_part is None or run_part.part != 1):
        raise TraceFileError(f"{path} cannot be appended to: grutrace run did not make it")
    later_parts = _later_parts(first_path) if mode in ("a", "overwrite") else []
    if mode == "overwrite":
        for file in (first_path, *later_parts):
            require_unclaimed(file)
            require_replaceable(file)
    for file in part_files(first_path).values():
        if file not in later_parts:
            raise TraceFileError(
                f"{file} is in the way: it is not a part of {path}. Move or delete it"
            )
    _try_to_create(first_path)


def remove_parts(paths: list[Path]) -> None:
    """Remove the parts of a run that another run replaces."""
    for path in reversed(paths):
        path.unlink(missing_ok=True)


def replaceable_parts(path: str | os.PathLike[str]) -> list[Path]:
    """Return the later parts of a file, which are removed when a run replaces it.

    Raises:
        TraceFileError: A part is being written.
    """
    files = _later_parts(Path(os.path.realpath(path)))
    for file in files:
        require_unclaimed(file)
        require_replaceable(file)
    return files


def _later_parts(first_path: Path) -> list[Path]:
    """Return the later parts of the run of a file; none if they cannot be read."""
    try:
        run_part = read_run_part(first_path)
        if run_part is None:
            return []
        return [file for _, file in _iter_run_parts(first_path, run_part.run)]
    except TraceFileError:
        return []


def _try_to_create(path: Path) -> None:
    if not path.parent.is_dir():
        raise TraceFileError(f"{path} cannot be created: there is no folder {path.parent}")
    trial = path.with_name(f"{path.name}.trial-{os.getpid()}")
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise TraceFileError(f"{path} cannot be created: {error.strerror}") from error


class RunSource(UnionSource):
    """All parts of a run as one `Source`. Refreshing it finds new parts.

    Args:
        path: Path of the first part.
        first: Source of the first part.
        run_part: Run part of the first file.

    Raises:
        TraceFileError: A part cannot be read, or a part before the last is missing.
    """

    def __init__(self, path: str | os.PathLike[str], first: FileSource, run_part: RunPart) -> None:
        self._first_path, self._run_part = Path(os.path.realpath(path)), run_part
        self._next = 2
        parts_of(path)
        super().__init__(str(path), [first])

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the path of the first part."""
        return open_run, (str(self._first_path),)

    def refresh(self) -> Tables:
        """Return the tables of all present parts."""
        while (part_path(self._first_path, self._next)).exists():
            path = part_path(self._first_path, self._next)
            require_same_folder(self._first_path, path)
            source = FileSource(path)
            with translate_read_errors(path):
                run_part = run_part_of(source.header.options)
            if run_part != RunPart(self._run_part.run, self._next):
                source.close()
                break
            self.add(source)
            self._next += 1
        return super().refresh()


def open_run(path: str | os.PathLike[str]) -> FileSource | RunSource:
    """Return the source of a file, with all parts of the run if the file is the first part.

    Raises:
        TraceFileError: The file or a part cannot be read.
    """
    first = FileSource(path)
    try:
        with translate_read_errors(Path(path)):
            run_part = run_part_of(first.header.options)
        if run_part is None or run_part.part != 1:
            return first
        return RunSource(path, first, run_part)
    except BaseException:
        first.close()
        raise
