"""Is every mistake in a model or a text found before a study writes anything or starts a process?"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

from ctxprune.errors import UserError
from ctxprune.text.tokenizer import train_tokenizer
from pipelines import __main__, cluster, output
from pipelines.config import ClusterConfig

TEXT = "".join(f"line {i} of a text that is long enough to learn from, or so one hopes\n" for i in range(2000))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a good model and a good text; fd 1 and the loggers stay as pytest has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "take_stdout", lambda: None)
    monkeypatch.setattr(output, "set_up_logging", lambda: None)
    (tmp_path / "text.txt").write_text(TEXT)
    save_model(tmp_path / "model", vocab_size=300)
    return tmp_path


def save_model(folder: Path, vocab_size: int, tokens: int = 300, positions: int = 1024) -> None:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer([TEXT], tokens).save_pretrained(folder)


def no_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def other_family(folder: Path) -> None:
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


def too_large_tokenizer(folder: Path) -> None:
    train_tokenizer([TEXT], 320).save_pretrained(folder / "model")


def few_positions(folder: Path) -> None:
    save_model(folder / "model", 300, positions=64)


def not_a_model(folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{}")


def pruned_already(folder: Path) -> None:
    (folder / "model" / "pruning.json").write_text("{}")


def empty_text(folder: Path) -> None:
    (folder / "text.txt").write_text("")


def short_text(folder: Path) -> None:
    (folder / "text.txt").write_text("too short\n" * 3)


def binary_text(folder: Path) -> None:
    (folder / "text.txt").write_bytes(b"caf\xe9 " * 100)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (no_weights, "has no weights (*.safetensors)"),
        (other_family, "the family 'bloom' cannot be retrofitted"),
        (too_large_tokenizer, "the tokenizer in"),
        (few_positions, "has 64 positions, fewer than train.context=512"),
        (not_a_model, "no model could be read from"),
        (pruned_already, "is a pruned model already"),
        (empty_text, "is empty"),
        (short_text, "fewer than train.context=512"),
        (binary_text, "not UTF-8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_is_one_line_and_exit_2_and_leaves_nothing(here, capfd, spoil, expected):
    spoil(here)
    before = sorted(path.name for path in here.rglob("*"))
    capfd.readouterr()
    assert __main__.main(["sweep", "experiment=retrofit", "model.path=model", "data.path=text.txt"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("ctxprune: ") and err.count("\n") == 1, err
    assert expected in err
    assert sorted(path.name for path in here.rglob("*")) == before


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("cluster.cpus_per_worker=1024", "is more than the"),
        ("cluster.gpus_per_worker=8", "is more than the"),
        ("benchmark.prompt=1000000", "fewer than benchmark.prompt + benchmark.new_tokens"),
    ],
)
def test_more_than_there_is_is_refused_before_anything_runs(here, capfd, word, said):
    before = sorted(path.name for path in here.rglob("*"))
    assert __main__.main(["sweep", "experiment=smoke", word]) == 2
    assert said in capfd.readouterr().err
    assert sorted(path.name for path in here.rglob("*")) == before


def test_online_tracking_without_a_key_is_refused_before_anything_runs(here, capfd, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(here))
    words = ["sweep", "experiment=retrofit", "model.path=model", "data.path=text.txt", "tracking=online"]
    assert __main__.main(words) == 2
    assert "WANDB_API_KEY" in capfd.readouterr().err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("address", "said"), [("127.0.0.1:1", "at cluster.address=127.0.0.1:1"), ("auto", "at cluster.address=auto")]
)
def test_a_cluster_that_does_not_answer_is_refused_before_anything_is_written(here, capfd, monkeypatch, address, said):
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(set))  # other sweeps
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda *_: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = sorted(path.name for path in here.rglob("*"))
    assert __main__.main(["sweep", "experiment=smoke", f"cluster.address={address}"]) == 2
    err = capfd.readouterr().err
    assert said in err and "ray start --head" in err and "Traceback" not in err
    assert sorted(path.name for path in here.rglob("*")) == before


def test_gpus_are_used_where_there_are_any_unless_somebody_said_how_many(monkeypatch):
    assert cluster.gpus_of(ClusterConfig()) == int(torch.cuda.is_available())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cluster.gpus_of(ClusterConfig()) == 1
    assert cluster.gpus_of(ClusterConfig(gpus_per_worker=0)) == 0
    assert cluster.gpus_of(ClusterConfig(address="auto")) is None
    assert cluster.gpus_of(ClusterConfig(address="auto", gpus_per_worker=2)) == 2
    assert cluster.fitting(ClusterConfig(workers=2), [(16, 6)]) == 3  # two processes of a GPU each


def test_a_process_lies_on_one_machine():
    asked = ClusterConfig(workers=2, cpus_per_worker=6, gpus_per_worker=0)
    assert cluster.fitting(asked, [(13, 0), (6, 0)]) == 1
    with pytest.raises(UserError, match=r"more than the 8 \+ 4 cpus there are"):
        cluster.fitting(asked, [(8, 0), (4, 0)])
    asked = ClusterConfig(workers=1, cpus_per_worker=4, gpus_per_worker=1)
    with pytest.raises(UserError, match="the machines there are hold 0"):
        cluster.fitting(asked, [(8, 0), (2, 4)])


ONE_CORE = """
from pipelines import cluster
from pipelines.config import ClusterConfig

cluster.cores = lambda: 1
with cluster.connected(ClusterConfig(workers=1, cpus_per_worker=1)):
    import ray

    print(ray.cluster_resources()["CPU"], cluster.slots(ClusterConfig(workers=1, cpus_per_worker=1)))
"""


@pytest.mark.slow
def test_a_local_cluster_has_the_cores_that_this_process_may_use():
    """In a process of its own: Ray reads how it is to run when it is imported."""
    done = subprocess.run([sys.executable, "-c", ONE_CORE], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["1.0", "1"], done.stderr
