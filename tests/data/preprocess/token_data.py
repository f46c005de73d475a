"""Write inputs and read outputs of the preprocessor without using it."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megapoly.data.tokenizer import BUILTIN_TOKENIZER


def write_jsonl(path: Path, texts, **more) -> Path:
    lines = [json.dumps({"text": text} | more, ensure_ascii=i % 2 == 0) for i, text in
             enumerate(texts)]  # fmt: skip
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read_documents(prefix: Path) -> list[list[int]]:
    """Return the documents of a pair, read by the engine."""
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    return [
        np.concatenate([np.zeros(0, int), *(dataset[i] for i in range(a, b))]).tolist()
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def usual_loop(texts, prefix: Path, *, append_eod=True, add_special_tokens=True, path=None):
    """Do what Megatron-LM's tool does, with the engine's builder, one document at a time."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path or BUILTIN_TOKENIZER))
    eod = tokenizer.token_to_id("<|endoftext|>")
    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.get_vocab_size())
    )
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        lengths = [len(ids)] if ids else []
        if ids and append_eod:
            ids, lengths = [*ids, eod], [len(ids) + 1]
        builder.add_document(ids, lengths)
    builder.finalize(f"{prefix}.idx")


def pair_bytes(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
