"""What a resumed run says about options that differ from its checkpoint's, and does with them."""

import copy

import pytest
from resuming_jobs import optimizer_groups, train

from megapoly.config import load_recipe
from megapoly.config.resolve import resolve
from megapoly.platform.machine import CPU
from megapoly.training.resume_notes import changed_options

CHANGES = {
    "optimizer.lr": (6e-4, 0.0006),
    "optimizer.min_lr": (1e-6, 1e-06),
    "optimizer.lr_decay_style": ("constant", "constant"),
    "optimizer.lr_warmup_iters": (7, 7),
    "optimizer.weight_decay": (0.0, 0.0),
    "optimizer.adam_beta2": (0.99, 0.99),
    "optimizer.adam_eps": (1e-6, 1e-06),
    "optimizer.clip_grad": (0.0, 0.0),
    "training.train_iters": (77, 77),
    "training.bf16": (True, "true"),
    "training.fp8": ("e4m3", "e4m3"),
    "training.micro_batch_size": (1, 1),
    "model.hidden_dropout": (0.5, 0.5),
    "model.attention_dropout": (0.5, 0.5),
    "model.moe_aux_loss_coeff": (0.0, 0.0),
    "model.activation_backend": ("reference", "reference"),
    "data.eod_mask_loss": (True, "true"),
    "parallel.tensor_model_parallel_size": (2, 2),
    "parallel.recompute_granularity": ("full", "full"),
}
UNIMPORTANT = {
    "run_dir": "elsewhere",
    "checkpoint.save_interval": 3,
    "logging.log_interval": 3,
    "training.eval_interval": 3,
    "data.num_workers": 3,
    "data.cache_dir": "elsewhere",
    "parallel.distributed_timeout_minutes": 3.0,
}


def value_of(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def changed(changes):
    """Return a configuration of a run, and a copy with other values."""
    recipe = load_recipe("moe_tiny")
    before = resolve(recipe, tokenizer_vocab_size=4096, machine=CPU)
    after = copy.deepcopy(before)
    for name, value in changes.items():
        *section, option = name.split(".")
        assert value_of(before, name) != value, name
        setattr(value_of(after, section[0]) if section else after, option, value)
    return before, after


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_with_an_effect_on_training_is_named(name):
    value, shown = CHANGES[name]
    before, after = changed({name: value})
    (line,) = changed_options(before, after)
    assert line.startswith(f"`{name}` ") and line.endswith(f" -> {shown}")


def test_other_options_are_not_named():
    assert changed_options(*changed(UNIMPORTANT)) == []


@pytest.mark.parametrize("distributed", [False, True])
def test_the_optimizer_has_the_options_of_the_run_that_resumes(tmp_path, distributed):
    kept = {"training.bf16": True, "parallel.use_distributed_optimizer": distributed}
    train(tmp_path, kept | {"training.train_iters": 2})
    options = {
        "training.train_iters": 6,
        "optimizer.lr": 0.9,
        "optimizer.min_lr": 0.4,
        "optimizer.lr_decay_style": "linear",
        "optimizer.lr_warmup_iters": 0,
        "optimizer.weight_decay": 0.3,
        "optimizer.adam_beta1": 0.7,
        "optimizer.adam_beta2": 0.8,
        "optimizer.adam_eps": 1e-3,
    }
    decays = set()
    for group in optimizer_groups(tmp_path, kept | options):
        assert group["step"] == 2  # Adam's own state goes on
        assert group["lr"] == pytest.approx(0.9 - 0.5 * 2 / 6)
        assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-3)
        decays.add(group["weight_decay"])
    assert decays == {0.0, 0.3}
