"""Do words on a command line become the Config they say, and does each mistake name the setting?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxprune.errors import UserError
from pipelines import compose as composing
from pipelines.compose import compose, config_hash
from pipelines.config import Config

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.mark.parametrize("verb", ["sweep", "train", "doctor"])
def test_a_verb_composes_without_words(verb):
    assert isinstance(compose(verb, []), Config)


@pytest.mark.parametrize("option", [f"{f.parent.name}={f.stem}" for f in sorted(CONF.glob("*/*.yaml"))])
def test_every_option_composes(option):
    assert isinstance(compose("sweep", [option]), Config)


def test_values_and_groups_arrive():
    config = compose("train", ["model=small", "pruning=learned", "pruning.sparsity=0.75", "evaluate.contexts=[16,32]"])
    assert (config.model.width, config.pruning.policy, config.pruning.sparsity) == (96, "learned", 0.75)
    assert config.evaluate.contexts == [16, 32]


def test_a_typed_group_wins_over_the_experiment():
    assert compose("train", ["experiment=paper", "model=gpt2-xl"]).model.path == "gpt2-xl"


def test_nothing_is_written_by_composing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose("sweep", [])
    assert list(tmp_path.iterdir()) == []


def test_paths_are_seen_from_the_persons_folder(tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    monkeypatch.chdir(tmp_path)
    config = compose("train", ["data=files", "data.path=books", "model=local", "model.path=books"])
    assert config.data.path == config.model.path == str(tmp_path / "books")
    assert compose("train", ["model=gpt2", "experiment=paper"]).model.path == "gpt2"


MISTAKES = [
    (["pruning.sparsty=0.5"], 'no setting "pruning.sparsty"; nearest: pruning.sparsity'),
    (["pruning=lerned"], "no pruning 'lerned'; nearest: learned"),
    (["modle=tiny"], 'no setting "modle"; nearest: model'),
    (["experiment=../demo"], "no experiment '../demo'"),
    (["model=null"], "no model 'null'"),
    (["train.steps=abc"], "train.steps=abc: expected a whole number"),
    (["train.steps=1e3"], "train.steps=1e3: expected a whole number"),
    (["train.steps=1.5"], "train.steps=1.5: expected a whole number"),
    (["train.steps=true"], "train.steps=true: expected a whole number"),
    (["train.steps=null"], "train.steps=null: expected a whole number"),
    (["train.steps="], "train.steps=: expected a whole number"),
    (["train.clip=x"], "train.clip=x: expected a number"),
    (["pruning.sparsity=x"], "pruning.sparsity=x: expected a number or null"),
    (["engine.offload=maybe"], "engine.offload=maybe: expected true or false"),
    (["evaluate.contexts=64"], "evaluate.contexts=64: expected a list"),
    (
        ["evaluate.contexts=[a]"],
        "evaluate.contexts=[a]: expected a list, e.g. evaluate.contexts=[...], each a whole number",
    ),
    (["train.steps=" + "9" * 31], "give a whole number in [1, 10000000]"),
    (["train.steps=" + "9" * 5000], "cannot be read; write a shorter value"),
    (["data.names=" + "[" * 3000 + "]" * 3000], "cannot be read; write a shorter value"),
    (["train.steps=1,2"], "train.steps=1,2: train takes one value; several values are for sweep"),
    (["train.steps=interval(1,2)"], "interval() and glob() are not read"),
    (["model=glob(*)"], "interval() and glob() are not read"),
    (["train={steps: 3}"], "'train' is a section: set one of its fields, e.g. train.steps=..."),
    (["train"], "'train' is not SETTING=VALUE"),
    ([""], "'' is not SETTING=VALUE"),
    (["data.text_field=a(b"], "data.text_field=a(b: cannot be read"),
    (["+train.steps=5"], "settings can be changed, not added, removed or moved"),
    (["++train.steps=5"], "settings can be changed, not added, removed or moved"),
    (["~model"], "settings can be changed, not added, removed or moved"),
    (["model@pruning=tiny"], "settings can be changed, not added, removed or moved"),
    (["hydra.run.dir=x"], "Hydra's own settings are not read"),
    (["hydra.job.chdir=true"], "Hydra's own settings are not read"),
    (["hydra/launcher=x"], "Hydra's own settings are not read"),
    (["+_target_=os.system"], "never names code to run"),
    (["model._partial_=true"], "never names code to run"),
    (["data.names=[{_target_: os.system}]"], "never names code to run"),
    (["data.text_field=${oc.env:HOME}"], "asks for a value from outside the configuration"),
    (["data.text_field=${oc.env:WANDB_API_KEY}"], "asks for a secret of the environment"),
    (["data.text_field=${oc.env:MY_PASSWORD,x}"], "asks for a secret of the environment"),
    (["data.names=[${oc.env:HF_TOKEN}]"], "asks for a secret of the environment"),
    (["data.text_field='${oc.decode:${oc.env:HF_TOKEN}}'"], "asks for a secret of the environment"),
    (["data.text_field=\\\\${oc.env:HF_TOKEN}"], "asks for a secret of the environment"),
    (["model=local"], "model=local needs model.path=FOLDER"),
    (["data=files"], "data.source=files needs data.path"),
    (["pruning=learned"], "pruning.policy=learned needs pruning.sparsity"),
    (["train.steps=0"], "train.steps=0: give a whole number in [1, 10000000]"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[" ".join(words)[:50] for words, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_setting(words, expected, monkeypatch):
    for name in ("WANDB_API_KEY", "MY_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "canary-0123456789")
    with pytest.raises(UserError) as raised:
        compose("train", words)
    message = str(raised.value)
    assert expected in message
    assert "\n" not in message and "canary" not in message


def test_a_value_of_another_setting_may_be_named():
    assert compose("train", ["benchmark.prompt=${train.context}"]).benchmark.prompt == 256


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=30))
def test_a_quoted_prompt_reads_back_as_itself(text):
    quote = text[0] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1] else ""
    item = composing.parse(f"generate.prompt={text}")
    from omegaconf import OmegaConf

    read = OmegaConf.create({"prompt": item.value()}).prompt
    assert read == (text[1:-1] if quote else text)


PROMPTS = [
    "def main(",
    "a, b, c",
    "[x",
    "${oc.env:HF_TOKEN}",
    "\\${x}",
    'say "hi"',
    "ends in \\",
    "_target_",
    "a=b",
    "two\nlines",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_taken_as_it_stands(prompt, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    assert compose("generate", [f"checkpoint={tmp_path}", f"generate.prompt={prompt}"]).generate.prompt == prompt


def test_a_prompt_of_spaces_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"generate\.prompt is empty"):
        compose("generate", [f"checkpoint={tmp_path}", "generate.prompt=  "])


@pytest.mark.parametrize("verb", ["evaluate", "benchmark", "generate"])
def test_a_checkpoint_is_asked_for_and_found(verb, tmp_path):
    with pytest.raises(UserError, match="which model"):
        compose(verb, [])
    with pytest.raises(UserError, match="no such folder"):
        compose(verb, [f"checkpoint={tmp_path / 'none'}"])
    assert compose(verb, [f"checkpoint={tmp_path}"]).generate.checkpoint == str(tmp_path)


def test_a_report_finds_a_sweep_by_name_and_by_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "My Study").mkdir()
    for words in (["sweep=demo"], ["sweep=runs/demo"], ["sweep.name=demo"], [], [f"sweep={tmp_path}/runs/demo/"]):
        config = compose("report", words)
        assert (Path(config.runs) / config.sweep.name).samefile("runs/demo"), words
    config = compose("report", ["sweep=My Study", "format=json"])
    assert (config.sweep.name, config.format) == ("My Study", "json")
    with pytest.raises(UserError, match="no sweep 'dmo' in runs; nearest: demo"):
        compose("report", ["sweep=dmo"])
    for nothing in ("", "..x"):
        with pytest.raises(UserError, match="no sweep"):
            compose("report", [f"sweep={nothing}"])


def test_a_hash_depends_on_content_not_on_order():
    assert config_hash({"a": 1, "b": [1.5]}) == config_hash({"b": [1.5], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert len(config_hash({})) == 16


def test_control_characters_cannot_break_a_line():
    assert composing.one_line("a\nb\u202e\x1b[31m") == "a\\nb\\u202e\\x1b[31m"
    assert len(composing.one_line("x" * 1000)) == 120
