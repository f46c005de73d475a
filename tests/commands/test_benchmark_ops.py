"""The comparison of operators is fair, right in its arithmetic, and no wrong answer passes."""

import functools
import importlib.util
import json
import math
import sys
import time
import types

import pytest
import torch

from megapoly import ops
from megapoly.benchmarks import activation_forms as forms
from megapoly.benchmarks import operators as benchmark_ops
from megapoly.benchmarks import operators_report as ops_report

ROWS, WIDTH = 10, 24
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmark_ops, "FLUSH_BYTES", 1024)


def polynorm_by_hand(row, a):
    powers = [[value**k for value in row] for k in range(1, len(a))]
    roots = [math.sqrt(sum(v * v for v in power) / len(row) + 1e-6) for power in powers]
    return [
        a[0] + sum(a[k + 1] * power[j] / roots[k] for k, power in enumerate(powers))
        for j in range(len(row))
    ]


def polyrelu_by_hand(row, a):
    return [sum(a_k * max(value, 0) ** k for k, a_k in enumerate(a)) for value in row]


BY_HAND = {"polynorm": polynorm_by_hand, "polyrelu": polyrelu_by_hand}


def case_of(operator="polynorm", order=3, rows=ROWS, width=WIDTH, dtype="fp32", experts=None):
    return forms.Case(operator, order, rows, width, dtype, experts)


