"""Trace a small sequence-to-sequence model on a device, and verify the traces.

python -m tools.device_model [--device DEVICE]

The model needs no data: a bidirectional encoder of two layers over packed random tokens and a
decoder that calls a cell for each token. It runs untraced, deferred, with gates in the background
and inline; outputs must have the same bits, and every gate must verify. Exit code: 0, or 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.capture import selection


class Translator(nn.Module):
    """An encoder of two layers and a decoder of one cell."""

    def __init__(self, tokens: int = 50, hidden_size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 32)
        self.encoder = nn.GRU(32, hidden_size, 2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRUCell(32, hidden_size)
        self.logits = nn.Linear(hidden_size, tokens)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the logits (20, B, tokens) of greedy decoding from tokens (B, T)."""
        packed = pack_padded_sequence(
            self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        hidden = self.encoder(packed)[1][-1]
        token = tokens[:, 0]
        found = []
        for _ in range(20):
            hidden = self.decoder(self.embedding(token), hidden)
            found.append(self.logits(hidden))
            token = found[-1].argmax(-1)
        return torch.stack(found)


def main(arguments: list[str] | None = None) -> int:
    """Run the check, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.device_model", description=__doc__)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        # Refused for users on a CPU, where it is slower than the other ways.
        selection.BACKGROUND_ON_CPU = True
    torch.manual_seed(0)
    model = Translator().to(options.device).eval()
    tokens = torch.randint(0, 50, (16, 30), device=options.device)
    lengths = torch.randint(5, 31, (16,))
    failed = 0
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = model(tokens, lengths)
        for gates in ("deferred", "background", "inline"):
            path = Path(folder) / f"{gates}.h5"
            with grutrace.trace(model, path, gates=gates):
                found = model(tokens, lengths)
            same_bits = torch.equal(expected, found)
            with grutrace.open(path) as trace:
                results = list(verify(trace))
                holds = bool(results) and all(result.holds for result in results)
                sites = len(trace.sites)
            failed += not (same_bits and holds and sites == 5)
            print(f"{gates}: same bits {same_bits}, verified {holds}, {sites} sites", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
