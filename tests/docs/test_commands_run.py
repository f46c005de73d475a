"""README's and the tutorials' commands run, in order, in one folder.

Options that make a command short are added at its end. Each test needs those before it.
"""

import json
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from documented import ROOT, blocks, commands
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megapoly.data.builtin import builtin_documents
from megapoly.data.tokenizer import BUILTIN_TOKENIZER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TUTORIALS = ROOT / "docs" / "tutorials"
# README starts from the run of the first tutorial, which `make pretrain` makes as well.
PAGES = [
    TUTORIALS / "first_model.md",
    ROOT / "README.md",
    TUTORIALS / "your_data.md",
    TUTORIALS / "export_and_serve.md",
    TUTORIALS / "laptop_to_cluster.md",
    TUTORIALS / "prove_a_layout.md",
]
# A cluster, a container engine, a browser; tests/packaging runs `make pretrain` and `pip install`.
ELSEWHERE = ("docker", "docker/launch.sh", "git", "kubectl", "make", "pip", "sbatch", "tensorboard")
# Eight GPUs; a package that the tests do not install (tests/evaluation has a stand-in).
NOT_HERE = ("--nnodes 8", "--nproc-per-node 8", "megapoly export-benchmarks")

SHORT = "--training.eval_iters 1 --training.train_iters"
QUICK = f"--model.activation_backend reference {SHORT}"
SMALL = """
    --seeds 1 --jobs 1 --model.num_layers 2 --model.hidden_size 64 --model.num_attention_heads 2
    --model.ffn_hidden_size 192 --model.vocab_size 4096
    --parallel.use_distributed_optimizer false --parallel.overlap_grad_reduce false
    --parallel.overlap_param_gather false --data.blend null --data.validation null
    --data.tokenizer null --optimizer.lr_warmup_tokens null --optimizer.lr_warmup_iters 1
    --training.train_tokens null --training.train_iters 3 --training.seq_length 64
    --training.global_batch_size 2 --training.bf16 false --training.eval_interval 3
    --training.eval_iters 1
"""


def steps(run, count):
    """The run has so many steps, finite losses that change, and a checkpoint of the last step."""

    def check(folder, output):
        lines = (folder / run / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["lm_loss"] for line in lines]
        assert len(losses) == len(set(losses)) == count and all(2 < loss < 10 for loss in losses)
        assert (folder / run / "checkpoints" / f"iter_{count:07}").is_dir()
        assert f"step {count}/{count} | loss " in " ".join(output.split())

    return check


def prints(*texts):
    def check(folder, output):
        assert not [text for text in texts if text not in output], output

    return check


def writes(*paths):
    def check(folder, output):
        assert not [path for path in paths if not (folder / path).stat().st_size]

    return check


def continues(prompt):
    """The text begins with the prompt and does not end there."""

    def check(folder, output):
        assert output.startswith(prompt) and len(output.strip()) > len(prompt)

    return check


def parity(path):
    """The folder gives the logits of the model that it was made of."""

    def check(folder, output):
        found = json.loads((folder / path).read_text())
        found = found.get("parity", found)
        assert found["passed"] and found["argmax_agreement"] == 1.0

    return check


def is_configuration(folder, output):
    config = yaml.safe_load(output)
    assert config["model"]["num_moe_experts"] == 8 and config["training"]["train_iters"] == 240


def is_what_the_page_shows(folder, output):
    lines = [line.rstrip() for line in output.strip().splitlines()]
    page = (ROOT / "docs" / "explanation" / "planning.md").read_text()
    (shown,) = [text for text in page.split("```\n") if text.startswith(lines[0])]
    assert lines == shown.splitlines()


def has_scores(folder, output):
    """One task has questions in the folder."""
    found = json.loads((folder / "scores.json").read_text())
    assert list(found["tasks"]) == ["piqa"] and len(found["skipped"]) > 10


def is_compared(folder, output):
    """Two runs, each with its last validation loss in the table."""
    runs = sorted((folder / "runs" / "dense_1b").glob("*/metrics.jsonl"))
    assert [path.parent.name.split(".")[0] for path in runs] == ["polynorm", "swiglu"]
    for path in runs:
        last = json.loads(path.read_text().splitlines()[-1])
        assert f"{last['val/books/loss']:.3f}" in output


def has_analyses(folder, output):
    """The effective rank of every FFN weight of two layers: FC1 and FC2; gate, up and both."""
    for activation, per_layer in {"polynorm": 2, "swiglu": 4}.items():
        (path,) = (folder / "runs" / "dense_1b").glob(f"{activation}.*/analysis/analysis.json")
        weights = json.loads(path.read_text())["effective_rank"]["weights"]
        assert len(weights) == 2 * per_layer and all(each["effective_rank"] > 1 for each in weights)


def all_agree(number):
    layouts = "The layout trains" if number == 1 else f"All {number} layouts train"
    return prints(f"{layouts} the model of one process")


