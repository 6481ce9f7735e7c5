"""Do the Triton training kernels equal the product form, in value and in every gradient? On a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

from ctxprune import kernels
from ctxprune.kernels.soft_attention import triton_backward, triton_path
from tests.ctxprune.kernels.problems import assert_same, documents, eager, inputs, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE = (16, 16)
"""Small tiles: many of every class at few tokens, and the interpreter takes its time per tile."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tile(monkeypatch, TILE)


def use_tile(monkeypatch, tile: tuple[int, int], workspace: int = 1 << 24) -> None:
    monkeypatch.setitem(
        kernels.IMPLEMENTATIONS["pruned_attention"],
        "triton",
        lambda *arguments: triton_path.pruned_attention(*arguments, tile=tile, workspace=workspace),
    )


def on_device(tensors):
    if isinstance(tensors, dict):
        return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    return [tensor.to(DEVICE) for tensor in tensors]


def assert_close_to_reference(tensors, alpha, plan, times: float = 2.0) -> None:
    """Errors of at most `times` those of the plain n x n form in the same precision, all against float64."""
    tensors, plan = on_device(tensors), on_device(plan)
    exact = run(tensors, alpha, "reference", **plan)
    plain = run(tensors, alpha, "eager", **plan)
    fast = run(tensors, alpha, "triton", **plan)
    for name, wanted in exact.items():
        size = max(1.0, wanted.abs().max().item())
        if name == "beta":
            # A sum of everything that keys want of their gates, in which most cancels: what is added up is its size.
            size = max(size, exact["interaction_key"].norm(dim=-1).sum().item())
        room = times * (plain[name] - wanted).abs().max().item()
        room += {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[tensors[0].dtype] * size
        error = (fast[name].double() - wanted.double()).abs().max().item()
        assert error <= room, (name, error, room)


@pytest.fixture(autouse=True)
def eager_form(monkeypatch):
    def plain(*arguments):
        return eager(*arguments[:-1])

    monkeypatch.setitem(kernels.IMPLEMENTATIONS["pruned_attention"], "eager", plain)


ALPHAS = (1.0, 1.1, 1.5, 2.0, 3.0, 8.0)
LENGTHS = [(17, alpha) for alpha in ALPHAS] + [(n, alpha) for n in (1, 15, 16, 50) for alpha in (1.0, 3.0)]
"""Every alpha over a tile and a ragged one; every length with the sigmoid and with a sparse gate."""


@pytest.mark.parametrize(("n", "alpha"), LENGTHS)
def test_output_alive_and_all_gradients(n, alpha):
    assert_close_to_reference(inputs(4, 2, n, 2, torch.float32), alpha, documents(n) if n > 2 else {})


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_grouped_heads(kv_heads):
    assert_close_to_reference(inputs(4, kv_heads, 40, 2, torch.float32), 1.5, {})


@pytest.mark.parametrize(("tile", "workspace"), [((16, 32), 1), ((32, 16), 1), ((32, 32), 1 << 24)])
def test_tiles_and_passes_change_nothing(tile, workspace, monkeypatch):
    """workspace=1: one row block per pass, so that carries and suffixes go from pass to pass."""
    use_tile(monkeypatch, tile, workspace)
    assert_close_to_reference(inputs(2, 2, 70, 2, torch.float32), 1.5, documents(70))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.1, 3.0])
def test_half_precision(dtype, alpha):
    assert_close_to_reference(inputs(2, 1, 40, 2, dtype), alpha, documents(40))


@pytest.mark.parametrize(("beta", "seed"), [(-1.0, 0), (0.3, 1), (4.0, 2)])
def test_most_dropped_few_dropped_and_between(beta, seed):
    assert_close_to_reference(inputs(2, 2, 80, 1, torch.float32, beta=beta, seed=seed), 2.0, {})


def test_no_product_is_smaller_than_tensor_cores_take():
    """The interpreter takes any; a GPU wants 16 rows at least."""
    assert [rows // triton_backward.parts(rows) for rows in (16, 32, 64)] == [16, 16, 32]


def test_all_gates_open_is_plain_causal_attention():
    query, key, value, *gates, _ = on_device(inputs(4, 4, 70, dtype=torch.float32))
    output, alive = kernels.pruned_attention(query, key, value, *gates, gates[0].new_tensor(1e4), 1.5, impl="triton")
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value, is_causal=True))
    assert alive.tolist() == [70 * 69 / 2] * 2


def test_all_gates_closed_leaves_a_token_its_own_value():
    query, key, value, *gates, _ = on_device(inputs(4, 4, 40, dtype=torch.float32))
    output, alive = kernels.pruned_attention(query, key, value, *gates, gates[0].new_tensor(-1e4), 1.5, impl="triton")
    torch.testing.assert_close(output, value)
    assert alive.tolist() == [0.0, 0.0]


def test_uninitialised_memory_is_never_read():
    tensors, plan = on_device(inputs(2, 1, 70, dtype=torch.float32)), on_device(documents(70))
    wanted = run(tensors, 1.5, "triton", **plan)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4, device=DEVICE).isnan().all()  # fresh memory is poisoned
        poisoned = run(tensors, 1.5, "triton", **plan)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(poisoned, wanted, 0.0)


