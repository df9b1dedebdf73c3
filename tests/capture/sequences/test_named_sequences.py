"""Sequences that the user names: masked and changed states stay in them."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.dynamics.jacobian import jacobian
from grutrace.analysis.memory.age import state_age
from grutrace.analysis.memory.decomposition import decompose, memory_map
from grutrace.analysis.verification.materialize import materialize_file
from grutrace.analysis.verification.verify import verify
from grutrace.storage.shards.merge import merge_shards
from tests.oracles import gates, weights_of
from tests.plain_reader import PlainTrace

GATES = ("reset", "update", "candidate")
EVERYTHING = (*GATES, "hidden", "input")
B, T, INPUT, H = 3, 6, 2, 4


def test_names_that_fit_no_call_are_said_at_the_end_of_the_block() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    tracer = grutrace.Tracer(layer, recording=False)
    block = tracer.recording(sequences=["a"])
    block.__enter__()
    layer(x)
    with pytest.warns(grutrace.GrutraceWarning, match="1 are named, and the calls .* have 2"):
        block.__exit__(None, None, None)
    # The control: names that fit are not mentioned; any warning is an error.
    with tracer.recording(sequences=["a", "b"]):
        layer(x)
    tracer.close()


def masked(state: torch.Tensor, new: torch.Tensor, step: int) -> torch.Tensor:
    mask = torch.tensor([[1.0], [float(step % 2)], [float(step < 3)]])[: len(new)]
    return mask * new + (1 - mask) * state


def rectified(_state: torch.Tensor, new: torch.Tensor, _step: int) -> torch.Tensor:
    return new.relu()


def ended(_state: torch.Tensor, new: torch.Tensor, step: int) -> torch.Tensor:
    """As where an episode ends: one row begins with zeros again."""
    return torch.where(torch.tensor([[step == 2], [False], [True]]), 0.0, new)


def unchanged(_state: torch.Tensor, new: torch.Tensor, _step: int) -> torch.Tensor:
    return new


CHANGES = [masked, rectified, ended, unchanged]


class Loop:
    """A loop over a cell that changes the state after each step; what it saw, (T, B, width)."""

    def __init__(self, change=masked, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.cell, self.change = nn.GRUCell(INPUT, H), change
        self.x, self.previous, self.made = torch.randn(T, B, INPUT), [], []
        self.state = torch.randn(B, H)

    def run(self, steps=range(T)) -> None:
        with torch.no_grad():
            for step in steps:
                self.previous.append(self.state)
                self.made.append(self.cell(self.x[step], self.state))
                self.state = self.change(self.state, self.made[-1], step)

    def check(self, site, quantities=EVERYTHING) -> None:
        assert len(site) == B
        assert site.lengths.tolist() == [T] * B
        for row, sequence in enumerate(site):
            previous, hidden = (
                torch.stack(states)[:, row].numpy() for states in (self.previous, self.made)
            )
            np.testing.assert_array_equal(sequence.previous, previous)
            np.testing.assert_array_equal(sequence.initial, previous[0])
            np.testing.assert_array_equal(sequence.hidden, hidden)
            x = self.x[:, row].numpy()
            expected = gates(weights_of(self.cell, "cell"), x, previous, 2.0**-23)
            for name in set(GATES) & set(quantities):
                off = np.abs(getattr(sequence, name) - expected.values[name])
                assert (off <= expected.bounds[name]).all()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["inline", "background", "deferred"])
@pytest.mark.parametrize("path", [None, "run.h5"])
def test_a_changed_state_stays_one_sequence(change, mode, path, tmp_path) -> None:
    loop, path = Loop(change), path and tmp_path / path
    with grutrace.Tracer(loop.cell, path, gates=mode, record=EVERYTHING, recording=False) as tracer:
        with tracer.recording(sequences=["a", "b", "c"], tokens={"": [list("uvwxyz")] * B}):
            loop.run()
        loop.check(tracer["cell"])
    for trace in [tracer, *([grutrace.open(path)] if path else [])]:
        loop.check(trace["cell"])
        assert all(sequence.tokens == list("uvwxyz") for sequence in trace["cell"])
        assert trace["cell"].label_names == ("tokens",)
        assert trace.sequences["origin"].tolist() == ["new"] * B
        assert trace.sequences["parent"].tolist() == [-1] * B
        assert all(result.holds for result in verify(trace))
        padded, _ = trace["cell"].padded("hidden")
        np.testing.assert_array_equal(padded, torch.stack(loop.made, 1).numpy())
        np.testing.assert_array_equal(trace["cell"].previous(), torch.cat(loop.previous).numpy())


def test_control_without_names_each_change_begins_a_sequence() -> None:
    loop = Loop(rectified)
    with grutrace.trace(loop.cell) as trace:
        loop.run()
    assert trace["cell"].lengths.tolist() == [1] * (B * T)


def test_control_a_wrong_previous_state_is_noticed() -> None:
    loop = Loop()
    with grutrace.trace(loop.cell) as trace, trace.recording(sequences=range(B)):
        loop.run()
    loop.previous[3] = loop.made[2]
    with pytest.raises(AssertionError):
        loop.check(trace["cell"], ())


@pytest.mark.parametrize("change", CHANGES)
def test_a_reader_that_knows_no_names_sees_right_sequences(change, tmp_path) -> None:
    """Each segment is a sequence with its own initial state: what older readers make of it."""
    loop, path = Loop(change), tmp_path / "run.h5"
    with (
        grutrace.Tracer(loop.cell, path, record=EVERYTHING, recording=False) as tracer,
        tracer.recording(sequences=range(B)),
    ):
        loop.run()
    (module,) = PlainTrace(path).modules
    previous, states = torch.stack(loop.previous), []
    for sequence in range(module.count):
        states.extend(state.tobytes() for state in module.sites["cell"].previous(sequence))
    assert sorted(states) == sorted(state.tobytes() for state in previous.flatten(0, 1).numpy())


def test_what_the_file_says(tmp_path) -> None:
    """docs/format.md: a mark is an annotation without values; forks name the parent."""
    loop, path = Loop(rectified), tmp_path / "run.h5"
    with (
        grutrace.Tracer(loop.cell, path, recording=False) as tracer,
        tracer.recording(sequences=range(B)),
    ):
        loop.run()
    with h5py.File(path) as file:
        characters, ends = file["characters"][:].tobytes(), file["strings"][:].tolist()
        texts = [characters[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]
        annotations, forks = file["annotations"][:], file["forks"][:]
    assert {texts[number - 1] for number in annotations["name"]} == {"grutrace:continued"}
    assert set(annotations["count"]) == {0}
    assert annotations["sequence"].tolist() == list(range(B, B * T))
    assert forks["sequence"].tolist() == list(range(B, B * T))
    assert forks["parent"].tolist() == list(range(B * (T - 1)))
    assert set(forks["steps"]) == {1}


@pytest.mark.parametrize("selected", [slice(0, 4), slice(2, None), slice(2, 4), slice(1, 2)])
@pytest.mark.parametrize("change", CHANGES)
def test_of_some_steps(selected, change) -> None:
    loop = Loop(change)
    with (
        grutrace.trace(loop.cell, steps=selected, record=EVERYTHING) as trace,
        trace.recording(sequences=range(B), tokens={"": [list("uvwxyz")] * B}),
    ):
        loop.run()
    trace.close()
    filled = [sequence for sequence in trace["cell"] if len(sequence)]
    assert len(filled) == B
    for row, sequence in enumerate(filled):
        expected = [
            torch.stack(states)[selected, row].numpy() for states in (loop.made, loop.previous)
        ]
        np.testing.assert_array_equal(sequence.hidden, expected[0])
        np.testing.assert_array_equal(sequence.previous, expected[1])
        assert sequence.tokens == list("uvwxyz")[selected]


@pytest.mark.parametrize("path", [None, "run.h5"])
def test_a_name_goes_on_in_a_later_block(path, tmp_path) -> None:
    """Each call has a block of its own here, for the rows that are active."""
    loop = Loop()
    with (
        grutrace.Tracer(loop.cell, path and tmp_path / path, recording=False) as tracer,
        torch.no_grad(),
    ):
        states = {name: torch.randn(H) for name in "abc"}
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in states}
        for active in ("abc", "ab", "ca", "b", "bca"):
            with tracer.recording(sequences=list(active)):
                made = loop.cell(
                    torch.randn(len(active), INPUT), torch.stack([states[name] for name in active])
                )
            for name, state in zip(active, made, strict=True):
                seen[name].append(state)
                states[name] = 0.5 * state
    for name, sequence in zip("abc", tracer["cell"], strict=True):
        np.testing.assert_array_equal(sequence.hidden, torch.stack(seen[name]).numpy())
        np.testing.assert_array_equal(
            sequence.previous[1:], 0.5 * torch.stack(seen[name])[:-1].numpy()
        )


def test_a_run_that_is_appended_to_begins_with_new_names(tmp_path) -> None:
    loops, path = [Loop(seed=0), Loop(seed=1)], tmp_path / "run.h5"
    loops[1].cell.load_state_dict(loops[0].cell.state_dict())
    for loop in loops:
        with (
            grutrace.Tracer(loop.cell, path, mode="a", recording=False) as tracer,
            tracer.recording(sequences=range(B), labels={"n": {"": [1, 2, 3]}}),
        ):
            loop.run()
    with grutrace.open(path) as trace:
        assert trace["cell"].lengths.tolist() == [T] * (2 * B)
        made = torch.cat([torch.stack(loop.made, 1) for loop in loops])
        for sequence, expected in zip(trace["cell"], made, strict=True):
            np.testing.assert_array_equal(sequence.hidden, expected.numpy())
            assert sequence.labels["n"].tolist() == [1 + sequence.number % B] * T


def test_a_name_without_a_state_yet_continues_or_forks_what_it_starts_from() -> None:
    cell = nn.GRUCell(INPUT, H)
    with torch.no_grad(), grutrace.trace(cell) as trace:
        prompt = cell(torch.randn(1, INPUT), torch.randn(1, H))
        for name in "ab":
            state = prompt
            with trace.recording(sequences=[name]):
                for _ in range(3):
                    state = cell(torch.randn(1, INPUT), state).relu()
    assert trace["cell"].lengths.tolist() == [4, 3]
    assert trace.sequences["parent"].tolist() == [-1, 0]
    assert trace.sequences["parent_steps"].tolist() == [-1, 1]


def test_a_call_without_names_goes_on_with_a_named_sequence() -> None:
    cell = nn.GRUCell(INPUT, H)
    with torch.no_grad(), grutrace.trace(cell) as trace:
        state = torch.randn(2, H)
        with trace.recording(sequences=["a", "b"]):
            state = cell(torch.randn(2, INPUT), state)
        state = cell(torch.randn(2, INPUT), state)
        state = cell(torch.randn(2, INPUT), state.flip(0)).flip(0)
        with trace.recording(sequences=["a", "b"]):
            state = cell(torch.randn(2, INPUT), 0.5 * state)
    assert trace["cell"].lengths.tolist() == [4, 4]
    last = trace["cell"].hidden[-2:]
    assert [sequence.hidden[-1].tolist() for sequence in trace["cell"]] == last.tolist()


def test_names_by_module() -> None:
    model = nn.ModuleDict({"left": nn.GRUCell(INPUT, H), "right": nn.GRUCell(INPUT, H)})
    with torch.no_grad(), grutrace.trace(model) as trace, trace.recording(sequences={"l*": [0, 1]}):
        for cell in model.values():
            state = torch.randn(2, H)
            for _ in range(3):
                state = -cell(torch.randn(2, INPUT), state)
    assert trace["left.cell"].lengths.tolist() == [3, 3]
    assert trace["right.cell"].lengths.tolist() == [1] * 6


def test_a_call_that_the_names_do_not_fit_is_said() -> None:
    cell = nn.GRUCell(INPUT, H)
    with torch.no_grad(), grutrace.trace(cell) as trace, trace.recording(sequences=torch.arange(3)):
        state = cell(torch.randn(3, INPUT), torch.randn(3, H))
        with pytest.warns(grutrace.GrutraceWarning, match="3 are named.* has 2: the sequences"):
            state = cell(torch.randn(2, INPUT), state[[0, 2]])
    assert trace["cell"].lengths.tolist() == [2, 1, 2]


def test_bidirectional_layers_never_continue() -> None:
    gru = nn.GRU(INPUT, H, bidirectional=True)
    with torch.no_grad(), grutrace.trace(gru) as trace, trace.recording(sequences=["a", "b"]):
        for _ in range(2):
            gru(torch.randn(3, 2, INPUT))
    assert trace["l0"].lengths.tolist() == [3] * 4


def test_layers_and_packed_batches_in_the_users_order() -> None:
    gru, lengths = nn.GRU(INPUT, H, 2), torch.tensor([2, 4, 3])
    pack = nn.utils.rnn.pack_padded_sequence
    with torch.no_grad(), grutrace.trace(gru) as trace, trace.recording(sequences=list("abc")):
        state, previous = torch.randn(2, 3, H), []
        for _ in range(2):
            previous.append(state)
            x = pack(torch.randn(4, 3, INPUT), lengths, enforce_sorted=False)
            state = gru(x, state)[1].relu()
    for layer in range(2):
        site = trace[f"l{layer}"]
        assert site.lengths.tolist() == [4, 8, 6]
        for row, sequence in enumerate(site):
            np.testing.assert_array_equal(
                sequence.previous[lengths[row]], previous[1][layer, row].numpy()
            )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("abc", "found the text 'abc'"),
        ([1, 1, 2], "found 1 twice"),
        ([[1], [2]], r"found \[1\]"),
        ([None, 1], "found None among them"),
        (3, "found 3"),
        ({"nowhere": [1, 2]}, "'nowhere' matches no traced module"),
    ],
)
def test_wrong_names_are_one_clear_error(names, message) -> None:
    tracer = grutrace.Tracer(nn.GRUCell(INPUT, H), recording=False)
    with pytest.raises(grutrace.OptionError, match=f"sequences: .*{message}"):
        tracer.recording(sequences=names).__enter__()
    assert not tracer.is_recording


def test_names_are_bounded_and_one_that_was_dropped_is_said() -> None:
    cell = nn.GRUCell(INPUT, H)
    with torch.no_grad(), grutrace.trace(cell, state_memory="256 KiB") as trace:

        def call(name: int) -> None:
            with trace.recording(sequences=[name]):
                cell(torch.randn(1, INPUT), torch.randn(1, H))

        for name in range(200):
            call(name)
        call(199)
        with pytest.warns(grutrace.GrutraceWarning, match="no longer in memory"):
            call(0)
        assert len(trace._recorder.module_recorders[0]._tracker._names._ends) < 100
    assert trace["cell"].lengths.tolist() == [1] * 199 + [2, 1]
    assert trace.sequences["origin"].tolist() == ["new"] * 200 + ["dropped"]


def test_a_name_outlives_its_state() -> None:
    """The state is needed only to tell whether it was changed."""
    loop = Loop(unchanged)
    with grutrace.trace(loop.cell, state_memory="64 KiB", record=EVERYTHING) as trace:
        for step in range(T):
            with trace.recording(sequences=range(B)):
                loop.run([step])
            with torch.no_grad():
                for _ in range(100):
                    loop.cell(torch.randn(2, INPUT), torch.randn(2, H))
    for row in range(B):
        sequence = trace["cell"].sequence(row)
        np.testing.assert_array_equal(sequence.hidden, torch.stack(loop.made)[:, row].numpy())
        np.testing.assert_array_equal(sequence.previous, torch.stack(loop.previous)[:, row].numpy())


def test_running_statistics_count_sequences_and_not_segments() -> None:
    counted, recorded_loop = grutrace.Statistics(), Loop()
    with (
        grutrace.Tracer(recorded_loop.cell, sink=counted, recording=False) as tracer,
        tracer.recording(sequences=range(B)),
    ):
        recorded_loop.run()
    loop = Loop()
    with grutrace.trace(loop.cell) as trace, trace.recording(sequences=range(B)):
        loop.run()
    assert counted["cell"].sequences == grutrace.Statistics.of(trace)["cell"].sequences == B


def test_gates_derived_into_a_file_keep_the_segments(tmp_path) -> None:
    loop, path, whole = Loop(), tmp_path / "run.h5", tmp_path / "whole.h5"
    with (
        grutrace.Tracer(loop.cell, path, gates="deferred", recording=False) as tracer,
        tracer.recording(sequences=range(B), tokens={"": [list("uvwxyz")] * B}),
    ):
        loop.run()
    with grutrace.open(path) as trace:
        materialize_file(trace, whole)
    with grutrace.open(whole) as trace:
        loop.check(trace["cell"], GATES)
        assert trace["cell"].sequence(1).tokens == list("uvwxyz")


@pytest.mark.parametrize("change", CHANGES)
def test_analyses_of_time_start_anew_where_the_state_was_changed(change) -> None:
    loop = Loop(change)
    with grutrace.trace(loop.cell) as trace, trace.recording(sequences=range(B)):
        loop.run()
    site = trace["cell"]
    ages, steps = np.zeros(H), 0
    for row in range(B):
        age = np.zeros(H)
        update = site.sequence(row).update.astype(np.float64)
        candidate = site.sequence(row).candidate.astype(np.float64)
        begin = 0
        for step in range(T):
            was_changed = step and not torch.equal(
                loop.previous[step][row], loop.made[step - 1][row]
            )
            if was_changed:
                begin = step
            age = update[step] * (age + 1) if step != begin else update[step]
            ages, steps = ages + age, steps + 1
            result = decompose(site, row, step)
            assert result.steps.tolist() == list(range(begin, step + 1))
            assert result.difference < 1e-6
            weight = np.prod(update[begin : step + 1], axis=0)
            np.testing.assert_allclose(
                result.before, weight * loop.previous[begin][row].numpy(), rtol=1e-5, atol=1e-9
            )
            # The share of a step, and of what was there before, from the equations.
            hidden = loop.made[step][row].numpy().astype(np.float64)
            share = [
                ((1 - update[s]) * candidate[s] * np.prod(update[s + 1 : step + 1], axis=0))
                @ hidden
                for s in range(step, begin - 1, -1)
            ] / (hidden @ hidden)
            mapped = memory_map(site, row)
            np.testing.assert_allclose(
                mapped.share[step][: len(share)], share, rtol=1e-4, atol=1e-6
            )
            assert not mapped.share[step][len(share) :].any()
            np.testing.assert_allclose(
                mapped.before_share[step] + mapped.share[step].sum(), 1, atol=1e-5
            )
    np.testing.assert_allclose(state_age(site).age, ages / steps, rtol=1e-5)


def test_the_jacobian_of_a_step_from_a_changed_state() -> None:
    loop = Loop(rectified)
    with grutrace.trace(loop.cell, record=EVERYTHING) as trace, trace.recording(sequences=range(B)):
        loop.run()
    for step in range(T):
        expected = torch.autograd.functional.jacobian(
            lambda state, step=step: loop.cell(loop.x[step, :1], state)[0],
            loop.previous[step][:1],
        )[:, 0]
        actual = jacobian(trace["cell"], 0, step)
        np.testing.assert_allclose(actual, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("copy", [False, True])
def test_shards_and_merged_files(copy, tmp_path) -> None:
    loops = [Loop(seed=0), Loop(rectified, seed=0)]
    for rank, loop in enumerate(loops):
        tracer = grutrace.Tracer(
            loop.cell, tmp_path / "run.h5", shard=(rank, 2), recording=False, record=EVERYTHING
        )
        with tracer, tracer.recording(sequences=range(B), labels={"rank": {"": [rank] * B}}):
            loop.run()
    merge_shards(tmp_path / "run.rank*.h5", tmp_path / "merged.h5", copy=copy)
    for path in ("run.rank*.h5", "merged.h5"):
        with grutrace.open(tmp_path / path) as trace:
            assert trace["cell"].lengths.tolist() == [T] * (2 * B)
            for number, sequence in enumerate(trace["cell"]):
                loop, row = loops[number // B], number % B
                for actual, expected in (
                    (sequence.hidden, loop.made),
                    (sequence.previous, loop.previous),
                ):
                    np.testing.assert_array_equal(actual, torch.stack(expected)[:, row].numpy())
                assert sequence.labels["rank"].tolist() == [number // B] * T
