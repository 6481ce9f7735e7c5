"""Does a saved model come back bit for bit, whole or not at all, and is every damage named?"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import ctxprune
from ctxprune import GateConfig, UserError, checkpoint
from ctxprune.checkpoint import MANIFEST, PRUNING, WEIGHTS, load, load_base, save, seal
from ctxprune.policies import FutureConfig, H2OConfig, LTPConfig
from ctxprune.policies.budget import Budget
from ctxprune.retrofitting import gate_parameters, set_alpha, state_of, wrappers
from tests.models import FAMILIES, GPT2, GROUPED, LAYERS, gated, small_model, tokens


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "model"
    save(gated(), folder)
    return folder


def reseal(folder) -> None:
    (folder / MANIFEST).unlink()
    seal(folder)


def change_weights(folder, change) -> None:
    """Rewrite the tensors and the manifest with them: the hashes are right, the content is not."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    reseal(folder)


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_after_loading_are_bit_identical(family, tmp_path):
    model, ids = gated(family, sinks=1), tokens(2, 30)
    set_alpha(model, 3.0)
    save(model, tmp_path / "model")
    back = load(tmp_path / "model")
    assert torch.equal(back(ids).logits, model(ids).logits) and not back.training
    with ctxprune.mode(model, "soft"), ctxprune.mode(back, "soft"):
        assert torch.equal(back(ids).logits, model(ids).logits)
    assert state_of(back).alpha == 3.0 and state_of(back).policy == state_of(model).policy


@pytest.mark.parametrize("config", [ctxprune.WindowConfig((3, 4, 5), sinks=1), ctxprune.DenseConfig()])
@torch.no_grad()
def test_rules_without_gates_come_back_too(config, tmp_path):
    model, ids = ctxprune.retrofit(small_model(), config), tokens(1, 20)
    save(model, tmp_path / "model")
    back = load(tmp_path / "model")
    assert state_of(back).policy == config and torch.equal(back(ids).logits, model(ids).logits)


TAUGHT = [FutureConfig(Budget(share=0.3), sinks=1, recent=2), LTPConfig(sinks=1, recent=2)]


@pytest.mark.parametrize("config", TAUGHT, ids=lambda config: config.policy)
@torch.no_grad()
def test_what_a_ranking_was_taught_comes_back(config, tmp_path):
    model, ids, prompt = ctxprune.retrofit(small_model(), config), tokens(1, 30), torch.tensor([20])
    for parameter in gate_parameters(model):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save(model, tmp_path / "model")
    back = load(tmp_path / "model")
    assert state_of(back).policy == config
    kept, again = (ctxprune.drop_times(one, ids, prompt=prompt).drop_time for one in (model, back))
    assert torch.equal(kept, again)
    fresh = ctxprune.drop_times(ctxprune.retrofit(small_model(), config), ids, prompt=prompt).drop_time
    assert not torch.equal(kept, fresh), "what was taught decides"


@torch.no_grad()
def test_the_budget_of_each_layer_comes_back_where_it_was_set_after_retrofitting(tmp_path):
    model, ids, prompt = small_model(), tokens(1, 30), torch.tensor([20])
    model = ctxprune.retrofit(model, H2OConfig(Budget(share=0.9), sinks=1, recent=1))
    save(model, tmp_path / "as retrofitted")
    assert "budgets" not in json.loads((tmp_path / "as retrofitted" / PRUNING).read_text())
    for layer, wrapper in enumerate(wrappers(model)):
        ranking = wrapper.rule.ranking
        ranking.config = replace(ranking.config, budget=Budget(share=0.2 + 0.1 * layer))
    save(model, tmp_path / "model")
    back = load(tmp_path / "model")
    kept, again = (ctxprune.drop_times(one, ids, prompt=prompt).drop_time for one in (model, back))
    assert torch.equal(kept, again) and (kept < 30).any()
    pruning = json.loads((tmp_path / "model" / PRUNING).read_text())
    pruning["budgets"] = pruning["budgets"][1:]
    (tmp_path / "model" / PRUNING).write_text(json.dumps(pruning))
    reseal(tmp_path / "model")
    assert f"budgets of {LAYERS - 1} layers for {LAYERS}" in refusal(tmp_path / "model")


