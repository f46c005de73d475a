"""Compiled for A100 and H100, no kernel spills registers: checked without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megapoly.ops.triton import ahead_of_time
from megapoly.ops.triton.ahead_of_time import Resources, exceeds

ARCHS = (80, 90)
WIDTHS = (1032, 8256, 11008)
OF_EVERY_WIDTH = {
    "polynorm_whole_row.forward_kernel",
    "polynorm_whole_row.backward_kernel",
    "polynorm_split_row.square_sums_kernel",
    "polynorm_split_row.evaluate_kernel",
    "polynorm_split_row.gradient_sums_kernel",
    "polynorm_split_row.gradients_kernel",
    "polyrelu_row.forward_kernel",
    "polyrelu_row.backward_kernel",
}
OF_NO_WIDTH = {
    "polynorm_split_row.rsqrt_kernel",
    "row_sums.sum_chunks_kernel",
    "row_sums.sum_sets_kernel",
}
WITHOUT_OPTIONS = OF_NO_WIDTH | {"polynorm_split_row.square_sums_kernel"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[Resources]:
    """In a separate process: a process that interprets kernels cannot compile them."""
    directory = tmp_path_factory.mktemp("kernels")
    report = directory / "kernels.json"
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(directory / "cache")
    command = [sys.executable, "-m", "megapoly.ops.triton.ahead_of_time", "--json", str(report)]
    command += ["--arch", *map(str, ARCHS), "--widths", *map(str, WIDTHS), "--orders", "3"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return [Resources(**row) for row in json.loads(report.read_text())]


def test_every_kernel_is_compiled_at_every_width(compiled):
    expected = {(arch, name, 0) for arch in ARCHS for name in OF_NO_WIDTH}
    expected |= {(a, name, width) for a in ARCHS for name in OF_EVERY_WIDTH for width in WIDTHS}
    assert {(row.arch, row.kernel, row.width) for row in compiled} == expected


def test_kernels_are_compiled_plain_and_with_every_option(compiled):
    forms = {(row.arch, row.kernel, row.width): set() for row in compiled}
    for row in compiled:
        forms[row.arch, row.kernel, row.width].add(row.form)
    for (_, kernel, _), found in forms.items():
        assert kernel in WITHOUT_OPTIONS or found == {"plain", "full"}, kernel


def test_no_kernel_spills(compiled):
    assert [row for row in compiled if row.spilled_bytes] == []


def test_two_programs_of_16_warps_fit_on_a_multiprocessor(compiled):
    large = [row for row in compiled if row.num_warps in (16, 32)]
    assert large and [row for row in large if row.registers > 64] == []


def test_rows_are_read_16_bytes_at_a_time(compiled):
    """Also those of 1032 elements, a part of 8256 that 16 does not divide."""
    assert [row for row in compiled if row.width and row.load_bytes != 16] == []


FITS = Resources("kernel", 8256, "plain", 90, 16, 64, 0, 0, 16)


@pytest.mark.parametrize(
    ("changes", "too_much"),
    [
        ({}, False),
        ({"registers": 65}, True),
        ({"spilled_bytes": 8}, True),
        ({"num_warps": 32}, False),
        ({"num_warps": 32, "registers": 65}, True),
        ({"num_warps": 8, "registers": 128}, False),
        ({"num_warps": 8, "registers": 129}, True),
        ({"num_warps": 1, "registers": 255, "spilled_bytes": 4}, True),
    ],
)
def test_exceeds(changes, too_much):
    assert exceeds(replace(FITS, **changes)) is too_much


@pytest.mark.parametrize(("spilled_bytes", "status"), [(0, 0), (8, 1)])
def test_exit_status_and_report(spilled_bytes, status, monkeypatch, tmp_path, capsys):
    row = replace(FITS, spilled_bytes=spilled_bytes)
    monkeypatch.setattr(ahead_of_time, "resources", lambda *_: row)
    report = tmp_path / "kernels.json"
    arguments = ["--arch", "90", "--widths", "8256", "--json", str(report)]
    assert ahead_of_time.main(arguments) == status
    assert {Resources(**found) for found in json.loads(report.read_text())} == {row}
    assert "8256" in capsys.readouterr().out
