"""A differentiable trace in the models that users have: in-place changes, training, checkpoints."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import grutrace
from grutrace.errors import (
    GrutraceWarning,
    NotRecordedError,
    OptionError,
    ResidualError,
    StateError,
    UnsupportedError,
)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(x, y, atol=tolerance, rtol=1e-4) for x, y in zip(a, b, strict=True))


class InPlace(nn.Module):
    """Changes the output of its layer, and the final states, in place."""

    def __init__(self, form: str, *, in_place: bool = True) -> None:
        super().__init__()
        self.rnn: Any = (
            nn.GRUCell(3, 4) if form == "cell" else nn.GRU(3, 4, 2, batch_first=form == "batch")
        )
        self.form, self.in_place = form, in_place

    def forward(self, x: Tensor) -> Tensor:
        final = torch.zeros((), dtype=x.dtype)
        if self.form == "cell":
            output = self.rnn(x[0])
        elif self.form == "unbatched":
            output, final = self.rnn(x[0])
        elif self.form == "packed":
            lengths = torch.tensor([3, 5, 4, 5, 2])
            packed, final = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
            output = packed.data
        else:
            output, final = self.rnn(x)
        if self.in_place:
            output.relu_()
            final.mul_(2)
        else:
            output, final = output.relu(), final * 2
        return output.square().sum() + final.pow(3).sum()


FORMS = ["time", "batch", "unbatched", "packed", "cell"]


@pytest.mark.parametrize("form", FORMS)
def test_in_place_changes_by_the_model_break_nothing(form: str) -> None:
    torch.manual_seed(0)
    model = InPlace(form).double()
    plain = copy.deepcopy(model)
    plain.in_place = False
    x = torch.randn(5, 5, 3, dtype=torch.float64)
    found, arrived = [], []
    for each in (model, plain):
        with grutrace.trace(each, differentiable=True, check="raise") as trace:
            loss = each(x)
        sites = [trace[name] for name in trace.sites]
        arrived.append([site.gradient("update", of=loss) for site in sites])
        (loss + sum(site.update.square().sum() + site.hidden.sum() for site in sites)).backward()
        found.append(gradients(each))
    assert close(*found, tolerance=1e-12)
    assert close(*arrived, tolerance=1e-12)


def test_control_without_copies_an_in_place_change_breaks_backward() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4)
    output, _ = layer(torch.randn(5, 2, 3))
    gate = torch.sigmoid(nn.functional.linear(output, layer.weight_hh_l0))
    output.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gate.sum().backward()


def test_a_sparsity_loss_trains_the_gate() -> None:
    torch.manual_seed(0)
    model = nn.GRU(4, 8, batch_first=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    x = torch.randn(16, 10, 4)
    means = []
    with grutrace.trace(model, differentiable=True) as trace:
        for _ in range(60):
            optimizer.zero_grad()
            output, _ = model(x)
            update = trace["l0"].update
            (output.square().mean() + update.mean()).backward()
            optimizer.step()
            means.append(float(update.detach().mean()))
    assert means[0] > 0.4
    assert means[-1] < 0.1


def test_control_the_task_alone_does_not_train_the_gate() -> None:
    torch.manual_seed(0)
    model = nn.GRU(4, 8, batch_first=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    x = torch.randn(16, 10, 4)
    for _ in range(60):
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
    with grutrace.trace(model) as trace:
        model(x)
    assert trace["l0"].update.mean() > 0.4


@pytest.mark.parametrize("kind", ["cleared", "last", "all"])
def test_the_graph_is_released(kind: str) -> None:
    """After many steps only the last call is alive, with its graph."""
    model = nn.GRU(3, 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    options: Any = {"keep": "last"} if kind == "last" else {}
    alive: list[weakref.ref[Any]] = []
    with grutrace.trace(model, differentiable=True, **options) as trace:
        for _ in range(30):
            optimizer.zero_grad()
            model(torch.randn(5, 2, 3))
            update = trace["l1"].update
            update.mean().backward()
            alive.append(weakref.ref(update))
            del update
            optimizer.step()
            if kind == "cleared":
                trace.clear()
        gc.collect()
        # With other weights a call replaces the earlier ones, which cannot be used any more.
        assert sum(reference() is not None for reference in alive) == (kind != "cleared")
    trace.clear()
    gc.collect()
    assert all(reference() is None for reference in alive)


#: Trains in a process of its own, and prints how much it grew in 900 steps, and in 100 calls whose
#: graph is not released.
TRAINING = """
import ctypes, gc, sys
import torch
from torch import nn
import grutrace

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x)[0].square().mean()
        trace["l0"].gradient("update", of=loss)
        (loss + trace["l1"].update.mean()).backward()
        optimizer.step()
        if kind == "cleared":
            trace.clear()

