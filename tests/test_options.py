"""The docstring and the command line describe the tracer's options alike."""

from __future__ import annotations

import inspect
import re

import pytest

from grutrace.capture.tracer import DIFFERENTIABLE_OPTIONS, Tracer, TracerOptions
from grutrace.options import OPTIONS

PARAMETERS = inspect.signature(Tracer.__init__).parameters


def described() -> dict[str, str]:
    """The first sentence of each argument in the tracer's docstring."""
    arguments = inspect.getdoc(Tracer).split("\nArgs:\n")[1].split("\nRaises:\n")[0]
    result = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", arguments, re.M | re.S)
    return {name: re.match(r".*?\.(?=\s|$)", " ".join(text.split()))[0] for name, text in result}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_docstring_begins_with_the_summary(name: str) -> None:
    assert described()[name] == OPTIONS[name].summary


def test_every_parameter_is_described_in_order() -> None:
    assert list(described()) == [name for name in PARAMETERS if name != "self"]
    assert list(OPTIONS) == [name for name in described() if name not in ("model", "path")]


def test_the_types_for_checkers_have_every_option() -> None:
    assert list(TracerOptions.__annotations__) == list(OPTIONS)
    assert set(DIFFERENTIABLE_OPTIONS) - set(OPTIONS) == {"keep"}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_defaults_equal_those_of_the_parameters(name: str) -> None:
    assert PARAMETERS[name].default == OPTIONS[name].default
