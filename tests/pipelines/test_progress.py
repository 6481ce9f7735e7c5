"""Progress: bars on a terminal, a line now and then elsewhere, and never a word on stdout."""

from __future__ import annotations

import logging

import pytest

from pipelines import progress
from pipelines.progress import Bars, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (3700, "1 h 01 min")]
)
def test_durations_read_like_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_without_a_terminal_a_slow_task_says_how_long_it_will_take(monkeypatch, caplog, capsys):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(progress.Console, "is_terminal", False)
    with caplog.at_level(logging.INFO), Bars() as bars, bars.task("training", 10) as advance:
        for done in range(1, 11):
            advance(done)
    lines = [record.getMessage() for record in caplog.records]
    assert lines and all(line.startswith("training: ") and " left" in line for line in lines)
    assert capsys.readouterr().out == ""


def test_a_slow_start_does_not_count_in_the_time_left(monkeypatch, caplog):
    clock = iter((100.0, 110.0, 120.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.Console, "is_terminal", False)
    with caplog.at_level(logging.INFO), Bars() as bars, bars.task("training", 1000) as advance:
        for done in (1, 6, 11):
            advance(done)
    assert [record.getMessage() for record in caplog.records] == ["training: 11 of 1000, about 32 min 58 s left"]
