"""Are nn.GRU's outputs solely hidden states? The script computes the answer.

    python examples/outputs_and_hidden_states.py

Every line that it prints with an ok was checked in that moment; a claim that does not hold stops
it. The same answer in prose: docs/outputs-and-hidden-states.ipynb.

Letters in the shapes: T steps, B sequences, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn.functional import pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import grutrace

T, B, H = 6, 3, 5
INPUT_SIZE = 4

#: What float32 rounding explains in states, which lie between -1 and 1.
ROUNDING = 1e-6


def claim(text: str, holds: bool) -> None:
    """Print what was found to hold.

    Raises:
        AssertionError: It does not hold.
    """
    if not holds:
        raise AssertionError(text)
    print(f"  ok  {text}")


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= ROUNDING)


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by far more than rounding."""
    return bool((a - b).abs().max() > 1e3 * ROUNDING)


def one_layer() -> None:
    print("One layer: output is h(t) of every step, h_n the last of them")
    gru = nn.GRU(INPUT_SIZE, H)
    output, h_n = gru(torch.randn(T, B, INPUT_SIZE))
    claim("h_n is a tensor, not a tuple as nn.LSTM's (h_n, c_n)", isinstance(h_n, Tensor))
    claim("output has the shape (T, B, H)", output.shape == (T, B, H))
    claim("h_n has the shape (1, B, H)", h_n.shape == (1, B, H))
    claim("output[-1] equals h_n[0] bit for bit", torch.equal(output[-1], h_n[0]))

    cell = nn.GRUCell(INPUT_SIZE, H)
    cell.load_state_dict({name[:-3]: value for name, value in gru.state_dict().items()})
    x = torch.randn(T, B, INPUT_SIZE)
    output, _ = gru(x)
    hidden = torch.zeros(B, H)
    states = []
    for step in range(T):
        hidden = cell(x[step], hidden)
        states.append(hidden)
    claim(
        "output[t] is the hidden state that nn.GRUCell returns at step t",
        close(torch.stack(states), output),
    )


def stack() -> None:
    print("A stack: output shows the top layer only")
    model = nn.GRU(INPUT_SIZE, H, num_layers=3)
    x = torch.randn(T, B, INPUT_SIZE)
    with grutrace.trace(model) as trace:
        output, h_n = model(x)
    claim("h_n has one state a layer: (3, B, H)", h_n.shape == (3, B, H))
    claim("h_n[-1], the top layer's, equals output[-1]", torch.equal(h_n[-1], output[-1]))
    for layer in range(3):
        states = trace[f"l{layer}"].padded("hidden")[0]
        claim(
            f"grutrace: the last of layer {layer}'s states is h_n[{layer}]",
            close(torch.tensor(states[:, -1]), h_n[layer]),
        )
    top = torch.tensor(trace["l2"].padded("hidden")[0]).transpose(0, 1)
    claim("grutrace: the top layer's states are output", close(top, output))
    lower = torch.tensor(trace["l0"].padded("hidden")[0]).transpose(0, 1)
    claim("the states of the layers below are others", differ(lower, output))


def both_directions() -> None:
    print("Both directions: the reverse direction's last state is at step 0")
    gru = nn.GRU(INPUT_SIZE, H, bidirectional=True)
    x = torch.randn(T, B, INPUT_SIZE)
    output, h_n = gru(x)
    forward, reverse = output[..., :H], output[..., H:]
    claim("output is (T, B, 2 H): forward first, then reverse", output.shape == (T, B, 2 * H))
    claim("h_n[0] is the forward state at the last step", torch.equal(h_n[0], forward[-1]))
    claim("h_n[1] is the reverse state at step 0", torch.equal(h_n[1], reverse[0]))
    claim("output[-1] is not both final states", differ(reverse[-1], h_n[1]))
    seen, _ = gru(x[-1:])
    claim(
        "the reverse state in output[-1] has read the last input and nothing else",
        close(seen[0, :, H:], reverse[-1]),
    )
    both = torch.cat((h_n[-2], h_n[-1]), dim=-1)
    claim(
        "cat((h_n[-2], h_n[-1])) is both final states",
        torch.equal(both, torch.cat((forward[-1], reverse[0]), dim=-1)),
    )


def batch_first() -> None:
    print("batch_first: output is turned, h_n is not")
    gru = nn.GRU(INPUT_SIZE, H, batch_first=True)
    output, h_n = gru(torch.randn(B, T, INPUT_SIZE))
    claim("output is (B, T, H)", output.shape == (B, T, H))
    claim("h_n is still (L x D, B, H)", h_n.shape == (1, B, H))
    claim("output[:, -1] is the last state", torch.equal(output[:, -1], h_n[0]))
    claim("output[-1] is the last sequence of the batch", output[-1].shape == (T, H))


