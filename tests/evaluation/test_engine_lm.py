"""Log-likelihoods at any layout are those of one process, computed by hand."""

from types import SimpleNamespace

import pytest
from evaluation_jobs import TEXTS, WITH_HARNESS

pytest.importorskip("lm_eval")

LAYOUTS = [
    *(("dense", name) for name in ("1", "tp2", "pp2", "pp2-vpp2", "dp2", "cp2")),
    *(("moe", name) for name in ("1", "ep2", "tp2-ep2-etp1")),
]


@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_scores_are_those_by_hand(evaluated, model, layout):
    one, ranks = evaluated(model, "1")[0], evaluated(model, layout)
    for outcome in ranks:
        for (score, greedy), expected in zip(outcome.scores, one.by_hand, strict=True):
            assert score == pytest.approx(expected[0], abs=1e-4)
            assert greedy == expected[1]
        assert outcome.rolling == pytest.approx(one.rolling_by_hand, abs=3e-4)
        assert outcome.scores == ranks[0].scores
        assert outcome.progress[-1] == (len(TEXTS), len(TEXTS))


@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_the_likeliest_tokens_are_greedy(evaluated, model, layout):
    for outcome in evaluated(model, layout):
        assert [greedy for _, greedy in outcome.token_scores] == [True, False] * 3


@pytest.mark.parametrize(("model", "layout"), WITH_HARNESS)
def test_harness_counts_right_answers(evaluated, model, layout):
    accuracy = evaluated(model, "1")[0].accuracy_by_hand
    assert 0 < accuracy < 1
    first, *others = evaluated(model, layout)
    assert first.harness["acc,none"] == pytest.approx(accuracy)
    # The harness gives results to one process of a host.
    assert all(outcome.harness is None for outcome in others)


@pytest.mark.parametrize(("recipe", "length"), [(None, 6), ("tensorwise", 32), ("blockwise", 256)])
def test_sequences_are_as_long_as_ranks_and_fp8_divide(recipe, length):
    from megapoly.config.schema import Config
    from megapoly.evaluation.engine_lm import EngineLM

    config = Config()
    config.parallel.tensor_model_parallel_size = 2
    if recipe is not None:
        config.training.fp8, config.training.fp8_recipe = "hybrid", recipe
    model = SimpleNamespace(_state=SimpleNamespace(config=config))
    assert EngineLM._padded(model, 5) == length
