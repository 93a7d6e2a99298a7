"""What the commands print: tables on stdout; progress on stderr, for people and for logs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Report = Callable[[str, int, int], None]

_LOG_EVERY = 10.0  # seconds between two lines where there is no terminal
_PLAIN_WIDTH = 160  # columns where there is no terminal to ask


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; long names wrap, nothing is cut."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)


@contextlib.contextmanager
def reporting() -> Iterator[Report]:
    """Give report(stage, done, total), drawn as bars; total 0 means that the end is not known.

    What follows a colon in a stage says what it is at: "attacks: fuse" goes on from "attacks: lora".
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _log_lines(console)
        return
    text = TextColumn("{task.description}")
    columns = (SpinnerColumn(), text, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            name = stage.partition(":")[0]
            if name not in tasks:
                tasks[name] = bars.add_task(stage, total=total or None)
            bars.update(tasks[name], completed=done, total=total or None, description=stage)

        yield report


def _log_lines(console: Console) -> Report:
    last = time.monotonic()
    begun: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        begin = begun.setdefault(stage.partition(":")[0], now)
        if now - last >= _LOG_EVERY:
            last = now
            left = f", about {(now - begin) * (total - done) / done:.0f} s left" if 0 < done < total else ""
            console.print(f"{stage}: {done} of {total}{left}" if total else f"{stage} ...", markup=False)

    return report
