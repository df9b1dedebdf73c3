"""Streams that take turns on one module: the state decides which sequence a call goes on with."""

from __future__ import annotations

import asyncio
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.capture.sequences import state_memory as states
from grutrace.capture.sequences.state_memory import FinalStates, StateMemory

BOTH = pytest.mark.parametrize("path", [None, "run.h5"])


@pytest.fixture
def cell() -> nn.GRUCell:
    torch.manual_seed(0)
    return nn.GRUCell(3, 4)


def step(cell: nn.GRUCell, state: torch.Tensor) -> torch.Tensor:
    return cell(torch.randn(len(state), 3), state)


def rows_of(streams: list[list[torch.Tensor]]) -> list[bytes]:
    """The states of each row of each stream, steps one after another."""
    return sorted(
        torch.stack(states)[:, row].numpy().tobytes()
        for states in streams
        for row in range(len(states[0]))
    )


def recorded(trace) -> list[bytes]:
    return sorted(sequence.hidden.tobytes() for sequence in trace["cell"])


@BOTH
@pytest.mark.parametrize("layers", [1, 2])
def test_agents_with_shared_parameters(path, layers, cell, tmp_path) -> None:
    gru = nn.GRU(3, 4, layers)
    with torch.no_grad(), grutrace.trace(gru, path and tmp_path / path) as trace:
        finals = [[torch.randn(layers, batch, 4)] for batch in (2, 3, 1)]
        for _ in range(5):
            for states in finals:
                states.append(gru(torch.randn(1, states[-1].shape[1], 3), states[-1])[1])
    for layer in range(layers):
        actual = sorted(sequence.hidden.tobytes() for sequence in trace[f"l{layer}"])
        assert actual == rows_of([[state[layer] for state in states[1:]] for states in finals])
    assert set(trace.sequences["origin"]) == {"new"}


def test_control_a_row_of_another_stream_is_noticed(cell) -> None:
    with torch.no_grad(), grutrace.trace(cell) as trace:
        a, b = step(cell, torch.randn(1, 4)), step(cell, torch.randn(1, 4))
        c, d = step(cell, a), step(cell, b)
    assert recorded(trace) == rows_of([[a, c], [b, d]])
    assert recorded(trace) != rows_of([[a, d], [b, c]])


@BOTH
def test_asynchronous_clients(path, cell, tmp_path) -> None:
    streams: list[list[torch.Tensor]] = [[], [], []]

    async def client(states: list[torch.Tensor]) -> None:
        state = torch.randn(1, 4)
        for _ in range(4):
            state = step(cell, state)
            states.append(state)
            await asyncio.sleep(0)

    async def serve() -> None:
        await asyncio.gather(*map(client, streams))

    with torch.no_grad(), grutrace.trace(cell, path and tmp_path / path) as trace:
        asyncio.run(serve())
    assert recorded(trace) == rows_of(streams)


