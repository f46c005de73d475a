"""A checkpoint of any layout resumes at any other: weights, optimizer state, losses.

One run moves from layout to layout, two steps at each, and must have the losses of a run on one
process that is never interrupted.
"""

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from megapoly.preflight.layouts import parse_layout
from megapoly.testing import run_job

TINY = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.activation_backend": "reference",
    "training.seq_length": 32,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 0,
    "optimizer.lr_warmup_iters": 2,
    "optimizer.lr_decay_iters": 40,
    "checkpoint.keep": 1,
    "logging.tensorboard": False,
}
DENSE = TINY | {"model.ffn_hidden_size": 192}
MOE = TINY | {"model.moe_ffn_hidden_size": 96}
PER_EXPERT = {"model.activation_coefficients": "per_expert"}
STEPS = 2

CHAINS = {
    "dense": ("dense_tiny", DENSE, "tp2-distopt pp2-vpp2 cp2-distopt 1 tp2"),
    "moe": ("moe_tiny", MOE, "ep2-distopt tp2-ep2-etp1 etp2-dp2-distopt pp2-vpp2 cp2-ep2"),
    "moe-per-expert": ("moe_tiny", MOE | PER_EXPERT, "tp2-etp1-distopt 1 ep2-distopt pp2"),
}
LONG_CHAINS = {
    "dense-2": (
        "dense_tiny",
        DENSE,
        "tp2 pp2-vpp2 cp2-distopt dp2 tp2-distopt pp2 dp2-distopt cp2-a2a 1 tp2",
    ),
    "moe-2": (
        "moe_tiny",
        MOE,
        "ep2-distopt tp2-ep2-etp1 etp2-dp2 pp2-vpp2 cp2-ep2-distopt ep2 tp2-distopt 1 ep2-distopt",
    ),
    "moe-per-expert-2": (
        "moe_tiny",
        MOE | PER_EXPERT,
        "tp2-etp1-distopt ep2 pp2 etp2-dp2-distopt tp2-ep2-etp1-distopt tp2 1 ep2-distopt",
    ),
    "dense-4": (
        "dense_tiny",
        DENSE,
        "tp2-pp2 cp2-pp2-vpp2-distopt tp4 tp2-dp2-distopt pp4 cp4-distopt tp2-cp2 dp4-distopt",
    ),
    "moe-4": (
        "moe_tiny",
        MOE,
        "tp2-ep2-dp2 ep4-distopt pp2-ep2-distopt tp4-ep2-etp2 tp2-ep4-etp1-distopt etp4-dp4 "
        "cp2-ep4 tp2-pp2-vpp2-ep2-etp1",
    ),
    "moe-per-expert-4": (
        "moe_tiny",
        MOE | PER_EXPERT,
        "tp2-ep4-etp1 etp2-ep2-distopt pp2-vpp2-ep2-distopt tp4-etp2-distopt ep4 cp2-ep2-etp2-dp2",
    ),
}


def options_of(name):
    """Return the command-line options of a layout, and its number of processes."""
    layout = parse_layout(name)
    return layout.options, layout.world_size


@pytest.mark.parametrize(
    "chain",
    [*CHAINS, *(pytest.param(name, marks=pytest.mark.parallel) for name in LONG_CHAINS)],
)
def test_moving_from_layout_to_layout_changes_no_loss(tmp_path, chain):
    recipe, overrides, names = (CHAINS | LONG_CHAINS)[chain]
    layouts = names.split()
    length = {"training.train_iters": STEPS * len(layouts)}
    expected = run_job(recipe, tmp_path / "whole", overrides | length | {"checkpoint.save": False})
    for i, name in enumerate(layouts, start=1):
        options, num_ranks = options_of(name)
        options |= {"training.train_iters": STEPS * i}
        lines = run_job(recipe, tmp_path / "moving", overrides | options, num_ranks=num_ranks)
        assert len(lines) == STEPS * i
        for line, e in zip(lines[-STEPS:], expected[STEPS * (i - 1) :], strict=False):
            assert line["iteration"] == e["iteration"]
            assert line["lm_loss"] == pytest.approx(e["lm_loss"], abs=1e-6), name
            assert line["grad_norm"] == pytest.approx(e["grad_norm"], rel=1e-5), name


def saved_tensors(run_dir):
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


MASTER = "optimizer.state.fp32_param."


def test_precisions_take_each_others_checkpoints(tmp_path):
    """bf16 -> fp32 -> bf16, with and without the distributed optimizer: no bit is lost."""
    overrides = MOE | PER_EXPERT | {"training.train_iters": STEPS}
    forms = {
        "bf16": {"training.bf16": True} | options_of("ep2-distopt")[0],
        "fp32": options_of("tp2")[0],
        "bf16-again": {"training.bf16": True},
    }
    saved, previous = {}, None
    for name, options in forms.items():
        start = {} if previous is None else {"checkpoint.load": previous}
        num_ranks = 1 if name == "bf16-again" else 2
        run_job("moe_tiny", tmp_path / name, overrides | options | start, num_ranks=num_ranks)
        saved[name] = saved_tensors(tmp_path / name)
        previous = tmp_path / name / "checkpoints" / "iter_0000002"
    first, fp32, last = saved.values()
    moments = [name for name in fp32 if name.startswith("optimizer.state.exp_avg")]
    weights = [name for name in fp32 if f"{MASTER}{name}" in first]
    assert len(moments) == 2 * len(weights) and weights
    assert not any(name.startswith(MASTER) for name in fp32)
    assert first.keys() == last.keys() == {*fp32, *(f"{MASTER}{name}" for name in weights)}
    for name in moments:
        assert torch.equal(first[name], fp32[name]) and torch.equal(fp32[name], last[name])
        assert fp32[name].any(), name
    for name in weights:
        master = first[f"{MASTER}{name}"]
        assert torch.equal(master, fp32[name]) and torch.equal(master, last[f"{MASTER}{name}"])
        assert last[name].dtype == torch.bfloat16 and torch.equal(last[name], master.bfloat16())


def test_weights_alone_load_at_another_layout_and_precision(tmp_path):
    overrides = DENSE | {"training.train_iters": STEPS}
    run_job("dense_tiny", tmp_path / "first", overrides)
    checkpoint = tmp_path / "first" / "checkpoints" / "iter_0000002"
    start = {"checkpoint.load": checkpoint, "checkpoint.load_weights_only": True}
    options, num_ranks = options_of("tp2-distopt")
    options |= {"training.bf16": True, "training.train_iters": 1, "optimizer.weight_decay": 0.0}
    run_job("dense_tiny", tmp_path / "second", overrides | start | options, num_ranks=num_ranks)
    first, second = (saved_tensors(tmp_path / name) for name in ("first", "second"))
    # The first step has learning rate 0 (warm-up).
    for name, weight in first.items():
        if not name.startswith("optimizer."):
            assert torch.equal(weight.bfloat16(), second[name]), name
    shutil.rmtree(tmp_path / "first")
