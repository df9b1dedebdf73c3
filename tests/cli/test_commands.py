"""Tests of the commands: output, JSON, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

import grutrace
from grutrace.__main__ import main
from grutrace.cli.app import COMMANDS
from grutrace.cli.output import _quantile_cells
from grutrace.native import library
from grutrace.storage.read.proofs import PROOFS
from tests.capture.models import EncoderDecoder
from tests.checks import EVERYTHING

SITES = ("encoder.l0", "encoder.l1", "decoder.cell")


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    model = EncoderDecoder(layers=2).eval()
    path = tmp_path / "run.h5"
    with grutrace.trace(model, path, record=EVERYTHING):
        model(torch.randn(4, 6, 5), steps=3)
    return path


def test_info(path, capsys) -> None:
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "EncoderDecoder" in out
    assert all(name in out for name in SITES)
    assert main(["info", str(path), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    encoder, decoder = about["modules"]
    assert (encoder["calls"], encoder["sequences"], encoder["rows"]) == (1, 4, 24)
    assert (decoder["calls"], decoder["sequences"], decoder["rows"]) == (3, 4, 12)
    assert about["closed"] is True
    assert about["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("module", ["rnn", "a" * 90], ids=["short", "long"])
@pytest.mark.parametrize("gates", ["inline", "deferred"])
def test_info_has_a_line_of_80_columns_for_each_site(module, gates, tmp_path, capsys) -> None:
    model = torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({module: torch.nn.GRU(
        1024, 512, num_layers=2, bidirectional=True)})})  # fmt: skip
    with grutrace.trace(model, tmp_path / "run.h5", gates=gates):
        model["encoder"][module](torch.randn(3, 7, 1024))
    assert main(["info", str(tmp_path / "run.h5")]) == 0
    out = capsys.readouterr().out
    lines = out[out.index("\nsite") + 1 :].splitlines()
    assert len(lines) == 1 + 4
    assert all(len(line) <= 80 for line in lines)
    suffixes = ("l0", "l0_reverse", "l1", "l1_reverse")
    for line, suffix in zip(lines[1:], suffixes, strict=True):
        site, *rest = line.split("  ")
        assert site.startswith("encoder.")
        assert site.endswith(f".{suffix}" if module == "rnn" else suffix)
        assert " ".join(rest).split() == ["GRU(1024,", "512)", "1", "7", "21", "1"]
    assert "recorded: " in out
    assert all(name in out for name in ("reset", "update", "candidate", "hidden"))


def test_stats(path, capsys) -> None:
    assert main(["stats", str(path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*SITES, "reset", "update", "candidate"))
    assert main(["stats", str(path), "--json"]) == 0
    with grutrace.open(path) as trace:
        for item in json.loads(capsys.readouterr().out):
            update = np.asarray(trace[item["site"]].update)
            assert item["gates"]["update"]["mean"] == pytest.approx(update.mean())
            assert item["gates"]["update"]["above"] == (update > np.float32(0.9)).mean()
            assert item["steps"] == len(update)


def test_stats_by_name(path, capsys) -> None:
    assert main(["stats", str(path), "saturation", "--site", "encoder.*"]) == 0
    out = capsys.readouterr().out
    assert "encoder.l1: steps 24" in out
    assert "update right" in out
    assert "decoder" not in out
    assert main(["stats", str(path), "saturation", "--site", "decoder.cell", "--each"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 1 + 6
    assert main(["stats", str(path), "saturation", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["site"] for row in result] == list(SITES)
    with grutrace.open(path) as trace:
        update = np.asarray(trace["encoder.l0"].update)
    assert result[0]["left"]["update"] == (update < np.float32(0.1)).mean(0).tolist()


@pytest.fixture
def labelled(tmp_path):
    """Two traces of one model on one batch, with a label, before and after its weights changed."""
    torch.manual_seed(0)
    model, batch = EncoderDecoder(layers=2).eval(), torch.randn(4, 6, 5)
    paths = tmp_path / "before.h5", tmp_path / "after.h5"
    for path in paths:
        with (
            grutrace.trace(model, path, record=EVERYTHING) as trace,
            trace.recording(labels={"kind": [list("aabbcc")] * 3 + [list("ccbbaa")]}),
        ):
            model(batch, steps=6)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    return paths


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fixed_points", [], "stable_points"),
        ("gate_activation", [], "boundaries"),
        ("gate_activation", ["--label", "kind"], "r_value"),
        ("selectivity", ["--label", "kind"], "selective"),
        ("probe", ["--label", "kind"], "baseline"),
        ("geometry", [], "participation_ratio"),
        ("update_sparsity", [], "near_zero"),
        ("change", ["--paired"], "update effect"),
    ],
)
def test_stats_of_the_gates(labelled, capsys, name, options, says) -> None:
    if name == "change":
        options = [*options, "--against", str(labelled[1])]
    command = ["stats", str(labelled[0]), name, *options]
    assert main([*command, "--site", "encoder.l1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("encoder.l1: ")
    assert says in out
    assert main([*command, "--each"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 3
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["site"] for row in result] == list(SITES)


def test_the_best_separated_class_has_a_row(labelled, capsys) -> None:
    command = ["stats", str(labelled[0]), "selectivity", "--label", "kind", "--site", "encoder.l1"]
    assert main([*command, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("best "))
    cells = dict(cell.split(": ") for cell in row.removeprefix("best").split("  ") if cell.strip())
    counts = {name.strip(): int(count) for name, count in cells.items()}
    assert counts == {name: result["best"].count(name) for name in set(result["best"])}
    assert sum(counts.values()) == len(result["units"])


def test_only_the_most_common_values_are_shown() -> None:
    column = np.array([*["a"] * 5, *["b"] * 4, *["c"] * 3, *["d"] * 2, "e", "f", "g"], object)
    cells = [cell for cell in _quantile_cells(column) if cell]
    assert cells == ["a: 5", "b: 4", "c: 3", "d: 2", "others: 3"]
    assert _quantile_cells(np.array([2.0, 2.0, 1.0], object))[:3] == ["2: 2", "1: 1", ""]


def test_stats_accepts_only_options_of_the_analysis(labelled, capsys) -> None:
    before, after = map(str, labelled)
    for command, message in (
        (["selectivity"], "selectivity needs --label"),
        (["change"], "change needs --against"),
        (["geometry", "--label", "kind"], "geometry takes no --label"),
        (["selectivity", "--label", "kind", "--against", after], "takes no --against"),
        (["selectivity", "--label", "mood"], "no label 'mood'; there are: kind"),
        (["--label", "kind"], "--label needs an ANALYSIS"),
    ):
        assert main(["stats", before, *command]) == 2
        assert message in capsys.readouterr().err


def test_stats_of_missing_quantities(path, capsys) -> None:
    assert main(["stats", str(path), "happiness"]) == 2
    assert "expected one of saturation" in capsys.readouterr().err
    assert main(["stats", str(path), "saturation", "--site", "tower.*"]) == 2
    assert "'tower.*' matches none of the sites: encoder.l0" in capsys.readouterr().err


def test_verify(path, capsys) -> None:
    assert main(["verify", str(path)]) == 0
    assert "DOES NOT HOLD" not in capsys.readouterr().out
    with h5py.File(path, "r+") as file:
        file["modules/encoder/l1/update"][13, 2] += 0.25
    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "encoder.l1: sequence 2, step 1, unit 2: update is" in out
    assert main(["verify", str(path), "--json"]) == 1
    results = {row["site"]: row for row in json.loads(capsys.readouterr().out)}
    assert [results[name]["holds"] for name in SITES] == [True, False, True]


@pytest.mark.parametrize(("off", "code", "of_tolerance"), [(0.0, 0, "0"), (0.5, 1, "inf")])
def test_verify_with_a_tolerance_of_zero(off, code, of_tolerance, tmp_path, capsys) -> None:
    """A damaged file can state it. Exact values pass, and no others."""
    layer, path = torch.nn.GRU(2, 3), tmp_path / "run.h5"
    for weights in layer.parameters():
        torch.nn.init.zeros_(weights)
    with grutrace.trace(layer, path, gates="deferred"):
        layer(torch.zeros(4, 2))
    with h5py.File(path, "r+") as file:
        checks = file["modules/%/l0/checks"]
        checks[...] = np.zeros(1, checks.dtype)
        file["modules/%/l0/hidden"][1, 2] += off
    assert main(["verify", str(path)]) == code
    row = next(line for line in capsys.readouterr().out.splitlines() if " derived " in line)
    assert row.split()[-1] == of_tolerance


def test_verify_exits_with_2_if_nothing_can_be_checked(tmp_path, capsys) -> None:
    layer, path = torch.nn.GRU(2, 3), tmp_path / "run.h5"
    with grutrace.trace(layer, path, record="update"):
        layer(torch.randn(4, 2))
    assert main(["verify", str(path)]) == 2
    assert "l0: the hidden states were not recorded\n" in capsys.readouterr().out


def test_an_empty_trace(tmp_path, capsys) -> None:
    with grutrace.Tracer(torch.nn.GRU(2, 3), path := tmp_path / "run.h5", recording=False):
        pass
    for command in ("info", "stats", "verify"):
        assert main([command, str(path)]) == 0
        assert main([command, str(path), "--json"]) == 0
    json.dumps(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["info", "stats", "verify"])
@pytest.mark.parametrize("content", [None, b"", b"not an HDF5 file", "folder"])
def test_a_file_that_is_no_trace_is_a_one_line_error(command, content, tmp_path, capsys) -> None:
    path = tmp_path / "some.h5"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert main([command, str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("grutrace: ")
    assert "some.h5" in err
    assert err.count("\n") == 1


def test_wrong_usage(capsys) -> None:
    assert main(["stats"]) == 2
    assert main(["nonsense"]) == 2
    assert main(["stats", "a.h5", "--nonsense"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_as_a_program(path) -> None:
    command = [sys.executable, "-m", "grutrace", "stats", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "encoder.l0" in done.stdout


def test_a_missing_extra_is_named(path) -> None:
    code = (
        "import sys; sys.modules['typer'] = None; from grutrace.__main__ import main;"
        f"sys.exit(main(['info', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'needs typer, which is not installed: pip install "typer' in done.stderr
    assert done.stderr.endswith("(the extra 'cli' of grutrace)\n")


def test_the_version_needs_no_extra() -> None:
    code = (
        "import sys; sys.modules['typer'] = None; from grutrace.__main__ import main;"
        "sys.exit(main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"grutrace {grutrace.__version__} (compiled: ")


@pytest.mark.parametrize("arguments", [["--help"], []], ids=["help", "nothing"])
def test_help_without_its_extra_is_one_line(arguments) -> None:
    """Help that was asked for is no error; without arguments, it is one, as with the extra."""
    code = (
        "import sys; sys.modules['typer'] = None; from grutrace.__main__ import main;"
        f"sys.exit(main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said, other = (done.stdout, done.stderr) if arguments else (done.stderr, done.stdout)
    assert (done.returncode, other) == (0 if arguments else 2, "")
    assert said.count("\n") == 1
    assert 'needs typer, which is not installed: pip install "typer' in said


@pytest.mark.parametrize(("command", "imports_plots"), [("info", False), ("plot", True)])
def test_a_command_imports_only_what_it_needs(command, imports_plots) -> None:
    code = (
        "import sys; from grutrace.__main__ import main;"
        f"main([{command!r}, '--help']);"
        "sys.exit(3 if 'grutrace.view.site_plots' in sys.modules else 4)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"grutrace {command}" in done.stdout
    assert done.returncode == (3 if imports_plots else 4)


def test_the_help_has_every_command_in_order(capsys) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    # A description may name another command: only the first word of a row is one.
    rows = [line.strip("│| ").split(" ")[0] for line in out.splitlines()]
    assert [row for row in rows if row in COMMANDS] == list(COMMANDS)
    assert main(["nothing"]) == 2
    assert "No such command 'nothing'" in capsys.readouterr().err


@pytest.fixture
def deferred(tmp_path):
    torch.manual_seed(0)
    model = EncoderDecoder(layers=2).eval()
    path = tmp_path / "deferred.h5"
    with grutrace.trace(model, path, gates="deferred"):
        model(torch.randn(4, 6, 5), steps=3)
    return path


def test_a_deferred_file(deferred, capsys) -> None:
    assert main(["info", str(deferred), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    encoder, _ = about["modules"]
    assert [site["quantities"] for site in encoder["sites"]] == [["hidden", "input"], ["hidden"]]
    assert encoder["sites"][1]["derived"] == ["reset", "update", "candidate"]
    assert encoder["sites"][0]["residual"] is None
    with grutrace.open(deferred) as trace:
        proofs = trace.calls["proof"].tolist()
    assert about["proofs"] == {name: proofs.count(name) for name in PROOFS} | {"unproven_calls": []}
    assert main(["info", str(deferred)]) == 0
    assert "derived:" in capsys.readouterr().out
    assert main(["stats", str(deferred)]) == 0
    assert "candidate" in capsys.readouterr().out
    assert main(["verify", str(deferred)]) == 0
    assert "derived  holds" in capsys.readouterr().out


def test_derive(deferred, tmp_path, capsys) -> None:
    full = tmp_path / "full.h5"
    assert main(["derive", str(deferred), "-o", str(full)]) == 0
    assert main(["verify", str(full)]) == 0
    with grutrace.open(full) as stored, grutrace.open(deferred) as trace:
        assert stored["encoder.l1"].site.derived == ()
        np.testing.assert_allclose(
            stored["encoder.l1"].update, trace["encoder.l1"].update, atol=1e-6
        )
    capsys.readouterr()
    assert main(["derive", str(deferred), "-o", str(full)]) == 2
    assert "full.h5 exists" in capsys.readouterr().err
    assert main(["derive", str(full), "-o", str(tmp_path / "again.h5")]) == 2
    assert "nothing to derive" in capsys.readouterr().err
    assert main(["derive", str(deferred)]) == 2


def test_damage_to_a_deferred_file_is_detected(deferred, capsys) -> None:
    with h5py.File(deferred, "r+") as file:
        file["modules/encoder/l1/hidden"][23, 2] += 0.25
    assert main(["verify", str(deferred)]) == 1
    assert "encoder.l1: sequence 3, step 5, unit 2: hidden is" in capsys.readouterr().out


@pytest.fixture
def changed(path, tmp_path):
    changed = tmp_path / "changed.h5"
    changed.write_bytes(path.read_bytes())
    with h5py.File(changed, "r+") as file:
        file["modules/encoder/l1/update"][13, 2] += 0.25
    return changed


def test_diff(path, changed, capsys) -> None:
    assert main(["diff", str(path), str(path)]) == 0
    assert main(["diff", str(path), str(path), "--exact"]) == 0
    assert "The traces are the same." in capsys.readouterr().out
    assert main(["diff", str(path), str(changed)]) == 1
    out = capsys.readouterr().out
    assert "encoder.l1: update, first at sequence 2, step 1, unit 2: " in out
    assert "Likely cause: weights, input and initial states of encoder.l1 are equal" in out
    assert main(["diff", str(path), str(changed), "--tolerance", "0.3"]) == 0
    assert main(["diff", str(path), str(changed), "--site", "encoder.l0"]) == 0
    assert main(["diff", str(path), str(changed), "--record", "reset,hidden"]) == 0
    assert main(["diff", str(path), str(changed), "--record", "reset", "--record", "update"]) == 1


def test_diff_as_json(path, changed, capsys) -> None:
    assert main(["diff", str(changed), str(path), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["same"], result["first"]) == (
        False,
        {"site": "encoder.l1", "quantity": "update"},
    )
    (differing,) = (sequence for sequence in result["values"] if sequence["beyond"])
    assert (differing["values"], differing["unequal"]) == (24 * 6, 1)
    assert differing["largest"]["difference"] == pytest.approx(0.25, abs=1e-6)
    assert differing["first"] == differing["largest"]
    with h5py.File(changed, "r+") as file:
        file["modules/encoder/l1/update"][13, 2] = np.nan
    assert main(["diff", str(changed), str(path), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    (differing,) = (sequence for sequence in result["values"] if sequence["beyond"])
    assert (differing["first"]["a"], differing["first"]["difference"]) == (None, "inf")


def test_diff_without_an_answer(path, tmp_path, capsys) -> None:
    for arguments in (
        [path],
        [path, tmp_path / "none.h5"],
        [path, path, "--site", "nothing"],
        [path, path, "--record", "gates"],
        [path, path, "--tolerance", "-1"],
        [path, path, "--tolerance", "some"],
    ):
        assert main(["diff", *map(str, arguments)]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys) -> None:
    assert main(["--version"]) == 0
    compiled = library.instruction_set()
    assert capsys.readouterr().out == f"grutrace {grutrace.__version__} (compiled: {compiled})\n"


@pytest.fixture
def tagged(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.GRU(2, 3)
    path = tmp_path / "tagged.h5"
    with grutrace.trace(model, path) as tracer:
        for number in range(3):
            words = [["the", "ant"], ["a", "bee"]]
            labels = {"pos": [[0, number], [7, 8]]}
            with tracer.recording(tag=f"t{number}", tokens=words, labels=labels):
                model(torch.randn(2, 2, 2))
    return path


@pytest.mark.parametrize(
    ("options", "sequences"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        (["--tag", "t1"], [2, 3]),
        (["--tag", "t1", "--tag", "t[2]"], [2, 3, 4, 5]),
        (["--labelled", "pos=2"], [4]),
        (["--labelled", "pos=2", "--labelled", "pos=[78]"], [1, 3, 4, 5]),
        (["--labelled", "pos", "--calls", "-1:"], [4, 5]),
        (["--tokens", "the a*", "--calls", "0:2"], [0, 2]),
        (["--sequences", "0,3,-1", "--length", "2:"], [0, 3, 5]),
    ],
)
def test_the_same_selection_on_the_command_line_and_in_python(
    tagged, options, sequences, tmp_path, capsys
) -> None:
    with grutrace.open(tagged) as trace:
        selected = trace.select(sequences=sequences)
        expected = np.asarray(selected["l0"].update)
    assert main(["info", str(tagged), "--json", *options]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["modules"][0]["sequences"] == len(sequences)
    assert main(["stats", str(tagged), "--json", *options]) == 0
    (summary,) = json.loads(capsys.readouterr().out)
    assert summary["gates"]["update"]["mean"] == pytest.approx(expected.mean(), abs=1e-6)
    assert main(["stats", str(tagged), "moments", "--json", *options]) == 0
    (moments,) = json.loads(capsys.readouterr().out)
    assert moments["steps"] == 2 * len(sequences)
    out = tmp_path / "out.npz"
    assert main(["export", str(tagged), "--to", "npz", "-o", str(out), *options]) == 0
    with np.load(out) as arrays:
        assert (arrays["l0/update"] == expected).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tag", "t9"], "no sequence has tag=t9"),
        (["--labelled", "ps=x"], "there is no label 'ps' (did you mean 'pos'?)"),
        (["--length", "x"], "length: expected numbers separated by commas, or a range"),
        (["--calls", "1:2:3:4"], "calls: expected numbers separated by commas"),
        (["--tokens", ""], "tokens: expected globs for consecutive tokens"),
    ],
)
@pytest.mark.parametrize("command", ["info", "stats"])
def test_a_selection_that_cannot_be_made_is_one_line(
    tagged, command, options, message, capsys
) -> None:
    assert main([command, str(tagged), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_statistics_have_no_sequences_to_select(tmp_path, capsys) -> None:
    statistics = grutrace.Statistics(tmp_path / "statistics.h5")
    model = torch.nn.GRU(2, 3)
    with grutrace.trace(model, sink=statistics):
        model(torch.randn(2, 2, 2))
    assert main(["stats", str(tmp_path / "statistics.h5"), "--tag", "x"]) == 2
    assert "tag: a statistics file has no sequences to select" in capsys.readouterr().err