@torch.no_grad()
def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    settings = tf.LlamaConfig(**GROUPED, tie_word_embeddings=True)
    model, ids = ctxprune.retrofit(tf.LlamaForCausalLM(settings).eval(), GateConfig(rank=4)), tokens(1, 9)
    save(model, tmp_path / "model")
    names = set(load_file(tmp_path / "model" / WEIGHTS))
    assert len(names & {"lm_head.weight", "model.embed_tokens.weight"}) == 1
    back = load(tmp_path / "model")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert torch.equal(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_the_stored_precision_comes_back_whatever_the_config_says(dtype, tmp_path):
    """A bfloat16 model keeps its float32 rotary frequencies; float32 weights under a bfloat16 config lose nothing."""
    settings = tf.LlamaConfig(**GROUPED, dtype="bfloat16")
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
    model.config.dtype = torch.bfloat16
    ctxprune.retrofit(model, GateConfig(rank=4))
    save(model, tmp_path / "model")
    back, ids = load(tmp_path / "model"), tokens(1, 40)
    assert {p.dtype for p in back.parameters()} == {dtype}
    assert back.model.rotary_emb.inv_freq.dtype == model.model.rotary_emb.inv_freq.dtype
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_a_precision_may_be_asked_for(saved):
    assert {p.dtype for p in load(saved, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_only_tensors_json_and_text_are_written_and_notes_are_readable(tmp_path):
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    save(gated(), tmp_path / "model", tokenizer, steps=7)
    files = {path.name for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert {WEIGHTS, PRUNING, MANIFEST, "config.json", "tokenizer.json"} <= files
    assert {name.rsplit(".", 1)[1] for name in files} <= {"safetensors", "json", "txt", "jinja"}
    for name in files:
        head = (tmp_path / "model" / name).read_bytes()[:4]
        assert not head.startswith((b"\x80", b"PK")), name  # pickle, or the zip torch.save writes
    pruning = json.loads((tmp_path / "model" / PRUNING).read_text())
    assert pruning["steps"] == 7 and pruning["pruning"]["policy"] == "learned"
    assert set(json.loads((tmp_path / "model" / MANIFEST).read_text())["files"]) == files - {MANIFEST}
    assert not list(tmp_path.glob(".*"))


def test_an_existing_folder_is_refused_and_left_alone(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        save(gated(seed=3), saved)
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}


@pytest.mark.parametrize("broken", ["save_file", "seal", "_write"])
def test_a_failed_save_leaves_nothing_behind(broken, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        save(gated(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_unpruned_model_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="not retrofitted"):
        save(small_model(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [WEIGHTS, PRUNING, "config.json"])
def test_one_flipped_bit_is_noticed_and_the_file_named(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-2 if name != PRUNING else content.index(b'"alpha": 8') + 9] ^= 1
    (saved / name).write_bytes(content)
    assert name in refusal(saved) and "damaged" in refusal(saved)


@pytest.mark.parametrize("name", [WEIGHTS, PRUNING, MANIFEST, "config.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    assert name in refusal(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "7", '{"format": "one"}'])
def test_an_unreadable_pruning_file_is_refused(saved, text):
    (saved / PRUNING).write_text(text)
    reseal(saved)
    assert PRUNING in refusal(saved)


def test_a_newer_format_is_refused(saved):
    pruning = json.loads((saved / PRUNING).read_text())
    (saved / PRUNING).write_text(json.dumps({**pruning, "format": 2}))
    reseal(saved)
    assert "format 2, newer than 1" in refusal(saved)


def test_a_folder_that_is_none_or_another_thing_is_refused(tmp_path):
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    assert PRUNING in refusal(tmp_path)


GATE = "model.layers.0.self_attn.rule.gate.query.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(GATE), f"{GATE}: file nothing"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), r"extra: file \(2,\), model nothing"),
        (lambda tensors: tensors.update({GATE: torch.zeros(5, 32)}), rf"{GATE}: file \(5, 32\), model \(4, 32\)"),
    ],
)
def test_loading_is_strict_and_names_the_tensor(saved, change, named):
    change_weights(saved, change)
    with pytest.raises(UserError, match=named):
        load(saved)


def test_weights_of_another_architecture_are_refused(saved, tmp_path):
    save(gated("gpt2"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, saved / WEIGHTS)
    reseal(saved)
    assert "another architecture" in refusal(saved)
    config = json.loads((saved / "config.json").read_text())
    shutil.copy(tmp_path / "other" / "config.json", saved / "config.json")
    assert config["model_type"] == "llama"
    reseal(saved)
    pruning = json.loads((saved / PRUNING).read_text())
    pruning["pruning"]["rank"] = 5
    (saved / PRUNING).write_text(json.dumps(pruning))
    reseal(saved)
    assert "rule.gate" in refusal(saved)


def test_a_base_model_is_float32_without_dropout(tmp_path):
    settings = {**GPT2, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "dtype": "bfloat16"}
    tf.GPT2LMHeadModel(tf.GPT2Config(**settings)).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"), 128)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert len(model.transformer.h) == LAYERS


def test_opt_calls_its_dropout_otherwise_and_it_is_off_too(tmp_path):
    small_model("opt").save_pretrained(tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path)
    config.update({"dropout": 0.3, "layerdrop": 0.2})
    config.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), 16).config
    assert (loaded.dropout, loaded.layerdrop, loaded.attention_dropout) == (0.0, 0.0, 0.0)


def test_base_models_that_cannot_serve_are_refused(tmp_path, saved):
    base = tmp_path / "base"
    small_model("gpt2").save_pretrained(base)
    for name, context, reason in (
        (base, 129, "128 positions, fewer than train.context=129"),
        (saved, 16, "pruned model already"),
        (tmp_path, 16, r"no config\.json"),
        (tmp_path / "none", 16, "does not exist"),
    ):
        with pytest.raises(UserError, match=reason):
            load_base(str(name), context)
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_base(str(base), 16)


def test_a_base_model_that_lacks_a_tensor_is_refused_by_name(tmp_path):
    small_model("gpt2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight"):
        load_base(str(tmp_path), 16)


def test_the_precision_of_a_model_is_that_of_most_of_it():
    few = {"index": torch.zeros(99, dtype=torch.long), "bias": torch.zeros(3)}
    assert checkpoint._most_numbers(few | {"weight": torch.zeros(9, dtype=torch.bfloat16)}) == torch.bfloat16
