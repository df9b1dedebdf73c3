"""Whether `--sites` matches anything, asked at the first call of a GRU: before a run of hours."""

from __future__ import annotations

import gc
from collections.abc import Container, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from grutrace.capture.selection import find_grus, iterate_suffixes
from grutrace.errors import OptionError, join_names, suggest_name


class NoMatchingSite(OptionError):
    """No glob of ``--sites`` matches a site of any model of the script: the run ends here."""


def require_match(
    model: nn.Module, layers: Sequence[nn.Module], known: Container[nn.Module], globs: Sequence[str]
) -> None:
    """Refuse globs that match nothing that the script could still call.

    Other models that are in memory count: an encoder may be called before the decoder that is
    asked for. One that is made later is not known here, so name one that is there as well.

    Args:
        model: The model that is called now.
        layers: Its layers, of which none matches.
        known: Layers that are traced already, or were looked at.
        globs: As given, at least one.

    Raises:
        NoSiteMatches: There is no such site.
    """
    own = set(map(id, layers))
    for other in _root_modules():
        for path, layer in find_grus(other):
            if id(layer) not in own and layer not in known and _can_match(path, layer, globs):
                return
    names = [name for path, layer in find_grus(model) for name in _names(path, layer)]
    asked = join_names(map(repr, globs))
    raise NoMatchingSite(
        f"sites: {asked} matches none of the sites of {type(model).__qualname__}"
        f"{suggest_name(globs[0], names)}: {join_names(names)}"
    )


def _can_match(path: str, layer: nn.GRU | nn.GRUCell, globs: Sequence[str]) -> bool:
    """Whether a name matches that the layer could have: any part of the model may be called."""
    parts = path.split(".")
    tails = (".".join(parts[first:]) for first in range(len(parts) + 1))
    names = (name for tail in tails for name in _names(tail, layer))
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _names(path: str, layer: nn.GRU | nn.GRUCell) -> Iterator[str]:
    for suffix, _, _ in iterate_suffixes(layer):
        yield f"{path}.{suffix}" if path else suffix


def _root_modules() -> list[nn.Module]:
    """The modules in memory that are in no other module."""
    # By its type: asking a proxy of somebody else for its class may do anything.
    modules = [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]
    inner = {id(child) for each in modules for child in vars(each).get("_modules", {}).values()}
    return [each for each in modules if id(each) not in inner and "_modules" in vars(each)]
