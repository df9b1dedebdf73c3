"""Judge a case: refused with one clear error, or read as the plain reader reads it.

Everything that can be read is: every row, sequence, call, weight, token. And every command is run.
"""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import grutrace
from grutrace.__main__ import main
from grutrace.analysis.verification.verify import verify
from grutrace.statistics.file import is_statistics
from tests.plain_reader import PlainTrace
from tests.statistics.test_file import plain_read

#: What NumPy says when more memory was asked for than there is. HDF5 asks, too, on the word of its
#: own structures, for what it then finds not to be in the file: it says "memory allocation failed".
_MEMORY = "Unable to allocate"


@dataclass(frozen=True)
class Verdict:
    """Outcome: ``refused``, ``read``, or ``fault``, where something is wrong with grutrace."""

    outcome: str
    detail: str


def judge(folder: Path, note: Callable[[str], None], commands: Sequence[str]) -> Verdict:
    """Read a case, and return a verdict.

    Args:
        folder: Where its file `run.h5` is.
        commands: Commands to run on it, too; the first only, if the file is refused.
        note: Called with the name of each step before it starts, in case the process crashes.
    """
    path = folder / "run.h5"
    try:
        note("ours")
        verdict = _judge_statistics(path) if is_statistics(path) else _judge_trace(path, note)
        note("commands")
        faults = _judge_commands(path, commands if verdict.outcome == "read" else commands[:1])
        return Verdict("fault", faults) if faults else verdict
    except Exception:
        return Verdict("fault", traceback.format_exc())


def _refused(error: Exception, path: Path) -> Verdict:
    text = str(error)
    if str(path.parent) not in text and not isinstance(error, grutrace.NotRecordedError):
        return Verdict("fault", f"names no file: {text}")
    if _MEMORY in text:
        return Verdict("fault", f"asked for memory: {text}")
    return Verdict("refused", text)


def _judge_trace(path: Path, note: Callable[[str], None]) -> Verdict:
    try:
        with grutrace.open(path) as trace:
            result = everything(trace)
            note("verify")
            verify(trace)
    except grutrace.GrutraceError as error:
        return _refused(error, path)
    if path.with_name("run.part0002.h5").exists() or path.with_name("run.part0003.h5").exists():
        return Verdict("read", "parts")
    note("plain")
    # grutrace does not read the names of the axes.
    plain = PlainTrace(path, labels=False)
    _compare(result, plain)
    return Verdict("read", f"{len(plain.calls)} calls")


def everything(trace: Any) -> dict[str, Any]:
    """Everything that a trace shows."""
    sites = {}
    for name in trace.sites:
        site = trace[name]
        sites[name] = {
            "rows": {
                quantity: np.asarray(site.rows(quantity)) for quantity in site.site.quantities
            },
            "derived": [np.asarray(site.rows(quantity)) for quantity in site.site.derived],
            "initial": np.asarray(site.initial),
            "checks": site.checks,
            "weights": [site.weights(number) for number in range(site.extent.versions)],
            "sequences": [
                (
                    {quantity: one.rows(quantity) for quantity in site.site.quantities},
                    {"tokens": one.tokens, **one.labels},
                    (one.initial, one.calls.tolist(), one.place, one.tag, one.parent),
                )
                for one in site
            ],
        }
        if "hidden" in site.site.quantities:
            site.previous()
            [one.previous for one in site]
    return {"calls": trace.calls, "sequences": trace.sequences, "sites": sites}


def _compare(read: dict[str, Any], plain: PlainTrace) -> None:
    paths = {module.index: module.path for module in plain.modules}
    assert len(read["calls"]) == len(plain.calls)
    for ours, theirs in zip(read["calls"], plain.calls, strict=True):
        assert ours["module"] == paths[theirs["module"]]
        assert ours["tag"] == plain.tag(theirs)
        assert np.array_equal(ours["time"], theirs["time"], equal_nan=True)
        for name in ("weights", "batch"):
            assert ours[name] == theirs[name]
        assert ours["training"] == bool(theirs["training"])
    sites = [site for module in plain.modules for site in module.sites.values()]
    assert {site.name for site in sites} == set(read["sites"])
    for theirs in sites:
        _compare_site(read["sites"][theirs.name], theirs)


def _same(ours: Any, theirs: Any) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    # Bit for bit, so that NaN is compared too.
    assert np.ascontiguousarray(ours).tobytes() == np.ascontiguousarray(theirs).tobytes()


def _compare_site(ours: dict[str, Any], theirs: Any) -> None:
    assert set(ours["rows"]) == set(theirs.rows)
    for name, rows in ours["rows"].items():
        _same(rows, theirs.rows[name])
    _same(ours["initial"], theirs.initial)
    _same(ours["checks"], theirs.checks)
    for version, weights in enumerate(ours["weights"]):
        assert set(weights) == set(theirs.weights)
        for name, array in weights.items():
            _same(array, theirs.weights[name][version])
    assert len(ours["sequences"]) == theirs.module.count
    for number, (rows, named, about) in enumerate(ours["sequences"]):
        initial, calls, batch_index, tag, parent = about
        for name, values in rows.items():
            _same(values, theirs.sequence(number, name))
        _same(initial, theirs.initial[number])
        pieces = theirs.module.pieces[number]
        assert calls == [call for call, *_ in pieces]
        assert batch_index == pieces[0][1]
        assert tag == theirs.module.trace.tag(theirs.module.trace.calls[calls[0]])
        _compare_annotations(named, theirs, number, sum(steps for *_, steps in pieces))
        forks = theirs.module.trace.forks
        own = forks[(forks["module"] == theirs.module.index) & (forks["sequence"] == number)]
        assert parent == (int(own["parent"][-1]) if len(own) else None)


def _compare_annotations(named: dict[str, Any], theirs: Any, number: int, length: int) -> None:
    for name, steps in theirs.module.annotated(number).items():
        exact = [steps.get(step) for step in range(length)]
        values = named[name]
        if values is None:
            values = [None] * length
        for ours, value in zip(values, exact, strict=True):
            missing = value is None or (isinstance(value, float) and np.isnan(value))
            if isinstance(ours, str) or isinstance(value, str):
                assert ours == value
            elif ours is None or np.isnan(ours):
                assert missing
            else:
                assert ours == value


def _judge_statistics(path: Path) -> Verdict:
    try:
        loaded = grutrace.Statistics.load(path)
    except grutrace.GrutraceError as error:
        return _refused(error, path)
    figures, _ = plain_read(path)
    assert set(figures) == set(loaded.sites)
    for name, (_, _, quantities) in figures.items():
        for quantity, (units, histogram) in quantities.items():
            ours = getattr(loaded[name], quantity)
            _same(ours.count, units["count"])
            _same(ours.histogram, histogram)
            _same(ours.minimum[units["count"] > 0], units["minimum"][units["count"] > 0])
    return Verdict("read", f"{len(figures)} sites of statistics")


def _judge_commands(path: Path, commands: Sequence[str]) -> str:
    """Describe a wrong output or exit code of a command; empty if there is none."""
    for command in commands:
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = main([*command.split(), str(path)])
        message = out.getvalue() + error.getvalue()
        if code not in (0, 1, 2) or error.getvalue().count("\n") > 1:
            return f"{command} ends with {code}: {error.getvalue()}"
        if any(not character.isprintable() and character != "\n" for character in message):
            return f"{command} prints what does something to a terminal: {message!r}"
        message.encode("utf-8")
    return ""
