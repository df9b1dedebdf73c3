"""Tests of finding the caller of a kernel: its module, and the order of its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import grutrace

GATES = ["inline", "background", "deferred"]


def test_a_direct_call_of_forward_is_recorded() -> None:
    layer, x = nn.GRU(3, 4, 2), torch.randn(5, 2, 3)
    expected = layer.forward(x)
    with grutrace.trace(layer) as trace:
        assert all(map(torch.equal, layer.forward(x), expected))
    assert len(trace.calls) == 1


class Packing(nn.GRU):
    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, last = super().forward(packed)
        return pad_packed_sequence(output, batch_first=True)[0], last


class PackingByHand(nn.GRU):
    """Calls the kernel itself."""

    def forward(self, x, lengths):
        bundle = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        zeros = x.new_zeros(1, len(x), self.hidden_size)
        output, last = torch.gru(
            bundle.data, bundle.batch_sizes, zeros, self._flat_weights, True, 1, 0.0, False, False
        )
        return pad_packed_sequence(bundle._replace(data=output), batch_first=True)[0], last


class Nested(nn.Module):
    """Packs in a module around the layer."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.rnn = nn.GRU(*args, **kwargs)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, last = self.rnn(packed)
        return pad_packed_sequence(output, batch_first=True)[0], last


@pytest.mark.parametrize("kind", [Packing, PackingByHand, Nested])
@pytest.mark.parametrize("gates", GATES)
def test_sequences_are_in_the_order_of_the_batch(kind, gates) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, batch_first=True).requires_grad_(False)
    x, lengths = torch.randn(3, 5, 3), torch.tensor([2, 5, 3])
    with (
        grutrace.trace(layer, gates=gates) as trace,
        trace.recording(labels={"speaker": ["ann", "bob", "eve"]}),
    ):
        output, _ = layer(x, lengths)
    site = trace[trace.sites[0]]
    for row, speaker in enumerate(("ann", "bob", "eve")):
        sequence = site.sequence(row)
        np.testing.assert_array_equal(sequence.hidden, output[row, : lengths[row]].numpy())
        assert set(sequence.labels["speaker"]) == {speaker}


def test_a_subclass_that_packs_inside() -> None:
    class Packing(nn.GRU):
        def forward(self, padded, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(padded, lengths)
            output, final = super().forward(packed)
            return nn.utils.rnn.pad_packed_sequence(output)[0], final

    layer = Packing(2, 3)
    with grutrace.trace(layer, check="raise") as trace:
        output, _ = layer(torch.randn(5, 3, 2), torch.tensor([5, 3, 1]))
    assert trace["l0"].lengths.tolist() == [5, 3, 1]
    padded, _ = trace["l0"].padded("hidden")
    np.testing.assert_array_equal(padded, output.detach().transpose(0, 1).numpy())
