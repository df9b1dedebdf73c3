"""Single attacks by a hostile file, with a control where the attack must be shown to work."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys

import h5py
import numpy as np
import pytest

import grutrace
from grutrace.__main__ import main
from grutrace.analysis.verification.verify import verify
from grutrace.storage.hdf5.errors import FormatError
from grutrace.storage.hdf5.safe_access import get_member, has_member, is_dataset
from grutrace.storage.recovery import preflight
from tests.golden.runs import GOLDENS
from tests.plain_reader import PlainTrace
from tools.hostile import seeds
from tools.hostile.checksums import put_right, structures

SITE = "modules/rnn/l0"


@pytest.fixture
def path(tmp_path):
    return seeds.put("decoder", tmp_path / "run.h5")


def changed(path):
    return h5py.File(path, "r+", libver=("v110", "v110"))


def refused(path, match):
    with pytest.raises(grutrace.TraceFileError, match=match) as caught:
        grutrace.open(path).close()
    assert str(path) in str(caught.value)


def attribute(path, name, value):
    return lambda file: file[path].attrs.__setitem__(name, value)


def second_site(file, **attributes):
    file.copy(SITE, "modules/rnn/l1")
    for name, value in attributes.items():
        file["modules/rnn/l1"].attrs[name] = value


def second_module(file):
    file.copy("modules/rnn", "modules/other")
    file["modules/other"].attrs["index"] = 1


def another_input(file):
    second_site(file, name="rnn.l0_reverse", layer=0, reverse=True)
    file.move("modules/rnn/l1", "modules/rnn/l0_reverse")


REFUSED = {
    "a time that never was": (attribute("/", "created", np.inf), "'created'"),
    "a time before all": (attribute("/", "created", -1.0), "'created'"),
    "versions that are no texts": (attribute("/", "versions", '{"torch": [1]}'), "'versions'"),
    "no units": (attribute("modules/rnn", "hidden_size", 0), "'hidden_size': expected at least 1"),
    "no layers": (attribute("modules/rnn", "num_layers", -2), "'num_layers': expected at least 1"),
    "a layer that is not there": (attribute(SITE, "layer", 1), "l0: expected 1 layers, found 1"),
    "an input of another size": (attribute(SITE, "input_size", 4), "l0: expected an input size"),
    "a direction twice": (lambda f: second_site(f, name="x"), "each direction of a layer once"),
    "a name twice": (second_module, "a unique name for each site"),
    "another input for the other direction": (another_input, "l0_reverse/input.*input of l0"),
    "derived of some units": (attribute(SITE, "derived", "reset"), "'derived'"),
    "a reference": (lambda f: attribute("/", "model", f.ref)(f), "'model': expected a string"),
    "a fork of no steps": (lambda f: fork(f, 2**63), "forks.steps"),
    "half a word": (lambda f: f["values"].__setitem__(0, 0.5), "values"),
}


def fork(file, steps):
    forks = file["forks"][:]
    forks["steps"] = steps
    file["forks"][:] = forks


@pytest.mark.parametrize("what", REFUSED)
def test_inconsistent_files_are_refused(path, what):
    change, match = REFUSED[what]
    with changed(path) as file:
        change(file)
    refused(path, match)


def test_a_name_with_a_slash_is_not_a_path(path):
    """A damaged group can contain such a name. HDF5 never writes one, but would follow it."""
    os.mkfifo(path.parent / "pipe")
    with changed(path) as file:
        file.create_group("modules/x_y")
        file["modules/x"] = h5py.ExternalLink(str(path.parent / "pipe"), "/")
    content = bytearray(path.read_bytes())
    start, end = next(
        (start, end)
        for start, end in structures(bytes(content))
        if content.find(b"x_y", start, end) >= 0
    )
    position = content.find(b"x_y", start, end)
    content[position : position + 3] = b"x/y"
    put_right(content, start, end)
    path.write_bytes(content)
    with h5py.File(path) as file:
        group = file["modules"]
        assert "x/y" in list(group)
        assert not has_member(group, "x/y")
        assert not is_dataset(group, "x/y")
        with pytest.raises(FormatError, match="expected a name without slashes, found a path"):
            get_member(group, "x/y", h5py.Group)
    refused(path, "ExternalLink")


def test_tables_that_share_their_bytes_are_not_all_read(path):
    """Each table is as large as the file allows, and all share the same bytes."""
    with changed(path) as file:
        pieces = file["modules/rnn/pieces"]
        many = 8 * path.stat().st_size // pieces.dtype.itemsize
        del file["modules/rnn/pieces"]
        file.create_dataset("modules/rnn/pieces", (many,), pieces.dtype, chunks=(many,))
        file["modules/rnn/pieces"][0] = np.zeros((), pieces.dtype)
        calls = file["calls"][:4]
        calls["batch"] = 0
        calls["batch"][0] = many
        calls["module"][1:] = [1, 2, 3]
        for number in (1, 2, 3):
            calls["batch"][number] = many
            file.copy("modules/rnn", f"modules/m{number}", shallow=False)
            group = file[f"modules/m{number}"]
            group.attrs["index"] = number
            group["l0"].attrs["name"] = f"m{number}.l0"
            del group["pieces"]
            group["pieces"] = file["modules/rnn/pieces"]
        file["calls"][:4] = calls
    refused(path, "tables that fit into the file together")


@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"compression": "lzf"}])
def test_files_compressed_by_another_program_are_read(path, options):
    before = PlainTrace(path)
    with changed(path) as file:
        for dataset in ("calls", "modules/rnn/pieces", f"{SITE}/update", f"{SITE}/weight_hh"):
            data, longest = file[dataset][()], file[dataset].maxshape
            del file[dataset]
            file.create_dataset(
                dataset, data=data, maxshape=longest, chunks=True, shuffle=True, **options
            )
    (site,) = before.modules[0].sites.values()
    with grutrace.open(path) as trace:
        for sequence in trace["rnn.l0"]:
            exact = site.sequence(sequence.number, "update")
            np.testing.assert_array_equal(sequence.update, exact)


def test_an_impossible_compression_ratio_is_refused(path):
    with changed(path) as file:
        dtype = file["calls"].dtype
        del file["calls"]
        file.create_dataset("calls", (10**9,), dtype, chunks=(1000,), compression="gzip")
        counts = file["committed"][()]
        counts["calls"] = 10**9
        file["committed"][()] = counts
    refused(path, "calls: expected tables that fit")


# Filters and plugins.


def trapped(folder):
    """An environment in which HDF5 waits for ever as soon as it looks for plugins."""
    plugins = folder / "plugins"
    plugins.mkdir()
    os.mkfifo(plugins / "libtrap.so")
    return {**os.environ, "HDF5_PLUGIN_PATH": str(plugins)}


READ = "import grutrace; grutrace.open({path!r})"


def test_no_filter_is_loaded_for_a_dataset(path, tmp_path):
    with changed(path) as file:
        dataset = file[f"{SITE}/update"]
        data = dataset[()]
        del file[f"{SITE}/update"]
        file.create_dataset(f"{SITE}/update", data=data, chunks=True, compression="gzip")
    content = bytearray(path.read_bytes())
    # A pipeline of one filter, gzip: its number, no name, not optional, one value.
    one = b"\x02\x01\x01\x00\x01\x00\x01\x00"
    for start, end in list(structures(bytes(content))):
        position = content.find(one, start, end)
        if position >= 0:
            struct.pack_into("<HH", content, position + 2, 200, 0)
            put_right(content, start, end)
            break
    else:
        pytest.fail("no filter was found")
    path.write_bytes(content)
    environment = trapped(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READ.format(path=str(path))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "one of the filters gzip, " in done.stderr
    # Control: HDF5 itself looks for it.
    naive = f"import h5py; h5py.File({str(path)!r})['{SITE}/update'][()]"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", naive], env=environment, timeout=4)


def test_commands_load_no_plugin(path):
    import ctypes

    from grutrace.storage.hdf5.safe_open import _hdf5, disable_plugins

    def state():
        result = ctypes.c_uint(7)
        _hdf5().H5PLget_loading_state(ctypes.byref(result))
        return result.value

    before = state()
    assert before
    with disable_plugins():
        assert state() == 0
    assert state() == before


# What else is in the folder.


def test_no_code_in_the_files_folder_is_run(path, monkeypatch):
    mark = path.parent / "ran"
    for name in ("h5py", "numpy", "grutrace", "resource", "json"):
        (path.parent / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.chdir(path.parent)
    assert main(["verify", "run.h5"]) == 0
    assert not mark.exists()
    # Control: Python looks there unless it is told not to.
    subprocess.run([sys.executable, "-c", "import resource"], check=True)
    assert mark.exists()


def test_a_part_that_links_out_of_the_folder_is_refused(tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    seeds.put("run", folder / "run.h5")
    seeds.put("run.part0002", outside / "run.part0002.h5")
    (folder / "run.part0002.h5").symlink_to(outside / "run.part0002.h5")
    with pytest.raises(grutrace.TraceFileError, match=r"run\.part0002\.h5 is a link to"):
        grutrace.open(folder / "run.h5")
    (folder / "run.part0002.h5").unlink()
    # Control: a link to the first, with its parts beside the file itself, is nobody's trick.
    seeds.put("run.part0002", folder / "run.part0002.h5")
    (outside / "mine.h5").symlink_to(folder / "run.h5")
    with grutrace.open(outside / "mine.h5") as trace:
        assert len(trace.sites) == 2


def test_nothing_is_appended_through_a_link(path):
    golden, other = GOLDENS["decoder"], path.parent / "other.h5"
    seeds.put("decoder", other)
    before = other.read_bytes()
    with changed(path) as file:
        del file[f"{SITE}/update"]
        file[f"{SITE}/update"] = h5py.ExternalLink("other.h5", f"{SITE}/update")
    with pytest.raises(grutrace.TraceFileError, match="ExternalLink"):
        grutrace.Tracer(golden.build(), path, mode="a", **golden.options)
    assert other.read_bytes() == before


# What is said.


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        ("ein Satz äöü\n".encode() * 1000, "a text file"),
        (b"\x1f\x8b\x08rest", "a gzip file"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "a PyTorch checkpoint"),
        (b"PK\x03\x04" + bytes(26) + b"arr_0.npy", r"a NumPy archive \(.npz\)"),
        (b"PK\x03\x04" + bytes(26) + b"word/document.xml", "a zip file"),
        (b"\x93NUMPY\x01\x00", r"a NumPy array \(.npy\)"),
        (b"\x80\x04\x95", "a pickle"),
        (bytes(9000), "a file of zeros"),
        (b"\xff\xd8\xff\xe0", "an unknown kind of file"),
        (b" " * 512 + b"\x89HDF\r\n\x1a\n", "an HDF5 file with a user block"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, content, kind, capsys):
    path = tmp_path / "run.h5"
    path.write_bytes(content)
    refused(path, rf"is not a grutrace trace \(it is {kind}\)$")
    with pytest.raises(
        grutrace.TraceFileError, match=rf"is not a grutrace statistics file \(it is {kind}\)$"
    ):
        grutrace.Statistics.load(path)
    for command in ("info", "stats", "verify"):
        assert main([command, str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_of_this_torch_is_named(tmp_path):
    import torch

    torch.save({"weight": torch.zeros(3)}, tmp_path / "run.h5")
    refused(tmp_path / "run.h5", "it is a PyTorch checkpoint")


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", "\x1b[2J", "a\nb", "\u202ex", ":smile:"])
def test_a_name_cannot_control_the_terminal(path, name, capsys):
    with changed(path) as file:
        file.attrs["model"] = name
        file[SITE].attrs["name"] = name
        file.attrs["options"] = json.dumps({"every": name})
    for command in ("info", "stats", "verify"):
        assert main([command, str(path)]) in (0, 1)
        out = capsys.readouterr().out
        assert all(character.isprintable() or character == "\n" for character in out)
        assert name.translate({27: "\\x1b", 10: "\\n", 0x202E: "\\u202e"}) in out
    with pytest.raises(grutrace.NotRecordedError):
        grutrace.open(path)["rnn.l0"]


def test_a_message_is_one_line(path, capsys):
    with changed(path) as file:
        file.move("modules/rnn", "modules/two\nlines\x1b[2J")
        del file["modules/two\nlines\x1b[2J"].attrs["path"]
    assert main(["info", str(path)]) == 2
    assert "two\\nlines\\x1b[2J" in capsys.readouterr().err


def test_a_nan_tolerance_fails_every_check(path):
    with grutrace.open(path) as trace:
        assert all(check.holds for check in verify(trace))
    with changed(path) as file:
        checks = file[f"{SITE}/checks"][:]
        checks["tolerance"] = np.nan
        file[f"{SITE}/checks"][:] = checks
    with grutrace.open(path) as trace:
        assert not any(check.holds for check in verify(trace))


# The look from outside.


def test_an_intact_file_passes_the_preflight(path):
    preflight.check_in_subprocess(path)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", r"is damaged: HDF5 [\d.]+ crashes on it \(SIGSEGV"),
        ("import os; os.abort()", r"is damaged: HDF5 [\d.]+ crashes on it \(SIGABRT\)"),
        ("import time; time.sleep(60)", r"HDF5 [\d.]+ did not finish reading it within 1 s"),
        ("raise SystemExit(3)", "requests more memory than a file of this size needs"),
        ("import no_such_module", "could not be checked in a subprocess"),
    ],
)
def test_the_end_of_the_subprocess_is_reported(path, code, said, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "_SCRIPT", code)
    with pytest.raises(grutrace.TraceFileError, match=said):
        preflight.check_in_subprocess(path, limit=1)
    if "sleep" not in code:
        assert main(["verify", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert main(["derive", str(path), "-o", str(path.with_name("out.h5"))]) == 2
        assert not path.with_name("out.h5").exists()


def test_the_subprocess_has_a_memory_limit(path, monkeypatch):
    """The limit is far above the needs of a file of this size."""
    code = preflight._SCRIPT.replace(
        "from {module} import {function}", "from grutrace.storage.recovery import preflight"
    )
    code = code.replace(
        "{function}({files!r})", "preflight.MEMORY_BYTES = 1; preflight.read_everything({files!r})"
    )
    assert "MEMORY_BYTES" in code
    monkeypatch.setattr(preflight, "_SCRIPT", code)
    with pytest.raises(grutrace.TraceFileError, match=r"run\.h5"):
        preflight.check_in_subprocess(path)


def test_damage_in_a_growing_file_is_reported_at_once(tmp_path):
    """HDF5 itself retries a hundred times with doubled waits, which takes years."""
    path = tmp_path / "run.h5"
    content = bytearray(seeds.content("killed"))
    content[200] ^= 4
    path.write_bytes(content)
    for code, comes_back in (
        (READ.format(path=str(path)), True),
        (f"import h5py; h5py.File({str(path)!r}, swmr=True)['calls']", False),
    ):
        running = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        try:
            assert (running.wait(timeout=30 if comes_back else 5) != 0) is comes_back
        except subprocess.TimeoutExpired:
            assert not comes_back
        finally:
            running.send_signal(signal.SIGKILL)
            running.wait()
