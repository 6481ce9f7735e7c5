"""Do the blocked forward and the backward by hand equal the paper's product form, in value and in every gradient?"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from ctxprune import kernels
from ctxprune.kernels.soft_attention import torch_path, torch_segments
from tests.ctxprune.kernels.problems import RANK, WIDTH, assert_same, documents, eager, inputs, run


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.5, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_output_alive_and_all_gradients_are_the_references(alpha, kv_heads, n):
    batch = 1 if n > 65 else 2
    tensors, plan = inputs(4, kv_heads, n, batch), documents(n, batch)
    assert_same(run(tensors, alpha, **plan), run(tensors, alpha, "reference", **plan))


@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.5, 2.0, 3.0, 8.0])
def test_gradients_by_finite_differences(alpha, monkeypatch):
    monkeypatch.setattr(torch_segments, "BLOCK", 2)
    tensors = [tensor.requires_grad_() for tensor in inputs(2, 1, 5, 1, beta=0.4)]
    plan = documents(5, 1, sinks=1, recent=0)
    assert torch.autograd.gradcheck(
        lambda *t: kernels.pruned_attention(*t, alpha, **plan), tensors, eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("alpha", [1.5, 2.0, 8.0])
def test_all_gates_open_is_plain_causal_attention(alpha):
    query, key, value, *gates, _ = inputs(4, 4, 70)
    output, alive = kernels.pruned_attention(query, key, value, *gates, torch.tensor(1e4).double(), alpha)
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value, is_causal=True))
    assert alive.tolist() == [70 * 69 / 2] * 2


@pytest.mark.parametrize("alpha", [1.5, 2.0, 8.0])
def test_all_gates_closed_leaves_a_token_its_own_value(alpha):
    query, key, value, *gates, _ = inputs(4, 4, 70)
    output, alive = kernels.pruned_attention(query, key, value, *gates, torch.tensor(-1e4).double(), alpha)
    assert torch.equal(output, value)
    assert alive.tolist() == [0.0, 0.0]


def test_saturated_gates_are_the_step_function():
    """Whole-number logits of +-1/2 and more: at alpha = 8 every gate is exactly 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = inputs(4, 2, 40)
    tensors[3], tensors[4] = (torch.randint(0, 2, (2, 40, RANK), generator=generator).double() for _ in range(2))
    tensors[5] = torch.tensor(-0.25, dtype=torch.float64)
    gates, plan = tensors[3:], documents(40)
    output, _ = kernels.pruned_attention(*tensors, 8.0, **plan)
    times = kernels.drop_times(*gates, **plan)
    assert 0 < (times < plan["end"]).double().mean() < 1
    torch.testing.assert_close(output, kernels.drop_time_attention(*tensors[:3], times))


def test_packed_documents_are_as_if_alone():
    tensors = inputs(4, 2, 50, 1)
    output, alive = kernels.pruned_attention(*tensors, 1.5, end=torch.where(torch.arange(50) < 20, 20, 50)[None])
    parts = [slice(0, 20), slice(20, 50)]
    alone = []
    for part in parts:
        attention = [tensor[:, :, part] for tensor in tensors[:3]]
        alone.append(kernels.pruned_attention(*attention, *(t[:, part] for t in tensors[3:5]), tensors[5], 1.5))
    torch.testing.assert_close(output, torch.cat([piece for piece, _ in alone], dim=2))
    torch.testing.assert_close(alive, sum(count for _, count in alone))


def test_protected_keys_are_seen_whole_by_every_query():
    closed = inputs(4, 4, 30, 1)[:5] + [torch.tensor(-1e4).double()]
    column = torch.arange(30)
    _, alive = kernels.pruned_attention(*closed, 2.0, guard=torch.where(column < 2, 30, column + 4)[None])
    # Two sinks seen by all later queries; every other key by the three after it.
    assert alive.item() == (29 + 28) + sum(min(3, 29 - j) for j in range(2, 30))


def test_the_future_has_no_influence():
    tensors = inputs(4, 2, 70)
    before, _ = kernels.pruned_attention(*tensors, 1.5)
    changed = [t.clone() for t in tensors]
    for tensor in changed[:3]:
        tensor[:, :, 40:] = 9.0
    for tensor in changed[3:5]:
        tensor[:, 40:] = -3.0
    after, _ = kernels.pruned_attention(*changed, 1.5)
    torch.testing.assert_close(before[:, :, :40], after[:, :, :40], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, :, 40:], after[:, :, 40:])


