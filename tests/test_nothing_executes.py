"""Files that carry code are opened by every command that takes them, and the code does not run.

The code makes a folder. Each test first opens the file without care, to see that it would run.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from megatron.core.datasets.utils import Split
from rich.console import Console
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
)

from megapoly.commands import generate, import_, plan, preprocess, report, train
from megapoly.config.parsing import load_yaml
from megapoly.conversion.import_model import ImportOptions, import_model
from megapoly.conversion.imported_settings import settings_of_folder
from megapoly.conversion.parity_check import check_export_parity, load_folder
from megapoly.data.builtin import builtin_documents
from megapoly.data.samples import open_pool
from megapoly.data.token_file_checks import check_token_files
from megapoly.data.token_files import write_token_file
from megapoly.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer
from megapoly.errors import CheckpointError, ConfigError, EvaluationError
from megapoly.evaluation.lm_loader import load_lm
from megapoly.evaluation.local_tasks import QUESTION_FILES, missing_files
from megapoly.evaluation.tasks import TASKS

QUIET = Console(quiet=True)
# Beside the installed release, by the Makefile.
OLDER = Path(sys.prefix) / "transformers-4"
NO_FLAG = {"dtype": "auto", "device": "cpu", "batch_size": 1}


class Code:
    """An object that makes a folder while it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def executed(tmp_path):
    """The folder that the code of a test makes."""
    return tmp_path / "executed"


