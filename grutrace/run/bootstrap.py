"""The beginning of a run in the script's process: before the script, and before torch.

Nothing is imported here that the script might not import itself, so that a script without torch
runs without it, and one that prepares for torch (environment variables) still comes first.
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
    """Take all that is ours out of the script's sight, and wait for torch.

    Args:
        boot: The folder with our `sitecustomize`.
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
        # Whatever it is, it is not the script's: that one goes on without us.
        report.log(f"nothing can be recorded: {type(error).__name__}: {error}")


def _remove_from_path(boot: str) -> None:
    sys.path[:] = [entry for entry in sys.path if entry != boot]
    sys.path_importer_cache.pop(boot, None)


def _set_variable(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def _run_user_sitecustomize() -> None:
    """Load the `sitecustomize` that Python would have found if ours had not been in front."""
    name = "sitecustomize"
    spec = PathFinder.find_spec(name, sys.path)
    if spec is not None and spec.loader is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
