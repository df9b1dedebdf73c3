"""Watch a trained sequence-to-sequence model turn letters into phonemes.

The package g2p-en (https://github.com/Kyubyong/g2p) ships a trained grapheme-to-phoneme model: a
GRU encoder reads the letters of an English word, a GRU decoder writes its phonemes. Here the same
weights run as an ordinary PyTorch module, and grutrace records every gate of both GRUs:

    pip install ".[demo]"         # in a checkout of grutrace
    python examples/g2p_seq2seq.py hello world

prints the phonemes and the statistics of the gates, and leaves the trace in g2p.h5 and a picture
of the encoder's update gate in update_gate_hello.png.

Tokens in the trace: a step of the encoder has the letter that it read, a step of the decoder
the phoneme that it produced. The last token of both is the end mark, </s>.
"""

from __future__ import annotations

import argparse
import ast
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import grutrace
from grutrace.storage.read.site import SiteTrace

INSTALL = 'this example needs its extra: pip install ".[demo]" in the checkout of grutrace'

try:
    import matplotlib
    import matplotlib.pyplot as plt

    from grutrace.cli.stats import print_summaries, summarize_sites
except ImportError:
    if __name__ != "__main__":
        raise
    print(INSTALL, file=sys.stderr)
    sys.exit(2)

WORDS = ("grapheme", "phoneme", "thought", "through", "knight", "colonel", "rhythm", "queue")

END = "</s>"  # closes the letters and the phonemes alike
START = "<s>"  # what the decoder reads first
MAX_PHONEMES = 20  # where g2p-en gives up

#: Our parameters, and what g2p-en calls them.
WEIGHTS = {
    "letter_embedding.weight": "enc_emb",
    "encoder.weight_ih_l0": "enc_w_ih",
    "encoder.weight_hh_l0": "enc_w_hh",
    "encoder.bias_ih_l0": "enc_b_ih",
    "encoder.bias_hh_l0": "enc_b_hh",
    "phoneme_embedding.weight": "dec_emb",
    "decoder.weight_ih": "dec_w_ih",
    "decoder.weight_hh": "dec_w_hh",
    "decoder.bias_ih": "dec_b_ih",
    "decoder.bias_hh": "dec_b_hh",
    "output.weight": "fc_w",
    "output.bias": "fc_b",
}


class WordError(ValueError):
    """A word that the model cannot read."""


class GraphemeToPhoneme(nn.Module):
    """A GRU encoder over letters and a greedy GRUCell decoder over phonemes.

    Attributes:
        graphemes: The letters and marks that the encoder knows, in the order of its embedding.
        phonemes: The phonemes and marks that the decoder knows, likewise.
    """

    def __init__(self, graphemes: list[str], phonemes: list[str], hidden_size: int) -> None:
        super().__init__()
        self.graphemes = graphemes
        self.phonemes = phonemes
        self.letter_embedding = nn.Embedding(len(graphemes), hidden_size)
        self.encoder = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.phoneme_embedding = nn.Embedding(len(phonemes), hidden_size)
        self.decoder = nn.GRUCell(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, len(phonemes))

    def forward(self, words: list[Tensor]) -> list[list[int]]:
        """Phonemes of every word, the end mark included; a word is its letters' numbers."""
        lengths = torch.tensor([len(word) for word in words])
        letters = self.letter_embedding(pad_sequence(words, batch_first=True))
        packed = pack_padded_sequence(letters, lengths, batch_first=True, enforce_sorted=False)
        _, h_n = self.encoder(packed)
        return self.decode(h_n[0])

    def decode(self, hidden: Tensor) -> list[list[int]]:
        """Greedy decoding from the states (B, H). A word leaves the batch when it has ended."""
        end = self.phonemes.index(END)
        produced: list[list[int]] = [[] for _ in hidden]
        rows = torch.arange(len(hidden))
        phoneme = torch.full_like(rows, self.phonemes.index(START))
        for _ in range(MAX_PHONEMES):
            hidden = self.decoder(self.phoneme_embedding(phoneme), hidden)
            phoneme = self.output(hidden).argmax(dim=1)
            for row, number in zip(rows.tolist(), phoneme.tolist(), strict=True):
                produced[row].append(number)
            goes_on = phoneme != end
            rows, phoneme, hidden = rows[goes_on], phoneme[goes_on], hidden[goes_on]
            if len(rows) == 0:
                break
        return produced

    def pronounce(self, words: Sequence[str]) -> list[list[str]]:
        """Phonemes of every word, by name; the last is ``</s>`` unless the decoder gave up."""
        numbers = [
            torch.tensor([self.graphemes.index(letter) for letter in letters_of(word)])
            for word in words
        ]
        return [[self.phonemes[number] for number in row] for row in self(numbers)]


