"""Is what gates ask of a step's few tokens the two small products, however many tokens come together?"""

from __future__ import annotations

import pytest
import torch

from ctxprune.kernels.decode import native_path
from tests.ctxprune.kernels.test_decode_attention import ABSENT

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"native: {ABSENT}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("rows", "n", "width", "rank"), [(1, 1, 512, 32), (7, 3, 33, 5), (64, 1, 64, 16), (2, 0, 8, 4)]
)
def test_interactions_are_the_two_products(rows, n, width, rank, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(rows, n, width, dtype=dtype)
    weights = [torch.randn(rank, width, dtype=dtype) / width**0.5 for _ in range(2)]
    beta = torch.full((1,), 0.3, dtype=dtype)
    with torch.inference_mode():
        found = native_path.interactions(hidden, *weights, beta)
    assert found is not None
    assert found[2].shape == () and found[2] == beta and found[2].data_ptr() != beta.data_ptr()
    for one, weight in zip(found[:2], weights, strict=True):
        assert one.dtype == dtype and one.shape == (rows, n, rank)
        assert torch.allclose(
            one.double(), hidden.double() @ weight.double().T, atol=1e-12 if dtype.itemsize == 8 else 2e-6
        )


def test_a_tokens_interactions_do_not_depend_on_those_beside_it():
    torch.manual_seed(0)
    hidden, query, key = torch.randn(64, 1, 300), torch.randn(40, 300), torch.randn(40, 300)
    beta = torch.zeros(1)
    with torch.inference_mode():
        together = native_path.interactions(hidden, query, key, beta)
        alone = [native_path.interactions(row[None].clone(), query, key, beta) for row in hidden]
    for which in range(2):
        assert torch.equal(together[which], torch.cat([one[which] for one in alone]))


@pytest.mark.parametrize("why", ["many", "type", "mixed", "gradients", "strided", "elsewhere", "off"])
def test_interactions_are_left_to_the_layers_where(why, monkeypatch):
    dtype = torch.bfloat16 if why == "type" else torch.float32
    hidden = torch.randn(native_path.FEW + 1 if why == "many" else 2, 1, 8).to(dtype)
    query, key, beta = torch.randn(4, 8).to(dtype), torch.randn(4, 8).to(dtype), torch.zeros(1).to(dtype)
    if why == "mixed":
        query, key, beta = query.double(), key.double(), beta.double()
    if why == "strided":
        hidden = torch.randn(2, 1, 16)[..., ::2]
    if why == "elsewhere":
        key = torch.empty(0)
    if why == "off":
        monkeypatch.setenv(native_path.SWITCH, "0")
    with torch.set_grad_enabled(why == "gradients"):
        assert native_path.interactions(hidden, query, key, beta) is None
