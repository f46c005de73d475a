"""Rules on the machine and on the files that a run reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megapoly.config.rules.facts import Facts, Rule


def device_exists(facts: Facts) -> Iterator[str]:
    """CUDA is there when it is asked for."""
    if facts.config.training.device == "cuda" and not facts.cuda_available:
        yield (
            "`training.device` (cuda) needs a CUDA device and PyTorch built for it, and this "
            "process sees none; set cpu, or auto to take what there is"
        )


def transformer_engine_is_usable(facts: Facts) -> Iterator[str]:
    """Transformer Engine is installed, and runs on CUDA only."""
    if not facts.config.model.transformer_engine:
        return
    remedy = "leave it null, which takes it when it can be used"
    if facts.device == "cpu":
        yield f"`model.transformer_engine` (True) needs `training.device` cuda, not cpu; {remedy}"
    elif not facts.transformer_engine_available:
        yield (
            "`model.transformer_engine` (True) needs Transformer Engine, which is not installed; "
            f"`pip install '.[gpu]'`, or {remedy}"
        )


def token_files_exist(facts: Facts) -> Iterator[str]:
    """Every prefix has its ``.bin`` and ``.idx``."""
    data = facts.config.data
    named: dict[str, list[str] | None] = {"data.train_data_path": data.train_data_path}
    for name, files in (data.valid_data_path or {}).items():
        named[f"data.valid_data_path` `{name}"] = files
    for option, prefixes in named.items():
        yield from _missing_token_files(option, prefixes)
    if data.valid_data_path == {}:
        yield "`data.valid_data_path` ({}) names no set; name one, or leave it null"


def _missing_token_files(option: str, prefixes: Sequence[str] | None) -> Iterator[str]:
    if prefixes == []:
        yield f"`{option}` ([]) is empty; give the prefix of a .bin/.idx pair"
    files = [Path(f"{prefix}{suffix}") for prefix in prefixes or () for suffix in (".bin", ".idx")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        yield (
            f"`{option}` needs files that do not exist: {', '.join(missing)}; give prefixes of "
            ".bin/.idx pairs that do"
        )


def tokenizer_exists(facts: Facts) -> Iterator[str]:
    """The tokenizer is a file, or a folder that holds ``tokenizer.json``."""
    tokenizer = facts.config.data.tokenizer
    if tokenizer is None:
        return
    file = tokenizer_file(tokenizer)
    if not file.is_file():
        yield (
            f"`data.tokenizer` ({tokenizer}) needs a file that does not exist: {file}; give a "
            "tokenizer.json or its folder, or null for the built-in one"
        )


def tokenizer_file(tokenizer: str) -> Path:
    """The file that ``data.tokenizer`` names, itself or by its folder."""
    path = Path(tokenizer)
    return path / "tokenizer.json" if path.is_dir() else path


def evaluation_has_data(facts: Facts) -> Iterator[str]:
    """Own training text brings its own validation text."""
    data, interval = facts.config.data, facts.config.training.eval_interval
    if interval > 0 and data.train_data_path is not None and data.valid_data_path is None:
        yield (
            f"`training.eval_interval` ({interval}) needs `data.valid_data_path` (null) beside "
            "`data.train_data_path`; name a validation set, or set the interval to 0"
        )


def loading_is_possible(facts: Facts) -> Iterator[str]:
    """What to take from a checkpoint needs a checkpoint."""
    checkpoint = facts.config.checkpoint
    if checkpoint.load is None and checkpoint.load_weights_only:
        yield (
            "`checkpoint.load_weights_only` (True) needs `checkpoint.load` (null); name a "
            "checkpoint, or set it to false"
        )
    if checkpoint.load is not None and not Path(checkpoint.load).exists():
        yield (
            f"`checkpoint.load` ({checkpoint.load}) does not exist; give a folder such as "
            "RUN_DIR/checkpoints/iter_0000100"
        )


RULES: tuple[Rule, ...] = (
    device_exists,
    transformer_engine_is_usable,
    token_files_exist,
    tokenizer_exists,
    evaluation_has_data,
    loading_is_possible,
)
