"""What a user gets hold of while something is recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from grutrace.capture.annotate import Given, RecordedBatches
from grutrace.errors import naming_unknown_options

Annotate: TypeAlias = Callable[[RecordedBatches, str, Given, str | None], None]


class Recording:
    """A stretch of recording, for giving tokens and labels to what was recorded in it.

    Args:
        annotate: Records values by this name, of the batches, of the modules that the glob names.
        batches: What was recorded in it.
    """

    def __init__(self, annotate: Annotate, batches: RecordedBatches) -> None:
        self._annotate, self._batches = annotate, batches

    @naming_unknown_options
    def annotate(
        self,
        *,
        tokens: Given | None = None,
        labels: Mapping[str, Given] | None = None,
        module: str | None = None,
    ) -> None:
        """Give tokens or labels to the sequences recorded so far.

        Args:
            tokens: One list of texts, or of token ids, a sequence of the batch, one a step from
                its first; or such lists by the path (or glob) of the module that they belong to.
                Lists may be arrays or tensors. In an array (B, T) as wide as the longest sequence
                is long, what lies beyond the steps of a shorter one is padding and left out.
            labels: By name, the same with numbers or texts; or one value a sequence.
            module: Path or glob of the module that they belong to. Without it they go to every
                recorded batch that they fit exactly.

        Values for calls that the options leave out (``every``, ``max_calls``, ``max_bytes``,
        ``steps``) are left out as well.

        Raises:
            OptionError: They fit nothing that was called, or are neither texts nor numbers.
        """
        given = {"tokens": tokens, **(labels or {})}
        for name, values in given.items():
            if values is not None:
                self._annotate(self._batches, name, values, module)
