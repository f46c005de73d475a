"""Import a Hugging Face folder as a checkpoint, optionally with another activation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor

import megapoly
from megapoly.activations import registry
from megapoly.checkpoints.run_file import read_run_file
from megapoly.checkpoints.seal import seal
from megapoly.config import Config, ModelConfig, to_yaml
from megapoly.config.data_sources import tokenizer_file
from megapoly.config.rules import find_problems
from megapoly.conversion import tensor_map
from megapoly.conversion.activation_change import (
    ActivationChange,
    change_activation,
    names_outside_ffn,
)
from megapoly.conversion.architecture import max_positions, model_config
from megapoly.conversion.bos_rule import rule_of_import
from megapoly.conversion.checkpoint_model import check_finite
from megapoly.conversion.checkpoint_writer import TensorBlock, write_tensors
from megapoly.conversion.imported_settings import settings_of_folder
from megapoly.conversion.output_folder import output_folder, write_json
from megapoly.conversion.parity import TOLERANCE, Parity
from megapoly.conversion.parity_check import check_import_parity
from megapoly.conversion.safetensors_reader import SafetensorsReader
from megapoly.conversion.tensor_map import TensorMapping
from megapoly.conversion.tokenizer_files import check_vocabulary, write_tokenizer
from megapoly.data.tokenizer import load_tokenizer
from megapoly.errors import CheckpointError, ConfigError
from megapoly.model.initial_values import initial_value
from megapoly.platform import extras
from megapoly.platform.machine import CPU
from megapoly.platform.progress import bytes_bar

# A tied output layer may be stored nevertheless.
_OUTPUT, _INPUT = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """Options of ``megapoly import``.

    Args:
        model: folder of a Llama, OLMoE or exported model.
        output: checkpoint folder to create.
        tokenizer: a ``tokenizer.json`` or folder that replaces the model's own.
        activation: start a model with this activation from the weights outside FFNs; None imports
            the same model.
        overwrite: replace ``output`` if it exists.
        skip_parity: do not compare the checkpoint with the source.
        tolerance: tolerance of the comparison, see :class:`megapoly.conversion.parity.Parity`.
    """

    model: Path
    output: Path
    tokenizer: str | None = None
    activation: ActivationChange | None = None
    overwrite: bool = False
    skip_parity: bool = False
    tolerance: float = TOLERANCE


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """Outcome of an import: number of elements by tensor name, and the comparison.

    Args:
        taken: tensors that came from the source.
        initialised: tensors initialised as at the start of a run, by their names in an export.
        left: tensors of the source that are not used.
        parity: comparison with the source; None if it was skipped or the activation was changed.
        skipped: the comparison was disabled by an option.
        notes: settings of the source that are left out, and why.
    """

    taken: dict[str, int]
    initialised: dict[str, int]
    left: dict[str, int]
    parity: Parity | None = None
    skipped: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``import.json``."""
        compared = {"skipped": True} if self.skipped else None
        if self.parity is not None:
            compared = self.parity.to_dict()
        tensors = {name: getattr(self, name) for name in ("taken", "initialised", "left")}
        return tensors | {"notes": self.notes, "parity": compared}


def import_model(options: ImportOptions, console: Console) -> ImportReport:
    """Convert a folder to a checkpoint that can be trained further at any layout.

    Besides tensors, the checkpoint has ``config.yaml`` (resolved), ``recipe.yaml`` (the model, its
    tokenizer and this checkpoint, to train with), ``run.json``, ``import.json`` and ``tokenizer/``.

    Raises:
        CheckpointError: the folder is incomplete, or its model is not supported.
        ConfigError: ``activation`` breaks a rule of training.
        UnavailableError: a library is missing.
        DataError: the tokenizer cannot be read, or the disk is full.
        ParityError: the checkpoint is not the source's model; it is kept as ``OUTPUT.failed``.
    """
    extras.require("A Hugging Face model", "hf", extras.EXTRAS["hf"])
    output, overwrite = options.output, options.overwrite
    with output_folder(output, source=options.model, overwrite=overwrite) as folder:
        with SafetensorsReader(options.model) as source:
            report = _write(options, source, folder, console)
        write_json(folder / "import.json", report.to_dict())
        seal(folder, read_run_file(folder))  # again, with import.json
        if report.parity is not None:
            report.parity.raise_if_different("import.json")
    return report


