"""How much of the gradient of a state came from which step, against autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import grutrace
from grutrace.__main__ import main
from grutrace.errors import NotRecordedError

RECORD = ("hidden", "gradient")
STEPS = 7


def equations(layer: Any, suffix: str, x: Tensor, h: Tensor) -> Tensor:
    """One step by the equations in torch.nn.GRU's documentation."""
    w_ih, w_hh, b_ih, b_hh = (
        getattr(layer, f"{name}{suffix}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    ir, iz, i_n = (w_ih @ x + b_ih).chunk(3)
    hr, hz, hn = (w_hh @ h + b_hh).chunk(3)
    z = torch.sigmoid(iz + hz)
    n = torch.tanh(i_n + torch.sigmoid(ir + hr) * hn)
    return (1 - z) * n + z * h


def expected_sources(
    layer: Any,
    x: Tensor,
    h: Tensor,
    *,
    suffix: str = "_l0",
    order: range | None = None,
    cuts: tuple[int, ...] = (),
) -> np.ndarray:
    """Return d loss(s) / d h(t) at [t, s], (T, T, H): the loss of step s is the cube of its state.

    Args:
        layer: Its weights.
        x: (T, I) the input of one sequence.
        h: (H,) the initial state.
        suffix: Of the weights.
        order: The order of the steps.
        cuts: Steps whose previous state is detached.
    """
    order = range(len(x)) if order is None else order
    states: dict[int, Tensor] = {}
    h = h.clone().requires_grad_()
    for step in order:
        h = equations(layer, suffix, x[step], h.detach() if step in cuts else h)
        states[step] = h
    result = np.zeros((len(x), len(x), len(h)))
    for s in order:
        losses = torch.autograd.grad(
            states[s].pow(3).sum(),
            [states[t] for t in order],
            retain_graph=True,
            allow_unused=True,
        )
        for t, gradient in zip(order, losses, strict=True):
            result[t, s] = 0 if gradient is None else gradient.numpy()
    return result


def found_sources(sequence: Any) -> np.ndarray:
    return np.stack([sequence.gradient_sources(step) for step in range(len(sequence))])


def difference(sequence: Any, expected: np.ndarray) -> float:
    found = found_sources(sequence)
    assert found.shape == expected.shape
    total = np.asarray(sequence.gradient("hidden"))
    np.testing.assert_allclose(found.sum(1), total, rtol=0, atol=1e-12)
    return float(np.abs(found - expected).max())


def gru(**options: Any) -> nn.GRU:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, dtype=torch.float64, **options)
    with torch.no_grad():
        for weight in layer.parameters():
            weight *= 1.5
    return layer


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_both_directions_of_one_call(form: str) -> None:
    layer, x = gru(bidirectional=True), torch.randn(STEPS, 3, 3, dtype=torch.float64)
    initial, lengths = torch.randn(2, 3, 4, dtype=torch.float64), [3, STEPS, 5]
    given: Any = x
    if form == "packed":
        given = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    else:
        lengths = [STEPS] * 3
    with grutrace.trace(layer, record=RECORD) as trace:
        output, _ = layer(given, initial)
        if form == "packed":
            output, _ = pad_packed_sequence(output)
        output.pow(3).sum().backward()
    for number, length in enumerate(lengths):
        for name, order in (("l0", range(length)), ("l0_reverse", range(length - 1, -1, -1))):
            state = initial[int(name != "l0"), number]
            of_sequence = x[:length, number]
            expected = expected_sources(layer, of_sequence, state, suffix=f"_{name}", order=order)
            assert difference(trace[name].sequence(number), expected) < 1e-12


def decode(
    layer: Any, x: Tensor, h: Tensor, cuts: tuple[int, ...], sizes: tuple[int, ...]
) -> Tensor:
    """Call a layer on some steps at a time, with states detached before some; return the loss."""
    losses, first = [], 0
    for size in sizes:
        if first in cuts:
            h = h.detach()
        output, h = layer(x[first : first + size], h)
        losses.append(output.pow(3).sum())
        first += size
    return torch.stack(losses).sum()


@pytest.mark.parametrize("sizes", [(1,) * STEPS, (3, 2, 2), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("cuts", [(), (3,), (5,), tuple(range(STEPS))], ids=str)
@pytest.mark.parametrize("path", [None, "run.h5"])
def test_a_decoder_attached_and_detached(
    sizes: tuple[int, ...], cuts: tuple[int, ...], path: str | None, tmp_path: Path
) -> None:
    layer, x = gru(), torch.randn(STEPS, 2, 3, dtype=torch.float64)
    sizes = tuple(size for size in sizes if size)
    starts = np.cumsum((0, *sizes[:-1])).tolist()
    h = torch.randn(1, 2, 4, dtype=torch.float64)
    with grutrace.trace(layer, path and tmp_path / path, record=RECORD) as trace:
        decode(layer, x, h, cuts, sizes).backward()
    trace = grutrace.open(tmp_path / path) if path else trace
    sequence = trace["l0"].sequence(1)
    assert len(sequence) == STEPS
    own = tuple(cut for cut in cuts if cut in starts)
    assert difference(sequence, expected_sources(layer, x[:, 1], h[0, 1], cuts=own)) < 1e-12
    attached = [start not in (0, *own) for start in starts]
    assert trace.calls["attached"].tolist() == attached


def test_control_a_detached_decoder_is_not_an_attached_one() -> None:
    layer, x = gru(), torch.randn(STEPS, 2, 3, dtype=torch.float64)
    h = torch.zeros(1, 2, 4, dtype=torch.float64)
    with grutrace.trace(layer, record=RECORD) as trace:
        decode(layer, x, h, (3,), (1,) * STEPS).backward()
    found = found_sources(trace["l0"].sequence(1))
    assert np.abs(found - expected_sources(layer, x[:, 1], h[0, 1])).max() > 1e-3


@pytest.mark.parametrize("state", ["zeros", "leaf", "detached leaf", "computed", "reordered"])
def test_what_is_attached(state: str) -> None:
    layer = gru()
    x = torch.randn(STEPS, 2, 3, dtype=torch.float64)
    leaf = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    with grutrace.trace(layer, record=RECORD) as trace:
        _, h = layer(x)
        states = {
            "zeros": torch.zeros_like(h),
            "leaf": leaf,
            "detached leaf": h.detach().requires_grad_(),
            "computed": h * 0.5,
            "reordered": h[:, [1, 0]],
        }
        # A packed input reorders the states, which puts a leaf into another form.
        packed = pack_padded_sequence(x, torch.tensor([4, 5]), enforce_sorted=False)
        output, _ = layer(packed, states[state])
        output.data.sum().backward()
    assert trace.calls["attached"].tolist() == [False, state in ("computed", "reordered")]


def test_the_layer_above_is_outside() -> None:
    layer, x = gru(num_layers=2), torch.randn(STEPS, 1, 3, dtype=torch.float64)
    with grutrace.trace(layer, record=RECORD) as trace:
        layer(x)[1][1].sum().backward()
    top, low = trace["l1"].sequence(0), trace["l0"].sequence(0)
    # The loss is at the last step alone, and reaches each state of the lower layer.
    assert np.flatnonzero(np.abs(top.gradient_sources(2)).sum(1)).tolist() == [STEPS - 1]
    assert np.flatnonzero(np.abs(low.gradient_sources(2)).sum(1)).tolist() == [*range(2, STEPS)]
    np.testing.assert_allclose(
        low.gradient_sources(-2).sum(0), low.gradient("hidden")[-2], rtol=0, atol=1e-14
    )


def test_a_loss_that_is_scaled() -> None:
    layer, x = gru(), torch.randn(STEPS, 2, 3, dtype=torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    with grutrace.trace(layer, record=RECORD, grad_scaler=scaler) as trace:
        for _ in range(2):
            scaler.scale(layer(x)[0].pow(3).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        layer(x)
    with grutrace.trace(layer, record=RECORD) as plain:
        layer(x)[0].pow(3).sum().backward()
    assert trace.calls["scale"][:2].tolist() == [1024.0, 2048.0]
    assert not trace.calls["scale"][2:].any()
    assert not plain.calls["scale"].any()
    site, rows = trace["l0"], 2 * STEPS
    np.testing.assert_allclose(site["gradient"][:rows], 1024 * plain["l0"]["gradient"][:])
    for name in ("update", "hidden", "input"):
        for first in (0, rows):
            found = site.gradient(name)[first : first + rows]
            np.testing.assert_allclose(found, plain["l0"].gradient(name)[:], atol=1e-14)
    expected = expected_sources(layer, x[:, 1], torch.zeros(4, dtype=torch.float64))
    assert difference(site.sequence(3), expected) < 1e-12


def test_two_scales_of_one_call_are_unknown() -> None:
    layer, x = gru(), torch.randn(STEPS, 2, 3, dtype=torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with grutrace.trace(layer, record=RECORD, grad_scaler=scaler) as trace:
        loss = layer(x)[0].pow(3).sum()
        scaler.scale(loss).backward(retain_graph=True)
        scaler.update(16.0)
        scaler.scale(loss).backward()
    assert not trace.calls["scale"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, "expected None without record='gradient'"),
        ({"record": RECORD, "grad_scaler": 1024.0}, "a torch.amp.GradScaler; found 1024.0"),
    ],
)
def test_a_scaler_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(grutrace.OptionError, match=f"grad_scaler: .*{message}"):
        grutrace.trace(gru(), **options)


def test_a_step_that_does_not_exist() -> None:
    layer = gru()
    with grutrace.trace(layer, record=RECORD) as trace:
        layer(torch.randn(STEPS, 2, 3, dtype=torch.float64))[0].sum().backward()
    with pytest.raises(NotRecordedError, match="sequence 1 of 'l0' has no step 7: it has 7 steps"):
        trace["l0"].sequence(1).gradient_sources(STEPS)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(STEPS, 2, 3, dtype=torch.float64))
    with pytest.raises(NotRecordedError, match="'gradient' was not recorded"):
        trace["l0"].sequence(1).gradient_sources(0)


def test_every_copy_of_a_file_says_the_same(tmp_path: Path) -> None:
    layer, x = gru(), torch.randn(STEPS, 2, 3, dtype=torch.float64)
    h = torch.zeros(1, 2, 4, dtype=torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for rank in range(2):
        options: Any = {"shard": (rank, 2), "record": ("update", "gradient"), "grad_scaler": scaler}
        with grutrace.trace(layer, tmp_path / "run.h5", **options):
            scaler.scale(decode(layer, x, h, (2,), (1, 1, 5))).backward()
    first = tmp_path / "run.rank0000.h5"
    copies = {name: tmp_path / f"{name}.h5" for name in ("merge", "derive", "recover")}
    assert main(["merge", str(tmp_path / "run.rank*.h5"), "-o", str(copies["merge"])]) == 0
    assert main(["derive", str(first), "-o", str(copies["derive"])]) == 0
    assert main(["recover", str(first), "-o", str(copies["recover"])]) == 0
    with grutrace.open(first) as trace:
        expected = found_sources(trace["l0"].sequence(1))
        assert trace.calls["attached"].tolist() == [False, True, False]
        assert trace.calls["scale"].tolist() == [4.0] * 3
    for path in (tmp_path / "run.rank*.h5", *copies.values()):
        with grutrace.open(path) as trace:
            calls = trace.calls[:3]
            assert calls["attached"].tolist() == [False, True, False]
            assert calls["scale"].tolist() == [4.0] * 3
            np.testing.assert_array_equal(found_sources(trace["l0"].sequence(1)), expected)
    with grutrace.open(first) as trace:
        selected = trace.select(sequences=1)
        selected.save(tmp_path / "selected.h5")
        for one in (selected, grutrace.open(tmp_path / "selected.h5")):
            assert one.calls["attached"].tolist() == [False, True, False]
            np.testing.assert_array_equal(found_sources(one["l0"].sequence(0)), expected)
