"""Tests of the report: what was planted is said, noise is not, hostile texts are shown as text."""

from __future__ import annotations

import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

import grutrace
from grutrace.__main__ import main
from grutrace.errors import OptionError
from grutrace.view.report import report as report_module
from grutrace.view.report import sample as sample_module
from grutrace.view.report.sample import sample_site
from grutrace.view.report.units import find_label_units, find_stuck
from tests.view.report.pages import page_of, planted, record


def test_planted_units_are_found_and_no_others(tmp_path) -> None:
    page = page_of(planted(), tmp_path)
    state, text = page.finding("Which units are stuck")
    assert state == "found"
    assert "1 of 12 units have an update gate that is stuck above 0.9 (keeps): unit 3," in text
    # The gates of unit 7 are held, too, so that it follows the label.
    assert re.findall(r"(units? [0-9, ]+), in at least", text) == ["unit 7", "unit 3", "unit 7"]
    state, text = page.finding("Which units follow a label")
    assert state == "found"
    assert "1 of 12 units follow &#x27;side&#x27;. Unit 7 tells most" in text
    assert "with a probability of 1.00" in text


def test_under_noise_nothing_is_claimed_more_often_than_the_level() -> None:
    """At 5 %, more than 4 of 20 traces have a false finding of one kind once in 400 times."""
    labels, stuck = 0, 0
    for seed in range(20):
        samples = [sample_site(planted(seed, follows=False, stuck=False), "l0")]
        labels += find_label_units("run.h5", samples).state == "found"
        stuck += find_stuck("run.h5", samples).state == "found"
    assert labels <= 4
    assert stuck == 0


def test_a_small_trace_says_that_it_holds_too_little(tmp_path) -> None:
    layer = torch.nn.GRU(2, 3)
    page = page_of(record(layer, [(torch.randn(5, 4, 2), {})]), tmp_path)
    assert page.finding("Which units are stuck")[0] == "unknown"
    assert "Too few sequences to tell at l0" in page.finding("Which units are stuck")[1]
    assert "No labels or tokens" in page.finding("Which units follow")[1]
    assert "fewer than 50 steps" in page.finding("How long")[1]
    assert "too short to tell" in page.finding("Is the network")[1]
    assert "No gradients were recorded" in page.finding("Does the gradient")[1]
    assert "did not change" in page.finding("Did gates move")[1]
    state, text = page.finding("Are the gates proven")
    assert (state, text[:22]) == ("clear", "All 1 calls are proven")


@pytest.mark.parametrize("record_quantities", ["hidden", "reset", "input"])
def test_what_was_not_recorded_is_no_error(tmp_path, record_quantities) -> None:
    layer = torch.nn.GRU(2, 3)
    page_of(record(layer, [(torch.randn(5, 4, 2), {})], record=record_quantities), tmp_path)


@pytest.mark.parametrize(("bias", "said"), [(8.0, r"unit 1 for \d"), (40.0, "unit 1 never forgot")])
def test_a_unit_that_never_forgets_is_said_in_words(tmp_path, bias: float, said: str) -> None:
    layer = torch.nn.GRU(2, 3)
    with torch.no_grad(), grutrace.trace(layer) as trace:
        layer.bias_ih_l0[3 + 1] = bias
        layer(torch.randn(60, 4, 2))
    text = page_of(trace, tmp_path).finding("How long do units remember")[1]
    assert re.search(said, text)
    assert " inf" not in text


