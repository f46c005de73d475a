"""A folder of made-up questions, and a tiny random Llama in Hugging Face's format."""

import pytest
import torch
from questions import write_folder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megapoly.data.tokenizer import BUILTIN_TOKENIZER


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