def test_one_stream_over_a_pool_of_threads(cell) -> None:
    def run(state: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return step(cell, state)

    states = [torch.randn(2, 4)]
    with (
        ThreadPoolExecutor(1) as one,
        ThreadPoolExecutor(1) as other,
        grutrace.trace(cell) as trace,
    ):
        for number in range(6):
            states.append((one, other)[number % 2].submit(run, states[-1]).result())
    assert recorded(trace) == rows_of([states[1:]])


@pytest.mark.parametrize("options", [{}, {"steps": slice(1, 4)}, {"gates": "deferred"}])
def test_a_stateful_batch_with_a_short_one_between(options) -> None:
    gru, state = nn.GRU(3, 4), torch.randn(1, 8, 4)
    with torch.no_grad(), grutrace.trace(gru, **options) as trace:
        for rows in (8, 5, 8):
            _, last = gru(torch.randn(2, rows, 3), state[:, :rows].clone())
            state[:, :rows] = last
    expected = [4] * 3 + [6] * 5
    if "steps" in options:
        expected = [3] * 8
    assert sorted(trace["l0"].lengths.tolist()) == expected


@BOTH
@pytest.mark.parametrize("options", [{}, {"steps": slice(0, 4)}])
def test_continuations_of_one_prompt(path, options, cell, tmp_path) -> None:
    """The first goes on with the prompt's sequence; each other one is a fork of it."""
    with torch.no_grad(), grutrace.trace(cell, path and tmp_path / path, **options) as trace:
        prompt = [torch.randn(2, 4)]
        for _ in range(3):
            prompt.append(step(cell, prompt[-1]))
        streams = []
        for _ in range(3):
            streams.append([step(cell, prompt[-1])])
            for _ in range(4):
                streams[-1].append(step(cell, streams[-1][-1]))
    most = 4 if options else 99
    expected = [[*prompt[1:], *streams[0]], *streams[1:]]
    assert recorded(trace) == rows_of([states[:most] for states in expected])
    assert trace.sequences["parent"].tolist() == [-1, -1, 0, 1, 0, 1]
    assert trace.sequences["parent_steps"].tolist() == [-1, -1, 3, 3, 3, 3]
    assert trace.sequences["origin"].tolist() == ["new"] * 2 + ["fork"] * 4


@BOTH
def test_streams_in_the_same_state_are_never_guessed(path, cell, tmp_path) -> None:
    first, x = torch.randn(1, 4), torch.randn(2, 1, 3)

    def two_agents() -> None:
        a, b = cell(x[0], first), cell(x[0], first)
        assert torch.equal(a, b)
        a, b = cell(x[0], a), cell(x[1], b)
        for _ in range(2):
            a, b = step(cell, a), step(cell, b)
        trace.flush()

    with (
        torch.no_grad(),
        grutrace.trace(cell, path and tmp_path / path) as trace,
        pytest.warns(grutrace.GrutraceWarning, match="cannot tell which sequence") as warned,
    ):
        two_agents()
    assert len(warned) == 1
    assert trace["cell"].lengths.tolist() == [1, 1, 3, 3]
    assert trace.sequences["origin"].tolist() == ["new", "new", "ambiguous", "ambiguous"]
    assert [sequence.origin for sequence in trace["cell"]] == trace.sequences["origin"].tolist()
    assert trace["cell"].label_names == ()
    assert all(sequence.labels == {} and sequence.tokens is None for sequence in trace["cell"])


def test_control_streams_in_different_states_are_told_apart(cell) -> None:
    first, x = torch.randn(1, 4), torch.randn(2, 1, 3)
    with torch.no_grad(), grutrace.trace(cell) as trace:
        a, b = cell(x[0], first), cell(x[1], first)
        cell(x[0], a)
        cell(x[1], b)
    assert trace["cell"].lengths.tolist() == [2, 2]


def test_fewer_rows_than_equal_states_are_ambiguous(cell) -> None:
    with torch.no_grad(), grutrace.trace(cell) as trace:
        state = cell(torch.ones(2, 3), torch.ones(2, 4))
        step(cell, state[:1])
        with pytest.warns(grutrace.GrutraceWarning, match="cannot tell which sequence"):
            trace.flush()
    assert trace.sequences["origin"].tolist() == ["new", "new", "ambiguous"]


@BOTH
def test_a_dropped_state_is_said(path, cell, tmp_path) -> None:
    path = path and tmp_path / path
    with torch.no_grad(), grutrace.trace(cell, path, state_memory="64 KiB") as trace:
        idle = step(cell, torch.randn(1, 4))
        for _ in range(200):
            step(cell, torch.randn(2, 4))
        idle = step(cell, idle)
        with pytest.warns(grutrace.GrutraceWarning, match="no longer in memory") as warned:
            trace.flush()
        step(cell, idle)
    assert len(warned) == 1
    assert set(trace.sequences["origin"][:-1]) == {"new"}
    assert trace.sequences["origin"][-1] == "dropped"
    assert trace.sequences["steps"][-1] == 2


@pytest.mark.filterwarnings("error")
def test_a_state_that_is_used_is_not_dropped(cell) -> None:
    with torch.no_grad(), grutrace.trace(cell, state_memory="1 MiB") as trace:
        prompt = step(cell, torch.randn(1, 4))
        for _ in range(30):
            state = prompt
            for _ in range(30):
                state = step(cell, state)
    assert trace["cell"].lengths.tolist() == [31] + [30] * 29
    assert trace.sequences["parent"].tolist() == [-1] + [0] * 29


def test_what_is_remembered_is_bounded() -> None:
    gru, sizes = nn.GRU(2, 256), []
    with (
        torch.no_grad(),
        grutrace.Tracer(gru, sink=grutrace.Statistics(), state_memory="8 MiB") as t,
    ):
        t.start()
        for _ in range(3):
            for _ in range(120):
                gru(torch.randn(1, 64, 2))
            sizes.append(
                sum(
                    states_of_call.states.nbytes
                    for states_of_call in t._recorder.module_recorders[0]._tracker._memory
                )
            )
    assert sizes[0] < 8 * 1024**2
    assert sizes[1] < 8 * 1024**2
    assert sizes[2] > 3 * 1024**2


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_nothing_is_kept_of_a_graph(kind) -> None:
    """States are remembered long after the call: never with the graph that made them."""
    module = nn.GRU(3, 4) if kind == "GRU" else nn.GRUCell(3, 4)
    with grutrace.trace(module) as trace:
        state = torch.randn(1, 2, 4) if kind == "GRU" else torch.randn(2, 4)
        module(torch.randn(1, 2, 3) if kind == "GRU" else torch.randn(2, 3), state)
        trace.flush()
        last = trace._recorder.module_recorders[0]._tracker._memory.last
    assert last is not None
    assert not last.states.requires_grad


def test_modes_and_types_that_change_while_states_are_remembered(cell) -> None:
    with grutrace.trace(cell, state_memory="64 KiB") as trace:
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                a, b = torch.randn(2, 4), torch.randn(1, 4)
                for _ in range(30):
                    a, b = step(cell, a), step(cell, b)
        cell.double()

        @torch.no_grad()
        def run_in_double() -> None:
            a, b = torch.randn(2, 4).double(), torch.randn(1, 4).double()
            for _ in range(30):
                a = cell(torch.randn(2, 3).double(), a)
                b = cell(torch.randn(1, 3).double(), b)

        run_in_double()
        with pytest.warns(grutrace.GrutraceWarning, match="float32"):
            trace.flush()
    assert trace["cell"].lengths.tolist() == [30] * (5 * 3)
    assert set(trace.sequences["origin"]) == {"new"}


def test_the_users_tensors_stay_resizable(cell) -> None:
    with torch.no_grad(), grutrace.trace(cell):
        a, b = torch.randn(2, 4), torch.randn(1, 4)
        for _ in range(3):
            a, b = step(cell, a), step(cell, b)
    assert all(tensor.untyped_storage().resizable() for tensor in (a, b))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0, 0), (1000, 1000), ("4 MiB", 4 * 1024**2), ("1.5kB", 1500), ("2 GB", 2 * 10**9)],
)
def test_bytes_as_a_number_or_a_text(limit, expected, cell) -> None:
    tracer = grutrace.Tracer(cell, state_memory=limit)
    assert tracer._recorder._options.state_memory == expected
    assert ("state_memory" in tracer.header.options) == (expected != 4 * 1024**2)


