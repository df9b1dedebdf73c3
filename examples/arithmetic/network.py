"""The network of Hupkes, Veldhoen and Zuidema (2018), its training, and its trace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import grutrace
from arithmetic.language import NUMBERS, WORDS, Expression
from arithmetic.strategies import cumulative, recursive


class Arithmetic(nn.Module):
    """Words embedded in two dimensions, a GRU of 15 units, and one number read from its state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 2)
        self.gru = nn.GRU(2, 15, batch_first=True)
        self.output = nn.Linear(15, 1)

    def forward(self, words: Tensor, last: Tensor | int = -1) -> Tensor:
        """(B,) what the expressions come to, from the numbers of their words, (B, T).

        Args:
            words: Shorter expressions are filled up at their ends.
            last: (B,) the last word of each; -1 where none is filled up.
        """
        states, _ = self.gru(self.embedding(words))
        return self.output(states[torch.arange(len(words)), last]).squeeze(1)


def encoded(expressions: Sequence[Expression]) -> Tensor:
    """(B, T) the numbers of the words of expressions of the same length."""
    return torch.tensor([[NUMBERS[word] for word in words] for words in expressions])


def outcomes(expressions: Iterable[Expression]) -> list[float]:
    return [float(recursive(words)[-1]) for words in expressions]


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread: for so small a network, waiting for others costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def learning_rate(share: float) -> float:
    """It rises to 1 in the first tenth of the training, then falls to 0 as a cosine does."""
    return share / 0.1 if share < 0.1 else (1 + math.cos(math.pi * (share - 0.1) / 0.9)) / 2


@one_thread()
def train(
    model: Arithmetic, corpora: dict[str, list[Expression]], steps: int, batch_size: int = 256
) -> None:
    """Minimize the mean squared error by Adam; the learning rate rises to 0.01 and falls to 0."""
    expressions = [words for corpus in corpora.values() for words in corpus]
    lengths = torch.tensor([len(words) for words in expressions])
    longest = int(lengths.max())
    inputs = encoded([words + ["("] * (longest - len(words)) for words in expressions])
    targets = torch.tensor(outcomes(expressions))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate((step + 1) / steps)
    )
    errors: list[float] = []
    for step in range(1, steps + 1):
        chosen = torch.randint(len(expressions), (batch_size,))
        result = model(inputs[chosen], lengths[chosen] - 1)
        error = nn.functional.mse_loss(result, targets[chosen])
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        errors.append(error.item())
        if step % max(1, steps // 6) == 0:
            print(f"  step {step} of {steps}: mean squared error {np.mean(errors):.2f}", flush=True)
            errors.clear()


def record(
    model: Arithmetic, corpora: dict[str, list[Expression]], path: Path
) -> dict[str, list[float]]:
    """Run the model on each corpus as one batch, with every gate, word and label in a file.

    Args:
        model: As it is now.
        corpora: By use and language, such as ``test L3``, some expressions.
        path: Where the trace goes, in place of what is there.

    Returns:
        By corpus, what the model says that its expressions come to.
    """
    message = {}
    record = ("reset", "update", "candidate", "hidden", "input")
    with grutrace.Tracer(model, path, record=record, mode="overwrite", recording=False) as tracer:
        for tag, expressions in corpora.items():
            use, language = tag.split()
            totals, modes = zip(*map(cumulative, expressions), strict=True)
            labels = {
                "cumulative": totals,
                "mode": modes,
                "recursive": [recursive(words) for words in expressions],
                "use": [use] * len(expressions),
                "language": [language] * len(expressions),
            }
            recording = tracer.recording(tag, tokens=expressions, labels=labels)
            with recording, torch.inference_mode():
                message[tag] = model(encoded(expressions)).tolist()
    return message
