"""megapoly plan as its users call it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.commands.plan import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
MOE = ["--config", str(CONFIGS / "moe_7b_paper.yaml"), "--world-size", "64"]


@pytest.fixture
def run(capsys):

    def call(*words, status=0):
        assert main(list(words)) == status
        return capsys.readouterr()

    return call


def test_json_has_plain_integers(run, tmp_path):
    found = json.loads(run(*MOE, "--gpu", "a100-80g", "--json").out)
    assert found["total_parameters"] == 6_919_161_920
    assert found["active_parameters"] == 1_282_017_344
    assert found["flops"]["per_step"] == found["flops"]["per_token"] * 4_194_304
    assert found["memory"]["fits"] is True
    assert sum(found["parameters"].values()) == found["total_parameters"]
    (rank,) = found["memory"]["ranks_of_stage"]
    parts = ("weights", "gradients", "optimizer", "activations", "temporary")
    assert rank["total"] == sum(rank[part] for part in parts)
    run(*MOE, "--json", str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text()) == found


def test_tables_say_the_same(run):
    found = json.loads(run(*MOE, "--json").out)
    text = run(*MOE).out
    assert f"at most {found['mfu']:.1%} MFU" in text
    assert f"at least {found['days']:.2f} days for 200.0B tokens" in text
    for message in found["collectives"]:
        assert message["name"] in text and f"{message['sent_bytes'] / 1e9:,.3f}" in text
    assert "6,919,161,920" in text and "fits in 71.10 GiB" in text
    assert "expert 8 1 2 .. 7 the node's own link" in re.sub(" +", " ", text)


def test_in_fp32_the_peak_is_said_to_be_that_of_bf16(run):
    text = run(*MOE, "--training.bf16", "false").out
    assert "at 312 TFLOP/s, the peak of bf16; the peak of fp32 is far lower" in text
    assert "% MFU (of the bf16 peak)" in text
    assert "of bf16" not in run(*MOE).out


def test_what_does_not_fit_has_remedies_that_fit(run):
    words = ["--config", MOE[1], "--world-size", "8", "--gpu", "a100-40g"]
    given = run(*words, "--training.micro_batch_size", "4", "--json", status=1)
    found = json.loads(given.out)
    assert not found["memory"]["fits"] and found["suggestions"]
    for suggestion in found["suggestions"]:
        change = plan_words(suggestion["options"])
        changed = json.loads(run(*words, "--training.micro_batch_size", "4", *change, "--json").out)
        assert changed["memory"]["fits"]
        (rank,) = changed["memory"]["ranks_of_stage"]
        assert rank["total"] == suggestion["memory"]


def plan_words(options):
    return [word for key, value in options.items() for word in (f"--{key}", json.dumps(value))]


def test_search_finds_layouts_that_fit_in_order(run):
    words = ["--config", str(CONFIGS / "dense_1b_paper.yaml"), "--world-size", "8"]
    found = json.loads(run(*words, "--gpu", "a100-40g", "--search", "5", "--json").out)
    layouts = found["search"]
    assert len(layouts) == 5
    assert [item["step_seconds"] for item in layouts] == sorted(
        item["step_seconds"] for item in layouts
    )
    changed = json.loads(
        run(*words, "--gpu", "a100-40g", *plan_words(layouts[-1]["options"]), "--json").out
    )
    assert changed["step_seconds"]["total"] == pytest.approx(layouts[-1]["step_seconds"])
    assert changed["memory"]["fits"]


TENSOR, EXPERT_TENSOR = (f"--parallel.{k}_parallel_size" for k in ("tensor_model", "expert_tensor"))
EXPLICIT = {
    "nothing": [],
    "sequence parallelism": [TENSOR, "2", "--parallel.sequence_parallel", "true"],
    "experts' tensor parallelism": [TENSOR, "2", EXPERT_TENSOR, "2"],
    "context parallelism": [
        "--parallel.context_parallel_size",
        "2",
        "--parallel.cp_comm_type",
        "a2a",
    ],
}


@pytest.mark.parametrize("given", EXPLICIT.values(), ids=EXPLICIT)
def test_options_of_a_search_are_added_to_what_is_given(run, given):
    words = [*MOE[:2], "--world-size", "16", *given]
    layouts = json.loads(run(*words, "--search", "1000", "--json").out)["search"]
    assert len(layouts) > 100
    for layout in (layouts[0], *layouts[:: len(layouts) // 8]):
        changed = json.loads(run(*words, *plan_words(layout["options"]), "--json").out)
        assert changed["step_seconds"]["total"] == layout["step_seconds"], layout
        assert max(s["total"] for s in changed["memory"]["ranks_of_stage"]) == layout["memory"]


def test_a_search_needs_no_layout_that_can_run(run):
    words = ["--config", str(CONFIGS / "dense_1b_paper.yaml"), "--world-size", "64"]
    refused = run(*words, "--search", "3", status=2)
    assert "must be divisible by `training.micro_batch_size`" in refused.err
    (line,) = (line for line in refused.out.splitlines() if line.startswith("first: "))
    change = shlex.split(line.removeprefix("first: "))
    found = json.loads(run(*words, *change, "--json").out)
    asked = json.loads(run(*words, "--search", "3", "--json", status=2).out)
    assert asked["search"][0]["step_seconds"] == found["step_seconds"]["total"]
    assert len(asked["problems"]) == 1
    # What no layout mends is an error as ever.
    run(*words, "--search", "--training.fp8", "hybrid", status=2)


def test_the_first_of_a_search_is_a_command_line(run):
    given = [*MOE[:2], "--world-size", "8", "--gpu", "a100-40g", "--training.seq_length", "8192"]
    text = run(*given, "--search", "1", status=1).out
    line = next(line for line in text.splitlines() if line.startswith("first: "))
    words = shlex.split(line.removeprefix("first: "))
    assert "fits in" in run(*given, *words).out


def test_what_follows_from_a_remedy_follows(run):
    words = ["--world-size", "16", "--parallel.expert_model_parallel_size", "4"]
    words = [*MOE[:2], *words, "--training.seq_length", "16384"]
    found = json.loads(run(*words, "--json", status=1).out)["suggestions"]
    (tensor,) = (item for item in found if TENSOR.strip("-") in item["options"])
    changed = json.loads(run(*words, *plan_words(tensor["options"]), "--json").out)
    assert changed["layout"]["etp"] == 2
    assert changed["memory"]["ranks_of_stage"][0]["total"] == tensor["memory"]


def test_a_run_on_cpu_can_be_planned_for_gpus(run, tmp_path):
    from megapoly.config import to_yaml
    from megapoly.config.parsing import load_yaml
    from megapoly.config.resolve import resolve
    from megapoly.platform.machine import CPU

    config = load_yaml(CONFIGS / "moe_tiny.yaml")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(resolve(config, tokenizer_vocab_size=4096, machine=CPU)))
    words = ["--config", str(path), "--world-size", "2"]
    error = run(*words, status=2).err
    assert "`training.device` (cpu)" in error
    change = error.strip().rpartition("; add ")[2].split()
    recipe = ["--config", str(CONFIGS / "moe_tiny.yaml"), "--world-size", "2", "--json"]
    assert json.loads(run(*words, *change, "--json").out) == json.loads(run(*recipe).out)


def test_a_run_on_gpus_can_be_planned_as_it_was(run, tmp_path):
    from megapoly.config import to_yaml
    from megapoly.config.parsing import load_yaml
    from megapoly.config.resolve import resolve
    from megapoly.platform.machine import Machine

    config = load_yaml(CONFIGS / "moe_7b_paper.yaml")
    machine = Machine(cuda=True, transformer_engine=True, apex=True)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(resolve(config, tokenizer_vocab_size=0, machine=machine)))
    found = json.loads(run("--config", str(path), "--world-size", "64", "--json").out)
    given = json.loads(run(*MOE, "--json").out)
    assert found["memory"] == given["memory"]
    # The products add to the gradients themselves.
    assert found["step_seconds"]["operators"] < given["step_seconds"]["operators"]


@pytest.mark.parametrize("form", [["--json"], []], ids=["JSON", "tables"])
def test_a_reader_that_has_seen_enough_is_no_error(form):
    command = [sys.executable, "tools/plan.py", *MOE, *form]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""
    assert process.returncode == 2


def test_a_file_that_cannot_be_written_is_named(run, tmp_path):
    path = tmp_path / "nowhere" / "plan.json"
    assert f"`{path}`: No such file" in run(*MOE, "--json", str(path), status=2).err


def test_a_layout_that_breaks_rules_is_refused(run):
    errors = run("--config", MOE[1], "--world-size", "60", status=2).err
    assert "the number of processes (60) must be divisible by" in errors


def test_without_a_vocabulary_it_says_what_to_set(run):
    words = ["--data.tokenizer", "nowhere.json", "--model.vocab_size", "null"]
    assert "set `--model.vocab_size`" in run(*MOE, *words, status=2).err
