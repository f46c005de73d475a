"""A conversion needs memory for a few tensors, not for the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# 24 layers of 10 MB, an embedding of 16 MB.
PROGRAM = r"""
import ctypes, itertools, json, re, sys, threading, time
from pathlib import Path
from functools import partial
import torch
from rich.console import Console
from megapoly.platform.machine import CPU
from megapoly.config import Config, to_yaml
from megapoly.config.resolve import resolve
from megapoly.conversion import tensor_map
from megapoly.conversion.checkpoint_writer import TensorBlock, write_tensors
from megapoly.conversion.export_model import ExportOptions, export_model
from megapoly.conversion.import_model import ImportOptions, import_model

def anonymous_mb():
    # Without mapped files, of which the system drops what it needs room for.
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

class Peak(threading.Thread):
    def __enter__(self):
        ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept would hide what is taken
        self.start_mb = self.peak_mb = anonymous_mb()
        self.running = True
        self.start()
        return self
    def run(self):
        while self.running:
            self.peak_mb = max(self.peak_mb, anonymous_mb())
            time.sleep(0.002)
    def __exit__(self, *exception):
        self.running = False
        self.join()
        used[self.name] = self.peak_mb - self.start_mb

used = {}

folder = Path(sys.argv[1])
config = Config()
config.model.num_layers, config.model.hidden_size = 24, 512
config.model.num_moe_experts, config.model.moe_ffn_hidden_size = 4, 512
config.model.vocab_size, config.training.train_iters = 8192, 1
config = resolve(config, tokenizer_vocab_size=4096, machine=CPU)
model = config.model
blocks, total = [], 0
mappings_of_model = tensor_map.tensor_mappings(model)
groups = itertools.groupby(mappings_of_model, key=lambda each: (each.key, each.index))
for (key, index), mappings in groups:
    shape = next(mappings).block
    axes = (model.num_layers, model.num_moe_experts)[: len(index)]
    blocks.append(TensorBlock(key, index, axes, shape, partial(torch.full, shape, 0.5)))
    total += 4 * torch.Size(shape).numel() / 2**20
(folder / "in").mkdir()
with Peak(name="write"):
    write_tensors(folder / "in", blocks, torch.float32, lambda _: None)
(folder / "in" / "config.yaml").write_text(to_yaml(config))
run = {"iteration": 1, "consumed_tokens": 1, "data_fingerprint": ""}
(folder / "in" / "run.json").write_text(json.dumps(run))
quiet = Console(quiet=True)
with Peak(name="export"):
    export_model(ExportOptions(folder / "in", folder / "hf", skip_parity=True), quiet)
with Peak(name="import"):
    import_model(ImportOptions(folder / "hf", folder / "back", skip_parity=True), quiet)
print(json.dumps(used | {"total": total}))
"""


def test_conversions_need_memory_for_a_few_tensors(tmp_path: Path):
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    used = json.loads(output.splitlines()[-1])
    assert used["total"] == pytest.approx(320, abs=1)
    # Two of the largest tensor, which is 16 MB, and what libraries take on first use.
    assert max(used["write"], used["export"], used["import"]) < 2 * 16 + 32, used
