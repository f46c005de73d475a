"""The command that continues a text, from a run, a checkpoint and a folder."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megapoly.commands.generate import main as generate
from megapoly.data.tokenizer import BUILTIN_TOKENIZER

PROMPT = "Call me Ishmael."


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


def test_the_most_likely_text(folder, capsys):
    args = ["--model", str(folder), "--prompt", PROMPT, "--temperature", "0"]
    assert generate([*args, "--max-new-tokens", "6"]) == 0
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(ids[0]).rstrip("\n")


def test_the_tool_generates_as_the_command_does(folder, capsys, monkeypatch):
    arguments = ["--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "6"]
    assert generate(arguments) == 0
    text = capsys.readouterr().out
    monkeypatch.setattr("megapoly.commands.end_on_signals", lambda work: work())
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(Path(__file__).parents[2] / "tools/generate.py"), run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, text)


def test_draws_depend_on_the_seed(folder, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        args = ["--model", str(folder), "--prompt", PROMPT, "--seed", seed]
        assert generate([*args, "--temperature", "1.5", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_small_top_p_leaves_the_most_likely(folder, capsys):
    args = ["--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "6"]
    assert generate([*args, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert generate([*args, "--temperature", "1.5", "--top-p", "1e-6"]) == 0
    assert capsys.readouterr().out == greedy


def test_what_is_no_model_is_refused(tmp_path, capsys):
    assert generate(["--model", str(tmp_path)]) == 2
    assert "iter_*" in capsys.readouterr().err


def test_nothing_is_continued_from_the_beginning_of_a_document(folder, capsys):
    args = ["--model", str(folder), "--temperature", "0", "--max-new-tokens", "3", "--prompt"]
    assert generate([*args, ""]) == 0
    empty = capsys.readouterr().out
    assert generate([*args, "<|endoftext|>"]) == 0
    assert capsys.readouterr().out == empty


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "-1"], "at least 0"),
        (["--temperature", "nan"], "at least 0"),
        (["--top-p", "0"], "above 0 and at most 1"),
        (["--top-p", "1.5"], "at most 1"),
        (["--max-new-tokens", "0"], "0 must be a whole number, 1 to 2147483647"),
    ],
)
def test_numbers_out_of_range_are_refused(folder, capsys, args, message):
    with pytest.raises(SystemExit):
        generate(["--model", str(folder), *args])
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there(folder, capsys):
    assert generate(["--model", str(folder), "--device", "cuda:77"]) == 2
    assert "--device" in capsys.readouterr().err


def test_a_folder_without_weights(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert generate(["--model", str(tmp_path)]) == 2
    assert "cannot be opened" in capsys.readouterr().err
