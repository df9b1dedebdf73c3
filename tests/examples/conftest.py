"""The examples, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    """Import examples/<name>.py, which is not on the path."""
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(EXAMPLES))  # as for a script: what lies beside it can be imported
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.fixture(scope="session")
def g2p_example() -> ModuleType:
    return load("g2p_seq2seq")


@pytest.fixture
def hidden_states_example() -> ModuleType:
    return load("outputs_and_hidden_states")


@pytest.fixture(scope="session")
def arithmetic_example() -> ModuleType:
    return load("nested_arithmetic")
