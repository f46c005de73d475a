"""A run that saves nothing before its end says what a crash would cost."""

import pytest

from megapoly.config import Config
from megapoly.config.schema import CheckpointConfig
from megapoly.training.save_notes import save_notes


def notes(iteration=0, **checkpoint):
    return save_notes(Config(checkpoint=CheckpointConfig(**checkpoint)), iteration, 240)


def test_nothing_is_saved_before_the_end():
    (line,) = notes()
    assert line == (
        "note: no checkpoint is saved before the end, as `checkpoint.save_interval` is 0: after a "
        "crash the run starts again from step 0; a request to stop (Ctrl-C, SIGTERM) saves"
    )
    (line,) = notes(100, save_interval=140)
    assert "`checkpoint.save_interval` is 140, and 140 steps are left: " in line
    assert "from step 100;" in line


def test_nothing_is_saved_at_all():
    (line,) = notes(save=False, save_interval=50)
    assert "`checkpoint.save` is false" in line and "from step 0" in line


@pytest.mark.parametrize(
    ("iteration", "options"),
    [(0, {"save_interval": 239}), (141, {}), (141, {"save": False}), (240, {})],
)
def test_a_run_that_saves_and_a_short_one_say_nothing(iteration, options):
    assert notes(iteration, **options) == []
