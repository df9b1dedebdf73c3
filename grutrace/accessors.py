"""Accessors: attributes of classes that another part of the package provides, as `site.plot`.

A class declares the attribute, and the provider is registered by the name of its module. It is
imported when the attribute is first used, so reading a trace loads no picture library.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: By name of the attribute, module and class of the provider.
_PROVIDERS: dict[str, tuple[str, str]] = {}


def register_accessor(name: str, module: str, provider: str) -> None:
    """Register the class that provides an attribute.

    Args:
        name: Name of the attribute.
        module: The module of the class, imported when the attribute is first used.
        provider: Name of the class. It is called with the object that has the attribute.
    """
    _PROVIDERS[name] = module, provider


class Accessor:
    """An attribute whose provider was registered with `register_accessor`.

    Examples:
        >>> from grutrace.accessors import Accessor, register_accessor
        >>> class Site:
        ...     counted = Accessor()
        >>> register_accessor("counted", "collections", "Counter")
        >>> site = Site()
        >>> site.__dict__
        {}
        >>> isinstance(Site.counted, Accessor)
        True
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        if self._name not in _PROVIDERS:
            raise AttributeError(f"no provider of {self._name!r} is registered")
        module, provider = _PROVIDERS[self._name]
        return getattr(import_module(module), provider)(instance)
