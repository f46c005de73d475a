"""Let a model continue a text: the quick way to see what it has learned.

    megapoly generate --model runs/moe_tiny --prompt "Call me Ishmael."

MODEL is a run (its newest checkpoint), a checkpoint `iter_*` of any parallel layout, which is
converted in memory, or a Hugging Face folder. The text appears as it is made. The exit status is 0,
or 2 with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapoly.config.command_line import DTYPES, Parser, number, whole
from megapoly.errors import MegapolyError
from megapoly.platform.logs import show_errors_only

PROMPT = "It was the best of"


def main(argv: Sequence[str] | None = None) -> int:
    """Generate; see the module for the exit status."""
    options = build_parser().parse_args(argv)
    show_errors_only()
    try:
        return _generate(options)
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2


def _generate(options: argparse.Namespace) -> int:
    # Here and not above: --help answers without waiting for torch.
    import torch

    from megapoly.conversion.hf_extra import require_hf_extra
    from megapoly.conversion.transformers_model import load_transformers_model
    from megapoly.platform.device import check_device

    require_hf_extra()
    from transformers import TextStreamer

    check_device("--device", options.device)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model, tokenizer = load_transformers_model(options.model, dtype=dtype, device=options.device)
    torch.manual_seed(options.seed)
    ids = tokenizer(options.prompt)["input_ids"]
    if not ids:  # as the beginning of a document is trained
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
        **sampling,
    )
    return 0


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("generate", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="PATH", help="run, checkpoint or folder")
    add("--prompt", default=PROMPT, metavar="TEXT", help=f"to continue ({PROMPT})")
    add("--max-new-tokens", type=whole(1), default=60, metavar="N", help="at most (60)")
    add(
        "--temperature",
        type=number(least=0.0, most=100.0),
        default=0.8,
        metavar="T",
        help="divides the logits before a token is drawn; 0: always the most likely one (0.8)",
    )
    add(
        "--top-p",
        type=number(above=0.0, most=1.0),
        default=0.95,
        metavar="P",
        help="draw from the most likely tokens that have this probability together (0.95)",
    )
    add("--seed", type=whole(0), default=1234, metavar="N", help="of the draws (1234)")
    add("--dtype", choices=DTYPES, help="to compute in (that of the weights)")
    add("--device", default="cpu", metavar="NAME", help="such as cuda (cpu)")
    return parser
