"""The parts of a run: a file of its own for each set of modules that `grutrace run` discovered.

docs/format.md says how parts are named and stamped.
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
    """Which part of which run a file is.

    Attributes:
        run: The same for all parts of a run, and for no other's.
        part: From 1.
    """

    run: str
    part: int

    @property
    def options(self) -> dict[str, Any]:
        """The stamp among the options of a trace."""
        return {"run": {"id": self.run, "part": self.part}}


def run_part_of(options: Mapping[str, Any]) -> RunPart | None:
    """The stamp among the options of a part; None of a trace that no `grutrace run` made.

    Raises:
        FormatError: There is one which is not as it should be.
    """
    found = options.get("run")
    if found is None:
        return None
    if isinstance(found, dict):
        run, part = found.get("id"), found.get("part")
        if isinstance(run, str) and type(part) is int and part > 0:
            return RunPart(run, part)
    raise FormatError("attribute 'options', run", "a text 'id' and a number 'part' from 1", found)


def part_path(first: Path, number: int) -> Path:
    """The file of a part, from 1, by that of the first."""
    return first if number == 1 else first.with_name(f"{first.stem}.part{number:04}{first.suffix}")


def part_files(path: str | os.PathLike[str]) -> dict[int, Path]:
    """Existing files that are called like parts of this one, after the first, by number."""
    first = Path(os.path.realpath(path))
    name = re.compile(
        re.escape(f"{first.stem}.part") + r"([0-9]{4,9})" + re.escape(first.suffix), re.ASCII
    )
    found = {}
    for file in first.parent.iterdir() if first.parent.is_dir() else ():
        match = name.fullmatch(file.name)
        if match and part_path(first, int(match[1])) == file and int(match[1]) > 1:
            found[int(match[1])] = file
    return dict(sorted(found.items()))


def read_run_part(path: Path) -> RunPart | None:
    """The stamp of a file.

    Raises:
        TraceFileError: It cannot be read as a trace.
    """
    with translate_read_errors(path), lock_readers(), open_for_reading(path) as file:
        return run_part_of(read_root(file)["options"])


def parts_of(path: str | os.PathLike[str]) -> list[Path]:
    """The files of the run that this file is the first part of; the file alone if it is none.

    Raises:
        TraceFileError: One of them cannot be read, or one before the last is missing.
    """
    first = Path(os.path.realpath(path))
    run_part = read_run_part(first)
    if run_part is None or run_part.part != 1:
        return [first]
    numbers = [number for number, _ in _iter_run_parts(first, run_part.run)]
    for expected, number in enumerate(numbers, 2):
        if number != expected:
            raise TraceFileError(
                f"{path} is not whole: {part_path(first, expected)} is missing, and "
                f"{part_path(first, number).name} is there. (Each part can be opened by itself)"
            )
    return [part_path(first, number) for number in (1, *numbers)]


def require_same_folder(first: Path, file: Path) -> None:
    """Refuse a part that is a link out of the folder of the first: whoever made it chose the file.

    Raises:
        TraceFileError: It is one.
    """
    real = Path(os.path.realpath(file))
    if real.parent != first.parent:
        raise TraceFileError(f"{file} is a link to {real}, which is not beside {first}")


def _iter_run_parts(first: Path, run: str) -> Iterator[tuple[int, Path]]:
    for number, file in part_files(first).items():
        require_same_folder(first, file)
        run_part = read_run_part(file)
        if run_part is not None and run_part.run == run:
            if run_part.part != number:
                raise TraceFileError(
                    f"{file} is part {run_part.part} of its run by its own account"
                )
            yield number, file


def check_writable(path: str | os.PathLike[str], mode: str) -> None:
    """Refuse early what a run could not write. Nothing that exists is changed.

    Raises:
        TraceFileError: There is a file in the way, one cannot be made, with "a" the file is no
            first part of a run, or with "overwrite" grutrace did not write it or somebody writes to
            a part.
    """
    first = Path(os.path.realpath(path))
    run_part = read_run_part(first) if first.exists() and mode == "a" else None
    if first.exists() and mode == "w":
        raise TraceFileError(f"{path} exists: mode 'overwrite' replaces it, mode 'a' appends to it")
    if first.exists() and not first.is_file():
        raise TraceFileError(f"{path} cannot be replaced: it is not a file")
    if first.exists() and mode == "a" and (run_part is None or run_part.part != 1):
        raise TraceFileError(f"{path} cannot be appended to: grutrace run did not make it")
    own = _own_parts(first) if mode in ("a", "overwrite") else []
    if mode == "overwrite":
        for file in (first, *own):
            require_unclaimed(file)
            require_replaceable(file)
    for file in part_files(first).values():
        if file not in own:
            raise TraceFileError(f"{file} is in the way: it is no part of {path}")
    _try_to_create(first)


def remove_parts(paths: list[Path]) -> None:
    """Remove the parts of a run that another one replaces."""
    for path in reversed(paths):
        path.unlink(missing_ok=True)


def replaceable_parts(path: str | os.PathLike[str]) -> list[Path]:
    """The parts after the first that go when a run replaces this file.

    Raises:
        TraceFileError: Somebody writes to one of them.
    """
    found = _own_parts(Path(os.path.realpath(path)))
    for file in found:
        require_unclaimed(file)
        require_replaceable(file)
    return found


def _own_parts(first: Path) -> list[Path]:
    """The parts after the first of the run that a file is of, as far as can be told."""
    try:
        run_part = read_run_part(first)
        return (
            [] if run_part is None else [file for _, file in _iter_run_parts(first, run_part.run)]
        )
    except TraceFileError:
        return []


def _try_to_create(first: Path) -> None:
    if not first.parent.is_dir():
        raise TraceFileError(f"{first} cannot be created: there is no folder {first.parent}")
    trial = first.with_name(f"{first.name}.trial-{os.getpid()}")
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise TraceFileError(f"{first} cannot be created: {error.strerror}") from error


class RunSource(UnionSource):
    """All parts of a run as one `Source`. Parts that come later are found when it is refreshed.

    Args:
        path: Of the first part.
        first: The source of that file.

    Raises:
        TraceFileError: A part cannot be read, or one before the last is missing.
    """

    def __init__(self, path: str | os.PathLike[str], first: FileSource, run_part: RunPart) -> None:
        self._first, self._run_part = Path(os.path.realpath(path)), run_part
        self._next = 2
        parts_of(path)
        super().__init__(str(path), [first])

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled, it is the path of the first part."""
        return open_run, (str(self._first),)

    def refresh(self) -> Tables:
        """The tables of all parts that are there by now."""
        while (part_path(self._first, self._next)).exists():
            path = part_path(self._first, self._next)
            require_same_folder(self._first, path)
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
    """The source of a file, with the other parts of its run if it is the first of one.

    Raises:
        TraceFileError: The file, or a part, cannot be read.
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
