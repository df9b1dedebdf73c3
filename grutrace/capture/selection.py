"""Find the GRUs of a model, name their sites, and select the sites to record.

`defer_gates` selects the quantities to store if gates are computed on reading. A gate is a function
of the weights, the layer's input and the state before the step. The states of all layers are
stored. The input of a layer above the first equals the states of the layer below. So it is stored
only if the two may differ because of dropout, or if a direction of the layer below is not recorded.
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
from grutrace.capture.unsupported_grus import (
    describe_unsupported,
    find_unsupported_grus,
    is_complex,
)
from grutrace.errors import (
    GLOBS,
    GrutraceWarning,
    OptionError,
    UnsupportedError,
    join_names,
    short_repr,
    string_list,
    suggest_name,
    user_stacklevel,
)
from grutrace.gru.layout import numpy_type
from grutrace.gru.replay import PartialReplay, required_gates
from grutrace.records import DEFAULT_RECORD, GATES, LOG_PREFIX, QUANTITIES, ModuleInfo, Site

#: Whether the thread that writes may compute gates on a CPU. There it slows the model more than
#: gates="inline" does (docs/performance.md). Tests of the thread allow it, so they need no device.
BACKGROUND_ON_CPU = False


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
    modules = [
        SelectedModule(weakref.ref(module), _describe(path, module, quantities))
        for path, module in find_grus(model)
    ]
    unsupported = list(find_unsupported_grus(model))
    if not modules:
        reasons = f"; {describe_unsupported(unsupported)}" if unsupported else ""
        raise UnsupportedError(
            "expected a model with an nn.GRU or nn.GRUCell inside; "
            f"found none in {type(model).__qualname__}{reasons}"
        )
    if sites is not None:
        globs = string_list("sites", sites, GLOBS)
        modules = _matching_sites(modules, globs)
        unsupported = [gru for gru in unsupported if gru.matches(globs)]
    if unsupported:
        warnings.warn(
            describe_unsupported(unsupported), GrutraceWarning, stacklevel=user_stacklevel()
        )
    return modules


def records_gradient(selections: Sequence[SelectedModule]) -> bool:
    """Whether the gradient is among the recorded quantities."""
    return any(
        "gradient" in site.quantities
        for selection in selections
        for site in selection.description.sites
    )


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
    is_container = hint and not isinstance(model, type)
    description = f"a {type(model).__name__}" if is_container else short_repr(model)
    raise OptionError(f"model: expected an nn.Module, found {description}{hint}")


def _quantities(record: str | Sequence[str]) -> tuple[str, ...]:
    expected = f"names out of {', '.join(QUANTITIES)}"
    requested = string_list("record", record, expected)
    unknown = [name for name in requested if name not in QUANTITIES]
    if unknown:
        raise OptionError(
            f"record: expected {expected}; found {join_names(map(repr, unknown))}"
            f"{suggest_name(unknown[0], QUANTITIES)}"
        )
    if "gradient" in requested:
        # Total gradients, and those of gates, follow from it with these.
        requested += ["hidden", "input"]
    return tuple(name for name in QUANTITIES if name in requested)


def _matching_sites(modules: list[SelectedModule], globs: list[str]) -> list[SelectedModule]:
    """Return the modules that have a matching site, with their matching sites only."""
    names = [site.name for module in modules for site in module.description.sites]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise OptionError(
                f"sites: {glob!r} matches no site of the model{suggest_name(glob, names)}: "
                f"{join_names(names)}"
            )
    filtered = (_filter_sites(module, globs) for module in modules)
    return [module for module in filtered if module.description.sites]


def _filter_sites(selection: SelectedModule, globs: list[str]) -> SelectedModule:
    matching = tuple(
        site
        for site in selection.description.sites
        if any(fnmatchcase(site.name, glob) for glob in globs)
    )
    return replace(selection, description=replace(selection.description, sites=matching))


def _describe(path: str, module: nn.GRU | nn.GRUCell, quantities: tuple[str, ...]) -> ModuleInfo:
    """Return the description of a module, with all its sites."""
    is_cell = isinstance(module, nn.GRUCell)
    directions = 1 if isinstance(module, nn.GRUCell) or not module.bidirectional else 2
    dtype = _weights_dtype(module)
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


def _weights_dtype(module: nn.GRU | nn.GRUCell) -> torch.dtype:
    """Return the type of the weights. They may be plain tensors instead of parameters."""
    attributes = (value for value in vars(module).values() if isinstance(value, Tensor))
    tensors = (*module.parameters(), *module.buffers(), *attributes)
    dtypes = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def defer_gates(module: ModuleInfo) -> ModuleInfo:
    """Return the description of a module whose gates are computed on reading.

    It stores the quantities from which the gates are computed. Sites without gates do not change.
    """
    return replace(module, sites=tuple(_defer_site(module, site) for site in module.sites))


def _defer_site(module: ModuleInfo, site: Site) -> Site:
    if not {*GATES, "gradient"} & set(site.quantities):
        return site
    stored = {"hidden"} if _input_is_recorded(module, site) else {"hidden", "input"}
    stored |= {"gradient"} & set(site.quantities)
    return replace(
        site,
        quantities=tuple(name for name in QUANTITIES if name in stored),
        derived=tuple(name for name in site.quantities if name not in stored),
    )


def _input_is_recorded(module: ModuleInfo, site: Site) -> bool:
    """Whether the input of a site always equals the recorded states of the layer below."""
    below = [lower_site for lower_site in module.sites if lower_site.layer == site.layer - 1]
    return len(below) == (2 if module.bidirectional else 1) and not module.dropout


def apply_options(selections: Sequence[SelectedModule], options: Options) -> list[SelectedModule]:
    """Return the selected modules with the options applied to their descriptions.

    Raises:
        OptionError: A unit is not in a site, or a thread would compute gates on a CPU.
    """
    if options.gates == "background" and options.has_thread:
        _require_device(selections)
    return [
        replace(selection, description=_apply_to_module(selection.description, options))
        for selection in selections
    ]


def _require_device(selections: Sequence[SelectedModule]) -> None:
    """Require that a layer is not on the CPU, so that a thread may compute gates."""
    modules = [item.module for item in selections]
    devices = {w.device.type for module in modules if module for w in module.parameters()}
    if devices <= {"cpu"} and not BACKGROUND_ON_CPU:
        raise OptionError(
            "gates: expected 'inline' or 'deferred' for layers on a CPU, found 'background': the "
            "thread that writes would compute the gates on the processors that the model uses, "
            "which takes longer than gates='inline'. (Without a path, 'background' means that "
            "gates are computed when they are read)"
        )


def _apply_to_module(module: ModuleInfo, options: Options) -> ModuleInfo:
    if options.dtype is not None:
        module = replace(module, dtype=options.dtype)
    if options.units is not None:
        sites = (
            replace(site, units=_unit_indices(site, module.hidden_size, options.units))
            for site in module.sites
        )
        module = replace(module, sites=tuple(sites))
    module = defer_gates(module) if options.gates == "deferred" else module
    if options.log:
        names = tuple(LOG_PREFIX + name for name, _ in options.log)
        first, *others = module.sites
        first = replace(first, quantities=(*first.quantities, *names), logs=options.log)
        module = replace(module, sites=(first, *others))
    return module


def _unit_indices(
    site: Site, size: int, requested: slice | tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return the indices of the units from 0; None if they are all units in order."""
    if isinstance(requested, slice):
        units = range(size)[requested]
        if not units:
            raise OptionError(f"units: expected some of {site.name}, which has {size}: found none")
        return None if units == range(size) else tuple(units)
    # By unit, the number that the user gave, for the message about a unit that is given twice.
    numbers: dict[int, int] = {}
    for number in requested:
        if not -size <= number < size:
            raise OptionError(
                f"units: expected numbers of units of {site.name}, which has {size}: found {number}"
            )
        unit = number % size
        if unit in numbers:
            raise OptionError(
                f"units: expected each unit of {site.name} once: found {numbers[unit]} and {number}"
            )
        numbers[unit] = number
    return None if list(numbers) == list(range(size)) else tuple(numbers)


def make_partial_replay(module: ModuleInfo, site: Site) -> PartialReplay | None:
    """Return a replay of just the requested gates and units; None if all are requested."""
    gates = [name for name in GATES if name in site.quantities]
    if required_gates(gates) == set(GATES) and site.units is None:
        return None
    units = range(module.hidden_size) if site.units is None else site.units
    storage_dtype: torch.dtype = getattr(torch, module.dtype)
    return PartialReplay(module.hidden_size, gates, units, site.reverse, storage_dtype)
