from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zarr

from grutrace.storage.open import open_sink
from tests.storage.streams import full_stream


@pytest.fixture(scope="module", autouse=True)
def zarr_threads(tmp_path_factory: Any) -> None:
    """zarr starts threads when it is first used and keeps them: no leak of ours."""
    zarr.config.set({"threading.max_workers": 1})
    zarr.open_group(tmp_path_factory.mktemp("zarr"), mode="w", zarr_format=2)


@pytest.fixture(scope="package")
def full(tmp_path_factory: Any) -> Path:
    """A file with everything in it that the format can hold."""
    path, stream = tmp_path_factory.mktemp("trace") / "run.h5", full_stream()
    sink = open_sink(path, stream.header)
    for record in stream.records:
        sink.append(record)
    sink.close()
    return path