def test_changes_of_basis_change_nothing():
    query, key, value, iq, ik, beta = inputs(4, 2, 30)
    before, alive = kernels.pruned_attention(query, key, value, iq, ik, beta, 1.5)
    turn, _ = torch.linalg.qr(torch.randn(RANK, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    scale = WIDTH**-0.5
    same = {
        "rotated interaction": (query, key, value, iq @ turn, ik @ turn, beta, 1.5, scale),
        "scale in the query": (query * 4, key, value, iq, ik, beta, 1.5, scale / 4),
        "shifted keys": (query, key + key[:, :, :1], value, iq, ik, beta, 1.5, scale),
    }
    for name, (*arguments, factor) in same.items():
        output, count = kernels.pruned_attention(*arguments, scale=factor)
        torch.testing.assert_close(output, before, msg=name)
        torch.testing.assert_close(count, alive, msg=name)
    shifted, _ = kernels.pruned_attention(query, key, value + 3.0, iq, ik, beta, 1.5)
    torch.testing.assert_close(shifted, before + 3.0)
    heads = torch.tensor([2, 3, 0, 1])
    moved, _ = kernels.pruned_attention(query[:, heads], key.flip(1), value.flip(1), iq, ik, beta, 1.5)
    torch.testing.assert_close(moved, before[:, heads])


@pytest.mark.parametrize("alpha", [1.0, 1.1, 2.0, 8.0])
def test_float32_errs_at_most_twice_as_much_as_the_eager_form(alpha, monkeypatch):
    tensors, plan = inputs(4, 2, 100, dtype=torch.float32), documents(100)
    exact = run(tensors, alpha, "reference", **plan)
    fast = run(tensors, alpha, **plan)
    monkeypatch.setitem(kernels.IMPLEMENTATIONS["pruned_attention"], "eager", lambda *a: eager(*a[:-1]))
    plain = run(tensors, alpha, "eager", **plan)
    for name, wanted in exact.items():
        scale = 1e-6 * max(1.0, wanted.abs().max().item())
        allowed = 2 * (plain[name] - wanted).abs().max().item() + scale
        assert (fast[name] - wanted).abs().max().item() <= allowed, name


@pytest.mark.parametrize("margin", [1e-2, 1e-4, 1e-6])
def test_a_gate_close_to_zero_does_not_magnify_rounding(margin):
    """Query 50 all but drops every key (alpha = 2: its gates are margin / 2); dLoss/dx divides by the gate there."""
    tensors = inputs(4, 2, 100, dtype=torch.float32, beta=1.0)
    tensors[3], tensors[4] = torch.zeros(2, 100, RANK), torch.zeros(2, 100, RANK)
    tensors[3][:, 50, 0], tensors[4][..., 0] = 1.0, -2 * (2 - margin)
    exact, fast = run(tensors, 2.0, "reference"), run(tensors, 2.0)
    assert_same(fast, exact, 1e-5)


@pytest.mark.parametrize("alpha", [1.1, 8.0])
def test_bfloat16_inputs_lose_only_the_rounding_of_the_results(alpha):
    tensors, plan = inputs(4, 2, 70, dtype=torch.bfloat16), documents(70)
    exact, fast = run(tensors, alpha, "reference", **plan), run(tensors, alpha, **plan)
    # The gradient of the output itself arrives rounded, which is why gradients get a little more room.
    for name, wanted in exact.items():
        assert fast[name].dtype == (torch.float32 if name == "alive" else torch.bfloat16)
        room = 2**-8 if name in ("output", "alive") else 2**-6
        assert (fast[name] - wanted).abs().max() <= room * max(1.0, wanted.abs().max().item()), name


@pytest.mark.parametrize("block", [1, 7, 64, 256])
@pytest.mark.parametrize(("gates", "weights"), [(0, 0), (0, 1 << 24), (1024, 0)])
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(block, gates, weights, monkeypatch):
    tensors, plan = inputs(4, 2, 70), documents(70)
    wanted = run(tensors, 1.5, **plan)
    monkeypatch.setattr(torch_segments, "BLOCK", block)
    monkeypatch.setattr(torch_path, "KEEP_GATES_UP_TO", gates)
    monkeypatch.setattr(torch_path, "KEEP_WEIGHTS_UP_TO", weights)
    assert_same(run(tensors, 1.5, **plan), wanted, 1e-12)


def cut_into_segments(monkeypatch, segment: int = 16, block: int = 8, worth: float = 0.7) -> list[int]:
    """As long rows are computed, at a few tokens; returns the keys each block of queries was computed with, a list
    that grows."""
    monkeypatch.setattr(torch_segments, "SEGMENTS_FROM", 0)
    monkeypatch.setattr(torch_segments, "SEGMENT", segment)
    monkeypatch.setattr(torch_segments, "BLOCK", block)
    monkeypatch.setattr(torch_segments, "WORTH_GATHERING", worth)
    monkeypatch.setattr(torch_path, "KEEP_GATES_UP_TO", 0)
    monkeypatch.setattr(torch_path, "KEEP_WEIGHTS_UP_TO", 0)
    seen, weights = [], torch_segments.Layer.weights

    def counted(layer, keys, *more):
        seen.append(keys.key.shape[2])
        return weights(layer, keys, *more)

    monkeypatch.setattr(torch_segments.Layer, "weights", counted)
    return seen


@pytest.mark.parametrize("worth", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("beta", [-1.0, 1.5])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 3.0, 8.0])
def test_leaving_out_what_is_gone_changes_nothing(alpha, beta, worth, monkeypatch):
    tensors, plan = inputs(4, 2, 75, beta=beta), documents(75)
    wanted = run(tensors, alpha, "reference", **plan)
    cut_into_segments(monkeypatch, worth=worth)
    assert_same(run(tensors, alpha, **plan), wanted)


def test_keys_that_are_gone_are_not_computed(monkeypatch):
    """Every key lives for at most 9 queries: a segment of 16 sees those, and its own."""
    seen = cut_into_segments(monkeypatch)
    end = (torch.arange(75) + 9).clamp(max=75).expand(2, 75)
    run(inputs(4, 2, 75), 1.5, end=end)
    assert max(seen) <= 8 + 16
    seen.clear()
    cut_into_segments(monkeypatch, worth=0.0)  # the twin: nothing is ever worth gathering
    run(inputs(4, 2, 75), 1.5, end=end)
    assert max(seen) == 75


@pytest.mark.parametrize("kept", [0, 1 << 24])
def test_uninitialised_memory_is_never_read(kept, monkeypatch):
    monkeypatch.setattr(torch_path, "KEEP_GATES_UP_TO", kept)
    monkeypatch.setattr(torch_path, "KEEP_WEIGHTS_UP_TO", kept)
    tensors, plan = inputs(4, 2, 70), documents(70)
    wanted = run(tensors, 1.5, **plan)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()  # fresh memory is poisoned
        poisoned = run(tensors, 1.5, **plan)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(poisoned, wanted, 0.0)


@pytest.mark.parametrize("alpha", [1.1, 2.0, 8.0])
def test_log_survival_is_the_log_of_the_product_form(alpha):
    from ctxprune.kernels.soft_attention import reference

    gates, plan = inputs(n=30)[3:], documents(30)
    log_alive = kernels.log_survival(*gates, alpha, **plan)
    torch.testing.assert_close(log_alive.exp().tril(), reference.survival(*gates, alpha, **plan))
    assert not log_alive.triu().any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own look at it
def test_torch_compile_takes_what_lies_around_it():
    """Graphs before and behind; the blocks themselves run as they are written."""
    from torch._dynamo.testing import CompileCounterWithBackend

    tensors, plan = inputs(4, 2, 70, dtype=torch.float32), documents(70)
    backend = CompileCounterWithBackend("aot_eager")

    def layer(query, *rest):
        return kernels.pruned_attention(query * 2.0, *rest, 1.5, **plan)[0] + 1.0

    compiled = torch.compile(layer, backend=backend)
    results = []
    for function in (layer, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = function(*leaves)
        results.append([output.detach(), *torch.autograd.grad((output**2).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert backend.op_count < 20, "a few operations on either side, not those of every block"


def test_compiled_gates_are_exact(n=512):
    """Under torch.compile's own CPU code they would not be: see kernels._as_written."""
    x = torch.linspace(-1.0, 1.0, n)
    compiled = torch.compile(lambda x, alpha: kernels.alpha_sigmoid(x, alpha) * 1.0, dynamic=True, backend="aot_eager")
    for alpha in (1.001, 4.0, 8.0):
        assert torch.equal(compiled(x, alpha), kernels.alpha_sigmoid(x, alpha))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_problem_has_the_references_answer(data):
    """Shapes, documents, protected tokens and gates drawn at random: saturated, exactly 0, exactly at the edges."""
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
    n, batch = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 2))
    alpha = data.draw(st.sampled_from([1.0, 1.001, 1.5, 2.0, 3.0, 8.0, 16.0]))
    tensors = inputs(heads, kv_heads, n, batch, seed=data.draw(st.integers(0, 10**6)))
    tensors[3] *= data.draw(st.sampled_from([0.0, 0.1, 1.0, 100.0]))
    # With interaction queries of zero every logit is beta: 0 and the edges of the band exactly.
    edge = 1.0 / (alpha - 1.0) if alpha > 1.0 else 3.0
    tensors[5].fill_(data.draw(st.sampled_from([0.0, edge, -edge, 0.5 * edge, 1.5, -1.0])))
    column = torch.arange(n)
    end = column + data.draw(st.sampled_from([1, 2, 7, 100]))
    guard = column + data.draw(st.sampled_from([0, 1, 3, 100]))
    plan = {"end": end.expand(batch, n), "guard": guard.expand(batch, n)}
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            cut_into_segments(patch, *data.draw(st.sampled_from([(4, 2), (8, 8), (6, 3)])))
        assert_same(run(tensors, alpha, **plan), run(tensors, alpha, "reference", **plan), 1e-9)


def test_shapes_and_alphas_that_do_not_fit_are_refused_by_name():
    tensors = inputs(n=9)
    with pytest.raises(ValueError, match="guard"):
        kernels.pruned_attention(*tensors, 2.0, guard=torch.zeros(2, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="end"):
        kernels.pruned_attention(*tensors, 2.0, end=torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="interaction_query"):
        kernels.pruned_attention(*tensors[:3], tensors[3][:, :8], *tensors[4:], 2.0)
    for alpha in (0.5, 17.0, math.nan):
        with pytest.raises(ValueError, match="alpha is"):
            kernels.pruned_attention(*tensors, alpha)
