"""The names of bokeh that a page uses, each imported when it is first used.

bokeh is an extra. So the modules of the page can be imported without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "bokeh.application": ("Application",),
    "bokeh.application.handlers.function": ("FunctionHandler",),
    "bokeh.core.property.descriptors": ("UnsetValueError",),
    "bokeh.events": ("MouseMove", "SelectionGeometry", "Tap"),
    "bokeh.layouts": ("column", "row"),
    "bokeh.models": (
        *("BoxAnnotation", "BoxSelectTool", "Button", "ColorBar", "ColumnDataSource", "CustomJS"),
        *("CustomJSTickFormatter", "Div", "FixedTicker", "LinearColorMapper", "RadioButtonGroup"),
        *("Range1d", "Select", "Slider", "Span", "Spinner", "TextInput", "Toggle"),
    ),
    "bokeh.palettes": ("Blues256", "Category20_20", "Cividis256", "Colorblind8", "interp_palette"),
    "bokeh.plotting": ("figure",),
    "bokeh.resources": ("Resources",),
    "bokeh.server.server": ("BaseServer",),
    "bokeh.server.tornado": ("BokehTornado",),
    "bokeh.server.views.static_handler": ("StaticHandler",),
}

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
