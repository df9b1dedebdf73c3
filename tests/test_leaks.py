"""Tests of the fixture that fails a test which leaves something behind."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import grutrace
from tests import leaks
from tests.leaks import Watch


@pytest.fixture
def watch(monkeypatch) -> Watch:
    monkeypatch.setattr(leaks, "PATIENCE", 0.05)
    return Watch()


def test_a_clean_test_has_no_leaks(watch, tmp_path) -> None:
    with grutrace.trace(model := nn.GRU(2, 3), tmp_path / "run.h5"):
        model(torch.randn(4, 2))
    assert watch.leaks() == []


@pytest.mark.parametrize("layers", [1, 2])
def test_a_recording_tracer_is_found(watch, layers) -> None:
    model = nn.GRU(2, 3, layers)
    tracer = grutrace.Tracer(model)
    tracer.start()
    assert watch.leaks() == ["GRU kernels that are still overridden"]
    tracer.stop()
    assert watch.leaks() == []


@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("looked_at", [False, True])
def test_an_unreferenced_trace_is_freed_at_once(gates, to_file, looked_at, tmp_path) -> None:
    """Its rows are freed without a garbage collection, which Python may run much later."""
    model = nn.Sequential(nn.GRU(2, 3))
    gc.disable()
    try:
        for closed in (True, False):
            path = tmp_path / f"{closed}.h5" if to_file else None
            tracer = grutrace.Tracer(model, path, gates=gates)
            tracer.start()
            model(torch.randn(4, 2))
            if looked_at:
                assert tracer["0.l0"].sequence(0).update[:].shape == (4, 3)
            tracer.stop()
            if closed:
                tracer.close()
            gone = weakref.ref(tracer)
            del tracer
            assert gone() is None
    finally:
        gc.enable()


def test_a_mode_is_found(watch) -> None:
    with TorchFunctionMode():
        assert watch.leaks() == ["1 TorchFunctionModes"]


def test_gradients_that_are_switched_off_are_found(watch) -> None:
    with torch.no_grad():
        assert watch.leaks() == ["the mode of gradients"]


def test_a_thread_is_found(watch) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()
    assert "forgotten" in str(watch.leaks())
    end.set()
    thread.join()
    assert watch.leaks() == []


@pytest.mark.skipif(not leaks.OPEN_FILES.exists(), reason="this system lists no open files")
def test_an_open_file_is_found(watch, tmp_path) -> None:
    with open(tmp_path / "forgotten", "w"):
        assert watch.leaks() == [f"open file {tmp_path / 'forgotten'}"]


def test_the_fixture_fails_a_test_that_leaks(pytester) -> None:
    pytester.makeconftest("from tests.conftest import nothing_leaks")
    pytester.makepyfile(
        """
        import grutrace
        from torch import nn

        def test_that_leaks():
            global tracer
            global model
            model = nn.GRU(2, 3)
            tracer = grutrace.Tracer(model)
            tracer.start()

        def test_that_does_not():
            tracer.stop()
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*GRU kernels that are still overridden*"])
