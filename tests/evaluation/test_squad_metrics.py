"""The worked examples are counted by hand."""

import pytest

from megapoly.evaluation.squad_metrics import compute_exact, compute_f1


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        ("The cat.", "a CAT", 1, 1.0),
        ("one black cat", "a cat", 0, 2 / 4),
        ("red red blue", "red green", 0, 2 / 5),
        ("theatre", "atre", 0, 0.0),
        ("the", "", 1, 1.0),
        ("the", "cat", 0, 0.0),
    ],
)
def test_by_hand(gold, predicted, exact, f1):
    assert compute_exact(gold, predicted) == exact
    assert compute_f1(gold, predicted) == pytest.approx(f1)
