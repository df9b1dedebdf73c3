"""Tests of the limit on the threads of NumPy's BLAS."""

from __future__ import annotations

import pytest
import threadpoolctl

from grutrace.analysis.engine import blas
from grutrace.analysis.engine.blas import single_blas_thread


def numpy_threads() -> int:
    """The number of threads of NumPy's BLAS, as threadpoolctl tells it."""
    (info,) = [
        info
        for info in threadpoolctl.threadpool_info()
        if info["internal_api"] == "openblas" and "numpy" in info["filepath"]
    ]
    return int(info["num_threads"])


def test_one_thread_inside_and_as_before_outside() -> None:
    if blas._functions() is None:
        pytest.skip("NumPy does not use OpenBLAS")
    with threadpoolctl.threadpool_limits(2):
        before = numpy_threads()
        with single_blas_thread():
            assert numpy_threads() == 1
            with single_blas_thread():
                assert numpy_threads() == 1
            assert numpy_threads() == 1
        assert numpy_threads() == before
        with pytest.raises(ZeroDivisionError), single_blas_thread():
            _ = 1 / 0
        assert numpy_threads() == before


def test_another_library_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(blas, "_functions", lambda: None)
    before = [info["num_threads"] for info in threadpoolctl.threadpool_info()]
    with single_blas_thread():
        assert [info["num_threads"] for info in threadpoolctl.threadpool_info()] == before
