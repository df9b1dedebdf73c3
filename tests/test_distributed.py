"""Several processes trace one training run. Each writes a shard; the shards read as one trace."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import grutrace
from grutrace import distributed
from grutrace.__main__ import main
from grutrace.analysis.verification.verify import verify
from grutrace.errors import OptionError
from tests import forks, oracles
from tests.checks import EVERYTHING
from tests.distributed_worker import KILLED, STEPS
from tests.plain_reader import PlainTrace

#: The trained files are made once, not once per worker.
pytestmark = pytest.mark.xdist_group("distributed")

ROOT = Path(__file__).parents[1]
RANKS = 3
EPS = float(np.finfo(np.float32).eps)


def torchrun(processes, *arguments, folder=ROOT):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(processes), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@contextlib.contextmanager
def ranks(*arguments):
    """Forks with the environment of torchrun's processes. A test below runs torchrun itself."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as running:
        programs = []
        for rank in range(RANKS):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
            program = forks.start(*arguments, env=os.environ | shared | own)
            programs.append(running.enter_context(program))
            running.callback(program.kill)
        yield programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with ranks("-m", "tests.distributed_worker", folder, "train") as programs:
        assert [program.wait(120) for program in programs] == [0] * RANKS
    return folder


def test_each_rank_writes_its_own_shard(folder) -> None:
    result = sorted(path.name for path in folder.glob("*.h5"))
    names = [f"{what}.rank{r:04}.h5" for what in ("early", "run", "stats") for r in range(RANKS)]
    assert result == ["alone.h5", *names]
    ids = set()
    for rank in range(RANKS):
        stamp = PlainTrace(folder / f"run.rank{rank:04}.h5").options["shard"]
        assert (stamp["rank"], stamp["world_size"]) == (rank, RANKS)
        ids.add(stamp["id"])
        early = PlainTrace(folder / f"early.rank{rank:04}.h5").options["shard"]
        assert early == {"rank": rank, "world_size": RANKS, "id": None}
    (run,) = ids
    assert len(run) == 32
    assert "shard" not in PlainTrace(folder / "alone.h5").options


def test_the_trace_of_all_ranks_equals_their_traces_in_memory(folder) -> None:
    with grutrace.open(folder / "run.rank*.h5") as trace:
        for name in trace.sites:
            memory = [np.load(folder / f"memory{rank}.npz") for rank in range(RANKS)]
            for quantity in EVERYTHING:
                expected = np.concatenate([arrays[f"{name}/{quantity}"] for arrays in memory])
                np.testing.assert_array_equal(trace[name].rows(quantity), expected)
            for what in ("initial", "lengths"):
                expected = np.concatenate([arrays[f"{name}/{what}"] for arrays in memory])
                np.testing.assert_array_equal(getattr(trace[name], what), expected)
        assert trace.calls["tag"].tolist() == [f"rank {rank}" for rank in trace.calls["rank"]]
        calls = np.bincount(trace.calls["rank"])
        assert calls.tolist() == [4 * STEPS] * RANKS
        assert all(result.holds and result.check == "gates" for result in verify(trace))


def check_against_the_oracle(trace, folder) -> None:
    """Every gate of every rank, from the untraced run's inputs, outputs and weights alone."""
    sequences = {name: iter(trace[name]) for name in trace.sites}
    for rank in range(RANKS):
        for step in range(STEPS):
            seen = np.load(folder / f"untraced{rank}.{step}.npz")
            for row in range(2 + rank):
                x, encoded, states = (seen[name][row] for name in ("x", "encoded", "states"))
                forward, reverse = np.split(encoded, 2, axis=1)
                read = {
                    "encoder.l0": (x, forward, "encoder", "_l0"),
                    "encoder.l0_reverse": (x, reverse, "encoder", "_l0_reverse"),
                    "decoder.cell": (encoded[:3], states, "decoder", ""),
                }
                for name, (inputs, hidden, module, ending) in read.items():
                    weights = {
                        w: seen[f"{module}.{w}{ending}"]
                        for w in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                    }
                    start = np.zeros(hidden.shape[1], np.float32)
                    previous = oracles.previous_states(hidden, start, name.endswith("reverse"))
                    expected = oracles.gates(weights, inputs, previous, EPS)
                    sequence = next(sequences[name])
                    np.testing.assert_array_equal(sequence.hidden, hidden)
                    for gate in oracles.GATES:
                        off = np.abs(sequence.rows(gate) - expected.values[gate])
                        assert (off <= expected.bounds[gate]).all(), (name, gate)
    assert [next(sequence, None) for sequence in sequences.values()] == [None] * 3


