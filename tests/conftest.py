from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.leaks import Watch

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """No test leaves a hook, a TorchFunctionMode, a thread or an open file behind."""
    watch = Watch()
    with watch.over_hooks():
        yield
    assert watch.leaks() == []
