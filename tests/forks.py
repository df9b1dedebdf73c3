"""Run Python programs as forks of one process that has loaded torch, so that each starts at once.

Not for tests of how a program starts or ends, or of what it imports: a fork has the modules of
`PRELOADED`, and the memory, of the process that it comes from.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

PRELOADED = ("torch", "h5py", "grutrace.capture.tracer", "grutrace.storage.open", __name__)

CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()

#: Variables with which the workers of a cluster are such forks, too.
DASK = {"DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "forkserver"} if CAN_FORK else {}

Argument = str | os.PathLike[str]


def run(
    *arguments: Argument,
    cwd: Argument | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` to its end, as ``subprocess.run``, and return what it printed."""
    command = [sys.executable, *map(os.fspath, arguments)]
    if not CAN_FORK:
        options: dict[str, Any] = {"cwd": cwd, "env": env, "timeout": timeout, "check": check}
        return subprocess.run(command, capture_output=True, text=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        streams = {1: f"{folder}/stdout", 2: f"{folder}/stderr"}
        process = _start(command[1:], cwd, env, streams)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        printed = [Path(path).read_text() for path in streams.values()]
    done = subprocess.CompletedProcess(command, process.exitcode, *printed)
    process.close()
    if check:
        done.check_returncode()
    return done


def start(
    *arguments: Argument, cwd: Argument | None = None, env: Mapping[str, str] | None = None
) -> Program | subprocess.Popen[str]:
    """Start ``python ARGUMENTS``, with pipes to its standard input and from its output."""
    if not CAN_FORK:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, *map(os.fspath, arguments)]
        return subprocess.Popen(command, cwd=cwd, env=env, bufsize=1, **pipes)
    return Program(list(map(os.fspath, arguments)), cwd, env)


class Program:
    """A running fork, with those attributes of `subprocess.Popen` that tests use."""

    def __init__(
        self, arguments: Sequence[str], cwd: Argument | None, env: Mapping[str, str] | None
    ) -> None:
        their_input, our_input = multiprocessing.Pipe(duplex=False)
        our_output, their_output = multiprocessing.Pipe(duplex=False)
        self._process = _start(arguments, cwd, env, {0: their_input, 1: their_output})
        for each in (their_input, their_output):
            each.close()
        self.stdin = os.fdopen(os.dup(our_input.fileno()), "w", buffering=1)
        self.stdout = os.fdopen(os.dup(our_output.fileno()))
        for each in (our_input, our_output):
            each.close()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.poll()

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.stdout.close()
        self._process.join()
        self._process.close()


def _start(
    arguments: Sequence[str],
    cwd: Argument | None,
    env: Mapping[str, str] | None,
    streams: Mapping[int, str | Connection],
) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    folder, variables = os.fspath(cwd or os.getcwd()), dict(os.environ if env is None else env)
    process = context.Process(target=_interpret, args=(arguments, folder, variables, streams))
    process.start()
    return process


def _interpret(
    arguments: Sequence[str],
    folder: str,
    variables: Mapping[str, str],
    streams: Mapping[int, str | Connection],
) -> None:
    """Do as a Python that is started with these arguments, and end this process."""
    os.chdir(folder)
    _replace_variables(variables)
    _connect(streams)
    os.execve = _continue_as
    _run_to_end(arguments)


def _replace_variables(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _connect(streams: Mapping[int, str | Connection]) -> None:
    for descriptor, stream in streams.items():
        if isinstance(stream, str):
            opened = os.open(stream, os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, descriptor)
            os.close(opened)
        else:
            os.dup2(stream.fileno(), descriptor)
            stream.close()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)


def _continue_as(path: str, command: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Instead of `os.execve`: go on in this process, as a Python with the same PYTHONPATH would."""
    assert path == sys.executable, path
    _replace_variables(variables)
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    sys.modules.pop("sitecustomize", None)
    with suppress(ModuleNotFoundError):
        importlib.import_module("sitecustomize")
    _run_to_end(command[1:])


def _run_to_end(arguments: Sequence[str]) -> NoReturn:
    sys.orig_argv = [sys.executable, *arguments]
    code: object = 0
    try:
        _execute(*arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    # As Python ends: first its threads, then what was registered, then what is in the buffers.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def _execute(program: str, *rest: str) -> None:
    if program == "-W":
        warnings._processoptions(rest[:1])  # type: ignore[attr-defined]
        return _execute(*rest[1:])
    main = sys.modules["__main__"] = ModuleType("__main__")
    if program == "-m":
        sys.argv = list(rest)
        sys.path.insert(0, "")
        return runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    if program == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        return exec(compile(rest[0], "<string>", "exec"), vars(main))
    sys.argv = [program, *rest]
    sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
    main.__file__ = program
    return exec(compile(Path(program).read_bytes(), program, "exec"), vars(main))
