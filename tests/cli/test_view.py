"""Tests of `grutrace view`."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from grutrace.__main__ import main
from tests import forks
from tests.view.live.planted import record_brackets


def test_it_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    pytest.importorskip("bokeh")
    record_brackets(tmp_path / "run.h5", sentences=3)
    command = [sys.executable, "-m", "grutrace", "view", str(tmp_path), "--no-browser"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        match = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", process.stdout.readline())
        assert match is not None
        with urllib.request.urlopen(match[0], timeout=20) as response:
            assert b"grutrace: run.h5" in response.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == ""


def test_what_cannot_be_shown_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bokeh")
    assert main(["view", str(tmp_path / "missing.h5"), "--no-browser"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["view", str(tmp_path), "--no-browser"]) == 2
    message = capsys.readouterr().err
    assert "has no trace files" in message
    assert message.count("\n") == 1


def test_without_bokeh_the_extra_is_named(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["bokeh"] = None
from grutrace.__main__ import main
sys.exit(main(["view", sys.argv[1], "--no-browser"]))
"""
    # In a process of its own: here, modules that import bokeh may be loaded already.
    done = forks.run("-c", script, tmp_path)
    assert done.returncode == 2
    assert "view needs bokeh, which is not installed: pip install" in done.stderr
