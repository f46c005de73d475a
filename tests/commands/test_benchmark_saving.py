"""What the benchmark of saving reports is of the checkpoints that it has written."""

import json

from megapoly.benchmarks import saving


def test_report_is_of_what_was_written(tmp_path, capsys):
    file = tmp_path / "saving.json"
    arguments = ["--hidden-size", 96, "--num-layers", 1, "--saves", 2, "--num-ranks", 2]
    arguments += ["--distributed-optimizer", "--folder", tmp_path, "--json", file]
    assert saving.main([str(word) for word in arguments]) == 0
    first, second = json.loads(file.read_text())
    assert first["num_parameters"] == second["num_parameters"]
    # Weights and two moments in fp32, and some KB for each of the tensors.
    num_bytes = first["checkpoint_mib"] * 2**20
    assert 1.0 < num_bytes / (12 * first["num_parameters"]) < 1.2
    waits, background = (first["modes"][name] for name in saving.MODES)
    assert waits["stands_still_s"] and not waits["steps_meanwhile_s"]
    assert len(background["complete_s"]) == 2 <= len(background["steps_meanwhile_s"])
    assert "median of 2 saves" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["saving.json"]
