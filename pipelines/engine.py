"""How does DeepSpeed train a model here? One function starts it; the traps of its CPU build are closed in this file."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from pipelines.config import EngineConfig, TrainConfig

BETAS = (0.9, 0.999)
"""AdamW moments of the paper (arXiv 2305.15805, appendix)."""


def start(model: nn.Module, groups: list[dict], engine: EngineConfig, train: TrainConfig, world: int):
    """A DeepSpeed engine around model; groups: AdamW parameter groups. The process group must be initialised
    already."""
    deepspeed = _import()
    # It casts parameters to bfloat16 itself and leaves buffers: rounded rotary frequencies are other positions.
    wrapped, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config=_settings(engine, train, world),
        dist_init_required=False,
    )
    return wrapped


def _import():
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # The shared-memory collective is compiled at start; a process killed in the middle leaves a lock on which every
    # later start waits for ever. gloo serves as well here.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _settings(engine: EngineConfig, train: TrainConfig, world: int) -> dict:
    """The DeepSpeed configuration: plain values, nothing left to its defaults that matters here."""
    zero: dict[str, object] = {"stage": engine.zero}
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    optimizer = {"lr": train.learning_rate, "betas": BETAS, "eps": 1e-8, "weight_decay": train.weight_decay}
    if not engine.offload:
        # torch's AdamW: DeepSpeed's own CPU and fused ones are compiled at start, for minutes.
        optimizer |= {"torch_adam": True, "adam_w_mode": True}
    return {
        "train_batch_size": train.batch,
        "train_micro_batch_size_per_gpu": train.batch // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "bf16": {"enabled": engine.dtype == "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def full_weights(wrapped, stage: int) -> dict[str, Tensor] | None:
    """Every weight of the trained model on rank 0, on the CPU in float32; None on the other ranks. A collective
    call."""
    module = wrapped.module
    rank = torch.distributed.get_rank()
    if stage < 3:
        return _copied(module) if rank == 0 else None
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return _copied(module) if rank == 0 else None


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        for name, value in module.state_dict().items()
    }


def quiet_environment(cores: int, cuda: bool) -> dict[str, str]:
    """Environment of a worker process: one accelerator, few threads, nobody phoning home."""
    environment = {
        "OMP_NUM_THREADS": str(cores),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DEEPSPEED_LOG_LEVEL": "error",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    if not cuda:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment
