from __future__ import annotations

import contextlib
import gc
import os
import threading

import pytest


def _open_files():
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return {
        (number, name) for number, name in found if name.startswith("/") and "/proc/" not in name
    }


@pytest.fixture(autouse=True)
def nothing_leaks():
    """Every thread ends and every file is closed with the test that opened it."""
    before = _open_files(), set(threading.enumerate())
    yield
    gc.collect()
    threads = {thread for thread in threading.enumerate() if thread not in before[1]}
    for thread in threads:
        thread.join(timeout=5)
    assert not {thread for thread in threads if thread.is_alive()}
    assert sorted(_open_files() - before[0]) == []
