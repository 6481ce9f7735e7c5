"""Does a token that leaves the residual stream leave it whole? Gathered states against a full pass under masks.

The reference keeps every column: what was dropped is masked as a key and its state stands still.
"""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import transformers as tf

from tests.hidden_reference import (
    ALL,
    CONFIGS,
    DECODERS,
    ENCODERS,
    LENGTHS,
    SHARES,
    HiddenPruningConfig,
    Stream,
    dense,
    hidden_layer,
    hidden_stream,
    inputs,
    masked,
    model_of,
    prune_hidden,
    pruned,
    pruning_of,
    release_hidden,
    said,
)
from tests.models import LAYERS

every_model = pytest.mark.parametrize("family", ALL)
every_config = pytest.mark.parametrize("name", CONFIGS)
ROTARY = ("llama", "qwen3", "gpt_neox", "phi")


@torch.no_grad()
def test_a_pruned_model_survives_pickling():
    batch = inputs("llama", LENGTHS)
    model = pruned("llama")
    model(**batch, past_key_values=(cache := tf.DynamicCache()), use_cache=True)
    again = pickle.loads(pickle.dumps(model))
    assert cache in pruning_of(model).prompts and not pruning_of(again).prompts
    assert torch.equal(said(again, "llama", batch), said(model, "llama", batch))


@every_model
@pytest.mark.parametrize("lengths", [[14, 14], LENGTHS], ids=["even", "padded"])
def test_keeping_everything_is_bit_identical(family, lengths):
    batch, original = inputs(family, lengths), model_of(family).float()
    wanted = said(original, family, batch)
    asked = HiddenPruningConfig(threshold=(0.0, 1e-300, 1e-300), score="norm")
    for config in (HiddenPruningConfig(keep=(1.0,) * LAYERS), asked):
        model = prune_hidden(model_of(family).float(), config)
        assert torch.equal(said(model, family, batch), wanted)
        assert pruning_of(model).stats.achieved == (1.0,) * LAYERS
    model = prune_hidden(model_of(family).float(), CONFIGS["attention"])
    assert not torch.equal(said(model, family, batch), wanted)
    with dense(model):
        assert torch.equal(said(model, family, batch), wanted)
        assert pruning_of(model).stats is None
    released = release_hidden(model)
    assert torch.equal(said(released, family, batch), wanted)
    assert released.state_dict().keys() == original.state_dict().keys()


def gap(family: str, name: str, lengths: list[int], left: bool | None = None) -> float:
    """Largest difference between gathered states and the reference, as a part of the largest logit."""
    batch, model = inputs(family, lengths, left), pruned(family, name)
    found = said(model, family, batch)
    stats = pruning_of(model).stats
    assert stats.tokens[-1] < stats.tokens[0]
    wanted = said(masked(family, stats.kept), family, batch)
    return float((found - wanted).abs().max() / wanted.abs().max())


@every_model
@every_config
def test_gathering_equals_masking(family, name):
    assert gap(family, name, LENGTHS) < 1e-12
    assert gap(family, name, [19] * 4) < 1e-12


@pytest.mark.parametrize("family", ["llama", "bert-words"])
def test_the_other_side_can_be_padded_too(family):
    assert gap(family, "attention", LENGTHS, left=family not in DECODERS) < 1e-12