def padded_and_packed() -> None:
    print("Sequences of different lengths")
    lengths = torch.tensor([4, 6, 2])
    gru = nn.GRU(INPUT_SIZE, H, batch_first=True, bidirectional=True)
    x = torch.randn(B, T, INPUT_SIZE)
    x[torch.arange(T) >= lengths[:, None]] = 0
    alone = [gru(x[row : row + 1, :length]) for row, length in enumerate(lengths)]
    final = torch.cat([h_n for _, h_n in alone], dim=1)

    output, h_n = gru(x)
    ends = output[torch.arange(B), lengths - 1]
    claim("padded: output[:, -1] is the state after the padding", differ(output[:, -1], ends))
    claim("padded: and so is h_n", torch.equal(h_n[0], output[:, -1, :H]))
    claim("padded: which is not the state at the sequence's end", differ(h_n[0], final[0]))
    claim("padded: output[b, length - 1] is the forward final state", close(ends[:, :H], final[0]))
    claim("padded: the reverse direction began in the padding", differ(output[:, 0, H:], final[1]))

    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, h_n = gru(packed)
    claim("packed: h_n is right, in both directions and in your order", close(h_n, final))
    padded, _ = pad_packed_sequence(output, batch_first=True)
    past_end = torch.arange(T) >= lengths[:, None]
    claim("packed: padded again, output is 0 past the end", not padded[past_end].any())
    claim("packed: so output[:, -1] is 0 for a short sequence", not padded[lengths < T, -1].any())

    with grutrace.trace(gru) as trace:
        gru(packed)
    results = [len(trace["l0"].sequence(row).hidden) for row in range(B)]
    claim("grutrace: a packed sequence has its own length", results == lengths.tolist())


