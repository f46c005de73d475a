"""Compile the kernels without a GPU and report the resources that they need.

    python -m megapoly.ops.triton.ahead_of_time --arch 80 90 --json kernels.json

A kernel that needs more registers than are available keeps values in memory ("spills") and loses
bandwidth. Triton includes the assembler and ``cuobjdump``; CUDA is not needed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megapoly.ops.triton.kernels import (
    polynorm_split_row,
    polynorm_whole_row,
    polyrelu_row,
    row_sums,
)
from megapoly.ops.triton.tile_sizes import blocked_row_tiles, whole_row_tiles
from megapoly.polynomial import DEFAULT_ORDER

WIDTHS = (1032, 1536, 8256, 11008, 16384)
# The paper's FFN widths and recipes come as multiples of 16; rows then begin at multiples of 16.
_MULTIPLES_OF_16 = ("width", "x_stride", "gate_stride", "factor_stride", "grad_output_stride")
_FP32 = ("rsqrt_ptr", "terms_ptr", "slope_terms_ptr", "sums_ptr", "chunks_ptr", "coefficients_ptr")
_INT32 = ("expert_ptr", "offsets_ptr")
# Per thread, at 16 warps or more; with fewer warps more are available.
_MAX_REGISTERS = 64


@dataclass(frozen=True)
class Case:
    """Specialisation of a kernel.

    Args:
        name: file and kernel.
        kernel: the function.
        width: of a row; 0 if the kernel has none.
        constants: compile-time arguments.
        num_warps: of a program.
    """

    name: str
    kernel: Any
    width: int
    constants: dict[str, Any]
    num_warps: int


@dataclass(frozen=True)
class Resources:
    """Resources of a program on a multiprocessor, and the widest load of a thread."""

    kernel: str
    width: int
    form: str
    arch: int
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_bytes: int


def cases(
    widths: Sequence[int] = WIDTHS, orders: Sequence[int] = (DEFAULT_ORDER,)
) -> Iterator[Case]:
    """Yield every kernel at every width, plain and with experts, probabilities and gate."""
    for order in orders:
        for full in (False, True):
            flags = {name: full for name in ("HAS_GATE", "HAS_FACTOR", "HAS_PROBS", "HAS_EXPERTS")}
            for width in widths:
                yield from _row_cases(width, {"ORDER": order, "HAS_SLOPE": full} | flags)
        yield _case(polynorm_split_row, "rsqrt_kernel", 0, {"ORDER": order, "BLOCK": 128}, 4)
        sums = {"NUM_TERMS": order + 1, "CHUNK": row_sums.CHUNK, "HAS_EXPERTS": True, "BLOCK": 128}
        for name in ("sum_chunks_kernel", "sum_sets_kernel"):
            yield _case(row_sums, name, 0, sums, 4)


def _row_cases(width: int, constants: dict[str, Any]) -> Iterator[Case]:
    constants = constants | {"ALIGN": math.gcd(16, width)}
    for name, num_values in (
        ("forward_kernel", 1),
        ("backward_kernel", 3 if constants["HAS_GATE"] else 2),
    ):
        tiles = whole_row_tiles(width, num_values=num_values, order=constants["ORDER"])
        if tiles is not None:
            whole = constants | {"BLOCK": tiles.block, "TAIL": tiles.tail}
            yield _case(polynorm_whole_row, name, width, whole, tiles.num_warps)
    tiles = blocked_row_tiles(width)
    num_blocks = {"NUM_BLOCKS": tiles.num_blocks}
    parts = constants | num_blocks | {"BLOCK": tiles.block, "TAIL": tiles.tail}
    for name in (
        "square_sums_kernel",
        "evaluate_kernel",
        "gradient_sums_kernel",
        "gradients_kernel",
    ):
        yield _case(polynorm_split_row, name, width, parts, tiles.num_warps)
    for name in ("forward_kernel", "backward_kernel"):
        yield _case(polyrelu_row, name, width, parts, tiles.num_warps)


def _case(module: Any, name: str, width: int, constants: dict[str, Any], num_warps: int) -> Case:
    kernel = getattr(module, name)
    wanted = {arg: constants[arg] for arg in kernel.arg_names if arg in constants}
    label = f"{module.__name__.rpartition('.')[2]}.{name}"
    return Case(label, kernel, width, wanted, num_warps)


def resources(case: Case, arch: int, dtype: str = "bf16") -> Resources:
    """Compile one kernel for a compute capability (80: A100, 90: H100) and dtype of ``x``."""
    signature, constants, attributes = {}, dict(case.constants), {}
    for position, name in enumerate(case.kernel.arg_names):
        kind = _kind(name, case, dtype)
        signature[name] = kind
        if kind == "constexpr":
            constants.setdefault(name, None)
        elif name.endswith("_ptr") or (name in _MULTIPLES_OF_16 and case.width % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    program = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.num_warps}
    )
    registers, stack = _usage(program.asm["cubin"])
    return Resources(
        case.name,
        case.width,
        "full" if case.constants.get("HAS_GATE") or case.constants.get("HAS_EXPERTS") else "plain",
        arch,
        case.num_warps,
        registers,
        stack,
        program.metadata.shared,
        _widest_load(program.asm["ptx"]),
    )


def _widest_load(ptx: str) -> int:
    """Return the most bytes that one load of a thread reads from global memory; 16 is best."""
    loads = re.findall(r"ld\.global(?:\.[a-zA-Z_]\w*(?:::\w+)?)*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(n or 1) * int(bits) // 8 for n, bits in loads), default=0)


def _kind(name: str, case: Case, dtype: str) -> str:
    """Return Triton's type of an argument; an absent optional one is a constant None."""
    optional = {
        "gate_ptr": "HAS_GATE",
        "grad_gate_ptr": "HAS_GATE",
        "factor_ptr": "HAS_FACTOR",
        "probs_ptr": "HAS_PROBS",
        "grad_probs_ptr": "HAS_PROBS",
        "expert_ptr": "HAS_EXPERTS",
        "offsets_ptr": "HAS_EXPERTS",
        "slope_ptr": "HAS_SLOPE",
        "slope_terms_ptr": "HAS_SLOPE",
    }
    absent = name in optional and not case.constants.get(optional[name], True)
    if name in case.constants or absent:
        return "constexpr"
    if name == "square_sums_ptr":
        return "*fp64"
    if name in _FP32 or (name.startswith("slope") and name.endswith("_ptr")):
        return "*fp32"
    if name in _INT32:
        return "*i32"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name in ("eps", "inverse_divisor") else "i32"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return registers of a thread and bytes of its stack, which only spilled registers use."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump printed no resources: {text}")
    return int(found[1]), int(found[2])


def exceeds(usage: Resources) -> bool:
    """Check whether it spills, or two programs of up to 16 warps exceed a multiprocessor."""
    allowed = _MAX_REGISTERS * max(1, 16 // usage.num_warps)
    return usage.spilled_bytes > 0 or usage.registers > allowed


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; return 1 if a kernel spills or needs too many registers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="%(default)s")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="%(default)s")
    parser.add_argument(
        "--orders", type=int, nargs="+", default=[DEFAULT_ORDER], help="%(default)s"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    rows = [
        resources(case, arch, arguments.dtype)
        for arch in arguments.arch
        for case in cases(arguments.widths, arguments.orders)
    ]
    table = Table(*Resources.__dataclass_fields__)
    for row in rows:
        style = "red" if exceeds(row) else None
        table.add_row(*(str(value) for value in asdict(row).values()), style=style)
    Console(width=max(110, Console().width)).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(exceeds(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