@pytest.mark.parametrize("margin", [1e-2, 1e-4, 1e-6])
def test_a_gate_close_to_zero_does_not_magnify_rounding(margin):
    """As in test_pruned_attention: query 50 all but drops every key, and dLoss/dx divides by the gate there."""
    tensors = inputs(2, 2, 80, dtype=torch.float32, beta=1.0)
    tensors[3], tensors[4] = torch.zeros_like(tensors[3]), torch.zeros_like(tensors[4])
    tensors[3][:, 50, 0], tensors[4][..., 0] = 1.0, -2 * (2 - margin)
    tensors = on_device(tensors)
    assert_same(run(tensors, 2.0, "triton"), run(tensors, 2.0, "reference"), 1e-5)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum over rows of NaN
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_gate_that_is_not_a_number_shows_in_the_output(alpha):
    """On a GPU nobody looks at the inputs: training that diverged must not go on as if a key had been dropped."""
    query, key, value, iq, ik, beta = on_device(inputs(2, 1, 40, dtype=torch.float32))
    iq[0, 20] = torch.nan
    guard = torch.arange(1, 41, device=DEVICE).expand(2, 40)
    end = torch.full((2, 40), 40, device=DEVICE)
    output, alive = triton_path.pruned_attention(query, key, value, iq, ik, beta, alpha, guard, end, 0.3, tile=(16, 16))
    assert output[0, :, 20:].isnan().all() and output[0, :, :20].isfinite().all() and output[1].isfinite().all()
    assert alive.isnan().tolist() == [True, False]


def test_tensors_with_gaps_between_rows():
    """Queries, keys and values as models make them: (batch, n, heads, width) seen as (batch, heads, n, width)."""
    tensors = inputs(4, 2, 40, dtype=torch.float32)
    gaps = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors[:3]] + tensors[3:]
    assert_same(run(on_device(gaps), 1.5, "triton"), run(on_device(tensors), 1.5, "triton"), 0.0)


def test_the_operators_are_registered_as_torch_expects():
    """Schema, fake tensors and autograd registration: what torch.compile and activation checkpointing rely on."""
    query, key, value, iq, ik, beta = on_device(inputs(2, 1, 20, dtype=torch.float32))
    guard = torch.arange(1, 21, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    end = torch.full((2, 20), 20, dtype=torch.int32, device=DEVICE)
    e = torch.full((1,), 0.5, device=DEVICE)
    tensors = [tensor.requires_grad_() for tensor in (query, key, value, iq, ik, beta)]
    torch.library.opcheck(triton_path.forward_operator, (*tensors, e, guard, end, True, 2, 0.3, 16, 16, 1 << 20, 16))


def test_a_schedule_of_alpha_is_compiled_once():
    """Once for the first alpha, since torch takes every number for a constant until it changes; then never again."""
    tensors = on_device(inputs(2, 1, 20, dtype=torch.float32))
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(*arguments):
        return kernels.pruned_attention(*arguments, impl="triton")

    graphs = []
    for alpha in (1.1, 1.3, 1.5, 1.7):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        found, wanted = compiled(*leaves, alpha), kernels.pruned_attention(*leaves, alpha, impl="triton")
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(
            *(torch.autograd.grad(r[0].sum() + r[1].sum(), leaves) for r in (found, wanted)), strict=True
        ):
            assert torch.equal(one, other)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2]


def test_activation_checkpointing_and_autocast():
    tensors = on_device(inputs(2, 1, 40, dtype=torch.float32))
    wanted = run(tensors, 1.5, "triton")
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output, _ = torch.utils.checkpoint.checkpoint(
            lambda *t: kernels.pruned_attention(*t, 1.5, impl="triton"), *leaves, use_reentrant=False
        )
    torch.testing.assert_close(output, wanted["output"])
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), leaves))


def test_what_triton_cannot_do_is_refused_by_name():
    tensors = on_device(inputs(2, 1, 9))
    with pytest.raises(ValueError, match="float64"):
        kernels.pruned_attention(*tensors, 1.5, impl="triton")
    wide = on_device(inputs(2, 1, 9, dtype=torch.float32))
    wide[:3] = [torch.zeros(*tensor.shape[:3], 130, device=DEVICE) for tensor in wide[:3]]
    with pytest.raises(ValueError, match="query has width 130"):
        kernels.pruned_attention(*wide, 1.5, impl="triton")
    tensors = on_device(inputs(2, 1, 9, dtype=torch.float32))
    tensors[3:5] = [torch.zeros(*tensor.shape[:2], 65, device=DEVICE) for tensor in tensors[3:5]]
    with pytest.raises(ValueError, match="float32 of rank 65; Triton takes 1 to 64"):
        kernels.pruned_attention(*tensors, 1.5, impl="triton")
    with pytest.raises(ValueError, match="float32 of rank 65"):
        kernels.drop_times(*tensors[3:6], impl="triton")
    assert kernels.drop_times(*(tensor.bfloat16() for tensor in tensors[3:6]), impl="triton").shape[-1] == 9


def test_gates_in_half_precision_beside_full_attention_are_computed_in_full():
    tensors = on_device(inputs(2, 1, 9, dtype=torch.float32))
    tensors[3:5] = [tensor.bfloat16() for tensor in tensors[3:5]]
    output, alive = kernels.pruned_attention(*tensors, 1.5, impl="triton")
    tensors[3:5] = [tensor.float() for tensor in tensors[3:5]]
    wanted, wanted_alive = kernels.pruned_attention(*tensors, 1.5, impl="triton")
    assert torch.equal(output, wanted) and torch.equal(alive, wanted_alive)
