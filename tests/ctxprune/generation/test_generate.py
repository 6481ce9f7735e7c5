"""Is generated text what repeated full passes under the step function would write, row by row?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ctxprune
from ctxprune import UserError, generate
from ctxprune.generation.request import ends_of
from ctxprune.generation.sampling import Sampling, pick
from ctxprune.retrofitting import state_of, wrappers
from tests.models import LAYERS, VOCAB, gated, small_model, tokens


@torch.no_grad()
def by_full_passes(model, prompt: torch.Tensor, count: int) -> list[int]:
    """Greedy continuation by a whole forward pass per token."""
    ids = prompt[None]
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-sliding"])
@pytest.mark.parametrize("depth", [False, True])
def test_greedy_text_is_the_argmax_of_full_passes(family, depth):
    model, ids = gated(family, propagate_in_depth=depth).double(), tokens(2, 12)
    made = generate(model, ids, max_new_tokens=20)
    assert [row.tolist() for row in made.tokens] == [by_full_passes(model, row, 20) for row in ids]
    assert all(0 < live < 31 for live in made.live_tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_ragged_prompts_are_each_as_if_alone(family):
    model = gated(family).double()
    prompts = [tokens(1, n, seed=n)[0] for n in (3, 11, 1, 8)]
    together = generate(model, prompts, max_new_tokens=15)
    alone = [generate(model, [prompt], max_new_tokens=15) for prompt in prompts]
    assert [row.tolist() for row in together.tokens] == [one.tokens[0].tolist() for one in alone]
    assert together.live_tokens == [one.live_tokens[0] for one in alone]


def test_each_row_ends_at_its_own_end_of_text_and_leaves_the_cache():
    model, ids = gated().double(), tokens(4, 10)
    free = [row.tolist() for row in generate(model, ids, max_new_tokens=20).tokens]
    end = free[0][3]
    wanted = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in wanted}) > 1
    made = generate(model, ids, max_new_tokens=20, eos_token_id=end)
    assert [row.tolist() for row in made.tokens] == wanted
    either = [end, free[1][5]]
    made = generate(model, ids, max_new_tokens=20, eos_token_id=either)
    ends = [next((place for place, token in enumerate(row) if token in either), 19) for row in free]
    assert [row.tolist() for row in made.tokens] == [row[: end + 1] for row, end in zip(free, ends, strict=True)]


def test_a_token_that_ends_may_be_a_number_of_torch_or_numpy():
    assert ends_of(torch.tensor(3)) == ends_of(np.int64(3)) == ends_of(3) == {3} and ends_of(None) == set()
    assert ends_of(torch.tensor([3, 5])) == ends_of((np.int32(3), 5)) == {3, 5}
    with pytest.raises(TypeError):
        ends_of(3.5)


def test_it_stops_when_every_row_has_ended():
    model, ids, heard = gated().double(), tokens(1, 10), []
    first = generate(model, ids, max_new_tokens=1).tokens[0].item()
    made = generate(
        model, ids, max_new_tokens=20, eos_token_id=first, on_token=lambda row, token: heard.append((row, token))
    )
    assert made.tokens[0].tolist() == [first] and heard == [(0, first)]


def test_live_tokens_are_the_mean_over_layers_at_the_last_step():
    model, ids = gated().double(), tokens(2, 10)
    made = generate(model, ids, max_new_tokens=9)
    for row in range(2):
        text = torch.cat([ids[row], made.tokens[row][:-1]])[None]
        times = ctxprune.drop_times(model, text).drop_time
        assert made.live_tokens[row] == pytest.approx((times >= text.shape[1]).sum().item() / LAYERS)


@pytest.mark.parametrize("chunk", [0, 1, 6, 7])
def test_prefill_in_pieces_writes_the_same_text(chunk):
    model, prompts = gated().double(), [tokens(1, n, seed=n)[0] for n in (20, 17, 3, 21)]
    whole = generate(model, prompts, max_new_tokens=10)
    pieces = generate(model, prompts, max_new_tokens=10, prefill_chunk=chunk)
    assert [a.tolist() for a in whole.tokens] == [b.tolist() for b in pieces.tokens]
    assert whole.live_tokens == pieces.live_tokens


def test_tokens_are_heard_as_they_are_written():
    model, ids, heard = gated().double(), tokens(3, 8), []
    made = generate(model, ids, max_new_tokens=5, on_token=lambda row, token: heard.append((row, token)))
    assert [row for row, _ in heard] == [0, 1, 2] * 5
    for row in range(3):
        assert [token for heard_row, token in heard if heard_row == row] == made.tokens[row].tolist()


def test_bfloat16_writes():
    made = generate(gated().to(torch.bfloat16), [tokens(1, 9)[0], tokens(1, 4)[0]], max_new_tokens=40, temperature=1.0)
    assert [len(row) for row in made.tokens] == [40, 40]
    assert all(0 <= token < VOCAB for row in made.tokens for token in row.tolist())


def test_long_texts_shrink_and_grow_without_changing_the_greedy_text():
    """80 steps: the buffers are looked at twice."""
    model, ids = gated().double(), tokens(1, 12)
    made = generate(model, ids, max_new_tokens=80)
    text = torch.cat([ids[0], made.tokens[0]])[None]
    with torch.no_grad():
        assert model(text).logits[0, 11:-1].argmax(-1).tolist() == made.tokens[0].tolist()


def test_dense_mode_writes_what_the_original_writes():
    model, ids = gated().double(), tokens(1, 12)
    with ctxprune.mode(model, "dense"):
        made = generate(model, ids, max_new_tokens=15)
    assert made.tokens[0].tolist() == by_full_passes(small_model().double(), ids[0], 15)
    assert made.live_tokens == [12 + 14]


def test_sampling_is_reproducible_and_a_row_does_not_depend_on_its_neighbours():
    model, ids = gated().double(), tokens(3, 8)
    how = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 20, "top_p": 0.9}
    one, two = (generate(model, ids, seed=5, **how).tokens for _ in range(2))
    assert [row.tolist() for row in one] == [row.tolist() for row in two]
    other = generate(model, ids, seed=6, **how).tokens
    assert [row.tolist() for row in one] != [row.tolist() for row in other]
    alone = generate(model, ids[2:], seed=5 + 2, **how).tokens
    assert one[2].tolist() == alone[0].tolist()


def test_top_k_and_top_p_exclude_what_they_say():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generators = [torch.Generator().manual_seed(0)]

    def drawn(**how) -> set[int]:
        return {int(pick(logits, [Sampling(temperature=1.0, **how)], generators)) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1} and drawn(top_k=9) == {0, 1, 2, 3}
    assert drawn(top_p=0.6) == {0, 1} and drawn(top_p=0.01) == {0} and drawn(top_p=0.9) == {0, 1, 2}
    assert int(pick(logits, [Sampling()], generators)) == 0


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 200}, "exceed the model's 128 positions"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 2.0}, "top_p is 2"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(how, named):
    with pytest.raises(UserError, match=named) as caught:
        generate(gated(), tokens(1, 4), **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ([], "prompt is empty"),
        ([torch.tensor([], dtype=torch.long)], "prompt is empty"),
        ([torch.tensor([1, 2]), torch.tensor([], dtype=torch.long)], "prompt is empty"),
        ([torch.tensor([VOCAB])], "outside the model's vocabulary"),
        ([torch.tensor([-1])], "outside the model's vocabulary"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, named):
    with pytest.raises(UserError, match=named):
        generate(gated(), prompts)


def test_the_model_is_left_as_it_was_even_after_an_error():
    model = gated().train()

    def interrupt(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokens(1, 4), on_token=interrupt)
    assert model.training and state_of(model).mode == "auto" and all(w.training for w in wrappers(model))
