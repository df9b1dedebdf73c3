"""The example on nested arithmetic: its strategies against Python's own eval, and its classifiers
against states that hold a known truth.
"""

import importlib
import os
import random
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

import grutrace
from grutrace.analysis.verification.verify import verify
from tests.plain_reader import PlainTrace

#: The network is trained once, not once per worker.
pytestmark = pytest.mark.xdist_group("nested arithmetic")

# The languages


@pytest.fixture(scope="module")
def parts(arithmetic_example):
    """The modules that the example is made of."""
    names = ("language", "strategies", "network", "diagnosis", "picture")
    return SimpleNamespace(
        **{name: importlib.import_module(f"arithmetic.{name}") for name in names}
    )


@pytest.fixture(scope="module")
def expressions(parts):
    """Some expressions of every language."""
    draw = random.Random(1)
    return {
        name: [parts.language.expression(numerals, draw, nesting) for _ in range(40)]
        for name, (numerals, nesting) in parts.language.LANGUAGES.items()
    }


def test_expressions_have_their_numerals_and_brackets(expressions, parts):
    for name, drawn in expressions.items():
        numerals = int(name[1])
        for words in drawn:
            assert len(words) == 4 * numerals - 3
            assert sum(word in parts.language.NUMERALS for word in words) == numerals
            assert words.count("(") == words.count(")") == numerals - 1
    assert {word for drawn in expressions.values() for words in drawn for word in words} == set(
        parts.language.WORDS
    )


def test_nested_on_one_side(expressions):
    for left, right in zip(expressions["L9L"], expressions["L9R"], strict=True):
        assert left[:8] == ["("] * 8
        assert right[-8:] == [")"] * 8
    assert len({tuple(word in "()" for word in words) for words in expressions["L9"]}) > 20


def test_no_tested_expression_is_trained_on(parts):
    tested = parts.language.to_test(300, random.Random(2))
    trained = parts.language.to_train(2000, tested, random.Random(3))
    assert [len(tested[name]) for name in ("L1", "L2", "L3", "L9R")] == [21, 220, 300, 300]
    assert {name: len(drawn) for name, drawn in trained.items()} == dict.fromkeys(
        ("L1", "L2", "L4", "L5", "L7"), 2000
    )
    for name, drawn in tested.items():
        texts = {" ".join(words) for words in drawn}
        assert len(texts) == len(drawn)
        if name != "L1":
            assert texts.isdisjoint(" ".join(words) for words in trained.get(name, []))
    seen = {" ".join(words) for drawn in trained.values() for words in drawn}
    assert parts.language.SHOWN not in seen


def test_control_without_withholding_they_are_trained_on(parts):
    """L2 is so small that tested expressions are drawn again by chance."""
    tested = parts.language.to_test(300, random.Random(2))
    trained = parts.language.to_train(2000, {}, random.Random(3))
    texts = {" ".join(words) for words in tested["L2"]}
    assert len(texts & {" ".join(words) for words in trained["L2"]}) > 100


# The strategies, against eval


def completed(prefix):
    """The prefix with 0 for what is missing and its brackets closed, as Python can evaluate it."""
    needs_numeral = prefix[-1] in "(+-"
    depth = prefix.count("(") - prefix.count(")")
    return [*prefix, *["0"] * needs_numeral, *[")"] * depth]


def value(words):
    return eval(" ".join(words))


def innermost(prefix):
    """What stands in the innermost bracket that is still open, or all of it if none is."""
    depth = 0
    for position in range(len(prefix) - 1, -1, -1):
        depth += {"(": 1, ")": -1}.get(prefix[position], 0)
        if depth > 0:
            return prefix[position + 1 :]
    return prefix


def raised(prefix):
    """The prefix with 1 added to its last operand, or to the one that comes next, in its place."""
    if prefix[-1] in "(+-":
        return completed([*prefix, "1"])
    start, depth = len(prefix) - 1, 0
    while True:
        depth += {")": 1, "(": -1}.get(prefix[start], 0)
        if depth == 0:
            break
        start -= 1
    return completed([*prefix[:start], "(", *prefix[start:], "+", "1", ")"])


