"""Nanopore consensus: trained weights, a bidirectional stack over hundreds of steps."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.packages.needs import needs
from tests.runs import check_run

with contextlib.redirect_stderr(io.StringIO()):
    medaka = needs("medaka")
    needs("medaka.models")

from medaka.models import open_model

MODELS = sorted((Path(medaka.__file__).parent / "data").glob("*_model_pt.tar.gz"))
SITES = ("gru.l0", "gru.l0_reverse", "gru.l1", "gru.l1_reverse")


def pileup(columns: int, reads: int = 2) -> torch.Tensor:
    """(B, T, 10) counts of bases by strand, in parts of the depth: mostly one base a column."""
    generator = np.random.default_rng(0)
    counts = generator.multinomial(3, np.full(10, 0.1), (reads, columns)).astype(np.float32)
    base = generator.integers(4, size=(reads, columns))
    strands = generator.multinomial(30, [0.5, 0.5], (reads, columns))
    for strand in range(2):
        bases = (base + 5 * strand)[..., np.newaxis]
        held = np.take_along_axis(counts, bases, -1)
        np.put_along_axis(counts, bases, held + strands[..., strand : strand + 1], -1)
    return torch.tensor(counts / counts.sum(-1, keepdims=True))


def test_the_wheel_holds_models() -> None:
    assert len(MODELS) >= 4


@pytest.mark.parametrize("archive", MODELS, ids=lambda path: path.name.split("_model")[0])
def test_trained_weights(archive: Path, tmp_path: Path) -> None:
    def load(_: object = None) -> torch.nn.Module:
        with open_model(str(archive)) as store:
            return store.load_model().eval()

    def predict(model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(pileup(300))

    # The model holds a logger, which copy.deepcopy refuses: load it anew.
    trace = check_run(load(), predict, tmp_path, load)
    assert trace.sites == SITES
    assert trace["gru.l1_reverse"].lengths.tolist() == [300, 300]
    # Trained gates open and close; those of fresh weights stay around one half.
    update = trace["gru.l1"].update[:]
    assert ((update < 0.01) | (update > 0.99)).mean() > 0.02