def renumbered(states: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """What is told about each survivor is that of as many first columns."""
    return states[:, : slot.shape[1]]


def zeros_elsewhere(stream, hidden: torch.Tensor) -> torch.Tensor:
    empty = torch.zeros_like(stream.left)
    return empty.scatter(1, stream._target()[:, :, None].expand_as(hidden), hidden)[:, : stream.n]


BUGS = {
    "copies are seen": ("bert-words", "attention", hidden_stream, "hidden_from_all", lambda mask, alive: mask),
    "dropped tokens come out as zeros": ("bert-words", "attention", Stream, "restored", zeros_elsewhere),
    "copies are written": ("llama", "threshold", Stream, "_target", lambda stream: stream.column),
}


@pytest.mark.parametrize("family, name, where, what, bug", BUGS.values(), ids=BUGS.keys())
def test_twin_a_planted_bug_is_seen(family, name, where, what, bug, monkeypatch):
    lengths = [19] * 4 if name == "threshold" else LENGTHS
    assert gap(family, name, lengths) < 1e-12
    monkeypatch.setattr(where, what, bug)
    assert gap(family, name, lengths) > 1e-6


@pytest.mark.parametrize("family", ROTARY)
def test_twin_survivors_that_are_numbered_anew_are_seen(family, monkeypatch):
    monkeypatch.setattr(hidden_layer, "taken", renumbered)
    assert gap(family, "attention", [15, 15]) > 1e-6


@every_model
@every_config
def test_a_row_does_not_depend_on_its_neighbours(family, name):
    model, batch = pruned(family, name), inputs(family, LENGTHS)
    together = said(model, family, batch)
    kept = pruning_of(model).stats.kept
    alone = []
    for row, length in enumerate(LENGTHS):
        alone.append(said(model, family, inputs_of_row(family, batch, row)))
        one = pruning_of(model).stats.kept[:, 0]
        assert torch.equal(kept[:, row][:, batch["attention_mask"][row].bool()], one), f"row {row} of {length}"
    wanted = torch.cat(alone)
    assert float((together - wanted).abs().max()) < 1e-10 * float(wanted.abs().max())


def test_a_decoder_that_is_told_to_look_both_ways_is_pruned_as_one_that_does():
    """Its attention says of itself that it is causal; the keyword that transformers hands it says it is not."""
    settings = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = tf.LlamaConfig(**settings, num_attention_heads=4, num_key_value_heads=2, is_causal=False)
    torch.manual_seed(0)
    model = tf.LlamaModel._from_config(config, attn_implementation="sdpa").double().eval()
    ids, real = torch.randint(3, 90, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    real[1, 9:] = 0
    dense = model(ids[:1], use_cache=False).last_hidden_state
    changed = torch.cat([ids[:1, :-1], (ids[:1, -1:] + 1)], 1)
    assert not torch.allclose(model(changed, use_cache=False).last_hidden_state[:, 0], dense[:, 0]), "it looks ahead"
    prune_hidden(model, HiddenPruningConfig(keep=(1.0, 0.5)))
    together = model(ids, attention_mask=real, use_cache=False).last_hidden_state[:1]
    kept = pruning_of(model).stats.kept[:, 0]
    alone = model(ids[:1], use_cache=False).last_hidden_state
    assert torch.equal(kept, pruning_of(model).stats.kept[:, 0])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("family", ["llama", "bert-words"])
def test_a_pruned_model_is_saved_under_its_own_names_and_loads_them(family, tmp_path):
    config = HiddenPruningConfig(keep=(1.0, 0.5, 0.5))
    model = prune_hidden(model_of(family), config)
    plain = model_of(family)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    back, said = type(plain).from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    changed = {name: tensor + 1 for name, tensor in back.state_dict().items()}
    model.load_state_dict(changed)
    release_hidden(model)
    assert all(torch.equal(tensor, changed[name].to(tensor)) for name, tensor in model.state_dict().items())


def inputs_of_row(family: str, batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """The row by itself, without padding."""
    there = batch["attention_mask"][row].bool()
    return {name: value[row : row + 1, there] for name, value in batch.items()}


@pytest.mark.parametrize("score", ["attention", "norm", "random"])
@pytest.mark.parametrize("family", ["llama", "bert-words"])
def test_protected_tokens_stay_however_little_is_kept(family, score):
    for first, last in ((0, 0), (1, 1), (3, 2)):
        config = HiddenPruningConfig(keep=(1.0, 0.01, 0.01), score=score, protect_first=first, protect_last=last)
        model = prune_hidden(model_of(family), config)
        for n in range(1, 9):
            assert torch.isfinite(said(model, family, inputs(family, [n, 8]))).all()
            kept = pruning_of(model).stats.kept
            row = kept[:, 0, -n:] if family in DECODERS else kept[:, 0, :n]
            # A decoder's last token and an encoder's first one, whatever the config says.
            begin, end = (first, max(1, last)) if family in DECODERS else (max(1, first), last)
            assert row[:, :begin].all() and row[:, max(0, n - end) :].all()
            assert (row.sum(1)[1:] == min(n, max(1, begin + end))).all()
            assert row[0].all()


@pytest.mark.parametrize("family", ["llama", "bert-words", "gpt2"])
def test_what_was_asked_for_is_what_is_kept(family):
    model = pruned(family)
    said(model, family, inputs(family, LENGTHS))
    stats = pruning_of(model).stats
    exact = [sum(math.ceil(share * length) for length in LENGTHS) for share in (1.0, 0.7)]
    # At 0.35 the protected first and last token are more than a row of 1 or 7 tokens may keep, or as many.
    exact += [sum(max(math.ceil(0.35 * length), min(2, length)) for length in LENGTHS)]
    assert stats.tokens == tuple(exact) and stats.requested == SHARES
    assert stats.achieved == tuple(count / sum(LENGTHS) for count in exact)
    assert stats.seconds > 0
    even = inputs(family, [20, 20])
    said(model, family, even)
    assert pruning_of(model).stats.achieved == SHARES


@pytest.mark.parametrize("family", ["llama", "gpt2", *ENCODERS])
def test_deeper_layers_get_fewer_states(family, monkeypatch):
    seen = []
    was = hidden_stream.sdpa_attention_forward
    monkeypatch.setattr(
        hidden_stream,
        "sdpa_attention_forward",
        lambda module, query, *rest, **more: (seen.append(query.shape[2]), was(module, query, *rest, **more))[1],
    )
    said(pruned(family), family, inputs(family, [20, 10]))
    assert seen == [20, 14, 7]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-words"])
def test_a_dropped_token_comes_out_as_it_was_when_it_left(family):
    model, batch = pruned(family), inputs(family, [20, 20])
    with torch.no_grad():
        states = model.base_model(**batch).last_hidden_state
        kept = pruning_of(model).stats.kept
        with dense(model):
            full = model.base_model(**batch, output_hidden_states=True).hidden_states
    last_norm = next(
        (getattr(model.base_model, name) for name in ("norm", "ln_f") if hasattr(model.base_model, name)), None
    )
    left = full[1] if last_norm is None else last_norm(full[1])
    gone = kept[0] & ~kept[1]
    assert gone.sum() == 12
    assert torch.equal(states[gone], left[gone])
    assert not torch.isclose(states[kept[2]], left[kept[2]]).any(-1).all()


@pytest.mark.parametrize("family", ["llama", "bert-words"])
def test_a_mask_that_is_added_hides_as_one_that_says_no(family):
    batch, model = inputs(family, LENGTHS), pruned(family)
    wanted = said(model, family, batch)
    kept, n = pruning_of(model).stats.kept, max(LENGTHS)
    seen = batch["attention_mask"].bool()[:, None, None].expand(-1, 1, n, n)
    seen = seen.tril() if family in DECODERS else seen
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    extra = {"use_cache": False} if family in DECODERS else {}
    with torch.no_grad():
        found = model(**batch | {"attention_mask": added}, **extra).logits[batch["attention_mask"].bool()]
    assert torch.equal(pruning_of(model).stats.kept, kept)
    assert torch.allclose(found, wanted, atol=1e-12)
