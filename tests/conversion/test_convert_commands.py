"""The commands as users give them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.commands import export, import_
from megapoly.conversion import export_model
from megapoly.conversion.parity import ParityError

ROOT = Path(__file__).parents[2]


def run(*args):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_there_and_back(trained, tmp_path):
    to_hf = ["tools/convert_to_hf.py", "--checkpoint", trained("polyrelu"), "--output"]
    done = run(*to_hf, tmp_path / "hf", "--dtype", "bfloat16")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"wrote {tmp_path / 'hf'}")
    assert "parity on 320 tokens" in done.stdout
    report = json.loads((tmp_path / "hf" / "parity.json").read_text())
    assert (report["passed"], report["weights"]) == (True, "bfloat16")

    again = run(*to_hf, tmp_path / "hf")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr

    from_hf = ["tools/convert_from_hf.py", "--model", tmp_path / "hf", "--output"]
    done = run(*from_hf, tmp_path / "swiglu", "--activation", "swiglu")
    assert done.returncode == 0, done.stderr
    assert "initialised" in done.stdout
    assert f"--config {tmp_path / 'swiglu' / 'recipe.yaml'}" in done.stdout


def test_status_of_a_model_that_differs(monkeypatch, tmp_path, capsys):
    def differs(options, console):
        raise ParityError("the first module that differs is `lm_head`")

    monkeypatch.setattr(export_model, "export_model", differs)
    args = ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "hf")]
    assert export.main(args) == 1
    assert "lm_head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("2000", 2000)]
)
def test_sizes(text, size):
    assert export.size(text) == size


@pytest.mark.parametrize("text", ["much", "0", "0.1"])
def test_a_size_that_is_none(capsys, text):
    args = ["--checkpoint", "a", "--output", "b", "--max-shard-size", text]
    with pytest.raises(SystemExit):
        export.main(args)
    assert "500MB" in capsys.readouterr().err


@pytest.mark.parametrize("tolerance", ["nan", "-1", "0", "inf"])
def test_tolerances_out_of_range_are_refused(capsys, tolerance):
    args = ["--checkpoint", "a", "--output", "b", f"--tolerance={tolerance}"]
    with pytest.raises(SystemExit):
        export.main(args)
    assert "above 0" in capsys.readouterr().err


def test_options_of_an_activation_that_is_not_given(tmp_path, capsys):
    args = ["--model", str(tmp_path), "--output", str(tmp_path / "out")]
    assert import_.main([*args, "--ffn-hidden-size", "8", "--seed", "1"]) == 2
    message = capsys.readouterr().err
    assert "--ffn-hidden-size, --seed: no effect without --activation" in message
