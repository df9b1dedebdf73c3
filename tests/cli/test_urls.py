"""Commands with the URL of a trace: the same answer as for the file, or one clear line.

The commands are processes of their own, since fsspec keeps a thread and connections.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import grutrace
from grutrace.storage.shards.merge import merge_shards
from tests.web_server import Server, serve

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'fsspec[http]'")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    layer = nn.GRU(3, 8)
    for name, gates in (("run.h5", "inline"), ("deferred.h5", "deferred")):
        with grutrace.trace(layer, folder / name, gates=gates) as tracer:
            for number in range(3):
                tracer.start(tag=f"batch {number}")
                layer(torch.randn(20, 4, 3))
    flagged = bytearray((folder / "run.h5").read_bytes())
    flagged[11] |= 5
    (folder / "written.h5").write_bytes(flagged)
    for rank in range(2):
        with grutrace.trace(layer, folder / "part.h5", shard=(rank, 2)):
            layer(torch.randn(3, 2, 3))
    merge_shards(sorted(folder.glob("part.rank*.h5")), folder / "merged.h5")
    with serve(folder) as running:
        yield running


def grutrace_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "grutrace", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


#: Commands that read a trace, with {} for the file.
COMMANDS = {
    "info": ["info", "{}", "--tag", "batch 1"],
    "stats": ["stats", "{}"],
    "an analysis": ["stats", "{}", "timescales", "--each"],
    "verify": ["verify", "{}", "--json"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_url_gives_what_the_file_gives(command: str, server: Server) -> None:
    of_file, of_url = (
        grutrace_command(*(word.format(name) for word in COMMANDS[command]))
        for name in (str(server.folder / "run.h5"), f"{server.url}run.h5")
    )
    assert (of_url.returncode, of_url.stderr) == (0, "")
    if command == "info":
        assert f"{server.url}run.h5: trace of torch.nn.modules.rnn.GRU, on a server, closed" in (
            of_url.stdout
        )
        # The first line names the file and its size.
        of_file.stdout, of_url.stdout = (
            done.stdout.partition("\n")[2] for done in (of_file, of_url)
        )
    assert of_url.stdout == of_file.stdout


def test_control_another_file_gives_another_answer(server: Server) -> None:
    answers = {
        grutrace_command("stats", f"{server.url}{name}.h5").stdout for name in ("run", "deferred")
    }
    assert len(answers) == 2


def test_info_as_json_names_the_url(server: Server) -> None:
    url = f"{server.url}run.h5"
    about = json.loads(grutrace_command("info", url, "--json").stdout)
    assert (about["file"], about["parts"], about["bytes"]) == (url, [url], None)


def test_commands_that_write_take_a_url_to_read(server: Server, tmp_path: Path) -> None:
    url, output = f"{server.url}deferred.h5", str(tmp_path / "derived.h5")
    assert grutrace_command("derive", url, "-o", output).stderr == ""
    assert grutrace_command("verify", output).returncode == 0
    done = grutrace_command("diff", url, f"{server.url}deferred.h5")
    assert "The traces are the same." in done.stdout
    done = grutrace_command("export", url, "--to", "npz", "-o", str(tmp_path / "run.npz"))
    assert (done.returncode, done.stderr) == (0, "")
    done = grutrace_command("report", url, "-o", str(tmp_path / "run.html"))
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "<title>Report: a trace of torch.nn.modules.rnn.GRU</title>" in page


#: What is refused: the arguments, with {} for the address of the server, and the error.
REFUSED = {
    "merged": (["info", "{}merged.h5"], "holds all its rows"),
    "being written": (["stats", "{}written.h5"], "is being written, or its writer was killed"),
    "missing": (["verify", "{}none.h5"], "does not exist"),
    "several": (["info", "{}part.rank0000.h5", "{}part.rank0001.h5"], "expected one URL"),
    "recover": (["recover", "{}run.h5", "-o", "new.h5"], "expected a file on this machine"),
    "merge": (["merge", "{}run.h5", "-o", "new.h5"], "expected a file on this machine"),
    "annotate": (["annotate", "{}run.h5", "labels.csv"], "expected a file on this machine"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line(case: str, server: Server) -> None:
    arguments, message = REFUSED[case]
    done = grutrace_command(*(word.format(server.url) for word in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert server.url in done.stderr


def test_the_live_view_shows_a_url(server: Server) -> None:
    pytest.importorskip("bokeh", reason="bokeh is not installed: pip install bokeh")
    code = """
import sys
from urllib.request import urlopen
import grutrace
with grutrace.view(sys.argv[1], browser=False) as view:
    assert urlopen(view.url).status == 200
"""
    done = subprocess.run(
        [sys.executable, "-c", code, f"{server.url}run.h5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
