"""A test of a missing package is skipped with a reason, except where CI requires it."""

from __future__ import annotations

import pytest

from tests.packages.needs import REQUIRED, needs

MISSING = "a_package_that_nobody_has"


def test_a_missing_package_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"{MISSING} is not installed: pip install"):
        needs(MISSING)


def test_a_missing_required_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(ModuleNotFoundError, match=MISSING):
        needs(MISSING)


def test_an_installed_package_is_imported() -> None:
    assert needs("json").loads("1") == 1
