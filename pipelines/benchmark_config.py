"""What does the benchmark measure? Its own groups of settings: what is timed, the kernels' sizes, whole generation,
long texts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class BenchmarkConfig:
    """What is timed: a saved model's decoding with the dropped keys physically gone, the kernels alone, whole
    generation beside other engines, or the classification of long texts."""

    target: str = "decoding"
    """decoding, feedback or gradients (of checkpoint=FOLDER), kernels, generation, hidden or cascade."""
    batch: int = 32
    """Sequences decoded together."""
    prompt: int = 128
    """Prompt tokens per sequence, from held-out text."""
    new_tokens: int = 128
    """Tokens decoded per sequence."""
    repeats: int = 3
    """Timed repetitions, pruned and dense in turn; the median counts."""


@dataclass
class FeedbackConfig:
    """What benchmark target=feedback measures on a saved model, on benchmark.batch rows of held-out text."""

    loops: list[str] = field(default_factory=lambda: ["alarm", "lossless"])
    """alarm (which shares of attention bring dropped keys back) or lossless (drafts that the dense model verifies)."""
    draft: int = 0
    """Drafts per round of the lossless mode; 0: as many as pay at the acceptance so far."""
    temperature: float = 0.0
    """Of the text that the lossless mode and the dense model write; 0: greedy, and compared token by token."""
    packed: bool = True
    """On a CPU, multiply by packed weights (ctxprune.pack), pruned and dense alike."""


@dataclass
class CascadeConfig:
    """What benchmark target=cascade measures: questions about one fact each, asked of the study's small model of recall
    (trained for study.steps) with few keys first, lowest learned gates gone."""

    budgets: list[int] = field(default_factory=lambda: [4, 8, 16])
    """Live tokens per layer of the first stage, each a cascade of its own; its second stage has twice as many."""
    risks: list[float] = field(default_factory=lambda: [0.01, 0.05, 0.1])
    """Stated risks: shares of the questions that may be answered by few keys and otherwise than by all, in (0, 1)."""
    confidence: float = 0.95
    """How surely a calibration meets its risk, over the drawing of its questions, in (0, 1)."""
    draws: int = 20
    """Disjoint draws of validation questions, each calibrated on and judged for itself."""
    questions: int = 1000
    """Questions per draw, each about a context of its own."""
    judged: int = 5000
    """Test questions that every calibration is judged on."""
    share: float = 0.25
    """Share of the context's keys that the gates are taught to keep."""
    seed: int = 0
    """Of the small model and its gates."""


@dataclass
class GradientsConfig:
    """What benchmark target=gradients measures: of checkpoint=FOLDER on its held-out text, or of model.path=FOLDER on
    that of data. benchmark.repeats rounds are timed."""

    parts: list[str] = field(default_factory=lambda: ["worth", "cost"])
    """worth (agreement with leaving single keys out) or cost (time beside a plain pass over the prompt)."""
    queries: list[int] = field(default_factory=lambda: [1, 16])
    """Last tokens whose predictions are differentiated."""
    context: int = 128
    """Keys ranked per window: each is left out once in every layer, which takes that many passes of the last tokens."""
    windows: int = 16
    """Windows of held-out text that are ranked."""
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048])
    """Prompt tokens of the timing, the last ones included; those beyond the model's positions are left out."""
    batch: int = 1
    """Rows read together in the timing."""


