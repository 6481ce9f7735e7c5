"""Are packed products the layer's own, whatever happens to its weights?"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import ctxprune
from ctxprune import packing
from ctxprune.packing import MKL, ONEDNN, STEADY, PackedLinear, pack
from tests.models import gated, small_model, tokens


@pytest.fixture(params=[ONEDNN, MKL], ids=lambda layout: layout.name)
def layout(request, monkeypatch):
    """The one that the clock prefers, and at once."""
    if request.param is MKL and not torch.backends.mkl.is_available():
        pytest.skip("this build of torch has no MKL")
    monkeypatch.setattr(packing, "faster_layout", lambda layers: request.param)
    monkeypatch.setattr(packing, "STEADY", 0)
    return request.param


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_logits_are_those_of_the_plain_model(family, rows, layout):
    plain, packed = small_model(family), pack(small_model(family))
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) > 6
    with torch.inference_mode():
        ids = tokens(2, rows)
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert all(layer.packed is not None and layer.layout is layout for layer in layers)


def test_it_writes_what_the_plain_model_writes(layout):
    ids = tokens(3, 12)
    plain = ctxprune.generate(gated(), ids, max_new_tokens=20)
    packed = ctxprune.generate(pack(gated()), ids, max_new_tokens=20)
    assert [row.tolist() for row in packed.tokens] == [row.tolist() for row in plain.tokens]


def packed_linear(layout: packing.Layout = ONEDNN) -> PackedLinear:
    layer = PackedLinear(torch.nn.Linear(7, 5))
    layer.layout = layout
    return layer


def agrees(layer: PackedLinear) -> bool:
    x = torch.randn(5, layer.matrix.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = layer(x)
        assert layer.packed is not None
    with torch.no_grad():
        return torch.allclose(found, torch.nn.functional.linear(x, layer.matrix, layer.bias), atol=1e-5)


def test_a_changed_weight_is_packed_again(layout):
    layer = packed_linear(layout)
    assert agrees(layer)
    with torch.no_grad():
        layer.weight.mul_(-2)
        layer.bias.add_(1)
    assert agrees(layer)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight.zero_()
    assert agrees(copied) and agrees(layer)


def test_an_optimizer_that_hides_its_changes_is_noticed_after_training(layout):
    layer = packed_linear(layout).eval()
    assert agrees(layer)
    layer.train()
    layer.weight.data.mul_(-2)  # unknown to the version counter, as DeepSpeed does
    assert agrees(layer.eval())


@pytest.mark.parametrize("how", ["data", "assign", "parameter", "types"])
def test_a_weight_that_was_replaced_is_packed_again(layout, how):
    """A new one has the version that the old one had."""
    layer, other = packed_linear(layout).eval(), torch.nn.Linear(7, 5)
    assert agrees(layer)
    if how == "data":
        layer.weight.data = other.weight.data
    elif how == "assign":
        layer.load_state_dict(other.state_dict(), assign=True)
    elif how == "parameter":
        layer.weight = other.weight
    else:
        layer.bfloat16().float()
        assert layer.packed is None  # nor does a copy stay where the weights no longer are
    assert agrees(layer)


def test_what_is_packed_stays_while_a_model_stays_in_eval_mode(layout):
    """A batcher says eval() at every step."""
    layer = packed_linear(layout).eval()
    assert agrees(layer)
    before = layer.packed
    assert layer.eval().packed is before and layer.train(False).packed is before
    assert layer.train().packed is None


def test_only_plain_linear_layers_are_replaced():
    class Router(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), 1

    watched = torch.nn.Linear(4, 4)
    watched.register_forward_hook(lambda *_: None)
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
    with torch.inference_mode():
        made_there = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(Router(4, 4), watched, normed, made_there, torch.nn.Linear(4, 4))
    names = list(model.state_dict())
    kinds = [isinstance(layer, PackedLinear) for layer in pack(model)]
    assert kinds == [False] * 4 + [True] and list(model.state_dict()) == names


def test_a_packed_model_can_be_pickled(layout):
    model = pack(torch.nn.Sequential(torch.nn.Linear(7, 5)))
    assert agrees(model[0])
    assert agrees(pickle.loads(pickle.dumps(model))[0])


def test_twin_an_old_packing_is_caught(layout):
    layer = packed_linear(layout)
    assert agrees(layer)
    with torch.no_grad():
        layer.weight.mul_(-2)
    layer.made_of = (layer.weight, layer.weight.data_ptr(), layer.weight._version)
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
    monkeypatch.setattr(packing, "faster_layout", lambda layers: ONEDNN)
    monkeypatch.setattr(packing, "_seconds", lambda product, layers, rows: 1.0 if product is fast else 2.0)
    layer = pack(torch.nn.Sequential(torch.nn.Linear(7, 5)))[0]
    assert layer.single is packed
    taken = ways_taken(monkeypatch)
    with torch.inference_mode():
        for rows in (torch.zeros(7), torch.zeros(1, 7), torch.zeros(1, 1, 7), torch.zeros(2, 7)):
            layer(rows)
    assert taken == (["multiplied"] * 4 if packed else ["plain"] * 3 + ["multiplied"])


def ways_taken(monkeypatch) -> list[str]:
    """By which weights each call from now on is multiplied."""
    taken: list[str] = []
    for name in ("plain", "multiplied"):
        way = getattr(PackedLinear, name)
        monkeypatch.setattr(PackedLinear, name, lambda self, x, name=name, way=way: taken.append(name) or way(self, x))
    return taken


def test_all_layers_of_a_shape_take_turns_with_their_own_weights(monkeypatch):
    seen = []
    monkeypatch.setattr(packing, "packed_is_faster", lambda layers, _: seen.append(len(layers)) or len(layers) > 1)
    model = pack(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)))
    assert sorted(seen) == [1, 2] and [layer.single for layer in model] == [True, True, False]


def test_more_weights_than_a_cache_holds_are_not_timed(monkeypatch):
    seen = []
    monkeypatch.setattr(packing, "SAMPLE", 4 * 4 * 4)
    monkeypatch.setattr(packing, "packed_is_faster", lambda layers, _: seen.append(len(layers)) or False)
    model = pack(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5))))
    assert seen == [2] and not any(layer.single for layer in model)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this build of torch has no MKL")
@pytest.mark.parametrize("wanted", [ONEDNN, MKL], ids=lambda layout: layout.name)
def test_the_layout_that_was_faster_is_taken(wanted, monkeypatch):
    def seconds(product, layers, rows):
        return 1.0 if layers[0].layout is wanted else 2.0

    monkeypatch.setattr(packing, "_seconds", seconds)
    model = pack(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
    assert [layer.layout for layer in model] == [wanted, wanted]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this build of torch has no MKL")
def test_a_layout_of_one_number_of_rows_is_made_once_that_number_is_steady(monkeypatch):
    layer, taken = packed_linear(MKL), ways_taken(monkeypatch)

    def call(rows: int) -> str:
        with torch.inference_mode():
            layer(torch.ones(rows, 7))
        return taken[-1]

    assert [call(3) for _ in range(STEADY)] == ["plain"] * STEADY
    assert call(3) == "multiplied" and layer.rows == 3
    # Whoever comes in between finds nothing, and takes nothing from those that stay.
    for _ in range(STEADY):
        assert (call(4), call(3)) == ("plain", "multiplied")
    assert [call(4) for _ in range(STEADY)] == ["plain"] * STEADY
    assert call(4) == "multiplied" and layer.rows == 4 and call(3) == "plain"
