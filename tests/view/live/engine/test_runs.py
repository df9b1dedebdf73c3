"""Which files are one run, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import grutrace
from grutrace import OptionError, TraceFileError
from grutrace.view.live.engine.runs import find_runs, open_error


def record(path: Path, **options: object) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(2, 3)
    with torch.no_grad(), grutrace.trace(layer, path, **options):
        layer(torch.randn(4, 2, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.h5", "a.h5"):
        record(tmp_path / name)
    for rank in range(2):
        record(tmp_path / "many.h5", shard=(rank, 2))
    (tmp_path / "notes.txt").write_text("not a trace")
    return tmp_path


def test_a_folder_stands_for_its_runs(folder: Path) -> None:
    runs = find_runs(folder)
    assert runs.names == ("a.h5", "b.h5", "many")
    assert len(runs["many"].trace["l0"]) == 4
    assert len(runs["a.h5"].trace["l0"]) == 2
    runs.close()


def test_files_shards_and_globs(folder: Path) -> None:
    for paths in (
        str(folder / "many.rank*.h5"),
        sorted(folder.glob("many.rank*.h5")),
        [folder / "many.rank0000.h5", str(folder / "many.rank*.h5")],
    ):
        runs = find_runs(paths)
        assert runs.names == ("many",)
        assert len(runs["many"].trace["l0"]) == 4
        runs.close()
    two = find_runs([folder / "a.h5", folder / "b.h5"])
    assert two.names == ("a.h5", "b.h5")


def test_runs_of_one_name_have_their_folder(folder: Path) -> None:
    (folder / "other").mkdir()
    record(folder / "other" / "a.h5")
    runs = find_runs([folder / "a.h5", folder / "other"])
    assert runs.names == (str(folder / "a.h5"), str(folder / "other" / "a.h5"))


def test_an_open_trace_is_a_run(folder: Path) -> None:
    with grutrace.open(folder / "a.h5") as trace:
        assert find_runs(trace)["trace"].trace is trace


def test_later_parts_are_read_with_the_first(folder: Path) -> None:
    (folder / "a.part0002.h5").write_bytes(b"")
    (folder / "alone.part0002.h5").write_bytes(b"")
    assert find_runs(folder).names == ("a.h5", "alone.part0002.h5", "b.h5", "many")


def test_what_does_not_exist_is_refused(folder: Path) -> None:
    for path in (folder / "missing.h5", folder / "missing.rank*.h5"):
        with pytest.raises(TraceFileError, match="does not exist, and no file matches it"):
            find_runs(path)
    (folder / "empty").mkdir()
    with pytest.raises(TraceFileError, match="has no trace files: expected files that end in"):
        find_runs(folder / "empty")
    with pytest.raises(OptionError, match="expected a trace file, a glob or a folder; found none"):
        find_runs([])
    with pytest.raises(OptionError, match="path: expected the path of a file"):
        find_runs([3])  # type: ignore[list-item]


def test_only_the_named_files_are_runs(folder: Path) -> None:
    runs = find_runs(folder / "a.h5")
    for name in ("b.h5", str(folder / "b.h5"), "../a.h5", ""):
        with pytest.raises(OptionError, match="run: expected one of the runs of this view"):
            runs[name]
    runs.close()


def test_one_bad_file_among_several_is_named_when_it_is_shown(folder: Path) -> None:
    (folder / "bad.h5").write_bytes(b"nothing")
    runs = find_runs(folder)
    assert open_error(runs["a.h5"]) is None
    assert "bad.h5" in (open_error(runs["bad.h5"]) or "")
    runs.close()
    with pytest.raises(TraceFileError):
        find_runs(folder / "bad.h5")


def test_a_growing_file_is_followed(tmp_path: Path) -> None:
    layer = nn.GRU(2, 3)
    with torch.no_grad(), grutrace.Tracer(layer, tmp_path / "live.h5") as tracer:
        run = find_runs(tmp_path / "live.h5")["live.h5"]
        assert not run.refresh()
        layer(torch.randn(4, 2, 2))
        tracer.flush()
        run._next_refresh = 0
        assert run.refresh()
        assert len(run.trace["l0"]) == 2
        assert not run.refresh()
    run._next_refresh = 0
    assert run.refresh()
    assert run.trace.closed
    assert not run.refresh()
    run.close()
