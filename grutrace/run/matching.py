"""Check at the first call of a GRU whether `--sites` matches any site: not after hours."""

from __future__ import annotations

import gc
from collections.abc import Container, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from grutrace.capture.selection import find_grus, iterate_suffixes
from grutrace.errors import OptionError, join_names, suggest_name


class NoMatchingSite(OptionError):
    """No glob of ``--sites`` matches a site of any model of the script. The script is stopped."""


def require_match(
    model: nn.Module, layers: Sequence[nn.Module], known: Container[nn.Module], globs: Sequence[str]
) -> None:
    """Raise if no model in memory has a site that matches a glob.

    All models in memory count, because an encoder may be called before the requested decoder. A
    model that is made later does not count: then add the glob of a site that exists already.

    Args:
        model: The model that is called now.
        layers: Its layers. None of them matches.
        known: Layers that were seen before.
        globs: The globs of ``--sites``, at least one.

    Raises:
        NoMatchingSite: There is no such site.
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
    """Whether a glob matches a possible name of the layer: the script may call any submodule."""
    parts = path.split(".")
    tails = (".".join(parts[first:]) for first in range(len(parts) + 1))
    names = (name for tail in tails for name in _names(tail, layer))
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _names(path: str, layer: nn.GRU | nn.GRUCell) -> Iterator[str]:
    for suffix, _, _ in iterate_suffixes(layer):
        yield f"{path}.{suffix}" if path else suffix


def _root_modules() -> list[nn.Module]:
    """Return the modules in memory that are not inside another module."""
    # By type(): __class__ of a proxy object may run code.
    modules = [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]
    inner = {id(child) for each in modules for child in vars(each).get("_modules", {}).values()}
    return [each for each in modules if id(each) not in inner and "_modules" in vars(each)]