def test_a_chaotic_network_is_said_to_be_and_a_quiet_one_not(tmp_path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.GRU(4, 32).requires_grad_(False)
    page = page_of(record(layer, [(torch.randn(300, 2, 4), {})]), tmp_path)
    state, text = page.finding("Is the network")
    assert state == "clear"
    assert "l0 is not chaotic" in text
    layer.weight_hh_l0 *= 12
    page = page_of(record(layer, [(torch.randn(300, 2, 4), {})]), tmp_path)
    state, text = page.finding("Is the network")
    assert state == "found"
    assert "l0 is chaotic" in text


def train(path, batches: int, rate: float):
    torch.manual_seed(0)
    layer, readout = torch.nn.GRU(3, 6, batch_first=True), torch.nn.Linear(6, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], rate)
    with grutrace.trace(layer, path, record=("update", "hidden", "gradient")):
        for _ in range(batches):
            x = torch.randn(8, 12, 3)
            loss = (readout(layer(x)[0][:, -1]) - x[:, -1, :1]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_training_is_told(tmp_path) -> None:
    train(tmp_path / "run.h5", 60, 0.02)
    page = page_of(tmp_path / "run.h5", tmp_path)
    state, text = page.finding("Did gates move")
    assert state == "found"
    assert re.search(r"the mean update gate z moved for \d of 6 units", text)
    state, text = page.finding("Does the gradient vanish")
    assert state == "found"
    assert "falls by a factor of 0." in text


def test_control_training_that_changes_nothing_is_not_claimed(tmp_path) -> None:
    train(tmp_path / "run.h5", 20, 1e-9)
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace["l0"].extent.versions > 1
        state, text = page_of(trace, tmp_path).finding("Did gates move")
    assert (state, text) == ("clear", "No unit is shown to have moved.")


def test_unproven_calls_are_said_first(tmp_path) -> None:
    planted(sequences=4).save(tmp_path / "run.h5")
    page = page_of(tmp_path / "run.h5", tmp_path)
    assert page.finding("Are the gates proven")[0] == "clear"  # Control: it is proven.
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        paths: list[str] = []
        file.visit(lambda name: paths.append(name) if name.endswith("checks") else None)
        (path,) = paths
        checks = file[path][:]
        checks["residual"] = 0.5
        file[path][:] = checks
    page = page_of(tmp_path / "run.h5", tmp_path)
    state, text = page.finding("Are the gates proven")
    assert state == "found"
    assert "1 of 1 calls are unproven" in text
    assert "The residual exceeds the tolerance at l0 (0.5)" in text
    assert page.source.index("Are the gates proven") < page.source.index("Is the network")


def test_the_page_needs_nothing_else(tmp_path) -> None:
    page = page_of(planted(), tmp_path)
    assert not page.named("script")
    assert not page.named("link")
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert "url(http" not in page.source
    assert "@import" not in page.source
    assert "prefers-color-scheme: dark" in page.source
    assert "@media print" in page.source


def test_pictures_have_alternative_texts_and_the_colour_of_the_page(tmp_path) -> None:
    page = page_of(planted(), tmp_path)
    pictures = page.named("svg")
    assert len(pictures) > 6
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(picture["aria-label"]) > 10
    assert "currentColor" in page.source
    assert "#010203" not in page.source
    assert {"href": "#findings", "class": "skip"} in page.named("a")
    for picture in re.findall(r"<svg.*?</svg>", page.source, re.DOTALL):
        own = set(re.findall(r' id="([^"]+)"', picture))
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', picture))
        assert used <= own
        assert not any(re.fullmatch(r"[A-Za-z0-9]+_\d+", name) for name in own)
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {link["href"][1:] for link in page.named("a")} <= targets


def test_commands_repeat_the_findings(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    planted().save("run.h5")
    assert main(["report", "run.h5", "-o", "report.html"]) == 0
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"<code>(.*?)</code>", source, re.DOTALL)
                for line in block.splitlines()]  # fmt: skip
    assert len(commands) > 8
    for command in commands:
        words = command.split()
        assert words[0] == "grutrace"
        assert main(words[1:]) == 0, command
    capsys.readouterr()
    (command,) = [line for line in commands if "stuck_units" in line]
    assert main([*command.split()[1:], "--json"]) == 0
    assert '"stuck"' in capsys.readouterr().out


