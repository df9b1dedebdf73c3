"""The sound files that hostile ones are made of."""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from grutrace.storage.writer import Writer
from tests.storage.streams import full_stream

GOLDEN = Path(__file__).parents[1] / "golden" / "v1.0"

#: Traces, by what they have: see `tests/golden`. The last is of the format as it is written now.
TRACES = ("inline", "deferred", "decoder", "killed", "now")

STATISTICS = "statistics"


@cache
def content(name: str) -> bytes:
    """The bytes of a sound file."""
    if name != "now":
        return lzma.decompress((GOLDEN / f"{name}.h5.xz").read_bytes())
    with TemporaryDirectory() as folder:
        stream = full_stream()
        writer = Writer(Path(folder) / "run.h5", stream.header)
        for record in stream.records:
            writer.write(record)
        writer.close()
        return (Path(folder) / "run.h5").read_bytes()


def put(name: str, path: Path) -> Path:
    """Write a sound file."""
    path.write_bytes(content(name))
    return path
