"""TFLOP/s and MFU of steps, by hand."""

from __future__ import annotations

import pytest

from megapoly.config import Config
from megapoly.config.schema import LoggingConfig, ModelConfig, TrainingConfig
from megapoly.training.throughput import Throughput

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 192}
# Projections, scores, FFN of two layers; output layer. Times 3.
FLOPS_PER_TOKEN = 3 * (2 * 2 * (4 * 64 * 64 + 64 * 32 + 2 * 64 * 192) + 2 * 64 * 1000)


def throughput(device_name: str, peak_tflops: float | None = None) -> Throughput:
    config = Config(
        model=ModelConfig(**MODEL, vocab_size=1000),
        training=TrainingConfig(train_iters=9, seq_length=32, global_batch_size=10),
        logging=LoggingConfig(peak_tflops=peak_tflops),
    )
    return Throughput(config, device_name=device_name, num_devices=2)


def test_a_step():
    speed = throughput("NVIDIA A100-SXM4-80GB").add_step(0.5)
    flops = 640 * FLOPS_PER_TOKEN / 2
    assert speed == {
        "tokens_per_second": 640.0,
        "tflops_per_device": pytest.approx(flops / 1e12),
        "mfu": pytest.approx(flops / 312e12),
        "peak_tflops": 312.0,
    }


def test_without_a_peak_there_is_no_mfu():
    speed = throughput("CPU, 2 threads")
    assert speed.add_step(0.5).keys() == {"tokens_per_second", "tflops_per_device"}
    assert speed.describe() == (
        "900 kFLOPs a token; no MFU: the peak of CPU, 2 threads is not known; "
        "`--logging.peak_tflops` sets it"
    )


def test_the_peak_is_said():
    assert throughput("NVIDIA H100 80GB HBM3").describe() == (
        "900 kFLOPs a token; MFU is of 989.5 TFLOP/s (bf16, data sheet of NVIDIA H100 80GB HBM3)"
    )
    assert throughput("NVIDIA H100 80GB HBM3", 1200.0).describe() == (
        "900 kFLOPs a token; MFU is of 1,200 TFLOP/s (`logging.peak_tflops`)"
    )


def test_first_steps_are_in_no_average():
    speed = throughput("CPU", peak_tflops=1e-3)
    for seconds in (30.0, 5.0):
        speed.add_step(seconds)
        assert speed.mean() is None
    speed.add_step(1.0)
    assert speed.seconds_per_step == 1.0
    speed.add_step(3.0)
    assert speed.seconds_per_step == pytest.approx(0.9 * 1.0 + 0.1 * 3.0)
    flops = 160 * FLOPS_PER_TOKEN / 2  # 640 tokens in 4 s, of 2 devices
    assert speed.mean() == (
        "mean of 2 steps, without the first 2: 160 tokens/s | "
        f"{flops / 1e12:.4g} TFLOP/s a device | MFU {flops / 1e9:.1%}"
    )


def test_disturbed_steps_are_in_no_average():
    speed = throughput("CPU")
    for seconds in (1.0, 1.0, 2.0):
        speed.add_step(seconds)
    assert speed.add_step(50.0, is_disturbed=True)["tokens_per_second"] == 320 / 50
    assert speed.seconds_per_step == 2.0
    assert speed.mean() == "mean of 1 step, without the first 2: 160 tokens/s"
