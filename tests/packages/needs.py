"""Packages that use nn.GRU or nn.GRUCell: required in CI, optional elsewhere."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import pytest

#: Set in CI, so that a missing package is an error and not a skipped test.
REQUIRED = "GRUTRACE_REQUIRE_PACKAGES"


def needs(name: str) -> ModuleType:
    """Import a package, or skip the test module that asks for it.

    Warnings of the package's import are ignored.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get(REQUIRED):
            return importlib.import_module(name)
        reason = f"{name} is not installed: pip install -c constraints.txt -e '.[test,packages]'"
        return pytest.importorskip(name, reason=reason)
