"""Work on many tensors at a time within a bound on memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import jax
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")

ROOM = 1 << 30  # bytes that work on several tensors may take together
BYTES = 12  # per entry of a tensor at work: as stored, in float32, and what is made of it

Step = Callable[[str, int, int], None]  # step(stage, done, total)


class Room:
    """Lets work in while it fits; what would never fit goes in alone."""

    def __init__(self, limit: int = ROOM) -> None:
        self._limit, self._taken = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, entries: int) -> Iterator[None]:
        """Wait for room for a tensor of so many entries, and hold it."""
        wanted = BYTES * entries
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + wanted <= self._limit)
            self._taken += wanted
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()


def default_workers() -> int:
    """Return how many tensors to work on at a time: one per core, four at most."""
    return min(os.cpu_count() or 1, 4)


@contextmanager
def threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Give a pool of workers, among which the cores are shared out.

    BLAS keeps its own threads spinning, as many as there are cores for each of ours: two workers on two cores
    took three times as long as with one BLAS thread each.
    """
    limit = max(1, (os.cpu_count() or 1) // workers)
    with threadpool_limits(limit, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        yield pool


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    size: Callable[[Item], int],
    *,
    workers: int,
    told: Callable[[int], None],
) -> list[Result]:
    """Return work(item) for every item, in float64 mode, several at a time; the first error ends it.

    Args:
      work: what to do.
      items: what to do it with.
      size: entries of an item's tensor.
      workers: threads.
      told: called with the number done so far.
    """
    room = Room()

    def one(item: Item) -> Result:
        with room.hold(size(item)), jax.enable_x64(True):  # a setting of the thread
            return work(item)

    results = []
    with threads(workers) as pool:
        futures = [pool.submit(one, item) for item in items]
        try:
            for future in futures:
                results.append(future.result())
                told(len(results))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results
