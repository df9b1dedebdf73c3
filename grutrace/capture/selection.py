"""Find the GRUs of a model, name their sites, and select the sites to record.

Some GRUs cannot be traced: TorchScript, quantized and complex layers, and GRUs written in Python.
`find_unsupported_grus` finds them by type, not by class name, because any class may be called GRU.

`defer_gates` describes what to store if gates are computed on reading. A gate follows from the
weights, the layer's input and the state before the step. The states of all layers are stored. The
input of a layer above the first equals the states of the layer below, so it is stored only if they
differ: if dropout may be applied between, or if a direction of the layer below is not recorded.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from grutrace.capture.options import Options
from grutrace.errors import (
    GLOBS,
    GrutraceWarning,
    OptionError,
    UnsupportedError,
    join_names,
    short_repr,
    string_list,
    suggest_name,
)
from grutrace.gru.layout import numpy_type
from grutrace.gru.replay import PartialReplay, required_gates
from grutrace.records import DEFAULT_RECORD, GATES, QUANTITIES, ModuleInfo, Site

_KINDS = ("GRU", "GRUCell")

#: The module of torch's quantized layers. Importing it causes a warning in some versions.
_QUANTIZED = "torch.ao.nn.quantized"

_SCRIPTED_GRU = (
    "is a GRU inside TorchScript: trace the model before torch.jit.script or torch.jit.trace"
)
_QUANTIZED_GRU = "is a quantized GRU: trace the original float model"
_COMPLEX_GRU = (
    "is complex: its gates are not numbers from 0 to 1, so only real layers can be traced"
)
_CUSTOM_GRU = (
    "is a GRU implementation of its own ({}), which does not call PyTorch's kernel: read the gates "
    "in its code, or replace it with nn.GRU"
)


@dataclass(frozen=True)
class UnsupportedGRU:
    """A module that computes a GRU but cannot be traced.

    Attributes:
        path: Its path in the model; empty if it is the model itself.
        reason: Why it cannot be traced, and what to do instead.
    """

    path: str
    reason: str


def find_unsupported_grus(model: nn.Module) -> Iterator[UnsupportedGRU]:
    """Yield the GRUs of a model that cannot be traced."""
    for path, module in model.named_modules():
        reason = _unsupported_reason(module)
        if reason is not None:
            yield UnsupportedGRU(path, reason)


def is_complex(module: nn.Module) -> bool:
    """Whether the weights of a layer are complex."""
    return any(each.is_complex() for each in module.parameters())


def _unsupported_reason(module: nn.Module) -> str | None:
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return _COMPLEX_GRU if is_complex(module) else None
    if isinstance(module, torch.jit.ScriptModule):
        of_gru = module.original_name in _KINDS or getattr(module, "mode", None) == "GRU"
        return _SCRIPTED_GRU if of_gru else None
    kind = type(module)
    if kind.__module__.startswith(_QUANTIZED) and kind.__name__ in _KINDS:
        return _QUANTIZED_GRU
    of_rnn = isinstance(module, nn.RNNBase) and module.mode == "GRU"
    if of_rnn or (isinstance(module, nn.RNNCellBase) and kind.__name__ == "GRUCell"):
        return _CUSTOM_GRU.format(f"{kind.__module__}.{kind.__qualname__}")
    return None


@dataclass(frozen=True)
class SelectedModule:
    """A module of the model, and the description of its recorded sites.

    Attributes:
        reference: Weak reference to the module.
        description: Description of the module, with its recorded sites only.
    """

    reference: weakref.ref[nn.GRU | nn.GRUCell]
    description: ModuleInfo

    @property
    def module(self) -> nn.GRU | nn.GRUCell | None:
        """The module; None if it was garbage-collected."""
        return self.reference()


def select(
    model: nn.Module,
    sites: str | Sequence[str] | None = None,
    record: str | Sequence[str] = DEFAULT_RECORD,
) -> list[SelectedModule]:
    """Return the modules that have a matching site, in the model's order.

    Args:
        model: The model; it may itself be the layer.
        sites: Glob, or list of globs, for the names of sites; None for all.
        record: Names of quantities.

    Warns:
        GrutraceWarning: The globs also match GRUs that cannot be traced.

    Raises:
        UnsupportedError: The model has no nn.GRU and no nn.GRUCell.
        OptionError: The model is not an nn.Module, a glob matches no site, or a quantity is
            unknown.
    """
    _require_model(model)
    quantities = _quantities(record)
    found = [
        SelectedModule(weakref.ref(module), _describe(path, module, quantities))
        for path, module in find_grus(model)
    ]
    unsupported = list(find_unsupported_grus(model))
    if not found:
        raise UnsupportedError(
            "expected a model with an nn.GRU or nn.GRUCell inside; "
            f"found none in {type(model).__qualname__}{_describe_unsupported(unsupported, '; ')}"
        )
    globs = None if sites is None else string_list("sites", sites, GLOBS)
    missed = [each for each in unsupported if globs is None or _is_selected(each, globs)]
    selected = found if globs is None else _matching_sites(found, globs)
    if missed:
        # The warning points to the line that creates the tracer: past Tracer.__init__ and the check
        # of its keywords.
        warnings.warn(_describe_unsupported(missed), GrutraceWarning, stacklevel=4)
    return selected


def find_grus(model: nn.Module) -> Iterator[tuple[str, nn.GRU | nn.GRUCell]]:
    """Yield path and module of every nn.GRU and nn.GRUCell. A shared module comes once."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.GRU, nn.GRUCell)) and not is_complex(module):
            yield path, module


