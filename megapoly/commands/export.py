"""Export a checkpoint as a Hugging Face folder, and prove that it is the same model.

    megapoly export --model runs/moe_tiny --output DIR

MODEL is a run (its newest checkpoint) or a checkpoint `iter_*`, saved at any parallel layout. One
in an object store, such as s3://bucket/moe_tiny, is copied to ~/.cache/megapoly and verified. Needs
`pip install 'megapoly[train,hf]'`.

DIR gets safetensors, config.json, generation_config.json, tokenizer and model card. Models that
Llama or OLMoE describe (swiglu, geglu) become plain `llama` or `olmoe`. All others bring their own
code, for AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) in transformers 4.57 or
later.
Tensors are converted one at a time, so little memory is needed.

Then DIR is opened as users would open it, and its logits on real text are compared in fp32 with
the logits of the checkpoint's own model. DIR/parity.json has the result.

The exit status is 0; 1 if the logits differ by more than the tolerance, with the first module that
differs; 2 if the checkpoint or the output cannot be used.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from rich.console import Console

from megapoly.config.command_line import DTYPES, Parser, add_conversion_options, path_or_url
from megapoly.errors import MegapolyError
from megapoly.platform.logs import show_errors_only

_SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> int:
    """Export a checkpoint; the module describes the exit status."""
    options = build_parser().parse_args(argv)
    show_errors_only()
    # Here and not above: --help answers without waiting for torch.
    import torch

    from megapoly.checkpoints.local_copy import local_model
    from megapoly.conversion.export_model import ExportOptions, export_model
    from megapoly.conversion.parity import ParityError

    console = Console(stderr=True)
    arguments = vars(options)
    card = {name: arguments.pop(name) for name in ("license", "language", "datasets")}
    arguments["card"] = {name: value for name, value in card.items() if value is not None}
    if options.dtype is not None:
        arguments["dtype"] = getattr(torch, options.dtype)
    if options.tolerance is None:
        del arguments["tolerance"]
    try:
        arguments["checkpoint"] = local_model(options.checkpoint)
        parity = export_model(ExportOptions(**arguments), console)
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, ParityError) else 2
    print(f"wrote {options.output}")
    print("not compared with the checkpoint" if parity is None else parity.summary())
    return 0


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("export", __doc__, earlier={"--checkpoint": "--model"})
    add = parser.add_argument
    add(
        "--model",
        dest="checkpoint",
        type=path_or_url,
        required=True,
        metavar="MODEL",
        help="run or checkpoint, folder or URL",
    )
    add_conversion_options(parser, output="DIR", report="parity.json")
    add("--dtype", choices=DTYPES, help="dtype of the weights (default: as stored)")
    add(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="largest safetensors file, such as 500MB (default: %(default)s)",
    )
    add("--tokenizer", metavar="PATH", help="tokenizer.json or folder (default: the run's)")
    source = "(default: that of the imported model)"
    add("--license", metavar="ID", help=f"licence on the model card, such as apache-2.0 {source}")
    add("--language", nargs="+", metavar="CODE", help=f"languages, such as en {source}")
    add("--datasets", nargs="+", metavar="ID", help=f"training data on the Hub {source}")
    return parser


def size(text: str) -> int:
    """Return the number of bytes of a size such as ``500MB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|KB|MB|GB)", text.strip().upper())
    num_bytes = 0 if match is None else int(float(match[1]) * _SIZES[match[2]])
    if num_bytes == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 500MB or 5GB")
    return num_bytes
