"""Translation: a packed bidirectional encoder, and a decoder with one call per token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.packages.needs import needs
from tests.runs import check_run

needs("joeynmt.model")

from joeynmt.batch import Batch  # noqa: E402
from joeynmt.model import Model, build_model  # noqa: E402
from joeynmt.search import search  # noqa: E402
from joeynmt.vocabulary import Vocabulary  # noqa: E402

SPECIALS = SimpleNamespace(
    unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>", sep_token=None,
    unk_id=0, pad_id=1, bos_id=2, eos_id=3, lang_tags=[],
)  # fmt: skip
SOURCE_LENGTHS, TARGET_LENGTH = [9, 7, 7, 4, 2], 6


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    words = Vocabulary([f"word{number}" for number in range(12)], SPECIALS)
    layers = {"rnn_type": "gru", "num_layers": 2, "hidden_size": 16, "dropout": 0.2}
    options = {
        "initializer": "normal",
        "init_weight": 0.5,
        "encoder": {"type": "recurrent", "embeddings": {"embedding_dim": 10}, **layers},
        "decoder": {"type": "recurrent", "embeddings": {"embedding_dim": 10}, **layers},
    }
    model = build_model(options, src_vocab=words, trg_vocab=words)
    model.loss_function = "crossentropy", 0.0
    return model


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    source = torch.randint(4, 16, (5, 9))
    lengths = torch.tensor(SOURCE_LENGTHS)
    source[torch.arange(9) >= lengths[:, None]] = SPECIALS.pad_id
    target = torch.randint(4, 16, (5, TARGET_LENGTH + 1))
    target[:, 0], target[:, -1] = SPECIALS.bos_id, SPECIALS.eos_id
    return Batch(
        source, lengths, None, target, None, torch.arange(5), torch.device("cpu"),
        pad_index=SPECIALS.pad_id, eos_index=SPECIALS.eos_id,
    )  # fmt: skip


SITES = (
    "encoder.rnn.l0", "encoder.rnn.l0_reverse", "encoder.rnn.l1", "encoder.rnn.l1_reverse",
    "decoder.rnn.l0", "decoder.rnn.l1",
)  # fmt: skip


def test_training(model: Model, batch: Batch, tmp_path: Path) -> None:
    model.train()

    def train(model: Model) -> tuple[Tensor, Tensor]:
        loss, scores, _, _ = model(return_type="loss", **vars(batch))
        loss.backward()
        return loss, scores

    trace = check_run(model, train, tmp_path)
    assert trace.sites == SITES
    assert trace["encoder.rnn.l1_reverse"].lengths.tolist() == SOURCE_LENGTHS
    # One call a token, one sequence a sentence.
    assert len(trace.calls) == 1 + TARGET_LENGTH
    assert trace["decoder.rnn.l1"].lengths.tolist() == [TARGET_LENGTH] * 5


def translate(model: Model, batch: Batch, beam: int) -> list[Tensor]:
    hypotheses, scores, attention = search(
        model, batch, max_output_length=8, beam_size=beam, beam_alpha=1.0, return_prob="hyp"
    )
    results: list[Any] = [hypotheses, scores, attention]
    return [torch.as_tensor(result) for result in results if result is not None]


def test_greedy_decoding(model: Model, batch: Batch, tmp_path: Path) -> None:
    trace = check_run(model.eval(), lambda model: translate(model, batch, 1), tmp_path)
    steps = len(trace.calls) - 1
    assert steps > 1
    assert trace["decoder.rnn.l0"].lengths.tolist() == [steps] * 5


def test_beam_search(model: Model, batch: Batch, tmp_path: Path) -> None:
    """Beams are copied, reordered and dropped: sequences go on, fork and end."""
    beam = 3
    trace = check_run(model.eval(), lambda model: translate(model, batch, beam), tmp_path)
    decoding = trace.sequences[trace.sequences["module"] == "decoder.rnn"]
    calls = trace.calls[trace.calls["module"] == "decoder.rnn"]
    assert (calls["batch"] % beam == 0).all()
    assert decoding["steps"].sum() == calls["batch"].sum()
    forks = decoding[decoding["parent"] >= 0]
    assert len(forks)
    # A fork's first state is, bit for bit, the one that its parent had reached.
    site = trace["decoder.rnn.l1"]
    for fork in forks:
        parent = site.sequence(fork["parent"])
        reached = parent.hidden[fork["parent_steps"] - 1]
        assert (site.sequence(fork["sequence"]).initial == reached).all()
    # Only the first call's rows, and forks, begin sequences: every other row goes on with one.
    assert len(decoding) == calls["batch"][0] + len(forks)
