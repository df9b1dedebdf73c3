"""What Windows and macOS lack is neither imported nor needed to trace.

It is hidden from a process that has imported torch, NumPy and h5py, which use it on Linux.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from grutrace.errors import UnsupportedError
from grutrace.run import launch as launch_module
from grutrace.run.settings import Settings

#: Removes the modules and names that Windows lacks, from Python's list of platforms for each.
HIDE = """
import importlib, os, pkgutil, signal, sys
import h5py, numpy, torch, torch.utils.checkpoint, torch._functorch.pyfunctorch
import concurrent.futures, multiprocessing, shutil, subprocess, tempfile, typer.testing

MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
OS = (
    "chown", "fdatasync", "fork", "forkpty", "getloadavg", "getuid", "geteuid", "getgid", "killpg",
    "lchown", "lockf", "mkfifo", "mknod", "nice", "posix_fadvise", "posix_fallocate", "pread",
    "preadv", "pwrite", "pwritev", "register_at_fork", "sched_getaffinity", "sched_setaffinity",
    "sendfile", "setsid", "statvfs", "sync", "sysconf", "uname", "wait", "wait4", "waitid",
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC",
)
SIGNALS = ("SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "SIGUSR2", "setitimer", "alarm")
# The standard library may not fall back to what is hidden here.
shutil._use_fd_functions = False
tempfile.gettempdir()
for name in MODULES:
    sys.modules[name] = None
for name in OS:
    if hasattr(os, name):
        delattr(os, name)
for name in SIGNALS:
    if hasattr(signal, name):
        delattr(signal, name)
"""

IMPORT_ALL = """
import grutrace
# The folder `boot` has a sitecustomize for another process.
names = [
    found.name
    for found in pkgutil.walk_packages(grutrace.__path__, "grutrace.")
    if found.name not in ("grutrace.__main__", "grutrace.run.boot.sitecustomize")
]
assert len(names) > 200, len(names)
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A library of an extra that is not installed.
        assert error.name not in MODULES and not error.name.startswith("grutrace"), error
    except grutrace.errors.MissingExtraError:
        # A callback derives from a class of its library.
        assert name.startswith("grutrace.integrations."), name
"""

TRACE = """
from grutrace.storage.recovery.recover import recover_file
with tempfile.TemporaryDirectory() as folder:
    torch.manual_seed(0)
    model, x = torch.nn.GRU(3, 4, 2), torch.randn(5, 2, 3)
    expected = model(x)[0]
    for gates in ("inline", "deferred"):
        path = os.path.join(folder, f"{gates} \\u00e9.h5")
        with grutrace.trace(model, path, gates=gates) as tracer:
            assert torch.equal(model(x)[0], expected)
        with grutrace.open(path) as trace:
            hidden = trace["l1"].sequence(1).hidden
            assert numpy.array_equal(hidden, expected[:, 1].detach())
            assert trace["l0"].update[:].shape == (10, 4)
            assert grutrace.analysis.saturation(trace["l0"])
        with grutrace.trace(model, path, gates=gates, mode="a"):
            model(x)
        with grutrace.open(path) as trace:
            assert len(trace.calls) == 2
    recovered = os.path.join(folder, "recovered.h5")
    recover_file(path, recovered)
    with grutrace.open(recovered) as trace:
        assert len(trace.calls) == 2
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process, which has loaded nothing of grutrace."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


def test_without_what_windows_lacks_every_module_is_imported_and_a_model_is_traced() -> None:
    done = run(HIDE + IMPORT_ALL + TRACE)
    assert done.returncode == 0, done.stderr


def test_control_a_module_that_needs_it_is_noticed() -> None:
    for needs in ("import resource", "os.fork", "signal.SIGKILL"):
        done = run(HIDE + needs)
        assert done.returncode == 1
        assert needs.rpartition(".")[2].removeprefix("import ") in done.stderr


def test_a_run_of_a_script_is_refused_on_windows(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(launch_module, "_CAN_BECOME_SCRIPT", False)
    with pytest.raises(UnsupportedError, match="needs a POSIX system"):
        launch_module.launch(
            Settings(output=str(tmp_path / "run.h5"), sites=(), record=("hidden",)), ["script.py"]
        )
    assert list(tmp_path.iterdir()) == []
