"""Does a mistake on the command line cost one line and exit 2, and does stdout carry results alone?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ctxprune.errors import UserError
from pipelines import __main__, output

ROOT = Path(__file__).resolve().parents[2]

MISTAKES = [
    (["swep"], "no verb 'swep'; nearest: sweep"),
    (["train", "pruning.sparsty=0.5"], 'no setting "pruning.sparsty"; nearest: pruning.sparsity'),
    (["train", "train.steps=abc"], "train.steps=abc: expected a whole number"),
    (["train", "hydra.run.dir=elsewhere"], "Hydra's own settings are not read"),
    (["train", "data.text_field=${oc.env:CANARY_KEY}"], "asks for a secret"),
    (["train", "sweep.name=a\nb"], "ctxprune: "),
    (["sweep", "sweep.name=../up"], "sweep.name='../up'"),
    (["sweep", "runs= "], "runs is empty"),
    (["train", "train.steps=\x1b[31m"], "ctxprune: "),
    (["generate"], "which model? give checkpoint=FOLDER"),
    (["evaluate", "checkpoint=missing"], "no such folder"),
    (["report", "sweep=demo"], "no sweep 'demo' in runs"),
    (["doctor", "format=xml"], "format=xml: choose one of text, json"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in; fd 1 and the loggers stay as pytest has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CANARY_KEY", "canary-0123456789")
    monkeypatch.setattr(output, "take_stdout", lambda: None)
    monkeypatch.setattr(output, "set_up_logging", lambda: None)
    return tmp_path


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[ascii(" ".join(words))[:50] for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_2_and_leaves_nothing(words, expected, here, capfd):
    assert __main__.main(words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("ctxprune: ") and err.endswith("\n") and err.count("\n") == 1
    assert expected in err
    assert "Traceback" not in err and "canary" not in err and "\x1b" not in err
    assert list(here.iterdir()) == []


def verb(monkeypatch, main) -> None:
    """Puts a function in the place of `train`."""
    module = types.ModuleType("pipelines.train")
    module.main = main
    monkeypatch.setitem(sys.modules, "pipelines.train", module)


def raising(error: BaseException):
    def main(config, overrides):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("first\nsecond"), 2, "ctxprune: first\\nsecond\n"),
        (KeyboardInterrupt(), 130, "ctxprune: interrupted; the same command continues\n"),
        (BrokenPipeError(), 141, ""),
        (PermissionError(13, "Permission denied", "/x"), 2, "ctxprune: /x: Permission denied\n"),
        (OSError(28, "No space left on device", "/x"), 2, "ctxprune: /x: No space left on device\n"),
    ],
)
def test_an_expected_end_has_no_traceback(error, code, expected, here, monkeypatch, capfd):
    verb(monkeypatch, raising(error))
    assert __main__.main(["train"]) == code
    assert capfd.readouterr().err == expected


@pytest.mark.parametrize("error", [RuntimeError("ours"), FileNotFoundError(2, "ours", "/x"), OSError("ours")])
def test_our_own_fault_is_not_swallowed(here, monkeypatch, error):
    verb(monkeypatch, raising(error))
    with pytest.raises(type(error), match="ours"):
        __main__.main(["train"])


def test_a_verb_gets_its_config_and_the_words(here, monkeypatch):
    seen = []
    verb(monkeypatch, lambda config, overrides: seen.append((config.train.steps, overrides)) or 3)
    assert __main__.main(["train", "train.steps=9"]) == 3
    assert seen == [(9, ["train.steps=9"])]


def test_no_verb_prints_the_usage(capsys):
    assert __main__.main(["--help"]) == 0
    assert __main__.main([]) == 2
    assert capsys.readouterr().out.count("usage:") == 2


def test_a_record_is_strict_json_on_one_line(capsys):
    output.emit({"text": "a\nb é", "loss": float("nan"), "best": [float("inf"), 1]}, "json", "for people")
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line) == {"text": "a\nb é", "loss": None, "best": [None, 1]}


def test_people_get_the_text_and_nothing_where_there_is_none(capsys):
    output.emit({"loss": 1.0}, "text", "loss 1")
    output.emit({"loss": 1.0}, "text")
    assert capsys.readouterr().out == "loss 1\n"


NOISY = """
import logging, os, subprocess, sys
from pipelines import output
output.take_stdout(); output.take_stdout(); output.set_up_logging()
print("a library prints"); os.write(1, b"C code prints\\n"); subprocess.run(["echo", "a child prints"])
logging.getLogger("pipelines.x").info("progress"); logging.getLogger("other").info("chatter")
output.emit({"n": 1}, "json")
"""


def run(code: list[str], **kwargs) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, env=environment, timeout=60, **kwargs
    )


def test_only_results_reach_stdout_whoever_prints():
    done = run(["-c", NOISY])
    assert done.stdout == '{"n": 1}\n'
    for words in ("a library prints", "C code prints", "a child prints", "progress"):
        assert words in done.stderr
    assert "chatter" not in done.stderr


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = run(["-P", "-m", "pipelines", "train", "train.steps=abc"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ctxprune: train.steps=abc: expected a whole number\n"
    assert list(tmp_path.iterdir()) == []
