"""The interface of a peer: another tool that shows values of a single layer while it runs."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

import grutrace

#: Each (T, B, H), by name: ``output``, and of a peer that gives them the gates.
Values = dict[str, Tensor]

GATES = ("reset", "update", "candidate")

#: How far two float32 runs of a layer with PyTorch's own initial weights are apart at most. Such a
#: layer contracts, so that rounding (6e-8 a step, in sums of some hundred terms) does not grow.
ROUNDING = 1e-5


class Absent(Exception):
    """A peer cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Running:
    """A peer that is prepared for one layer and input.

    Attributes:
        call: What is timed: one pass over the input.
        read: What the values of such a pass are, from what it returned. Not timed.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Values]


@dataclass(frozen=True)
class Peer:
    """Another tool that shows values of a single layer.

    Attributes:
        name: What the table calls it.
        gives: What it gives, in words.
        prepare: Makes it ready for a layer and its input, (T, B, I), for as long as it is entered;
            raises `Absent` where it cannot.
        gates: Whether it gives all gates. They are then compared with the trace's.
        package: What it needs, by the name under which it is installed.
        only_small: Whether it is slow, and so measured on the two small shapes and seldom.
        most_steps: The maximum number of steps that it is measured with.
    """

    name: str
    gives: str
    prepare: Callable[[nn.GRU, Tensor], AbstractContextManager[Running]]
    gates: bool = True
    package: str = "torch"
    only_small: bool = False
    most_steps: int | None = None


def need(package: str) -> Any:
    """Import a package that a peer builds on.

    Warnings of the package's import are ignored.

    Raises:
        Absent: It is not installed, or cannot be imported.
    """
    try:
        version(package)
    except PackageNotFoundError:
        raise Absent(f"absent: {package} is not installed (extra `peers`)") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except Exception as error:
        raise Absent(f"absent: {package} cannot be imported: {error}") from error


def traced_values(layer: nn.GRU, input: Tensor) -> Values:
    """Return the values in grutrace's trace of one call, (T, B, H) each."""
    with grutrace.trace(layer) as trace:
        output = layer(input)[0]
    site = trace["l0"]
    values = {name: site.padded(name)[0].transpose(1, 0, 2) for name in GATES}
    return {"output": output.detach()} | {
        name: torch.from_numpy(value) for name, value in values.items()
    }


def disagreement(peer: Peer, actual: Values, expected: Values) -> str:
    """Describe where a peer's values differ from the trace's; empty if they agree."""
    for name in ("output", *GATES) if peer.gates else ("output",):
        if name not in actual:
            return f"gives no {name}"
        if actual[name].shape != expected[name].shape:
            shapes = tuple(actual[name].shape), tuple(expected[name].shape)
            return f"{name} is {shapes[0]}, not {shapes[1]}"
        difference = float((actual[name] - expected[name]).abs().max())
        # Not the other way round: a difference that is no number is none that rounding explains.
        if not difference <= ROUNDING:
            return f"{name} differs by {difference:.2g}"
    return ""
