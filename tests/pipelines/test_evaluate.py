"""Is a saved model measured as it was trained, unless the command line says otherwise?"""

from __future__ import annotations

import ctxprune
from pipelines.config import Config, to_record
from pipelines.evaluate import as_trained
from tests.models import gated


def trained(tmp_path, **train):
    """A saved model whose trial had these training settings and data of its own."""
    config = Config()
    config.data.held_out = 0.25
    for name, value in train.items():
        setattr(config.train, name, value)
    ctxprune.save(gated(), tmp_path / "model", config=to_record(config))
    return tmp_path / "model"


def test_data_and_context_are_the_checkpoints_own(tmp_path):
    config = as_trained(Config(), [], trained(tmp_path, context=100))
    assert config.data.held_out == 0.25 and config.train.context == 100
    assert config.evaluate.contexts == [64]


def test_a_setting_beside_them_changes_neither(tmp_path):
    config = as_trained(Config(), ["train.seed=3", "evaluate.tokens=64"], trained(tmp_path, context=100))
    assert config.data.held_out == 0.25 and config.train.context == 100


def test_what_the_command_line_names_is_taken(tmp_path):
    folder, asked = trained(tmp_path, context=100), Config()
    assert as_trained(asked, ["data.path=x"], folder).data == asked.data
    assert as_trained(asked, ["data=files"], folder).data == asked.data
    assert as_trained(asked, ["train.context=256"], folder).train.context == 256


def test_a_model_saved_by_hand_takes_the_defaults(tmp_path):
    ctxprune.save(gated(), tmp_path / "model")
    assert as_trained(Config(), [], tmp_path / "model") == Config()
