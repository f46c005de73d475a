"""Generate text from a model: see how it continues a prompt.

    megapoly generate --model runs/moe_tiny --prompt "Call me Ishmael."

MODEL is a run (its newest checkpoint), a checkpoint `iter_*` of any parallel layout, which is
converted in memory, or a Hugging Face folder, whose own code runs only with --trust-remote-code.
A run or checkpoint in an object store, such as s3://bucket/moe_tiny, is copied to
~/.cache/megapoly and verified.
Needs `pip install 'megapoly[hf]'`. The text is printed while it is generated.

The exit status is 0, or 2 with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapoly.config.command_line import (
    DTYPES,
    NO_CODE_TO_TRUST,
    Parser,
    add_trust_option,
    at_least,
    number,
    path_or_url,
    status_of,
)
from megapoly.config.ranges import SEEDS_BELOW
from megapoly.errors import CheckpointError
from megapoly.platform import extras
from megapoly.platform.logs import show_errors_only

PROMPT = "It was the best of"


def main(argv: Sequence[str] | None = None) -> int:
    """Generate text; the module describes the exit status."""
    options = build_parser().parse_args(argv)
    show_errors_only()
    return status_of(lambda: _generate(options))


def _generate(options: argparse.Namespace) -> int:
    # Here and not above: --help answers without waiting for torch.
    import torch

    from megapoly.checkpoints.local_copy import local_model
    from megapoly.conversion.bos_rule import bos_rule
    from megapoly.conversion.checkpoint_reader import checkpoint_of_model
    from megapoly.conversion.transformers_model import load_transformers_model
    from megapoly.platform.device import check_device

    extras.require("Generation", "hf", extras.EXTRAS["hf"])
    from transformers import TextStreamer

    check_device("--device", options.device)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    options.model = local_model(options.model)
    checkpoint = checkpoint_of_model(options.model)
    _check_trust(options, checkpoint)
    path = checkpoint or options.model
    model, tokenizer = load_transformers_model(
        path, dtype=dtype, device=options.device, run_code=options.trust_remote_code
    )
    torch.manual_seed(options.seed)
    ids = tokenizer(options.prompt, add_special_tokens=bos_rule(path) is not False)["input_ids"]
    if not ids:  # in training, documents begin after this token
        ids = [tokenizer.eos_token_id]
    prompt = torch.tensor([ids], device=options.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": 0,
        }
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer),
        tokenizer=tokenizer,  # an imported model may stop at strings
        **sampling,
    )
    return 0


def _check_trust(options: argparse.Namespace, checkpoint: Path | None) -> None:
    """Refuse an option without effect; name code that is not run."""
    from megapoly.conversion.folder_code import note_on_code

    if options.trust_remote_code:
        if checkpoint is not None:
            raise CheckpointError(NO_CODE_TO_TRUST)
    elif checkpoint is None and (note := note_on_code(options.model)):
        print(f"note: {note}", file=sys.stderr)


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("generate", __doc__)
    add = parser.add_argument
    add(
        "--model",
        type=path_or_url,
        required=True,
        help="run or checkpoint, folder or URL, or Hugging Face folder",
    )
    add("--prompt", default=PROMPT, metavar="TEXT", help=f"text to continue (default: {PROMPT})")
    add(
        "--max-new-tokens",
        type=at_least(1),
        default=60,
        metavar="N",
        help="generate at most N tokens (default: %(default)s)",
    )
    add(
        "--temperature",
        type=number(least=0.0, most=100.0),
        default=0.8,
        metavar="T",
        help="divide logits by T before sampling; 0 takes the most likely token "
        "(default: %(default)s)",
    )
    add(
        "--top-p",
        type=number(above=0.0, most=1.0),
        default=0.95,
        metavar="P",
        help="sample from the most likely tokens with total probability P (default: %(default)s)",
    )
    add(
        "--seed",
        type=at_least(0, SEEDS_BELOW - 1),
        default=1234,
        metavar="N",
        help="seed (default: %(default)s)",
    )
    add_trust_option(parser)
    add("--dtype", choices=DTYPES, help="dtype to compute in (default: as stored)")
    add(
        "--device",
        default="cpu",
        metavar="NAME",
        help="device such as cpu or cuda (default: %(default)s)",
    )
    return parser
