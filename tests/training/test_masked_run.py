"""A run on short documents with `eod_mask_loss`: the same at every micro-batch size and layout."""

import pytest

from megapoly.data.builtin import builtin_documents
from megapoly.data.token_files import write_token_file
from megapoly.data.tokenizer import load_tokenizer
from megapoly.testing import run_job

OVERRIDES = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 192,
    "model.activation_backend": "reference",
    "data.eod_mask_loss": True,
    "training.train_iters": 3,
    "training.seq_length": 32,
    "training.global_batch_size": 4,
    "training.eval_interval": 3,
    "training.eval_iters": 2,
    "optimizer.lr_warmup_iters": 0,
    "logging.tensorboard": False,
    "checkpoint.save": False,
}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Half of the documents are a few letters, so that many labels follow an end of document."""
    folder = tmp_path_factory.mktemp("texts")
    documents = [document.text for document in builtin_documents()[:120]]
    texts = [text[: 4 if i % 40 < 20 else 900] for i, text in enumerate(documents)]
    write_token_file(folder / "text", texts, load_tokenizer(None))
    return OVERRIDES | {
        "data.blend": f"[{folder}/text]",
        "data.validation": f"{{text: {folder}/text}}",
    }


def test_micro_batches_and_replicas_give_the_same_run(tmp_path, overrides):
    size = "training.micro_batch_size"
    whole = run_job("dense_tiny", tmp_path / "whole", overrides | {size: 4})
    split = run_job("dense_tiny", tmp_path / "split", overrides | {size: 1}, num_ranks=2)
    for line, expected in zip(split, whole, strict=True):
        for name in ("lm_loss", "grad_norm", *(key for key in expected if key.startswith("val/"))):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), name
    assert "val/text/loss" in whole[-1]


@pytest.mark.slow
def test_a_validation_set_without_unmasked_tokens_is_refused(tmp_path, overrides):
    write_token_file(tmp_path / "empty", [""] * 40, load_tokenizer(None))
    empty = {"data.validation": f"{{blank: {tmp_path}/empty}}", "training.train_iters": 1}
    with pytest.raises(RuntimeError, match="DataError: `data.validation` `blank` must have tokens"):
        run_job("dense_tiny", tmp_path / "run", overrides | empty)
