"""An error is one line that shows the value found, and never the elements of a tensor."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.errors import (
    MAX_VALUE_CHARS,
    MissingExtraError,
    extra_requirements,
    join_names,
    missing_library_message,
    reject_unknown_options,
    require_extra,
    short_repr,
    suggest_name,
)
from grutrace.export.formats import export_trace

BIG = torch.randn(64, 32)


def model() -> nn.Module:
    return nn.ModuleDict({"encoder": nn.GRU(2, 3), "decoder": nn.GRUCell(3, 3)})


def trace(*arguments: Any, **options: Any) -> Any:
    return grutrace.Tracer(model(), *arguments, **options)


#: What somebody may write, and what the error says.
WRONG = {
    "sites: a number": (lambda: trace(sites=3), r"sites: expected a glob .*; found 3$"),
    "sites: numbers": (lambda: trace(sites=[3]), r"sites: expected a glob .*; found \[3\]$"),
    "sites: bytes": (lambda: trace(sites=b"enc*"), r"sites: .*; found b'enc\*'$"),
    "sites: a tensor": (lambda: trace(sites=BIG), r"found a tensor of shape \(64, 32\) and type"),
    "sites: a typo": (
        lambda: trace(sites="encodr.l0"),
        r"'encodr.l0' matches no site .*did you mean 'encoder.l0'\?.*: encoder.l0, decoder.cell$",
    ),
    "record: a number": (lambda: trace(record=3), r"record: .*; found 3$"),
    "record: a typo": (lambda: trace(record="updat"), r"found 'updat' \(did you mean 'update'\?\)"),
    "path: a number": (lambda: trace(5), r"path: expected the path of a file.*; found 5$"),
    "path: bytes": (lambda: trace(b"run.h5"), r"path: .*; found b'run.h5'$"),
    "path: a tensor": (lambda: trace(BIG), r"path: .*; found a tensor of shape"),
    "open: nothing": (lambda: grutrace.open(None), r"path: expected the path .*; found None$"),
    "open: a number": (lambda: grutrace.open(5), r"path: .*; found 5$"),
    "open: bytes": (lambda: grutrace.open(b"run.h5"), r"path: .*; found b'run.h5'$"),
    "open: nothings": (lambda: grutrace.open([None, "run.h5"]), r"path: .*; found None$"),
    "open: no shards": (lambda: grutrace.open([]), r"path: .*; found none$"),
    "sink: the class": (
        lambda: trace(sink=grutrace.Statistics),
        r"sink: .* found the class Statistics: make one, as in sink=Statistics\(\)$",
    ),
    "sink: a number": (lambda: trace(sink=5), r"sink: expected a grutrace.Statistics, found 5$"),
    "statistics: path": (lambda: grutrace.Statistics(5), r"path: .*; found 5$"),
    "statistics: load": (lambda: grutrace.Statistics.load(None), r"path: .*; found None$"),
    "models: a list": (
        lambda: grutrace.trace([model(), model()]),
        r"model: expected an nn.Module, found a list: trace nn.ModuleList\(models\)",
    ),
    "models: a dict": (
        lambda: grutrace.trace({"a": model()}),
        r"model: .* found a dict: trace nn.ModuleDict\(models\)",
    ),
    "model: its class": (lambda: grutrace.trace(nn.GRU), r"found the class GRU: create an"),
    "model: a tensor": (lambda: grutrace.trace(BIG), r"model: .*, found a tensor of shape"),
    "an option": (lambda: trace(site="e*"), r"site: unknown option .*'sites'\?\)$"),
    "an option like no other": (
        lambda: trace(xyzzy=1),
        r"xyzzy: unknown option; the options are model, path, sites, record, gates",
    ),
    "of a recording": (lambda: trace().recording(label={}), r"label: .*'labels'\?\)$"),
    "of statistics": (lambda: grutrace.Statistics(bin=4), r"bin: .*'bins'\?\)$"),
    "of an export": (
        lambda: export_trace(trace(), "out", "npz", site="e*"),
        r"site: .*'sites'\?\)$",
    ),
    "export: path": (lambda: export_trace(trace(), None, "npz"), r"path: .*; found None$"),
    "export: a format": (lambda: export_trace(trace(), "out", "nzp"), r"'nzp' .*'npz'\?\)$"),
    "gates": (lambda: trace(gates="deffered"), r"found 'deffered' \(did you mean 'deferred'\?\)$"),
    "gates: a tensor": (lambda: trace(gates=BIG), r"gates: .*; found a tensor of shape"),
    "every: a tensor": (lambda: trace(every=BIG), r"every: .* found a tensor of shape"),
    "units: a tensor": (lambda: trace(units=BIG), r"units: .* found a tensor of shape"),
    "dtype: a tensor": (lambda: trace(dtype=BIG), r"dtype: .* found a tensor of shape"),
    "tag: a tensor": (lambda: trace().start(BIG), r"tag: .* found a tensor of shape"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line(case: str) -> None:
    act, message = WRONG[case]
    with pytest.raises(grutrace.OptionError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (BIG, "a tensor of shape (64, 32) and type torch.float32"),
        (torch.tensor(3), "a tensor of shape () and type torch.int64"),
        (np.zeros((2, 3)), "an array of shape (2, 3) and type float64"),
        (nn.Parameter(torch.zeros(2)), "a parameter of shape (2,) and type torch.float32"),
        ([BIG], "[a tensor of shape (64, 32) and type torch.float32]"),
        ({"a": torch.zeros(2)}, "{'a': a tensor of shape (2,) and type torch.float32}"),
        (np.float64(1.5), "np.float64(1.5)"),
        (grutrace.Statistics, "the class Statistics"),
        ("run.h5", "'run.h5'"),
        (None, "None"),
    ],
)
def test_values_are_shown_briefly(value: object, shown: str) -> None:
    assert short_repr(value) == shown


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, "x\n" * 100, list(range(10_000)), [BIG] * 100, nn.Sequential(*[nn.ReLU()] * 99)],
    ids=["text", "lines", "numbers", "tensors", "model"],
)
def test_long_values_are_cut_to_one_line(value: object) -> None:
    # The control: Python's own text of it is no such line.
    assert len(repr(value)) > MAX_VALUE_CHARS
    assert len(short_repr(value)) <= MAX_VALUE_CHARS
    assert "\n" not in short_repr(value)


def test_long_lists_of_names_are_shortened() -> None:
    assert join_names([]) == "none"
    assert join_names(["a", "b"]) == "a, b"
    assert join_names(map(str, range(100))).endswith(" and 88 more")


def test_only_similar_names_are_suggested() -> None:
    assert "'deferred'" in suggest_name("defered", ["inline", "deferred"])
    assert suggest_name("nonsense", ["inline", "deferred"]) == ""


def test_decorated_functions_keep_their_signatures() -> None:
    @reject_unknown_options
    def function(first: int, *, second: int = 2) -> int:
        return first + second

    assert function(1) == 3
    assert function(first=1, second=3) == 4
    with pytest.raises(TypeError, match="missing 1 required"):
        function()
    with pytest.raises(grutrace.OptionError, match=r"secnd: .*'second'"):
        function(1, secnd=2)


def test_a_missing_extra_is_named_by_its_packages(monkeypatch: Any) -> None:
    """From a checkout, pip finds no package grutrace, but it finds the packages of the extra."""
    monkeypatch.setitem(sys.modules, "h5netcdf", None)
    with pytest.raises(MissingExtraError) as caught, require_extra("an export", "export"):
        import h5netcdf  # noqa: F401
    message = str(caught.value)
    assert message.startswith("an export needs h5netcdf, which is not installed: pip install ")
    asked = re.findall(r'"([^"]+)"', message)
    assert asked == extra_requirements("export")
    assert {re.split(r"[<>=]", requirement)[0] for requirement in asked} == {"h5netcdf", "zarr"}
    assert "grutrace" not in message


def test_without_metadata_the_library_is_named(monkeypatch: Any) -> None:
    from importlib import metadata

    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("grutrace.errors.requires", absent)
    assert missing_library_message("it", "zarr", "export") == (
        "it needs zarr, which is not installed: pip install zarr"
    )
