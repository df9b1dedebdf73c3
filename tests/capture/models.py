"""Small models that call GRUs as real models do."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EncoderDecoder(nn.Module):
    """A packed-or-padded encoder and a decoder that steps a cell."""

    def __init__(self, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.GRU(5, 6, layers, batch_first=True, dropout=dropout)
        self.decoder = nn.GRUCell(4, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, batch: Tensor, steps: int = 3) -> Tensor:
        _, final = self.encoder(batch)
        state = final[-1]
        token = torch.zeros(batch.shape[0], 4)
        outputs = []
        for _ in range(steps):
            state = self.decoder(token, state)
            token = self.out(state)
            outputs.append(token)
        return torch.stack(outputs, 1)


class StepwiseDecoder(nn.Module):
    """nn.GRU with T = 1, called once a token."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6, layers)

    def forward(self, start: Tensor, state: Tensor, steps: int) -> Tensor:
        token = start
        outputs = []
        for _ in range(steps):
            token, state = self.rnn(token, state)
            outputs.append(token)
            token = token[..., :4]
        return torch.cat(outputs)


def hooks(model: nn.Module) -> int:
    """The number of forward hooks in a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