# By the beginning of the command: what is added to it, and what is true afterwards.
RUNS = {
    # First model
    "megapoly train --config moe_tiny --nproc-per-node 2 --parallel": (
        f"{QUICK} 2",
        steps("runs/moe_tiny", 2),
    ),
    "megapoly generate --model runs/moe_tiny --prompt 'Call me Ishmael.'": (
        "--max-new-tokens 4",
        continues("Call me Ishmael."),
    ),
    "megapoly train --config moe_tiny --nproc-per-node 2 --model.activation swiglu": (
        f"{SHORT} 2",
        steps("runs/swiglu", 2),
    ),
    "megapoly train --config dense_tiny --training.train_iters 50": (
        f"{QUICK} 2",
        steps("runs/dense_tiny", 2),
    ),
    "megapoly train --config moe_tiny --print-config": ("", is_configuration),
    # These resume the two runs above.
    "torchrun --nproc-per-node 2 examples/pretrain_moe.sh": (
        f"{SHORT} 3",
        steps("runs/swiglu", 3),
    ),
    "NPROC_PER_NODE=1 bash examples/pretrain_dense.sh": (
        f"{QUICK} 3",
        steps("runs/dense_tiny", 3),
    ),
    "bash examples/pretrain_moe.sh --config moe_tiny --print-config": ("", is_configuration),
    "bash examples/pretrain_moe.sh --help": ("", prints("--model.activation_order")),
    # README
    "megapoly report examples/paper/report/report.json": (
        "",
        writes("figure/figures/moe_final_loss.png"),
    ),
    "megapoly preprocess --input 'raw/*.jsonl'": (
        "--workers 1",
        writes("tokens/mine_text_document.bin", "tokens/mine.manifest.json"),
    ),
    "megapoly train --config dense_tiny --data.blend": (f"{QUICK} 2", steps("runs/mine", 2)),
    "megapoly generate --model runs/mine": ("--max-new-tokens 4", continues("Once upon a time")),
    "megapoly plan --config moe_7b_paper --world-size 64 --gpu a100-80g --search": (
        "",
        prints("6,919,161,920", "tokens/s", "tp"),
    ),
    "megapoly plan --config moe_7b_paper": ("", is_what_the_page_shows),
    "megapoly check-parallel --config moe_7b_paper": (
        "--world-size 2 --layouts tp2-ep2-etp1 --steps 1",
        all_agree(1),
    ),
    "megapoly train --config moe_7b_paper --dry-run": ("", prints("6,919,161,920")),
    "megapoly export --model runs/moe_tiny": ("", parity("moe_tiny_hf/parity.json")),
    "megapoly evaluate --model moe_tiny_hf": (
        "--skip-missing --limit 2 --output scores.json",
        has_scores,
    ),
    "megapoly compare --config dense_1b_paper": (SMALL, is_compared),
    "megapoly analyze --comparison runs/dense_1b": ("--tokens 256", has_analyses),
    "megapoly report runs/dense_1b": ("", writes("runs/report/index.html")),
    # Your data
    "megapoly preprocess verify": ("", prints("no problems")),
    "megapoly preprocess stats": ("", prints("documents      30")),
    "megapoly preprocess inspect": ("", prints("document 7 of 30", "CHAPTER 8. The Pulpit.")),
    "bash examples/pretrain_dense.sh --data.blend": (f"{QUICK} 3", steps("runs/mine", 3)),
    "megapoly prepare-domains": ("--vocab-size 512", writes("runs/domains/data.yaml")),
    "megapoly train --config dense_tiny --config runs/domains/data.yaml": (
        f"{QUICK} 2",
        steps("runs/domains/dense", 2),
    ),
    # Export and serve
    "megapoly generate --model moe_tiny_hf": ("--max-new-tokens 4", continues("Call me Ishmael.")),
    "megapoly import --model llama_hf": ("", parity("runs/llama/start/import.json")),
    # Prove a layout
    "megapoly check-parallel --config moe_tiny --layouts": ("--steps 1", all_agree(2)),
    "megapoly check-parallel --config moe_tiny --world-size": (
        "--world-size 2 --layouts ep2-dp2 --steps 1",
        all_agree(1),
    ),
}


def is_elsewhere(words):
    line = " ".join(words)
    return words[0] in ELSEWHERE or any(part in line for part in NOT_HERE)


def entry(words):
    """Return the longest beginning in the table that the command has."""
    line = shlex.join(words)
    return max((begin for begin in RUNS if line.startswith(begin)), key=len, default=None)


def in_order():
    """Return every command that needs no cluster, once."""
    found = {}
    for page in PAGES:
        for words in commands(page):
            if not is_elsewhere(words) and words[0] != "cd":
                found.setdefault(shlex.join(words), words)
    return list(found.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the reader brings: the clone, text, a tokenizer, a Llama, questions."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    documents = [document.text[:4000] for document in builtin_documents()[:60]]
    for name, texts in {
        "raw/a": documents[:30],
        "corpora/one": documents[:30],
        "corpora/two": documents[30:],
    }.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "tokenizer.json").write_bytes(Path(BUILTIN_TOKENIZER).read_bytes())
    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "hidden_size": 48, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "llama_hf")
    PreTrainedTokenizerFast(
        tokenizer_file=str(BUILTIN_TOKENIZER), eos_token="<|endoftext|>"
    ).save_pretrained(folder / "llama_hf")
    (folder / "benchmarks").mkdir()
    questions = [
        {"goal": "To dry a shirt,", "sol1": "hang it in the sun.", "sol2": "sink it.", "label": 0},
        {"goal": "To cut bread,", "sol1": "use a spoon.", "sol2": "use a knife.", "label": 1},
    ]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "benchmarks" / "piqa__plain_text__validation.jsonl").write_text(lines)
    return folder


def run(folder, line):
    """Run a line in a shell, with this environment's programs; return what it prints."""
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("words", in_order(), ids=shlex.join)
def test_command(words, folder):
    added, check = RUNS[entry(words)]
    check(folder, run(folder, f"{shlex.join(words)} {' '.join(added.split())}"))


def test_python_of_export_and_serve(folder):
    (block,) = blocks(TUTORIALS / "export_and_serve.md", "python")
    (folder / "use.py").write_text(textwrap.dedent(block))
    assert run(folder, f"{shlex.quote(sys.executable)} use.py").startswith("Call me Ishmael.")


def test_table_has_no_other_commands():
    assert set(RUNS) == {entry(words) for words in in_order()}
