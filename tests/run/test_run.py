"""Tests of `grutrace run`: the script behaves as without it, and its GRUs are traced."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch

import grutrace
from grutrace.__main__ import main
from grutrace.analysis.verification.verify import verify
from grutrace.capture.tracer import Tracer
from grutrace.cli.run import run as command_run
from grutrace.options import OPTIONS
from grutrace.run.settings import Settings
from grutrace.storage.shards.run_parts import part_path
from tests import forks
from tests.capture.models import EncoderDecoder
from tests.plain_reader import PlainTrace

ROOT = Path(__file__).parents[2]

#: Whatever a script can see of how it was started, and every way to end. Without torch.
ENDS = """
import atexit, multiprocessing, os, pickle, signal, sys

class Point:
    def __eq__(self, other):
        return type(self) is type(other)

def double(point):
    return [point, point]

def deep(how):
    if how == "error":
        raise ValueError("of the script's own")
    if how == "interrupt":
        signal.raise_signal(signal.SIGINT)
    if how == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "leave":
        os._exit(4)
    sys.exit({"code": 3, "message": "a message", "none": None}.get(how, 0))

if __name__ == "__main__":
    print(sys.argv, sys.orig_argv, sys.path, sys.flags, sys.warnoptions, sys._xoptions)
    print(__name__, __file__, __spec__ and __spec__.name, __package__, __builtins__, __loader__)
    print(sorted(item for item in os.environ.items() if "RUN" in item[0] or "PYTHON" in item[0]))
    print(sorted(set(sys.modules) & {"torch", "h5py", "numpy", "typer", "__mp_main__"}))
    print([each for each in sys.stdin])
    print(pickle.loads(pickle.dumps(Point())) == Point(), sys.modules["__main__"].Point is Point)
    if sys.argv[-1] == "spawn":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.map(double, [Point()]) == [[Point(), Point()]])
    atexit.register(print, "at the end")
    sys.stderr.write("to stderr\\n")
    deep(sys.argv[-1])
"""

MODEL = """
import sys, torch
sys.path.append({root!r})
from tests import forks
from tests.capture.models import EncoderDecoder
torch.manual_seed(0)
model = EncoderDecoder(layers=2)
print(model(torch.randn(4, 6, 5), steps=3).sum().item())
"""


def python(*arguments, folder, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        input="some\nlines\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


def run(*arguments, folder, interpreter=(), **options):
    return python(*interpreter, "-m", "grutrace", "run", *arguments, folder=folder, **options)


def run_in_fork(*arguments, folder):
    """Without the start of Python and torch, of which the other tests of this file take care."""
    return forks.run("-m", "grutrace", "run", *arguments, cwd=folder)


def write(folder, code, name="script.py"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code.format(root=str(ROOT)) if "{root" in code else code)
    return name


def without_addresses(text):
    return re.sub(r"0x[0-9a-f]+", "0x", text)


@pytest.mark.parametrize(
    ("interpreter", "arguments"),
    [
        ((), ["-o", "y.h5", "--help", "--", "-m", "--quiet"]),
        ((), ["spawn"]),
        ((), ["code"]),
        ((), ["none"]),
        ((), ["message"]),
        ((), ["error"]),
        ((), ["interrupt"]),
        ((), ["terminate"]),
        ((), ["leave"]),
        (("-u", "-O", "-W", "error", "-X", "dev"), ["error"]),
    ],
)
def test_a_script_behaves_as_without_grutrace(interpreter, arguments, tmp_path) -> None:
    write(tmp_path, ENDS, "folder/script.py")
    program = ["folder/script.py", *arguments]
    expected = python(*interpreter, *program, folder=tmp_path)
    result = run("-q", *program, folder=tmp_path, interpreter=interpreter)
    assert without_addresses(result.stdout) == without_addresses(expected.stdout)
    assert (result.returncode, result.stderr) == (expected.returncode, expected.stderr)
    assert not list(tmp_path.glob("*.h5"))


def test_a_module_behaves_as_without_grutrace(tmp_path) -> None:
    write(tmp_path, ENDS, "package/inner.py")
    expected = python("-m", "package.inner", "-m", "error", folder=tmp_path)
    assert expected.stdout.count("package.inner")
    result = run("-q", "-m", "package.inner", "-m", "error", folder=tmp_path)
    assert without_addresses(result.stdout) == without_addresses(expected.stdout)
    assert (result.returncode, result.stderr) == (expected.returncode, expected.stderr)


def test_the_users_python_path_and_sitecustomize_are_kept(tmp_path) -> None:
    write(tmp_path, "print('theirs', __name__)", "own/sitecustomize.py")
    write(tmp_path, ENDS)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "own")}
    expected = python("script.py", folder=tmp_path, env=environment)
    assert expected.stdout.startswith("theirs sitecustomize\n")
    result = run("-q", "script.py", folder=tmp_path, env=environment)
    # The command's own Python has loaded it, too.
    assert without_addresses(result.stdout) == (
        "theirs sitecustomize\n" + without_addresses(expected.stdout)
    )


def test_control_a_difference_is_detected(tmp_path) -> None:
    """The comparison above detects how `runpy` changes a script's environment."""
    write(tmp_path, ENDS)
    write(tmp_path, "import runpy; runpy.run_path('script.py', run_name='__main__')", "other.py")
    expected = python("script.py", "error", folder=tmp_path)
    result = python("other.py", "error", folder=tmp_path)
    assert without_addresses(result.stdout) != without_addresses(expected.stdout)
    assert result.stderr != expected.stderr


