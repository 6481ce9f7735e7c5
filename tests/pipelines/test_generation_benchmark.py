"""Is generation measured fairly: right results before any time, gates that drop what is asked, ratios that add up?"""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
import torch

import ctxprune
from ctxprune import kernels
from ctxprune.retrofitting import wrappers
from ctxprune.text.corpus import stdlib_documents
from ctxprune.text.tokenizer import train_tokenizer
from pipelines import __main__, output
from pipelines.config import GenerationConfig
from pipelines.generation_benchmark import clock, ours, parity, ratios, theirs
from pipelines.generation_benchmark.calibration import calibrate
from pipelines.generation_benchmark.peers import DENSE, DYNAMIC, STATIC, peers
from pipelines.generation_benchmark.subject import RANDOM, Subject, random_subject, tokens_fed, twin_of, weight_bytes
from tests import models

CPU = torch.device("cpu")
SIZES = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "intermediate": 48, "vocab": 97, "rank": 4}
SMALL = GenerationConfig(contexts=[24], batches=[2], drops=[0.5, 0.8], new_tokens=10, **SIZES)
WORDS = ["benchmark", "target=generation", *(f"generation.{name}={size}" for name, size in SIZES.items())]
TINY = [*WORDS, "generation.contexts=[24]", "generation.batches=[2]", "generation.new_tokens=10"]
MEASURED = {
    "decode_ms", "decode_ms_quantiles", "decode_ms_spread", "decode_mean_ms", "steps", "tokens_per_second",
    "prefill_seconds", "prefill_seconds_spread", "prefills", "cache_live_bytes", "cache_allocated_bytes", "live_share",
    "live_share_at_end", "weight_bytes", "step_bytes",
}  # fmt: skip
PASSED = {"passed": True, "same_tokens": True, "error": 0.0, "allowed": 1e-9, "dropped": 0.5}
BASE = {"kind", "gates", "model", "settings", "machine", "versions", "device", "threads", "table"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in; fd 1 and the loggers stay as pytest has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "take_stdout", lambda: None)
    monkeypatch.setattr(output, "set_up_logging", lambda: None)
    return tmp_path


