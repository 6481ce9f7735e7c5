"""Are packed products the layer's own, whatever happens to its weights?"""

from __future__ import annotations

import copy

import pytest
import torch

import ctxprune
from ctxprune import packing
from ctxprune.packing import PackedLinear, pack
from tests.models import gated, small_model, tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_logits_are_those_of_the_plain_model(family, rows):
    plain, packed = small_model(family), pack(small_model(family))
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) > 6
    with torch.inference_mode():
        ids = tokens(2, rows)
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_it_writes_what_the_plain_model_writes():
    ids = tokens(3, 12)
    plain = ctxprune.generate(gated(), ids, max_new_tokens=20)
    packed = ctxprune.generate(pack(gated()), ids, max_new_tokens=20)
    assert [row.tolist() for row in packed.tokens] == [row.tolist() for row in plain.tokens]


def agrees(layer: PackedLinear) -> bool:
    x = torch.randn(5, layer.matrix.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = layer(x)
        assert layer.packed is not None
    with torch.no_grad():
        return torch.allclose(found, torch.nn.functional.linear(x, layer.matrix, layer.bias), atol=1e-5)


def test_a_changed_weight_is_packed_again():
    layer = PackedLinear(torch.nn.Linear(7, 5))
    assert agrees(layer)
    with torch.no_grad():
        layer.weight.mul_(-2)
        layer.bias.add_(1)
    assert agrees(layer)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight.zero_()
    assert agrees(copied) and agrees(layer)


def test_an_optimizer_that_hides_its_changes_is_noticed_after_training():
    layer = PackedLinear(torch.nn.Linear(7, 5)).eval()
    assert agrees(layer)
    layer.train()
    layer.weight.data.mul_(-2)  # unknown to the version counter, as DeepSpeed does
    assert agrees(layer.eval())


def test_twin_an_old_packing_is_caught():
    layer = PackedLinear(torch.nn.Linear(7, 5))
    assert agrees(layer)
    with torch.no_grad():
        layer.weight.mul_(-2)
    layer.version = layer.weight._version
    assert not agrees(layer)


def test_it_trains_as_before():
    plain, packed, ids = gated().train(), pack(gated()).train(), tokens(2, 20)
    for model in (plain, packed):
        model(ids, labels=ids).loss.backward()
    for (name, one), (other_name, other) in zip(plain.named_parameters(), packed.named_parameters(), strict=True):
        assert name == other_name
        torch.testing.assert_close(other.grad, one.grad)


def test_it_is_saved_and_loaded_as_before(tmp_path):
    model = pack(gated())
    ctxprune.save(model, tmp_path / "model")
    with torch.inference_mode():
        wanted = gated()(tokens(1, 9)).logits
        torch.testing.assert_close(ctxprune.load(tmp_path / "model")(tokens(1, 9)).logits, wanted)


def test_other_types_stay_what_they_are():
    model = pack(gated().double())
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    model = pack(gated()).to(torch.bfloat16)
    with torch.inference_mode():
        assert model(tokens(1, 5)).logits.dtype == torch.bfloat16


def test_a_torch_that_cannot_pack_says_so(monkeypatch):
    monkeypatch.setattr(packing.torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ctxprune.UserError, match="no oneDNN"):
        pack(gated())


@pytest.mark.parametrize("packed", [True, False])
def test_a_single_row_goes_the_way_that_was_faster(packed, monkeypatch):
    """The clock says so; several rows are packed in any case."""
    fast = PackedLinear.multiplied if packed else PackedLinear.plain
    monkeypatch.setattr(packing, "_seconds", lambda product, layers, row: 1.0 if product is fast else 2.0)
    layer = pack(torch.nn.Sequential(torch.nn.Linear(7, 5)))[0]
    assert layer.single is packed
    taken = []
    for name in ("plain", "multiplied"):
        way = getattr(PackedLinear, name)
        monkeypatch.setattr(PackedLinear, name, lambda self, x, name=name, way=way: taken.append(name) or way(self, x))
    with torch.inference_mode():
        for rows in (torch.zeros(7), torch.zeros(1, 7), torch.zeros(1, 1, 7), torch.zeros(2, 7)):
            layer(rows)
    assert taken == (["multiplied"] * 4 if packed else ["plain"] * 3 + ["multiplied"])


def test_all_layers_of_a_shape_take_turns_with_their_own_weights(monkeypatch):
    seen = []
    monkeypatch.setattr(packing, "packed_is_faster", lambda layers: seen.append(len(layers)) or len(layers) > 1)
    model = pack(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)))
    assert sorted(seen) == [1, 2] and [layer.single for layer in model] == [True, True, False]
