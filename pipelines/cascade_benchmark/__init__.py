"""Is a stated risk met on unseen questions, and what does asking with few keys first save? A small model with learned
gates, thresholds calibrated on many draws of validation questions, each judged on the same test questions."""

from __future__ import annotations

from collections.abc import Iterator

from ctxprune.errors import UserError
from ctxprune.generation.cascade import least_questions
from pipelines import output
from pipelines.cascade_benchmark import asking, judging, lines
from pipelines.config import CascadeConfig, Config
from pipelines.machine import machine, versions
from pipelines.progress import Bars


def main(config: Config) -> int:
    """The verb's target: a record per first budget and risk. 1 where a promise is broken more often than it may be."""
    settings = config.cascade
    check(config)
    about = {"cascade": vars(settings), "task": asking.TASK.name, "method": asking.METHOD}
    about |= {"machine": machine(), "versions": versions()}
    with Bars() as bars:
        calibration, test = asking.asked(config, bars)
    kept = True
    for record in records(settings, calibration, test):
        output.emit(record | about, config.format, lines.line(record))
        kept &= record["kept"]
    return 0 if kept else 1


def check(config: Config) -> None:
    """UserError, before any work, for what cannot be measured."""
    settings = config.cascade
    if config.generate.checkpoint is not None:
        raise UserError("benchmark target=cascade trains a small model of its own: leave checkpoint out")
    for name in ("budgets", "risks"):
        if not getattr(settings, name):
            raise UserError(f"cascade.{name} is empty: list at least one")
    for risk in settings.risks:
        least = least_questions(risk, settings.confidence)
        if settings.questions < least:
            few = f"cascade.questions={settings.questions}"
            raise UserError(
                f"{few} can never bear out a risk of {risk:g}, even without an error: give at least {least}"
            )
    longest = asking.TASK.length + 1
    for budget in settings.budgets:
        if 2 * budget >= longest:
            raise UserError(
                f"cascade.budgets holds {budget}, and twice as many hold a whole prompt of {longest} tokens: lower it"
            )


def records(settings: CascadeConfig, calibration: asking.Asked, test: asking.Asked) -> Iterator[judging.Record]:
    """A record per first budget and risk, budgets rising."""
    for budget in sorted(set(settings.budgets)):
        for risk in sorted(set(settings.risks)):
            yield judging.judge(
                calibration, test, (budget, 2 * budget), settings.draws, risk=risk, confidence=settings.confidence
            )