def test_every_gate_equals_the_oracle(folder) -> None:
    with grutrace.open(folder / "run.rank*.h5") as trace:
        check_against_the_oracle(trace, folder)


def test_control_another_order_of_the_ranks_is_detected(folder) -> None:
    with grutrace.open(folder / "run.rank*.h5") as trace:
        reads = trace.snapshot.source
        reads._module_rows = [rows[::-1] for rows in reads._module_rows]
        with pytest.raises(AssertionError):
            check_against_the_oracle(trace, folder)


def test_the_commands_accept_shards_and_merged_files(folder, tmp_path, capsys) -> None:
    """However the shell gives them."""
    pattern = str(folder / "run.rank*.h5")
    paths = [str(folder / f"run.rank{rank:04}.h5") for rank in range(RANKS)]
    merged = str(folder / "run.h5")
    assert main(["merge", *paths, "-o", merged]) == 0
    assert "36 calls of ranks 0, 1, 2\nrows stay in 3 other files" in capsys.readouterr().out
    copied = str(tmp_path / "copy.h5")
    assert main(["merge", pattern, "-o", copied, "--copy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["copied"] > 0
    with grutrace.open(merged) as one, grutrace.open(copied) as other:
        check_against_the_oracle(one, folder)
        check_against_the_oracle(other, folder)
    answers = []
    for files in ([pattern], paths, [merged], [copied]):
        assert main(["info", *files, "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert [shard["rank"] for shard in about["shards"]] == list(range(RANKS))
        assert [shard["calls"] for shard in about["shards"]] == [12] * RANKS
        assert main(["info", *files]) == 0
        assert "of 3 ranks: 0 (12 calls), 1 (12 calls), 2 (12 calls)" in capsys.readouterr().out
        assert main(["verify", *files]) == 0
        capsys.readouterr()
        assert main(["stats", *files, "--json"]) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1
    assert main(["info", paths[1]]) == 0
    assert "rank 1 of 3" in capsys.readouterr().out
    assert main(["merge", pattern, "-o", merged]) == 2
    assert "run.h5 exists" in capsys.readouterr().err


def test_xarray_reads_a_merged_file(folder, tmp_path) -> None:
    """Through h5netcdf, without grutrace; where it is installed."""
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    path = folder / "xarray.h5"
    assert main(["merge", str(folder / "run.rank*.h5"), "-o", str(path)]) == 0
    group = "modules/encoder/l0"
    with (
        xarray.open_dataset(path, group=group, engine="h5netcdf", phony_dims="sort") as dataset,
        grutrace.open(path) as trace,
    ):
        np.testing.assert_array_equal(dataset["update"], trace["encoder.l0"].update)


def test_statistics_of_each_rank_are_merged(folder, tmp_path, capsys) -> None:
    paths = [folder / f"stats.rank{rank:04}.h5" for rank in range(RANKS)]
    output = tmp_path / "stats.h5"
    assert main(["merge", *map(str, paths), "-o", str(output)]) == 0
    capsys.readouterr()
    with grutrace.open(folder / "run.rank*.h5") as trace:
        expected = grutrace.Statistics.of(trace)
    result = grutrace.Statistics.load(output)
    assert (result.calls, result.sequences, result.steps) == (
        36,
        expected.sequences,
        expected.steps,
    )
    for name in expected:
        counts = [statistics[name].update.histogram for statistics in (result, expected)]
        np.testing.assert_array_equal(*counts)
    assert main(["stats", *map(str, paths), "--json"]) == 0
    together = capsys.readouterr().out
    assert main(["stats", str(output), "--json"]) == 0
    assert json.loads(together) == json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    with ranks("-m", "tests.distributed_worker", folder, "killed") as programs:
        assert programs[KILLED].wait(120) == -signal.SIGKILL
        # So torchrun ends the others.
        for program in programs:
            program.terminate()
    return folder


def test_acknowledged_calls_of_a_killed_rank_are_read(killed) -> None:
    with grutrace.open(killed / "run.rank*.h5") as trace:
        shards = trace.snapshot.tables.shards
        assert [shard.rank for shard in shards] == list(range(RANKS))
        assert not shards[KILLED].closed
        acknowledged = [int((killed / f"{rank}.calls").read_text()) for rank in range(RANKS)]
        assert acknowledged[KILLED] == 5 * 4 * STEPS
        for file, count in zip(shards, acknowledged, strict=True):
            assert file.calls >= count
        assert all(result.holds and result.check == "gates" for result in verify(trace))


def test_shards_of_a_killed_rank_are_merged(killed, capsys) -> None:
    pattern, merged = str(killed / "run.rank*.h5"), killed / "run.h5"
    assert main(["info", pattern]) == 0
    assert re.search(rf"not closed by rank .*\b{KILLED}\b", capsys.readouterr().out)
    assert main(["merge", pattern, "-o", str(merged)]) == 0
    assert f"run.rank{KILLED:04}.h5" in capsys.readouterr().out
    plain = PlainTrace(merged, swmr=False)
    with grutrace.open(pattern) as trace:
        for module in plain.modules:
            for site in module.sites.values():
                for quantity, rows in site.rows.items():
                    np.testing.assert_array_equal(rows, trace[site.name].rows(quantity))
        assert len(plain.calls) == len(trace.calls)
    assert main(["verify", str(merged)]) == 0


SCRIPT = """
import sys
import torch
import torch.distributed as dist
sys.path.append({root!r})
from tests.distributed_worker import Tagger, steps, parallel
dist.init_process_group("gloo")
steps(parallel(Tagger()), dist.get_rank())
torch.nn.GRU(2, 3)(torch.randn(4, 2))
# One write: each rank's line stays whole where both share a pipe.
sys.stdout.write(f"trained {{sys.argv[1:]}} {{__name__}}\\n")
dist.destroy_process_group()
"""


def test_a_script_that_torchrun_starts_is_traced_unchanged(tmp_path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    run = ["-m", "grutrace", "run", "-o", "run.h5"]
    done = torchrun(2, *run, "script.py", "--mine", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained ['--mine'] __main__") == 2
    for rank in range(2):
        message = (
            f"grutrace: recorded 13 calls of 4 sites in run.rank{rank:04}.h5 and 1 file beside it"
        )
        assert message in done.stderr
    files = ["run.rank0000.h5", "run.rank0000.part0002.h5"]
    files += [name.replace("rank0000", "rank0001") for name in files]
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == sorted(files)
    with grutrace.open(tmp_path / "run.rank*.h5") as trace:
        assert trace.closed
        assert np.bincount(trace.calls["rank"]).tolist() == [13, 13]
        assert trace.sites == (
            "module.encoder.l0",
            "module.encoder.l0_reverse",
            "module.decoder.cell",
            "l0",
        )
        assert all(result.holds for result in verify(trace))
        assert len(trace.options["shards"]["id"]) == 32
    # Each rank refuses before the script starts what it may not replace.
    told = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, *run, "script.py"],
        cwd=tmp_path,
        env=os.environ | told,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "run.rank0001.h5 exists" in done.stderr


def in_processes(count, folder, work) -> None:
    """Run it in forked processes of one group, which no torchrun has started."""
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    dist.init_process_group(
                        "gloo",
                        init_method=f"file://{folder}/store",
                        rank=rank,
                        world_size=count,
                    )
                    work(rank)
                    dist.barrier()
                    code = 0
                except BaseException:
                    traceback.print_exc()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * count


def test_a_rank_without_a_tracer_blocks_no_other(tmp_path) -> None:
    def work(rank: int) -> None:
        if rank != 1:
            with grutrace.Tracer(nn.GRU(2, 3), tmp_path / "run.h5", recording=False):
                pass

    in_processes(3, tmp_path, work)
    with pytest.warns(grutrace.GrutraceWarning, match="of 3 ranks there is no file of 1"):
        trace = grutrace.open(tmp_path / "run.rank*.h5")
    with trace:
        assert len(trace.options["shards"]["id"]) == 32


def test_each_run_has_its_own_id(tmp_path) -> None:
    def work(rank: int) -> None:
        with grutrace.Tracer(nn.GRU(2, 3), path, recording=False):
            pass

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "run.h5"
        in_processes(2, tmp_path / name, work)
    os.replace(tmp_path / "one" / "run.rank0001.h5", tmp_path / "two" / "run.rank0001.h5")
    with pytest.raises(grutrace.TraceFileError, match="are shards of different runs"):
        grutrace.open(tmp_path / "two" / "run.rank*.h5")


def test_an_unknown_launcher(tmp_path) -> None:
    layer = nn.GRU(2, 3)
    for rank in range(2):
        with grutrace.Tracer(layer, tmp_path / "run.h5", shard=(rank, 2), recording=False):
            pass
        statistics = grutrace.Statistics(tmp_path / "stats.h5")
        with grutrace.Tracer(layer, sink=statistics, shard=(rank, 2), recording=False):
            pass
    with grutrace.open(tmp_path / "run.rank*.h5") as trace:
        assert trace.options["shards"] == {
            "id": None,
            "world_size": 2,
            "of": [{"rank": 0}, {"rank": 1}],
        }
    assert sorted(path.name for path in tmp_path.glob("stats*")) == [
        "stats.rank0000.h5",
        "stats.rank0001.h5",
    ]


def test_deferred_shards_are_derived_into_one_file(tmp_path, capsys) -> None:
    """By rank in memory, and from the shards, and from what is merged of them."""
    torch.manual_seed(0)
    layer, inline = nn.GRU(2, 3, bidirectional=True), []
    for rank in range(2):
        x = torch.randn(5, 2 + rank, 2)
        with (
            grutrace.trace(layer, record=EVERYTHING, gates="inline") as memory,
            grutrace.trace(layer, tmp_path / "run.h5", shard=(rank, 2), gates="deferred"),
        ):
            layer(x)
        inline.append(memory)
    pattern, merged = str(tmp_path / "run.rank*.h5"), str(tmp_path / "run.h5")
    assert main(["merge", pattern, "-o", merged]) == 0
    for files, name in ((pattern, "one.h5"), (merged, "two.h5")):
        full = str(tmp_path / name)
        assert main(["derive", files, "-o", full]) == 0
        assert main(["verify", files]) == main(["verify", full]) == 0
        with grutrace.open(files) as trace, grutrace.open(full) as stored:
            assert stored.calls["rank"].tolist() == trace.calls["rank"].tolist() == [0, 1]
            assert stored.sequences["rank"].tolist() == [0, 0, 1, 1, 1]
            for site in stored.sites:
                expected = np.concatenate(
                    [np.asarray(recorded[site].update) for recorded in inline]
                )
                np.testing.assert_allclose(stored[site].update, expected, atol=1e-6)
                np.testing.assert_allclose(trace[site].update, expected, atol=1e-6)
                np.testing.assert_allclose(trace[site].sequence(4).update, expected[-5:], atol=1e-6)
    capsys.readouterr()


@pytest.mark.parametrize("option", [None, 1, "0", (2, 2), (-1, 2), (0, 1, 2), (0.5, 2), ("0", 2)])
def test_an_invalid_shard_option(option, tmp_path) -> None:
    with pytest.raises(OptionError, match=r"shard: expected True, False, or \(rank, world size\)"):
        grutrace.Tracer(nn.GRU(2, 3), tmp_path / "run.h5", shard=option)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2"}, distributed.Shard(1, 2)),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "2", "WORLD_SIZE": "2"}, None),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "x", "WORLD_SIZE": "2"}, None),
        ({"TORCHELASTIC_RUN_ID": "none"}, None),
    ],
)
def test_without_a_process_group_torchruns_variables_count(environment, expected) -> None:
    assert distributed._shard_from_torchrun(environment) == expected


def test_one_process_alone_writes_no_shard(tmp_path) -> None:
    def work(rank: int) -> None:
        with grutrace.Tracer(nn.GRU(2, 3), tmp_path / "run.h5", recording=False) as tracer:
            assert "shard" not in tracer.options

    in_processes(1, tmp_path, work)
    assert (tmp_path / "run.h5").exists()


def test_a_trace_in_memory_has_no_shard(tmp_path) -> None:
    def work(rank: int) -> None:
        with grutrace.Tracer(nn.GRU(2, 3), recording=False) as tracer:
            assert "shard" not in tracer.options

    in_processes(2, tmp_path, work)
