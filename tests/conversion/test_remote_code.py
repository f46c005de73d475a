"""Exports in transformers 4.57 and 5.x: caches, attention, training, offloading, tensor cuts."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapoly.conversion.remote_code.configuration_megapoly import MegapolyConfig
from megapoly.conversion.remote_code.ffn_megapoly import MegapolyActivation
from megapoly.conversion.remote_code.modeling_megapoly import load_balancing_loss
from megapoly.data.tokenizer import load_tokenizer
from megapoly.ops import polynorm, polyrelu

SCRIPT = Path(__file__).with_name("uses_of_an_export.py")
# Beside the installed release, by the Makefile.
OLDER = Path(sys.prefix) / "transformers-4"
MODELS = ["moe", "per_expert", "polyrelu"]


def run(args, older):
    assert OLDER.is_dir(), f"`make {OLDER}` installs transformers 4.57 for this test"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(OLDER) if older else ""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    # transformers warns of arguments that it will no longer give to code in folders.
    assert "remote code" not in finished.stderr, finished.stderr[-4000:]
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["transformers"].startswith("4.57." if older else "5.")
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("uses")


@pytest.fixture(scope="module")
def figures(exported, work):
    """By whether the release is the older: figures of whole models, and of models cut in two."""
    folders = [folder for folder, *_ in exported(*MODELS)]
    return functools.cache(lambda older: run([work, *folders], older))


@pytest.mark.parametrize("older", [False, True], ids=["transformers5", "transformers4"])
def test_what_users_do(figures, older):
    for name in MODELS:
        found = figures(older)["whole"][name]
        assert found["ids"] == load_tokenizer(None).encode("Call me Ishmael. Some years ago")
        assert found["eager"] < 1e-5
        assert found["attention_sums"] < 1e-5
        assert found["hidden_states"] == 5
        assert found["last"] < 1e-5
        assert found["placed"] < 1e-4
        assert found["tuple"]
        assert found["generated_with_router"]
        # Trainer leaves out columns that the signature does not name.
        assert {"position_ids", "inputs_embeds", "past_key_values"} <= set(found["signature"])
        assert "cache_position" not in found["signature"]
        assert found["without_cache"] < 1e-4
        assert found["in_static_cache"] < 1e-4
        assert found["while_training"] < 1e-4
        assert found["same_beams_without_cache"]
        assert found["same_padded"]
        assert found["same_with_others"]
        assert found["recomputed_loss"] < 1e-6
        assert found["recomputed"] < 1e-6
        assert all(".experts." in parameter for parameter in found["without_gradient"])
        assert found["devices"] == ["cpu", "disk"]
        assert found["offloaded"] < 1e-5
        assert found["saved"] == 0.0
        assert found["loading"] == []
        assert found["made_loss"] == pytest.approx(math.log(4096), abs=1.5)
        assert found["losses"][-1] < found["losses"][0] - 1.0


def test_both_releases_compute_the_same(figures, work):
    for older in (False, True):
        figures(older)
    for name in MODELS:
        one, other = (torch.load(path) for path in sorted(work.glob(f"{name}-*.pt")))
        assert (one - other).abs().max() < 1e-6


@pytest.mark.parametrize("older", [False, True], ids=["transformers5", "transformers4"])
def test_tensor_parallel_plan_changes_nothing(figures, older):
    cut = figures(older)["cut"]
    for name in MODELS:
        assert cut[name]["difference"] < 1e-5
        assert cut[name]["query"] == 48 * 48 // 2
    assert cut["moe"]["up"] == 48 * 48 // 2
    assert cut["per_expert"]["up"] == 32 * 48 // 2
    assert cut["polyrelu"]["up"] == 96 * 48 // 2


def activation(name, coefficients, **changes):
    config = MegapolyConfig(hidden_act=name, activation_order=len(coefficients) - 1, **changes)
    module = MegapolyActivation(config, width=33)
    values = torch.tensor(coefficients)
    with torch.no_grad():
        module.weight.copy_(values[1:].flip(0))
        module.bias.copy_(values[:1])
    return module


def by_definition(x, a, mean):
    """Sum of a_k x^k / sqrt(mean(x^2k) + eps), in fp64."""
    y = torch.full_like(x, a[0])
    for k in range(1, len(a)):
        y += a[k] * x**k / torch.sqrt(mean(x ** (2 * k)) + 1e-6)
    return y


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e9])
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_polynorm_is_the_definition(scale, norm):
    torch.manual_seed(0)
    x, a = torch.randn(5, 33) * scale, [0.1, 0.7, -0.4, 0.3, 0.2]
    y = activation("polynorm", a, activation_norm=norm)(x)
    reduce = torch.Tensor.mean if norm == "rms" else torch.Tensor.sum
    expected = by_definition(x.double(), a, lambda u: reduce(u, -1, keepdim=True))
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-6)
    trained = polynorm(x, torch.tensor(a), norm=norm, backend="reference")
    assert torch.allclose(y, trained, rtol=1e-5, atol=1e-6)


def test_the_family_is_that_of_training():
    torch.manual_seed(0)
    x, a = torch.randn(7, 33), torch.tensor([0.1, 0.7, -0.4, 0.3])
    relu = activation("polyrelu", a.tolist())(x)
    assert torch.allclose(relu, polyrelu(x, a, backend="reference"), atol=1e-6)
    slope = torch.tensor([0.25])
    prelu = activation("polyprelu", a.tolist())(x)
    assert torch.allclose(prelu, polyrelu(x, a, slope=slope, backend="reference"), atol=1e-6)
    normed = activation("polyrelunorm", a.tolist())(x)
    assert torch.allclose(normed, polynorm(x.relu(), a, backend="reference"), atol=1e-6)


def test_activation_in_bf16_is_the_fp32_one_rounded():
    torch.manual_seed(0)
    x = torch.randn(7, 33).bfloat16()
    module = activation("polynorm", [0.1, 0.7, -0.4, 0.3])
    assert torch.equal(module(x), module(x.float()).bfloat16())


def test_load_balancing_loss_by_hand():
    """Two layers, two tokens of which one is padding, three experts, two of them for a token."""
    config = MegapolyConfig(num_experts=3, num_experts_per_tok=2)
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 5.0]])
    p = logits[0].softmax(0)
    one = (p[0] + p[1]).item() * 3 / 2
    uniform = 3 / 2 * 2 / 3
    loss = load_balancing_loss(
        (logits, torch.zeros(2, 3)), config, attention_mask=torch.tensor([[1, 0]])
    )
    assert loss.item() == pytest.approx((one + uniform) / 2)
