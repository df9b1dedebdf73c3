"""Prepare the script's process, before the script and before torch.

This module does not import torch or h5py: a script that does not use torch runs without it, and a
script can set environment variables before it imports torch.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import sys
from importlib.machinery import PathFinder

from grutrace.run.import_hook import on_import
from grutrace.run.report import Report
from grutrace.run.settings import ENVIRONMENT_VARIABLE, Settings, from_text


def start_run(boot: str) -> None:
    """Restore the environment that the script expects, and start tracing when it imports torch.

    Args:
        boot: The folder of grutrace's `sitecustomize`.
    """
    text = os.environ.pop(ENVIRONMENT_VARIABLE, None)
    _remove_from_path(boot)
    if text is not None:
        settings = from_text(text)
        _set_variable("PYTHONPATH", settings.python_path)
        report = Report(settings)
        atexit.register(report.end)
        on_import("torch", lambda: _start_discovery(settings, report))
    _run_user_sitecustomize()


def _start_discovery(settings: Settings, report: Report) -> None:
    try:
        from grutrace.run.discovery import Discovery

        Discovery(settings, report).start()
    except Exception as error:
        # An error of grutrace must not stop the script.
        report.log(f"cannot record anything: {type(error).__name__}: {error}")


def _remove_from_path(boot: str) -> None:
    sys.path[:] = [entry for entry in sys.path if entry != boot]
    sys.path_importer_cache.pop(boot, None)


def _set_variable(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def _run_user_sitecustomize() -> None:
    """Run the user's `sitecustomize`, which the one of grutrace has hidden."""
    name = "sitecustomize"
    spec = PathFinder.find_spec(name, sys.path)
    if spec is not None and spec.loader is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
