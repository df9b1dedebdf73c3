"""Recording blocks: each is that of its thread or task, and none keeps more the longer it lasts."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.capture.recording import annotations


@pytest.fixture
def gru() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(2, 3)


def call(gru: nn.GRU, steps: int, batch: int = 1) -> None:
    with torch.no_grad():
        gru(torch.randn(steps, batch, 2))


def tags(tracer) -> dict[int, str | None]:
    """By the steps of each call, which are different in each test, its tag."""
    return dict(zip(tracer.calls["steps"].tolist(), tracer.calls["tag"].tolist(), strict=True))


@pytest.mark.parametrize("path", [None, "run.h5"])
def test_blocks_of_two_threads_overlap(path, gru, tmp_path) -> None:
    turns = threading.Barrier(2, timeout=60)

    def first() -> None:
        with tracer.recording(tag="first", tokens=[["a"]], labels={"n": [[1]]}):
            turns.wait()
            call(gru, 1)
            turns.wait()
        turns.wait()

    def second() -> None:
        turns.wait()
        with tracer.recording(tag="second", tokens=[["b"] * 3]):
            turns.wait()
            call(gru, 2)
            turns.wait()
            assert tracer.is_recording
            call(gru, 3)

    with grutrace.Tracer(gru, path and tmp_path / path, recording=False) as tracer:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(first), pool.submit(second)]:
                future.result()
        assert not tracer.is_recording
        assert tags(tracer) == {1: "first", 2: "second", 3: "second"}
        tokens = {len(sequence): sequence.tokens for sequence in tracer["l0"]}
        assert tokens == {1: ["a"], 2: None, 3: ["b"] * 3}
        assert [list(sequence.labels) for sequence in tracer["l0"] if len(sequence) == 1] == [["n"]]


@pytest.mark.parametrize("inner_first", [True, False])
def test_tasks_have_their_own_tags(inner_first, gru) -> None:
    tracer = grutrace.Tracer(gru, recording=False)

    async def client(tag: str, steps: int, rounds: int) -> None:
        with tracer.recording(tag=tag, labels={"who": [tag]}):
            for number in range(rounds):
                call(gru, steps + number)
                await asyncio.sleep(0)

    async def serve() -> None:
        rounds = (2, 4) if inner_first else (4, 2)
        await asyncio.gather(client("a", 1, rounds[0]), client("b", 11, rounds[1]))

    asyncio.run(serve())
    assert not tracer.is_recording
    tags_by_steps = tags(tracer)
    assert {steps: "a" if steps < 10 else "b" for steps in tags_by_steps} == tags_by_steps
    assert len(tags_by_steps) == 6
    for sequence in tracer["l0"]:
        assert sequence.labels["who"] == ["a" if len(sequence) < 10 else "b"] * len(sequence)


def test_a_task_that_is_made_in_a_block_is_in_it_until_its_end(gru) -> None:
    tracer = grutrace.Tracer(gru, recording=False)
    go_on = asyncio.Event()

    async def inner() -> None:
        call(gru, 1)
        await go_on.wait()
        call(gru, 2)

    async def outer() -> None:
        with tracer.recording(tag="inner"):
            task = asyncio.create_task(inner())
            await asyncio.sleep(0)
        tracer.start(tag="later")
        go_on.set()
        await task
        tracer.stop()

    asyncio.run(outer())
    assert tags(tracer) == {1: "inner", 2: "later"}


def test_the_threads_of_a_pool_are_in_a_block_if_they_run_in_its_context(gru) -> None:
    tracer = grutrace.Tracer(gru, recording=False)
    with ThreadPoolExecutor(1) as pool, tracer.recording(tag="block", labels={"n": [5]}):
        pool.submit(call, gru, 1).result()
        pool.submit(contextvars.copy_context().run, call, gru, 2).result()
    assert tags(tracer) == {1: None, 2: "block"}
    assert tracer["l0"].sequence(0).labels == {}
    np.testing.assert_array_equal(tracer["l0"].sequence(1).labels["n"], [5, 5])


def test_other_threads_keep_the_tag_that_recording_was_started_with(gru) -> None:
    with grutrace.Tracer(gru, recording=False) as tracer, ThreadPoolExecutor(1) as pool:
        tracer.start(tag="all")
        with tracer.recording(tag="block"):
            pool.submit(call, gru, 1).result()
            call(gru, 2)
        call(gru, 3)
        assert tags(tracer) == {1: "all", 2: "block", 3: "all"}


def test_blocks_within_blocks_and_of_two_tracers(gru) -> None:
    one, other = (grutrace.Tracer(gru, recording=False) for _ in range(2))
    with one.recording(tag="a"):
        with other.recording(tag="x"), one.recording(tag="b"):
            call(gru, 1)
        call(gru, 2)
    assert tags(one) == {1: "b", 2: "a"}
    assert tags(other) == {1: "x"}


def test_start_within_a_block_goes_on_after_it(gru) -> None:
    tracer = grutrace.Tracer(gru, recording=False)
    with tracer.recording(tag="block"):
        tracer.start(tag="started")
        call(gru, 1)
    assert tracer.is_recording
    call(gru, 2)
    tracer.stop()
    assert tags(tracer) == {1: "started", 2: None}


def test_stop_within_a_block_stops_all(gru) -> None:
    tracer = grutrace.Tracer(gru, recording=False)
    with tracer.recording(tag="a"), tracer.recording(tag="b"):
        tracer.stop()
        call(gru, 1)
        with tracer.recording(tag="c"):
            call(gru, 2)
        call(gru, 3)
    assert tags(tracer) == {2: "c"}


def test_an_error_in_a_block_ends_that_block_only(gru) -> None:
    tracer = grutrace.Tracer(gru, recording=False)
    with tracer.recording(tag="outer"):
        with pytest.raises(ZeroDivisionError), tracer.recording(tag="inner"):
            call(gru, 1 // 0)
        call(gru, 2)
    call(gru, 3)
    assert tags(tracer) == {2: "outer"}


def test_a_context_that_outlives_a_block_keeps_nothing_alive(gru) -> None:
    tracer = grutrace.Tracer(gru, recording=False)
    with tracer.recording(tag="block"):
        context = contextvars.copy_context()
        call(gru, 1)
    alive = weakref.ref(tracer)
    tracer.close()
    del tracer
    gc.collect()
    assert alive() is None
    assert context


@pytest.mark.measures
@pytest.mark.parametrize("annotations", [{}, {"labels": {}}])
def test_a_long_block_keeps_nothing_for_each_call(annotations, gru) -> None:
    def grown(calls: int) -> int:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(calls):
            call(gru, 1, batch=64)
        tracer.flush()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    tracer = grutrace.Tracer(
        gru, sink=grutrace.Statistics(), recording=False, state_memory="256 KiB"
    )
    with tracer, tracer.recording(tag="train", **annotations):
        tracemalloc.start()
        try:
            grown(300)
            assert grown(600) < 100 * 600
        finally:
            tracemalloc.stop()


def test_what_can_still_be_annotated_is_said(gru, monkeypatch) -> None:
    monkeypatch.setattr(annotations, "MAX_SEQUENCES", 6)
    with grutrace.Tracer(gru, recording=False) as tracer, tracer.recording() as recording:
        for steps in range(1, 6):
            call(gru, steps, batch=2)
        with pytest.warns(grutrace.GrutraceWarning, match="the 2 oldest batches.*no longer kept"):
            recording.annotate(tokens=[["a"] * 4, ["b"] * 4])
        with pytest.raises(
            grutrace.OptionError,
            match=r"got 2 lists of up to 2 tokens; the recorded batch.*2 oldest batches.*no longer",
        ):
            recording.annotate(tokens=[["a"] * 2, ["b"] * 2])
        recording.annotate(labels={"n": [1, 2]})
    tokens = {len(sequence): sequence.tokens for sequence in tracer["l0"] if sequence.tokens}
    assert tokens == {4: ["b"] * 4}
    labelled = sorted(len(sequence) for sequence in tracer["l0"] if sequence.labels)
    assert labelled == [3, 3, 4, 4, 5, 5]


def test_what_was_given_goes_to_all_batches_however_many(gru, monkeypatch) -> None:
    monkeypatch.setattr(annotations, "MAX_SEQUENCES", 6)
    tracer = grutrace.Tracer(gru, recording=False)
    with tracer.recording(labels={"n": [1, 2]}):
        for steps in range(1, 10):
            call(gru, steps, batch=2)
    assert all(
        sequence.labels["n"].tolist() == [1 + sequence.number % 2] * len(sequence)
        for sequence in tracer["l0"]
    )


def test_a_batch_that_goes_on_is_kept(monkeypatch) -> None:
    """What was used last is kept, and not what began last."""
    monkeypatch.setattr(annotations, "MAX_SEQUENCES", 6)
    cell = nn.GRUCell(2, 3)
    tracer = grutrace.Tracer(cell, recording=False)
    with torch.no_grad(), tracer.recording() as recording:
        state = torch.randn(2, 3)
        for _ in range(9):
            state = cell(torch.randn(2, 2), state)
            cell(torch.randn(2, 2), torch.randn(2, 3))
        with pytest.warns(grutrace.GrutraceWarning):
            recording.annotate(tokens=[list("abcdefghi"), list("jklmnopqr")])
    assert tracer["cell"].sequence(0).tokens == list("abcdefghi")
    assert tracer["cell"].sequence(1).tokens == list("jklmnopqr")


def test_beams_in_a_block_take_time_in_proportion(monkeypatch) -> None:
    """Counted in how many batches are looked through, and not in time."""
    cell, looked = nn.GRUCell(4, 8), 0
    find = annotations._ModuleBatches.find

    def counting(self, sequences):
        nonlocal looked
        looked += len(self._unlisted) + 1
        return find(self, sequences)

    monkeypatch.setattr(annotations._ModuleBatches, "find", counting)

    def decode(sentences: int) -> int:
        nonlocal looked
        looked = 0
        with (
            torch.no_grad(),
            grutrace.Tracer(cell, recording=False) as tracer,
            tracer.recording(tag="test"),
        ):
            for _ in range(sentences):
                state = torch.randn(4, 8)
                for _ in range(5):
                    state = cell(torch.randn(4, 4), state)[torch.tensor([0, 0, 1, 1])]
        assert len(tracer.calls) == 5 * sentences
        return looked

    once, twice = decode(40), decode(80)
    assert 0 < twice < 2.2 * once


def test_labels_of_grutrace_itself_are_refused(gru) -> None:
    tracer = grutrace.Tracer(gru, recording=False)
    with (
        pytest.raises(grutrace.OptionError, match="names that begin with 'grutrace:'"),
        tracer.recording(labels={"grutrace:continued": [1]}),
    ):
        call(gru, 1)
