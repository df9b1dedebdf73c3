"""A short soak, and controls that show that it detects faults."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import grutrace
from tests.capture.models import EncoderDecoder
from tests.checks import EVERYTHING
from tools.soak import disk
from tools.soak.faults import FAULTS, faulty
from tools.soak.live import CODED, MODELS
from tools.soak.plain_check import torn_rows
from tools.soak.report import wrong
from tools.soak.victims import KINDS

ROOT = Path(__file__).parents[2]

#: A short soak; `tools/nightly.sh` makes twenty times as many tries.
KILLS = 100


def soak(folder: Path, *arguments: str) -> dict:
    command = [sys.executable, "-m", "tools.soak", *arguments]
    options = ["--folder", str(folder), "--json", str(folder / "outcomes.json")]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.slow
@pytest.mark.measures
@pytest.mark.skipif(disk.COMPILER is None, reason="a C compiler makes the disk that fails")
def test_no_acknowledged_call_is_lost(tmp_path) -> None:
    """Kills, full and failing disks, power losses, concurrent readers."""
    kills = soak(tmp_path, "kills", "--tries", str(KILLS))["kills"]
    assert Counter(kill["kind"] for kill in kills) == dict.fromkeys(KINDS, KILLS // len(KINDS))
    assert sum(kill["acknowledged"] > 0 for kill in kills) > KILLS // 2
    assert all(kill["killed"] and kill["calls"] >= kill["acknowledged"] for kill in kills)
    assert not any(kill["wrong"] for kill in kills)

    faults = soak(tmp_path, "faults", "--tries", "40")["faults"]
    assert {fault["fault"] for fault in faults if fault["failed"]} == set(FAULTS)
    assert sum(fault["failed"] > 0 for fault in faults) > 20
    assert not [text for fault in faults for text in faulty(fault)]

    power = soak(tmp_path, "power", "--tries", "20")["power"]
    promised = [outcome for outcome in power if outcome["fsync"]]
    assert sum(outcome["acknowledged"] > 0 for outcome in promised) > 3
    assert all(outcome["calls"] >= outcome["acknowledged"] for outcome in promised)
    assert not any(outcome["wrong"] for outcome in power)
    # The control: without fsync there is no promise, and the model of a loss shows it.
    others = [outcome for outcome in power if not outcome["fsync"]]
    assert any(other["calls"] < other["acknowledged"] for other in others)

    live = soak(tmp_path, "live", "--seconds", "5")["live"]
    assert len(live) == 2 * len(CODED) + len(MODELS)
    assert all(outcome["changes"] > 2 and outcome["checked"] > 0 for outcome in live)


def test_control_faults_are_reported() -> None:
    sound = {"acknowledged": 5, "calls": 5, "wrong": 0, "killed": True, "same": True}
    assert wrong("kills", sound) == []
    for change in ({"calls": 4}, {"wrong": 1}, {"killed": False}, {"same": False}, {"error": "x"}):
        assert len(wrong("kills", sound | change)) == 1
    assert wrong("power", sound | {"fsync": False, "calls": 4}) == []
    assert wrong("live", {"changes": 0, "writer": -9})
    fault = sound | {
        "fault": "full", "on_error": "raise", "failed": 1, "failed_itself": 1, "intact": True,
        "hooks": 0, "beside": [], "made": 9, "warnings": [],
        "errors": ["SinkError: /run.h5 cannot be written: full"],
    }  # fmt: skip
    assert faulty(fault) == []
    # Where only the copy of a closed file failed, the trace is whole.
    copy = fault | {"failed_itself": 0, "errors": []}
    assert faulty(copy | {"calls": 9}) == []
    assert len(faulty(copy)) == 1
    for change in (
        {"intact": False},
        {"hooks": 1},
        {"beside": ["run.h5.new-1"]},
        {"errors": []},
        {"errors": ["SinkError: /run.h5\nat 0x7f"]},
        {"on_error": "warn", "errors": [], "warnings": ["/run.h5 cannot be written"]},
    ):
        assert len(faulty(fault | change)) == 1, change


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "run.h5"
    model = EncoderDecoder(layers=2)
    with grutrace.trace(model, path, record=EVERYTHING):
        for _ in range(3):
            model(torch.randn(8, 12, 5), steps=2)
    return path


def test_control_an_incomplete_row_is_detected(path) -> None:
    calls, wrong_values = torn_rows(path)
    assert (calls, wrong_values) == (9, 0)
    for quantity in ("update", "hidden", "input", "candidate"):
        torn = path.with_name(f"{quantity}.h5")
        shutil.copy(path, torn)
        with h5py.File(torn, "r+") as file:
            row = file[f"modules/decoder/cell/{quantity}"]
            row[12, 2:] = np.zeros(row.shape[1] - 2)
        assert torn_rows(torn)[1] > 0


def test_control_counts_beyond_the_rows_are_detected(path) -> None:
    with h5py.File(path, "r+") as file:
        dataset = file["modules/encoder/l0/update"]
        dataset.resize(len(dataset) - 1, 0)
    with pytest.raises(AssertionError, match="less than is committed"):
        torn_rows(path)
