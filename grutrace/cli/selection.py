"""Options that select sequences, shared by the commands that read a trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from grutrace.errors import NotRecordedError, OptionError
from grutrace.run.parsing import parse_numbers
from grutrace.storage.read.trace import Trace

_PANEL = "Sequences"


def _option(kind: Any, metavar: str, text: str) -> Any:
    """Return the annotation of an option."""
    option = typer.Option(metavar=metavar, help=text, rich_help_panel=_PANEL)
    return Annotated[kind | None, option]


_OPTIONS = {
    "tag": _option(list[str], "GLOB", "Those that began in a call with this tag. May be repeated."),
    "labelled": _option(
        list[str],
        "NAME[=GLOB]",
        "Those with this label at one of their steps. May be repeated.",
    ),
    "length": _option(str, "NUMBERS", "Those of this many steps: 12, or 10: for 10 or more."),
    "calls": _option(
        str, "NUMBERS", "Those that began in these calls: 0:100, or -100: for the last 100."
    ),
    "tokens": _option(
        str, "GLOBS", "Those with such tokens in a row: 'the a*'. ^ is the start, $ the end."
    ),
    "sequences": _option(str, "NUMBERS", "Those with these numbers: 3, or 0:10, or 1,5,7."),
}


@dataclass(frozen=True)
class Selection:
    """The sequences that a command reads.

    Attributes:
        conditions: Arguments of `Trace.select`. Without any, all sequences are read.
    """

    conditions: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Selection:
        """Parse the options of a command line, by name."""
        conditions: dict[str, Any] = {}
        for name, value in values.items():
            if value is None:
                continue
            if name == "labelled":
                conditions["label"] = _parse_labels(value)
            elif name in ("tag", "tokens"):
                conditions[name] = value
            else:
                conditions[name] = parse_numbers(name, value)
        return cls(conditions)

    def apply(self, trace: Trace) -> Trace:
        """Return the selected sequences of a trace.

        Raises:
            NotRecordedError: No sequence is selected, or there is no such label.
            OptionError: A condition has an invalid value.
        """
        if not self.conditions:
            return trace
        selected = trace.select(**self.conditions)
        if not len(selected.sequences):
            raise NotRecordedError(f"no sequence has {selected.selection}")
        return selected

    def require_empty(self, reason: str) -> None:
        """Require that nothing is selected.

        Raises:
            OptionError: The command line has an option that selects sequences.
        """
        if self.conditions:
            raise OptionError(f"{next(iter(self.conditions))}: {reason}")


EVERYTHING = Selection()


def with_selection(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that select sequences, in place of its parameter ``selection``."""
    parameters = inspect.signature(command).parameters
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in parameters.items()
        if name != "selection"
    ]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _OPTIONS.items()
    ]

    @wraps(command)
    def selecting(*args: Any, **kwargs: Any) -> None:
        values = {name: kwargs.pop(name, None) for name in _OPTIONS}
        command(*args, **kwargs, selection=Selection.parse(values))

    del selecting.__wrapped__
    selecting.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    selecting.__annotations__ = {
        parameter.name: parameter.annotation for parameter in (*own, *added)
    }
    return selecting


def _parse_labels(values: list[str]) -> dict[str, list[str]]:
    labels: dict[str, list[str]] = {}
    for value in values:
        name, _, glob = value.partition("=")
        labels.setdefault(name, []).append(glob or "*")
    return labels
