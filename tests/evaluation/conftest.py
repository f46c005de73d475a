"""Small trained models and their results at any layout; made-up questions; a random Llama."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from evaluation_jobs import WITH_HARNESS, evaluate_everything
from questions import write_folder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megapoly.data.builtin import builtin_documents
from megapoly.data.token_files import write_token_file
from megapoly.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer
from megapoly.preflight.layouts import parse_layout
from megapoly.testing import run_job, run_on_ranks

TINY = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.init_method_std": 0.2,  # far from uniform after a few steps
    "model.activation_backend": "reference",
    "training.train_iters": 3,
    "training.seq_length": 32,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 3,
    "training.eval_iters": "null",
    "optimizer.lr_warmup_iters": 2,
    "logging.tensorboard": False,
}
MODELS = {
    "dense": ("dense_tiny", {"model.ffn_hidden_size": 192}),
    "bf16": ("dense_tiny", {"model.ffn_hidden_size": 192, "training.bf16": True}),
    "moe": (
        "moe_tiny",
        {"model.moe_ffn_hidden_size": 96, "model.activation_coefficients": "per_expert"},
    ),
}
QUESTIONS = [
    ("The captain of the whale ship was", ["Ahab", "Hamlet", "a white sail"], 0),
    ("To be, or not", ["the whale", "to be", "sing of man"], 1),
    ("Of Man's first", ["disobedience", "harpoon", "mate"], 2),
    ("Call me", ["Queequeg", "now", "Ishmael"], 0),
    ("The sun went", ["down", "up again over the sea", "o"], 1),
]
TASK = """
task: whales
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Folder of two validation sets of different sizes, which do not fill whole batches."""
    folder = tmp_path_factory.mktemp("texts")
    for i, name in enumerate(("a", "b")):
        documents = [document.text[: 300 + 400 * i] for document in builtin_documents()[i::160]]
        write_token_file(folder / name, documents, load_tokenizer(None))
    return folder


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """Folder of a benchmark in the harness's form."""
    folder = tmp_path_factory.mktemp("task")
    lines = [
        json.dumps({"question": question, "choices": choices, "gold": gold})
        for question, choices, gold in QUESTIONS
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "whales.yaml").write_text(TASK.format(folder=folder))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, texts):
    """By the name of a model: its checkpoint, and the last line of its metrics."""

    @functools.cache
    def train(name):
        recipe, options = MODELS[name]
        run_dir = tmp_path_factory.mktemp(name)
        sets = {"data.validation": f"{{a: {texts}/a, b: {{path: [{texts}/b, {texts}/a]}}}}"}
        lines = run_job(recipe, run_dir, TINY | sets | options)
        return run_dir / "checkpoints" / "iter_0000003", lines[-1]

    return train


@pytest.fixture(scope="session")
def evaluated(trained, task_folder):
    """By the names of a model and a layout: results of all ranks; for one process also by hand."""

    @functools.cache
    def evaluate(model, name):
        checkpoint, _ = trained(model)
        layout = parse_layout(name)
        overrides = [f"--{key}={value}" for key, value in layout.options.items()]
        greedy = None if name == "1" else evaluate(model, "1")[0].greedy_requests
        arguments = checkpoint, overrides, task_folder, greedy, (model, name) in WITH_HARNESS
        return run_on_ranks(evaluate_everything, layout.world_size, *arguments)

    return evaluate


@pytest.fixture(scope="session")
def task_data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(BUILTIN_TOKENIZER), eos_token="<|endoftext|>"
    )
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,  # far from uniform
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