def equations(
    gru: nn.GRU | nn.GRUCell, x: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of PyTorch's GRU: reset, update, candidate and the new state."""
    w_ih, w_hh, b_ih, b_hh = gru.parameters()
    x_r, x_z, x_n = (x @ w_ih.T + b_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = (previous @ w_hh.T + b_hh).chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return r, z, n, (1 - z) * n + z * previous


def gates() -> None:
    print("The gates: not in output, not in h_n, not in the weights")
    gru = nn.GRU(INPUT_SIZE, H)
    x = torch.randn(T, B, INPUT_SIZE)
    with grutrace.trace(gru) as trace:
        output, _ = gru(x)
    previous = pad(output, (0, 0, 0, 0, 1, 0))[:-1]  # h0 = 0 comes first, the last state falls out
    expected = equations(gru, x, previous)
    for name, value in zip(("reset", "update", "candidate", "hidden"), expected, strict=True):
        recorded = torch.tensor(trace["l0"].padded(name)[0]).transpose(0, 1)
        claim(f"grutrace: {name} follows PyTorch's equation", close(recorded, value))
    r, z, n, _ = expected
    claim(
        "h = (1 - z) n + z h' gives output back, so z = 1 keeps",
        close((1 - z) * n + z * previous, output),
    )
    claim(
        "output alone does not tell z: z = 0 with n = h would have given the same output",
        torch.equal((1 - torch.zeros_like(z)) * output + torch.zeros_like(z) * previous, output),
    )

    claim("weight_ih_l0 has the shape (3 H, I)", gru.weight_ih_l0.shape == (3 * H, INPUT_SIZE))
    claim("a gate has the shape (T, B, H)", z.shape == (T, B, H))
    _, other_x, _, _ = equations(gru, x + 1, previous)
    _, other_h, _, _ = equations(gru, x, -previous)
    claim("the same weights, another input: another gate", differ(other_x, z))
    claim("the same weights and input, another state: another gate", differ(other_h[1:], z[1:]))
    claim("at one step the sequences of a batch have different gates", differ(r[0, 0], r[0, 1]))


def with_negated_update(gru: nn.GRU) -> nn.GRU:
    """The same layer with its update gate turned round: z becomes 1 - z, by -a instead of a."""
    turned = copy.deepcopy(gru)
    with torch.no_grad():
        for parameter in turned.parameters():
            parameter[H : 2 * H] *= -1  # PyTorch stacks reset, update, candidate
    return turned


def update_convention() -> None:
    print("z = 1 keeps (PyTorch, Cho et al. 2014, Keras) or overwrites (Chung et al. 2014)")
    gru = nn.GRU(INPUT_SIZE, H)
    x = torch.randn(T, B, INPUT_SIZE)
    output, _ = gru(x)
    turned = with_negated_update(gru)
    hidden = torch.zeros(B, H)
    states = []
    for step in range(T):
        _, z, n, _ = equations(turned, x[step], hidden)
        hidden = (1 - z) * hidden + z * n
        states.append(hidden)
    claim(
        "update rows negated, h = (1 - z) h' + z n gives the same states",
        close(torch.stack(states), output),
    )
    previous = pad(output, (0, 0, 0, 0, 1, 0))[:-1]
    z, z_turned = (equations(layer, x, previous)[1] for layer in (gru, turned))
    claim("and its z is 1 - z", close(z_turned, 1 - z))
    swapped, _ = turned(x)
    claim("without the conversion the states are others", differ(swapped, output))


def reset_convention() -> None:
    print("r outside the product, r * (U h) (PyTorch), or inside, U (r * h) (Cho, Chung)")
    u = nn.GRU(INPUT_SIZE, H).weight_hh_l0[2 * H :].detach()
    h, r = torch.randn(H), torch.rand(H)
    claim("the same weights give other candidates", differ(r * (u @ h), u @ (r * h)))
    outside = jacobian(lambda r: r * (u @ h), r)
    inside = jacobian(lambda r: u @ (r * h), r)
    claim("outside, a unit's reset gate reaches that unit only", is_diagonal(outside))
    claim(
        "inside, it reaches every unit: no exchange of weights undoes that", not is_diagonal(inside)
    )
    u = torch.diag(torch.randn(H))
    claim(
        "for a diagonal U, where no unit reads another, both are the same",
        close(r * (u @ h), u @ (r * h)),
    )


def is_diagonal(matrix: Tensor) -> bool:
    return torch.equal(matrix, torch.diag(matrix.diagonal()))


def biases() -> None:
    print("One bias or two")
    gru = nn.GRU(INPUT_SIZE, H)
    x = torch.randn(T, B, INPUT_SIZE)
    output, _ = gru(x)
    claim(
        "reset and update need one: b_hh moves into b_ih", close(moved(gru, 0, 2 * H)(x)[0], output)
    )
    claim(
        "the candidate needs two, since r multiplies b_hn",
        differ(moved(gru, 2 * H, 3 * H)(x)[0], output),
    )


def moved(gru: nn.GRU, first: int, end: int) -> nn.GRU:
    """The layer with these rows of b_hh added to b_ih and set to 0."""
    other = copy.deepcopy(gru)
    with torch.no_grad():
        other.bias_ih_l0[first:end] += other.bias_hh_l0[first:end]
        other.bias_hh_l0[first:end] = 0
    return other


def keras_gru(kernel: Tensor, recurrent: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Keras's GRU(reset_after=True), from its equations: kernel (I, 3H), bias (2, 3H); z, r, h."""
    hidden = torch.zeros(x.shape[1], H)
    states = []
    for inputs in x:
        x_z, x_r, x_h = (inputs @ kernel + bias[0]).chunk(3, dim=-1)
        h_z, h_r, h_h = (hidden @ recurrent + bias[1]).chunk(3, dim=-1)
        z = torch.sigmoid(x_z + h_z)
        candidate = torch.tanh(x_h + torch.sigmoid(x_r + h_r) * h_h)
        hidden = z * hidden + (1 - z) * candidate
        states.append(hidden)
    return torch.stack(states)


def keras_convention() -> None:
    print("Keras, reset_after=True: the same equations, the weights in another order")
    gru = nn.GRU(INPUT_SIZE, H)
    x = torch.randn(T, B, INPUT_SIZE)
    w_ih, w_hh, b_ih, b_hh = (
        torch.cat([parameter[H : 2 * H], parameter[:H], parameter[2 * H :]])
        for parameter in gru.parameters()
    )
    states = keras_gru(w_ih.T, w_hh.T, torch.stack([b_ih, b_hh]), x)
    claim("blocks r, z, n -> z, r, n, matrices transposed: same states", close(states, gru(x)[0]))


def main() -> int:
    torch.manual_seed(0)
    with torch.no_grad():
        one_layer()
        stack()
        both_directions()
        batch_first()
        padded_and_packed()
        gates()
        update_convention()
        reset_convention()
        biases()
        keras_convention()
    print("So: yes, output and h_n hold hidden states and nothing else. For the gates, trace.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