def test_a_hostile_trace_is_shown_as_text(tmp_path) -> None:
    evil = "</svg><script>alert(1)</script><img src=x onerror=alert(1)>\x00\u202e"
    name = "<b onclick=x>&\"' $\\frac{"
    model = torch.nn.ModuleDict({name: torch.nn.GRU(2, 3, batch_first=True)})
    with grutrace.trace(model, check="off") as trace, torch.no_grad():
        values = [[evil, "$x_", "]]>", "--><!--", evil * 50]] * 6
        with trace.recording(tokens=values, labels={evil: values}, tag=evil):
            model[name](torch.full((6, 5, 2), torch.nan))
    page = page_of(trace, tmp_path)
    assert not page.named("script")
    assert not page.named("b")
    assert all(picture["src"].startswith("data:") for picture in page.named("img"))
    assert not any("onerror" in attributes or "onclick" in attributes
                   for _, attributes in page.elements)  # fmt: skip
    assert "\x00" not in page.source
    assert "\u202e" not in page.source
    assert "&lt;b onclick=x&gt;" in page.source  # Control: the name is there, as text.


def test_many_sites_stay_bounded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report_module, "MAX_SECTIONS", 2)
    monkeypatch.setattr(report_module, "MAX_LINES", 5)
    model = torch.nn.ModuleList(torch.nn.GRU(2, 3) for _ in range(20))
    with grutrace.trace(model) as trace, torch.no_grad():
        for layer in model:
            layer(torch.randn(6, 3, 2))
    page = page_of(trace, tmp_path)
    assert len(page.named("section")) == 2
    assert page.source.count(": 18 steps</li>") == 5
    assert "13 more sites" in page.source
    assert "the 2 sites with the most steps" in page.source


def test_an_empty_trace_has_a_report(tmp_path) -> None:
    with grutrace.Tracer(torch.nn.GRU(2, 3), tmp_path / "run.h5", recording=False):
        pass
    trace = tmp_path / "run.h5"
    assert "The trace has no calls" in page_of(trace, tmp_path).finding("Are the gates")[1]


def test_large_sites_are_sampled_and_the_page_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sample_module, "MAX_VALUES", 12 * 8 * 20)
    trace = planted()
    sample = sample_site(trace, "l0")
    assert sample.options == ("--sequences", "::5")
    assert [sequence.original for sequence in sample.site] == list(range(0, 80, 5))
    np.testing.assert_array_equal(sample.site.sequence(3).hidden, trace["l0"].sequence(15).hidden)
    page = page_of(trace, tmp_path)
    assert "one in 5 of 80 sequences (640 steps): 16 sequences, 128 steps" in page.source
    assert "--sequences ::5" in page.source


@pytest.mark.parametrize("site", ["l0", "l0_reverse"])
def test_of_one_long_sequence_the_beginning_is_read(site, monkeypatch) -> None:
    monkeypatch.setattr(sample_module, "MAX_VALUES", 5 * 30)
    layer = torch.nn.GRU(2, 5, bidirectional=True)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(100, 1, 2))
    sample = sample_site(trace, site)
    assert sample.text == "the first 30 steps of the first of 1 sequences (100 steps)"
    hidden = trace[site].sequence(0).hidden
    expected = hidden[-30:] if site == "l0_reverse" else hidden[:30]
    np.testing.assert_array_equal(sample.data.hidden, expected)


def test_shards_and_paths_are_accepted(tmp_path) -> None:
    planted().save(tmp_path / "run.h5")
    grutrace.report(str(tmp_path / "run.h*"), tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_wrong_paths_are_errors(tmp_path, capsys) -> None:
    planted().save(tmp_path / "run.h5")
    with pytest.raises(OptionError, match=r"\.html"):
        grutrace.report(tmp_path / "run.h5", tmp_path / "run.h5")
    assert main(["report", str(tmp_path / "none.h5"), "-o", str(tmp_path / "a.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]


def test_without_matplotlib_the_message_names_the_extra(tmp_path) -> None:
    planted().save(tmp_path / "run.h5")
    code = (
        "import sys; sys.modules['matplotlib'] = None; import grutrace; "
        "grutrace.report('run.h5', 'a.html')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "MissingExtraError: grutrace.report needs matplotlib" in done.stderr
