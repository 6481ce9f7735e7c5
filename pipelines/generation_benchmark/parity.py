"""Is what is timed right? On a small float64 copy: dense tokens are transformers' own, pruned steps equal one pass."""

from __future__ import annotations

import copy
import dataclasses

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ctxprune.drop_time import forward_with_drop_times
from ctxprune.policies import PolicyConfig
from ctxprune.retrofitting import state_of, wrappers
from pipelines.generation_benchmark.calibration import calibrate, random_gates
from pipelines.generation_benchmark.ours import Ours
from pipelines.generation_benchmark.subject import SEED, Subject, retrofitted
from pipelines.generation_benchmark.theirs import Transformers

LAYERS, ROWS, PROMPT, NEW, CHUNK = 2, 2, 40, 24, 16
DROP = 0.5
"""Of the prompt's keys: some must go and some must stay."""
ALLOWED = 1e-9
"""Largest error of a logit, of entries near 1 in float64."""
PLAYED = 0.5
"""Share of tokens that steps which are played have to agree on: with fewer a graph does not what its step does."""
SHARPER = 3.0
"""Factor on the initial weights, so that attention is uneven and tokens differ clearly."""


def checked(subject: Subject) -> dict[str, object]:
    """The record of the comparison, with `passed`."""
    policy = state_of(next(iter(subject.pruned.values()))).policy
    twin = _small(subject.twin)
    ids = torch.randint(twin.config.vocab_size, (ROWS, PROMPT), generator=torch.Generator().manual_seed(SEED))
    model = retrofitted(twin, _of_few_layers(policy))
    if all(wrapper.rule.gate is not None for wrapper in wrappers(model)):
        random_gates(model, SEED)
        calibrate(model, ids, DROP)
    mine = Ours(model, "dense", ids, CHUNK)
    theirs = [Transformers(twin, ids), Transformers(twin, ids, PROMPT + NEW)]
    for method in (mine, *theirs):
        method.read()
        method.steps(NEW)
    same = all(torch.equal(mine.text(), other.text()) for other in theirs)
    error, dropped = _disagreement(model, ids)
    played = _played(next(iter(subject.pruned.values())), ids)
    passed = same and error <= ALLOWED and (played is None or played >= PLAYED)
    return {
        "kind": "parity", "operation": "generation", "passed": passed, "same_tokens": same, "error": error,
        "allowed": ALLOWED, "dropped": dropped, "same_tokens_played": played,
    }  # fmt: skip


def _played(model: PreTrainedModel, ids: torch.Tensor) -> float | None:
    """On a GPU, the share of tokens that are the same whether steps are captured or not, in the type of the model that
    is timed: 16 bits may round another way in a graph, and one other token changes those behind it. None: nothing is
    captured."""
    state, written = state_of(model), []
    before = state.graphs
    for graphs in (False, before):
        method, state.graphs = Ours(model, "hard", ids.to(model.device), CHUNK), graphs
        if method.runner.capture is None:
            state.graphs = before
            return None
        method.read()
        method.steps(NEW)
        written.append(method.text()[:, PROMPT + 1 :])
    return (written[0] == written[1]).float().mean().item() if method.runner.played else None


def _disagreement(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, float]:
    """Largest difference of a logit between steps and one pass, and the share of the tokens' keys gone at the end."""
    pruned = Ours(model, "hard", ids, CHUNK)
    pruned.read()
    logits = [pruned.logits]
    for _ in range(NEW):
        pruned.steps(1)
        logits.append(pruned.logits)
    whole = forward_with_drop_times(model, pruned.text())[1][:, PROMPT - 1 : -1]
    wrong = (torch.stack(logits, 1) - whole).abs().max().nan_to_num(torch.inf).item()
    return wrong, 1 - pruned.live_share()


def _small(twin: PreTrainedModel) -> PreTrainedModel:
    """Random weights of the same family and sizes, with two layers, in float64 on the CPU."""
    config = copy.deepcopy(twin.config)
    config.num_hidden_layers = min(LAYERS, config.num_hidden_layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    if getattr(config, "max_position_embeddings", None) is not None:
        config.max_position_embeddings = max(config.max_position_embeddings, PROMPT + NEW + 1)
    torch.manual_seed(SEED)
    small = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SHARPER)
    return small


def _of_few_layers(policy: PolicyConfig) -> PolicyConfig:
    """The same policy where it has an entry per layer."""
    changes = {name: value[:LAYERS] for name, value in vars(policy).items() if isinstance(value, tuple)}
    return dataclasses.replace(policy, **changes)
