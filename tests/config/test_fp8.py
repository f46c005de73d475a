from __future__ import annotations

import pytest

from megapoly.config.fp8 import sequence_multiple
from megapoly.config.schema import Config, TrainingConfig


@pytest.mark.parametrize(
    ("recipe", "multiple"),
    [("delayed", 16), ("tensorwise", 16), ("blockwise", 128), ("mxfp8", 32)],
)
def test_sequences_are_filled_up_for_fp8_alone(recipe: str, multiple: int) -> None:
    training = TrainingConfig(fp8_recipe=recipe)  # type: ignore[arg-type]
    assert sequence_multiple(Config(training=training)) == 1
    training.fp8 = "hybrid"
    assert sequence_multiple(Config(training=training)) == multiple
