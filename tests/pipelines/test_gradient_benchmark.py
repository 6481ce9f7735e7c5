"""Does the gradients' benchmark measure agreement and cost, and say what happened?"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers as tf

import ctxprune
from ctxprune.errors import UserError
from ctxprune.policies import DenseConfig
from ctxprune.replay import read
from ctxprune.teachers.edge_gradient import edge_gradients
from ctxprune.text.token_store import TokenSplit
from ctxprune.text.tokenizer import train_tokenizer
from pipelines import compose
from pipelines.benchmark import main
from pipelines.config import GradientsConfig
from pipelines.generation_benchmark.subject import twin_of
from pipelines.gradient_benchmark import Subject, cost, lines, records, worth
from tests.models import LAYERS, VOCAB, gated, small_model, tokens

CONTEXT = 30


def nearly_even():
    """Where attention is nearly even no key weighs much: first order is the truth."""
    model = ctxprune.retrofit(small_model(), DenseConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(0.05)
    return model


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return {one["score"]: one for one in worth.records(nearly_even(), tokens(10, CONTEXT + 2), CONTEXT)}


def test_gradients_agree_with_leaving_out_and_lots_do_not(found):
    gradients, lots = found[worth.GRADIENTS], found["random"]
    assert gradients["signed"]["all"]["mean"] > 0.95 and gradients["size"]["all"]["mean"] > 0.95
    assert abs(lots["signed"]["all"]["mean"]) < 0.2 and abs(lots["size"]["all"]["mean"]) < 0.2
    assert gradients["signed"]["all"]["mean"] > found[worth.POSITIVE]["signed"]["all"]["mean"]
    assert set(found) >= {"accumulated attention", "value-weighted attention", "key norm"}


def test_every_window_is_in_the_spread(found):
    for record in found.values():
        assert (record["windows"], record["context"], record["queries"]) == (10, CONTEXT, 2)
        assert len(record["signed"]["layers"]) == LAYERS
        for spread in (record["signed"]["all"], *record["size"]["layers"]):
            assert -1 <= spread["lowest"] < spread["mean"] < spread["highest"] <= 1


def test_cheap_scores_are_what_eager_attention_says():
    model, ids = ctxprune.retrofit(small_model(), DenseConfig()).double(), tokens(2, 26)
    got = worth.cheap(model, read(model, ids[:, :20]), ids[:, 20:])
    plain = small_model().double()
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        output = plain(ids, output_attentions=True, use_cache=True)
    for layer, shares in enumerate(output.attentions):
        held = output.past_key_values.layers[layer]
        assert torch.allclose(got["accumulated attention"][layer], shares.mean(1).sum(1)[:, :20], atol=1e-12)
        last = shares[:, :, 20:, :20].sum(2)
        assert torch.allclose(got["attention of the queries"][layer], last.mean(1), atol=1e-12)
        lengths = held.values[:, :, :20].norm(dim=-1).repeat_interleave(2, 1)
        assert torch.allclose(got["value-weighted attention"][layer], (last * lengths).mean(1), atol=1e-12)
        assert torch.allclose(got["key norm"][layer], -held.keys[:, :, :20].norm(dim=-1).mean(1), atol=1e-12)


def test_sizes_forgive_a_wrong_sign_and_the_signed_question_does_not():
    truth = torch.tensor([[[-3.0, 2.0, -1.0, 0.5]]])
    assert worth.agreement(truth.abs(), truth, size=True)["all"]["mean"] == pytest.approx(1.0)
    assert worth.agreement(truth.abs(), truth)["all"]["mean"] < 0
    # Below zero throughout is an order: the largest is the best.
    assert worth.agreement(truth.abs() - 9, truth, size=True)["all"]["mean"] == pytest.approx(1.0)


def test_gradients_on_the_cache_of_transformers_are_the_gradients():
    model, ids = gated(std=0.5), tokens(2, 40)
    twin = twin_of(model)
    wanted = edge_gradients(model, read(model, ids[:, :36]), ids[:, 36:])
    assert torch.allclose(cost.with_gradients(twin, model, ids, 4), wanted, atol=1e-5)


def test_a_model_that_attends_in_a_window_is_refused():
    model = gated("mistral-sliding")
    with pytest.raises(UserError, match=r"window shorter than gradients\.lengths=40"):
        cost.with_gradients(twin_of(model), model, tokens(1, 40), 4)


def test_the_cost_of_each_width_stands_beside_its_prediction(monkeypatch):
    clock = iter(float(value) for value in (9, 9, 9, 2, 3, 4, 1, 3, 5, 1, 2, 6))
    monkeypatch.setattr(cost, "seconds", lambda run, device: run() is not None and next(clock))
    first, second = cost.records(gated(), tokens(2, 40), [8, 1, 8], 3)
    assert (first["queries"], second["queries"], first["length"], first["rows"]) == (1, 8, 40, 2)
    assert (first["ratio"], first["ratio_spread"]) == (2.0, [1.5, 3.0]) and first["forward_ms"] == 1000.0
    assert (second["ratio"], second["ratio_spread"]) == (5.0, [2.0, 6.0])
    assert second["predicted_ratio"] == pytest.approx(1 + 3 * 8 / 40)


def subject(text: int = 400) -> Subject:
    ids = np.random.default_rng(0).integers(0, VOCAB, text).astype(np.uint16)
    return Subject("small", gated(), TokenSplit(ids, np.zeros(1, dtype=np.int64)))


def small(**changes) -> GradientsConfig:
    return GradientsConfig(**({"queries": [2], "context": 10, "windows": 3, "lengths": [32, 64, 256]} | changes))


def test_lengths_beyond_the_positions_are_left_out_and_said(caplog):
    with caplog.at_level("INFO"):
        made = list(records(subject(), small(), 1))
    assert [one["length"] for one in made if one["part"] == "cost"] == [32, 64]
    assert "gradients.lengths: 256 is left out" in caplog.text
    assert {one["windows"] for one in made if one["part"] == "worth"} == {3}
    for record in made:
        said = lines.line(record)
        assert "\n" not in said and "last 2 queries" in said
    assert lines.line(made[0]).endswith(("the aim of 0.8 is reached", "the aim of 0.8 is MISSED"))


def test_one_part_alone_is_measured():
    assert {one["part"] for one in records(subject(), small(parts=["worth"]), 1)} == {"worth"}
    assert {one["part"] for one in records(subject(), small(parts=["cost"], context=5000), 1)} == {"cost"}


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        (small(context=127), 400, r"gradients\.context \+ gradients\.queries = 129, but the model has 128 positions"),
        (small(context=60), 50, r"gradients\.context \+ gradients\.queries = 62, but held-out text has 50 tokens"),
        (small(lengths=[129]), 400, r"gradients\.lengths begins at 129, but the model has 128 positions"),
        (small(lengths=[100]), 50, r"gradients\.lengths begins at 100, but held-out text has 50 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(settings, text, expected, monkeypatch):
    monkeypatch.setattr(worth, "records", lambda *_: pytest.fail("work began"))
    with pytest.raises(UserError, match=expected) as caught:
        list(records(subject(text), settings, 1))
    assert "\n" not in str(caught.value)


def folder_of_transformers(tmp_path) -> list[str]:
    """Words that name a model as transformers saves it and a text."""
    text = "".join(f"the {word} sat on the {word}\n" * 20 for word in ("cat", "dog", "mat", "hat", "rat"))
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join([text] * 4))
    train_tokenizer([text], 300).save_pretrained(tmp_path / "small")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlamaConfig(vocab_size=300, num_key_value_heads=1, max_position_embeddings=64, **sizes)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    words = ["target=gradients", "model=local", f"model.path={tmp_path / 'small'}", "data=files", "train.context=32"]
    words += [f"data.path={tmp_path / 'text.txt'}", "data.held_out=0.5", f"runs={tmp_path / 'runs'}", "format=json"]
    return words + ["gradients.queries=[2]", "gradients.context=8", "gradients.windows=2", "gradients.lengths=[16]"]


def test_the_verb_measures_a_folder_of_transformers(tmp_path, capsys):
    words = folder_of_transformers(tmp_path)
    assert main(compose.compose("benchmark", words), words) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {one["part"] for one in made} == {"worth", "cost"} and {one["model"] for one in made} == {"small"}
    assert all(one["machine"] and one["gradients"]["windows"] == 2 for one in made)


def test_the_verb_measures_a_checkpoint(tmp_path, capsys):
    words = folder_of_transformers(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "small")
    ctxprune.save(ctxprune.retrofit(model, ctxprune.GateConfig(rank=4)), tmp_path / "trial" / "model", tokenizer)
    words = [f"checkpoint={tmp_path / 'trial'}", *(w for w in words if "model" not in w), "gradients.parts=[cost]"]
    assert main(compose.compose("benchmark", words), words) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert record["model"] == "trial" and record["ratio"] > 0


def test_one_model_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="which model"):
        compose.compose("benchmark", ["target=gradients"])
    words = ["target=gradients", f"model.path={tmp_path}"]
    assert compose.compose("benchmark", words).generate.checkpoint is None
    with pytest.raises(UserError, match=r"checkpoint and model\.path are both set"):
        compose.compose("benchmark", [*words, f"checkpoint={tmp_path}"])
    with pytest.raises(UserError, match=r"data\.source=files needs data\.path"):
        compose.compose("benchmark", [*words, "data=files"])
