"""Do the Triton kernels train under DeepSpeed as the reference does, whatever ZeRO shards? Interpreted, one process."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
from torch import Tensor, nn

from ctxprune import kernels
from pipelines import engine
from pipelines.config import EngineConfig, TrainConfig

HEADS, WIDTH, RANK = 2, 8, 4


class Layer(nn.Module):
    """One attention layer with gates, and nothing else."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl
        size = HEADS * WIDTH
        self.project, self.gates = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, 2 * RANK, bias=False)
        self.beta = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        output, alive = kernels.pruned_attention(*heads, *self.gates(x).chunk(2, -1), self.beta, 1.5, impl=self.impl)
        return output.square().mean() + 1e-3 * alive.mean()


def trained(impl: str, stage: int) -> dict[str, Tensor]:
    """Weights after three steps."""
    torch.manual_seed(0)
    settings = TrainConfig(batch=2, learning_rate=1e-2)
    wrapped = engine.start(
        layer := Layer(impl), [{"params": list(layer.parameters())}], EngineConfig(zero=stage), settings, 1
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        wrapped.backward(wrapped(torch.randn(2, 20, HEADS * WIDTH, generator=generator)))
        wrapped.step()
    return engine.full_weights(wrapped, stage)


def every_stage(store: str) -> dict[str, dict[str, Tensor]]:
    os.environ |= engine.quiet_environment(1, cuda=False) | {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    found = {f"ZeRO {stage}": trained("triton", stage) for stage in range(4)}
    return found | {"reference": trained("reference", 0)}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo and interpreted kernels: this is the CPU's lane")
def test_every_zero_stage_trains_what_the_reference_trains(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        weights = pool.apply(every_stage, (str(tmp_path / "store"),))
    wanted = weights.pop("reference")
    for stage, found in weights.items():
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=f"{stage}: {name}")
    torch.manual_seed(0)
    assert not torch.allclose(Layer("torch").beta, wanted["beta"], atol=1e-3), "it moved"