def by_eval(words):
    """After every word: the running total, the mode, and the result of the innermost bracket."""
    prefixes = [words[: end + 1] for end in range(len(words))]
    totals = [value(completed(prefix)) for prefix in prefixes]
    modes = [
        {1: "add", -1: "subtract"}[value(raised(prefix)) - total]
        for prefix, total in zip(prefixes, totals, strict=True)
    ]
    results = [value(completed(innermost(prefix) or ["0"])) for prefix in prefixes]
    return totals, modes, results


def test_the_running_total_and_the_mode_are_those_of_eval(expressions, parts):
    for drawn in expressions.values():
        for words in drawn:
            totals, modes, _ = by_eval(words)
            assert parts.strategies.cumulative(words) == (totals, modes), words


def test_the_result_of_the_innermost_bracket_is_that_of_eval(expressions, parts):
    for drawn in expressions.values():
        for words in drawn:
            assert parts.strategies.recursive(words) == by_eval(words)[2], words


def test_both_strategies_end_at_the_result(expressions, parts):
    """Nested on the left, both hold equal values at each step. Nested on the right, they differ."""
    same = {}
    for name, drawn in expressions.items():
        for words in drawn:
            totals, results = (
                parts.strategies.cumulative(words)[0],
                parts.strategies.recursive(words),
            )
            assert totals[-1] == results[-1] == value(words)
            same.setdefault(name, []).append(totals == results)
    assert all(same["L9L"])
    assert not any(same["L9R"])


def test_control_a_wrong_strategy_is_noticed(expressions):
    """The order of the words without the brackets is not enough."""
    flat = [[word for word in words if word not in "()"] for words in expressions["L7"]]
    outcomes = [value(words) for words in expressions["L7"]]
    assert [value(words) for words in flat] != outcomes


# The classifiers, on states that hold a known truth


@pytest.fixture(scope="module")
def labelled(expressions, parts):
    """Two sets of steps with the targets of real expressions, and states that hold nothing."""
    draw = np.random.default_rng(4)

    def steps(start, end):
        chosen = [
            (name, words) for name, drawn in expressions.items() for words in drawn[start:end]
        ]
        totals, modes = zip(
            *(parts.strategies.cumulative(words) for _, words in chosen), strict=True
        )
        results = [parts.strategies.recursive(words) for _, words in chosen]
        count = sum(map(len, results))
        return parts.diagnosis.Steps(
            {"hidden": draw.normal(size=(count, 15))},
            {
                "cumulative": np.concatenate(totals).astype(float),
                "recursive": np.concatenate(results).astype(float),
                "mode": np.concatenate(modes),
            },
            np.concatenate([words for _, words in chosen]),
            np.concatenate([[name] * len(words) for name, words in chosen]),
        )

    return steps(0, 20), steps(20, 40)


def holding(steps, *targets):
    """The same steps with states whose rotated axes hold these targets, beside noise."""
    states = steps.quantities["hidden"].copy()
    for column, target in enumerate(targets):
        states[:, column] = 0.01 * target
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(15, 15)))[0]
    return replace(steps, quantities={"hidden": states @ rotation})


@pytest.mark.parametrize(
    ("held", "other"), [("cumulative", "recursive"), ("recursive", "cumulative")]
)
def test_a_state_with_one_strategy_is_distinguished(labelled, parts, held, other):
    fitted, tested = (holding(steps, steps.targets[held]) for steps in labelled)
    right = parts.diagnosis.diagnose(fitted, tested, held)
    wrong = parts.diagnosis.diagnose(fitted, tested, other)
    for name in parts.language.LANGUAGES:
        assert right[name].r == pytest.approx(1)
        assert right[name].error == pytest.approx(0, abs=1e-9)
    for name in ("L4", "L5", "L6", "L7", "L8", "L9", "L9R"):
        assert wrong[name].r < 0.9
        assert wrong[name].error > 10
    # Where both hold the same, no classifier could tell them apart by r.
    assert wrong["L9L"].r == pytest.approx(1, abs=0.02)


def test_a_state_with_the_mode_is_decoded(labelled, parts):
    signs = [np.where(steps.targets["mode"] == "add", 1.0, -1.0) * 100 for steps in labelled]
    fitted, tested = (holding(steps, sign) for steps, sign in zip(labelled, signs, strict=True))
    assert min(parts.diagnosis.diagnose_mode(fitted, tested).values()) > 0.99