def candidates_of(case, others=("eager",)):
    """By name, without megapoly's own."""
    inputs = forms.make_inputs(case, CPU)
    candidates, _ = forms.make_candidates(case, inputs, [], others)
    return inputs, {candidate.name: candidate for candidate in candidates}


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("operator", forms.OPERATORS)
def test_eager_form_is_the_definition(operator, order):
    rows = [[1.0, -2.0, 0.5], [0.1, 0.2, -3.0]]
    a = [0.5, -1.0, 2.0, 0.25, 1.5][: order + 1]
    x, coefficients = (torch.tensor(v, dtype=torch.float64) for v in (rows, a))
    expected = torch.tensor([BY_HAND[operator](row, a) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(forms.FORMS[operator](x, coefficients), expected)


@pytest.mark.parametrize("experts", [None, 4])
@pytest.mark.parametrize("operator", forms.OPERATORS)
def test_eager_form_is_megapolys_operator(operator, experts):
    inputs = forms.make_inputs(case_of(operator, experts=experts), CPU)
    x, a = inputs.x.double(), inputs.coefficients.double()
    probs = None if experts is None else inputs.probs.double()
    form = forms.FORMS[operator](x, a, expert=inputs.expert, probs=probs)
    # `auto` would compile.
    operate = functools.partial(getattr(ops, operator), backend="reference")
    own = operate(x, a, offsets=inputs.offsets, probs=probs)
    torch.testing.assert_close(form, own)


def test_forms_keep_the_dtype_and_compute_in_fp32():
    x = torch.tensor([[1 + 3 / 128]], dtype=torch.bfloat16)
    y = forms.polyrelu_form(x, torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    assert y.dtype == torch.bfloat16
    # A cube rounded to bf16 would leave 9 / 128.
    assert y.item() == torch.tensor((1 + 3 / 128) ** 3 - 1).bfloat16().item() != 9 / 128


def test_exact_results_do_not_depend_on_the_blocks(monkeypatch):
    inputs = forms.make_inputs(case_of(experts=4), CPU)
    of_rows = {"x": inputs.x, "probs": inputs.probs, "expert": inputs.expert}
    arguments = forms.polynorm_form, {"coefficients": inputs.coefficients}, of_rows
    whole = forms.exact_results(*arguments, inputs.grad_output)
    monkeypatch.setattr(forms, "EXACT_ROWS", 3)
    blocks = forms.exact_results(*arguments, inputs.grad_output)
    assert set(blocks) == {"output", "grad_x", "grad_probs", "grad_coefficients"}
    torch.testing.assert_close(blocks, whole)

    leaves = [t.double().requires_grad_() for t in (inputs.x, inputs.coefficients, inputs.probs)]
    y = forms.polynorm_form(leaves[0], leaves[1], inputs.expert, leaves[2])
    gradients = torch.autograd.grad(y, leaves, inputs.grad_output.double())
    for name, gradient in zip(("x", "coefficients", "probs"), gradients, strict=True):
        torch.testing.assert_close(whole[f"grad_{name}"], gradient)


def test_offsets_are_uneven():
    assert forms.uneven_offsets(60, 3).tolist() == [0, 10, 30, 60]
    inputs = forms.make_inputs(case_of(rows=6, experts=3), CPU)
    assert inputs.expert.tolist() == [0, 1, 1, 2, 2, 2]
    assert len({tuple(row) for row in inputs.coefficients.tolist()}) == 3


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_saved_bytes(dtype):
    elements, x_bytes = ROWS * WIDTH, {"bf16": 2, "fp32": 4}[dtype]
    # x, x^2, x^3 and the three normalised, in fp32; one root for each row and power.
    _, candidates = candidates_of(case_of(dtype=dtype), ["eager", "swiglu"])
    assert candidates["eager"].saved_bytes() == 6 * 4 * elements + 3 * 4 * ROWS
    # x, u, silu(x).
    assert candidates["swiglu"].saved_bytes() == 3 * x_bytes * elements
    # h, h^2, h^3.
    _, candidates = candidates_of(case_of("polyrelu", dtype=dtype))
    assert candidates["eager"].saved_bytes() == 3 * 4 * elements

    # megapoly: x and a few numbers a row, at most eight in fp32.
    case = case_of(dtype=dtype)
    inputs = forms.make_inputs(case, CPU)
    (own,), _ = forms.make_candidates(case, inputs, ["reference"], [])
    assert 0 <= own.saved_bytes() - x_bytes * elements <= 8 * 4 * ROWS


def test_liger_gets_its_order_and_may_overwrite_the_gradient(monkeypatch):
    class Overwriting(torch.autograd.Function):
        """The identity; backward returns the gradient and leaves zeros behind."""

        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad_output):
            gradient = grad_output.clone()
            grad_output.zero_()
            return gradient

    class LigerPolyNorm(torch.nn.Module):
        def __init__(self, eps):
            super().__init__()
            assert eps == 1e-6
            self.weight, self.bias = (torch.nn.Parameter(torch.zeros(size)) for size in ((3,), ()))

        def forward(self, x):
            a = torch.cat([self.bias[None], self.weight.flip(0)])
            return Overwriting.apply(forms.polynorm_form(x, a))

    module = types.ModuleType("liger_kernel.transformers.poly_norm")
    module.LigerPolyNorm = LigerPolyNorm
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    inputs, candidates = candidates_of(case_of())
    liger = forms.liger_candidate(inputs, candidates["eager"].exact)
    grad_output = inputs.grad_output.clone()
    errors = liger.errors(inputs.grad_output)
    assert set(errors) == {"output", "grad_x", "grad_coefficients"}
    assert max(errors.values()) < 1e-5
    # Not so if the powers were the other way round.
    liger.leaves["weight"].data = liger.leaves["weight"].flip(0)
    assert liger.errors(inputs.grad_output)["output"] > 0.1

    stopwatch = benchmark_ops.Stopwatch(CPU)
    scratch = torch.empty_like(grad_output)
    benchmark_ops.take_turn(liger, inputs.grad_output, scratch, stopwatch)
    assert scratch.abs().max() == 0
    torch.testing.assert_close(inputs.grad_output, grad_output)


def test_liger_that_cannot_run_says_why(monkeypatch):
    inputs = forms.make_inputs(case_of(), CPU)
    _, missing = forms.make_candidates(case_of(), inputs, [], ["liger"])
    assert missing == {"liger": "runs on CUDA, not on cpu"}
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(forms.UnavailableError, match="pip install liger-kernel"):
        forms.liger_candidate(inputs, {})


def test_stopwatch_empties_the_caches_and_times_the_work_alone(monkeypatch):
    stopwatch = benchmark_ops.Stopwatch(CPU)
    stopwatch._buffer.fill_(1)
    clock, seen = [100.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work():
        seen.append(stopwatch._buffer.sum().item())
        clock[0] += 0.5
        return "done"

    assert stopwatch.run(work) == ("done", 0.5)
    assert seen == [0]


def test_candidates_take_turns_and_warm_up_is_left_out(monkeypatch):
    monkeypatch.setattr(benchmark_ops, "WARM_UP_TURNS", 2)
    inputs, candidates = candidates_of(case_of(), ["eager", "swiglu"])
    names, turns = {c.forward: name for name, c in candidates.items()}, []

    class Counting:
        def run(self, work):
            turns.append(names.get(work, "copy or backward"))
            return work(), len(turns)

    times, copy = benchmark_ops.measure(list(candidates.values()), inputs, Counting(), 2)
    other = "copy or backward"
    assert turns == [other, "eager", other, "swiglu", other] * 4
    assert copy == [11, 16]
    assert [t.forward for t in times] == [[12, 17], [14, 19]]
    assert [t.backward for t in times] == [[13, 18], [15, 20]]


def report_of(times, *, width=1536, errors=None, device="cpu AMD EPYC", **changes):
    """Of a case with 2048 rows: forward and backward milliseconds of each candidate by round."""
    case = case_of(rows=2048, width=width, dtype="bf16", **changes)
    leaves = {"x": torch.zeros(1)}
    candidates = [
        forms.Candidate(name, leaves, torch.Tensor, {}, (3, 5) if name == "swiglu" else (2, 3))
        for name in times
    ]
    facts = [
        {"errors": errors or {"output": 1e-3}, "saved_bytes": 4 * case.rows * width} for _ in times
    ]
    seconds = [
        ops_report.Seconds(*([ms / 1e3 for ms in series] for series in both))
        for both in times.values()
    ]
    copy = [ms / 1e3 for ms in (1, 2, 4)]
    report = ops_report.case_report(case, candidates, facts, seconds, copy, device)
    return report, {entry["name"]: entry for entry in report["candidates"]}


TIMES = {
    "megapoly, compiled": ([2, 2, 2], [4, 6, 2]),
    "eager": ([10, 20, 30], [30, 60, 10]),
    "swiglu": ([3, 3, 3], [5, 5, 5]),
}


def test_figures_of_given_times():
    report, entries = report_of(TIMES)
    own, gb = entries["megapoly, compiled"], 2048 * 1536 * 2 / 1e9
    assert own["both"]["ms"] == pytest.approx({"median": 6, "min": 4, "max": 8})
    assert own["both"]["ms_by_round"] == pytest.approx([6, 8, 4])
    assert own["forward"]["gb_per_s"] == pytest.approx(2 * gb / 2e-3)
    assert own["backward"]["gb_per_s"] == pytest.approx(3 * gb / 4e-3)
    assert own["both"]["gb_per_s"] == pytest.approx(5 * gb / 6e-3)
    assert entries["swiglu"]["both"]["gb_per_s"] == pytest.approx(8 * gb / 8e-3)
    assert report["copy"]["gb_per_s"] == pytest.approx(2 * gb / 2e-3)
    # By round: a copy moves 2 elements in 1, 2 and 4 ms, backward 3 in 4, 6 and 2.
    of_copy = {"median": 0.5, "min": 0.375, "max": 3}
    assert own["backward"]["of_copy"] == pytest.approx(of_copy)
    assert own["both"]["over_eager"] == pytest.approx({"median": 10, "min": 40 / 6, "max": 10})
    assert entries["eager"]["forward"]["over_eager"]["median"] == 1
    assert own["saved_bytes_per_element"] == 4


@pytest.mark.parametrize(
    "changes", [{"width": 1024}, {"order": 2}, {"experts": 2}, {"operator": "polyrelu"}]
)
def test_goal_on_cpu_is_of_some_cases(changes):
    assert report_of(TIMES, **changes)[0]["goals"] == []
    (goal,) = report_of(TIMES)[0]["goals"]
    assert goal == {
        "candidate": "megapoly, compiled",
        "pass": "both",
        "ratio": "over_eager",
        "goal": 8.0,
        "measured": pytest.approx(10),
        "reached": True,
    }


def test_goal_is_missed_by_slow_and_by_wrong_operators():
    slow = TIMES | {"eager": ([10, 10, 10], [30, 30, 30])}  # 40 over 6, 8 and 4
    assert [goal["reached"] for goal in report_of(slow)[0]["goals"]] == [False]
    wrong = report_of(TIMES, errors={"grad_x": 0.1})[0]
    assert [goal["reached"] for goal in wrong["goals"]] == [False]


def test_goals_on_h100():
    times = TIMES | {"liger": ([6, 6, 6], [12, 12, 12])}
    report, _ = report_of(times, width=11008, device="cuda NVIDIA H100 80GB HBM3")
    goals = {(g["pass"], g["ratio"]): (g["goal"], g["measured"]) for g in report["goals"]}
    assert goals == {
        ("forward", "of_copy"): (0.85, pytest.approx(1)),
        ("backward", "of_copy"): (0.85, pytest.approx(0.5)),
        ("both", "over_liger"): (2.0, pytest.approx(3)),
    }


def test_errors_beyond_rounding_are_wrong():
    errors = {"output": 0.01, "grad_x": float("nan"), "grad_coefficients": 0.009}
    assert ops_report.wrong_results("bf16", errors) == ["grad_x"]
    assert ops_report.wrong_results("fp32", errors) == ["output", "grad_x"]
    assert ops_report.wrong_results("fp32", {"grad_probs": 0.011}) == ["grad_probs"]
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert forms.largest_error(torch.tensor([1.5, -4.25]), exact) == 0.5 / 4


def run(*arguments):
    return benchmark_ops.main(["--device", "cpu", "--rounds", "3", *map(str, arguments)])


SMALL = ("--backends", "reference", "--against", "eager", "liger", "swiglu", "--shapes", "10x24")


@pytest.mark.parametrize("operator", ["polynorm", "polyrelu"])
@pytest.mark.parametrize("experts", [None, 4])
def test_report_table_and_plot(operator, experts, tmp_path, capsys):
    file, picture = tmp_path / "ops.json", tmp_path / "ops.png"
    arguments = [*SMALL, "--dtypes", "bf16", "fp32", "--operators", operator]
    arguments += ["--json", file, "--plot", picture]
    arguments += [] if experts is None else ["--experts", experts]
    assert run(*arguments) == 0

    report = json.loads(file.read_text())
    assert report["command"].startswith("megapoly benchmark operators --device cpu --rounds 3")
    assert (report["device"], report["rounds"], report["torch"]) == ("cpu", 3, torch.__version__)
    assert report["threads"] == torch.get_num_threads() and report["device_name"]
    assert {"date", "triton", "liger-kernel"} <= set(report)
    cases = [(c["dtype"], c["rows"], c["width"], c["num_experts"]) for c in report["cases"]]
    assert cases == [("bf16", 10, 24, experts), ("fp32", 10, 24, experts)]
    gradients = {"grad_x", "grad_coefficients"} | ({"grad_probs"} if experts else set())
    for case in report["cases"]:
        assert case["missing"] == {"liger": "runs on CUDA, not on cpu"}
        own, eager, swiglu = case["candidates"]
        names = ("megapoly, reference", "eager", "swiglu")
        assert tuple(entry["name"] for entry in case["candidates"]) == names
        assert set(own["errors"]) == set(eager["errors"]) == {"output"} | gradients
        assert set(swiglu["errors"]) == {"output", "grad_x", "grad_up"}
        for entry in case["candidates"]:
            assert entry["wrong"] == [] and entry["saved_bytes"] > 0
            for name in ("forward", "backward", "both"):
                rounds = sorted(entry[name]["ms_by_round"])
                spread = dict(zip(("min", "median", "max"), rounds, strict=True))
                assert entry[name]["ms"] == pytest.approx(spread) and rounds[0] > 0

    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width == 1320 and 300 < height < 1000
    printed = capsys.readouterr().out
    assert f"{operator} of order 3, 10 x 24, bf16" in printed
    assert "liger not measured: runs on CUDA, not on cpu" in printed
    assert all(name in printed for name in ("megapoly, reference", "eager", "swiglu", "copy_"))
    assert "goal of" not in printed


def test_wrong_operator_ends_with_status_1(monkeypatch, capsys):
    right = ops.polynorm
    monkeypatch.setattr(ops, "polynorm", lambda *args, **kw: right(*args, **kw) * 1.1)
    assert run(*SMALL, "--dtypes", "fp32") == 1
    assert "megapoly, reference is WRONG: output differs by 1.0e-01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "2048*1536"], "'2048*1536' is not ROWSxWIDTH, two positive integers such as"),
        (["--shapes", "0x5"], "'0x5' is not ROWSxWIDTH"),
        (["--rounds", "-1"], "-1 must be a whole number, 1 to "),
        (["--experts", "0"], "0 must be a whole number, 1 to "),
        (["--dtypes", "fp8"], "invalid choice: 'fp8' (choose from "),
        (["--backends", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark_ops.main(arguments)
    assert message in capsys.readouterr().err


def test_what_cannot_work_is_said_before_measuring(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark_ops, "measure_all", None)
    assert run("--json", tmp_path / "absent" / "ops.json") == 2
    assert (
        f"The folder {tmp_path / 'absent'} of ops.json does not exist." in capsys.readouterr().err
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark_ops.main(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device; use `--device cpu`" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("--plot", tmp_path / "ops.png") == 2
    assert "`--plot` needs matplotlib: pip install 'megapoly[report]'" in capsys.readouterr().err
