"""Work of the processes of these tests: the command, and the same by another method."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import torch

NUM_TOKENS = 48  # a sample and a half


def run_tool(*arguments):
    """Return the exit status of megapoly analyze and its output."""
    warnings.filterwarnings("ignore")
    from megapoly.commands import analyze

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = analyze.main([str(word) for word in arguments])
        except SystemExit as ended:
            status = ended.code
    return status, printed.getvalue()


def analysed(checkpoint, output, *arguments):
    """Return the analysis.json of the command."""
    status, printed = run_tool("--model", checkpoint, "--output", output, *arguments)
    assert status == 0, printed
    return json.loads((output / "analysis.json").read_text())


def similarity_by_recording(checkpoint, prefix, num_tokens):
    """Compute the matrix from the outputs that the comparison of conversions records."""
    warnings.filterwarnings("ignore")
    from megapoly.conversion.engine_outputs import engine_module_outputs

    ids = np.fromfile(f"{prefix}.bin", dtype=np.uint16)[:num_tokens].astype(np.int64)
    tokens, positions = torch.from_numpy(ids)[None], torch.arange(num_tokens)[None]
    recording = engine_module_outputs(Path(checkpoint), tokens, positions, torch.float32)
    names = ["model.embed_tokens"]
    names += sorted(n for n in recording.outputs if n.count(".") == 2 and ".layers." in n)
    states = [recording.outputs[name][0].double().numpy() for name in names]
    units = [h / np.linalg.norm(h, axis=-1, keepdims=True) for h in states]
    return [[float((a * b).sum(-1).mean()) for b in units] for a in units]