def run(words: list[str], capsys) -> tuple[int, list[dict]]:
    code = __main__.main([*words, "format=json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_method_has_a_record_with_its_numbers_or_its_reason(here, capsys):
    code, records = run([*TINY, "generation.pool_gb=0.01", "generation.pool_requests=3"], capsys)
    parity_record, *records = records
    assert code == 0 and parity_record["passed"] and parity_record["same_tokens"] and parity_record["error"] <= 1e-9
    assert 0.2 < parity_record["dropped"] < 0.8, "some went and some stayed"
    assert all(record.keys() >= BASE and record["gates"] == RANDOM for record in records)
    assert {record["kind"] for record in records} == {"generation"}
    methods = [record for record in records if record["table"] == "methods"]
    pruned, kvpress = ["ctxprune pruned 80%", "ctxprune pruned 90%"], ["kvpress knorm 80%", "kvpress knorm 90%"]
    assert [record["method"] for record in methods] == [*pruned, DENSE, DYNAMIC, STATIC, *kvpress]
    for record in methods:
        assert (record["context"], record["batch"]) == (24, 2)
        if record["engine"] == "kvpress":
            assert record["absent"] == "the package kvpress is not installed" and "decode_ms" not in record
            continue
        assert record.keys() >= MEASURED
        (lowest, highest), (low, high) = record["decode_ms_spread"], record["decode_ms_quantiles"]
        assert 0 < lowest <= low <= record["decode_ms"] <= high <= highest
        assert record["tokens_per_second"] == pytest.approx(2e3 / record["decode_ms"])
        assert record["steps"] == (8 if record["engine"] == "transformers" else 10)
        ratio_fields = {f"decode_speedup_over_{short}" for short in ratios.OVER}
        wanted = ratio_fields if record["method"] in pruned else ratio_fields - {"decode_speedup_over_dense"}
        assert wanted <= record.keys() if record["engine"] == "ctxprune" else not ratio_fields & record.keys()
    whole = 2 * (24 + clock.WARM_UP + 10) * 2 * 2 * 2 * 8 * 4
    assert [record["cache_live_bytes"] for record in methods[2:5]] == [whole] * 3, (
        "the same tokens in every dense cache"
    )
    assert methods[4]["compiled"] is False and methods[4]["cache_allocated_bytes"] == whole
    pools = [record for record in records if record["table"] == "pool"]
    assert [record["method"] for record in pools] == [DENSE, *pruned]
    assert all(record["most_running"] == record["requests"] == 3 for record in pools)
    assert all(one["repeats"] == 3 and one["new_tokens"] == 10 for one in pools)
    assert all(one["temperature"] == 1.0 for one in pools), "the likeliest tokens of a random model are a loop"
    assert pools[0]["live_share_at_end"] == 1.0 and all(one["live_share_at_end"] < 0.8 for one in pools[1:])
    for one in pools:
        low, high = one["tokens_per_second_spread"]
        assert 0 < low <= one["tokens_per_second"] <= high
    low, high = pools[1]["tokens_per_second_over_dense_spread"]
    assert 0 < low <= pools[1]["tokens_per_second_over_dense"] <= high and pools[1]["most_running_over_dense"] == 1
    best = [record["method"] for record in records if record["table"] == "best batch"]
    assert best == [*pruned, DENSE, DYNAMIC, STATIC]
    assert [record["method"] for record in records if record["table"] == "break even"] == pruned
    assert list(here.iterdir()) == []


def test_people_read_a_line_per_record_and_a_comparison_per_case(here, capsys):
    assert __main__.main([*TINY, "generation.drops=[0.8]"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("parity in float64: dense writes the same tokens") and RANDOM in printed[1]
    assert len(printed) == 3 + 5 + 1 + 4 + 1
    assert printed[8].startswith("  ctxprune pruned 80% over dense, dynamic, static: decoding ")
    assert printed[8].count("bytes allow") == 1 and printed[-1].startswith("as fast as dense in our engine at batch 2")


def test_memory_is_measured_in_processes_of_their_own(here, capsys, monkeypatch):
    from pipelines.generation_benchmark import memory

    monkeypatch.setattr(memory, "peak_memory", lambda peer, *_: len(peer.name))
    _, records = run([*TINY, "generation.memory=true", "generation.drops=[0.8]"], capsys)
    peaks = {r["method"]: r["peak_bytes"] for r in records if r.get("table") == "methods" and "absent" not in r}
    assert peaks == {name: len(name) for name in ("ctxprune pruned 80%", DENSE, DYNAMIC, STATIC)}


@pytest.mark.slow
def test_peak_memory_is_that_of_the_cache_at_least():
    from pipelines.generation_benchmark import memory

    settings = dataclasses.replace(SMALL, contexts=[512], drops=[0.9], prefill_chunk=64)
    subject = random_subject(settings, CPU)
    prompts = subject.prompts(8, 512)
    calibrate(subject.pruned[0.9], prompts, 0.9)
    dynamic = next(peer for peer in peers(subject, settings) if peer.name == DYNAMIC)
    assert memory.peak_memory(dynamic, subject, settings, prompts) > 8 * 512 * 2 * 2 * 2 * 8 * 4


def spoiled_attention(monkeypatch):
    right = kernels.decode_attention
    monkeypatch.setattr(kernels, "decode_attention", lambda *given, **more: right(*given, **more) * 1.001)


def spoiled_tokens(monkeypatch):
    monkeypatch.setattr(ours, "prefill", lambda *given: -ours_prefill(*given))


def spoiled_drops(monkeypatch):
    """Steps after which new keys live longer than they should."""
    right = kernels.decode_attention

    def late(*given, guard, **more):
        return right(*given, guard=guard + 8, **more)

    monkeypatch.setattr(kernels, "decode_attention", late)


ours_prefill = ours.prefill


@pytest.mark.parametrize("spoil", [spoiled_attention, spoiled_tokens, spoiled_drops])
def test_wrong_results_are_not_timed(spoil, here, capsys, monkeypatch):
    spoil(monkeypatch)
    for name in ("warmed", "read_in_turn", "steps_in_turn"):
        monkeypatch.setattr(clock, name, lambda *_: pytest.fail("something was timed"))
    code, records = run(TINY, capsys)
    assert code == 1 and [one["kind"] for one in records] == ["parity"] and not records[0]["passed"]
    assert __main__.main(TINY) == 1
    assert "FAILED" in capsys.readouterr().out


MISTAKES = [
    (["generation.batches=[0]"], "generation.batches=0: give a whole number in [1, 65536]"),
    (["generation.batches=[]"], "generation.batches is empty: list at least one"),
    (["generation.drops=[1.0]"], "generation.drops=1.0: give a number in [0, 1)"),
    (["generation.drops=[-0.1]"], "generation.drops=-0.1: give a number in [0, 1)"),
    (["generation.contexts=[1]"], "generation.contexts=1: give a whole number in [2, 1048576]"),
    (["generation.new_tokens=1"], "generation.new_tokens=1: give a whole number in [2, 1048576]"),
    (["generation.heads=3"], "generation.heads=3 does not cut generation.width=32"),
    (["generation.kv_heads=3"], "generation.kv_heads=3 does not divide generation.heads=4"),
    (["generation.pool_gb=1e-6"], "generation.pool_gb=1e-06: one request of 34 tokens may need 2e-05 GB, give more"),
    (["generation.checkpoint=missing"], "no such folder; give one written by train or sweep"),
    (["checkpoint=missing"], "no such folder; give one written by train or sweep"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[words[0] for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_2_and_leaves_nothing(words, expected, here, capsys):
    assert __main__.main([*TINY, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ctxprune: ") and err.count("\n") == 1 and expected in err
    assert list(here.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model's folder: its vocabulary is the tokenizer's."""
    tokenizer = train_tokenizer(stdlib_documents(200_000), vocab_size=300)
    model = models.gated("llama")
    model.resize_token_embeddings(len(tokenizer))
    place = tmp_path_factory.mktemp("saved") / "model"
    ctxprune.save(model, place, tokenizer)
    return place


def test_a_checkpoint_is_measured_on_text_as_it_was_trained(folder, here, capsys):
    words = ["benchmark", "target=generation", f"checkpoint={folder}", "generation.batches=[2]", "data.max_megabytes=1"]
    code, records = run([*words, "generation.contexts=[40]", "generation.new_tokens=4"], capsys)
    methods = {one["method"]: one for one in records if one.get("table") == "methods"}
    assert code == 0 and records[0]["passed"]
    assert list(methods)[:4] == ["ctxprune pruned", DENSE, DYNAMIC, STATIC]
    assert methods["ctxprune pruned"]["gates"] == "trained" and methods["ctxprune pruned"]["dropped"] is None
    assert 0 < methods["ctxprune pruned"]["live_share"] < 1
    assert methods[DENSE]["settings"]["checkpoint"] == "model", "whose, not where it lay"


def test_contexts_beyond_a_checkpoints_positions_are_refused(folder, here, capsys):
    words = ["benchmark", "target=generation", f"checkpoint={folder}", "generation.contexts=[64,100]"]
    assert __main__.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "generation.contexts holds 100" in err and "more than the model's 128 positions" in err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral-sliding", "gemma", "gpt_neox"])
def test_parity_holds_for_other_families_and_policies(family):
    model = models.gated(family)
    found = parity.checked(Subject(twin_of(model), {None: model}, "trained"))
    assert found["passed"] and found["dropped"] > 0.2
    widths = tuple(range(4, 4 + models.LAYERS))
    window = ctxprune.retrofit(models.small_model(family), ctxprune.WindowConfig(widths=widths))
    assert parity.checked(Subject(twin_of(window), {None: window}, "trained"))["passed"]


def test_a_twin_is_the_model_before_it_was_retrofitted_on_the_same_weights():
    model, plain, ids = models.gated("llama"), models.small_model("llama"), models.tokens(2, 20)
    twin = twin_of(model)
    torch.testing.assert_close(twin(ids).logits, plain(ids).logits)
    assert type(twin) is type(plain) and not wrappers(twin) and len(wrappers(model)) == models.LAYERS
    assert twin.model.layers[1].mlp.up_proj.weight.data_ptr() == model.model.layers[1].mlp.up_proj.weight.data_ptr()


def test_calls_of_generate_that_take_turns_write_what_one_call_writes():
    subject = random_subject(SMALL, CPU)
    prompts = subject.prompts(2, 24)
    whole = subject.twin.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=9, do_sample=False, pad_token_id=0
    )
    for room in (None, 40):
        method = theirs.Transformers(subject.twin, prompts, room)
        method.read()
        assert [len(method.steps(count)) for count in (2, 4, 2)] == [1, 3, 1], "a call's first interval is its set-up"
        assert torch.equal(method.text(), whole)


def test_weights_that_a_step_reads():
    model = models.gated("llama")
    gates = models.LAYERS * (2 * 32 * 4 + 1) * 4
    rows = model.get_input_embeddings().weight.numel() * 4
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert weight_bytes(model, True) == whole - rows, "of an embedding that is not the head, rows alone"
    assert weight_bytes(model, False) == whole - rows - gates
    tied = random_subject(SMALL, CPU).pruned[0.5]
    assert weight_bytes(tied, True) == sum(parameter.numel() * 4 for parameter in tied.parameters())


def test_methods_take_turns_in_small_groups_and_all_steps_are_written():
    order, written = [], {"a": 0, "b": 0}

    def method(name):
        def steps(count):
            order.append((name, count))
            written[name] += count
            return [1.0] * count

        return types.SimpleNamespace(steps=steps)

    times = clock.steps_in_turn({"a": method("a"), "b": method("b")}, 17)
    assert order[2:] == [("a", 6), ("b", 6), ("a", 6), ("b", 6), ("a", 5), ("b", 5)]
    assert written == dict.fromkeys("ab", clock.WARM_UP + 17) and len(times["a"]) == 17
    assert tokens_fed(dataclasses.replace(SMALL, new_tokens=17), 100) == 100 + clock.WARM_UP + 17


def test_somebody_elses_code_that_fails_is_left_out_with_what_it_said(here, capsys, monkeypatch):
    def broken(self):
        raise RuntimeError("no cache for\nthis")

    monkeypatch.setattr(theirs.Transformers, "read", broken)
    monkeypatch.setattr(parity, "checked", lambda _: PASSED)
    _, records = run([*TINY, "generation.drops=[0.8]"], capsys)
    found = {one["method"]: one for one in records if one.get("table") == "methods"}
    assert found[STATIC]["absent"] == found[DYNAMIC]["absent"] == "failed here: RuntimeError: no cache for"
    assert found["ctxprune pruned 80%"]["decode_speedup_over_static"] is None
