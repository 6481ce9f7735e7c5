"""The README is run: its Python block on a small model, its commands as far as they go without hours of training."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ctxprune.budget import measure
from ctxprune.text.batches import Batch
from ctxprune.text.tokenizer import train_tokenizer
from pipelines import compose, grid
from pipelines.policy_study import run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every ./launch.sh line, without its comment, as words."""
    return [
        shlex.split(line, comments=True)[1:]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("./launch.sh")
    ]


@pytest.fixture
def model_folder(tmp_path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_lines_of_python_run(tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    first, second = blocks("python")
    tokenizer = train_tokenizer(["some text, and some more"], 300)
    names = {"prompt_ids": torch.arange(1, 9), "tokenizer": tokenizer}
    names["batches"] = [torch.randint(64, (2, 32)) for _ in range(20)]
    exec(first.replace("FOLDER_OR_HUB_ID", str(model_folder)).replace("=100", "=5"), names)
    assert 1 <= len(names["written"].tokens[0]) <= 5 and (tmp_path / "pruned" / "pruning.json").is_file()
    assert measure(names["model"], [Batch(ids, torch.arange(32).expand(2, 32)) for ids in names["batches"][:16]]) > 0.7
    exec(second, {"prompts": [torch.arange(1, 9), torch.arange(3, 40)]})


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_understood(tmp_path, monkeypatch, model_folder, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo" / "TRIAL").mkdir(parents=True)
    (tmp_path / "YOUR_TEXT").write_text("some text\n")
    words = [word.replace("FOLDER_OR_HUB_ID", str(model_folder)) for word in words] or ["sweep", "experiment=demo"]
    if words[0] == "test":
        return
    config = compose.compose(words[0], words[1:])
    if config.study.tasks:
        assert len(run.checked(config)) >= 6
    elif words[0] == "sweep":
        assert len(grid.expand(config, words[1:])) >= 6


def test_every_file_the_tree_names_exists():
    (tree,) = blocks("text")
    folders = [ROOT]
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        path = folders[depth] / name
        assert path.exists(), f"README names {path.relative_to(ROOT)}"
        folders[depth + 1 :] = [path]


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), f"README links to {target}"
