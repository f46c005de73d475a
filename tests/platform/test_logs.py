"""What is logged, by rank, and settings that the user has made."""

import logging

import pytest

from megapoly.platform import logs


@pytest.mark.parametrize(("is_rank_zero", "shown"), [(True, True), (False, False)])
def test_only_rank_0_logs_progress(is_rank_zero, shown):
    logger = logging.getLogger("megapoly")
    level = logger.level
    try:
        logs.configure_logging(is_rank_zero=is_rank_zero)
        assert logger.isEnabledFor(logging.INFO) == shown
        assert logger.isEnabledFor(logging.WARNING)
    finally:
        logger.setLevel(level)


def test_settings_of_the_user_are_kept(monkeypatch):
    environment = {"TQDM_DISABLE": "0"}
    monkeypatch.setattr(logs.os, "environ", environment)
    logs.silence_evaluation_libraries()
    assert environment["TQDM_DISABLE"] == "0"
    assert environment["TRANSFORMERS_VERBOSITY"] == "error"
