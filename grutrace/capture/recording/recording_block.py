"""Recording blocks: the tag, annotations and sequence names of a ``with tracer.recording(...)``.

A block belongs to the thread or asyncio task that enters it, and to the tasks created within it.
Blocks of several threads or tasks may overlap; each call gets the tag and names of its own block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from grutrace.capture.recording.annotations import AnnotationValues, RecordedBatches
from grutrace.errors import OptionError, join_names, reject_unknown_options
from grutrace.records import ModuleInfo

Annotate: TypeAlias = Callable[[RecordedBatches, str, AnnotationValues, str | None], None]

#: The names of the sequences of a batch, or names by the path of a module, which may be a glob.
SequenceNamesLike: TypeAlias = Sequence[Hashable] | Mapping[str, Sequence[Hashable]]


class Recording:
    """The calls recorded in one block, to which tokens and labels can be given.

    Args:
        annotate: Stores values for batches. Its arguments are the batches, the name of the values,
            the values, and the path or glob of the modules.
        batches: The batches recorded in the block.
    """

    def __init__(self, annotate: Annotate, batches: RecordedBatches) -> None:
        self._annotate, self._batches = annotate, batches

    @reject_unknown_options
    def annotate(
        self,
        *,
        tokens: AnnotationValues | None = None,
        labels: Mapping[str, AnnotationValues] | None = None,
        module: str | None = None,
    ) -> None:
        """Give tokens or labels to the sequences recorded so far.

        Values belong to the steps of a sequence, from its first step in the block. The block keeps
        the latest 256 batches of each module, with at most 4,096 sequences; earlier batches can no
        longer be annotated. If `recording` itself was called with tokens or labels, the block keeps
        all batches.

        Values of calls that the options leave out (``every``, ``max_calls``, ``max_bytes``,
        ``steps``) are left out as well.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> model = torch.nn.GRU(4, 3)
            >>> tracer = grutrace.Tracer(model, recording=False)
            >>> with tracer.recording() as recording:
            ...     output, final = model(torch.randn(2, 1, 4))
            ...     recording.annotate(labels={"part": [["noun", "verb"]]})
            >>> tracer["l0"][0].labels["part"]
            ['noun', 'verb']
            >>> tracer.close()

        Args:
            tokens: One list of texts, or of token ids, per sequence of the batch, one value per
                step; or such lists by the path, or glob, of a module. Lists may be arrays or
                tensors. In an array (B, T) as wide as the longest sequence, values beyond the end
                of a shorter sequence are padding and ignored.
            labels: By name, the same with numbers or texts; or one value per sequence.
            module: Path or glob of the module. Without it, the values go to every recorded batch
                with the same number of sequences and the same longest length.

        Raises:
            OptionError: The values fit no batch, or only a batch that is no longer kept; or they
                are neither texts nor numbers.
        """
        annotations = {"tokens": tokens, **(labels or {})}
        for name, values in annotations.items():
            if values is not None:
                self._annotate(self._batches, name, values, module)


class SequenceNames:
    """The names that a user gives to the sequences of a block.

    Args:
        sequences: (B,) hashable and different names, for every module whose calls have B
            sequences; or such names by the path, or glob, of a module.
        modules: The traced modules.

    Raises:
        OptionError: The names are invalid, or a glob matches no module.
    """

    def __init__(self, sequences: SequenceNamesLike, modules: Sequence[ModuleInfo]) -> None:
        self._paths = [module.path for module in modules]
        self._names: list[tuple[Hashable, ...] | None] = [None] * len(modules)
        self._for_any_module: tuple[Hashable, ...] | None = None
        self._used = [False] * len(modules)
        # Batch sizes of calls that the names did not fit.
        self._other_sizes: set[int] = set()
        if not isinstance(sequences, Mapping):
            self._for_any_module = _checked_names(sequences)
            return
        for glob, names in sequences.items():
            matching = [n for n, path in enumerate(self._paths) if fnmatchcase(path, glob)]
            if not matching:
                known = join_names(map(repr, self._paths))
                raise OptionError(
                    f"sequences: {glob!r} matches no traced module; the modules are {known}"
                )
            checked = _checked_names(names)
            for number in matching:
                if self._names[number] is None:
                    self._names[number] = checked

    def names_for(self, module: int, batch: int) -> tuple[Hashable, ...] | None:
        """Return the names of the sequences of a call; None if it has no names.

        Args:
            module: Index of the module in the header.
            batch: Number of sequences of the call.
        """
        names = self._names[module] or self._for_any_module
        if names is None or len(names) != batch:
            self._other_sizes.add(batch)
            return None
        self._used[module] = True
        return names

    def unused_message(self) -> str:
        """Return a warning if names for any module fitted no call; else an empty text."""
        if self._for_any_module is None or any(self._used) or not self._other_sizes:
            return ""
        sizes = ", ".join(map(str, sorted(self._other_sizes)))
        return (
            f"sequences: {len(self._for_any_module)} are named, and the calls of the block have "
            f"{sizes}: the sequences were identified by their states"
        )

    def mismatch_message(self, module: int, batch: int) -> str:
        """Return a warning for a call without names; an empty text if the call needs none.

        Names for any module may fit the calls of some modules only.
        """
        names = self._names[module] or self._for_any_module
        if names is None or (self._names[module] is None and not self._used[module]):
            return ""
        path = self._paths[module] or "the model"
        return (
            f"sequences: {len(names)} are named, and a call of {path} has {batch}: "
            "the sequences are identified by their states. Name the "
            "sequences of each call: with tracer.recording(sequences=...) around it"
        )


def _checked_names(values: Any) -> tuple[Hashable, ...]:
    expected = "sequences: expected one hashable name per sequence of the batch"
    if isinstance(values, (str, bytes)):
        raise OptionError(f"{expected}, found the text {values!r:.80}")
    try:
        names = tuple(
            value.tolist() if hasattr(value, "tolist") else value
            for value in (values.tolist() if hasattr(values, "tolist") else values)
        )
    except TypeError:
        raise OptionError(f"{expected}, found {values!r:.80}") from None
    seen: set[Hashable] = set()
    for name in names:
        try:
            is_new = name is not None and name not in seen
            seen.add(name)
        except TypeError:
            raise OptionError(f"{expected}, found {name!r:.80}") from None
        if not is_new:
            problem = "None among them" if name is None else f"{name!r:.80} twice"
            raise OptionError(f"{expected}, all different; found {problem}")
    return names


class RecordingBlock:
    """One ``with tracer.recording(...)``.

    Args:
        owner: An object that identifies the tracer. It is not the tracer itself, because a context
            that outlives the block must not keep the tracer alive.
        tag: A name for its calls.
        batches: The batches recorded in it.
        names: Names of its sequences, if it has any.
    """

    def __init__(
        self,
        owner: object,
        tag: str | None,
        batches: RecordedBatches,
        names: SequenceNames | None,
    ) -> None:
        self._owner, self.tag = owner, tag
        self.batches: RecordedBatches | None = batches
        self.names = names

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Make this the current block of the thread or task until the end of a ``with``."""
        _blocks.set((*_blocks.get(), self))
        try:
            yield
        finally:
            # A copy of the context, such as a task's, may outlive the block.
            self.batches = self.names = None
            _blocks.set(tuple(block for block in _blocks.get() if not block.has_ended))

    @property
    def has_ended(self) -> bool:
        """Whether its ``with`` has ended."""
        return self.batches is None

    @staticmethod
    def current(owner: object) -> RecordingBlock | None:
        """Return the innermost block of a tracer in this thread or task; None without one."""
        for block in reversed(_blocks.get()):
            if block._owner is owner and not block.has_ended:
                return block
        return None


# Active blocks of the current thread or task, of all tracers, the innermost last.
_blocks: ContextVar[tuple[RecordingBlock, ...]] = ContextVar(
    "grutrace_recording_blocks", default=()
)
