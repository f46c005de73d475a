"""The command that continues a text, from a run, a checkpoint and a folder."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megapoly.data.tokenizer import BUILTIN_TOKENIZER

TOOL = Path(__file__).parents[2] / "tools" / "generate.py"
PROMPT = "Call me Ishmael."


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(BUILTIN_TOKENIZER), eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


def test_the_most_likely_text(generate, folder, capsys):
    words = ["--model", str(folder), "--prompt", PROMPT, "--temperature", "0"]
    assert generate([*words, "--max-new-tokens", "6"]) == 0
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(ids[0]).rstrip("\n")


def test_draws_depend_on_the_seed(generate, folder, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        words = ["--model", str(folder), "--prompt", PROMPT, "--seed", seed]
        assert generate([*words, "--temperature", "1.5", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_small_top_p_leaves_the_most_likely(generate, folder, capsys):
    words = ["--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "6"]
    assert generate([*words, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert generate([*words, "--temperature", "1.5", "--top-p", "1e-6"]) == 0
    assert capsys.readouterr().out == greedy


def test_what_is_no_model_is_refused(generate, tmp_path, capsys):
    assert generate(["--model", str(tmp_path)]) == 2
    assert "iter_*" in capsys.readouterr().err
