"""Which GRUs a model has, what their sites are called, and which of them are asked for."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from grutrace.capture.look_alikes import LookAlike, find_look_alikes, is_complex
from grutrace.errors import (
    GLOBS,
    GrutraceWarning,
    OptionError,
    UnsupportedError,
    brief,
    listed,
    nearest,
    texts_of,
)
from grutrace.gru.steps import numpy_type
from grutrace.record import DEFAULT_RECORD, QUANTITIES, Module, Site


@dataclass(frozen=True)
class Selection:
    """A module of the model with its description, narrowed to the sites that are recorded.

    Attributes:
        reference: To the module, which is not kept alive.
        description: Likewise.
    """

    reference: weakref.ref[nn.GRU | nn.GRUCell]
    description: Module

    @property
    def module(self) -> nn.GRU | nn.GRUCell | None:
        """The module; None once it is gone."""
        return self.reference()


def select(
    model: nn.Module,
    sites: str | Sequence[str] | None = None,
    record: str | Sequence[str] = DEFAULT_RECORD,
) -> list[Selection]:
    """Return the modules that have a site which matches, in the model's order.

    Args:
        model: The model; it may itself be the layer.
        sites: A glob, or several, for the names of sites; None for all.
        record: Names of quantities.

    Warns:
        GrutraceWarning: Beside them there are GRUs that cannot be traced, and are asked for.

    Raises:
        UnsupportedError: The model has no nn.GRU and no nn.GRUCell.
        OptionError: The model is none, a glob matches no site, or a quantity is unknown.
    """
    _require_model(model)
    quantities = _quantities(record)
    found = [
        Selection(weakref.ref(module), _describe(path, module, quantities))
        for path, module in find(model)
    ]
    look_alikes = list(find_look_alikes(model))
    if not found:
        raise UnsupportedError(
            "expected a model with an nn.GRU or nn.GRUCell inside; "
            f"found none in {type(model).__qualname__}{_named(look_alikes, '; ')}"
        )
    globs = None if sites is None else texts_of("sites", sites, GLOBS)
    missed = [each for each in look_alikes if globs is None or _asked(each, globs)]
    selected = found if globs is None else _matching(found, globs)
    if missed:
        # From here past Tracer._select, Tracer.__init__ and the check of its keywords to whoever
        # made the tracer.
        warnings.warn(_named(missed), GrutraceWarning, stacklevel=5)
    return selected


def find(model: nn.Module) -> Iterator[tuple[str, nn.GRU | nn.GRUCell]]:
    """Yield path and module of every nn.GRU and nn.GRUCell; one under two paths comes once."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.GRU, nn.GRUCell)) and not is_complex(module):
            yield path, module


def iterate_suffixes(module: nn.GRU | nn.GRUCell) -> Iterator[tuple[str, int, bool]]:
    """Yield suffix, layer and whether it is reverse, in the order of PyTorch's weights."""
    if isinstance(module, nn.GRUCell):
        yield "cell", 0, False
        return
    for layer in range(module.num_layers):
        yield f"l{layer}", layer, False
        if module.bidirectional:
            yield f"l{layer}_reverse", layer, True


def _require_model(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    hint = ""
    if isinstance(model, type):
        hint = ": make one of it first"
    elif isinstance(model, (list, tuple)):
        hint = ": trace nn.ModuleList(models), or give each a tracer of its own"
    elif isinstance(model, Mapping):
        hint = ": trace nn.ModuleDict(models), or give each a tracer of its own"
    found = type(model).__name__ if hint and not isinstance(model, type) else brief(model)
    article = "" if found == brief(model) else "a "
    raise OptionError(f"model: expected an nn.Module, found {article}{found}{hint}")


def _quantities(record: str | Sequence[str]) -> tuple[str, ...]:
    expected = f"names out of {', '.join(QUANTITIES)}"
    asked = texts_of("record", record, expected)
    unknown = [name for name in asked if name not in QUANTITIES]
    if unknown:
        raise OptionError(
            f"record: expected {expected}; found {listed(map(repr, unknown))}"
            f"{nearest(unknown[0], QUANTITIES)}"
        )
    return tuple(name for name in QUANTITIES if name in asked)


def _named(look_alikes: list[LookAlike], lead: str = "") -> str:
    """Say of each why it cannot be traced, and what to do instead."""
    if not look_alikes:
        return ""
    return lead + "; ".join(f"{each.path or 'the model'} {each.reason}" for each in look_alikes)


def _asked(look_alike: LookAlike, globs: list[str]) -> bool:
    """Whether its sites would match, if it had any."""
    names = [f"{look_alike.path}.{suffix}".lstrip(".") for suffix in ("l0", "cell")]
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _matching(found: list[Selection], globs: list[str]) -> list[Selection]:
    names = [site.name for each in found for site in each.description.sites]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise OptionError(
                f"sites: {glob!r} matches none of the model's sites{nearest(glob, names)}: "
                f"{listed(names)}"
            )
    narrowed = (_narrow(each, globs) for each in found)
    return [each for each in narrowed if each.description.sites]


def _narrow(selection: Selection, globs: list[str]) -> Selection:
    kept = tuple(
        site
        for site in selection.description.sites
        if any(fnmatchcase(site.name, glob) for glob in globs)
    )
    return replace(selection, description=replace(selection.description, sites=kept))


def _describe(path: str, module: nn.GRU | nn.GRUCell, quantities: tuple[str, ...]) -> Module:
    is_cell = isinstance(module, nn.GRUCell)
    directions = 1 if isinstance(module, nn.GRUCell) or not module.bidirectional else 2
    dtype = _weights_type(module)
    sites = tuple(
        Site(
            name=f"{path}.{suffix}" if path else suffix,
            suffix=suffix,
            layer=layer,
            reverse=reverse,
            input_size=directions * module.hidden_size if layer else module.input_size,
            quantities=quantities,
        )
        for suffix, layer, reverse in iterate_suffixes(module)
    )
    kind = type(module)
    return Module(
        path=path,
        kind="GRUCell" if is_cell else "GRU",
        type=f"{kind.__module__}.{kind.__qualname__}",
        input_size=module.input_size,
        hidden_size=module.hidden_size,
        num_layers=1 if isinstance(module, nn.GRUCell) else module.num_layers,
        bidirectional=directions == 2,
        bias=bool(module.bias),
        batch_first=False if isinstance(module, nn.GRUCell) else module.batch_first,
        dropout=0.0 if isinstance(module, nn.GRUCell) else float(module.dropout),
        dtype=numpy_type(dtype),
        weights_dtype=numpy_type(dtype),
        sites=sites,
    )


def _weights_type(module: nn.GRU | nn.GRUCell) -> torch.dtype:
    """Return the type of its weights, which need not be parameters: a model may set tensors."""
    plain = (value for value in vars(module).values() if isinstance(value, Tensor))
    tensors = (*module.parameters(), *module.buffers(), *plain)
    types = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
    return next(types, torch.get_default_dtype())