@dataclass
class KernelsConfig:
    """One attention layer for benchmark target=kernels: random inputs, or with checkpoint=FOLDER the layers of a model,
    whose sizes and context then count instead of lengths, heads, kv_heads, width, rank, drops and alphas."""

    operations: list[str] = field(default_factory=lambda: ["training", "prefill", "decoding"])
    """What is measured: training (forward and backward), prefill and decoding (under the step function)."""
    checkpoint: str | None = None
    """Folder written by train or sweep whose layers are measured on text they read; empty: random inputs."""
    lengths: list[int] = field(default_factory=lambda: [1024, 4096])
    """Tokens per row."""
    batch: int = 1
    """Rows, in training and prefill."""
    decode_batch: int = 8
    """Sequences that decode together."""
    heads: int = 12
    """Query heads."""
    kv_heads: int = 12
    """Key/value heads."""
    width: int = 64
    """Numbers per head."""
    rank: int = 64
    """Width of the interaction queries and keys."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    drops: list[float] = field(default_factory=lambda: [0.0, 0.9])
    """Shares of the context dropped, in [0, 1); 0 is the start of training."""
    alpha_start: float = 1.1
    """Sharpness of the gates where nothing is dropped."""
    alpha_end: float = 8.0
    """Sharpness of the gates elsewhere."""
    largest_gb: float = 12.0
    """Memory, in GB (1e9 bytes), beyond which peers with n x n tensors are left out."""
    flex: bool = False
    """Run FlexAttention on a CPU too: its first compile takes a minute there. On a GPU it always runs."""
    memory: bool = True
    """Measure peak memory too, each peer in a process of its own: some seconds each."""


@dataclass
class GenerationConfig:
    """Writing text for benchmark target=generation, beside the same weights in other engines: a random model whose
    random gates drop what is asked, or with checkpoint=FOLDER a trained one, which drops what it has learned to."""

    checkpoint: str | None = None
    """Folder written by train or sweep; empty: a random Llama of the sizes below, for timing only."""
    contexts: list[int] = field(default_factory=lambda: [128, 1024])
    """Prompt tokens per row."""
    batches: list[int] = field(default_factory=lambda: [1, 8])
    """Rows that are written together."""
    drops: list[float] = field(default_factory=lambda: [0.8, 0.9])
    """Shares of the prompt's keys that the random gates have dropped at its end, in [0, 1)."""
    new_tokens: int = 32
    """Steps timed per method."""
    prefill_chunk: int = 512
    """Prompt tokens per pass in our engine, 0 for whole prompts."""
    packed: bool = True
    """On a CPU, let our engine multiply by packed weights (ctxprune.pack), pruned and dense alike."""
    layers: int = 8
    """Transformer blocks of the random model."""
    width: int = 512
    """Its hidden size."""
    heads: int = 8
    """Its query heads."""
    kv_heads: int = 8
    """Its key/value heads."""
    intermediate: int = 1408
    """Hidden size of its gated MLPs."""
    vocab: int = 4096
    """Its vocabulary."""
    rank: int = 64
    """Width of its interaction queries and keys."""
    memory: bool = False
    """Measure peak resident memory too, each method in a process of its own: as long again as the timing."""
    pool_gb: float = 0.0
    """Memory for all caches, in GB (1e9 bytes), of the fixed-pool test: dense and pruned serve the same requests from
    equal pools; 0 is off."""
    pool_requests: int = 16
    """Requests of that test, each a prompt of the context's length and new_tokens tokens to write; served
    benchmark.repeats times by every method in turn. With few new tokens it is reading prompts that is measured."""


@dataclass
class HiddenConfig:
    """Classifying long texts, or finding names in them, for benchmark target=hidden: an encoder trained from scratch on
    files of yours, then fine-tuned alike, dense, with tokens leaving its residual stream, and on shorter texts."""

    task: str = "classes"
    """classes (of whole texts) or entities (a tag for each word; sentences are joined into rows)."""
    train_file: str | None = None
    """Lines of text, tab, label; whatever labels stand there are the classes. Entities: lines of word, tab, tag (O,
    B-kind, I-kind), a blank line after each sentence."""
    test_file: str | None = None
    """The same for testing; empty: one text in 20 of train_file, which is not trained on."""
    judged_on: str = "test"
    """test, or validation: one text in 20 of train_file, to choose settings on."""
    tokenizer: str | None = None
    """Folder or hub id; empty: a byte-level BPE of `vocab` entries, learned from the texts trained on."""
    vocab: int = 2048
    """Entries of that BPE."""
    tokens: int = 1024
    """Tokens per row: longer texts are cut, shorter ones left out; sentences of entities are joined."""
    layers: int = 6
    """Layers of the encoder (BERT)."""
    width: int = 128
    """Its hidden size; the feed-forward layers are four times as wide."""
    heads: int = 4
    """Its attention heads."""
    base_tokens: int = 256
    """Tokens of the pieces, cut out of rows at random, on which the model is trained from scratch; at most tokens."""
    base_steps: int = 1200
    """Optimizer steps of that."""
    base_batch: int = 32
    """Pieces per step."""
    base_learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    steps: int = 100
    """Further steps on whole rows, the same for every method."""
    batch: int = 16
    """Rows per step."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW in these."""
    keep: list[float] = field(default_factory=lambda: [1.0, 0.4, 0.4, 0.2, 0.2, 0.1])
    """Share of a row's tokens that enters each layer: one entry per layer, 1.0 first, never rising.
    Deciding takes its time too: a few large drops are faster than many small ones."""
    asked: int = 16
    """Query rows whose attention scores the tokens; 0: all."""
    batches: list[int] = field(default_factory=lambda: [1, 8])
    """Rows that are classified together when time is taken; accuracy does not depend on it."""
    seed: int = 0
    """Of initialisation, batches and the random score."""