def test_a_script_without_grus_that_imports_torch_late(tmp_path) -> None:
    code = """
import os, sys
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
import importlib.util
assert importlib.util.find_spec("torch") and "torch" not in sys.modules
import torch
print(torch.get_num_threads(), type(torch.__loader__).__name__)
assert "exec_module" not in vars(torch.__loader__)
print(bool(torch.nn.Linear(2, 2)(torch.zeros(1, 2)).sum() > 9))
assert not {"h5py", "grutrace.capture.model_recorder"} & set(sys.modules), sys.modules.keys()
"""
    result = run(write(tmp_path, code), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1 SourceFileLoader\nFalse\n"
    assert result.stderr == "grutrace: no nn.GRU or nn.GRUCell was called: run.h5 was not written\n"
    assert not list(tmp_path.glob("*.h5"))


def test_the_trace_equals_that_of_an_explicit_tracer(tmp_path) -> None:
    """An uncaught exception closes the trace, and the traceback is the script's own."""
    write(tmp_path, MODEL + "def f():\n    raise ValueError('own')\nf()\n")
    expected = python("script.py", folder=tmp_path)
    result = run("-o", "x.h5", "--record", "hidden,update", "script.py", folder=tmp_path)
    assert (result.returncode, result.stdout) == (1, expected.stdout)
    message = "grutrace: recorded 4 calls of 3 sites in x.h5\n"
    assert result.stderr == expected.stderr + message
    torch.manual_seed(0)
    model = EncoderDecoder(layers=2)
    with grutrace.trace(model, record=["update", "hidden"], gates="inline") as memory:
        model(torch.randn(4, 6, 5), steps=3)
    with grutrace.open(tmp_path / "x.h5") as trace:
        assert trace.closed
        assert trace.sites == memory.sites == ("encoder.l0", "encoder.l1", "decoder.cell")
        for name in trace.sites:
            assert trace[name].site == memory[name].site
            for quantity in ("update", "hidden"):
                rows = np.asarray(trace[name].rows(quantity))
                np.testing.assert_array_equal(rows, memory[name].rows(quantity))
            for weight, values in trace[name].weights().items():
                np.testing.assert_array_equal(values, memory[name].weights()[weight])
        for field in ("module", "steps", "batch", "weights", "training", "residual"):
            np.testing.assert_array_equal(trace.calls[field], memory.calls[field])
    assert not list(tmp_path.glob("x.part*"))


def test_deferred_gates(tmp_path) -> None:
    write(tmp_path, MODEL)
    for gates in ("inline", "deferred"):
        options = ("-q", "-o", f"{gates}.h5", "--gates", gates)
        assert run_in_fork(*options, "script.py", folder=tmp_path).returncode == 0
    with (
        grutrace.open(tmp_path / "inline.h5") as inline,
        grutrace.open(tmp_path / "deferred.h5") as deferred,
    ):
        assert deferred.options["gates"] == "deferred"
        for name in inline.sites:
            assert deferred[name].site.derived == ("reset", "update", "candidate")
            result, expected = deferred[name].update[:], inline[name].update[:]
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
    assert main(["verify", str(tmp_path / "deferred.h5")]) == 0


MANY = """
import atexit, copy, gc, os, sys, threading, warnings, weakref
import torch
from torch import nn
import grutrace
warnings.simplefilter("error")
torch.manual_seed(0)
x = torch.randn(2, 5, 3)

class Model(nn.Module):
    def __init__(self, lazy=False):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.late = None
        self.lazy = lazy
    def forward(self, x):
        x = self.rnn(x)[0]
        if self.lazy and self.late is None:
            self.late = nn.GRU(4, 4, 2, batch_first=True)
        return x if self.late is None else self.late(x)[0]

class Trainer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.net = model
        self.cell = nn.GRUCell(4, 4)
    @torch.no_grad()
    def training_step(self, x):
        return self.cell(self.net(x)[:, -1])

first = Model(lazy=True)
first(x)                                   # rnn, then Model: late
first(x)
trainer = Trainer(first)
trainer.training_step(x)                   # rnn and late go on; cell
copy.deepcopy(first)(x)                    # another model: Model#3.rnn, Model#3.late
nn.GRU(3, 4)(x)                            # l0
nn.GRU(3, 4)(x)                            # GRU#2.l0
thread = threading.Thread(target=Model(), args=(x,))
thread.start()
thread.join()                              # Model#4.rnn
second = Model()                           # Model#5.rnn
second.rnn = nn.GRU(3, 4, batch_first=True)
with grutrace.trace(second, "own.h5", record="hidden") as own:
    second(x)
assert own.sites == ("rnn.l0",) and len(own.calls) == 1
second.rnn = nn.GRU(3, 5, batch_first=True)
second(x)                                  # Model#6.rnn
gone = weakref.ref(second)
del second, own
gc.collect()
assert gone() is None, gc.get_referrers(gone())
child = os.fork()
if not child:
    first(x)
    Model()(x)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
atexit.register(lambda: first(x))          # once more
print(torch.get_rng_state().sum().item(), sorted(os.listdir()) == sys.argv)
"""


def test_every_called_gru_is_found(tmp_path) -> None:
    expected = python(write(tmp_path, MANY), folder=tmp_path)
    assert expected.returncode == 0, expected.stderr
    (tmp_path / "own.h5").unlink()
    result = run("script.py", folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, expected.stdout), result.stderr
    assert (
        result.stderr == "grutrace: recorded 16 calls of 12 sites in run.h5 and 8 files beside it\n"
    )
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace.closed
        calls = {
            name: int((trace.calls["module"] == trace[name].module.path).sum())
            for name in trace.sites
        }
        assert all(check.holds for check in verify(trace))
        assert (np.diff(trace.calls["time"]) >= 0).all()
    assert calls == {
        "rnn.l0": 4,
        "late.l0": 4,
        "late.l1": 4,
        "cell.cell": 1,
        "Model#3.rnn.l0": 1,
        "Model#3.late.l0": 1,
        "Model#3.late.l1": 1,
        "l0": 1,
        "GRU#2.l0": 1,
        "Model#4.rnn.l0": 1,
        "Model#5.rnn.l0": 1,
        "Model#6.rnn.l0": 1,
    }
    for number in range(1, 10):
        plain = PlainTrace(part_path(tmp_path / "run.h5", number))
        assert plain.closed
        assert plain.options["run"]["part"] == number


COMPILED = """
import torch, warnings
from torch import nn
warnings.simplefilter("error")

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.rnn = nn.GRU(3, 4)
    def forward(self, x):
        return self.rnn(self.first(x))[0]

x, model, other = torch.randn(5, 3), Model(), Model()
torch.compile(model.first, backend="eager", fullgraph=True)(x)
assert torch.equal(torch.compile(model, backend="eager")(x), model(x))
other.compile(backend="eager")
other(x)
warnings.simplefilter("ignore")
torch.export.export(Model(), (x,))
"""


def test_torch_compile_is_unaffected(tmp_path) -> None:
    result = run(write(tmp_path, COMPILED), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    missed, last = result.stderr.splitlines()
    assert missed.startswith("grutrace: a call of GRU was not recorded: it was being captured in")
    assert last == "grutrace: recorded 3 calls of 2 sites in run.h5 and 1 file beside it"
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace.sites == ("rnn.l0", "Model#2.rnn.l0")


ENDLESS = (
    MODEL
    + """
import itertools
other = torch.nn.GRU(3, 4)
for number in itertools.count():
    model(torch.randn(1, 6, 5), steps=3)
    other(torch.randn(6, 3))
    if number == 11:
        print("ready", flush=True)
"""
)


def has_committed(path: Path) -> bool:
    """Whether the files of the endless script hold what it did before it said that it is ready."""
    if not path.exists() or not part_path(path, 2).exists():
        return False
    with grutrace.open(path) as trace:
        modules = trace.calls["module"].tolist()
        return modules.count("") >= 11 and len(modules) - modules.count("") >= 4 * 12


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_can_be_read(how, tmp_path) -> None:
    write(tmp_path, ENDLESS)
    command = [sys.executable, "-m", "grutrace", "run", "script.py"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None, process.stderr.read()
        end = time.monotonic() + 60
        while not has_committed(tmp_path / "run.h5") and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(how)
        try:
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == -how
    assert ("KeyboardInterrupt" in stderr) == (how == signal.SIGINT)
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace.closed == (how == signal.SIGINT)
        assert len(trace.calls) >= 4 * 12 + 11
        assert trace.sites == ("encoder.l0", "encoder.l1", "decoder.cell", "l0")
        assert all(check.holds for check in verify(trace))
    for number in (1, 2):
        assert len(PlainTrace(part_path(tmp_path / "run.h5", number)).calls) >= 11
    assert {path.name for path in tmp_path.glob("*.h5*")} == {"run.h5", "run.part0002.h5"}


def test_modes(tmp_path, capsys) -> None:
    path = tmp_path / "run.h5"
    write(tmp_path, MODEL + "torch.nn.GRU(*map(int, sys.argv[1:]))(torch.zeros(2, 3))\n")

    def sites_and_calls():
        with grutrace.open(path) as trace:
            return trace.sites[3:], len(trace.calls)

    assert run_in_fork("script.py", "3", "4", folder=tmp_path).returncode == 0
    assert sites_and_calls() == (("l0",), 5)
    # Refused before the script starts.
    assert main(["run", "-o", str(path), str(tmp_path / "script.py"), "3", "4"]) == 2
    assert "run.h5 exists" in capsys.readouterr().err
    assert run_in_fork("--mode", "a", "script.py", "3", "5", folder=tmp_path).returncode == 0
    assert sites_and_calls() == (("l0", "GRU#2.l0"), 10)
    with grutrace.open(path) as trace:
        assert len(trace["encoder.l0"]) == 8
    assert main(["info", str(path), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["parts"] == [str(part_path(path, number)) for number in (1, 2, 3)]
    assert about["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.h5"))
    result = run_in_fork(
        "--mode", "overwrite", "--sites", "enc*.l1", "script.py", "3", "4", folder=tmp_path
    )
    assert result.stderr == "grutrace: recorded 1 call of 1 site in run.h5\n"
    with grutrace.open(path) as trace:
        assert trace.sites == ("encoder.l1",)
    assert [path.name for path in tmp_path.glob("*.h5*")] == ["run.h5"]


FILLS_UP = """
import errno, time
from grutrace.storage.write.appender import DatasetAppender
time.sleep(1)
def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
DatasetAppender._write_items = full
model(torch.randn(4, 6, 5), steps=3)
time.sleep(1)
print(model(torch.randn(4, 6, 5), steps=3).sum().item())
"""


TURNS_WARNINGS_INTO_ERRORS = """
import warnings, torch
warnings.simplefilter("error")
layer = torch.nn.GRU(2, 3)
for _ in range(3):
    layer(torch.full((4, 2, 2), 1e6))
print("done")
"""


def test_warnings_at_the_end_of_a_script_lose_no_rows(tmp_path) -> None:
    script = write(tmp_path, TURNS_WARNINGS_INTO_ERRORS)
    result = run_in_fork("--dtype", "float16", "--record", "update,input", script, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "done\n")
    message, last = result.stderr.splitlines()
    assert message.startswith("grutrace: the model has values up to 1e+06, and float16 holds")
    assert last == "grutrace: recorded 3 calls of 1 site in run.h5"
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert len(trace.calls) == 3


def test_a_full_disk_stops_the_recording_and_not_the_script(tmp_path) -> None:
    result = run_in_fork(write(tmp_path, MODEL + FILLS_UP), folder=tmp_path)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 2
    message, last = result.stderr.splitlines()
    assert message.startswith(
        "grutrace: recording has stopped, and the model continues untraced: " + str(tmp_path)
    )
    assert message.endswith("No space left on device")
    assert last == "grutrace: recorded 4 calls of 3 sites in run.h5; 8 are lost, as said above"
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert len(trace["encoder.l0"]) == 4


def test_a_full_disk_stops_a_script_that_asks_for_it(tmp_path) -> None:
    script = write(tmp_path, MODEL + FILLS_UP)
    result = run_in_fork("--on-error", "raise", "--fsync", script, folder=tmp_path)
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 1
    assert re.search(r"SinkError: .*run\.h5.*No space left on device", result.stderr)
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert len(trace.calls) == 4
        assert trace.options["fsync"] is True


def test_invalid_options_are_refused_before_the_script_runs(tmp_path, capsys) -> None:
    script = str(tmp_path / write(tmp_path, "raise SystemExit(5)"))
    for options in (
        ["-o", str(tmp_path / "none" / "run.h5")],
        ["-o", str(tmp_path)],
        ["--record", "update,nonsense"],
        ["--mode", "x"],
        ["--check", "x"],
        ["--stacks", "x"],
        ["--gates", "x"],
        ["--on-error", "x"],
    ):
        assert main(["run", *options, script]) == 2
        err = capsys.readouterr().err
        assert err.startswith("grutrace: ")
        assert err.count("\n") == 1
    assert main(["run"]) == 2
    assert main(["run", "--nonsense", script]) == 2
    path = str(tmp_path / "run.h5")
    result = run("-o", path, script, folder=tmp_path, interpreter=["-I"])
    assert result.returncode == 2
    assert "start Python without -I, -E and -S" in result.stderr
    assert not list(tmp_path.glob("*.h5"))


def test_the_defaults_equal_those_of_the_tracer_and_the_command() -> None:
    def defaults(function) -> dict[str, object]:
        return {
            name: parameter.default for name, parameter in signature(function).parameters.items()
        }

    tracer = {name: value for name, value in defaults(Tracer).items() if name in OPTIONS}
    assert tracer == {name: option.default for name, option in OPTIONS.items()}
    command = {name: value for name, value in defaults(command_run).items() if name in OPTIONS}
    # A script goes on by itself; None stands for the tracer's own.
    others = {"on_error": "warn", "sites": None, "record": None}
    others |= {"state_memory": None, "buffer": None}
    assert command == {name: OPTIONS[name].default for name in command} | others
    assert set(Settings.__dataclass_fields__) & OPTIONS.keys() == set(command)


TWO = """
import sys, torch
from torch import nn
encoder, decoder = nn.ModuleDict({"rnn": nn.GRU(3, 4)}), nn.ModuleDict({"cell": nn.GRUCell(3, 4)})
if "later" in sys.argv:
    del decoder
for epoch in range(3):
    print("epoch", epoch)
    encoder["rnn"](torch.randn(5, 2, 3))
    if "later" in sys.argv:
        decoder = nn.ModuleDict({"cell": nn.GRUCell(3, 4)})
    decoder["cell"](torch.randn(2, 3))
"""


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_sites_that_match_nothing_end_the_script_at_its_first_call(quiet, tmp_path) -> None:
    """The error comes before hours of untraced training."""
    write(tmp_path, MODEL + "print('trained')\n")
    options = [*quiet, "--sites", "encodr.*", "--sites", "*.l7"]
    result = run_in_fork(*options, "script.py", folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "grutrace: sites: 'encodr.*', '*.l7' matches none of the sites of EncoderDecoder "
        "(did you mean 'encoder.l1'?): encoder.l0, encoder.l1, decoder.cell\n"
    )
    assert not list(tmp_path.glob("*.h5"))


def test_control_sites_that_match_let_the_script_run(tmp_path) -> None:
    write(tmp_path, MODEL + "print('trained')\n")
    result = run_in_fork(
        "--sites", "encodr.*", "--sites", "encoder.l0", "script.py", folder=tmp_path
    )
    assert result.returncode == 0
    assert result.stdout.endswith("trained\n")
    assert result.stderr.splitlines() == [
        "grutrace: sites: 'encodr.*' matched no site of any model that was called",
        "grutrace: recorded 1 call of 1 site in run.h5",
    ]


def test_sites_of_a_model_that_is_called_later_are_recorded(tmp_path) -> None:
    """The script calls an encoder first. The requested decoder exists already."""
    write(tmp_path, TWO)
    result = run_in_fork("--sites", "cell", "script.py", folder=tmp_path)
    assert (result.returncode, result.stdout.count("epoch")) == (0, 3), result.stderr
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace.sites == ("cell",)
        assert len(trace.calls) == 3


def test_a_model_created_later_is_unknown_at_the_first_call(tmp_path) -> None:
    write(tmp_path, TWO)
    result = run_in_fork("--sites", "cell", "script.py", "later", folder=tmp_path)
    assert result.returncode == 2
    assert "'cell' matches none of the sites of GRU: l0" in result.stderr
    # Together with a site that is there it is waited for.
    result = run_in_fork("--sites", "cell", "--sites", "l0", "script.py", "later", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert sorted(trace.sites)[-1] == "l0"


ANEW = """
import torch
from torch import nn

class Vocoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 4))
    def forward(self, x):
        cell = nn.GRUCell(4, 4)
        cell.weight_ih.data = self.weight
        return cell(x)

model = Vocoder()
with torch.no_grad():
    for _ in range(30):
        model(torch.randn(2, 4))
"""


def test_cells_created_in_each_call_are_one_site(tmp_path) -> None:
    options = ("--weights", "exact", "--compiled", "keep", "--state-memory", "1MiB")
    options += ("--buffer", "2MiB")
    done = run_in_fork("-o", "run.h5", *options, write(tmp_path, ANEW), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == ["run.h5"]
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace.sites == ("cell",)
        assert len(trace.calls) == 30
        assert set(trace.calls["proof"]) == {"proven"}
        results = {name: trace.options[name] for name in ("weights", "compiled", "state_memory")}
        assert results == {"weights": "exact", "compiled": "keep", "state_memory": 2**20}
        assert trace.options["buffer"] == 2**21
