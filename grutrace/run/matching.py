"""Check at the first call of a GRU whether `--sites` matches any site, before a long run."""

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
    model: nn.Module,
    layers: Sequence[nn.Module],
    known_layers: Container[nn.Module],
    globs: Sequence[str],
) -> None:
    """Raise if no model in memory has a site that matches a glob.

    All models in memory count, because an encoder may be called before the requested decoder. A
    model that is made later does not count: then add the glob of a site that exists already.

    Args:
        model: The model that is called now.
        layers: Its layers. None of them matches.
        known_layers: Layers that were seen before.
        globs: The globs of ``--sites``, at least one.

    Raises:
        NoMatchingSite: There is no such site.
    """
    layer_ids = set(map(id, layers))
    for root in _root_modules():
        for path, layer in find_grus(root):
            is_new = id(layer) not in layer_ids and layer not in known_layers
            if is_new and _can_match(path, layer, globs):
                return
    names = [name for path, layer in find_grus(model) for name in _names(path, layer)]
    raise NoMatchingSite(
        f"sites: {join_names(map(repr, globs))} matches none of the sites of "
        f"{type(model).__qualname__}{suggest_name(globs[0], names)}: {join_names(names)}"
    )


def _can_match(path: str, layer: nn.GRU | nn.GRUCell, globs: Sequence[str]) -> bool:
    """Return whether a glob matches a possible name of the layer.

    The script may call any submodule, which makes the path of the layer shorter.
    """
    parts = path.split(".")
    tails = (".".join(parts[start:]) for start in range(len(parts) + 1))
    names = (name for tail in tails for name in _names(tail, layer))
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _names(path: str, layer: nn.GRU | nn.GRUCell) -> Iterator[str]:
    for suffix, _, _ in iterate_suffixes(layer):
        yield f"{path}.{suffix}" if path else suffix


def _root_modules() -> list[nn.Module]:
    """Return the modules in memory that are not inside another module."""
    # By type(): __class__ of a proxy object may run code.
    modules = [value for value in gc.get_objects() if issubclass(type(value), nn.Module)]
    children = (vars(module).get("_modules", {}).values() for module in modules)
    child_ids = {id(child) for group in children for child in group}
    return [
        module for module in modules if id(module) not in child_ids and "_modules" in vars(module)
    ]