def letters_of(word: str) -> list[str]:
    """What the encoder reads for a word."""
    return [*word, END]


def installed(name: str) -> Path:
    """Where g2p-en keeps one of its files. It is not imported: that would download corpora."""
    for file in files("g2p-en") or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise PackageNotFoundError("g2p-en")


def table(expression: ast.expr) -> list[str]:
    """The list that an expression such as ``["a"] + list("bc")`` stands for, without running it."""
    match expression:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return table(left) + table(right)
        case ast.Call(func=ast.Name(id="list"), args=[letters]):
            return list(ast.literal_eval(letters))
    return list(ast.literal_eval(expression))


def tables() -> dict[str, list[str]]:
    """g2p-en's lists of graphemes and phonemes, read from its source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in a part that is not used here
        source = ast.parse(installed("g2p.py").read_text(encoding="utf-8"))
    return {
        target.attr: table(node.value)
        for node in ast.walk(source)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and target.attr in ("graphemes", "phonemes")
    }


def load_model() -> GraphemeToPhoneme:
    """The trained model, with the weights of the installed g2p-en.

    Raises:
        PackageNotFoundError: g2p-en is not installed.
    """
    known = tables()
    with np.load(installed("checkpoint20.npz")) as arrays:
        weights = {ours: torch.from_numpy(arrays[theirs]) for ours, theirs in WEIGHTS.items()}
    hidden_size = weights["decoder.weight_hh"].shape[1]
    model = GraphemeToPhoneme(known["graphemes"], known["phonemes"], hidden_size)
    model.load_state_dict(weights)
    return model.eval()


def record(model: GraphemeToPhoneme, words: Sequence[str], path: Path) -> list[list[str]]:
    """Run the model on all words as one batch, with every gate recorded to a file."""
    with grutrace.Tracer(model, path, mode="overwrite", recording=False) as tracer:
        with tracer.recording(tag="words") as recorded, torch.inference_mode():
            phonemes = model.pronounce(words)
        recorded.annotate(tokens=[letters_of(word) for word in words], module="encoder")
        recorded.annotate(tokens=phonemes, module="decoder")
    return phonemes


def plot_update_gate(site: SiteTrace, title: str, path: Path) -> None:
    """Draw the update gate of the first word at a site of the trace.

    Units are sorted by the letter at which they last wrote. Right of that letter they only keep,
    so the bright area is what the encoder remembers, and its steps say which letter it is from.
    """
    axes = site.plot.heatmap("update", sequence=0, order="last write")
    axes.figure.suptitle(title, fontsize=16)
    axes.figure.savefig(path, dpi=150)
    plt.close(axes.figure)


def checked(word: str, graphemes: Sequence[str]) -> str:
    """The word in lower case.

    Raises:
        WordError: The word is empty or holds a character that the model does not know.
    """
    known = [grapheme for grapheme in graphemes if len(grapheme) == 1]
    expected = f"expected letters from {known[0]} to {known[-1]}"
    if not word:
        raise WordError(f"a word is empty; {expected}")
    for character in word.lower():
        if character not in known:
            raise WordError(f"{word!r} holds {character!r}; {expected}")
    return word.lower()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trace a trained grapheme-to-phoneme model.")
    parser.add_argument("words", nargs="*", default=WORDS, help="English words; a-z")
    parser.add_argument("--output", type=Path, default=Path("g2p.h5"), help="the trace to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    matplotlib.use("Agg")  # a file is written, no window is opened
    try:
        model = load_model()
        words = [checked(word, model.graphemes) for word in arguments.words]
        phonemes = record(model, words, arguments.output)
    except PackageNotFoundError:
        print(INSTALL, file=sys.stderr)
        return 2
    except (WordError, grutrace.GrutraceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    spoken = [" ".join(name for name in names if name != END) for names in phonemes]
    width = max(len(word) for word in words)
    for word, names in zip(words, spoken, strict=True):
        print(f"{word:{width}}  {names}")
    print()

    picture = arguments.output.with_name(f"update_gate_{words[0]}.png")
    with grutrace.open(arguments.output) as trace:
        print_summaries(summarize_sites(trace))
        plot_update_gate(trace["encoder.l0"], f"{words[0]}\n{spoken[0]}", picture)
    print(f"\ntrace: {arguments.output}\npicture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
