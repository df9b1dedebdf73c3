"""Thousands of hostile files: each gives a clear error or is read correctly.

`python -m tools.hostile` judges more of them.
"""

from __future__ import annotations

import os
import random
import subprocess

import h5py
import pytest

import grutrace
from tests import forks
from tools.hostile import datasets, groups, judge, seeds
from tools.hostile.cases import _REFUSED, _paths, make
from tools.hostile.checksums import lookup3, put_right, structures
from tools.hostile.corpus import all_outcomes, counts, said_from_outside
from tools.hostile.spot import Spot

#: `tools/nightly.sh` judges the first 2000 cases of this seed, and many of another.
CASES = 700
SEED = 1


@pytest.mark.slow
@pytest.mark.measures
def test_the_corpus():
    result = list(all_outcomes(SEED, 0, CASES, jobs=2))
    number = counts(result)
    assert [outcome for outcome in result if outcome.outcome == "fault"] == []
    # Where HDF5 itself crashes or hangs, the look from outside says so; or it did while it was made
    # to write the file, or in the plain reader, in what grutrace does not read.
    for outcome in result:
        if outcome.outcome in ("crash", "hang") and not outcome.detail.startswith("plain"):
            assert "HDF5" in said_from_outside(SEED, outcome.number), outcome
    settled = {outcome.number for outcome in result if outcome.outcome != "late"}
    assert settled == set(range(CASES))
    assert number["refused"] > CASES // 2
    assert number["read"] > CASES // 10
    assert number["crash"] + number["hang"] + number["unmade"] < CASES // 100


def test_each_change_can_be_made(tmp_path):
    """h5py makes each change in some file."""
    os.mkfifo(tmp_path / "pipe")
    for kind, changes in ((h5py.Dataset, datasets.CHANGES), (h5py.Group, groups.CHANGES)):
        for name, change in changes.items():
            rng, made = random.Random(name), False
            for _ in range(20):
                path = seeds.put("decoder", tmp_path / "run.h5")
                with h5py.File(path, "r+", libver=("v110", "v110")) as file:
                    target = rng.choice(_paths(file, kind))
                    try:
                        change(Spot(file, target, rng, tmp_path / "pipe"))
                        made = True
                    except _REFUSED:
                        pass
            assert made, name


def test_a_case_is_reproducible(tmp_path):
    contents = []
    for number in (8, 10, 13, 15):
        for turn in "ab":
            folder = tmp_path / f"{number}{turn}"
            folder.mkdir()
            contents.append((make(7, number, folder), (folder / "run.h5").read_bytes()))
    assert contents[::2] == contents[1::2]


@pytest.mark.parametrize("name", ["decoder", "statistics"])
def test_cut_at_every_page(name, tmp_path):
    content, path = seeds.content(name), tmp_path / "run.h5"
    load = grutrace.open if name == "decoder" else grutrace.Statistics.load
    for length in range(0, len(content), 4096):
        path.write_bytes(content[:length])
        with pytest.raises(grutrace.TraceFileError, match=r"run\.h5"):
            load(path)


def test_the_checksum_equals_hdf5s(tmp_path):
    # The author's own example.
    assert lookup3(b"Four score and seven years ago") == 0x17770551
    path = tmp_path / "run.h5"
    content = bytearray(seeds.content("decoder"))
    sound = list(structures(bytes(content)))
    assert {bytes(content[start : start + 4]) for start, _ in sound} == {
        *(b"\x89HDF", b"OHDR", b"OCHK", b"EAHD", b"EAIB", b"BTHD", b"BTLF", b"FRHP")
    }
    refused = {True: [], False: []}
    for start, end in sound:
        spoilt = content.copy()
        spoilt[end - 1] ^= 1
        for believed in (False, True):
            if believed:
                put_right(spoilt, start, end)
            path.write_bytes(spoilt)
            try:
                grutrace.open(path).close()
            except grutrace.TraceFileError as error:
                refused[believed].append("checksum" in str(error))
    # Some structures are not needed to open a file; of the others HDF5 looks at the checksum first.
    # What is believed may lead to other bytes, which are no such structure.
    assert sum(refused[False]) > len(sound) // 3
    assert sum(refused[True]) < sum(refused[False]) // 2


def test_control_the_pipe_blocks_a_reader(tmp_path):
    """A reader that follows a link out of the file never returns."""
    os.mkfifo(tmp_path / "pipe")
    path = seeds.put("decoder", tmp_path / "run.h5")
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        rng = random.Random(0)
        datasets.CHANGES["an external link"](Spot(file, "calls", rng, tmp_path / "pipe"))
    follow = f"import h5py; h5py.File({str(path)!r})['calls']"
    with pytest.raises(subprocess.TimeoutExpired):
        forks.run("-c", follow, timeout=2)
    with pytest.raises(grutrace.TraceFileError, match="ExternalLink"):
        grutrace.open(path)


def judged(folder, *commands):
    seeds.put("decoder", folder / "run.h5")
    return judge.judge(folder, lambda _: None, commands)


def test_control_the_judge_detects_faults(tmp_path, monkeypatch, capsys):
    assert judged(tmp_path, "info").outcome == "read"

    def spoilt(trace):
        result = everything(trace)
        result["sites"]["rnn.l0"]["rows"]["update"][3, 1] += 1e-3
        return result

    everything = judge.everything
    monkeypatch.setattr(judge, "everything", spoilt)
    assert judged(tmp_path).outcome == "fault"
    for error in (ZeroDivisionError("x"), grutrace.TraceFileError("no name")):

        def raises(trace, error=error):
            raise error

        monkeypatch.setattr(judge, "everything", raises)
        assert judged(tmp_path).outcome == "fault"
    monkeypatch.setattr(judge, "everything", everything)
    monkeypatch.setattr(judge, "main", lambda _: 3)
    assert judged(tmp_path, "info").outcome == "fault"
    monkeypatch.setattr(judge, "main", lambda _: print("\x1b[2J") or 0)
    assert judged(tmp_path, "info").outcome == "fault"
