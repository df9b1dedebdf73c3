"""A disk fails during a write. The model's result and the committed rows must be intact."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import grutrace
from tools.soak import disk
from tools.soak.forks import Outcome, outcomes
from tools.soak.kills import look
from tools.soak.victims import KINDS, make, tracing

#: The operations that fail, and their errors.
FAULTS = ("full", "input/output error", "file too large", "fsync")

#: Runs of the model in a try.
RUNS = 12


def faults(folder: Path, tries: int, seed: int = 0) -> list[Outcome]:
    """Make the disk fail in this many runs."""
    return outcomes(_tries(folder, tries, seed))


def _tries(folder: Path, tries: int, seed: int) -> Iterator[Callable[[], Outcome]]:
    for number in range(tries):
        # All combinations of a kind of run, a fault and `on_error` occur.
        kind, rest = KINDS[number % len(KINDS)], number // len(KINDS)
        fault, on_error = FAULTS[rest % len(FAULTS)], ("raise", "warn")[rest // len(FAULTS) % 2]
        yield partial(fault_one, folder, kind, fault, on_error, seed * 1_000_000 + number)


def fault_one(folder: Path, kind: str, fault: str, on_error: str, seed: int) -> Outcome:
    """Make the disk fail in one run, and check the run and its file."""
    path = folder / f"fault-{seed}" / "run.h5"
    path.parent.mkdir()
    torch.manual_seed(seed)
    model, run, calls_a_run = make(kind)
    _fail(fault, path, random.Random(seed))
    run_of = _Run(kind, model, run, path, on_error, fsync=fault == "fsync")
    run_of.go()
    failed, failed_itself = disk.failures(), disk.own_failures()
    disk.fail(path, 0)
    results = {"calls": 0, "wrong": 0, "opened": None}
    if path.exists():
        # Check it here, where HDF5 may still have it open, and in another process.
        results = look(kind, path)
        elsewhere = outcomes([partial(look, kind, path)], lanes=1)[0]
        results["elsewhere"] = "error" not in elsewhere and elsewhere["calls"] == results["calls"]
    return {
        "kind": kind,
        "fault": fault,
        "on_error": on_error,
        "seed": seed,
        "failed": failed,
        "failed_itself": failed_itself,
        "acknowledged": run_of.acknowledged,
        "made": run_of.runs * calls_a_run,
        "errors": run_of.errors,
        "warnings": run_of.warnings,
        "intact": run_of.intact and _is_intact(model, run, run_of.expected),
        "hooks": sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ),
        "beside": sorted(file.name for file in path.parent.iterdir() if file != path),
        **results,
    }


def _fail(fault: str, path: Path, rng: random.Random) -> None:
    prefix = path.parent
    error = {"full": errno.ENOSPC, "file too large": errno.EFBIG}.get(fault, errno.EIO)
    if fault == "fsync":
        disk.fail(prefix, error, writes=rng.randrange(20), at_fsync=True)
    elif fault != "input/output error" and rng.random() < 0.4:
        # Before the first chunk of rows is whole, or before the second; in the middle of a write.
        disk.fail(prefix, error, size=int(10 ** rng.uniform(3, 7)))
    else:
        disk.fail(prefix, error, writes=int(10 ** rng.uniform(0, 2.6)))


class _Run:
    """Runs of a model that is traced to a failing disk."""

    def __init__(
        self,
        kind: str,
        model: torch.nn.Module,
        run: Callable[[], torch.Tensor],
        path: Path,
        on_error: str,
        *,
        fsync: bool,
    ) -> None:
        self._kind, self._model, self._run, self._path = kind, model, run, path
        self._on_error, self._fsync = on_error, fsync
        self.expected = [_seeded(run, number) for number in range(RUNS)]
        self.runs = self.acknowledged = 0
        self.intact = True
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def go(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with tracing(
                    self._kind,
                    self._model,
                    self._path,
                    fsync=self._fsync,
                    on_error=self._on_error,
                ) as tracer:
                    for number in range(RUNS):
                        self._once(number, tracer)
            except grutrace.GrutraceError as error:
                self.errors.append(f"{type(error).__name__}: {error}")
        messages = [str(warning.message) for warning in caught]
        # Some of these small decoders come to rest, several sequences in one state.
        self.warnings = [text for text in messages if not text.startswith("cannot tell which")]

    def _once(self, number: int, tracer: grutrace.Tracer) -> None:
        self.runs += 1
        result = _seeded(self._run, number)
        self.intact &= torch.equal(result, self.expected[number])
        if number % 3 == 0:
            tracer.flush()
            if tracer._guarded_sink.error is None:
                self.acknowledged = self._calls(tracer)

    def _calls(self, tracer: grutrace.Tracer) -> int:
        return tracer._guarded_sink.calls


def _seeded(run: Callable[[], torch.Tensor], number: int) -> torch.Tensor:
    torch.manual_seed(number)
    return run().detach()


def _is_intact(
    model: torch.nn.Module, run: Callable[[], torch.Tensor], expected: list[torch.Tensor]
) -> bool:
    """Whether the model still computes the same afterwards."""
    with contextlib.suppress(RuntimeError):
        return all(torch.equal(_seeded(run, n), tensor) for n, tensor in enumerate(expected))
    return False


def faulty(outcome: Outcome) -> list[str]:
    """The faults of one try, in words."""
    if "error" in outcome:
        return [outcome["error"]]
    message, failed = [*outcome["errors"], *outcome["warnings"]], outcome["failed"] > 0
    if failed and not message and not outcome["failed_itself"]:
        # A closed file is replaced by a smaller copy: one of the two failed, the other is whole.
        failed = outcome["calls"] < outcome["made"]
    wrong = []
    if outcome["calls"] < outcome["acknowledged"]:
        wrong.append(f"{outcome['acknowledged'] - outcome['calls']} acknowledged calls are lost")
    if outcome["wrong"] or outcome.get("elsewhere") is False:
        wrong.append("what is in the file is torn, or seen differently elsewhere")
    if not outcome["intact"] or outcome["hooks"]:
        wrong.append("the model is not as it was")
    if outcome["beside"]:
        wrong.append(f"{outcome['beside']} was left behind")
    if any("\n" in text or os.sep not in text for text in message):
        wrong.append(f"not one clear line: {message}")
    if failed != bool(message):
        wrong.append(f"{outcome['failed']} failures, and it was said: {message}")
    if outcome["on_error"] == "raise" and len(message) > 1:
        wrong.append(f"more than one error: {message}")
    if outcome["on_error"] == "warn" and failed:
        wrong += _faulty_warnings(outcome)
    return wrong


def _faulty_warnings(outcome: Outcome) -> list[str]:
    if outcome["errors"]:
        # Before the run has begun: the file could not be made.
        begun = outcome["made"] > 0 or outcome["warnings"]
        return [f"raised: {outcome['errors']}"] if begun else []
    lost = outcome["made"] - outcome["calls"]
    expected = f"holds {outcome['calls']} calls of this recording, and {lost} more are lost"
    if len(outcome["warnings"]) != 2 or expected not in outcome["warnings"][1]:
        return [f"expected two warnings, the last that it {expected}: {outcome['warnings']}"]
    return []
