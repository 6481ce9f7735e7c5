"""Is a saved model measured as it was trained, unless the command line says otherwise?"""

from __future__ import annotations

import pytest

import ctxprune
from ctxprune import UserError
from pipelines import prepare, store
from pipelines.config import Config, to_record
from pipelines.evaluate import as_trained, refuse_changed
from pipelines.grid import Trial
from pipelines.prepare import Corpora, text_fingerprint
from pipelines.progress import Bars
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
    for word in ("data.path=x", "data.names=[x]", "data.source=files"):
        assert as_trained(asked, [word], folder).data == asked.data
    assert as_trained(asked, ["data=files"], folder).data == asked.data
    assert as_trained(asked, ["train.context=256"], folder).train.context == 256


def test_how_its_own_text_is_read_leaves_the_text_its_own(tmp_path):
    asked = Config()
    asked.data.max_megabytes = 5
    data = as_trained(asked, ["data.max_megabytes=5"], trained(tmp_path, context=100)).data
    assert data.max_megabytes == 5 and data.held_out == 0.25


def test_contexts_that_are_named_are_not_dropped_without_a_word(tmp_path):
    folder, asked = trained(tmp_path, context=100), Config()
    asked.evaluate.contexts = [64, 128]
    with pytest.raises(UserError, match=r"holds 128, above train.context=100: use evaluate.contexts=\[64\]"):
        as_trained(asked, ["evaluate.contexts=[64,128]"], folder)
    assert as_trained(asked, [], folder).evaluate.contexts == [64]


def test_a_model_saved_by_hand_takes_the_defaults(tmp_path):
    ctxprune.save(gated(), tmp_path / "model")
    assert as_trained(Config(), [], tmp_path / "model") == Config()


def test_held_out_text_that_a_model_may_have_learned_is_refused(tmp_path):
    def data(text: str):
        return store.ensure(tmp_path, "data", {"text": text, "held_out": 0.1}, lambda staged: None)

    then = data("then")
    ctxprune.save(gated(), tmp_path / "model", text_fingerprint=text_fingerprint(then))
    refuse_changed(then, tmp_path / "model", [])
    refuse_changed(data("now"), tmp_path / "model", ["data.path=now.txt"])
    with pytest.raises(UserError, match="has changed, or is read in another way, and it may have learned"):
        refuse_changed(data("now"), tmp_path / "model", ["train.seed=1", "data.max_megabytes=5"])


def test_a_text_is_tokenised_once_for_trials_of_several_contexts(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("one small house by the sea, and another farther on. " * 400)
    calls, encode = [], prepare.tokenizer.encode_documents
    monkeypatch.setattr(prepare.tokenizer, "encode_documents", lambda *given: calls.append(1) or encode(*given))
    trials = []
    for context in (32, 64):
        config = Config(runs=str(tmp_path / "runs"))
        config.data.source, config.data.path, config.data.vocab_size = "files", str(tmp_path / "text.txt"), 300
        config.train.context = context
        trials.append(Trial(str(context), config, []))
    with Bars() as bars:
        corpora = Corpora(trials, bars)
        assert len(calls) == 2  # the training text and the held-out one
        trials[0].config.benchmark.prompt = trials[0].config.benchmark.new_tokens = 16
        corpora.check_benchmark(trials[0].config)
        trials[0].config.benchmark.prompt = 10**5
        with pytest.raises(UserError, match=r"held-out text has \d+ tokens, fewer than benchmark.prompt"):
            corpora.check_benchmark(trials[0].config)
        one, other = (corpora.folder(trial.config) for trial in trials)
    assert one == other and store.finished(one)
    assert all(corpus.ids is None for corpus in corpora.found.values())
