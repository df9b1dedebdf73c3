"""The check of a device, with a CPU in the device's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import device_check, device_model
from tools.device_check import Step


def test_a_small_model_keeps_its_bits_and_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    assert device_model.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{gates}: same bits True, verified True, 5 sites"
        for gates in ("deferred", "background", "inline")
    ]


def test_control_a_trace_of_which_nothing_is_verified_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_model, "verify", lambda _: [])
    assert device_model.main(["--device", "cpu"]) == 1


@pytest.mark.parametrize(
    ("code", "result", "last_line"),
    [
        ("print('first'); print('last')", "passed", "last"),
        ("print('found it'); raise SystemExit(3)", "failed", "found it"),
        ("import time; print('began', flush=True); time.sleep(60)", "out of time", "began"),
    ],
)
def test_each_step_ends_in_time_and_leaves_its_output(
    tmp_path: Path, code: str, result: str, last_line: str
) -> None:
    step, reports = Step("tests"), []
    device_check.run(step, ["-c", code], tmp_path, "cpu", 2.0, lambda: reports.append(step.result))
    assert (step.result, step.last_line) == (result, last_line)
    assert step.seconds < 30
    assert set(reports) == {"running"}
    device_check.write(tmp_path, {"device": "cpu"}, [step, Step("model")])
    written = json.loads((tmp_path / "device.json").read_text(encoding="utf-8"))
    assert [found["result"] for found in written["steps"]] == [result, "not run"]
    assert f"| tests | {result} |" in (tmp_path / "device.md").read_text(encoding="utf-8")


def test_all_steps_run_in_order_and_a_failure_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {"tests": 1, "model": 0, "benchmark": 0}
    monkeypatch.setattr(
        device_check,
        "commands",
        lambda *_: {name: ["-c", f"raise SystemExit({code})"] for name, code in codes.items()},
    )
    (tmp_path / "benchmark.json").write_text("{}", encoding="utf-8")
    arguments = [str(tmp_path), "--device", "cpu"]
    assert device_check.main(arguments) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in printed[:3]] == [
        "tests: failed",
        "model: passed",
        "benchmark: passed",
    ]
    # Rows of an earlier check are not shown.
    assert "benchmark" not in json.loads((tmp_path / "device.json").read_text(encoding="utf-8"))
    codes["tests"] = 0
    assert device_check.main(arguments) == 0
