"""Tokens, TFLOP/s and MFU of steps, by the formula of :mod:`megapoly.training.flops`."""

from __future__ import annotations

from collections.abc import Mapping

from megapoly.config import Config
from megapoly.config.resolve import tokens_per_step
from megapoly.training.flops import device_peak, training_flops_per_token

# First steps of a process, which compile, tune and allocate: no mean includes them.
WARM_UP_STEPS = 2
# Weight of the newest step in the smoothed time.
_SMOOTHING = 0.1


class Throughput:
    """Speed of a run in this process.

    Args:
        config: of the run, resolved.
        device_name: of one device, as the platform describes it.
        num_devices: processes of the job.
    """

    def __init__(self, config: Config, *, device_name: str, num_devices: int) -> None:
        self._device_name, self._num_devices = device_name, num_devices
        self._tokens_per_step = tokens_per_step(config)
        self._flops_per_token = training_flops_per_token(config)
        self._peak = device_peak(config, device_name)
        self._num_warm_up_steps = 0
        self._num_steps = 0  # in the mean
        self._measured_s = 0.0  # time of these steps
        self._smoothed_s = 0.0

    def add_step(self, step_time_s: float, *, is_disturbed: bool = False) -> dict[str, float]:
        """Count a step.

        Args:
            step_time_s: seconds from its start to its end, with nothing else in them.
            is_disturbed: by a profiler; no mean includes the step.

        Returns:
            Its ``tokens_per_second``, ``tflops_per_device`` (model TFLOP/s) and, if the peak is
            known, ``mfu`` and ``peak_tflops``.
        """
        if self._num_warm_up_steps < WARM_UP_STEPS:
            self._num_warm_up_steps += 1
            self._smoothed_s = step_time_s
        elif not is_disturbed:
            self._num_steps += 1
            self._measured_s += step_time_s
            weight = 1.0 if self._num_steps == 1 else _SMOOTHING
            self._smoothed_s += weight * (step_time_s - self._smoothed_s)
        return self._of_tokens(self._tokens_per_step / step_time_s)

    @property
    def seconds_per_step(self) -> float:
        """Smoothed time of a step, to estimate the rest of the run."""
        return self._smoothed_s

    def describe(self) -> str:
        """Return how TFLOP/s and MFU are computed."""
        mfu = (
            f"no MFU: the peak of {self._device_name} is not known; `--logging.peak_tflops` sets it"
            if self._peak is None
            else f"MFU is of {self._peak.flops / 1e12:,.5g} TFLOP/s ({self._peak.source})"
        )
        return f"{_with_prefix(self._flops_per_token)}FLOPs a token; {mfu}"

    def mean(self) -> str | None:
        """Return the mean of the undisturbed steps after the first ones; None if there are none."""
        if self._num_steps == 0:
            return None
        mean = self._of_tokens(self._num_steps * self._tokens_per_step / self._measured_s)
        steps = f"{self._num_steps} step{'s' if self._num_steps > 1 else ''}"
        return f"mean of {steps}, without the first {WARM_UP_STEPS}: {' | '.join(shown(mean))}"

    def _of_tokens(self, tokens_per_second: float) -> dict[str, float]:
        flops = self._flops_per_token * tokens_per_second / self._num_devices
        speed = {"tokens_per_second": tokens_per_second, "tflops_per_device": flops / 1e12}
        if self._peak is not None:
            speed |= {"mfu": flops / self._peak.flops, "peak_tflops": self._peak.flops / 1e12}
        return speed


def shown(speed: Mapping[str, float]) -> list[str]:
    """Return the parts of a progress line; only tokens if the peak is not known, as on CPU."""
    parts = [f"{speed['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in speed:
        parts += [f"{speed['tflops_per_device']:.4g} TFLOP/s a device", f"MFU {speed['mfu']:.1%}"]
    return parts


def _with_prefix(number: float) -> str:
    """Return a number with three digits and the prefix of a unit: 8.93 G."""
    prefixes = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
    factor, prefix = next((pair for pair in prefixes if number >= pair[0]), (1e3, "k"))
    return f"{number / factor:.3g} {prefix}"
