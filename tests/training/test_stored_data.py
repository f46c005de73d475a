"""A run reads its training text from a store: the same losses as from a disk, also resumed."""

import shutil

import pytest
import tiny_jobs

from megapoly.data.builtin import builtin_documents
from megapoly.data.token_files import write_token_file
from megapoly.data.tokenizer import load_tokenizer
from megapoly.testing import run_job

TINY = tiny_jobs.TINY | {
    "training.train_iters": 4,
    "training.eval_interval": 2,
    "optimizer.lr_decay_iters": 10,
    "checkpoint.save_interval": 2,
}


def data(place: str, cache_dir: object) -> dict[str, object]:
    return {
        "data.blend": f"[{place}/a, {place}/b]",
        "data.validation": f"{{v: {place}/b}}",
        "data.cache_dir": cache_dir,
    }


def losses(lines: list[dict[str, float]]) -> list[tuple[float | None, ...]]:
    names = ("iteration", "lm_loss", "grad_norm", "val/v/loss")
    return [tuple(line.get(name) for name in names) for line in lines]


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_losses_are_those_of_local_files(num_ranks, tmp_path):
    tokenizer, texts = load_tokenizer(None), [d.text[:2000] for d in builtin_documents()[:60:10]]
    write_token_file(tmp_path / "disk/a", texts[:4], tokenizer)
    write_token_file(tmp_path / "disk/b", texts[4:], tokenizer)
    shutil.copytree(tmp_path / "disk", tmp_path / "store")
    local = TINY | data(f"{tmp_path}/disk", tmp_path / "cache")
    stored = TINY | data(f"file://{tmp_path}/store", tmp_path / "other")
    expected = run_job("dense_tiny", tmp_path / "local", local, num_ranks=num_ranks)
    run = tmp_path / "run"
    run_job("dense_tiny", run, stored | {"training.train_iters": 2}, num_ranks=num_ranks)
    shutil.rmtree(tmp_path / "other")  # as on another host
    lines = run_job("dense_tiny", run, stored, num_ranks=num_ranks)
    assert losses(lines) == losses(expected)
    assert len(lines) == 4 and lines[-1]["lm_loss"] > 0 and lines[-1]["val/v/loss"] > 0
