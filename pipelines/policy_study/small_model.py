"""Which model do the policies prune? A small Llama that learns a synthetic task in a minute or two on one CPU thread.

Under AdamW two layers sit on "guess one of the facts" for thousands of steps, and then on "a value somewhere near the
key". Muon on the matrices and short rows with few facts first are enough for recall. For overwrite it helped that one
head of the first layer starts out looking at the previous token: by biases, which RoPE turns into a preference for an
offset, so that the model stays a LlamaForCausalLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from ctxprune.errors import UserError
from ctxprune.tasks import Task
from ctxprune.tasks.needle import NeedleConfig
from ctxprune.tasks.overwrite import OverwriteConfig
from ctxprune.tasks.recall import RecallConfig
from ctxprune.tasks.recall_invisible import RecallInvisibleConfig
from ctxprune.tasks.scoring import score
from ctxprune.text.batches import IGNORED

_WARM_UP = 50  # steps
_MUON, _ADAM = 0.02, 2e-3  # peak learning rates: matrices, and embeddings with norms and biases
_NEXT_STAGE = 0.95  # running share of right answers at which an easier task has taught what it can
_PREVIOUS = 6.3
"""Size of the biases that look back: more than 90 % of the head's attention is on the previous token at the start."""


@dataclass(frozen=True)
class Shape:
    """The size of a small model."""

    hidden: int = 64
    """Width; the feed-forward layers are twice as wide."""
    layers: int = 2
    """Decoder layers; recall takes two."""
    heads: int = 2
    """Attention heads, each of hidden / heads numbers."""
    positions: int = 8192
    """Longest row in tokens; with RoPE it costs nothing."""
    look_back: bool = True
    """Whether one head of the first layer starts out looking at the previous token; attention has biases then."""

    def __post_init__(self):
        if self.layers < 2 or self.heads < 1 or self.hidden % (2 * self.heads):
            raise UserError(f"{self}: give 2 layers or more, and a hidden size that 2 * heads divides")


def build(vocab_size: int, shape: Shape, seed: int) -> LlamaForCausalLM:
    """An untrained model of the shape."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=shape.hidden,
            intermediate_size=2 * shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.positions,
            initializer_range=0.05,  # alone it left the plateau in 460 steps; 0.02 and 0.12 had not after 560
            attention_bias=shape.look_back,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    if shape.look_back:
        look_back(model)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Set the query and key biases of the first head so that it attends to the previous token.

    With a key bias (w, 0) in each pair of rotated numbers and a query bias of that turned back by one position, query i
    and key j score sum of w^2 cos((i - j - 1) theta) over the pairs (arXiv 2104.09864, eq. 16), highest at j = i - 1.
    Slow pairs tell near positions apart too little and are left at 0.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    half = config.hidden_size // config.num_attention_heads // 2
    theta = model.model.rotary_emb.inv_freq.float()
    size = _PREVIOUS * (theta > 0.05)
    attention.k_proj.bias[:half] = size
    attention.q_proj.bias[:half] = size * theta.cos()
    attention.q_proj.bias[half : 2 * half] = -size * theta.sin()


def stages(task: Task) -> list[tuple[float, Task]]:
    """(largest share of the steps, task): easier versions with the same vocabulary first, the task itself last."""
    if isinstance(task, RecallConfig):
        few, half = min(4, task.facts), max(task.length // 2, 3 * (task.facts + task.decoys // 2) + 2)
        fields = {name: value for name, value in asdict(task).items() if name != "chatter"}
        # Questions that follow each other directly are learned first: turns alone were not in 800 steps.
        tiny = RecallConfig(**{**fields, "length": 3 * few + 2, "fewest": min(2, few), "facts": few, "decoys": 0})
        middle = RecallConfig(**{**fields, "length": half, "decoys": task.decoys // 2})
        return [(0.4, tiny), (0.2, middle), (1.0, task)]
    if isinstance(task, RecallInvisibleConfig):
        few = min(task.facts, 8)
        return [(0.3, replace(task, facts=few, questions=min(few, task.questions))), (1.0, task)]
    if isinstance(task, OverwriteConfig):
        few = min(4, task.variables)
        once = replace(task, length=3 * few + 2, fewest=few, variables=few, writes=few)  # nothing goes stale yet
        writes = min(2 * few, task.writes)
        twice = replace(task, length=3 * writes + 2, fewest=min(task.fewest, few), variables=few, writes=writes)
        return [(0.2, once), (0.3, twice), (1.0, task)]
    if isinstance(task, NeedleConfig):
        lengths = [length for length in (16, 64, 256) if length < task.length]
        return [*((0.2, replace(task, length=length, depth=None)) for length in lengths), (1.0, task)]
    return [(1.0, task)]


def train(
    task: Task,
    shape: Shape | None = None,
    steps: int = 1000,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    *,
    batch: int = 64,
    mixed: float = 0.0,
) -> LlamaForCausalLM:
    """A model trained on `steps` batches of `batch` rows of the task's train split, in eval mode.

    The loss is that of the answers, plus `mixed` times that of every next token. progress(step, running share of right
    answers) is called after each step. The same arguments give the same model on one machine and number of threads.
    """
    model = build(task.vocab_size, shape or Shape(), seed).train()
    optimizers = _optimizers(model)
    plan, stage, stage_begin, running = stages(task), 0, 0, 0.0
    for step in range(steps):
        if stage < len(plan) - 1 and (running > _NEXT_STAGE or step - stage_begin >= plan[stage][0] * steps):
            stage, stage_begin, running = stage + 1, step, 0.0
        rows = plan[stage][1].batch("train", seed, step, batch)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, (step + 1) / _WARM_UP, 2 * (steps - step) / steps)
        loss, right = _loss(model(rows.input_ids).logits, rows.input_ids, rows.answers, mixed)
        running += 0.1 * (right - running)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if progress is not None:
            progress(step + 1, running)
    return model.eval()


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embedding and head (arXiv 2502.16982), AdamW for the rest."""
    matrices = [p for name, p in model.model.layers.named_parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or not name.startswith("model.layers")]
    optimizers = [
        torch.optim.Muon(matrices, lr=_MUON, weight_decay=0.0),
        torch.optim.AdamW(others, lr=_ADAM, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _loss(logits: Tensor, input_ids: Tensor, answers: Tensor, mixed: float) -> tuple[Tensor, float]:
    """Loss of a batch, and its share of right answers."""
    asked = answers != IGNORED
    said = logits[asked]
    loss = cross_entropy(said, answers[asked])
    if mixed:
        loss = loss + mixed * cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    return loss, (said.argmax(-1) == answers[asked]).float().mean().item()


@torch.no_grad()
def row_scores(model, task: Task, rows: int = 512, seed: int = 0, batch: int = 64) -> Tensor:
    """Accuracy of each of `rows` test rows, float [rows], everything kept; see ctxprune.tasks.scoring."""
    scores = []
    for index in range(-(-rows // batch)):
        asked = task.batch("test", seed, index, batch)
        scores.append(score(model(asked.input_ids, attention_mask=asked.attention_mask).logits, asked))
    return torch.cat(scores)[:rows]
