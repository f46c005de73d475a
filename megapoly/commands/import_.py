r"""Write a Hugging Face folder as a checkpoint, and prove that it is the same model.

    megapoly import --model DIR --output runs/smollm2/imported
    bash examples/pretrain_dense.sh --config runs/smollm2/imported/recipe.yaml \
        --run_dir runs/smollm2 --training.train_iters 100 --data.blend '[tokens/mine_text_document]'

DIR is a Llama, an OLMoE, what megapoly export wrote, or a PolyCom release: Llama with
`hidden_act` polynorm or polyrelu, coefficients as `mlp.act_fn.weight` (highest power first) and
`mlp.act_fn.bias`. The checkpoint loads at every parallel layout; recipe.yaml has the model, its
tokenizer and the place of the checkpoint. Then the logits of both are compared in fp32.

With --activation another model is started from the parts that fit: attention, embeddings and norms
are taken, the FFN (with router and experts) is initialised as at the start of a run. import.json
lists every tensor.

The exit status is 0; 1 if the logits differ beyond the tolerance, naming the first module that
does; 2 when the model or the output cannot be used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megapoly.config.command_line import Parser, add_conversion_options, whole
from megapoly.errors import ConfigError, MegapolyError
from megapoly.platform.logs import show_errors_only

if TYPE_CHECKING:
    from megapoly.conversion.import_model import ImportReport

# Options of --activation, by their names in `ActivationChange`.
_OF_ACTIVATION = {"activation_order": "order", "ffn_hidden_size": "ffn_hidden_size", "seed": "seed"}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; see the module for the exit status."""
    options = build_parser().parse_args(argv)
    show_errors_only()
    # Here and not above: --help answers without waiting for torch.
    from megapoly.conversion.activation_change import ActivationChange
    from megapoly.conversion.import_model import ImportOptions, import_model
    from megapoly.conversion.parity import ParityError

    arguments = {name: value for name, value in vars(options).items() if value is not None}
    other = {
        name: arguments.pop(option)
        for option, name in _OF_ACTIVATION.items()
        if option in arguments
    }
    try:
        if "activation" in arguments:
            arguments["activation"] = ActivationChange(arguments["activation"], **other)
        elif other:
            raise ConfigError([f"{_words(other)}: nothing reads this without --activation"])
        report = import_model(ImportOptions(**arguments), Console(stderr=True))
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, ParityError) else 2
    _show(report, options.output)
    return 0


def _words(names: Iterable[str]) -> str:
    options = {name: option for option, name in _OF_ACTIVATION.items()}
    return ", ".join("--" + options[name].replace("_", "-") for name in names)


def _show(report: ImportReport, output: Path) -> None:
    if report.initialised or report.left:
        table = Table("", "tensors", "numbers")
        rows = {
            "taken": report.taken,
            "initialised": report.initialised,
            "left in the source": report.left,
        }
        for name, tensors in rows.items():
            table.add_row(name, f"{len(tensors):,}", f"{sum(tensors.values()):,}")
        Console().print(table)
    print(f"wrote {output}; to train on: --config {output / 'recipe.yaml'}")
    if report.parity is not None:
        print(report.parity.summary())
    elif report.initialised:
        print("another model than the source: there is nothing to compare")
    else:
        print("not compared with the source")


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("import", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder with config.json")
    add("--tokenizer", metavar="PATH", help="tokenizer.json or folder (the model's)")
    add("--activation", metavar="NAME", help="start a model with this activation instead")
    add("--activation-order", type=whole(2), metavar="R", help="its highest power (3)")
    add(
        "--ffn-hidden-size",
        type=whole(1),
        metavar="N",
        help="its FFN's width (so that the number of parameters stays)",
    )
    add("--seed", type=whole(0), metavar="N", help="of what is initialised (1234)")
    add_conversion_options(parser, output="CHECKPOINT", report="import.json")
    return parser
