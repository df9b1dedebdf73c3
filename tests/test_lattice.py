"""Traced calls equal nn.GRU and nn.GRUCell, over every option and every kind of input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch.testing._internal.common_modules import module_db

from tests.checks import check_against_kernel, check_untouched, check_untouched_and_exact
from tests.strategies import Case, cases

#: xdist starts groups first; these tests take long, and alone they would come last.
pytestmark = pytest.mark.xdist_group("lattice")


@settings(max_examples=300, deadline=None)
@given(cases())
def test_a_traced_call_is_unchanged_and_every_gate_is_right(case: Case) -> None:
    check_untouched_and_exact(case)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_lattice_with_rerun_layers(case: Case) -> None:
    check_untouched_and_exact(case, stacks="rerun")


@settings(max_examples=50, deadline=None)
@given(cases())
def test_the_same_without_gradients(case: Case) -> None:
    for parameter in case.layer.parameters():
        parameter.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        # The kernel keeps its gates only where it records gradients.
        patch.setattr("tests.checks.check_against_kernel", lambda *_: None)
        check_untouched_and_exact(case)


@settings(max_examples=100, deadline=None)
@given(cases(dtypes=(torch.float16, torch.bfloat16)))
def test_half_types_are_unchanged_and_gates_equal_the_kernels(case: Case) -> None:
    check_against_kernel(case, *check_untouched(case))


MODULES = [info for info in module_db if info.module_cls in (torch.nn.GRU, torch.nn.GRUCell)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_pytorchs_own_module_inputs(info, training) -> None:
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
    )
    assert len(inputs) > 1
    for input_ in inputs:
        layer = info.module_cls(
            *input_.constructor_input.args, **input_.constructor_input.kwargs
        ).double()
        layer.train(training)
        call = input_.forward_input
        check_untouched_and_exact(Case(layer, tuple(call.args), dict(call.kwargs)))


def test_there_are_module_inputs_for_both() -> None:
    assert {info.module_cls for info in MODULES} == {torch.nn.GRU, torch.nn.GRUCell}
