"""Does impl="auto" take Triton only where Triton has been seen to be right? Interpreted, with the CPU for a GPU."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ctxprune import kernels
from ctxprune.kernels import agreement, implementations
from tests.ctxprune.kernels.problems import inputs


@pytest.fixture(autouse=True)
def asked_anew():
    agreement._asked.cache_clear()
    yield
    agreement._asked.cache_clear()


@pytest.fixture
def for_a_gpu(monkeypatch):
    """The CPU counts as a device that Triton runs on, as it does interpreted."""
    monkeypatch.setattr(implementations, "_is_on_a_gpu", lambda tensor: True)
    monkeypatch.setattr(agreement, "N", 20)


def recorded(monkeypatch, operation: str, impl: str, change=lambda result: result) -> list[tuple[int, ...]]:
    """Shapes of the first argument of each call, a list that grows; `change` falsifies the results."""
    calls: list[tuple[int, ...]] = []
    original = kernels.IMPLEMENTATIONS[operation][impl]

    def run(*arguments):
        calls.append(tuple(arguments[0].shape))
        return change(original(*arguments))

    monkeypatch.setitem(kernels.IMPLEMENTATIONS[operation], impl, run)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", [name for name, ways in kernels.IMPLEMENTATIONS.items() if "triton" in ways])
def test_every_kernel_agrees_as_it_is_shipped(operation, dtype):
    """Its own tiles, width and rank, on three tiles of tokens."""
    assert agreement.disagreement(operation, "cpu", dtype) == ""


def test_on_the_cpu_triton_is_not_even_asked(monkeypatch):
    calls = recorded(monkeypatch, "alpha_sigmoid", "triton")
    kernels.alpha_sigmoid(torch.zeros(3), 1.5)
    assert calls == []


def test_what_agrees_is_used_and_asked_once(for_a_gpu, monkeypatch):
    calls = recorded(monkeypatch, "pruned_attention", "triton")
    tensors = inputs(2, 1, 9, dtype=torch.float32)
    for _ in range(2):
        found, _ = kernels.pruned_attention(*tensors, 1.5)
    torch.testing.assert_close(found, kernels.pruned_attention(*tensors, 1.5, impl="reference")[0].float())
    assert len(calls) == 3 and calls[1] == calls[2] == (2, 2, 9, 8)


SWITCHES = {
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("switched", SWITCHES.values(), ids=SWITCHES)
def test_what_the_caller_has_switched_off_decides_nothing(switched, for_a_gpu, monkeypatch):
    calls = recorded(monkeypatch, "pruned_attention", "triton")
    with switched():
        kernels.pruned_attention(*inputs(2, 1, 9, dtype=torch.float32), 1.5)
    assert len(calls) == 2, "the small problem, and ours"


def wrong(result):
    return tuple(tensor * 1.1 for tensor in result) if isinstance(result, tuple) else result * 1.1


@pytest.mark.parametrize("operation", ["alpha_sigmoid", "pruned_attention"])
def test_what_is_wrong_is_not_used_and_said_once(operation, for_a_gpu, monkeypatch, caplog):
    calls = recorded(monkeypatch, operation, "triton", wrong)
    with caplog.at_level(logging.WARNING, "ctxprune.kernels"):
        for _ in range(2):
            if operation == "alpha_sigmoid":
                gate = kernels.alpha_sigmoid(torch.zeros(3), 1.5)
                assert gate.tolist() == [0.5] * 3
            else:
                kernels.pruned_attention(*inputs(2, 1, 9, dtype=torch.float32), 1.5)
    assert len(calls) == 1, "the small problem, and nothing of ours"
    (record,) = caplog.records
    assert "torch is used on cpu, not Triton (result 0 is off by" in record.getMessage()


def test_a_gradient_that_is_wrong_is_noticed(for_a_gpu, monkeypatch):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return 2.0 * gradient

    recorded(monkeypatch, "pruned_attention", "triton", lambda result: (Doubled.apply(result[0]), result[1]))
    assert "result 2 is off by" in agreement.disagreement("pruned_attention", "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_are_right_or_wrong_whatever_the_type(dtype, for_a_gpu, monkeypatch):
    recorded(monkeypatch, "drop_times", "triton", lambda result: result - (result < result.max()).to(result.dtype))
    assert "result 0 has other times in" in agreement.disagreement("drop_times", "cpu", dtype)


def test_what_agrees_at_one_size_is_asked_again_at_a_larger_one(for_a_gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(agreement, "disagreement", lambda *given: asked.append(given[-1]) or "")
    for width in (8, 64, 65, 80, 128):
        query, key, value = (torch.randn(1, 1, 3, width) for _ in range(3))
        kernels.drop_time_attention(query, key, value, torch.full((1, 3), 3))
    assert asked == [(64, 64, 16), (128, 64, 16)]


def test_what_cannot_even_run_is_not_used(for_a_gpu, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("PTX JIT compilation failed\nand more")

    monkeypatch.setitem(kernels.IMPLEMENTATIONS["alpha_sigmoid"], "triton", broken)
    assert kernels.alpha_sigmoid(torch.zeros(1), 1.5).item() == 0.5
    assert "RuntimeError: PTX JIT compilation failed)" in caplog.text


def test_what_triton_refuses_goes_to_torch(for_a_gpu, monkeypatch):
    calls = recorded(monkeypatch, "drop_time_attention", "torch")
    query, key, value = (torch.randn(1, 2, 9, 130) for _ in range(3))
    kernels.drop_time_attention(query, key, value, torch.full((1, 9), 9))
    assert calls[-1] == (1, 2, 9, 130)
    assert kernels.alpha_sigmoid(torch.zeros(1, dtype=torch.float64), 1.5).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own look at it
def test_torch_compile_takes_what_agrees_in_one_graph(for_a_gpu):
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: kernels.pruned_attention(*t, 1.5)[0] * 2.0, backend=backend, fullgraph=True)
    tensors = inputs(2, 1, 20, dtype=torch.float32)
    torch.testing.assert_close(compiled(*tensors), kernels.pruned_attention(*tensors, 1.5, impl="triton")[0] * 2.0)
    assert backend.frame_count == 1


def test_importing_the_kernels_imports_neither_triton_nor_the_compiler():
    script = "import sys, ctxprune.kernels; print({'triton', 'torch._dynamo'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
