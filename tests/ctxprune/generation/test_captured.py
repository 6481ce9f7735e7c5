"""Do captured steps write what steps write, and do they ask the device nothing? On a CPU that plays a GPU."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch

import ctxprune
from ctxprune import Alarm
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.generation import captured
from ctxprune.generation.batching import Batcher
from ctxprune.generation.captured import StepRunner
from ctxprune.generation.prompts import page_bytes
from ctxprune.generation.sampling import Sampling
from ctxprune.policies import H2OConfig, SnapKVConfig, TovaConfig
from ctxprune.policies.budget import Budget
from tests import recorded_steps
from tests.models import LAYERS, gated, small_model, tokens

CUT = SnapKVConfig(Budget(share=0.4), sinks=2, recent=3, window=8)
MODELS = {
    "gates": lambda: gated().double(),
    "gates of GPT-2": lambda: gated("gpt2").double(),
    "gates of Qwen3, protected": lambda: gated("qwen3", sinks=2, recent=4).double(),
    "window": lambda: ctxprune.retrofit(small_model(), ctxprune.WindowConfig(widths=(20, 9, 30))).double(),
    "prompt cut once": lambda: ctxprune.retrofit(small_model(), CUT).double(),
    "sliding window": lambda: gated("mistral-sliding").double(),
}
RANKED = {
    "at every step": TovaConfig(Budget(tokens=12), sinks=2, recent=3),
    "head by head": H2OConfig(Budget(share=0.4, head_floor=0.2), apart=True, sinks=2, recent=3),
}
ASKING = {
    **{
        name: lambda config=config: ctxprune.retrofit(small_model(), config).double() for name, config in RANKED.items()
    },
    "in depth": lambda: gated(propagate_in_depth=True).double(),
}


@pytest.fixture
def gpu(monkeypatch):
    """Rows are given room for many steps at once, and steps are captured, by what plays a graph here."""
    monkeypatch.setattr(LayerCache, "looks_ahead", True)
    monkeypatch.setattr(captured, "StepRunner", StepRunner)
    monkeypatch.setattr("ctxprune.generation.batching.StepRunner", partial(StepRunner, capture=recorded_steps.capture))
    with recorded_steps.one_kernel(monkeypatch):
        yield


def served(
    model, counts=(40, 40, 40), *, sampling=None, eos=None, page=16, **how
) -> tuple[list[list[int]], StepRunner]:
    """What requests of several lengths get, and what ran their steps."""
    batcher = Batcher(model, page=page, **how)
    requests = [
        batcher.submit(tokens(1, 9 + 7 * row, seed=row)[0], max_new_tokens=count, sampling=sampling, eos_token_id=eos)
        for row, count in enumerate(counts)
    ]
    batcher.run()
    return [one.tokens for one in requests], batcher.runner


def written(model, *given, **how) -> list[list[int]]:
    return served(model, *given, **how)[0]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_played_steps_write_what_steps_write(make, gpu, request):
    model = make()
    found, runner = served(model)
    assert runner.played >= 20 and runner.capture is not None
    request.getfixturevalue("monkeypatch").undo()
    assert found == written(model)


def test_rows_that_come_and_go_are_captured_anew(gpu, monkeypatch):
    model, how = gated().double(), {"sampling": Sampling(0.8, top_k=20, seed=3), "max_batch": 3}
    counts = (12, 30, 9, 25, 40)
    found, runner = served(model, counts, **how)
    assert 20 <= runner.played < sum(counts)
    monkeypatch.undo()
    assert found == written(model, counts, **how)


def test_a_full_pool_and_an_end_of_text_are_met_between_captured_steps(gpu, monkeypatch):
    model = gated(beta=1e4).double()
    how = {"max_cache_bytes": 12 * LAYERS * page_bytes(model, 16), "sampling": Sampling(1.0, seed=7), "eos": 5}
    found, runner = served(model, **how)
    assert runner.played > 10
    monkeypatch.undo()
    assert found == written(model, **how)


def test_a_pool_that_holds_the_next_token_is_enough_though_not_for_those_ahead(gpu, monkeypatch):
    """The twin: told to look ahead only, a row waits that has room."""
    model = gated(beta=1e4).double()
    pool = 2 * 3 * LAYERS * page_bytes(model, 16)  # at the end 3 for each of the rows below

    def pauses() -> int:
        batcher = Batcher(model, page=16, max_cache_bytes=pool)
        requests = [batcher.submit(tokens(1, n)[0], max_new_tokens=18) for n in (16, 30)]
        batcher.run()
        assert all(len(one.tokens) == 18 for one in requests)
        return sum(one.pauses for one in requests)

    assert pauses() == 0
    original = LayerCache.rows_without_room
    monkeypatch.setattr(LayerCache, "rows_without_room", lambda layer, step, ahead: original(layer, step))
    assert pauses() > 0


def test_dense_rows_are_captured_too(gpu, monkeypatch):
    model = gated().double()
    with ctxprune.mode(model, "dense"):
        found, runner = served(model)
        assert runner.played >= 20
        monkeypatch.undo()
        assert found == written(model)


@pytest.mark.parametrize("make", ASKING.values(), ids=ASKING.keys())
def test_what_asks_the_device_at_every_step_is_not_captured(make, gpu, monkeypatch):
    model = make()
    found, runner = served(model)
    assert runner.played == 0
    monkeypatch.undo()
    assert found == written(model)


@pytest.mark.parametrize("how", [{"max_live_tokens": 12}, {"alarm": Alarm(share=0.1)}], ids=["cap", "alarm"])
def test_a_cap_and_an_alarm_are_not_captured(how, gpu, monkeypatch):
    model = gated().double()
    found, runner = served(model, **how)
    assert runner.played == 0
    monkeypatch.undo()
    assert found == written(model, **how)


def test_a_model_that_asks_the_device_itself_goes_on_without_graphs_and_says_so(gpu, monkeypatch):
    model = gated().double()
    norm, original = model.model.norm, model.model.norm.forward
    norm.forward = lambda hidden: original(hidden) if hidden.isfinite().all() else hidden
    with pytest.warns(UserWarning, match="without CUDA graphs: aten.*is not permitted"):
        found, runner = served(model)
    assert runner.played == 0 and not runner.state.graphs
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert written(model) == found
    monkeypatch.undo()
    assert found == written(model)


def test_a_capture_that_is_interrupted_leaves_all_as_it_was_and_the_text_goes_on(gpu):
    def broken(step):
        step()
        raise KeyboardInterrupt

    model = gated().double()
    batcher = Batcher(model, page=16)
    one = batcher.submit(tokens(1, 9)[0], max_new_tokens=40)
    batcher.runner.capture, left, put_back = broken, [], batcher._put_back

    def look() -> None:
        left.append((batcher.cache.lengths.tolist(), batcher.cache.get_seq_length()))
        put_back()

    batcher._put_back = look
    with pytest.raises(KeyboardInterrupt):
        batcher.run()
    fed = 9 + len(one.tokens) - 1
    assert left == [([fed], fed)] and 0 < len(one.tokens) < 40 and list(batcher.waiting) == [one]
    batcher.runner.capture, batcher.runner.state.graphs = recorded_steps.capture, True
    batcher.run()
    assert batcher.runner.played > 0
    assert one.tokens == ctxprune.generate(model, tokens(1, 9), max_new_tokens=40).tokens[0].tolist()


def test_weights_that_are_others_are_captured_anew_and_hooks_see_every_step(gpu, monkeypatch):
    model = gated().double()
    batcher = Batcher(model, page=64)
    one = batcher.submit(tokens(1, 9)[0], max_new_tokens=30)
    while len(one.tokens) < 10:
        batcher.step()
    before, weight = batcher.runner.play, model.lm_head.weight
    assert before is not None
    weight.data = weight.data.flip(0)
    seen = []
    for _ in range(4):
        batcher.step()
    assert batcher.runner.play not in (None, before)
    hook = model.model.norm.register_forward_hook(lambda *given: seen.append(1))
    batcher.run()
    assert len(seen) == 29 - 14  # the last token is not read
    hook.remove()
    monkeypatch.undo()
    monkeypatch.setattr(weight, "data", weight.data.flip(0))
    fresh = Batcher(model, page=64)
    other = fresh.submit(tokens(1, 9)[0], max_new_tokens=30)
    while len(other.tokens) < 10:
        fresh.step()
    weight.data = weight.data.flip(0)
    fresh.run()
    assert one.tokens == other.tokens


def test_under_autocast_nothing_is_captured(gpu):
    with torch.autocast("cpu", torch.bfloat16):
        assert served(gated())[1].played == 0


def test_what_was_written_before_an_error_is_there(monkeypatch):
    """Nobody had asked for these tokens yet."""
    batcher = Batcher(gated())
    one = batcher.submit(tokens(1, 9)[0], max_new_tokens=30)
    original = batcher._feed
    monkeypatch.setattr(batcher, "_feed", lambda: original() if batcher.steps < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batcher.run()
    assert len(one.tokens) == 6


def test_without_triton_nothing_is_tried_and_nothing_is_said(gpu):
    batcher = Batcher(gated())
    batcher.submit(tokens(1, 9)[0], max_new_tokens=30)
    batcher.runner.only_by_triton = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batcher.run()
    assert batcher.runner.played == 0 and not batcher.runner.state.graphs


def test_a_graph_of_buffers_that_have_moved_would_write_something_else(gpu, monkeypatch):
    """The twin of the comparison: a pool that has grown is another."""
    model = gated(beta=1e4).double()
    right = written(model, (60, 60))
    monkeypatch.setattr(StepRunner, "_buffers", lambda runner: ())
    assert written(model, (60, 60)) != right


def waits_of(model, count: int, **how) -> int:
    waits = recorded_steps.Waits()
    with recorded_steps.Leaving(waits.left), waits:
        written(model, (count, count, count), page=64, **how)
    return waits.count


def test_no_step_waits_for_the_device(gpu, monkeypatch):
    """Beside what a prompt, a page and a row's end ask; played or not. Whoever listens to each token waits for it."""
    model = gated(beta=1e4).double()
    greedy = waits_of(model, 28) - waits_of(model, 12)
    sampled = {"sampling": Sampling(0.8, top_k=20)}
    assert greedy == 0 == waits_of(model, 28, **sampled) - waits_of(model, 12, **sampled)
    monkeypatch.setattr("ctxprune.generation.captured.StepRunner._may_be_captured", lambda runner: False)
    assert waits_of(model, 28) - waits_of(model, 12) == 0
    assert waits_of(model, 28, eos=96) - waits_of(model, 12, eos=96) >= 16


def test_nothing_is_captured_without_a_gpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, runner = served(gated())
    assert runner.capture is None and runner.played == 0
