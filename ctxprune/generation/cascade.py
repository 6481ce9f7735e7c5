"""When is a pruned answer good enough? For questions with a few possible answers: ask with a small budget first, then
with twice as much, and at last with everything, while the answer is not sure enough.

How sure is sure enough is calibrated: on questions of the same kind, the threshold of each budget is lowered as far as
a stated risk allows, that of answering otherwise than the whole context would. The risk is bounded by exact binomial
limits (Clopper and Pearson, 1934); thresholds are tried from the strictest on and the first that fails ends the search
(fixed-sequence testing, as in arXiv 2110.01052), so the bound holds although one was chosen among many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.errors import UserError
from ctxprune.generation.prefill import prefill
from ctxprune.generation.prompts import check_prompt
from ctxprune.retrofitting import mode

TRIED = 50
"""Thresholds that are tried: evenly spaced among the confidences that occurred."""


@dataclass(frozen=True)
class Answers:
    """answer: index into the choices; budget: live tokens per layer it was given with, 0 for the whole context;
    confidence: probability among the choices of the one that was given. One per question."""

    answer: Int[Tensor, " questions"]
    budget: Int[Tensor, " questions"]
    confidence: Float[Tensor, " questions"]


@dataclass(frozen=True)
class Stage:
    """budget: live tokens per layer; threshold: confidence from which on its answer is given; infinite: never."""

    budget: int
    threshold: float


class Cascade:
    """Answers by choosing among tokens. Calibrate it before use."""

    def __init__(self, model, choices: Int[Tensor, " choices"], budget: int, *, chunk: int = 512, batch: int = 32):
        """choices: token ids of the possible answers; budget: live tokens per layer of the first stage, the second has
        twice as many; chunk: prompt tokens per pass; batch: prompts read together. Raises UserError for fewer than two
        choices or such as are no tokens of the model, and for a budget or batch < 1."""
        if len(choices) < 2:
            raise UserError(f"{len(choices)} choices: give at least two token ids")
        choices = torch.as_tensor(choices)
        vocabulary = model.get_input_embeddings().num_embeddings
        if choices.ndim != 1 or len(choices.unique()) < len(choices):
            raise UserError("choices are the ids of single tokens, each once: give a list of different ids")
        if choices.min() < 0 or choices.max() >= vocabulary:
            raise UserError(f"choices are token ids: give ids from 0 to {vocabulary - 1}")
        if chunk < 0:
            raise UserError(f"chunk is {chunk}: give 0 (all at once) or more")
        if budget < 1:
            raise UserError(f"budget is {budget}: give at least 1 live token")
        if batch < 1:
            raise UserError(f"batch is {batch}: give at least 1 prompt")
        self.model, self.choices, self.chunk, self.batch = model, choices, chunk, batch
        self.stages = [Stage(budget, math.inf), Stage(2 * budget, math.inf)]

    def calibrate(self, prompts: list[Tensor], *, risk: float = 0.05, confidence: float = 0.95) -> None:
        """Choose the thresholds on these questions, such that, with this confidence over their drawing, at most the
        share `risk` of further ones is answered by a small budget and otherwise than by the whole context.

        Raises UserError for a risk or confidence outside (0, 1), and without questions.
        """
        _check(len(prompts), risk, confidence)
        small = {stage.budget: self.ask(prompts, stage.budget) for stage in self.stages}
        self.stages = calibrated(small, self.ask(prompts), risk=risk, confidence=confidence)

    def answer(self, prompts: list[Tensor]) -> Answers:
        """Each question with the smallest budget whose answer is sure enough."""
        found = Answers(
            torch.zeros(len(prompts), dtype=torch.long),
            torch.zeros(len(prompts), dtype=torch.long),
            torch.zeros(len(prompts), dtype=torch.double),
        )
        todo = torch.arange(len(prompts))
        for stage in [*self.stages, None]:
            if len(todo) == 0:
                break
            if stage is not None and stage.threshold == math.inf:
                continue
            budget = None if stage is None else stage.budget
            sure, answer = self.ask([prompts[place] for place in todo.tolist()], budget).max(1)
            given = torch.ones_like(todo, dtype=torch.bool) if stage is None else sure >= stage.threshold
            found.answer[todo[given]], found.confidence[todo[given]] = answer[given], sure[given]
            found.budget[todo[given]] = budget or 0
            todo = todo[~given]
        return found

    @torch.inference_mode()
    def ask(self, prompts: list[Tensor], budget: int | None = None) -> Float[Tensor, "questions choices"]:
        """Probabilities of the choices, by the model with at most that many live tokens; None: by its dense self.

        Prompts of any lengths are read `batch` at a time; each sees itself alone. Raises UserError for a prompt that
        the model cannot read, and for a budget below what its policy protects.
        """
        if not prompts:
            raise UserError("there are no questions: give at least one")
        for prompt in prompts:
            check_prompt(self.model, prompt, 1)
        was_training, found = self.model.training, []
        self.model.eval()
        try:
            with mode(self.model, "dense" if budget is None else "hard"):
                for first in range(0, len(prompts), self.batch):
                    part = prompts[first : first + self.batch]
                    logits = prefill(self.model, PrunedCache(max_live_tokens=budget), part, self.chunk)
                    found.append(torch.softmax(logits[:, self.choices.to(logits.device)].double(), -1).cpu())
        finally:
            self.model.train(was_training)
        return torch.cat(found)


def calibrated(
    small: dict[int, Tensor], whole: Float[Tensor, "questions choices"], *, risk: float, confidence: float
) -> list[Stage]:
    """Cascade.calibrate on answers that are there already: the stages with their thresholds.

    small: by budget, in the order of asking, the probabilities (questions, choices) of the choices; whole: those from
    the whole context. Raises UserError for a risk or confidence outside (0, 1), and without questions.
    """
    _check(len(whole), risk, confidence)
    exact, parts = whole.argmax(1), len(small)
    everyone = torch.ones(len(whole), dtype=torch.bool)
    stages = []
    for budget, said in small.items():
        sure, answer = said.max(1)
        # Each stage gets its part of the risk and of the doubt. A later one is judged on all questions, also on those
        # that an earlier one answers: which these are was chosen on the same questions, and a limit on what is left
        # after a choice would not hold. On more questions there are more errors, so the bound stays a bound.
        threshold = lowest_threshold(sure, answer != exact, everyone, risk / parts, 1 - (1 - confidence) / parts)
        stages.append(Stage(budget, threshold))
    return stages


def answered(stages: list[Stage], small: dict[int, Tensor], whole: Float[Tensor, "questions choices"]) -> Answers:
    """Cascade.answer on answers that are there already, as in `calibrated`."""
    confidence, answer = whole.max(1)
    budget = torch.zeros_like(answer)
    for stage in reversed(stages):
        sure, said = small[stage.budget].max(1)
        given = sure >= stage.threshold
        answer, confidence = torch.where(given, said, answer), torch.where(given, sure, confidence)
        budget = budget.masked_fill(given, stage.budget)
    return Answers(answer, budget, confidence)


def least_questions(risk: float, confidence: float) -> int:
    """Questions that a calibration needs at least before either stage may answer at all: so many without an error."""
    return math.ceil(math.log((1 - confidence) / 2) / math.log1p(-risk / 2))


def _check(questions: int, risk: float, confidence: float) -> None:
    for name, value in {"risk": risk, "confidence": confidence}.items():
        if not 0 < value < 1:
            raise UserError(f"{name} is {value}: give a number between 0 and 1")
    if questions == 0:
        raise UserError("no questions to calibrate on: give some of the kind that will be asked")


def lowest_threshold(
    sure: Float[Tensor, " questions"],
    wrong: Tensor,
    asked: Tensor,
    risk: float,
    confidence: float,
) -> float:
    """The lowest confidence from which on answers may be given: among questions that were `asked`, those at least so
    `sure` and `wrong` are, with this confidence, at most the share `risk` of all questions. Infinite: none may."""
    seen = sure[asked].unique()
    if len(seen) == 0:
        return math.inf
    tried = seen[torch.linspace(0, len(seen) - 1, min(TRIED, len(seen))).round().long().unique()].flip(0)
    lowest = math.inf
    for threshold in tried.tolist():
        errors = int((wrong & asked & (sure >= threshold)).sum())
        if upper_limit(errors, len(sure), confidence) > risk:
            break
        lowest = threshold
    return lowest


@cache
def upper_limit(errors: int, trials: int, confidence: float) -> float:
    """The largest rate at which so few errors in so many trials still have a chance of 1 - confidence (Clopper and
    Pearson, one-sided)."""
    if errors >= trials:
        return 1.0
    low, high = errors / trials, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (rate, high) if _at_most(errors, trials, rate) > 1 - confidence else (low, rate)
    return high


@cache
def lower_limit(errors: int, trials: int, confidence: float) -> float:
    """The smallest rate at which so many errors still have that chance. With both limits at 1 - (1 - c) / 2 the rate
    lies between them with confidence c."""
    if errors == 0:
        return 0.0
    low, high = 0.0, errors / trials
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (rate, high) if _at_most(errors - 1, trials, rate) > confidence else (low, rate)
    return low


def _at_most(errors: int, trials: int, rate: float) -> float:
    """Chance of at most so many errors."""
    if rate in (0.0, 1.0):
        return float(rate == 0.0)
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(rate) + (trials - k) * math.log1p(-rate)
        for k in range(errors + 1)
    ]  # fmt: skip
    top = max(logs)
    return math.exp(top) * sum(math.exp(log - top) for log in logs)
