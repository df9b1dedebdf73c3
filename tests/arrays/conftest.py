from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import dask
import pytest


@pytest.fixture(autouse=True)
def threads_of_this_test() -> Iterator[None]:
    """dask's own threads stay for good, which looks like a leak."""
    with ThreadPoolExecutor(3) as pool, dask.config.set(pool=pool, scheduler="threads"):
        yield
