"""A line attractor in a GRU that reads reviews.

Maheswaranathan, Williams, Golub, Ganguli and Sussillo (2019), "Reverse engineering recurrent
networks for sentiment classification reveals line attractor dynamics"
(https://arxiv.org/abs/1906.10720), and Maheswaranathan and Sussillo (2020), "How recurrent networks
implement contextual processing in sentiment analysis" (https://arxiv.org/abs/2004.08013).

The papers train on Yelp and IMDB reviews. Here reviews are drawn from the word list below. Each
good or bad word adds its strength to the sum that the network has to tell the sign of. A modifier
changes the word after it: "not" turns it around, "very" doubles it. All other words are neutral.

    python examples/literature/sentiment.py          # 2 minutes
    python examples/literature/sentiment.py --small  # seconds
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from report import Cell, run, show
from torch import nn

import grutrace
from grutrace.analysis import fixed_points, geometry, modes


def named(value: float, words: str) -> dict[str, float]:
    """Give each word a value."""
    return dict.fromkeys(words.split(), value)


#: Words by what they add to the sum.
VALENCE = {
    **named(2.0, "amazing awesome delicious excellent fantastic perfect wonderful"),
    **named(1.0, "enjoyable fine friendly fresh good nice pleasant tasty"),
    **named(-1.0, "average bland cold dull mediocre slow stale weak"),
    **named(-2.0, "awful disgusting dreadful horrible nasty terrible worst"),
}

#: Modifiers by the factor of the word after them.
MODIFIERS = {
    **named(-1.0, "hardly never not without"),
    **named(2.0, "extremely incredibly really very"),
}

#: All other words add nothing.
NEUTRAL = list(
    named(
        0.0,
        "a after again also and at bread but by came chair corner day dinner door drink evening "
        "for from had he her here his in it lunch menu music of on order our out plate room salad "
        "served she soup street table that the their there they this to us waiter was we were "
        "which window with you",
    )
)

WORDS = [*VALENCE, *MODIFIERS, *NEUTRAL]
NUMBERS = {word: number for number, word in enumerate(WORDS)}

#: Shares of words with a valence and of modifiers.
SHARES = (0.12, 0.05)


@dataclass(frozen=True)
class Size:
    """How much is trained and recorded.

    Attributes:
        units: H.
        length: Mean number of words of a review.
        steps: Steps of training, of 64 reviews each.
        tested: Number of reviews that are recorded.
        starts: Number of states that come to rest on the line.
        rest: Steps without input that they get for it.
    """

    units: int = 128
    length: int = 100
    steps: int = 2000
    tested: int = 1000
    starts: int = 500
    rest: int = 100


SMALL = Size(units=32, length=20, steps=250, tested=100, starts=60, rest=30)


class Reader(nn.Module):
    """Reads words, and gives the logit of a good review after each."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), units // 2)
        # The mean word is then close to no input, at which the network is analysed.
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.rnn = nn.GRU(units // 2, units, batch_first=True)
        self.readout = nn.Linear(units, 1)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return the logits, (B, T)."""
        return self.readout(self.rnn(self.embedding(words))[0])[..., 0]


def draw_reviews(count: int, length: int, draw: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw reviews of one length: numbers of the words, and the sum after each, (count, length)."""
    groups = (list(VALENCE), list(MODIFIERS), NEUTRAL)
    kinds = draw.choice(3, (count, length), p=(*SHARES, 1 - sum(SHARES)))
    # What follows a modifier is mostly a word with a valence.
    after = np.roll(kinds == 1, 1, axis=1) & (draw.random((count, length)) < 0.8)
    kinds[:, 1:][after[:, 1:]] = 0
    words = np.empty((count, length), np.int64)
    for kind, group in enumerate(groups):
        places = kinds == kind
        words[places] = draw.choice([NUMBERS[word] for word in group], int(places.sum()))
    valence = np.array([VALENCE.get(word, 0.0) for word in WORDS])[words]
    factor = np.array([MODIFIERS.get(word, 1.0) for word in WORDS])[words]
    valence[:, 1:] *= factor[:, :-1]
    return words, valence.cumsum(axis=1)


def train(size: Size) -> tuple[Reader, Reader, float]:
    """Return a trained reader, the same before the training, and its accuracy on new reviews."""
    torch.manual_seed(0)
    model, untrained = Reader(size.units), Reader(size.units)
    untrained.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    draw = np.random.default_rng(0)
    lengths = partial(draw.integers, size.length // 2, size.length * 3 // 2)
    for _ in range(size.steps):
        words, sums = (torch.from_numpy(x) for x in draw_reviews(64, int(lengths()), draw))
        logits, last = model(words)[:, -1], sums[:, -1]
        # A sum of 0 has no sign.
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits[last != 0], (last[last != 0] > 0).float()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    words, sums = draw_reviews(size.tested, size.length, draw)
    with torch.no_grad():
        right = np.sign(model(torch.from_numpy(words))[:, -1].numpy()) == np.sign(sums[:, -1])
    return model, untrained, float(right[sums[:, -1] != 0].mean())


def record(model: Reader, size: Size) -> tuple[Any, np.ndarray]:
    """Trace new reviews; return the site, and the sum after each word, (reviews, words)."""
    words, sums = draw_reviews(size.tested, size.length, np.random.default_rng(1))
    with torch.no_grad(), grutrace.trace(model, record=("hidden", "input")) as trace:
        model(torch.from_numpy(words))
    return trace["rnn.l0"], sums


@dataclass(frozen=True)
class Line:
    """The line on which a reader comes to rest.

    Attributes:
        points: Number of states at rest.
        speed: Median of the length of one more step, over that of the state.
        fixed: Number of fixed points that they are drawn to.
        flatness: Share of their variance along their first principal direction.
        readout: Size of the cosine between that direction and the readout.
        timescales: (points, 3) timescales of the three slowest modes at each, in words.
        overlap: (points,) size of the cosine of the slowest mode with that direction.
        chance: Mean of the same for random directions.
        projections: By kind of word, (points,) mean of what a word adds to the slowest mode, along
            the readout.
        error: Median relative error of a linear step from the nearest point.
        correlation: Between the sum of the words so far and the place along the line.
    """

    points: int
    speed: float
    fixed: int
    flatness: float
    readout: float
    timescales: np.ndarray
    overlap: np.ndarray
    chance: float
    projections: dict[str, np.ndarray]
    error: float
    correlation: float


def come_to_rest(model: Reader, site: Any, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Run the network on without input from states of reviews; return the last two states of each.

    A search would go on to the few points of the line that are fixed. The paper's ends where a
    state is slow enough.
    """
    rows = np.random.default_rng(5).choice(len(site.hidden), size.starts, replace=False)
    states = torch.from_numpy(site.hidden[np.sort(rows)])[None]
    nothing = torch.zeros(size.starts, size.rest, model.rnn.input_size)
    with torch.no_grad(), grutrace.trace(model.rnn, record=("hidden",)) as trace:
        model.rnn(nothing, states)
    hidden = trace["l0"].hidden[:].reshape(size.starts, size.rest, -1).astype(np.float64)
    return hidden[:, -2], hidden[:, -1]


def find_line(model: Reader, site: Any, sums: np.ndarray, size: Size) -> Line:
    """Find the states at rest without input, and the modes there."""
    before, states = come_to_rest(model, site, size)
    speed = np.linalg.norm(states - before, axis=1) / np.linalg.norm(states, axis=1)
    fixed = fixed_points(site, starts=states)
    centre = states.mean(axis=0)
    _, sizes, directions = np.linalg.svd(states - centre, full_matrices=False)
    along, readout = directions[0], model.readout.weight[0].detach().double().numpy()
    along = along * np.sign(along @ readout)
    near = [modes(site, state) for state in states[:: max(1, len(states) // 100)]]
    embedding = model.embedding.weight.detach().double().numpy()
    kinds = {
        "good": [NUMBERS[word] for word, value in VALENCE.items() if value > 0],
        "bad": [NUMBERS[word] for word, value in VALENCE.items() if value < 0],
        "neutral": [NUMBERS[word] for word in NEUTRAL],
    }
    projections: dict[str, list[float]] = {kind: [] for kind in kinds}
    for point in near:
        sign = np.sign(point.right[:, 0].real @ readout)
        added = sign * (point.input_directions[0].real @ embedding.T)
        for kind, numbers in kinds.items():
            projections[kind].append(float(added[numbers].mean()))
    hidden = site.hidden[:].astype(np.float64)
    place = ((hidden - centre) @ along).reshape(sums.shape)
    chosen = np.random.default_rng(2).permutation(len(sums))[:50]
    errors = [_linear_error(near, site, int(sequence)) for sequence in chosen]
    normal = np.random.default_rng(3).normal(size=(1000, len(along)))
    return Line(
        points=len(states),
        speed=float(np.median(speed)),
        fixed=fixed.fixed_points,
        flatness=float(sizes[0] ** 2 / np.sum(sizes**2)),
        readout=float(abs(along @ readout) / np.linalg.norm(readout)),
        timescales=np.array([point.timescale[:3] for point in near]),
        overlap=np.array([abs(point.right[:, 0].real @ along) for point in near]),
        chance=float(np.mean(np.abs(normal @ along) / np.linalg.norm(normal, axis=1))),
        projections={kind: np.array(values) for kind, values in projections.items()},
        error=float(np.median(np.concatenate(errors))),
        correlation=float(np.corrcoef(place.ravel(), sums.ravel())[0, 1]),
    )


def _linear_error(near: list[Any], site: Any, sequence: int) -> np.ndarray:
    """The relative error of each step of a review, linear around the nearest point."""
    rows = site.sequence(sequence)
    hidden, inputs = rows.hidden.astype(np.float64), rows.input.astype(np.float64)
    states = np.array([point.state for point in near])
    errors = []
    for before, after, x in zip(hidden[:-1], hidden[1:], inputs[1:], strict=True):
        point = near[int(np.argmin(np.linalg.norm(states - before, axis=1)))]
        amplitude = point.left @ (before - point.state)
        change = point.right @ (point.eigenvalues * amplitude + point.input_directions @ x)
        guess = point.state + change.real
        errors.append(np.linalg.norm(after - guess) / np.linalg.norm(after))
    return np.array(errors)


def modifier_effects(model: Reader, gap: int = 0, context: int = 12) -> dict[str, float]:
    """The effect of a valence word on the logit after each modifier, over that after "the".

    Args:
        model: A trained reader.
        gap: Number of neutral words between the modifier and the word.
        context: Number of neutral words before the modifier.
    """
    draw = np.random.default_rng(4)
    lead = [NUMBERS[word] for word in draw.choice(NEUTRAL, context)]
    between = [NUMBERS["was"]] * gap

    def effect(word: str) -> float:
        start = [*lead, NUMBERS[word], *between]
        texts = torch.tensor([[*start, NUMBERS[other]] for other in VALENCE])
        with torch.no_grad():
            logits = model(texts)
        change = (logits[:, -1] - logits[:, -2]).double().numpy()
        return float(change @ np.array(list(VALENCE.values())))

    plain = effect("the")
    return {word: effect(word) / plain for word in MODIFIERS}


def report(small: bool) -> None:
    size = SMALL if small else Size()
    model, untrained, accuracy = train(size)
    site, sums = record(model, size)
    other, _ = record(untrained, size)
    line = find_line(model, site, sums, size)
    shares = [100 * float(geometry(each).share[:3].sum()) for each in (site, other)]
    slowest = np.median(line.timescales, axis=0)
    good, bad, neutral = (float(line.projections[kind].mean()) for kind in line.projections)
    rows: list[list[Cell]] = [
        ["accuracy, %", 100 * accuracy, "95.8 (GRU, Yelp)"],
        ["variance of the states in 3 directions, %", shares[0], "about 90"],
        ["the same before training, %", shares[1], "much less"],
        ["states at rest", line.points, "about 500"],
        ["relative speed there", line.speed, "near 0"],
        ["fixed points that they are drawn to", line.fixed, None],
        ["variance of the states at rest in 1 direction, %", 100 * line.flatness, "most"],
        ["cosine of that direction with the readout", line.readout, "aligned"],
        ["slowest timescale, words (median of points)", slowest[0].item(), "about 1000"],
        ["second and third, words", f"{slowest[1]:.3g}, {slowest[2]:.3g}", "about 100"],
        ["mean length of a review, words", size.length, "175"],
        ["cosine of the slowest mode with the line", float(np.median(line.overlap)), "near 1"],
        ["the same for random directions", line.chance, "near 0"],
        ["what a good word adds to the mode", good, "above 0"],
        ["a bad word", bad, "below 0"],
        ["a neutral word", neutral, "near 0"],
        ["error of a linear step, %", 100 * line.error, "about 10"],
        ["correlation of the place on the line with the sum", line.correlation, None],
    ]
    show("A line attractor", ["", "here", "paper (LSTM, Yelp)"], rows)

    gaps = (0, 1, 2, 4)
    effects = {gap: modifier_effects(model, gap) for gap in gaps}
    rows = [[word, MODIFIERS[word], *(effects[gap][word] for gap in gaps)] for word in MODIFIERS]
    header = ["modifier", "factor in the reviews", *(f"{gap} words later" for gap in gaps)]
    show("Effect of a word after a modifier, over that of the word alone", header, rows)


if __name__ == "__main__":
    run(__doc__, report)
