"""What can be configured? Every knob: one plain dataclass per group, each field a sentence with its unit.

What the benchmark measures has its groups in pipelines/benchmark_config.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pipelines.benchmark_config import (
    BenchmarkConfig,
    CascadeConfig,
    FeedbackConfig,
    GenerationConfig,
    GradientsConfig,
    HiddenConfig,
    KernelsConfig,
)
from pipelines.policy_study.config import StudyConfig


@dataclass
class ModelConfig:
    """The causal language model that learns to forget."""

    name: str = "tiny"
    """Short name, used in trial names and tables."""
    path: str | None = None
    """Folder or hub id of a pretrained model; empty: a base model is trained from scratch first."""
    family: str = "llama"
    """transformers model type of a from-scratch model: llama, gpt2, qwen3, mistral or gpt_neox."""
    layers: int = 4
    """Transformer blocks of a from-scratch model."""
    width: int = 128
    """Hidden size of a from-scratch model."""
    heads: int = 4
    """Query heads of a from-scratch model."""
    kv_heads: int = 2
    """Key/value heads of a from-scratch model (grouped-query attention)."""


@dataclass
class DataConfig:
    """The text to learn from and to be judged on."""

    source: str = "stdlib"
    """stdlib (the interpreter's own standard library), files (text, jsonl, csv, tsv) or hub (through `datasets`)."""
    path: str | None = None
    """File or folder for source=files."""
    names: list[str] = field(default_factory=list)
    """Hub data sets for source=hub, each `name` or `name:config`; several are joined."""
    text_field: str = "text"
    """Column that holds the text in jsonl, csv, tsv and hub data sets."""
    held_out: float = 0.05
    """Share of the documents (by size) that is never trained on, in (0, 0.5]."""
    vocab_size: int = 1024
    """Entries of the byte-level BPE trained on the text when the model brings no tokenizer."""
    max_megabytes: float = 64.0
    """Text read at most, in MB (1e6 bytes)."""


@dataclass
class PruningConfig:
    """What is dropped, and how the model learns to live with it (method: arXiv 2305.15805)."""

    policy: str = "learned"
    """dense, learned, window or strided; or a ranking of keys at every step: random, strided_keys, bigbird, frequency,
    key_norm, keydiff, h2o, tova or snapkv. What a task teaches (future, distilled, agent, ltp, dms) is trained by
    experiment=policies alone."""
    sparsity: float | None = None
    """Target share of the context dropped, in (0, 1): reached by a controller (learned) or solved for (others)."""
    gamma: float | None = None
    """Fixed sparsity weight instead of a target, as in the paper (learned only)."""
    rank: int = 64
    """Width r of the interaction queries and keys."""
    beta: float = 2.0
    """Initial gate offset: higher starts with more of the context kept."""
    alpha_start: float = 1.001
    """Sharpness of the gates at the first step (1 = logistic)."""
    alpha_end: float = 8.0
    """Sharpness of the gates at the end of the schedule."""
    alpha_steps: float = 0.8
    """Share of the training steps over which alpha rises (cosine), in (0, 1]."""
    distillation: float = 0.0
    """Weight of KL(dense teacher || pruned model) beside the next-token loss; 0 is off."""
    freeze_backbone: bool = False
    """Train the gates alone."""
    propagate_in_depth: bool = False
    """A key dropped in one layer is gone in every deeper one."""


@dataclass
class PolicyConfig:
    """What no rule may drop, whichever the pruning."""

    sinks: int = 0
    """First tokens of each document that are never dropped."""
    recent: int = 0
    """Most recent tokens that are never dropped."""


@dataclass
class TrainConfig:
    """Optimisation. Tokens per trial = steps x batch x context, the same for every trial of a sweep."""

    steps: int = 600
    """Optimizer steps of a trial."""
    base_steps: int = 0
    """Optimizer steps of the from-scratch base model, shared by its trials."""
    batch: int = 8
    """Sequences per step over all workers."""
    context: int = 256
    """Tokens per sequence."""
    learning_rate: float = 1e-4
    """AdamW learning rate of the backbone."""
    gate_learning_rate: float = 1e-3
    """AdamW learning rate of the gates."""
    base_learning_rate: float = 2e-3
    """AdamW learning rate of the from-scratch base model."""
    warmup: float = 0.05
    """Share of the steps with a linearly rising learning rate."""
    decay: float = 0.3
    """Share of the steps, at the end, with a linearly falling learning rate; 0 keeps it constant as in the paper."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    clip: float = 1.0
    """Largest gradient norm; 0 is off as in the paper."""
    seed: int = 0
    """Seed of initialisation and batches."""
    log_every: int = 20
    """Steps between two rows of metrics.jsonl."""


@dataclass
class EngineConfig:
    """How DeepSpeed trains."""

    zero: int = 0
    """ZeRO stage, 0 to 3."""
    offload: bool = False
    """Optimizer state in host memory (ZeRO 2 or 3)."""
    dtype: str = "float32"
    """float32 or bfloat16."""


@dataclass
class ClusterConfig:
    """Where trials run."""

    address: str | None = None
    """Ray cluster to join; empty starts a local one."""
    workers: int = 1
    """DeepSpeed processes per trial."""
    concurrency: int = 0
    """Trials at a time; 0 means as many as the cores or GPUs allow."""
    cpus_per_worker: int = 1
    """Cores (and compute threads) per process."""
    gpus_per_worker: int | None = None
    """GPUs per process; null: one where the cluster has any, else none."""


@dataclass
class TrackingConfig:
    """Where results are mirrored; metrics.jsonl and result.json are the record."""

    mode: str = "offline"
    """W&B: offline, online or off."""
    project: str = "ctxprune"
    """W&B project."""


@dataclass
class EvaluateConfig:
    """Held-out evaluation, always under the step function."""

    tokens: int = 65536
    """Held-out tokens scored at most."""
    batch: int = 16
    """Sequences per forward pass."""
    contexts: list[int] = field(default_factory=lambda: [64, 128, 256])
    """Context lengths at which perplexity is also reported; each at most train.context."""


@dataclass
class GenerateConfig:
    """One continuation of a prompt."""

    checkpoint: str | None = None
    """Folder written by train or sweep (or any ctxprune.save)."""
    prompt: str = "def main("
    """Text to continue."""
    max_new_tokens: int = 64
    """Tokens to add at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this probability, in (0, 1]."""
    seed: int = 0
    """Seed of the sampling."""
    max_live_tokens: int | None = None
    """Keys per layer that are never exceeded, the newest included; empty: as many as the policy keeps."""
    alarm_share: float | None = None
    """Bring dropped keys back where they may have more than this share of a query's attention; empty: never."""
    lossless: bool = False
    """Write exactly what the dense model would: the pruned one drafts, the dense one verifies."""


@dataclass
class SweepConfig:
    """The trials of a study: each line is a list of overrides, comma lists expanded by Hydra's own parser."""

    name: str = "demo"
    """Folder under runs/: [a-z0-9][a-z0-9._-]{0,63}."""
    trials: list[str] = field(default_factory=list)
    """One line per family of trials, e.g. `model=tiny,small pruning=learned pruning.sparsity=0.5,0.8`."""


@dataclass
class Config:
    """One trial, fully resolved."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    hidden: HiddenConfig = field(default_factory=HiddenConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    runs: str = "runs"
    """Folder that holds every sweep and the store of finished steps."""
    format: str = "text"
    """text for people, json for one object per line on stdout."""


def to_record(config: Config) -> dict[str, Any]:
    """Plain values of a resolved config, nested by group: what crosses process borders and lies beside results."""
    return dataclasses.asdict(config)


def from_record(record: dict[str, Any]) -> Config:
    """The inverse of to_record."""
    groups = {
        f.name: f.default_factory for f in dataclasses.fields(Config) if f.default_factory is not dataclasses.MISSING
    }
    return Config(**{name: groups[name](**value) if name in groups else value for name, value in record.items()})
