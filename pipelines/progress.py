"""How long will it take?

Bars with the time left, on stderr only; silent where stderr is not a terminal but for a line now and then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger("pipelines.progress")
QUIET_SECONDS = 15.0
"""Without a terminal, seconds between two progress lines of one task."""


class Bars:
    """Several progress bars at once; use as a context manager."""

    def __init__(self):
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description:<36}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.first: dict[str, tuple[float, int]] = {}
        self.said: dict[str, float] = {}
        self.open: dict[str, int] = {}

    def __enter__(self) -> Bars:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            self.progress.stop()

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for one task; call the yielded function with how much is done."""
        bar = self.progress.add_task(name, total=total)
        self.first.pop(name, None)

        def advance(done: int) -> None:
            self.progress.update(bar, completed=done)
            self._line(name, done, total)

        try:
            yield advance
        finally:
            self.progress.remove_task(bar)

    def update(self, name: str, done: int, total: int) -> None:
        """A bar that opens by itself at its first update; end it with close."""
        if name not in self.open:
            self.open[name] = self.progress.add_task(name, total=total)
        self.progress.update(self.open[name], completed=done)

    def close(self, name: str) -> None:
        if name in self.open:
            self.progress.remove_task(self.open.pop(name))

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.live:
            self.progress.console.print(text, highlight=False)
        else:
            logger.info("%s", text)

    def _line(self, name: str, done: int, total: int) -> None:
        if self.live or done <= 0:
            return
        now = time.monotonic()
        if name not in self.first:
            # Time left is judged from the first progress on: processes may have taken long to start.
            self.first[name], self.said[name] = (now, done), now
        since, before = self.first[name]
        if before < done < total and now - self.said[name] >= QUIET_SECONDS:
            self.said[name] = now
            left = duration((now - since) * (total - done) / (done - before))
            logger.info("%s: %d of %d, about %s left", name, done, total, left)


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 3 min 20 s, 1 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
