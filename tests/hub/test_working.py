"""Work on many tensors stays within its memory, in order, and ends with the first error."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from specdef_jax.hub import working
from specdef_jax.hub.working import BYTES, Room, in_order

SOON = 30.0  # seconds after which a wait counts as a deadlock


class Load:
    """How much is held at once, and the most that ever was."""

    def __init__(self) -> None:
        self.now, self.most, self._lock = 0, 0, threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.now += size
            self.most = max(self.most, self.now)


def work_through(room: Room, sizes: list[int]) -> Load:
    """Hold every size in a thread of its own; a thread that waits forever fails the test, not hangs it."""
    load = Load()

    def hold(size: int) -> None:
        with room.hold(size):
            load.add(size)
            time.sleep(0.002)
            load.add(-size)

    threads = [threading.Thread(target=hold, args=(size,), daemon=True) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    return load


def test_a_room_is_never_filled_beyond_its_limit():
    sizes = [5, 5, 3, 3, 4, 7, 2, 1, 9, 10] * 4
    assert work_through(Room(10 * BYTES), sizes).most <= 10


def test_a_room_takes_all_that_fits():
    room, meeting = Room(9 * BYTES), threading.Barrier(3)

    def hold(size: int) -> None:
        with room.hold(size):
            meeting.wait(SOON)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(hold, [2, 3, 4]))


def test_what_never_fits_goes_in_alone():
    load = work_through(Room(10 * BYTES), [4, 25, 4, 25, 4])
    assert load.most == 25  # 29 if it had company


def test_room_is_given_back_after_an_error():
    room = Room(10 * BYTES)
    with pytest.raises(ZeroDivisionError), room.hold(10):
        _ = 1 / 0
    assert work_through(room, [10]).most == 10


def test_results_are_in_order_however_long_each_takes():
    def work(item: int) -> int:
        time.sleep(0.002 * ((7 * item) % 5))
        return item * item

    told: list[int] = []
    found = in_order(work, range(20), lambda item: 1, workers=4, told=told.append)
    assert found == [item * item for item in range(20)]
    assert told == list(range(1, 21))


@pytest.mark.parametrize("size", [1, 5])
def test_work_that_fits_together_goes_on_side_by_side(monkeypatch: pytest.MonkeyPatch, size: int):
    meeting = threading.Barrier(2)
    monkeypatch.setattr(working, "Room", lambda: Room(10 * BYTES))
    in_order(lambda _: meeting.wait(SOON), range(2), lambda _: size, workers=2, told=lambda done: None)


def test_work_that_does_not_fit_together_is_done_one_at_a_time(monkeypatch: pytest.MonkeyPatch):
    load = Load()

    def work(item: int) -> None:
        load.add(6)
        time.sleep(0.002)
        load.add(-6)

    monkeypatch.setattr(working, "Room", lambda: Room(10 * BYTES))
    in_order(work, range(8), lambda item: 6, workers=4, told=lambda done: None)
    assert load.most == 6


def test_the_first_error_ends_the_rest():
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise LookupError("item 3")
        time.sleep(0.01)
        return item

    told: list[int] = []
    with pytest.raises(LookupError, match="item 3"):
        in_order(work, range(1000), lambda item: 1, workers=2, told=told.append)
    assert told == [1, 2, 3]
    assert len(begun) < 100
    begun_then = len(begun)
    time.sleep(0.05)
    assert len(begun) == begun_then


def test_ctrl_c_ends_the_rest():
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(0.01)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_order(work, range(1000), lambda item: 1, workers=2, told=interrupt)
    assert len(begun) < 100


def test_work_runs_in_float64_whatever_the_caller_has():
    jax.config.update("jax_enable_x64", False)  # for all threads, as a user has it
    try:
        assert jnp.ones(1).dtype == jnp.float32
        found = in_order(lambda item: jnp.ones(1).dtype, [0], lambda item: 1, workers=1, told=lambda n: None)
        assert found == [jnp.float64]
    finally:
        jax.config.update("jax_enable_x64", True)


def test_no_items_are_no_work():
    assert in_order(lambda item: item, [], lambda item: 1, workers=1, told=lambda done: None) == []
