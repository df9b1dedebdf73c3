"""Tests of the GRUs that a tracer finds, the names of their sites, and the selected ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import grutrace
from grutrace.capture import selection
from grutrace.capture.options import Options


def test_a_model_that_is_the_layer() -> None:
    with grutrace.trace(layer := nn.GRU(3, 4, bidirectional=True)) as trace:
        layer(torch.randn(5, 3))
    assert trace.sites == ("l0", "l0_reverse")
    with grutrace.trace(cell := nn.GRUCell(3, 4)) as trace:
        cell(torch.randn(3))
    assert trace.sites == ("cell",)


def test_containers_and_a_module_under_two_names() -> None:
    shared = nn.GRU(2, 2)
    model = nn.Module()
    model.rnns = nn.ModuleDict({"a": shared, "b/c": nn.GRU(2, 2)})
    model.cells = nn.ModuleList([nn.GRUCell(2, 2)])
    model.again = shared
    with grutrace.trace(model) as trace:
        model.again(torch.randn(4, 2))
        model.rnns["b/c"](torch.randn(4, 2))
        model.cells[0](torch.randn(2))
    assert trace.sites == ("rnns.a.l0", "rnns.b/c.l0", "cells.0.cell")
    assert len(trace["rnns.a.l0"]) == 1


def test_globs_choose_sites(model, batch) -> None:
    with grutrace.trace(model, sites="encoder.*") as trace:
        model(batch)
    assert trace.sites == ("encoder.l0", "encoder.l1")
    with grutrace.trace(model, sites=["*.l1", "*.cell"], record="update") as trace:
        model(batch)
    assert trace.sites == ("encoder.l1", "decoder.cell")
    assert trace["encoder.l1"].update.shape == (21, 6)
    with pytest.raises(grutrace.NotRecordedError, match=r"'reset' was not recorded.*update"):
        _ = trace["encoder.l1"].reset


def test_a_model_without_grus_is_an_error() -> None:
    with pytest.raises(grutrace.UnsupportedError, match=r"nn\.GRU.*none in Sequential"):
        grutrace.trace(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)))


def test_an_object_that_is_no_model_is_one_clear_error() -> None:
    with pytest.raises(grutrace.OptionError, match=r"model: expected an nn\.Module, found 'model'"):
        grutrace.trace("model")


@pytest.mark.parametrize("target", ["file", "statistics"])
def test_a_thread_that_computes_gates_on_a_cpu_is_refused(target, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(selection, "BACKGROUND_ON_CPU", False)
    options = {"path": tmp_path / "a.h5"} if target == "file" else {"sink": grutrace.Statistics()}
    with pytest.raises(grutrace.OptionError, match="expected 'inline' or 'deferred' for layers on"):
        grutrace.Tracer(nn.GRU(2, 3), gates="background", **options)
    assert not (tmp_path / "a.h5").exists()
    # In memory the reader computes them; and of layers on a device, the thread may.
    grutrace.Tracer(nn.GRU(2, 3), gates="background", recording=False).close()
    device = nn.GRU(2, 3, device="meta")
    options_of_device = Options(gates="background", to_file=True)
    assert selection.apply_options(selection.select(device), options_of_device)