def iterate_suffixes(module: nn.GRU | nn.GRUCell) -> Iterator[tuple[str, int, bool]]:
    """Yield (suffix, layer, is reverse) for each site, in the order of PyTorch's weights."""
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
        hint = ": create an instance first"
    elif isinstance(model, (list, tuple)):
        hint = ": trace nn.ModuleList(models), or create one tracer per model"
    elif isinstance(model, Mapping):
        hint = ": trace nn.ModuleDict(models), or create one tracer per model"
    found = type(model).__name__ if hint and not isinstance(model, type) else short_repr(model)
    article = "" if found == short_repr(model) else "a "
    raise OptionError(f"model: expected an nn.Module, found {article}{found}{hint}")


def _quantities(record: str | Sequence[str]) -> tuple[str, ...]:
    expected = f"names out of {', '.join(QUANTITIES)}"
    asked = string_list("record", record, expected)
    unknown = [name for name in asked if name not in QUANTITIES]
    if unknown:
        raise OptionError(
            f"record: expected {expected}; found {join_names(map(repr, unknown))}"
            f"{suggest_name(unknown[0], QUANTITIES)}"
        )
    return tuple(name for name in QUANTITIES if name in asked)


def _describe_unsupported(unsupported: list[UnsupportedGRU], lead: str = "") -> str:
    """Return why each module cannot be traced, and what to do instead."""
    if not unsupported:
        return ""
    return lead + "; ".join(f"{each.path or 'the model'} {each.reason}" for each in unsupported)


def _is_selected(unsupported: UnsupportedGRU, globs: list[str]) -> bool:
    """Whether a glob matches the site names that the module would have."""
    names = [f"{unsupported.path}.{suffix}".lstrip(".") for suffix in ("l0", "cell")]
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _matching_sites(found: list[SelectedModule], globs: list[str]) -> list[SelectedModule]:
    names = [site.name for each in found for site in each.description.sites]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise OptionError(
                f"sites: {glob!r} matches no site of the model{suggest_name(glob, names)}: "
                f"{join_names(names)}"
            )
    narrowed = (_filter_sites(each, globs) for each in found)
    return [each for each in narrowed if each.description.sites]


def _filter_sites(selection: SelectedModule, globs: list[str]) -> SelectedModule:
    kept = tuple(
        site
        for site in selection.description.sites
        if any(fnmatchcase(site.name, glob) for glob in globs)
    )
    return replace(selection, description=replace(selection.description, sites=kept))


def _describe(path: str, module: nn.GRU | nn.GRUCell, quantities: tuple[str, ...]) -> ModuleInfo:
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
    return ModuleInfo(
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
    """Return the type of the weights. They may be plain tensors instead of parameters."""
    plain = (value for value in vars(module).values() if isinstance(value, Tensor))
    tensors = (*module.parameters(), *module.buffers(), *plain)
    types = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
    return next(types, torch.get_default_dtype())


def defer_gates(module: ModuleInfo) -> ModuleInfo:
    """Return the description of a module whose gates are computed on reading.

    It stores the quantities from which the gates are computed. Sites without gates do not change.
    """
    return replace(module, sites=tuple(_defer_site(module, site) for site in module.sites))


def _defer_site(module: ModuleInfo, site: Site) -> Site:
    if not set(GATES) & set(site.quantities):
        return site
    stored = {"hidden"} if _input_is_recorded(module, site) else {"hidden", "input"}
    return replace(
        site,
        quantities=tuple(name for name in QUANTITIES if name in stored),
        derived=tuple(name for name in site.quantities if name not in stored),
    )


def _input_is_recorded(module: ModuleInfo, site: Site) -> bool:
    """Whether the input of a site always equals the recorded states of the layer below."""
    below = [each for each in module.sites if each.layer == site.layer - 1]
    return len(below) == (2 if module.bidirectional else 1) and not module.dropout


def apply_options(selections: Sequence[SelectedModule], options: Options) -> list[SelectedModule]:
    """Return the selected modules with the options applied to their descriptions."""
    return [
        replace(each, description=_apply_to_module(each.description, options))
        for each in selections
    ]


def _apply_to_module(module: ModuleInfo, options: Options) -> ModuleInfo:
    if options.dtype is not None:
        module = replace(module, dtype=options.dtype)
    if options.units is not None:
        sites = (
            replace(site, units=_units(site, module.hidden_size, options.units))
            for site in module.sites
        )
        module = replace(module, sites=tuple(sites))
    return defer_gates(module) if options.gates == "deferred" else module


def _units(site: Site, size: int, asked: slice | tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the indices of the units from 0; None if they are all units in order."""
    if isinstance(asked, slice):
        units = range(size)[asked]
        if not units:
            raise OptionError(f"units: expected some of {site.name}, which has {size}: found none")
        return None if units == range(size) else tuple(units)
    found: dict[int, int] = {}
    for number in asked:
        if not -size <= number < size:
            raise OptionError(
                f"units: expected numbers of units of {site.name}, which has {size}: found {number}"
            )
        unit = number % size
        if unit in found:
            raise OptionError(
                f"units: expected each unit of {site.name} once: found {found[unit]} and {number}"
            )
        found[unit] = number
    return None if list(found) == list(range(size)) else tuple(found)


def make_partial_replay(module: ModuleInfo, site: Site) -> PartialReplay | None:
    """Return a replay of just the requested gates and units; None if all are requested."""
    gates = [name for name in GATES if name in site.quantities]
    if required_gates(gates) == set(GATES) and site.units is None:
        return None
    units = range(module.hidden_size) if site.units is None else site.units
    stored: torch.dtype = getattr(torch, module.dtype)
    return PartialReplay(module.hidden_size, gates, units, site.reverse, stored)
