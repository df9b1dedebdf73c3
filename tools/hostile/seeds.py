"""The intact files that hostile files are made from."""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from grutrace.storage.shards.merge import merge_shards
from grutrace.storage.write.writer import Writer
from tests.storage.shard_streams import full_shards, write_shards
from tests.storage.streams import full_stream

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "v1.0"

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


@cache
def merged() -> dict[str, bytes]:
    """A file that was merged of two shards, and the shards beside it, by their names."""
    with TemporaryDirectory() as folder:
        shards = write_shards(Path(folder) / "run.h5", full_shards()[:2])
        merge_shards(shards, Path(folder) / "run.h5")
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def put(name: str, path: Path) -> Path:
    """Write a sound file."""
    path.write_bytes(content(name))
    return path