kind = sys.argv[1]
torch.set_num_threads(1)
model, x = nn.GRU(16, 32, 2), torch.randn(8, 8, 16)
optimizer = torch.optim.SGD(model.parameters(), 0.01)
options = {"keep": "last"} if kind == "last" else {}
with grutrace.trace(model, differentiable=True, **options) as trace:
    train(100)
    before = resident()
    train(900)
    trained = resident()
    for _ in range(100):
        model(x)
    print(trained - before, resident() - trained)
"""


@pytest.mark.measures
@pytest.mark.parametrize("kind", ["cleared", "last", "all"])
def test_memory_stays_flat_over_a_thousand_training_steps(kind: str) -> None:
    command = [sys.executable, "-c", TRAINING, kind]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    growth, kept = map(int, printed.split())
    # One call holds some sixty tensors of 8 * 8 * 32 floats: half a megabyte.
    assert growth < 20e6
    # The control: what is not released can be seen.
    assert (kept > 20e6) == (kind != "last")


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.rnn, self.reentrant = nn.GRU(3, 4, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            output: Tensor = self.rnn(x)[0]
        else:
            output = checkpoint(lambda x: self.rnn(x)[0], x, use_reentrant=self.reentrant)
        return output.square().sum()


def test_a_checkpoint_that_is_not_reentrant_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = Checkpointed(False)
    plain = Checkpointed(None)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 2, 3, requires_grad=True)
    found, arrived = [], []
    for each in (model, plain):
        with grutrace.trace(each, differentiable=True) as trace:
            loss = each(x)
        arrived.append(trace["rnn.l0"].gradient("update", of=loss))
        (loss + trace["rnn.l0"].update.square().sum()).backward()
        found.append(gradients(each))
    assert close(*found)
    assert torch.allclose(*arrived, atol=1e-6)
    assert len(trace["rnn.l0"]) == 2


def test_a_reentrant_checkpoint_is_refused_by_name() -> None:
    model = Checkpointed(True)
    x = torch.randn(5, 2, 3, requires_grad=True)
    with grutrace.trace(model, differentiable=True) as trace:
        with pytest.warns(GrutraceWarning, match="use_reentrant=False"):
            loss = model(x)
        with pytest.raises(NotRecordedError, match="use_reentrant=False"):
            _ = trace["rnn.l0"].update
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.GRU(3, 4, 2)
    x = torch.randn(5, 2, 3)
    with grutrace.trace(model, differentiable=True, check="raise") as trace:
        with torch.autocast("cpu", dtype=dtype):
            output, _ = model(x)
            loss = output.float().square().sum()
        # Read outside of it: the gates are computed as the kernel did.
        rows, arrived = trace["l1"].update, trace["l1"].gradient("update", of=loss)
        (loss + rows.float().sum()).backward()
    with grutrace.trace(model, differentiable=True, check="raise") as exact:
        exact_loss = model(x)[0].square().sum()
    assert arrived.dtype == torch.float32
    assert torch.allclose(rows.float(), exact["l1"].update, atol=0.02)
    assert not torch.equal(rows.float(), exact["l1"].update)
    assert torch.allclose(arrived, exact["l1"].gradient("update", of=exact_loss), atol=0.05)


def test_read_within_autocast_of_a_call_without_it() -> None:
    torch.manual_seed(0)
    model = nn.GRU(3, 4)
    with grutrace.trace(model, differentiable=True, check="raise") as trace:
        model(torch.randn(5, 2, 3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert trace["l0"].update.dtype == torch.float32


def test_dropout_between_the_layers() -> None:
    """The masks are those of the call: the same as of layers run one by one."""
    torch.manual_seed(0)
    model = nn.GRU(3, 4, 2, dropout=0.4).double().train()
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    torch.manual_seed(1)
    with grutrace.trace(model, differentiable=True, check="raise") as trace:
        loss = model(x)[0].square().sum()
    found = [trace[name].gradient("update", of=loss) for name in trace.sites]
    (loss + trace["l0"].update.sum() + trace["l1"].update.square().sum()).backward()

    layers = [nn.GRU(3, 4).double(), nn.GRU(4, 4).double()]
    for number, layer in enumerate(layers):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(layer, f"{name}_l0").data[...] = getattr(model, f"{name}_l{number}").data
    torch.manual_seed(1)
    with grutrace.trace(nn.ModuleList(layers), differentiable=True) as apart:
        below = layers[0](x)[0]
        expected_loss = layers[1](torch.dropout(below, 0.4, train=True))[0].square().sum()
    assert torch.equal(loss, expected_loss)
    expected = [apart[name].gradient("update", of=expected_loss) for name in apart.sites]
    assert close(found, expected, 1e-12)
    penalty = apart["0.l0"].update.sum() + apart["1.l0"].update.square().sum()
    (expected_loss + penalty).backward()
    assert close(gradients(model), gradients(nn.ModuleList(layers)), 1e-12)


def test_accumulation_a_second_backward_adds() -> None:
    torch.manual_seed(0)
    model = nn.GRU(3, 4)
    with grutrace.trace(model, differentiable=True) as trace:
        model(torch.randn(5, 2, 3))
        model(torch.randn(4, 2, 3))
    update = trace["l0"].update
    assert update.shape == (18, 4)
    update[:10].sum().backward(retain_graph=True)
    first = gradients(model)
    update[10:].sum().backward(retain_graph=True)
    both = gradients(model)
    model.zero_grad()
    update.sum().backward()
    assert close(gradients(model), both)
    assert not close(first, both)


def test_a_frozen_layer_and_a_forward_without_gradients() -> None:
    model = nn.GRU(3, 4, 2).requires_grad_(False)
    x = torch.randn(5, 2, 3, requires_grad=True)
    with grutrace.trace(model, differentiable=True) as trace:
        loss = model(x)[0].sum()
        trace["l0"].update.sum().backward(retain_graph=True)
        assert x.grad is not None
        assert trace["l1"].gradient("update", of=loss).abs().max() > 0
        trace.clear()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                model(x)
            assert not trace["l0"].update.requires_grad
            with pytest.raises(OptionError, match="ran without gradients"):
                trace["l0"].gradient("update", of=loss)
            trace.clear()


def test_a_frozen_lowest_layer_of_a_stack() -> None:
    model = nn.GRU(3, 4, 2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("l1" in name)
    with grutrace.trace(model, differentiable=True) as trace:
        loss = model(torch.randn(5, 2, 3))[0].sum()
    assert not trace["l0"].update.requires_grad
    assert trace["l1"].update.requires_grad
    assert trace["l1"].gradient("update", of=loss).abs().max() > 0


@pytest.mark.parametrize("change", ["optimizer", "data pointer"])
def test_gates_of_earlier_weights_are_refused(change: str) -> None:
    model = nn.GRU(3, 4)
    with grutrace.trace(model, differentiable=True) as trace:
        loss = model(torch.randn(5, 2, 3))[0].sum()
    if change == "optimizer":
        loss.backward(retain_graph=True)
        torch.optim.SGD(model.parameters(), 0.1).step()
    else:
        model.weight_hh_l0.data = model.weight_hh_l0.data * 2
    with pytest.raises(StateError, match=r"weights of l0 have changed since the call"):
        _ = trace["l0"].update
    with pytest.raises(StateError, match=r"read them before optimizer.step\(\)"):
        trace["l0"].gradient("update", of=loss)
    # The states need no weights.
    assert trace["l0"].hidden.shape == (10, 4)


def test_calls_with_earlier_weights_make_room_for_new_ones() -> None:
    model = nn.GRU(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with grutrace.trace(model, differentiable=True, check="raise") as trace:
        for length in (5, 6, 7):
            optimizer.zero_grad()
            model(torch.randn(length, 2, 3))
            model(torch.randn(length, 2, 3))
            assert trace["l0"].lengths.tolist() == [length] * 4
            trace["l0"].update.sum().backward()
            optimizer.step()


def test_a_change_that_pytorch_does_not_notice_shows_in_the_residual() -> None:
    model = nn.GRU(3, 4)
    with grutrace.trace(model, differentiable=True, check="raise") as trace:
        model(torch.randn(5, 2, 3))
    assert trace["l0"].residual < 1e-6
    trace.clear()
    with grutrace.trace(model, differentiable=True, check="raise") as trace:
        model(torch.randn(5, 2, 3))
    model.weight_hh_l0.data.mul_(2)
    with pytest.raises(ResidualError, match="do not lead to the states of the kernel"):
        _ = trace["l0"].update


def test_a_freed_graph_is_one_clear_error() -> None:
    model = nn.GRU(3, 4)
    with grutrace.trace(model, differentiable=True) as trace:
        loss = model(torch.randn(5, 2, 3))[0].square().sum()
    loss.backward()
    with pytest.raises(StateError, match="retain_graph=True"):
        trace["l0"].gradient("update", of=loss)


def test_losses_that_cannot_be_used() -> None:
    model = nn.GRU(3, 4)
    with grutrace.trace(model, differentiable=True) as trace:
        output, _ = model(torch.randn(5, 2, 3))
    site = trace["l0"]
    for loss, match in [
        (output, "a tensor of one element; found a tensor of shape"),
        (1.0, "found 1.0"),
        (output.sum().detach(), "without a graph"),
        (model.weight_hh_l0.sum(), "does not depend on the calls of this site"),
    ]:
        with pytest.raises(OptionError, match=match):
            site.gradient("update", of=loss)
    with pytest.raises(OptionError, match=r"did you mean 'update'"):
        site.gradient("updat", of=output.sum())
    with pytest.raises(OptionError, match="one of reset, update, candidate"):
        site.gradient("hidden", of=output.sum(), preactivation=True)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(output.sum(), site.update)


def test_what_is_not_there_is_one_clear_error() -> None:
    model = nn.ModuleDict({"a": nn.GRU(3, 4), "b": nn.GRU(3, 4)})
    trace = grutrace.trace(model, differentiable=True)
    with pytest.raises(NotRecordedError, match=r"holds no call of a\.l0"):
        _ = trace["a.l0"].update
    with pytest.warns(GrutraceWarning, match="nothing was recorded of b"), trace:
        model["a"](torch.randn(5, 2, 3))
    with pytest.raises(NotRecordedError, match=r"did you mean 'a\.l0'"):
        trace["a.l"]
    with pytest.raises(NotRecordedError, match="no quantity 'gate'"):
        trace["a.l0"].rows("gate")
    with pytest.raises(NotRecordedError, match="no sequence 2"):
        trace["a.l0"].sequence(2)
    with pytest.raises(StateError, match="closed"), trace:
        pass
    assert repr(trace) == "<differentiable trace of ModuleDict: 2 sites, 1 calls>"
    assert repr(trace["a.l0"].sequence(-1)) == "<sequence 1 of a.l0: 5 steps, differentiable>"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gates": "deferred"}, "gates: not an option with differentiable=True"),
        ({"record": ("update",)}, "record: not an option with differentiable=True"),
        ({"stacks": "rerun"}, "run again are not in the model's graph"),
        ({"keep": "first"}, "keep: expected one of all, last"),
        ({"kep": "last"}, "did you mean 'keep'"),
        ({"sites": "x*"}, "matches no site"),
        ({"check": "never"}, "check: expected one of"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        grutrace.trace(nn.GRU(3, 4), differentiable=True, **options)


def test_a_file_and_a_wrong_flag_are_refused(tmp_path) -> None:
    with pytest.raises(OptionError, match="go to no file"):
        grutrace.trace(nn.GRU(3, 4), tmp_path / "run.h5", differentiable=True)
    with pytest.raises(OptionError, match="differentiable: expected True or False"):
        grutrace.trace(nn.GRU(3, 4), differentiable="last")
    with pytest.raises(UnsupportedError, match=r"expected a model with an nn\.GRU"):
        grutrace.trace(nn.Linear(3, 4), differentiable=True)
    assert not list(tmp_path.iterdir())


def test_another_tracer_may_record_meanwhile(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.GRU(3, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    with (
        grutrace.trace(model, tmp_path / "run.h5") as stored,
        grutrace.trace(model, differentiable=True) as trace,
    ):
        model(x)
        for name in trace.sites:
            for quantity in ("reset", "update", "candidate", "hidden"):
                rows = trace[name].rows(quantity).detach().numpy()
                assert abs(rows - stored[name].rows(quantity)).max() < 1e-6


def test_a_tracer_that_reruns_layers_is_named() -> None:
    model = nn.GRU(3, 4, 2)
    with grutrace.trace(model, stacks="rerun"), grutrace.trace(model, differentiable=True) as trace:
        with pytest.warns(GrutraceWarning, match="no stacks='rerun'"):
            model(torch.randn(5, 2, 3))
        with pytest.raises(NotRecordedError, match="no stacks='rerun'"):
            _ = trace["l0"].update


def test_a_call_with_an_intervention_is_refused_by_name() -> None:
    model = nn.GRU(3, 4)
    with grutrace.trace(model, differentiable=True) as trace:
        with (
            grutrace.intervene(model, "l0", update=0.5),
            pytest.warns(GrutraceWarning, match="an intervention set its gates"),
        ):
            model(torch.randn(5, 2, 3))
        with pytest.raises(NotRecordedError, match="an intervention set its gates"):
            _ = trace["l0"].update
        model(torch.randn(5, 2, 3))
        assert trace["l0"].update.requires_grad


def test_transforms_of_torch_func_are_refused_by_name() -> None:
    model = nn.GRU(3, 4)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,))[0].sum()

    with grutrace.trace(model, differentiable=True) as trace:
        with pytest.warns(GrutraceWarning, match=r"torch\.func"):
            torch.func.grad(loss)(parameters, torch.randn(5, 2, 3))
        with pytest.raises(NotRecordedError, match=r"torch\.func"):
            _ = trace["l0"].update


def test_functional_call_with_other_weights() -> None:
    """The gates follow from the weights of the call, wherever they come from."""
    model = nn.GRU(3, 4)
    scale = torch.tensor(2.0, requires_grad=True)
    weights = {name: scale * weight.detach() for name, weight in model.named_parameters()}
    with grutrace.trace(model, differentiable=True, check="raise") as trace:
        torch.func.functional_call(model, weights, (torch.randn(5, 2, 3),))
        trace["l0"].update.square().sum().backward()
    assert scale.grad is not None
    assert scale.grad != 0


def test_weights_that_are_parametrized() -> None:
    model = nn.GRU(3, 4)
    nn.utils.parametrizations.weight_norm(model, "weight_hh_l0")
    with grutrace.trace(model, differentiable=True, check="raise") as trace:
        model(torch.randn(5, 2, 3))
        trace["l0"].update.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stopped_and_started_again() -> None:
    model = nn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    with grutrace.trace(model, differentiable=True, recording=False) as trace:
        model(x)
        trace.start()
        assert trace.is_recording
        model(x)
        trace.stop()
        model(x)
    assert len(trace["l0"]) == 2


def test_a_trace_that_nothing_refers_to_is_stopped() -> None:
    model = nn.GRU(3, 4)
    trace = grutrace.trace(model, differentiable=True)
    trace.start()
    traces = [trace]
    del trace
    with pytest.warns(GrutraceWarning, match="garbage-collected"):
        traces.clear()
    gc.collect()
    model(torch.randn(5, 2, 3))


def test_an_exception_in_the_model_leaves_nothing_behind() -> None:
    model = nn.GRU(3, 4)
    with pytest.raises(RuntimeError), grutrace.trace(model, differentiable=True):
        model(torch.randn(5, 2, 9))


def test_empty_batches_have_no_rows() -> None:
    model = nn.GRU(3, 4, batch_first=True)
    with grutrace.trace(model, differentiable=True) as trace:
        loss = model(torch.randn(0, 5, 3))[0].sum()
    assert trace["l0"].update.shape == (0, 4)
    assert trace["l0"].gradient("update", of=loss).shape == (0, 4)
    assert trace["l0"].padded("update")[0].shape == (0, 0, 4)


def test_beams_that_are_reordered_are_sequences_of_their_own() -> None:
    cell = nn.GRUCell(3, 4)
    with grutrace.trace(cell, differentiable=True) as trace:
        h = cell(torch.randn(2, 3))
        cell(torch.randn(2, 3), h[[1, 1]])
    assert sorted(trace["cell"].lengths.tolist()) == [1, 1, 2]
