"""Who is asked, and what? The study's small model of recall under learned gates; one question of each context, with
every budget and with the whole context, once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctxprune.generation.cascade import Cascade
from ctxprune.tasks.recall import RecallConfig
from ctxprune.tasks.task import Split
from ctxprune.text.batches import IGNORED
from pipelines import store
from pipelines.config import Config
from pipelines.policy_study import jobs
from pipelines.policy_study.methods import named, restored
from pipelines.progress import Bars

FORMAT = 1
"""Raised when a step's output would differ for the same inputs."""
TASK = RecallConfig()
METHOD = "learned gates"
"""Of the study's methods: the one whose keys a cap can take away, lowest gate first."""
BATCH = 250
"""Prompts that are asked together."""
SEED = 1
"""Of the questions: seed 0 are the rows that the study trains, settles and judges on."""


@dataclass(frozen=True)
class Asked:
    """Answers to one question of each context, in an order that is as good as drawn."""

    small: dict[int, Tensor]
    """By budget, rising: probabilities (questions, choices) of the choices."""
    whole: Float[Tensor, "questions choices"]
    """The same from the whole context."""
    truth: Int[Tensor, " questions"]
    """Index of the right choice."""
    tokens: int
    """Tokens of a prompt."""

    def part(self, first: int, end: int) -> Asked:
        """Questions first to end - 1."""
        small = {budget: said[first:end] for budget, said in self.small.items()}
        return Asked(small, self.whole[first:end], self.truth[first:end], self.tokens)


def asked(config: Config, bars: Bars) -> tuple[Asked, Asked]:
    """The calibration questions of all draws, of the validation split, and the test questions. What is in the store is
    neither trained nor asked again."""
    settings, root = config.cascade, Path(config.runs) / "store"
    inputs = jobs.model_inputs(TASK.name, config.study.steps, settings.seed)
    point = jobs.point_of(root, config.study, inputs, METHOD, settings.share)
    with bars.task("small model, then its gates", 2) as advance:
        jobs.make_model(str(root), inputs)
        advance(1)
        jobs.make_point(str(root), point)
        advance(2)
    weights = load_file(store.folder_of(root, "study-point", point) / "weights.safetensors")
    (method,) = named([METHOD])
    model = restored(method, jobs.small(root, inputs), settings.share, weights)
    budgets = sorted({size for budget in settings.budgets for size in (budget, 2 * budget)})
    parts: tuple[tuple[Split, int], ...] = (
        ("validation", settings.draws * settings.questions),
        ("test", settings.judged),
    )
    found = []
    for split, count in parts:
        prompts, truth = questions(TASK, split, count)
        said = {}
        for budget in (*budgets, None):
            depends = {"format": FORMAT, "point": point, "split": split, "count": count, "budget": budget}
            make = partial(_ask, model, prompts, budget, bars)
            folder = store.ensure(root, "cascade-answers", depends, make)
            said[budget] = load_file(folder / "answers.safetensors")["probability"]
        whole = said.pop(None)
        found.append(Asked(said, whole, truth, prompts.shape[1]))
    return found[0], found[1]


def questions(
    task: RecallConfig, split: Split, count: int
) -> tuple[Int[Tensor, "questions n"], Int[Tensor, " questions"]]:
    """The first question of so many contexts, and the index of its answer among the values. One of each: questions of
    the same context are not independent, and a limit on their errors would count them as if they were."""
    rows = [task.batch(split, SEED, index, BATCH) for index in range(-(-count // BATCH))]
    prompts = torch.cat([batch.input_ids[:, : batch.end + 1] for batch in rows])[:count]
    answers = torch.cat([batch.answers[:, batch.end] for batch in rows])[:count]
    assert bool((answers != IGNORED).all()), "each context is followed by a question"
    return prompts, answers - task.symbols.first_value


def _ask(model, prompts: Tensor, budget: int | None, bars: Bars, staged: Path) -> None:
    symbols, found = TASK.symbols, []
    cascade = Cascade(model, torch.arange(symbols.first_value, symbols.first_filler), budget or 1, batch=BATCH)
    named_budget = "everything" if budget is None else f"{budget} live tokens"
    with bars.task(f"asked with {named_budget} (questions)", len(prompts)) as advance:
        for part in prompts.split(BATCH):
            found.append(cascade.ask(list(part), budget))
            advance(len(found) * BATCH)
    save_file({"probability": torch.cat(found)}, staged / "answers.safetensors")
