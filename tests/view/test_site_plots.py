"""Tests of the accessor `site.plot`: what it loads, and what it says without matplotlib."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from grutrace.storage.read.site import SiteTrace
from grutrace.view.plot_specs import PLOTS
from grutrace.view.site_plots import SitePlots
from tests.view.conftest import record


def run(code: str, folder) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


READ = "import sys, grutrace; site = grutrace.open('run.h5')['l0']; site.update[:]; site.plot; "


def test_matplotlib_and_torch_are_not_loaded_until_a_picture_is_drawn(tmp_path) -> None:
    record(tmp_path / "run.h5")
    check = "print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    assert run(READ + check, tmp_path).stdout == "False False\n"
    drawn = READ + "import matplotlib; matplotlib.use('Agg'); site.plot.heatmap(); " + check
    assert run(drawn, tmp_path).stdout == "True False\n"


def test_without_matplotlib_the_message_names_the_extra(tmp_path) -> None:
    record(tmp_path / "run.h5")
    code = "import sys; sys.modules['matplotlib'] = None; " + READ + "site.plot.heatmap()"
    error = run(code, tmp_path).stderr.splitlines()[-1]
    assert "MissingExtraError: site.plot.heatmap needs matplotlib" in error
    assert "pip install" in error


def test_each_picture_is_a_command_and_takes_its_options_and_axes() -> None:
    methods = {
        name: inspect.signature(value).parameters
        for name, value in vars(SitePlots).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert set(methods) == set(PLOTS)
    for name, spec in PLOTS.items():
        parameters = methods[name]
        assert parameters["ax"].default is None
        assert set(spec.options) - {"against"} <= set(parameters)
        assert set(spec.required) <= set(spec.options)
        needed = {
            key
            for key, parameter in parameters.items()
            if parameter.default is inspect.Parameter.empty
            and key != "self"
            and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
        }
        assert needed <= set(spec.required)


def test_the_repr_lists_the_pictures() -> None:
    assert "heatmap" in repr(record()["l0"].plot)


def test_control_an_attribute_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AttributeError, match="painting"):
        _ = record()["l0"].plot.painting
    assert "plot" in dir(SiteTrace)
