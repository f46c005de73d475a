"""Rules on what Transformer Engine, apex and the GPU itself can do: kernels and FP8."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megapoly.config import resolve
from megapoly.config.fp8 import FP8_OPTIONS, FP8_RECIPES, FP8Recipe
from megapoly.config.rules.facts import Facts, Rule, have_no_effect, must_be_multiple
from megapoly.config.rules.layout import CP, TP, ffn_widths

# Releases whose modules Megatron-Core 0.16 supports, as in setup.py.
TRANSFORMER_ENGINE_FROM, TRANSFORMER_ENGINE_BELOW = (2, 9), (2, 12)
DELAYED_OPTIONS = ("training.fp8_amax_history_len", "training.fp8_amax_compute_algo")


def transformer_engine_version_fits(facts: Facts) -> Iterator[str]:
    """The engine supports a range of releases of Transformer Engine."""
    version = facts.machine.transformer_engine_version
    if not facts.uses_transformer_engine or version is None:
        return
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not TRANSFORMER_ENGINE_FROM <= numbers < TRANSFORMER_ENGINE_BELOW:
        yield (
            f"Transformer Engine ({version}) must be at least 2.9 and below 2.12 for Megatron-Core "
            "0.16; `pip install 'megapoly[gpu]'`, or set `model.transformer_engine` to false"
        )


def fusions_are_installed(facts: Facts) -> Iterator[str]:
    """Requested kernels belong to packages that are installed."""
    model, training = facts.config.model, facts.config.training
    for name, requested in (
        ("apply_rope_fusion", model.apply_rope_fusion),
        ("moe_permute_fusion", model.moe_permute_fusion),
    ):
        if requested and not facts.uses_transformer_engine:
            yield (
                f"`model.{name}` (True) needs a kernel of Transformer Engine, which this run does "
                "not use; leave it null"
            )
    apex = facts.machine.apex and facts.device == "cuda"
    if training.gradient_accumulation_fusion and not apex:
        yield (
            "`training.gradient_accumulation_fusion` (True) needs CUDA and apex with its kernel "
            "fused_weight_gradient_mlp_cuda, which this process does not have; leave it null"
        )


def fp8_options_have_effect(facts: Facts) -> Iterator[str]:
    """Options of FP8 need FP8; options of one recipe need that recipe."""
    training = facts.config.training
    if training.fp8 is None:
        options = [f"training.{name}" for name in FP8_OPTIONS]
        alternative = ", or set `training.fp8` to hybrid"
        yield from have_no_effect(facts.config, options, "without `training.fp8`", alternative)
    elif training.fp8_recipe != "delayed":
        condition = f"with `training.fp8_recipe` ({training.fp8_recipe})"
        yield from have_no_effect(facts.config, DELAYED_OPTIONS, condition, ", or take delayed")


def fp8_layers_fit_recipe(facts: Facts) -> Iterator[str]:
    """Delayed scaling applies to all layers or none; other recipes can leave layers out."""
    training = facts.config.training
    if not (training.fp8 and training.first_last_layers_bf16):
        return
    if training.fp8_recipe == "delayed":
        yield (
            "`training.first_last_layers_bf16` (True) cannot be used with `training.fp8_recipe` "
            "(delayed), which Megatron-Core applies to all layers or none; take tensorwise"
        )
    elif 1 <= facts.config.model.num_layers <= 2:
        yield (
            "`training.first_last_layers_bf16` (True) leaves no layer of `model.num_layers` "
            f"({facts.config.model.num_layers}) to FP8; set `training.fp8` to null"
        )


def fp8_has_what_it_needs(facts: Facts) -> Iterator[str]:
    """FP8 needs Transformer Engine, CUDA, and bfloat16 for everything else."""
    training = facts.config.training
    if training.fp8 is None:
        return
    if facts.device != "cuda":
        yield (
            f"`training.fp8` ({training.fp8}) needs `training.device` cuda, not {facts.device}; "
            "set it to null"
        )
    elif not facts.uses_transformer_engine:
        yield (
            f"`training.fp8` ({training.fp8}) needs Transformer Engine, which this run does not "
            "use; `pip install 'megapoly[gpu]'` and leave `model.transformer_engine` null, or set "
            "`training.fp8` to null"
        )
    if not training.bf16:
        yield (
            f"`training.fp8` ({training.fp8}) needs `training.bf16` (False), for all other "
            "computation; set it to true"
        )


def fp8_recipe_runs_on_device(facts: Facts) -> Iterator[str]:
    """The GPU supports the recipe's arithmetic, and CUDA has its kernels."""
    training, machine = facts.config.training, facts.machine
    if training.fp8 is None or facts.device != "cuda":
        return
    name, recipe = training.fp8_recipe, FP8_RECIPES[training.fp8_recipe]
    capability = machine.compute_capability
    if capability is not None and not recipe.runs_on(capability):
        possible = [other for other, its in FP8_RECIPES.items() if its.runs_on(capability)]
        yield (
            f"`training.fp8_recipe` ({name}) needs compute capability {_range(recipe)}, and this "
            f"GPU has {_dotted(capability)}; "
            + (
                f"take {_one_of(possible[::-1])}"
                if possible
                else "set `training.fp8` to null: bf16 is the fastest that it supports"
            )
        )
    elif recipe.cuda and machine.cuda_version and machine.cuda_version < recipe.cuda:
        yield (
            f"`training.fp8_recipe` ({name}) needs CUDA {_dotted(recipe.cuda)}, and torch is built "
            f"with {_dotted(machine.cuda_version)}; take a newer build of torch, or tensorwise"
        )


