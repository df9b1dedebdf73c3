"""Recommenders: padded click histories, packed in another order, some of them empty."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.packages.needs import needs
from tests.runs import check_run

needs("torch_rechub.models.matching")

from torch_rechub.basic.features import SequenceFeature, SparseFeature  # noqa: E402
from torch_rechub.basic.initializers import RandomNormal  # noqa: E402
from torch_rechub.models.matching import NARM, GRU4Rec  # noqa: E402
from torch_rechub.models.ranking import DIEN  # noqa: E402

ITEMS, LONGEST = 50, 9
LENGTHS = [3, 9, 1, 6, 9, 2]


@pytest.fixture
def history() -> Tensor:
    """(B, T) items clicked, 0 after the last."""
    torch.manual_seed(0)
    clicked = torch.randint(1, ITEMS, (len(LENGTHS), LONGEST))
    return clicked * (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None])


def clicks(name: str, **options: object) -> SequenceFeature:
    """A feature with embeddings of size 1, not 1e-4, so that the gates move."""
    return SequenceFeature(name, ITEMS, 8, initializer=RandomNormal(0, 1.0), **options)


def test_narm_packs_sessions_out_of_order(history: Tensor, tmp_path: Path) -> None:
    model = NARM(clicks("history"), 12, 0.25, 0.5)

    def train(model: NARM) -> Tensor:
        scores = model({"history": history})
        scores.logsumexp(1).mean().backward()
        return scores

    trace = check_run(model, train, tmp_path)
    assert trace.sites == ("gru.l0",)
    assert trace["gru.l0"].lengths.tolist() == LENGTHS


def test_gru4rec_runs_over_the_padding(history: Tensor, tmp_path: Path) -> None:
    """Two layers without biases, fed the padded batch: the padding's steps are steps as well."""
    user = SparseFeature("user", 10, 8)
    item = SparseFeature("item", ITEMS, 8, initializer=RandomNormal(0, 1.0))
    seen = clicks("history", pooling="concat", shared_with="item")
    others = clicks("others", pooling="concat", shared_with="item")
    model = GRU4Rec([user], [seen], [item], [others], {"dims": [16, 8]})
    batch = {
        "user": torch.arange(6),
        "item": history[:, 0],
        "history": history,
        "others": history.flip(0)[:, :4],
    }
    model.eval()
    trace = check_run(model, lambda model: model(batch), tmp_path)
    assert trace.sites == ("gru.l0", "gru.l1")
    assert trace["gru.l1"].lengths.tolist() == [LONGEST] * 6
    assert set(trace["gru.l1"].weights()) == {"weight_ih", "weight_hh"}


def test_dien_skips_users_without_a_history(history: Tensor, tmp_path: Path) -> None:
    """Two histories per user. Its AUGRU is written in Python and is not traced."""
    history[2] = 0
    item = SparseFeature("item", ITEMS, 8, initializer=RandomNormal(0, 1.0))
    shop = SparseFeature("shop", ITEMS, 8, initializer=RandomNormal(0, 1.0))
    past = [
        clicks(f"{name}s", pooling="concat", shared_with=name, padding_idx=0)
        for name in ("item", "shop")
    ]
    others = [
        clicks(f"other_{name}s", pooling="concat", shared_with=name, padding_idx=0)
        for name in ("item", "shop")
    ]
    user = SparseFeature("user", 10, 8)
    model = DIEN([user], past, others, [item, shop], {"dims": [16]})
    batch = {
        "user": torch.arange(6),
        "item": torch.arange(1, 7),
        "shop": torch.arange(7, 13),
        "items": history,
        "shops": history.flip(0),
        "other_items": history.flip(0),
        "other_shops": history,
    }

    def train(model: DIEN) -> tuple[Tensor, Tensor]:
        prediction, auxiliary = model(batch)
        (prediction.mean() + auxiliary).backward()
        return prediction, auxiliary

    trace = check_run(model, train, tmp_path)
    assert trace.sites == ("interest_extractor_layers.0.l0", "interest_extractor_layers.1.l0")
    lengths = [length for row, length in enumerate(LENGTHS) if row != 2]
    assert trace[trace.sites[0]].lengths.tolist() == lengths
    assert trace[trace.sites[1]].lengths.tolist() == lengths[::-1]