def test_a_random_state_is_not_decoded(labelled, parts):
    together = [parts.diagnosis.together(steps) for steps in labelled]
    for strategy in ("cumulative", "recursive"):
        assert abs(parts.diagnosis.diagnose(*together, strategy)["all"].r) < 0.1
    assert abs(parts.diagnosis.control_task(*together)["all"]) < 0.1
    mode = parts.diagnosis.diagnose_mode(*together)["all"]
    assert mode == pytest.approx(parts.diagnosis.most_frequent(together[1])["all"], abs=0.03)


def test_shuffled_targets_are_not_decoded(labelled, parts):
    fitted, tested = (
        parts.diagnosis.shuffled(
            parts.diagnosis.together(holding(steps, steps.targets["cumulative"]))
        )
        for steps in labelled
    )
    assert abs(parts.diagnosis.diagnose(fitted, tested, "cumulative")["all"].r) < 0.1


def test_a_state_with_the_word_solves_the_control_task(labelled, parts):
    """One-hot states of words decode any number that is assigned to a word."""
    numbers = [[parts.language.NUMBERS[word] for word in steps.words] for steps in labelled]
    fitted, tested = (
        replace(steps, quantities={"hidden": np.eye(25)[words]})
        for steps, words in zip(labelled, numbers, strict=True)
    )
    result = parts.diagnosis.control_task(fitted, tested)
    assert min(result.values()) == pytest.approx(1)
    assert parts.diagnosis.diagnose(fitted, tested, "cumulative")["L9"].r < 0.5


def test_a_strategy_that_never_changes_has_no_correlation(parts):
    result = parts.diagnosis.agreement(np.array([0.0, 1.0]), np.array([2.0, 2.0]))
    assert result.error == 2.5
    assert np.isnan(result.r)


# A network, and its trace


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """A network that was trained for some seconds, and the same before that."""
    folder = tmp_path_factory.mktemp("arithmetic")
    torch.manual_seed(0)
    tested = parts.language.to_test(60, random.Random(0))
    trained = parts.language.to_train(2000, tested, random.Random(1))
    corpora = {f"fit {name}": drawn[:200] for name, drawn in trained.items()}
    corpora |= {f"test {name}": drawn for name, drawn in tested.items()}
    model = parts.network.Arithmetic()
    parts.network.record(model, corpora, folder / "untrained.h5")
    parts.network.train(model, trained, 1500)
    message = parts.network.record(model, corpora, folder / "trained.h5")
    return SimpleNamespace(folder=folder, corpora=corpora, model=model, said=message)


@pytest.fixture(scope="module")
def steps(run, parts):
    """By network, the steps that the classifiers are fitted to, and those they are tested on."""
    results = {}
    for name in ("trained", "untrained"):
        with grutrace.open(run.folder / f"{name}.h5") as trace:
            read = parts.diagnosis.read(trace)
            results[name] = [read["fit"], read["test"]]
    return results


def test_the_network_learns(run, parts):
    for name in ("L1", "L2", "L3", "L4", "L5"):
        expected = np.array([value(words) for words in run.corpora[f"test {name}"]])
        result = parts.diagnosis.agreement(np.array(run.said[f"test {name}"]), expected)
        assert result.error < expected.var() / 2, name
        assert result.r > 0.7, name


def test_training_is_the_same_from_the_same_seed(run, parts):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = parts.network.Arithmetic()
        parts.network.train(model, {"L2": run.corpora["fit L2"]}, 10)
        states.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_padding_of_shorter_expressions_has_no_effect(run, parts):
    short, long = (run.corpora[f"fit {name}"][:20] for name in ("L2", "L5"))
    filled = [words + ["("] * 12 for words in short]
    with torch.no_grad():
        alone = run.model(parts.network.encoded(short))
        together = run.model(
            parts.network.encoded(filled + long), torch.tensor([4] * 20 + [16] * 20)
        )
    torch.testing.assert_close(together[:20], alone)


