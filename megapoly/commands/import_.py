r"""Import a Hugging Face folder as a checkpoint, and prove that it is the same model.

    megapoly import --model DIR --output runs/smollm2/imported
    megapoly train --config runs/smollm2/imported/recipe.yaml --run_dir runs/smollm2 \
        --training.train_iters 100 --data.blend '[tokens/mine_text_document]'

DIR is a Llama, a Mistral without a sliding window, an OLMoE, a folder that `megapoly export` wrote,
or a PolyCom release: Llama with `hidden_act` polynorm or polyrelu, and coefficients
`mlp.act_fn.weight` (highest power first) and `mlp.act_fn.bias`. Code in it is never run. Needs
`pip install 'megapoly[train,hf]'`.

The checkpoint can be loaded at every parallel layout. Its recipe.yaml has the model, its tokenizer
and the path of the checkpoint, to train with. After conversion the logits of both models are
compared in fp32.

With --activation, another model is started from attention, embeddings and norms of DIR; its FFNs
(with router and experts) are initialised as at the start of a run. import.json lists every tensor.

The exit status is 0; 1 if the logits differ by more than the tolerance, with the first module that
differs; 2 if the model or the output cannot be used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megapoly.config.command_line import Parser, add_conversion_options, at_least
from megapoly.config.ranges import SEEDS_BELOW
from megapoly.errors import ConfigError, MegapolyError
from megapoly.platform.logs import show_errors_only
from megapoly.polynomial import DEFAULT_ORDER

if TYPE_CHECKING:
    from megapoly.conversion.import_model import ImportReport

# Options that need --activation, and their names in `ActivationChange`.
_ACTIVATION_OPTIONS = {
    "activation_order": "order",
    "ffn_hidden_size": "ffn_hidden_size",
    "seed": "seed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Import a model; the module describes the exit status."""
    options = build_parser().parse_args(argv)
    show_errors_only()
    # Here and not above: --help answers without waiting for torch.
    from megapoly.conversion.activation_change import ActivationChange
    from megapoly.conversion.import_model import ImportOptions, import_model
    from megapoly.conversion.parity import ParityError

    arguments = {name: value for name, value in vars(options).items() if value is not None}
    change = {
        name: arguments.pop(option)
        for option, name in _ACTIVATION_OPTIONS.items()
        if option in arguments
    }
    try:
        if "activation" in arguments:
            arguments["activation"] = ActivationChange(arguments["activation"], **change)
        elif change:
            raise ConfigError([f"{_flags(change)}: no effect without --activation"])
        report = import_model(ImportOptions(**arguments), Console(stderr=True))
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, ParityError) else 2
    _show(report, options.output)
    return 0


def _flags(names: Iterable[str]) -> str:
    options = {name: option for option, name in _ACTIVATION_OPTIONS.items()}
    return ", ".join("--" + options[name].replace("_", "-") for name in names)


def _show(report: ImportReport, output: Path) -> None:
    if report.initialised or report.left:
        table = Table("", "tensors", "elements")
        rows = {
            "taken": report.taken,
            "initialised": report.initialised,
            "left in the source": report.left,
        }
        for name, tensors in rows.items():
            table.add_row(name, f"{len(tensors):,}", f"{sum(tensors.values()):,}")
        Console().print(table)
    print(f"wrote {output}; to train: megapoly train --config {output / 'recipe.yaml'}")
    if report.parity is not None:
        print(report.parity.summary())
    elif report.initialised:
        print("the activation differs from the source's, so the models are not compared")
    else:
        print("not compared with the source")


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("import", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    add_conversion_options(parser, output="CHECKPOINT", report="import.json")
    add("--tokenizer", metavar="PATH", help="tokenizer.json or folder (default: the model's)")
    add("--activation", metavar="NAME", help="start a model with another activation")
    add(
        "--activation-order",
        type=at_least(2),
        metavar="R",
        help=f"its highest power (default: {DEFAULT_ORDER})",
    )
    add(
        "--ffn-hidden-size",
        type=at_least(1),
        metavar="N",
        help="width of its FFN (default: keeps the number of parameters)",
    )
    add(
        "--seed",
        type=at_least(0, SEEDS_BELOW - 1),
        metavar="N",
        help="seed of initialised weights (default: 1234)",
    )
    return parser
