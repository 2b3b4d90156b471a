"""Progress on stderr: a bar with the time left on a terminal, else one line after what took a second."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(iterable: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
    """Yield from `iterable` and show how far it is.

    Args:
      description: what is going on, a few words.
      total: how many items there will be; by default the iterable's length, if it has one.

    >>> sum(track([1, 2, 3], description="adding"))
    6
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr.isatty():
        yield from _bar(iterable, description, total)
        return
    start, count = time.monotonic(), 0
    for item in iterable:
        yield item
        count += 1
    if (seconds := time.monotonic() - start) >= 1:  # what is over at once needs no report
        print(f"{description}: {count} done in {seconds:.1f} s", file=sys.stderr)


def _bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield from bar.track(iterable, total=total, description=description)
