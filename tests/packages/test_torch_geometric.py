"""Graph networks: nn.GRUCell over the nodes of a graph, with its output changed in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.packages.needs import needs
from tests.runs import check_run

needs("torch_geometric")

from torch_geometric.nn import (  # noqa: E402
    AttentiveFP,
    GatedGraphConv,
    TGNMemory,
)
from torch_geometric.nn.aggr import GRUAggregation, LCMAggregation  # noqa: E402
from torch_geometric.nn.models.tgn import IdentityMessage, LastAggregator  # noqa: E402

NODES, EDGES, FEATURES, HIDDEN = 30, 80, 7, 16


@pytest.fixture
def graph() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nodes (N, F), edges (2, E), their attributes (E, 3), and which of 4 molecules (N,)."""
    torch.manual_seed(0)
    edges = torch.randint(NODES, (2, EDGES))
    molecule = torch.arange(NODES) * 4 // NODES
    return torch.randn(NODES, FEATURES), edges, torch.randn(EDGES, 3), molecule


def test_attentive_fp_changes_the_cells_output_in_place(graph, tmp_path: Path) -> None:
    """`gru(h, x).relu_()`: the kernel's output is recorded, not the changed tensor."""
    model = AttentiveFP(FEATURES, HIDDEN, 2, edge_dim=3, num_layers=3, num_timesteps=2, dropout=0.2)

    def train(model: AttentiveFP) -> Tensor:
        output = model(*graph)
        output.square().mean().backward()
        return output

    trace = check_run(model, train, tmp_path)
    assert trace.sites == ("gru.cell", "atom_grus.0.cell", "atom_grus.1.cell", "mol_gru.cell")
    # Each node is a sequence; every readout starts from relu(h), which no call gave out.
    assert [len(trace[site]) for site in trace.sites] == [NODES, NODES, NODES, 2 * 4]
    assert all((trace[site].hidden[:] < 0).any() for site in trace.sites)


def test_gated_graph_convolution_gives_one_sequence_per_node(graph, tmp_path: Path) -> None:
    nodes, edges, _, _ = graph
    model = GatedGraphConv(HIDDEN, num_layers=5, bias=False).eval()
    trace = check_run(model, lambda model: model(nodes, edges), tmp_path)
    assert trace.sites == ("rnn.cell",)
    assert trace["rnn.cell"].lengths.tolist() == [5] * NODES
    assert set(trace["rnn.cell"].weights()) == {"weight_ih", "weight_hh"}


# It makes each update twice, so two sequences end with the same state: that is said, once.
@pytest.mark.filterwarnings("ignore:cannot tell which sequence a call of gru continues")
def test_temporal_graph_memory(tmp_path: Path) -> None:
    """Memory that is kept outside the model's call, and read and updated node by node."""
    model = TGNMemory(10, 4, HIDDEN, 5, IdentityMessage(4, HIDDEN, 5), LastAggregator())
    torch.manual_seed(0)
    batches = [
        (torch.randint(10, (6,)), torch.randint(10, (6,)), 10 * t + torch.arange(6))
        for t in range(4)
    ]
    messages = torch.randn(4, 6, 4)

    def stream(model: TGNMemory) -> list[Tensor]:
        outputs = []
        for (source, target, time), message in zip(batches, messages, strict=True):
            outputs.append(model(torch.cat([source, target]).unique())[0])
            outputs[-1].square().mean().backward()
            model.update_state(source, target, time, message)
            model.detach()
        return outputs

    trace = check_run(model, stream, tmp_path)
    assert trace.sites == ("gru.cell",)
    assert len(trace.calls) == 8


@pytest.mark.parametrize("layers", [1, 2])
def test_gru_aggregation_pads_each_neighbourhood(layers: int, tmp_path: Path) -> None:
    model = GRUAggregation(FEATURES, HIDDEN, num_layers=layers)
    neighbours, index = torch.randn(12, FEATURES), torch.tensor([0] * 5 + [1] * 1 + [3] * 6)
    trace = check_run(model, lambda model: model(neighbours, index), tmp_path)
    assert trace.sites == ("gru.l0", "gru.l1")[:layers]
    # A dense batch: every node gets as many steps as the one with the most neighbours.
    assert trace["gru.l0"].lengths.tolist() == [6] * 4


def test_tree_aggregation_calls_a_cell_with_fewer_rows_each_time(tmp_path: Path) -> None:
    model = LCMAggregation(FEATURES, HIDDEN).eval()
    neighbours, index = torch.randn(14, FEATURES), torch.arange(14) // 7
    trace = check_run(model, lambda model: model(neighbours, index), tmp_path)
    assert trace.calls["batch"].tolist() == [12, 8, 4]