def _write(
    options: ImportOptions, source: SafetensorsReader, folder: Path, console: Console
) -> ImportReport:
    original = model_config(source.config, source=str(options.model / "config.json"))
    _check_names(source, original)
    model, seed = original, Config().training.seed
    if options.activation is not None:
        model, seed = change_activation(original, options.activation), options.activation.seed
    dtypes = source.dtypes()
    # Training does not support fp16; fp32 represents it exactly.
    dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    config = _configuration(source, model, bf16=dtype == torch.bfloat16, seed=seed)
    notes, add_bos = _write_tokenizer(options, source.config, folder, config)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    config.data.tokenizer = str(options.output.resolve() / "tokenizer")
    report = _write_tensors(options, source, original, config, folder, dtype, console)
    report = dataclasses.replace(report, notes=notes)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "recipe.yaml").write_text(_recipe(config, options.output.resolve()))
    seal(folder, _run_description(options) | {"add_bos": add_bos})
    if options.skip_parity or options.activation is not None:
        return dataclasses.replace(report, skipped=options.skip_parity)
    result = check_import_parity(folder, options.model, dtype, options.tolerance, console)
    return dataclasses.replace(report, parity=result)


def _write_tokenizer(
    options: ImportOptions, source_config: dict[str, Any], folder: Path, config: Config
) -> tuple[list[str], bool]:
    """Write tokenizer and settings, and check that training accepts tokenizer and model.

    Returns:
        Notes about settings that are left out; whether texts of the model begin with BOS.
    """
    source = options.tokenizer or str(options.model)
    check_vocabulary(source, config.model)
    place = folder / "tokenizer"
    place.mkdir()
    assert config.model.vocab_size is not None, "resolved"
    length = config.training.seq_length
    settings, notes = settings_of_folder(
        options.model, source_config, vocab_size=config.model.vocab_size, max_positions=length
    )
    if _is_other_tokenizer(options):
        settings = settings.without_token_ids()
        notes.append(
            f"token ids in config.json and generation_config.json of {options.model} are left out: "
            f"{options.tokenizer} is another tokenizer than the model's"
        )
    write_tokenizer(
        source,
        place,
        max_length=settings.tokenizer_length(length),
        pad=settings.token_ids.get("pad_token_id"),
    )
    settings.write(place)
    config.data.tokenizer = str(place)
    problems = find_problems(
        config,
        world_size=1,
        machine=CPU,
        tokenizer_vocab_size=load_tokenizer(place).vocab_size,
    )
    if problems:
        raise ConfigError(problems)
    return notes, rule_of_import(options.model, options.tokenizer, place)


def _is_other_tokenizer(options: ImportOptions) -> bool:
    """Check whether an option gives another tokenizer than the model has beside it."""
    own = tokenizer_file(str(options.model))
    if options.tokenizer is None or not own.is_file():
        return False
    given = tokenizer_file(options.tokenizer)
    # The vocabularies alone: the files beside the model's may name several ends of a document,
    # which is a reason to give a copy that names one.
    return not given.is_file() or given.read_bytes() != own.read_bytes()


def _write_tensors(
    options: ImportOptions,
    source: SafetensorsReader,
    original: ModelConfig,
    config: Config,
    folder: Path,
    dtype: torch.dtype,
    console: Console,
) -> ImportReport:
    model, stored = config.model, set(source.names)
    mappings = tensor_map.tensor_mappings(model)
    taken = stored if options.activation is None else stored & names_outside_ffn(original)
    report = ImportReport(
        taken={each.name: each.num_elements for each in mappings if each.name in taken},
        initialised={each.name: each.num_elements for each in mappings if each.name not in taken},
        left={
            name: torch.Size(source.shape(name)).numel()
            for name in sorted(stored - taken if options.activation else ())
        },
    )
    blocks = []
    for (key, index), group in itertools.groupby(mappings, key=lambda each: (each.key, each.index)):
        parts = list(group)
        make: Callable[[], Tensor] = partial(_from_source, source, parts)
        if parts[0].name not in taken:
            make = partial(_from_seed, parts[0], config)
        blocks.append(TensorBlock(key, index, _axes(index, model), parts[0].block, make))
    total = sum(block.num_bytes(dtype) for block in blocks)
    with bytes_bar("writing tensors", total, console) as advance:
        write_tensors(folder, blocks, dtype, advance)
    return report


