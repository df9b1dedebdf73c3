"""The public names of the package, and the modules that importing it loads."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import grutrace

TORCH_FREE = [
    "import grutrace",
    "import grutrace; grutrace.open; grutrace.Trace",
    "import grutrace.storage.write.file_sink",
    "import grutrace.analysis.descriptive.saturation",
    "import grutrace.analysis.comparison",
    "import grutrace; grutrace.Statistics()",
    "import grutrace.cli",
]


def loads_torch(code: str) -> bool:
    check = f"{code}\nimport sys\nsys.exit('torch' in sys.modules)"
    return bool(subprocess.run([sys.executable, "-c", check], check=False).returncode)


@pytest.mark.parametrize("code", TORCH_FREE)
def test_reading_loads_no_torch(code: str) -> None:
    assert not loads_torch(code)


def test_control_tracing_loads_torch() -> None:
    assert loads_torch("import grutrace; grutrace.trace")


def test_reading_a_file_loads_no_torch(tmp_path: Path) -> None:
    import torch

    layer = torch.nn.GRU(2, 3)
    with grutrace.trace(layer, tmp_path / "run.h5"):
        layer(torch.randn(4, 2))
    read = f"import grutrace; print(grutrace.open({str(tmp_path / 'run.h5')!r})['l0'].update[:])"
    assert not loads_torch(read)


def test_every_public_name_exists() -> None:
    assert sorted(grutrace.__all__) == grutrace.__all__
    assert dir(grutrace) == grutrace.__all__
    for name in grutrace.__all__:
        assert getattr(grutrace, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'tracer_of_bullets'"):
        _ = grutrace.tracer_of_bullets


def test_dunder_all_lists_exactly_the_public_objects() -> None:
    for name in grutrace.__all__:
        getattr(grutrace, name)  # Names that are imported when first used are there afterwards.
    public = {
        name
        for name, value in vars(grutrace).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("grutrace.")
    }
    assert public == set(grutrace.__all__) - {"__version__"}
    assert set(grutrace._LAZY) < set(grutrace.__all__)


def test_the_example_of_the_package_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(grutrace)
    assert results.attempted
    assert not results.failed
