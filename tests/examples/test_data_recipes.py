"""The paper's data: the scripts write what the recipes read, here from substitute text."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.config.parsing import load_yaml
from megapoly.config.schema import BlendSource, ValidationSet
from megapoly.data.builtin import builtin_documents
from megapoly.data.tokenizer import BUILTIN_TOKENIZER

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"
RECIPES = {
    "redpajama_1t.sh": ("dense_1b_paper", "dense_1b_released"),
    "olmoe_mix_0924.sh": ("moe_7b_paper", "moe_7b_released"),
}


def written_by(script: str) -> list[str]:
    """Prefixes of the token files that a script makes with TOKENS=data."""
    calls = re.findall(
        r'"\$tokens/([\w-]+)" "\$tokenizer" \\\n +"([^"]+)"', (DATA / script).read_text()
    )
    return [f"data/{folder}/{d}_text_document" for folder, ds in calls for d in ds.split()]


@pytest.mark.parametrize("script", RECIPES)
def test_recipes_read_what_the_scripts_write(script):
    for recipe in RECIPES[script]:
        data = load_yaml(ROOT / "examples" / "configs" / f"{recipe}.yaml").data
        assert all(isinstance(source, BlendSource) for source in data.blend)
        assert all(isinstance(one, ValidationSet) for one in data.validation.values())
        read = [source.path for source in data.blend]
        read += [validation.path for validation in data.validation.values()]
        assert read == written_by(script) and len(data.validation) == 11


def write_substitutes(raw: Path, script: str) -> None:
    """A few chapters for each domain, compressed or not."""
    documents = builtin_documents()
    for i, prefix in enumerate(written_by(script)):
        _, folder, name = prefix.split("/")
        folder = "validation" if folder.startswith("validation") else folder
        path = raw / folder / name.removesuffix("_text_document") / "part-0.jsonl"
        path.parent.mkdir(parents=True)
        lines = [json.dumps({"text": d.text[:4000]}) + "\n" for d in documents[i : i + 40 : 8]]
        path.write_text("".join(lines))
        if i % 2:
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()


def run(command: list[str], folder: Path, **environment: str) -> str:
    scripts = Path(sys.executable).parent
    base = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "NPROC_PER_NODE": "1"}
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=base | environment | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_dense_recipe_trains_on_substitutes(tmp_path):
    """From raw text to the losses of Table 2, in the documented layout, in a small model."""
    write_substitutes(tmp_path / "raw", "redpajama_1t.sh")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        target = tmp_path / "data" / "tokenizers" / "llama" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if BUILTIN_TOKENIZER.with_name(name).is_file():
            shutil.copy(BUILTIN_TOKENIZER.with_name(name), target)
    run(["bash", str(DATA / "redpajama_1t.sh")], tmp_path, RAW="raw", TOKENS="data", WORKERS="1")
    overrides = """
        --model.num_layers 1 --model.hidden_size 32 --model.num_attention_heads 2
        --model.ffn_hidden_size 64 --model.activation_backend reference
        --training.train_tokens null --training.train_iters 2 --training.seq_length 64
        --training.micro_batch_size 2 --training.global_batch_size 4 --training.bf16 false
        --training.eval_interval 2 --training.eval_iters 1 --optimizer.lr_warmup_iters 1
        --checkpoint.save false
    """.split()
    recipe = str(ROOT / "examples" / "configs" / "dense_1b_paper.yaml")
    script = str(ROOT / "examples" / "pretrain_dense.sh")
    output = run(["bash", script, "--config", recipe, *overrides], tmp_path)
    assert re.search(r"common_crawl +72\.56%", output), output
    metrics = (tmp_path / "runs" / "dense_1b_paper" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(metrics[-1])
    sets = load_yaml(Path(recipe)).data.validation
    losses = [last[f"val/{name}/loss"] for name in sets]
    assert last["val/mean/loss"] == pytest.approx(sum(losses) / 11)
