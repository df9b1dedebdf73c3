"""Analyses of recorded gates and states: arrays in, frozen results out.

Every analysis takes a site of a trace, `trace["l0"]`, or a `SiteArrays`, and returns a frozen
dataclass. Nothing is imported until it is first used, so torch, SciPy and scikit-learn are loaded
only by the analyses that need them.

Examples:
    >>> import numpy as np
    >>> from grutrace.analysis import SiteArrays, saturation
    >>> update = np.array([[0.05, 0.5], [0.95, 0.5], [0.95, 0.5], [0.95, 0.5]])
    >>> saturation(SiteArrays(update=update)).right["update"]
    array([0.75, 0.  ])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grutrace.analysis.comparison.change import change as change
    from grutrace.analysis.comparison.stages import stages as stages
    from grutrace.analysis.comparison.trace_diff import compare as compare
    from grutrace.analysis.descriptive.geometry import geometry as geometry
    from grutrace.analysis.descriptive.moments import moments as moments
    from grutrace.analysis.descriptive.quantiles import quantiles as quantiles
    from grutrace.analysis.descriptive.quantization import quantization as quantization
    from grutrace.analysis.descriptive.saturation import saturation as saturation
    from grutrace.analysis.descriptive.stuck_units import stuck_units as stuck_units
    from grutrace.analysis.dynamics.fixed_points import fixed_points as fixed_points
    from grutrace.analysis.dynamics.jacobian import jacobian as jacobian
    from grutrace.analysis.dynamics.jacobian import step_jacobians as step_jacobians
    from grutrace.analysis.dynamics.lyapunov import lyapunov as lyapunov
    from grutrace.analysis.dynamics.modes import modes as modes
    from grutrace.analysis.engine.map_reduce import with_dask as with_dask
    from grutrace.analysis.engine.site_data import SiteArrays as SiteArrays
    from grutrace.analysis.labels.probe import probe as probe
    from grutrace.analysis.labels.segmentation import gate_activation as gate_activation
    from grutrace.analysis.labels.segmentation import label_boundaries as label_boundaries
    from grutrace.analysis.labels.segmentation import score_boundaries as score_boundaries
    from grutrace.analysis.labels.selectivity import selectivity as selectivity
    from grutrace.analysis.memory.age import state_age as state_age
    from grutrace.analysis.memory.autocorrelation import autocorrelation as autocorrelation
    from grutrace.analysis.memory.decomposition import decompose as decompose
    from grutrace.analysis.memory.decomposition import memory_map as memory_map
    from grutrace.analysis.memory.gradients import gradients as gradients
    from grutrace.analysis.memory.timescales import fit_inverse_gamma as fit_inverse_gamma
    from grutrace.analysis.memory.timescales import timescales as timescales
    from grutrace.analysis.memory.update_sparsity import update_sparsity as update_sparsity
    from grutrace.analysis.verification.verify import verify as verify

#: The module of each name, relative to this package.
_MODULES = {
    "SiteArrays": "engine.site_data",
    "autocorrelation": "memory.autocorrelation",
    "change": "comparison.change",
    "compare": "comparison.trace_diff",
    "decompose": "memory.decomposition",
    "fit_inverse_gamma": "memory.timescales",
    "fixed_points": "dynamics.fixed_points",
    "gate_activation": "labels.segmentation",
    "geometry": "descriptive.geometry",
    "gradients": "memory.gradients",
    "jacobian": "dynamics.jacobian",
    "label_boundaries": "labels.segmentation",
    "lyapunov": "dynamics.lyapunov",
    "memory_map": "memory.decomposition",
    "modes": "dynamics.modes",
    "moments": "descriptive.moments",
    "probe": "labels.probe",
    "quantiles": "descriptive.quantiles",
    "quantization": "descriptive.quantization",
    "saturation": "descriptive.saturation",
    "score_boundaries": "labels.segmentation",
    "selectivity": "labels.selectivity",
    "stages": "comparison.stages",
    "state_age": "memory.age",
    "step_jacobians": "dynamics.jacobian",
    "stuck_units": "descriptive.stuck_units",
    "timescales": "memory.timescales",
    "update_sparsity": "memory.update_sparsity",
    "verify": "verification.verify",
    "with_dask": "engine.map_reduce",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module 'grutrace.analysis' has no attribute {name!r}")
    value = getattr(import_module(f"grutrace.analysis.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
