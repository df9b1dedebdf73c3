"""Traces on a server: read in parts over HTTP; what cannot be read so is refused by name.

The clients are processes of their own, since fsspec keeps a thread and connections.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.storage.shards.merge import merge_shards
from tests.web_server import SECRET, WHOLE, Server, serve

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'fsspec[http]'")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    layer = nn.GRU(8, 256)
    with grutrace.trace(layer, folder / "run.h5"):
        for _ in range(4):
            layer(torch.randn(50, 16, 8))
    for name in (WHOLE, SECRET):
        shutil.copy(folder / "run.h5", folder / name)
    flagged = bytearray((folder / "run.h5").read_bytes())
    flagged[11] |= 5
    (folder / "written.h5").write_bytes(flagged)
    (folder / "notes.h5").write_text("to be done")
    for rank in range(2):
        with grutrace.trace(layer, folder / "part.h5", shard=(rank, 2)):
            layer(torch.randn(3, 2, 8))
    shards = sorted(folder.glob("part.rank*.h5"))
    merge_shards(shards, folder / "merged.h5")
    merge_shards(shards, folder / "copied.h5", copy=True)
    with serve(folder) as running:
        yield running


def client(code: str, *arguments: str) -> object:
    """Run lines that set `result`, in a process of their own."""
    lines = ["import json, sys, grutrace", "url = sys.argv[1]", *code.strip().splitlines()]
    program = "\n".join([*lines, "print(json.dumps(result))"])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def error_of(url: str) -> str:
    code = """
try:
    grutrace.open(url)
except Exception as error:
    result = f"{type(error).__name__}: {error}"
"""
    return str(client(code, url))


def test_one_sequence_is_fetched_in_small_parts(server: Server) -> None:
    code = """
trace = grutrace.open(url)
site = trace["l0"]
result = [repr(trace), site.sequence(17).update.tolist(), len(site), trace.closed]
"""
    server.sent.clear()
    text, update, count, closed = client(code, f"{server.url}run.h5")
    with grutrace.open(server.folder / "run.h5") as trace:
        expected = trace["l0"].sequence(17).update
    assert np.array_equal(np.array(update, np.float32), expected)
    assert (count, closed) == (64, True)
    assert f"{server.url}run.h5" in text.replace("\n    ", " ")
    size = (server.folder / "run.h5").stat().st_size
    assert size > 12_000_000
    assert sum(server.sent) < 1_500_000
    # The control: fsspec as it is by default.
    server.sent.clear()
    code = """
import fsspec, h5py
with fsspec.open(url) as stream, h5py.File(stream) as file:
    result = file["modules/%/l0/update"][850:900].tolist()
"""
    client(code, f"{server.url}run.h5")
    assert sum(server.sent) > 5_000_000


def test_all_rows_and_a_pickled_trace(server: Server) -> None:
    code = """
import pickle
import numpy as np
trace = pickle.loads(pickle.dumps(grutrace.open(url)))
rows = [np.asarray(trace["l0"].rows(name)).sum(dtype="f8") for name in ("update", "hidden")]
before = trace.calls["batch"].tolist()
trace.refresh()
result = [rows, before == trace.calls["batch"].tolist(), list(map(str, trace.files))]
trace.close()
"""
    sums, same, files = client(code, f"{server.url}run.h5")
    with grutrace.open(server.folder / "run.h5") as trace:
        for found, name in zip(sums, ("update", "hidden"), strict=True):
            assert found == np.asarray(trace["l0"].rows(name)).sum(dtype="f8")
    assert same
    assert files == []


def test_a_copied_merge_is_read(server: Server) -> None:
    code = 'result = grutrace.open(url).calls["rank"].tolist()'
    assert client(code, f"{server.url}copied.h5") == [0, 1]


#: What cannot be read: the file, and what the error says.
REFUSED = {
    "merged": ("merged.h5", "TraceFileError: .*holds all its rows.*Merge the shards with --copy"),
    "being written": ("written.h5", "TraceFileError: .*is being written, or its writer was killed"),
    "not a trace": ("notes.h5", r"TraceFileError: .* is not a grutrace trace \(it is a text file"),
    "missing": ("none.h5", "TraceFileError: .*none.h5 does not exist"),
    "no byte ranges": (WHOLE, "TraceFileError: .*sends whole files only.*download"),
    "not allowed": (SECRET, "TraceFileError: .*401"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case: str, server: Server) -> None:
    name, message = REFUSED[case]
    found = error_of(f"{server.url}{name}")
    assert found.startswith(message.partition(":")[0])
    assert server.url + name in found
    assert "\n" not in found
    assert re.search(message, found), found


def test_a_server_that_is_not_there_and_an_unknown_scheme() -> None:
    assert "cannot be opened" in error_of("http://127.0.0.1:9/run.h5")
    assert "Protocol not known: nosuch" in error_of("nosuch://bucket/run.h5")


def test_storage_options_reach_the_server(server: Server) -> None:
    code = """
options = {"headers": {"Authorization": "me"}}
result = len(grutrace.open(url, storage_options=options)["l0"])
"""
    assert client(code, f"{server.url}{SECRET}") == 64


def test_a_server_that_fails_later_ends_nothing(server: Server) -> None:
    """HDF5 asks the file object in the middle of a read. The error comes out, no more."""
    path = server.folder / "later.h5"
    shutil.copy(server.folder / "run.h5", path)
    code = """
import os
trace = grutrace.open(url)
first = trace["l0"].sequence(0).update.shape
os.unlink(sys.argv[2])
try:
    trace["l0"].hidden[:]
except grutrace.TraceFileError as error:
    result = [first, str(error), trace["l0"].sequence(0).update.shape == first]
"""
    shape, message, still = client(code, f"{server.url}later.h5", str(path))
    assert shape == [50, 256]
    assert "does not answer" in message
    assert "404" in message
    assert still


def test_wrong_use_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(grutrace.OptionError, match="storage_options: expected None without a URL"):
        grutrace.open(tmp_path / "run.h5", storage_options={"key": 1})
    urls = ["https://example.org/run.rank0000.h5", "https://example.org/run.rank0001.h5"]
    with pytest.raises(grutrace.OptionError, match=r"one URL, or several paths.*--copy"):
        grutrace.open(urls)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(grutrace.errors.MissingExtraError, match="https:// needs fsspec"):
        grutrace.open("https://example.org/run.h5")