def test_training_restores_the_number_of_threads(run, parts, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        parts.network.train(parts.network.Arithmetic(), {"L1": run.corpora["fit L1"]}, 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "step 1 of 1" in capsys.readouterr().out


def test_the_file_holds_words_labels_and_every_gate(run):
    """Read with plain h5py, by the specification of the file alone."""
    (module,) = PlainTrace(run.folder / "trained.h5").modules
    expressions = [words for drawn in run.corpora.values() for words in drawn]
    assert module.count == len(expressions)
    for number in range(0, module.count, 37):
        names = ("tokens", "cumulative", "mode", "recursive")
        expected = zip(names, (expressions[number], *by_eval(expressions[number])), strict=True)
        result = module.annotated(number)
        for name, values in expected:
            assert result[name] == dict(enumerate(values))
    with grutrace.open(run.folder / "trained.h5") as trace:
        (result,) = verify(trace)
    assert result.holds
    assert result.check == "gates"


def test_steps_are_those_of_the_expressions_in_order(run, steps, parts):
    for name in ("L1", "L4", "L9R"):
        expressions = run.corpora[f"test {name}"]
        chosen = steps["trained"][1].of(name)
        assert list(chosen.words) == [word for words in expressions for word in words]
        with torch.no_grad():
            states, _ = run.model.gru(run.model.embedding(parts.network.encoded(expressions)))
        np.testing.assert_allclose(
            chosen.quantities["hidden"], states.reshape(-1, 15).numpy(), atol=1e-6
        )
        totals, modes, results = zip(*map(by_eval, expressions), strict=True)
        np.testing.assert_array_equal(chosen.targets["cumulative"], np.concatenate(totals))
        np.testing.assert_array_equal(chosen.targets["recursive"], np.concatenate(results))
        np.testing.assert_array_equal(chosen.targets["mode"], np.concatenate(modes))
    assert set(steps["trained"][0].languages) == {"L1", "L2", "L4", "L5", "L7"}


# The finding


def test_the_cumulative_strategy_is_decoded_better(steps, parts):
    results = {
        strategy: parts.diagnosis.diagnose(*steps["trained"], strategy)
        for strategy in ("cumulative", "recursive")
    }
    for name in ("L5", "L6", "L7", "L8", "L9", "L9R"):
        assert results["cumulative"][name].r > results["recursive"][name].r + 0.1, name
    control = parts.diagnosis.control_task(*steps["trained"])
    for name in ("L4", "L5", "L6", "L7"):
        assert results["cumulative"][name].r > control[name] + 0.1, name


def test_control_an_untrained_network_holds_neither_strategy(steps, parts):
    """The classifiers do not compute the strategies themselves."""
    for strategy in ("cumulative", "recursive"):
        result = parts.diagnosis.diagnose(*steps["untrained"], strategy)
        for name in ("L5", "L6", "L7", "L8", "L9", "L9R"):
            assert abs(result[name].r) < 0.25, (strategy, name)


def test_shuffled_targets_are_not_decoded_from_the_network(steps, parts):
    fitted, tested = (
        parts.diagnosis.shuffled(parts.diagnosis.together(step)) for step in steps["trained"]
    )
    for strategy in ("cumulative", "recursive"):
        assert abs(parts.diagnosis.diagnose(fitted, tested, strategy)["all"].r) < 0.05


# The command


def is_picture(path):
    """Whether a PNG is large and shows more than one colour on a background."""
    pixels = plt.imread(path)[..., :3]
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    return min(pixels.shape[:2]) > 500 and len(colours) > 100 and pixels.std() > 0.1


QUICK = ("--steps", "20", "--train", "300", "--fit", "100", "--test", "20")


def test_it_runs_as_a_script_without_warnings(arithmetic_example, tmp_path):
    command = [sys.executable, "-W", "error", arithmetic_example.__file__, *QUICK]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    for words in ("cumulative", "recursive", "mode", "L9R", "update", "shuffled"):
        assert words in run.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "arithmetic.h5",
        "arithmetic_untrained.h5",
        "arithmetic.png",
    }
    assert is_picture(tmp_path / "arithmetic.png")


def test_missing_extras_are_named(arithmetic_example, tmp_path):
    (tmp_path / "sklearn.py").write_text("raise ImportError('sklearn')")
    command = [sys.executable, arithmetic_example.__file__, *QUICK]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert 'pip install ".[analysis,plot]"' in run.stderr
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.h5"))


def test_a_trace_that_cannot_be_written_is_one_clear_error(arithmetic_example, tmp_path, capsys):
    output = tmp_path / "missing" / "arithmetic.h5"
    assert arithmetic_example.main([*QUICK, "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert str(output.parent) in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("option", ["--steps", "--train", "--fit", "--test"])
@pytest.mark.parametrize("text", ["0", "few"])
def test_an_invalid_number_is_one_clear_error(arithmetic_example, option, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        arithmetic_example.main([option, text])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert text in error
