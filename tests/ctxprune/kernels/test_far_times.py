"""May times lie beyond 32 bits? They mean what the end of the row does, or never: to every implementation."""

from __future__ import annotations

import pytest
import torch

from ctxprune import kernels
from ctxprune.kernels.checks import Refused
from ctxprune.kernels.soft_attention.triton_shape import check_addresses, check_rank
from tests.ctxprune.kernels.problems import inputs

FAR = 1 << 62
N = 9


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_protected_for_ever_and_never_ending(impl):
    tensors = inputs(2, 1, N, batch=1, dtype=torch.float32)
    guard, end = torch.full((1, N), FAR), torch.full((1, N), FAR)
    guard[0, ::2] = 0
    wanted, alive = kernels.pruned_attention(*tensors, 1.5, guard=guard, end=end, impl="reference")
    found, living = kernels.pruned_attention(*tensors, 1.5, guard=guard, end=end, impl=impl)
    torch.testing.assert_close(found, wanted.float(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(living, alive.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "torch", "native", "triton"])
def test_in_a_cache_too(impl):
    pages = kernels.Pages.empty(1, 1, 1, kv_heads=1, width=16, rank=16, page=16, dtype=torch.float32, device="cpu")
    pages.table.zero_()
    one, far = torch.ones(1, 1, 16), torch.tensor([FAR])
    gate = torch.full((1, 16), 4.0)
    for step in range(3):  # gates that drop whatever they may
        kernels.decode_attention(
            one, one, one, -gate, gate, torch.tensor(-1.0), torch.tensor([step]), pages,
            guard=far, drop_time=far, impl=impl,
        )  # fmt: skip
    assert (pages.drop_time[0, :3] == kernels.decode.pages.NEVER).all() and int(pages.used) == 3


def test_what_was_never_compiled_or_addressed_is_refused():
    with pytest.raises(Refused, match="bfloat16 of rank 129; Triton takes 1 to 128"):
        check_rank(torch.zeros(1, 1, 129, dtype=torch.bfloat16))
    check_rank(torch.zeros(1, 1, 128, dtype=torch.bfloat16))
    long = torch.zeros(1).as_strided((1, 64, 1 << 18, 128), (0, 0, 0, 0))
    check_addresses(long)
    with pytest.raises(Refused, match="too long for Triton's addresses"):
        check_addresses(torch.empty(1, 1 << 18, 64, 128, device="meta").transpose(1, 2))
