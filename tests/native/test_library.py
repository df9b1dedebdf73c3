"""The compiled library is there, is what the environment asks for, and is not needed."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grutrace.native import library
from tests.instruction_sets import INSTRUCTION_SETS

ROOT = Path(library.__file__).parents[2]


@pytest.mark.skipif(
    not shutil.which("cc") or os.environ.get(library.VARIABLE) == library.NONE,
    reason="there is no compiler, or no library is wanted",
)
def test_where_there_is_a_compiler_there_is_a_library() -> None:
    assert "portable" in INSTRUCTION_SETS or "neon" in INSTRUCTION_SETS


def test_the_environment_chooses(instruction_set) -> None:
    assert library.instruction_set() == instruction_set
    assert (library.load() is None) == (instruction_set == "none")


def test_an_unknown_instruction_set_is_one_warning(monkeypatch, caplog) -> None:
    if INSTRUCTION_SETS == ("none",):
        pytest.skip("there is no library")
    monkeypatch.setenv(library.VARIABLE, "mmx")
    library.load.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert library.load() is None
        assert library.load() is None
    library.load.cache_clear()
    (record,) = caplog.records
    assert "GRUTRACE_COMPILED: expected the name of an instruction set" in record.message
    assert "'mmx'" in record.message


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_a_library_that_does_not_load_is_not_used(content, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    if content is not None:
        (tmp_path / "lib").mkdir()
        for suffix in ("so", "dll", "dylib"):
            (tmp_path / "lib" / f"kernels.{suffix}").write_bytes(content)
    monkeypatch.delenv(library.VARIABLE, raising=False)
    library.load.cache_clear()
    assert library.load() is None
    library.load.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no compiler")
def test_the_functions_under_sanitizers(tmp_path) -> None:
    """A program in C calls every function; the sanitizers end it at a wrong access or overflow."""
    program = tmp_path / "program"
    flags = "-O1 -g -std=c11 -Wno-psabi -ffp-contract=off -fsanitize=address,undefined"
    source = Path(__file__).with_name("sanitized.c")
    subprocess.run(
        ["cc", *flags.split(), "-fno-sanitize-recover=all", "-I", str(ROOT / "grutrace/native")]
        + [str(source), "-o", str(program), "-lm"],
        check=True,
    )
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "all functions ran"
    # The control: the same program reads one value past a row.
    broken = subprocess.run([str(program), "broken"], capture_output=True, text=True, check=False)
    assert broken.returncode
    assert "AddressSanitizer: heap-buffer-overflow" in broken.stderr


def test_structures_have_the_sizes_of_c(tmp_path) -> None:
    if not shutil.which("cc"):
        pytest.skip("there is no compiler")
    names = {
        "count_options": library.CountOptions,
        "gate_copy": library.GateCopy,
        "copy_plan": library.CopyPlan,
        "replay_block": library.ReplayBlock,
        "call_series": library.CallSeries,
        "direction_steps": library.DirectionSteps,
    }
    prints = "".join(f'printf("%zu\\n", sizeof({name}));' for name in names)
    (tmp_path / "sizes.c").write_text(
        f'#include <stdio.h>\n#include "{ROOT}/grutrace/native/kernels.c"\n'
        f"int main(void) {{ {prints} return 0; }}\n"
    )
    program = str(tmp_path / "sizes")
    compile_it = ["cc", "-std=c11", "-Wno-psabi", str(tmp_path / "sizes.c"), "-o", program, "-lm"]
    subprocess.run(compile_it, check=True)
    sizes = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert list(map(int, sizes)) == list(map(ctypes.sizeof, names.values()))


def test_the_library_is_loaded_without_torch() -> None:
    code = "import sys, grutrace.native.library as l; l.load(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
