"""Progress on the terminal. The library reports to a ``Progress``; only the command line shows one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Bar", "Progress", "RichProgress", "SilentProgress"]


class Bar(Protocol):
    """One task under way."""

    def __call__(self, done: int, text: str = "") -> None: ...


class Progress(Protocol):
    """Where long work reports to."""

    def bar(self, title: str, total: int, unit: str) -> AbstractContextManager[Bar]:
        """Show a task of ``total`` units; the bar is called with the units done so far and a short text."""
        ...

    def say(self, text: str) -> None:
        """Show a line."""
        ...


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[Bar]:
        def nothing(done: int, text: str = "") -> None:
            return

        yield nothing

    def say(self, text: str) -> None:
        return


class RichProgress:
    """Bars with rate and time left on a terminal; in a log file one line at the end of each task."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:  # a log has no width: numbers must not be cut to 80 columns
            self.console = Console(highlight=False, soft_wrap=True, width=120)

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[Bar]:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Columns

        columns = Columns(
            TextColumn("{task.description:<20}"), BarColumn(bar_width=14), TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("left"),
            TextColumn("{task.fields[text]}"),
            console=self.console, refresh_per_second=4,
        )  # fmt: skip
        with columns as shown:
            task = shown.add_task(title, total=total, rate="", text="")

            def advance(done: int, text: str = "") -> None:
                speed = shown.tasks[task].speed or shown.tasks[task].finished_speed
                rate = f"{speed:,.0f} {unit}/s" if speed else ""
                shown.update(task, completed=done, text=text, rate=rate)

            yield advance

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
