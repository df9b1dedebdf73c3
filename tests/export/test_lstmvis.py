"""Tests of the LSTMVis export, with a loader that follows LSTMVis's server.

From HendrikStrobelt/LSTMVis, lstm_server.py and lstmdata/data_handler.py (version 2.1): it walks
its data folder for `lstm.yml`; opens files that end with .h5 or .hdf5; reads dictionaries line by
line, of which each has a word and a number, or begins with a space that is the word; takes the
sizes of all states and of the words; gives ranges to what is known of each step; looks words and
texts up by number; and answers in JSON, which has no nan.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml

import grutrace
from grutrace.export.formats import export_trace
from grutrace.export.lstmvis import VISIBLE_SPACE
from tests.export.expected import QUANTITIES, Expected, as_texts


class Project:
    """One folder with a configuration, as the server has it in memory."""

    def __init__(self, folder: Path) -> None:
        self.config = yaml.load((folder / "lstm.yml").read_text("utf-8"), Loader=yaml.FullLoader)
        self.files: dict[str, dict[str, np.ndarray]] = {}
        self.words: dict[str, dict[int, str]] = {}
        for name, file in self.config["files"].items():
            if file.endswith((".h5", ".hdf5")):
                with h5py.File(folder / file, "r") as opened:
                    self.files[name] = {path: opened[path][()] for path in opened}
            elif file.endswith((".dict", ".txt")):
                self.words[name] = read_dictionary(folder / file)
        default = self.config["states"]["file"]
        self.states = {
            (states["type"], states["layer"]): self.files[states.get("file", default)][
                states["path"]
            ]
            for states in self.config["states"]["types"]
        }
        sequence = self.config["word_sequence"]
        numbers = self.files[sequence["file"]][sequence["path"]]
        self.sequence = [self.words[sequence["dict_file"]][number] for number in numbers.tolist()]
        assert isinstance(self.config["description"], str)
        for states in self.states.values():
            assert len(states) == len(self.sequence)

    def meta(self, name: str) -> list[Any]:
        """What is known of each step."""
        about = self.config["meta"][name]
        kind, limits = about["vis"]["type"], about["vis"]["range"]
        values = self.files[about["file"]][about["path"]].tolist()
        if "dict" in about:
            assert (kind, limits) == ("discrete", "dict")
            return [self.words[about["dict"]][value] for value in values]
        assert kind == "scalar"
        assert [type(limit) for limit in limits] == [float, float]
        assert limits[0] <= min(values) <= max(values) <= limits[1]
        assert limits[0] < limits[1]
        json.dumps(values, allow_nan=False)
        return values


def read_dictionary(path: Path) -> dict[int, str]:
    results = {}
    with path.open(encoding="utf-8") as file:
        lines = list(file)
    for line in lines:
        if len(line.split()) == 2:
            word, number = line.split()
        else:
            # The server leaves out any other line without a word.
            assert line[0] == " "
            word, number = " ", line.strip()
        results[int(number)] = word
    return results


def projects(folder: Path) -> dict[str, Project]:
    return {
        os.path.split(root)[1]: Project(Path(root))
        for root, _, files in os.walk(folder)
        if "lstm.yml" in files
    }


def check_project(project: Project, module: Any, expected: Expected) -> None:
    """All states, words and labels of a module against a plain reading of the trace."""
    compared = 0
    for site in module.sites.values():
        values = expected.groups[site.name.replace("/", "%2F")]
        for quantity in QUANTITIES[:4]:
            if quantity in values:
                kind = quantity + " reverse" * site.reverse
                result = project.states[kind, site.layer + 1]
                np.testing.assert_allclose(result, values[quantity], rtol=0, atol=1e-6)
                compared += 1
    assert compared == len(project.states)
    words = as_texts(values.get("token", values["time"]))
    assert project.sequence == [word or "<none>" for word in words]
    assert project.meta("sequence") == values["sequence"].tolist()
    assert project.meta("time") == values["time"].tolist()
    if "tag" in values:
        tags = [tag.replace(" ", VISIBLE_SPACE) or "<none>" for tag in values["tag"]]
        assert project.meta("tag") == tags


@pytest.fixture
def folder(full, tmp_path) -> Any:
    with grutrace.open(full) as trace:
        export_trace(trace, tmp_path / "out", "lstmvis")
    return tmp_path / "out"


def test_the_lstmvis_loader_reads_everything(folder, full) -> None:
    expected, result = Expected(full), projects(folder)
    assert sorted(result) == ["decoder_step", "deferred", "encoder.rnn", "model"]
    for module in expected.trace.modules:
        # Of one module, nothing but the input was recorded, and nothing called it.
        if module.path != "idle":
            name = module.path.replace("/", "_") or "model"
            check_project(result[name], module, expected)
    assert result["encoder.rnn"].meta("sequence").count(2) == 4


def test_control_a_wrong_value_is_noticed(folder, full) -> None:
    expected = Expected(full)
    module, path = expected.trace.modules[0], folder / "encoder.rnn"
    check_project(projects(folder)["encoder.rnn"], module, expected)
    with h5py.File(path / "states.h5", "r+") as file:
        file["candidate_l1_reverse"][4, 1] += 0.01
    with pytest.raises(AssertionError):
        check_project(projects(folder)["encoder.rnn"], module, expected)
    with h5py.File(path / "states.h5", "r+") as file:
        file["candidate_l1_reverse"][4, 1] -= 0.01
    dictionary = (path / "words.dict").read_text("utf-8")
    (path / "words.dict").write_text(dictionary.replace("the", "thx"), "utf-8")
    with pytest.raises(AssertionError):
        check_project(projects(folder)["encoder.rnn"], module, expected)


def traced(layer: Any, input: Any, **annotations: Any) -> Any:
    tracer = grutrace.Tracer(layer, recording=False)
    with tracer, tracer.recording(**annotations):
        layer(input)
    return tracer


def test_odd_words_and_labels(tmp_path) -> None:
    words = ["New York", " ", "", "\n", "a\xa0b", "\u2028", "7", "ключ", "#x: y", "a\tb"]
    labels = {"pos": list(range(10)), "a, b": [0.5, *[np.nan] * 9], "A_ B": list("0123456789")}
    tracer = traced(nn_gru(), torch.randn(10, 1, 2), tokens=[words], labels=given(labels))
    notes = export_trace(tracer, tmp_path / "out", "lstmvis").notes
    assert notes == ()
    (project,) = projects(tmp_path / "out").values()
    assert project.sequence == [
        f"New{VISIBLE_SPACE}York",
        " ",
        "<none>",
        r"\n",
        r"a\xa0b",
        r"\u2028",
        "7",
        "ключ",
        f"#x:{VISIBLE_SPACE}y",
        r"a\tb",
    ]
    assert all(not re.search(r"\s", word) for word in project.sequence if word != " ")
    # Names are in the addresses that the client asks for, with commas between.
    assert all(re.fullmatch(r"[\w.-]+", name) for name in project.config["meta"])
    by_length = sorted(project.config["meta"], key=len)
    assert project.meta("pos") == list(range(10))
    results = [project.meta(name) for name in by_length]
    assert ["0.5", *["<none>"] * 9] in results
    assert list("0123456789") in results


def given(labels: dict[str, Any]) -> dict[str, Any]:
    return {name: [values] for name, values in labels.items()}


def nn_gru() -> Any:
    torch.manual_seed(0)
    return torch.nn.GRU(2, 3)


def test_small_numbers_are_numbers_in_yaml(tmp_path) -> None:
    """YAML reads 1e-05 without a decimal point as a text."""
    labels = {"rate": [1e-05, 1e16]}
    tracer = traced(nn_gru(), torch.randn(2, 1, 2), labels=given(labels))
    export_trace(tracer, tmp_path / "out", "lstmvis")
    (project,) = projects(tmp_path / "out").values()
    assert project.meta("rate") == [1e-05, 1e16]
    assert yaml.safe_load("1e-05") == "1e-05"


def test_what_lstmvis_cannot_show_is_listed(tmp_path) -> None:
    layer, input = nn_gru(), torch.randn(4, 1, 2)
    input[2] = np.nan
    with grutrace.trace(layer, check="off") as tracer:
        layer(input)
    notes = export_trace(tracer, tmp_path / "out", "lstmvis").notes
    assert [note.partition(",")[0] for note in notes] == [
        "model: some values are NaN or infinite",
        "model: there are no tokens",
    ]
    (project,) = projects(tmp_path / "out").values()
    assert project.sequence == ["0", "1", "2", "3"]


def test_gates_are_unsigned_and_searched_by_letter(folder, tmp_path) -> None:
    result = projects(folder)["encoder.rnn"]
    unsigned = {states["path"]: states["unsigned"] for states in result.config["states"]["types"]}
    assert unsigned["reset_l0"] is True
    assert unsigned["hidden_l1_reverse"] is False
    assert {states["transform"] for states in result.config["states"]["types"]} == {"none"}
    # Its search puts the first letters of all words together.
    assert result.config["etc"]["regex_search"] is False
    tracer = traced(nn_gru(), torch.randn(3, 1, 2), tokens=[list("a b")])
    export_trace(tracer, tmp_path / "letters", "lstmvis")
    (letters,) = projects(tmp_path / "letters").values()
    assert letters.config["etc"]["regex_search"] is True
    assert re.search("a b", "".join(word[0] for word in letters.sequence))


def test_a_trace_without_steps_is_refused(tmp_path) -> None:
    with grutrace.Tracer(nn_gru(), recording=False) as tracer:
        pass
    with pytest.raises(grutrace.NotRecordedError, match="nothing to export"):
        export_trace(tracer, tmp_path / "out", "lstmvis")
    assert not list(tmp_path.iterdir())
