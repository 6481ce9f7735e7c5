"""What does a study of policies compare? Its settings, with their units."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StudyConfig:
    """Every way to prune on small models that answer questions: tasks x methods x shares x seeds."""

    tasks: list[str] = field(default_factory=list)
    """Names of ctxprune.tasks whose truth is known, or one of files (classes, agnews, sst2, multi30k,
    dialogsum); empty: the
    sweep is one of language models."""
    train_file: str | None = None
    """For a task of files, lines of text, tab, label, or what else it reads: learned from, with a part held out to set
    thresholds on."""
    test_file: str | None = None
    """The same to measure on; null: a part of train_file that is not learned from."""
    methods: list[str] = field(default_factory=list)
    """Names from the table; empty: all of them."""
    shares: list[float] = field(default_factory=lambda: [0.5, 0.25, 0.125])
    """Shares of the context's bytes that stay when the questions begin, interaction keys counted."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each seed is a small model of its own, and what is taught on it."""
    rows: int | None = None
    """Test rows per point, and validation rows that thresholds are set on; null: 2,048, or all that a task of files
    has. At an eighth of the context the mean that a threshold keeps of 512 is off by 1 to 2 %."""
    steps: int = 700
    """Training steps of each small model."""
    seconds: float | None = None
    """Wall clock that an agent or a bandit may learn for, alone on its core; null: until its steps are done."""
    repeats: int = 5
    """Timed repetitions of each method, in turn; the median counts. 0: nothing is timed."""
