"""Recording blocks: what the calls of one ``with tracer.recording(...)`` are given.

A block belongs to the thread or asyncio task that entered it, and to the tasks made within it. So
blocks of several threads or tasks overlap freely, and each call bears what its own block says.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from grutrace.capture.recording.annotations import AnnotationValues, RecordedBatches
from grutrace.errors import OptionError, reject_unknown_options
from grutrace.records import ModuleInfo

Annotate: TypeAlias = Callable[[RecordedBatches, str, AnnotationValues, str | None], None]

#: The names of the sequences of a batch, or names by the path of a module, which may be a glob.
SequenceNamesLike: TypeAlias = Sequence[Hashable] | Mapping[str, Sequence[Hashable]]


class Recording:
    """A stretch of recording, for giving tokens and labels to what was recorded in it.

    Args:
        annotate: Records values by this name, of the batches, of the modules that the glob names.
        batches: What was recorded in it.
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

        The block keeps its latest 256 batches, of at most 4,096 sequences in all, of each
        module; earlier ones can no longer be given values. Where `recording` itself was given
        tokens or labels, it keeps all of them.

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
            OptionError: They fit nothing that was called, or only what is no longer kept; or they
                are neither texts nor numbers.
        """
        given = {"tokens": tokens, **(labels or {})}
        for name, values in given.items():
            if values is not None:
                self._annotate(self._batches, name, values, module)


class SequenceNames:
    """The names that a user gives to the sequences of a block.

    Args:
        given: (B,) names that are hashable and differ, for every module whose calls have B
            sequences; or such names by the path of a module, which may be a glob.
        modules: The traced modules.

    Raises:
        OptionError: They are no such names, or a glob matches no module.
    """

    def __init__(self, given: SequenceNamesLike, modules: Sequence[ModuleInfo]) -> None:
        self._paths = [module.path for module in modules]
        self._names: list[tuple[Hashable, ...] | None] = [None] * len(modules)
        self._for_any_module: tuple[Hashable, ...] | None = None
        self._used = [False] * len(modules)
        # What calls had for which there were no names.
        self._other_sizes: set[int] = set()
        if not isinstance(given, Mapping):
            self._for_any_module = _checked_names(given)
            return
        for glob, names in given.items():
            matching = [n for n, path in enumerate(self._paths) if fnmatchcase(path, glob)]
            if not matching:
                known = ", ".join(repr(path) for path in self._paths)
                raise OptionError(
                    f"sequences: {glob!r} matches no traced module; there are {known}"
                )
            checked = _checked_names(names)
            for number in matching:
                if self._names[number] is None:
                    self._names[number] = checked

    def names_for(self, module: int, batch: int) -> tuple[Hashable, ...] | None:
        """The names of the sequences of a call; None if these are not named.

        Args:
            module: Place of the module in the header.
            batch: How many sequences the call has.
        """
        names = self._names[module] or self._for_any_module
        if names is None or len(names) != batch:
            self._other_sizes.add(batch)
            return None
        self._used[module] = True
        return names

    def unused_message(self) -> str:
        """What to say, at the end, of names for any module that fitted no call; empty if none."""
        if self._for_any_module is None or any(self._used) or not self._other_sizes:
            return ""
        sizes = ", ".join(map(str, sorted(self._other_sizes)))
        return (
            f"sequences: {len(self._for_any_module)} are named, and the calls of the block have "
            f"{sizes}: which sequences they go on with was told by their states"
        )

    def mismatch_message(self, module: int, batch: int) -> str:
        """What to say of a call that `of` has no names for; empty if that is as it should be.

        Of names for any module, that is where no call of a module had as many sequences.
        """
        names = self._names[module] or self._for_any_module
        if names is None or (self._names[module] is None and not self._used[module]):
            return ""
        path = self._paths[module] or "the model"
        return (
            f"sequences: {len(names)} are named, and a call of {path} has {batch}: "
            "which sequences it goes on with is told by their states. Name the "
            "sequences of each call: with tracer.recording(sequences=...) around it"
        )


def _checked_names(given: Any) -> tuple[Hashable, ...]:
    expected = "sequences: expected one hashable name a sequence of the batch"
    if isinstance(given, (str, bytes)):
        raise OptionError(f"{expected}, found the text {given!r:.80}")
    try:
        names = tuple(
            each.tolist() if hasattr(each, "tolist") else each
            for each in (given.tolist() if hasattr(given, "tolist") else given)
        )
    except TypeError:
        raise OptionError(f"{expected}, found {given!r:.80}") from None
    seen: set[Hashable] = set()
    for name in names:
        try:
            is_new = name is not None and name not in seen
            seen.add(name)
        except TypeError:
            raise OptionError(f"{expected}, found {name!r:.80}") from None
        if not is_new:
            found = "None among them" if name is None else f"{name!r:.80} twice"
            raise OptionError(f"{expected}, all different; found {found}")
    return names


class RecordingBlock:
    """One ``with tracer.recording(...)``.

    Args:
        owner: What stands for the tracer. It is not the tracer, which a context that outlives the
            block must not keep alive.
        tag: A name that its calls bear.
        batches: What is recorded in it.
        names: Of its sequences, if they have any.
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
        """Make it the block of this thread or task until the end of a ``with``."""
        _blocks.set((*_blocks.get(), self))
        try:
            yield
        finally:
            # Whoever copied the context, as a task does, may outlive the block.
            self.batches = self.names = None
            _blocks.set(tuple(each for each in _blocks.get() if not each.has_ended))

    @property
    def has_ended(self) -> bool:
        """Whether its ``with`` has ended."""
        return self.batches is None

    @staticmethod
    def current(owner: object) -> RecordingBlock | None:
        """The innermost block of a tracer in this thread or task; None if there is none."""
        for block in reversed(_blocks.get()):
            if block._owner is owner and not block.has_ended:
                return block
        return None


# Blocks of all tracers that the present thread or task is in, the innermost last.
_blocks: ContextVar[tuple[RecordingBlock, ...]] = ContextVar(
    "grutrace_recording_blocks", default=()
)
