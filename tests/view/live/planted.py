"""Traces with known content: brackets whose units follow them, and streams of single steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import grutrace
from grutrace import Trace

#: Letters of the planted language. Unit ROUND is on from "(" to the step before ")", unit SQUARE
#: from "[" to the step before "]".
LETTERS = ("(", ")", "[", "]", "a", "b", "c")
ROUND, SQUARE = 5, 2


def bracket_layer(hidden: int = 12, seed: int = 0) -> nn.GRU:
    """A GRU in which two units follow brackets and the others do what chance gave them.

    h' = (1 - z) n + z h: z = 0 at a bracket of the unit and 1 elsewhere, n = 1 at the opening one
    and -1 at the closing one.
    """
    torch.manual_seed(seed)
    layer = nn.GRU(len(LETTERS), hidden)
    with torch.no_grad():
        for unit, opening in ((ROUND, 0), (SQUARE, 2)):
            for parameter in layer.parameters():
                for gate in range(3):
                    parameter[gate * hidden + unit] = 0
            update, candidate = hidden + unit, 2 * hidden + unit
            layer.bias_ih_l0[update] = 30
            layer.weight_ih_l0[update, opening : opening + 2] = -60
            layer.weight_ih_l0[candidate, opening] = 10
            layer.weight_ih_l0[candidate, opening + 1] = -10
    return layer


def sentence(random: np.random.Generator) -> list[str]:
    """Some letters with brackets of both kinds, which are never nested in their own kind."""
    letters: list[str] = []
    for _ in range(int(random.integers(1, 4))):
        letters += random.choice(["a", "b", "c"], int(random.integers(1, 6))).tolist()
        inner = random.choice(["a", "b", "c"], int(random.integers(1, 5))).tolist()
        kind = random.random()
        if kind < 0.3:
            letters += ["(", "b", "[", *inner, "]", "c", ")"]
        else:
            letters += ["(", *inner, ")"] if kind < 0.7 else ["[", *inner, "]"]
    return [*letters, "a"]


def depths(letters: list[str]) -> list[int]:
    """How many brackets are open after each letter."""
    steps = [(letter in "([") - (letter in ")]") for letter in letters]
    return np.cumsum(steps).tolist()


def record_brackets(path: Path | None, sentences: int = 40, seed: int = 0) -> list[list[str]]:
    """Record sentences, one call each, into a file. Return their letters."""
    random = np.random.default_rng(seed)
    texts = [sentence(random) for _ in range(sentences)]
    layer = bracket_layer()
    with torch.no_grad(), grutrace.Tracer(layer, path, recording=False) as tracer:
        for number, letters in enumerate(texts):
            tag = "valid" if number % 4 == 0 else "train"
            with tracer.recording(tag=tag, tokens=[letters], labels={"depth": [depths(letters)]}):
                layer(one_hot(letters))
    return texts


def one_hot(letters: list[str]) -> torch.Tensor:
    """(T, 1, letters)"""
    numbers = torch.tensor([LETTERS.index(letter) for letter in letters])
    return nn.functional.one_hot(numbers, len(LETTERS)).float()[:, None]


def stepwise_trace(hidden: int = 5, seed: int = 0) -> Trace:
    """A trace in memory whose sequences are interleaved: two streams of a cell, step by step."""
    torch.manual_seed(seed)
    cell = nn.GRUCell(2, hidden)
    states = [torch.zeros(3, hidden), torch.zeros(2, hidden)]
    with torch.no_grad(), grutrace.trace(cell) as tracer:
        for step in range(17):
            for stream, state in enumerate(states):
                if stream == 0 or step < 9:
                    states[stream] = cell(torch.randn(len(state), 2), state)
    return tracer


def end_to_end(trace: Trace, site: str, quantity: str, sequences: list[int]) -> np.ndarray:
    """The oracle of the axis of steps: sequences one after another, (N, U)."""
    arrays = [trace[site].sequence(number).rows(quantity) for number in sequences]
    return np.concatenate(arrays) if arrays else np.zeros((0, 1), np.float32)
