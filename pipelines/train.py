"""How is one trial run alone? As a study of one: same steps, same store, same records."""

from __future__ import annotations

from pipelines.config import Config
from pipelines.grid import Trial, trial_name
from pipelines.sweep import run_study


def main(config: Config, overrides: list[str]) -> int:
    """The verb: 0 when the trial has a result."""
    return run_study(config, [Trial(trial_name(config), config, overrides)], beside=True)