def was_executed(executed):
    found = executed.is_dir()
    if found:
        executed.rmdir()
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(BUILTIN_TOKENIZER), eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama, tmp_path, monkeypatch):
    """A copy of the model; code that transformers runs is copied to a folder of this test."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return shutil.copytree(llama, tmp_path / "model")


def change(path, **entries):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | entries))


def generated(folder, capsys, *options):
    """Return status, text and messages of ``megapoly generate``."""
    arguments = ["--model", str(folder), "--temperature", "0", "--max-new-tokens", "4", *options]
    return (generate.main(arguments), *capsys.readouterr())


def imported(folder, tmp_path):
    return import_.main(["--model", str(folder), "--output", str(tmp_path / "checkpoint")])


# Hugging Face folders.


def test_pickled_weights(folder, executed, tmp_path, capsys):
    text = generated(folder, capsys)
    weights = {
        name: tensor
        for name, tensor in LlamaForCausalLM.from_pretrained(folder).state_dict().items()
    }
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert generated(folder, capsys) == text  # tensors alone are read
    torch.save(weights | {"x": Code(executed)}, folder / "pytorch_model.bin")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert was_executed(executed)
    for options in ((), ("--trust-remote-code",)):
        status, _, message = generated(folder, capsys, *options)
        assert status == 2 and ("mkdir" in message or "pytorch_model.bin" in message)
    with pytest.raises(CheckpointError, match=r"mkdir|pytorch_model.bin"):
        load_lm(folder, **NO_FLAG)
    assert imported(folder, tmp_path) == 2
    assert "has no *.safetensors" in capsys.readouterr().err
    assert not was_executed(executed)


def test_pickled_weights_beside_others_are_not_opened(folder, executed, tmp_path):
    for name in (
        "pytorch_model.bin",
        "consolidated.00.pth",
        "training_args.bin",
        "adapter_model.bin",
    ):
        torch.save({"x": Code(executed)}, folder / name)
    import_model(ImportOptions(folder, tmp_path / "checkpoint", skip_parity=True), QUIET)
    load_folder(folder, tmp_path, run_code=False)
    load_lm(folder, **NO_FLAG)
    assert not was_executed(executed)


def add_code(folder, executed):
    """Add classes of a model and of a tokenizer, with code."""
    for name in ("modeling_mine.py", "tokenization_mine.py"):
        (folder / name).write_text(
            "import os\nfrom transformers import LlamaForCausalLM, PreTrainedTokenizerFast\n"
            f"os.makedirs({str(executed)!r}, exist_ok=True)\n"
            "class Model(LlamaForCausalLM): pass\n"
            "class Tokenizer(PreTrainedTokenizerFast): pass\n"
        )
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Model"})
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_mine.Tokenizer"]},
        tokenizer_file="/etc/passwd",
    )


def test_code_beside_a_model_that_transformers_knows(folder, executed, tmp_path, capsys):
    text = generated(folder, capsys)
    add_code(folder, executed)
    status, printed, message = generated(folder, capsys)
    assert (status, printed) == text[:2]
    names = "modeling_mine.py, tokenization_mine.py"
    assert f"is not run ({names}): transformers' own classes open the model" in message
    load_lm(folder, **NO_FLAG)
    load_folder(folder, tmp_path, run_code=False)
    load_tokenizer(folder)
    import_model(ImportOptions(folder, tmp_path / "checkpoint", skip_parity=True), QUIET)
    assert not was_executed(executed)
    assert not list((tmp_path / "checkpoint").rglob("*.py"))
    written = json.loads((tmp_path / "checkpoint/tokenizer/tokenizer_config.json").read_text())
    assert not {"auto_map", "tokenizer_file"} & set(written)
    generated(folder, capsys, "--trust-remote-code")
    assert was_executed(executed)


def test_code_that_a_model_needs(folder, executed, capsys):
    add_code(folder, executed)
    auto_map = {
        "AutoConfig": "other/repository--conf.Config",
        "AutoModelForCausalLM": "modeling_mine.M",
    }
    change(folder / "config.json", model_type="mine", auto_map=auto_map)
    status, printed, message = generated(folder, capsys)
    assert (status, printed) == (2, "")
    named = "conf.py of other/repository, modeling_mine.py, tokenization_mine.py"
    assert f"such code is not run: {named}. Read it, then add `--trust-remote-code`" in message
    with pytest.raises(CheckpointError, match="only code of its own opens"):
        load_lm(folder, **NO_FLAG)
    assert not was_executed(executed)


def test_a_function_that_generates(folder, executed, tmp_path, capsys):
    """transformers 4.57 runs it for every model that it opens in a folder of the disk."""
    path = folder / "custom_generate/generate.py"
    path.parent.mkdir()
    path.write_text(
        f"import os; os.makedirs({str(executed)!r})\n"
        "def generate(inputs, *, model, **options): return inputs\n"
    )
    status, printed, message = generated(folder, capsys)
    assert (status, printed) == (2, "") and "is not run: custom_generate/generate.py" in message
    refused = {"match": "replaces how text is generated"}
    with pytest.raises(CheckpointError, **refused):
        load_lm(folder, **NO_FLAG)
    with pytest.raises(CheckpointError, **refused):
        load_folder(folder, tmp_path, run_code=False)
    assert imported(folder, tmp_path) == 2
    assert not was_executed(executed)
    assert generated(folder, capsys, "--trust-remote-code")[0] == 0
    assert was_executed(executed)


def test_code_of_a_tokenizer(folder, executed, capsys):
    """Its ``tokenizer.json`` is read instead; without one it is refused."""
    (folder / "tokenization_mine.py").write_text(f"import os; os.mkdir({str(executed)!r})\n")
    auto_map = {"AutoTokenizer": ["tokenization_mine.Slow", None]}
    change(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Slow")
    load_lm(folder, **NO_FLAG)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"is not run \(tokenization_mine.py\).* runs the code"
    ):
        load_lm(folder, **NO_FLAG)
    assert not was_executed(executed)
    assert generated(folder, capsys, "--trust-remote-code")[0] == 2
    assert was_executed(executed)


def test_an_export_whose_code_was_changed_is_not_compared(folder, executed, tmp_path):
    add_code(folder, executed)
    with pytest.raises(CheckpointError, match="no code but what `megapoly export` writes"):
        check_export_parity(tmp_path, folder, torch.float32, 1e-5, QUIET)
    assert not was_executed(executed)


@pytest.mark.slow
def test_the_oldest_release_of_transformers() -> None:
    """It runs more by itself: ``custom_generate``, and a ``tokenizer_file`` elsewhere."""
    assert OLDER.is_dir(), f"`make {OLDER}` installs transformers 4.57 for this test"
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": f"{OLDER}{os.pathsep}{Path(__file__).parents[1]}"}
    finished = subprocess.run(
        [*command, "-W", "ignore", __file__], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout[-4000:]


# YAML.


@pytest.mark.parametrize("command", [train, plan])
def test_yaml_of_a_command(executed, tmp_path, capsys, command):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{executed}']\n")
    yaml.unsafe_load(path.read_text())
    assert was_executed(executed)
    options = ["--world-size", "1"] if command is plan else []
    assert command.main(["--config", str(path), *options]) == 2
    assert "could not determine a constructor" in capsys.readouterr().err
    arguments = [f"--data.blend=!!python/object/apply:os.mkdir ['{executed}']"]
    assert command.main(["--config", "dense_tiny", *arguments, *options]) == 2
    assert not was_executed(executed)


def test_yaml_of_a_run_and_of_a_model_card(folder, executed, tmp_path, capsys):
    evil = f"license: !!python/object/apply:os.mkdir ['{executed}']\n"
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text(evil if name == "config.yaml" else "")
    assert report.main([str(tmp_path / "run"), "--output", str(tmp_path / "page")]) == 2
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_yaml(tmp_path / "run/config.yaml")
    (folder / "README.md").write_text(f"---\n{evil}---\n")
    settings, notes = settings_of_folder(folder, {}, vocab_size=10, max_positions=10)
    assert settings.card == {} and "not YAML" in notes[0]
    bomb = "a: &a [x, x]\n" + "".join(
        f"{new}: &{new} [*{old}, *{old}]\n"
        for old, new in zip("abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx", strict=True)
    )
    (folder / "README.md").write_text(f"---\n{bomb}license: *x\n---\n")
    assert "not YAML" in settings_of_folder(folder, {}, vocab_size=10, max_positions=10)[1][0]
    assert not was_executed(executed)


# Data.


def test_arrays_of_the_cache(executed, tmp_path):
    texts = [document.text[:2000] for document in builtin_documents()[:3]]
    tokenizer = load_tokenizer(None)
    write_token_file(tmp_path / "text", texts, tokenizer)
    found, _ = check_token_files(
        [tmp_path / "text"],
        min_tokens=9,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        cache_dir=tmp_path / "cache",
    )

    def open_samples():
        return open_pool(
            found,
            Split.train,
            seq_length=8,
            seed=1,
            tokenizer=tokenizer,
            vocab_size=tokenizer.vocab_size,
            eod_mask_loss=False,
            cache_dir=tmp_path / "cache",
        )

    assert len(open_samples()) > 3
    arrays = list((tmp_path / "cache").rglob("*.npy"))
    assert len(arrays) == 2
    for path in arrays:
        array = np.empty(1, object)
        array[0] = Code(executed)
        np.save(path, array, allow_pickle=True)
        np.load(path, allow_pickle=True)
        assert was_executed(executed)
        try:
            open_samples()
        except ValueError as error:
            assert "Python objects" in str(error)
        assert not was_executed(executed)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_pickled_types_of_tables(executed, tmp_path, kind):
    """pyarrow unpickled types of this name before 14.0.1, which setup.py requires."""
    texts = [document.text[:200] for document in builtin_documents()[:5]]
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Code(executed)),
    }
    pickle.loads(metadata[b"ARROW:extension:metadata"])
    assert was_executed(executed)
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), metadata=metadata)])
    table = pyarrow.table([pyarrow.array(texts)], schema=schema)
    path = tmp_path / f"text.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    output = tmp_path / "tokens" / "text"
    arguments = ["--input", str(path), "--output-prefix", str(output), "--workers", "1"]
    arguments += [
        "--tokenizer-backend",
        "tokenizers",
        "--append-eod",
        "--tokenizer-model",
        str(BUILTIN_TOKENIZER),
    ]
    assert preprocess.main(arguments) == 0
    assert not was_executed(executed)
    write_token_file(tmp_path / "expected", texts, load_tokenizer(None))
    written = tmp_path / "tokens/text_text_document.bin"
    assert written.read_bytes() == (tmp_path / "expected.bin").read_bytes()


def test_questions_of_tasks(executed, tmp_path):
    task = TASKS["piqa"]
    name = QUESTION_FILES["piqa"].file
    (tmp_path / name).write_bytes(pickle.dumps(Code(executed)))
    pickle.loads((tmp_path / name).read_bytes())
    assert was_executed(executed)
    with pytest.raises(EvaluationError, match="is not a JSON object"):
        missing_files(task, tmp_path)
    assert not was_executed(executed)