def _from_source(source: SafetensorsReader, parts: list[TensorMapping]) -> Tensor:
    """Assemble a block from the folder's tensors."""
    tensors = [source.read(mapping.name) for mapping in parts]
    block = torch.empty(parts[0].block, dtype=tensors[0].dtype)
    for mapping, tensor in zip(parts, tensors, strict=True):
        check_finite(tensor, f"`{mapping.name}` in {source.folder}")
        mapping.write(tensor.reshape(mapping.shape), block)
    return block


def _from_seed(mapping: TensorMapping, config: Config) -> Tensor:
    """Initialise a block as at the start of a run."""
    model = config.model
    name = mapping.key.rpartition(".")[2]
    if ".activation_func." in mapping.key:
        initial = registry.get(model.activation).coefficients
        assert initial is not None
        return torch.tensor(initial(model.activation_order)[name])
    return initial_value(mapping.key, mapping.index, mapping.block, model, config.training.seed)


def _axes(index: tuple[int, ...], model: ModelConfig) -> tuple[int, ...]:
    """Return the sizes of the axes of layers and experts."""
    return (model.num_layers, model.num_moe_experts or 0)[: len(index)]


def _check_names(source: SafetensorsReader, model: ModelConfig) -> None:
    """Check that the folder has the tensors of its configuration's model, and no others.

    Raises:
        CheckpointError: with names and shapes, if it does not.
    """
    expected = {each.name: each.shape for each in tensor_map.tensor_mappings(model)}
    names = set(source.names)
    if _OUTPUT in names and _OUTPUT not in expected:
        if not torch.equal(source.read(_OUTPUT), source.read(_INPUT)):
            raise CheckpointError(
                f"{source.folder} ties its embeddings (`tie_word_embeddings`), but `{_OUTPUT}` is "
                f"not `{_INPUT}`; set it to false in config.json to use both."
            )
        names.remove(_OUTPUT)
    problems = [f"`{name}` is missing" for name in expected if name not in names]
    problems += [f"`{name}` is unknown" for name in sorted(names - set(expected))]
    problems += [
        f"`{name}` is {source.shape(name)}, not {shape}"
        for name, shape in expected.items()
        if name in names and source.shape(name) != shape
    ]
    if problems:
        raise CheckpointError(
            f"{source.folder} must have exactly the tensors of the model in its config.json: "
            f"{'; '.join(problems[:8])}{' ..' if len(problems) > 8 else ''}."
        )


def _configuration(
    source: SafetensorsReader, model: ModelConfig, *, bf16: bool, seed: int
) -> Config:
    config = Config(model=model)
    model.make_vocab_size_divisible_by = 1  # no padding here; a run pads as it needs
    config.training.train_iters = 1  # not used; the recipe leaves it to the run
    config.training.seq_length = max_positions(source.config)
    config.training.bf16 = bf16
    config.training.seed = seed
    return config


def _recipe(config: Config, output: Path) -> str:
    """Return what a run needs to train further: the model, its tokenizer, this checkpoint."""
    fields, default = yaml.safe_load(to_yaml(config)), yaml.safe_load(to_yaml(Config()))
    model = {k: v for k, v in fields["model"].items() if v != default["model"][k]}
    # These depend on the machine and the layout.
    for name in (
        "transformer_engine",
        "apply_rope_fusion",
        "moe_permute_fusion",
        "make_vocab_size_divisible_by",
    ):
        model.pop(name, None)
    recipe = {
        "model": model,
        "data": {"tokenizer": config.data.tokenizer},
        "training": {"seq_length": config.training.seq_length, "bf16": config.training.bf16},
        "checkpoint": {"load": str(output)},
    }
    return yaml.safe_dump(recipe, sort_keys=False)


def _run_description(options: ImportOptions) -> dict[str, Any]:
    return {
        "iteration": 0,
        "consumed_samples": 0,
        "consumed_tokens": 0,
        "data_fingerprint": None,
        "data": None,
        "weights_only": True,
        "imported_from": options.model.resolve().name,
        "megapoly_version": megapoly.__version__,
    }
