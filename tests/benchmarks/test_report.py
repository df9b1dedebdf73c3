"""Tests of the report: missed targets, faster peers, missing peers."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path

import pytest

from benchmarks import choice, targets
from benchmarks.choice import verdict
from benchmarks.figures import Figure, Target, measured, not_measured
from benchmarks.limit import limit, limit_on_disk
from benchmarks.pairs import Ratio, Spread
from benchmarks.report import Report, number, table
from benchmarks.tracings import IN_MEMORY, TRACINGS
from benchmarks.workloads import all_workloads, single_layer

WORKLOAD = "T5 B3 I6 H6"


def ratio(median: float) -> Ratio:
    return Ratio(median, median - 0.1, median + 0.1, 11, base=1e-3)


def lines(report: Report, start: str) -> list[str]:
    return [line for line in report.markdown().splitlines() if line.startswith(start)]


def test_a_target_stands_beside_its_figure_and_a_missed_one_is_marked() -> None:
    row = [
        measured("met", ratio(1.0), Target(1.1)),
        measured("missed", ratio(1.3), Target(1.1)),
        measured("without", ratio(2.0)),
    ]
    (line,) = lines(Report({}, tracing={WORKLOAD: row}), f"| {WORKLOAD}")
    met, missed, without = line.strip("| ").split(" | ")[1:]
    assert met == "1.00 ≤ 1.10 (0.900 to 1.10)"
    assert missed == "**1.30 > 1.10** (1.20 to 1.40)"
    assert without == "2.00 (1.90 to 2.10)"


def test_workloads_with_other_columns_keep_them_apart() -> None:
    rows = {"one": [measured("a", ratio(1.0))], "two": [measured("b", ratio(2.0))]}
    report = Report({}, disk=rows)
    assert lines(report, "| one") == ["| one | 1.00 (0.900 to 1.10) |  |"]
    assert lines(report, "| two") == ["| two |  | 2.00 (1.90 to 2.10) |"]


def test_a_peer_ahead_of_us_is_marked_and_an_absent_one_is_named() -> None:
    peers = [
        measured("Python loop instead", ratio(1.2)),
        measured("loop under torch.jit.script", ratio(1.5)),
        measured("nnsight on the layer", ratio(1.1)),
        not_measured("Opacus' DPGRU instead", "absent: opacus is not installed"),
    ]
    report = Report({}, {WORKLOAD: [measured(IN_MEMORY, ratio(1.4))]}, peers={WORKLOAD: peers})
    assert "**1.20**" in lines(report, "| Python loop instead")[0]
    assert "**" not in lines(report, "| loop under torch.jit.script")[0]
    # It gives no gates, and is cheaper for that.
    assert "**" not in lines(report, "| nnsight")[0]
    assert lines(report, "| Opacus") == [
        "| Opacus' DPGRU instead | output | absent: opacus is not installed |"
    ]
    assert lines(report, f"| grutrace: {IN_MEMORY}")


def test_other_figures_have_their_unit_and_bound() -> None:
    figures = [
        Figure("speed", 0.7, target=Target(0.8, at_least=True), spread=Spread(0.7, 0.6, 0.9, 5)),
        Figure("peak", 120.0, "MiB", Target(320)),
        not_measured("missing", "left out: no room"),
    ]
    report = Report({}, others={"storage": figures})
    assert lines(report, "| speed") == ["| speed | **0.700** | 0.600 to 0.900 of 5 | ≥ 0.800 |"]
    assert lines(report, "| peak") == ["| peak | 120 MiB |  | ≤ 320 MiB |"]
    assert lines(report, "| missing") == ["| missing | left out: no room |  |  |"]


def test_json_holds_what_the_tables_hold() -> None:
    row = [measured("missed", ratio(1.3), Target(1.1), runs=7), not_measured("x", "why")]
    report = Report({"threads": "2"}, {WORKLOAD: row}, others={"start": [Figure("y", 1.0, "s")]})
    result = json.loads(json.dumps(report.as_json()))
    first = result["tracing"][WORKLOAD]["missed"]
    assert (first["value"], first["met"], first["details"]) == (1.3, False, {"runs": 7})
    assert (first["spread"]["count"], first["spread"]["base"]) == (11, 1e-3)
    assert result["tracing"][WORKLOAD]["x"]["absent"] == "why"
    assert result["about"] == {"threads": "2"}
    assert result["start"][0]["unit"] == "s"


def test_nan_misses_every_target() -> None:
    assert not Target(1.0).met(nan)
    assert not Target(1.0, at_least=True).met(nan)


def test_a_vertical_bar_in_a_cell_is_escaped() -> None:
    assert table([["a"], ["|n|"]]).splitlines()[-1] == "| \\|n\\| |"


@pytest.mark.parametrize(
    ("value", "text"), [(0.06538, "0.0654"), (1.5, "1.50"), (117.3, "117"), (4096.0, "4096")]
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_targets_follow_the_workload() -> None:
    tracing, disk = "deferred, to a file", targets.DISK
    assert targets.target(disk, tracing, "T1 B32 I512 H512") == Target(1.2)
    assert targets.target(disk, tracing, "T100 B32 I1024 H1024") == Target(1.05)
    assert targets.target(disk, tracing, "T1000 B1 I64 H64") == Target(1.05)
    assert targets.target(disk, tracing, "training step T128 B32 I256 H256") == Target(1.08)
    assert targets.target(disk, tracing, "training encoder-decoder B32 T20/20 H128") == Target(1.1)
    assert targets.target(disk, tracing, "encoder-decoder B16 T50/20 H128") == Target(1.25)
    assert targets.target(disk, "update only, in memory", "T1 B32 I512 H512") is None
    assert targets.target(disk, tracing, "another") is None


def test_every_workload_has_targets() -> None:
    for make in all_workloads():
        for tracing in ("everything inline, in memory", "deferred, to a file"):
            assert targets.target(targets.TRACING, tracing, make().name) is not None


def test_the_limit_counts_the_kept_bytes() -> None:
    by_name = {tracing.name: tracing for tracing in TRACINGS}
    workload = single_layer(30, 20, 64, 64)
    inline = limit(workload, by_name["everything inline, in memory"], 1e-6)
    update = limit(workload, by_name["update only, in memory"], 1e-6)
    assert 1 < update < inline
    assert limit(workload, by_name["everything inline, in memory"], 1e9) == pytest.approx(1)
    assert limit(workload, by_name["statistics only"], 1e-6) == 1
    assert limit(workload, by_name["attached, not recording"], 1e-6) == 1


def test_the_limit_on_disk_counts_what_is_written(tmp_path: Path) -> None:
    by_name = {tracing.name: tracing for tracing in TRACINGS}
    workload = single_layer(30, 20, 64, 64)
    inline = limit_on_disk(workload, by_name["everything inline, to a file"], 1e-6, tmp_path)
    assert inline > 1
    assert limit_on_disk(
        workload, by_name["everything inline, to a file"], 1e9, tmp_path
    ) == pytest.approx(1)
    assert limit_on_disk(workload, by_name["statistics only"], 1e-6, tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, []), (3, ["harvested", "replayed", "the rule takes"])]
)
def test_calls_of_one_step_have_no_choice(steps, expected) -> None:
    workload = single_layer(steps, 2, 3, 4)
    figures = choice.figures(workload, budget=0, limit=0)
    assert [figure.name for figure in figures] == expected


def test_the_more_expensive_choice_is_bold() -> None:
    assert verdict("harvested", 1.2, 1.5) == "harvested"
    assert verdict("replayed", 1.55, 1.5) == "replayed (about the same)"
    assert verdict("replayed", 1.8, 1.5) == "**replayed**"
