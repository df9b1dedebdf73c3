"""The expected content of an exported file, computed with a plain reader and loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import numpy as np

from tests.plain_reader import PlainTrace

QUANTITIES = ("reset", "update", "candidate", "hidden", "input")

#: Arrays of an independent reader, by group and name.
Read = Callable[[str, str], Any]


def group_of(site: Any) -> str:
    return quote(site.name, safe="")


class Expected:
    """Everything that a format with arrays must hold, by group."""

    def __init__(self, path: Any) -> None:
        self.trace = PlainTrace(path)
        self.groups: dict[str, dict[str, Any]] = {"calls": self._calls()}
        self.derived: set[tuple[str, str]] = set()
        for module in self.trace.modules:
            for site in module.sites.values():
                self.groups[group_of(site)] = self._site(module, site)

    def _calls(self) -> dict[str, Any]:
        calls = self.trace.calls
        paths = {module.index: module.path for module in self.trace.modules}
        return {
            "module": [paths[int(call["module"])] for call in calls],
            "tag": [self.trace.tag(call) or "" for call in calls],
            "weights": calls["weights"],
            "batch": calls["batch"],
            "training": calls["training"],
            "time": calls["time"],
        }

    def _site(self, module: Any, site: Any) -> dict[str, Any]:
        every = range(module.count)
        results: dict[str, Any] = {"initial": site.initial, "unit": np.array(site.units)}
        for name in QUANTITIES:
            if name in site.rows or name in site.derived:
                parts = [site.derive(number, name) for number in every]
                width = site.input_size if name == "input" else len(site.units)
                empty = np.empty((0, width), np.float16)
                results[name] = np.concatenate([empty, *(e.reshape(-1, width) for e in parts)])
            if name in site.derived:
                self.derived.add((group_of(site), name))
        lengths = [sum(steps for *_, steps in module.pieces[number]) for number in every]
        results["length"] = np.array(lengths)
        results["sequence"] = np.repeat(np.arange(module.count), lengths)
        results["time"] = np.concatenate([np.arange(0), *map(np.arange, lengths)])
        firsts = [module.pieces[number][0] for number in every]
        results["first_call"] = np.array([call for call, *_ in firsts], np.int64)
        results["place"] = np.array([index for _, index, *_ in firsts], np.int64)
        calls = [
            call
            for number in every
            for call, _, _, steps in module.pieces[number]
            for _ in range(steps)
        ]
        results["call"] = np.array(calls, np.int64)
        tags = [self.trace.tag(self.trace.calls[call]) for call in calls]
        if any(self.trace.tag(self.trace.calls[call]) is not None for call in module.calls):
            results["tag"] = [tag or "" for tag in tags]
        forks = {
            int(fork["sequence"]): (int(fork["parent"]), int(fork["steps"]))
            for fork in self.trace.forks
            if fork["module"] == module.index
        }
        results["parent"] = np.array([forks.get(number, (-1, -1))[0] for number in every], np.int64)
        results["parent_steps"] = np.array([forks.get(n, (-1, -1))[1] for n in every], np.int64)
        for name, values in self._annotations(module, lengths).items():
            results["token" if name == "tokens" else f"label_{quote(name, safe='')}"] = values
        return results

    def _annotations(self, module: Any, lengths: list[int]) -> dict[str, Any]:
        """By name, one value a step of all sequences: texts, or numbers with nan for none."""
        annotated = [module.annotated(number) for number in range(module.count)]
        named: dict[str, Any] = {}
        for name in {name for by_name in annotated for name in by_name}:
            values = [
                by_name.get(name, {}).get(step)
                for by_name, length in zip(annotated, lengths, strict=True)
                for step in range(length)
            ]
            if any(
                isinstance(value, str)
                for by_name in annotated
                for value in by_name.get(name, {}).values()
            ):
                named[name] = ["" if value is None else value for value in values]
            else:
                named[name] = np.array([np.nan if value is None else value for value in values])
        return named


def assert_as_expected(expected: Expected, read: Read) -> int:
    """Compare everything; return how many arrays there were."""
    compared = 0
    for group, variables in expected.groups.items():
        for name, values in variables.items():
            result = read(group, name)
            if isinstance(values, list):
                assert list(result) == values, (group, name)
            elif (group, name) in expected.derived:
                np.testing.assert_allclose(result, values, atol=1e-6, err_msg=f"{group}/{name}")
            else:
                np.testing.assert_array_equal(result, values, err_msg=f"{group}/{name}")
            compared += 1
    return compared


def as_texts(values: Any) -> list[str]:
    """Texts, or numbers as such, with an empty one for none."""
    if isinstance(values, list):
        return values
    return ["" if value != value else f"{value:g}" for value in values]
