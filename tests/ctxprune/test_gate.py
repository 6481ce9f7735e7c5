"""Is a gate the scaled interaction of equation 4, with the paper's start?"""

from __future__ import annotations

import copy

import pytest
import torch

from ctxprune.errors import UserError
from ctxprune.gate import INITIAL_STD, InteractionGate
from ctxprune.packing import pack
from ctxprune.policies import GateConfig


def test_interaction_query_and_key_are_linear_maps_without_bias():
    torch.manual_seed(0)
    gate, hidden = InteractionGate(32, 4, 2.0), torch.randn(2, 5, 32)
    query, key, beta = gate(hidden)
    assert torch.equal(query, hidden @ gate.query.weight.T) and torch.equal(key, hidden @ gate.key.weight.T)
    assert query.shape == key.shape == (2, 5, 4) and beta.shape == () and beta.item() == 2.0
    assert {name for name, _ in gate.named_parameters()} == {"query.weight", "key.weight", "beta"}


def test_the_start_is_the_papers():
    torch.manual_seed(0)
    gate = InteractionGate(256, 64, 2.0)
    for weight in (gate.query.weight, gate.key.weight):
        assert weight.std().item() == pytest.approx(INITIAL_STD, rel=0.02) and abs(weight.mean().item()) < 1e-3


def test_beta_leaves_as_a_computed_tensor_that_carries_its_gradient():
    gate = InteractionGate(8, 2, 1.0)
    beta = gate(torch.ones(1, 3, 8))[2]
    assert beta is not gate.beta and beta.data_ptr() != gate.beta.data_ptr()
    (3 * beta).backward()
    assert gate.beta.grad.item() == 3.0


def test_outputs_follow_the_gates_own_precision():
    gate = InteractionGate(8, 2, 1.0).to(torch.bfloat16)
    assert {t.dtype for t in gate(torch.ones(1, 3, 8, dtype=torch.bfloat16))} == {torch.bfloat16}


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(UserError, match=f"rank is {rank}"):
        GateConfig(rank=rank)


def in_inference(gate: InteractionGate, hidden: torch.Tensor) -> bool:
    """Whether a step's one call says what the two layers say."""
    with torch.inference_mode():
        step = gate(hidden)
    apart = gate(hidden)
    return all(torch.allclose(one, other, atol=1e-6) for one, other in zip(step, apart, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_follows_the_weights_however_they_are_changed(packed):
    torch.manual_seed(0)
    gate, hidden = InteractionGate(32, 4, 2.0).eval(), torch.randn(2, 5, 32)
    assert in_inference(gate, hidden)
    if packed:
        pack(gate)
    with torch.no_grad():
        gate.key.weight.mul_(-3)
    assert in_inference(gate, hidden)
    gate.train()
    gate.query.weight.data.mul_(2)  # behind the version counter's back
    assert in_inference(gate.eval(), hidden)
    assert in_inference(copy.deepcopy(gate), hidden)


def test_weights_that_are_elsewhere_are_asked_for_through_their_layers():
    """As ZeRO-3 leaves them between calls: of no length, until the layer that owns them is called."""
    torch.manual_seed(0)
    gate, hidden = InteractionGate(32, 4, 2.0).eval(), torch.randn(1, 1, 32)
    with torch.inference_mode():
        before = gate(hidden)
        for layer in (gate.query, gate.key):
            whole, layer.weight.data = layer.weight.data, torch.empty(0)
            layer.register_forward_pre_hook(lambda module, _, whole=whole: setattr(module.weight, "data", whole))
        after = gate(hidden)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(before, after, strict=True))


def test_a_gate_whose_weights_are_made_up_is_called_as_written():
    gate, hidden = InteractionGate(8, 4, 1.0), torch.randn(1, 1, 8)
    with torch.inference_mode():
        wanted = gate(hidden)
        torch.nn.utils.parametrizations.weight_norm(gate.query)
        found = gate(hidden)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, wanted, strict=True))