@pytest.mark.parametrize("limit", [-1, "16 apples", "", 1.5, None, True])
def test_wrong_bytes_are_one_clear_error(limit, cell) -> None:
    with pytest.raises(grutrace.OptionError, match="state_memory: expected a number of bytes"):
        grutrace.Tracer(cell, state_memory=limit)


@pytest.mark.filterwarnings("error")
def test_without_memory_one_stream_goes_on(cell) -> None:
    with torch.no_grad(), grutrace.trace(cell, state_memory=0) as trace:
        state = torch.randn(2, 4)
        for _ in range(5):
            state = step(cell, state)
    assert trace["cell"].lengths.tolist() == [5, 5]


def remembered(states: torch.Tensor, first: int = 0) -> FinalStates:
    numbers = np.arange(first, first + len(states), dtype=np.uint64)
    return FinalStates(states, numbers, numbers, np.ones(len(states), np.int64), None)


def test_units_that_never_change_do_not_hide_the_others() -> None:
    """States are looked up by one of their values, and that of a dead unit is always the same."""
    memory = StateMemory(1 << 24)
    torch.manual_seed(0)
    states = torch.randn(40, 16, 6)
    states[..., 0] = 0.5
    for number, state in enumerate(states):
        memory.add(remembered(state, 16 * number))
    found_rows = memory.find(states[3])
    assert [[call.end(row).sequence for call, row in matches] for matches in found_rows] == [
        [48 + row] for row in range(16)
    ]
    assert memory._column != 0
    assert memory.is_only(memory.last)


def test_digests_tell_what_was_dropped() -> None:
    memory = StateMemory(1 << 17)
    torch.manual_seed(0)
    states = torch.randn(64, 8, 300)
    for state in states:
        memory.add(remembered(state))
    # A digest may have replaced another one.
    assert sum(memory.were_dropped(states[0])) > 4
    assert not any(memory.were_dropped(states[-1]))
    assert not any(memory.were_dropped(torch.randn(2000, 300)))
    assert memory.find(states[0]) == [[]] * 8


@pytest.mark.measures
def test_memory_of_dropped_calls_is_freed() -> None:
    memory = StateMemory(1 << 16)
    tracemalloc.start()
    try:
        for number in range(2000):
            memory.add(remembered(torch.full((1, 2), number + 0.5), number))
            memory.find(torch.ones(1, 2))
            if number == 500:
                before = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 100_000


def test_a_network_at_rest_costs_the_same_at_every_call(monkeypatch) -> None:
    """Its states are all the same. Counted in comparisons, not in time."""
    counts: list[int] = []
    inner = states.equal_rows

    def counting(*args):
        counts[-1] += 1
        return inner(*args)

    monkeypatch.setattr(states, "equal_rows", counting)
    torch.manual_seed(0)
    cell, inputs = nn.GRUCell(2, 4), torch.randn(2, 1, 2)
    with torch.no_grad(), grutrace.trace(cell) as trace:
        agents = [torch.randn(1, 4), torch.randn(1, 4)]
        for _ in range(400):
            counts.append(0)
            agents = [cell(x, h) for x, h in zip(inputs, agents, strict=True)]
            trace.flush()
    assert trace["cell"].lengths.tolist() == [400, 400]
    assert max(counts[200:]) <= 2 * (2 * states.MAX_OPEN_CANDIDATES + states.MAX_CLOSED_CANDIDATES)
    assert max(counts[300:]) <= max(counts[200:300])


def test_nothing_is_noted_of_a_name_whose_hash_is_zero() -> None:
    digests = states.Digests(1024)
    digests.add_hashes(np.array([6], np.uint64))
    assert digests.hold_hashes(np.array([0, 6], np.uint64)) == [False, True]