def fp8_sizes_fit(facts: Facts) -> Iterator[str]:
    """On every rank, each axis of each product is a whole number of the recipe's units."""
    model, training = facts.config.model, facts.config.training
    if training.fp8 is None or facts.activation is None:
        return
    name, recipe = training.fp8_recipe, FP8_RECIPES[training.fp8_recipe]
    unit, tensor = recipe.multiple, facts.config.parallel.tensor_model_parallel_size
    gathered = resolve.uses_sequence_parallel(facts.config.parallel)
    outer = recipe.gathered_multiple if gathered else unit
    given, of = f"with `training.fp8_recipe` {name}, ", f"the unit of {name}"
    how = " where ranks gather" if outer > unit else ""
    yield from must_be_multiple(
        f"{given}`model.hidden_size`", model.hidden_size, outer, f"{of}{how}"
    )
    if not (model.kv_channels is None and model.hidden_size % max(1, model.num_attention_heads)):
        projections = {model.num_attention_heads: "num_attention_heads"}
        projections.setdefault(resolve.num_query_groups(model), "num_query_groups")
        for heads, heads_name in projections.items():
            yield from must_be_multiple(
                f"{given}`model.{heads_name}` * `model.kv_channels`",
                heads * resolve.kv_channels(model),
                unit * tensor,
                f"{of} * {TP}",
            )
    scaled = resolve.takes_two_thirds(model)
    for width_name, size, ranks, num_ranks in ffn_widths(facts):
        yield from must_be_multiple(
            f"{given}`model.{width_name}`",
            size,
            unit * num_ranks * 3 // 2 if scaled else unit * num_ranks,
            f"{'3/2 * ' if scaled else ''}{of} * {ranks}",
        )
    yield from must_be_multiple(
        f"{given}`training.micro_batch_size` * `training.seq_length`",
        training.micro_batch_size * training.seq_length,
        outer * facts.config.parallel.context_parallel_size * (tensor if gathered else 1),
        f"{of}{how} * {CP}" + (f" * {TP}" if gathered else ""),
    )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _one_of(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _range(recipe: FP8Recipe) -> str:
    below = "" if recipe.beyond is None else f" and below {_dotted(recipe.beyond)}"
    return f"{_dotted(recipe.capability)} or above{below}"


RULES: tuple[Rule, ...] = (
    transformer_engine_version_fits,
    fusions_are_installed,
    fp8_options_have_effect,
    fp8_layers_fit_recipe,
    fp8_has_what_it_needs,
    fp8_recipe_runs_on_device,
    fp8_sizes_fit,
)
