"""Traces in an object store: a server of S3 on this machine, simulated by moto.

The clients are processes of their own, since s3fs keeps a thread and connections.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.storage.shards.merge import merge_shards

REASON = "s3fs or moto is not installed: pip install -c constraints.txt -e '.[test,s3-server]'"
if "GRUTRACE_REQUIRE_PACKAGES" not in os.environ:
    for name in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(name, reason=REASON)

#: The simulated server accepts any key.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"}

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""

UPLOAD = """
import json, sys, s3fs
endpoint, *files = sys.argv[1:]
system = s3fs.S3FileSystem(endpoint_url=endpoint)
system.mkdir("runs")
for file in files:
    system.put(file, "runs/" + file.rpartition("/")[2])
"""


@dataclass
class Store:
    """A bucket, and its content as files."""

    folder: Path
    environment: dict[str, str]

    def python(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", code, *arguments)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
        )

    def result(self, code: str) -> Any:
        done = self.python(f"import json, grutrace\n{code}\nprint(json.dumps(result))")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("bucket")
    torch.manual_seed(0)
    layer = nn.GRU(8, 64)
    with grutrace.trace(layer, folder / "run.h5"):
        for _ in range(4):
            layer(torch.randn(50, 16, 8))
    for rank in range(2):
        with grutrace.trace(layer, folder / "part.h5", shard=(rank, 2)):
            layer(torch.randn(3, 2, 8))
    merge_shards(sorted(folder.glob("part.rank*.h5")), folder / "merged.h5")
    environment = {**os.environ, **CREDENTIALS, "AWS_DEFAULT_REGION": "us-east-1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as server:
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        served = Store(folder, {**environment, "AWS_ENDPOINT_URL": endpoint})
        files = [str(folder / name) for name in ("run.h5", "merged.h5")]
        uploaded = served.python(UPLOAD, endpoint, *files)
        assert uploaded.returncode == 0, uploaded.stderr
        yield served
        assert server.stdin is not None
        server.stdin.close()


def test_rows_are_those_of_the_file(store: Store) -> None:
    result = store.result("""
with grutrace.open("s3://runs/run.h5") as trace:
    site = trace["l0"]
    result = [site.sequence(17).update.tolist(), len(site), trace.closed, len(trace.calls)]
""")
    with grutrace.open(store.folder / "run.h5") as trace:
        expected = trace["l0"].sequence(17).update
        # The control: another sequence has other values.
        assert not np.array_equal(expected, trace["l0"].sequence(16).update)
    assert np.array_equal(np.array(result[0], np.float32), expected)
    assert result[1:] == [64, True, 4]


def test_credentials_reach_the_store(store: Store) -> None:
    endpoint = store.environment["AWS_ENDPOINT_URL"]
    bare = {name: value for name, value in store.environment.items() if not name.startswith("AWS_")}
    code = f"""
options = {{"key": "me", "secret": "secret", "endpoint_url": "{endpoint}"}}
result = len(grutrace.open("s3://runs/run.h5", storage_options=options)["l0"])
"""
    assert Store(store.folder, bare).result(code) == 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/merged.h5", "only a file that holds all its rows can be read"),
        ("runs/none.h5", "s3://runs/none.h5 does not exist"),
        ("nothing/run.h5", "s3://nothing/run.h5 cannot be opened: "),
    ],
    ids=["merged", "no file", "no bucket"],
)
def test_what_cannot_be_read_is_one_line(name: str, message: str, store: Store) -> None:
    done = store.run("-m", "grutrace", "info", f"s3://{name}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_commands_read_it(store: Store) -> None:
    done = store.run("-m", "grutrace", "verify", "s3://runs/run.h5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "holds" in done.stdout
