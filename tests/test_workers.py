"""Groups of tests share one worker of pytest-xdist."""

from __future__ import annotations

import pytest


@pytest.mark.measures
def test_tests_that_measure_are_a_group(request: pytest.FixtureRequest) -> None:
    """pytest-xdist 3.8 silently ignores all groups with pytest 9.2 (its issue 1386)."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@measures")
