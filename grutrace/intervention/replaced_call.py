"""Run a kernel call with settings: each layer by the kernel, or step by step where one is set.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from grutrace.capture.kernel_calls.replacement import GatesAsSet, InterceptedCall, ReplacedCall
from grutrace.capture.kernel_calls.torch_context import isolated_context
from grutrace.gru.kernel import Layer
from grutrace.intervention.bound import BoundSetting, Rows
from grutrace.intervention.recorded_gates import gates_as_set
from grutrace.intervention.recurrence.edits import Changes, EditsByTime
from grutrace.intervention.recurrence.shadow import run_direction
from grutrace.intervention.recurrence.steps import DirectionRun, StepGates, StepOrder
from grutrace.intervention.settings import Setting


class PreparedIntervention:
    """One call with the settings of all interventions in it.

    Args:
        call: The call.
        settings: By layer and direction, the settings that apply to the call, in order.
        finish: Called with the final states.

    Attributes:
        applied: The settings that apply to a step of the call.
    """

    def __init__(
        self,
        call: InterceptedCall,
        settings: dict[tuple[int, bool], list[BoundSetting]],
        finish: Callable[[Tensor], None],
    ) -> None:
        self._call, self._finish = call, finish
        self._orders = {
            bool(reverse): step_order(call, bool(reverse))
            for reverse in range(call.call.directions)
        }
        self._starts: dict[tuple[int, bool], int] = {}
        self._settings: dict[tuple[int, bool], list[BoundSetting]] = {}
        self.applied: set[Setting] = set()
        for key, bound in settings.items():
            starts = []
            for one in bound:
                one.check()
                start = one.first(self._orders[key[1]].times)
                if start is not None:
                    starts.append(start)
                    self.applied.add(one.setting)
            if starts:
                self._starts[key], self._settings[key] = min(starts), bound

    @property
    def is_changed(self) -> bool:
        """Whether a setting applies to the call."""
        return bool(self._settings)

    def finish(self, final: Tensor) -> None:
        """Note the final states, (L * D, B, H)."""
        self._finish(final)

    def run(self) -> ReplacedCall:
        """Run all layers."""
        call = self._call.call
        layers: list[Layer] = []
        finals: list[Tensor] = []
        gates: list[list[GatesAsSet] | None] = []
        input = call.input
        for number in range(call.num_layers):
            if number:
                input = call.between_layers(layers[-1].output)
            layer, final, layer_gates = self._run_layer(number, input)
            layers.append(layer)
            finals.append(final)
            gates.append(layer_gates)
        final = finals[0] if len(finals) == 1 else torch.cat(finals)
        return ReplacedCall(layers[-1].output, final, layers, gates)

    def _run_layer(
        self, number: int, input: Tensor
    ) -> tuple[Layer, Tensor, list[GatesAsSet] | None]:
        call = self._call.call
        directions = [bool(reverse) for reverse in range(call.directions)]
        if not any((number, reverse) in self._settings for reverse in directions):
            return *self._call.run_layer(number, input), None
        kernel = None
        if not all(self._is_whole(number, reverse) for reverse in directions):
            kernel = self._call.run_layer(number, input)
        outputs, finals, changed = [], [], False
        gates: list[dict[int, StepGates]] = []
        for reverse in directions:
            own = None
            if kernel is not None:
                output = kernel[0].output
                output = output.chunk(2, -1)[reverse] if call.bidirectional else output
                own = output, kernel[1][int(reverse)]
            if (number, reverse) in self._settings:
                result = self._run_direction(number, reverse, input, own)
                changed = changed or result[3]
            else:
                assert own is not None
                result = *own, {}, False
            outputs.append(result[0])
            finals.append(result[1])
            gates.append(result[2])
        if not changed and kernel is not None:
            return *kernel, None
        if call.bidirectional:
            output, final = torch.cat(outputs, -1), torch.stack(finals)
        else:
            output, final = outputs[0], finals[0].unsqueeze(0)
        layer = Layer(input, output)
        return layer, final, self._gates_as_set(number, input, output, gates) if changed else None

    def _is_whole(self, number: int, reverse: bool) -> bool:
        """Whether a direction sets something for every sequence from its first step on."""
        key = number, reverse
        if self._starts.get(key) != 0:
            return False
        order = self._orders[reverse]
        first = order.times[0]
        if not any(bound.covers_all(first) for bound in self._settings[key]):
            return False
        # In the reverse direction of a packed batch, shorter sequences start later.
        if order.padded or not reverse:
            return True
        return all(
            any(bound.covers_all(time) for bound in self._settings[key]) for time in order.times
        )

    def _run_direction(
        self, number: int, reverse: bool, input: Tensor, kernel: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, dict[int, StepGates], bool]:
        call, order = self._call.call, self._orders[reverse]
        bound = self._settings[number, reverse]
        changes = Changes()
        run = DirectionRun(
            input,
            call.cell_initial(number, reverse),
            call.cell_weights(number, reverse),
            order,
            EditsByTime(bound, changes),
            kernel,
            self._starts[number, reverse],
            self._call.needs_gates,
            self._call.is_cell,
        )
        result = run_direction(run)
        read = run.input, run.initial, *run.weights
        changes.require_numbers(result.output, read)
        output, final = result.output, result.final
        if kernel is not None and changes.any:
            output, final = self._with_untouched(bound, order, kernel, output, final)
        return output, final, result.gates, changes.any

    def _with_untouched(
        self,
        bound: list[BoundSetting],
        order: StepOrder,
        kernel: tuple[Tensor, Tensor],
        output: Tensor,
        final: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the states with those of sequences without a setting taken from the kernel."""
        batch = len(final)
        # By row of each time: whether its sequence has been set by then.
        touched = np.zeros(batch, bool)
        masks = {}
        for time in order.times:
            for one in bound:
                for selected in one.rows(time):
                    touched[: order.sizes[time]] |= _mask(selected, order.sizes[time])
            masks[time] = touched[: order.sizes[time]].copy()
        if all(mask.all() for mask in (masks[time] for time in order.times)):
            return output, final
        by_time = [masks[time] for time in sorted(masks)]
        rows = np.stack(by_time) if order.padded else np.concatenate(by_time)
        mask = torch.from_numpy(rows).to(output.device).unsqueeze(-1)
        final_mask = torch.from_numpy(touched).to(output.device).unsqueeze(-1)
        return (
            torch.where(mask, output, kernel[0]),
            torch.where(final_mask, final, kernel[1]),
        )

    def _gates_as_set(
        self,
        number: int,
        input: Tensor,
        output: Tensor,
        gates: Sequence[dict[int, StepGates]],
    ) -> list[GatesAsSet] | None:
        """Return the gates of a layer as they were set; others follow from its states."""
        if not self._call.needs_gates:
            return None
        call, layout = self._call.call, self._call.layout
        result = []
        with isolated_context():
            for direction, run_gates in enumerate(gates):
                reverse = bool(direction)
                hidden = output.chunk(2, -1)[direction] if call.bidirectional else output
                weights = call.cell_weights(number, reverse)
                initial = call.cell_initial(number, reverse)
                order = self._orders[reverse]
                previous = layout.previous(hidden, initial, reverse=reverse)
                bound = self._settings.get((number, reverse), [])
                result.append(
                    gates_as_set(input, hidden, previous, weights, order, run_gates, bound)
                )
        return result


def _mask(rows: Rows, size: int) -> np.ndarray:
    if rows.rows is None:
        return np.ones(size, bool)
    mask = np.zeros(size, bool)
    mask[list(rows.rows)] = True
    return mask


def step_order(call: InterceptedCall, reverse: bool) -> StepOrder:
    """Return the steps of one direction of a call."""
    sizes = call.call.batch_sizes
    if sizes is None:
        count, batch = call.call.input.shape[:2]
        rows = [batch] * count
    else:
        rows = sizes.tolist()
    times = range(len(rows) - 1, -1, -1) if reverse else range(len(rows))
    return StepOrder(times, rows, reverse, sizes is None)
