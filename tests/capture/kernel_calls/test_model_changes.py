"""Tests of layers that a model gets after its tracer was created."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.top = nn.GRU(3, 4), nn.GRU(4, 4)

    def forward(self, x):
        return self.top(self.rnn(x)[0])[0]


def test_a_replaced_layer_is_recorded_under_its_path() -> None:
    net, x = Growing(), torch.randn(5, 2, 3)
    with grutrace.trace(net, check="raise") as trace:
        net(x)
        net.rnn = nn.GRU(3, 4)
        net(x)
        expected = net.rnn(x)[0]
    assert trace.calls["module"].tolist() == ["rnn", "top", "rnn", "top", "rnn"]
    assert trace.calls["weights"].tolist() == [0, 0, 1, 0, 1]
    np.testing.assert_array_equal(trace["rnn.l0"].sequence(4).hidden, expected[:, 0].detach())


def test_a_new_layer_or_another_shape_is_reported() -> None:
    net, x = Growing(), torch.randn(5, 2, 3)
    with grutrace.trace(net, sites="rnn.*") as trace:
        net(x)
        net.rnn = nn.GRU(3, 4, bidirectional=True)
        with pytest.warns(grutrace.GrutraceWarning, match="rnn was replaced by a layer of an"):
            net.rnn(x)
        net.head = nn.GRUCell(3, 3)
        with pytest.warns(grutrace.GrutraceWarning, match="head was added after the tracer"):
            net.head(x[0])
        # What was left out on purpose is not named.
        net.top(torch.randn(5, 2, 4))
    assert len(trace.calls) == 1


def test_a_layer_replaced_by_another_module_is_reported() -> None:
    net, x = Growing(), torch.randn(5, 2, 3)
    trace = grutrace.trace(net)
    trace.start()
    net(x)
    net.rnn = nn.RNN(3, 4)
    net(x)
    with pytest.warns(grutrace.GrutraceWarning, match="^rnn was replaced by a RNN after"):
        trace.close()
    assert trace.calls["module"].tolist() == ["rnn", "top", "top"]


def test_cells_created_in_each_call_are_reported_once() -> None:
    class Vocoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x):
            return self.rnn(x)[0]

        def generate(self, x):
            cell = nn.GRUCell(3, 4)
            cell.weight_ih.data, cell.weight_hh.data = self.rnn.weight_ih_l0, self.rnn.weight_hh_l0
            return cell(x)

    model, x = Vocoder(), torch.randn(5, 2, 3)
    neighbour = nn.GRUCell(3, 4)
    with grutrace.trace(model):
        model(x)
        neighbour(x[0])
        with pytest.warns(grutrace.GrutraceWarning, match="a GRUCell that is not part"):
            model.generate(x[0])
        # Once: any other warning is an error.
        model.generate(x[0])
