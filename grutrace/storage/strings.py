"""Texts as numbers: a tag or token that comes a million times is stored once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grutrace.record import Array

#: Texts that are remembered. After so many different ones the memory starts afresh, which may store
#: a text twice, but cannot grow without bound.
REMEMBERED = 1 << 20


class Strings:
    """Gives every text a number, and keeps the new ones until somebody takes them.

    Args:
        known: Texts that have the numbers 0, 1, ... already.
        characters: Bytes that those take.
    """

    def __init__(self, known: Sequence[str] = (), characters: int = 0) -> None:
        self._numbers: dict[str, int] = {text: number for number, text in enumerate(known)}
        self._count = len(known)
        self._characters = characters
        self._new: list[bytes] = []

    def number(self, text: str) -> int:
        """Number of the text, the next one if it is new."""
        number = self._numbers.get(text)
        if number is None:
            number = self._add(text)
        return number

    def label(self, text: str | None) -> int:
        """One more than the number of the text; 0 for none."""
        return 0 if text is None else 1 + self.number(text)

    def take(self) -> tuple[Array, Array]:
        """The texts added since the last take: where each ends, (texts,), and their UTF-8 bytes."""
        lengths = np.fromiter(map(len, self._new), np.uint64, len(self._new))
        ends = np.uint64(self._characters) + np.cumsum(lengths, dtype=np.uint64)
        joined = b"".join(self._new)
        self._characters += len(joined)
        self._new = []
        return ends, np.frombuffer(joined, np.uint8)

    def _add(self, text: str) -> int:
        if len(self._numbers) >= REMEMBERED:
            self._numbers.clear()
        number = self._numbers[text] = self._count
        self._count += 1
        # A lone surrogate has no UTF-8 form.
        self._new.append(text.encode("utf-8", "backslashreplace"))
        return number
