"""Runs on several sources: resumed to the same bits, refused on other data, means by hand."""

import json
import math
import shutil
from fractions import Fraction

import pytest

from megapoly.data.builtin import builtin_documents
from megapoly.data.sample_order import BlendOrder
from megapoly.data.token_files import open_token_file, write_token_file
from megapoly.data.tokenizer import load_tokenizer
from megapoly.testing import run_job

OVERRIDES = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 192,
    "model.activation_backend": "reference",
    "training.train_iters": 6,
    "training.seq_length": 32,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 3,
    "training.eval_iters": 1,
    "optimizer.lr_warmup_iters": 2,
    "logging.tensorboard": False,
    "checkpoint.save_interval": 3,
    "checkpoint.keep": 0,
}
TIMES = {"step_time_s", "tokens_per_second", "tflops_per_device", "time"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Folder of four small token files."""
    folder = tmp_path_factory.mktemp("texts")
    for i, name in enumerate(("a", "b", "c", "d")):
        documents = [document.text[:2000] for document in builtin_documents()[i::60]]
        write_token_file(folder / name, documents, load_tokenizer(None))
    return folder


@pytest.fixture(scope="module")
def overrides(texts):
    blend = f"[{{path: {texts}/a, weight: 0.7}}, {{path: {texts}/b, weight: 0.2, name: bee}}]"
    validation = (
        f"{{v: {{path: {texts}/c, weight: 3}}, w: {{path: [{texts}/d, {texts}/c], weight: 1}}}}"
    )
    return OVERRIDES | {"data.blend": blend, "data.validation": validation}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, overrides):
    """An uninterrupted run: its folder and its metrics."""
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, run_job("dense_tiny", run_dir, overrides)


@pytest.fixture
def interrupted(tmp_path, whole):
    """A copy of the run with the checkpoint of step 3 as its newest."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "iter_0000006")
    return tmp_path / "run"


def results(metrics):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics]


def test_a_resumed_blend_gives_the_same_bits(interrupted, overrides, whole):
    resumed = run_job("dense_tiny", interrupted, overrides)
    assert [line["iteration"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    assert results(resumed) == results(whole[1])


def test_two_replicas_train_on_the_same_samples(tmp_path, overrides, whole):
    metrics = run_job("dense_tiny", tmp_path, overrides | {"checkpoint.save": False}, num_ranks=2)
    for line, expected in zip(metrics, whole[1], strict=True):
        for name in ("lm_loss", "grad_norm", *(key for key in expected if key.startswith("val/"))):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), name


def test_mean_of_the_sets_is_that_of_their_weights(whole):
    for line in (whole[1][2], whole[1][5]):
        expected = (3 * line["val/v/loss"] + line["val/w/loss"]) / 4
        assert line["val/v/loss"] != line["val/w/loss"]
        assert line["val/mean/loss"] == pytest.approx(expected, rel=1e-12)
        assert line["val/mean/ppl"] == pytest.approx(math.exp(expected), rel=1e-12)
    assert "val/mean/loss" not in whole[1][1]


def test_a_checkpoint_says_what_it_was_trained_on(whole, texts):
    position = json.loads((whole[0] / "checkpoints" / "iter_0000006" / "run.json").read_text())
    assert len(position["data_fingerprint"]) == 16
    assert position["data"]["seq_length"] == 32 and position["data"]["seed"] == 1234
    assert position["data"]["tokenizer"] == load_tokenizer(None).fingerprint
    first, second = position["data"]["sources"]
    assert (first["name"], first["path"]) == ("a", f"{texts}/a")
    assert (second["name"], second["path"]) == ("bee", f"{texts}/b")
    assert (first["share"], second["share"]) == (7 / 9, 2 / 9)
    assert first["tokens"] == open_token_file(texts / "a").num_tokens


def test_other_data_is_refused_until_it_is_accepted(interrupted, overrides, texts, whole):
    other = overrides | {
        "data.blend": f"[{{path: {texts}/a, weight: 0.5}}, {{path: {texts}/d, weight: 0.5}}]",
        "data.seed": 7,
    }
    with pytest.raises(RuntimeError) as refused:
        run_job("dense_tiny", interrupted, other)
    for part in (
        "trained on other data",
        f"source `d` ({texts}/d) was added",
        f"source `bee` ({texts}/b) was removed",
        "share of source `a` is 0.5 here and 0.777778 in the checkpoint",
        "`data.seed` is 7 here and 1234 in the checkpoint",
        "--checkpoint.accept_other_data true",
    ):
        assert part in str(refused.value)
    accepted = other | {"checkpoint.accept_other_data": True}
    metrics = results(run_job("dense_tiny", interrupted, accepted))
    assert [line["iteration"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[:3] == results(whole[1])[:3]
    assert metrics[3]["lm_loss"] != whole[1][3]["lm_loss"]
    position = json.loads((interrupted / "checkpoints/iter_0000006/run.json").read_text())
    assert [source["name"] for source in position["data"]["sources"]] == ["a", "d"]
    # Now these are the checkpoint's own data: nothing must be accepted.
    run_job("dense_tiny", interrupted, other)


def test_moved_files_are_the_same_data(interrupted, overrides, texts, tmp_path, whole):
    moved = tmp_path / "elsewhere"
    shutil.copytree(texts, moved)
    blend = overrides["data.blend"].replace(str(texts), str(moved))
    resumed = run_job("dense_tiny", interrupted, overrides | {"data.blend": blend})
    assert results(resumed) == results(whole[1])


def test_samples_come_from_the_sources_in_their_shares(overrides, texts):
    """In the order of the run above: 1024 samples, 796 and 228 of them (1024 * 7/9 = 796.4)."""
    sizes = [(open_token_file(texts / name).num_tokens - 1) // 32 for name in ("a", "b")]
    order = BlendOrder(sizes, [Fraction(7, 9), Fraction(2, 9)], 1234)
    sources = [order[i][0] for i in range(1024)]
    assert (sources.count(0), sources.count(1)) == (796, 228)


def test_a_file_that_does_not_fit_ends_all_ranks_before_a_model_is_built(
    tmp_path, overrides, texts
):
    small = overrides | {"model.vocab_size": 4096, "data.blend": f"[{tmp_path}/bad]"}
    shutil.copy(texts / "a.idx", tmp_path / "bad.idx")
    content = bytearray((texts / "a.bin").read_bytes())
    content[200:202] = (4096).to_bytes(2, "little")
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"below the size of the vocabulary \(4096\).*4096"):
        run_job("dense_tiny", tmp_path / "run", small, num_ranks=2)
    assert not (tmp_path / "run" / "config.yaml").exists()
