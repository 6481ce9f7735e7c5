"""Are a trained model's layers measured as they are, and does the benchmark start without hydra?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ctxprune
from ctxprune.errors import UserError
from ctxprune.retrofitting import wrappers
from ctxprune.text.corpus import stdlib_documents
from ctxprune.text.tokenizer import train_tokenizer
from pipelines.compose import compose
from pipelines.config import KernelsConfig
from pipelines.kernel_benchmark import problem, recorded, words
from tests import models

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-sliding", "gemma", "gpt_neox"])
@pytest.mark.parametrize("keep", [{}, {"sinks": 2, "recent": 3}], ids=["plain", "protected"])
def test_recorded_layers_drop_what_the_model_drops(family, keep):
    model, ids = models.gated(family, **keep), models.tokens(2, 40)
    whole = ctxprune.drop_times(model, ids).drop_time
    logits = model(ids, use_cache=False).logits
    for layer in range(models.LAYERS):
        found = recorded.recorded(model, ids, layer)
        assert torch.equal(problem.drop_times(found), whole[layer])
        assert found.query.shape[:3] == (2, 4, 40) and found.alpha == 8.0
    assert 0 < problem.share_dropped(found) < 1
    assert torch.equal(model(ids, use_cache=False).logits, logits), "the model is as it was"


def test_recorded_tensors_give_the_layers_own_output():
    """The first layer's, from its queries, keys, values and gates alone."""
    from pipelines.kernel_benchmark import prefill

    model, ids, outputs = models.gated("gemma"), models.tokens(2, 40), []
    inner = wrappers(model)[0].inner
    handle = inner.o_proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    with torch.no_grad(), ctxprune.mode(model, "hard"):
        model(ids, use_cache=False)
    handle.remove()
    found = prefill.ours("reference", recorded.recorded(model, ids, 0))
    torch.testing.assert_close(found.transpose(1, 2).flatten(2).float(), outputs[0], rtol=1e-4, atol=1e-5)


def test_drops_that_are_not_the_gates_own_are_refused():
    with pytest.raises(UserError, match="propagate_in_depth"):
        recorded.recorded(models.gated(propagate_in_depth=True), models.tokens(1, 8), 0)
    window = ctxprune.retrofit(models.small_model(), ctxprune.WindowConfig(widths=(4,) * models.LAYERS))
    with pytest.raises(UserError, match="no gates"):
        recorded.recorded(window, models.tokens(1, 8), 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer, two layers and 64 positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = ctxprune.retrofit(LlamaForCausalLM(config), ctxprune.GateConfig(rank=4, beta=1.0))
    for wrapper in wrappers(model):
        torch.nn.init.normal_(wrapper.rule.gate.query.weight, std=0.5)
        torch.nn.init.normal_(wrapper.rule.gate.key.weight, std=0.5)
    folder = tmp_path_factory.mktemp("kernels") / "model"
    ctxprune.save(model, folder, tokenizer=train_tokenizer(stdlib_documents(100_000), 300))
    return folder


BLOCKED = "import sys; sys.modules |= dict.fromkeys(('hydra', 'omegaconf', 'ray', 'deepspeed', 'wandb', 'matplotlib'))"


def start(*given: str) -> subprocess.CompletedProcess:
    """`python -m pipelines.kernel_benchmark` where importing hydra and the like fails."""
    script = f"{BLOCKED}; import runpy; runpy.run_module('pipelines.kernel_benchmark', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", script, *given], cwd=ROOT, capture_output=True, text=True)


def test_the_benchmark_starts_without_hydra_and_measures_every_layer(folder):
    done = start(f"checkpoint={folder}", "memory=false", "repeats=1", "decode_batch=2", "format=json", "batch=2")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["passed"] for r in records[:3]] == [True] * 3
    mine = [r for r in records[3:] if r["peer"] == "ctxprune torch"]
    assert [(r["layer"], r["operation"]) for r in mine] == [
        (layer, name) for layer in (0, 1) for name in ("training", "prefill", "decoding")
    ]
    for record in mine:
        assert record["n"] == (63 if record["operation"] == "decoding" else 64) and 0 < record["dropped"] < 1
        sizes = [record[name] for name in ("batch", "heads", "kv_heads", "width", "rank", "alpha")]
        assert sizes == [2, 4, 2, 8, 4, 8.0]


MISTAKES = [
    (["lenghts=5"], 'no setting "lenghts"; nearest: lengths'),
    (["kernels.drop=0.5"], 'no setting "kernels.drop"; nearest: drops'),
    (["lengths"], "'lengths' is not SETTING=VALUE"),
    (["lengths=x"], "lengths=x: expected a whole number, or a list of them"),
    (["lengths=[1,2.5]"], "expected a whole number"),
    (["batch=true"], "batch=true: expected a whole number"),
    (["flex=1"], "flex=1: expected true or false"),
    (["dtype=int8"], "kernels.dtype=int8: choose one of"),
    (["operations=[prefil]"], "kernels.operations=prefil: choose one of training, prefill, decoding"),
    (["operations=[]"], "kernels.operations is empty"),
    (["kv_heads=5"], "kernels.kv_heads=5 does not divide kernels.heads=12"),
    (["checkpoint=/nowhere"], "kernels.checkpoint=/nowhere: no such folder"),
    (["batch=" + "(" * 5000], "expected a whole number"),
]


@pytest.mark.parametrize(("given", "expected"), MISTAKES, ids=[given[0][:30] for given, _ in MISTAKES])
def test_a_mistake_is_one_line(given, expected):
    with pytest.raises(UserError) as raised:
        words.read(given)
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_a_mistake_ends_with_two_and_one_line():
    done = start("lenghts=5")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout


def test_words_become_values():
    given = ["lengths=4096", "kernels.drops=[0, 0.5]", "dtype=bfloat16", "operations=[prefill, decoding]", "repeats=7"]
    config = words.read([*given, "largest_gb=2", "flex=true", "checkpoint=null", "format=json"])
    assert config.kernels == KernelsConfig(
        lengths=[4096],
        drops=[0.0, 0.5],
        dtype="bfloat16",
        operations=["prefill", "decoding"],
        largest_gb=2.0,
        flex=True,
    )
    assert (config.benchmark.repeats, config.format) == (7, "json")
    assert all(name in words.usage() for name in ("lengths", "repeats", "format"))


def test_both_entries_read_the_same(folder):
    given = ["lengths=[64,128]", "drops=[0.5]", "decode_batch=3", f"checkpoint={folder}", "operations=[prefill]"]
    through_hydra = compose("benchmark", ["target=kernels", *(f"kernels.{word}" for word in given)])
    assert words.read(given).kernels == through_hydra.kernels
    short = compose("benchmark", ["target=kernels", f"checkpoint={folder}"])
    assert short.kernels.checkpoint == str(folder)
    with pytest.raises(UserError, match="no such folder"):
        compose("benchmark", ["target=kernels", "checkpoint=nowhere"])
