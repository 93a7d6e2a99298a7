"""Stages side by side: what they give, in which order, what an error ends, and how the time is counted."""

import functools
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from specdef_jax.replication import stages
from specdef_jax.replication.stages import Stages, at_once


def test_results_keep_their_order_and_the_callers_precision(monkeypatch):
    monkeypatch.setattr(stages, "cores", lambda: 2)
    second = threading.Event()

    def first_one():
        assert second.wait(10)  # runs beside the other one
        return jnp.asarray(1.0).dtype.name

    def second_one():
        second.set()
        return jnp.asarray(1.0).dtype.name

    told = []
    for wide in (True, False):
        second.clear()
        with jax.enable_x64(wide):
            jobs = {"one": {"a": first_one}, "other": {("b", 1): second_one, "c": lambda: 3}}
            found = at_once(jobs, lambda *step: told.append(step))
        dtype = "float64" if wide else "float32"
        assert found == {"one": {"a": dtype}, "other": {("b", 1): dtype, "c": 3}}
        assert list(found["other"]) == [("b", 1), "c"]
    assert sorted(told) == sorted([("one", 1, 1), ("other", 1, 2), ("other", 2, 2)] * 2)


def test_an_error_ends_it_and_what_waits_is_not_begun(monkeypatch):
    monkeypatch.setattr(stages, "cores", lambda: 1)
    begun = []

    def fails():
        raise ValueError("no")

    def slow(i):
        time.sleep(0.01)
        begun.append(i)

    jobs = {"a": fails} | {i: functools.partial(slow, i) for i in range(200)}
    with pytest.raises(ValueError, match="no"):
        at_once({"one": jobs}, lambda *step: None)
    assert len(begun) < 200


def test_a_stage_is_computed_once_and_time_that_overlaps_counts_once(tmp_path, monkeypatch):
    clock = iter([100.0, 110.0, 105.0, 112.0, 200.0, 203.0])
    monkeypatch.setattr(stages, "time", SimpleNamespace(time=lambda: next(clock)))
    keep = Stages(tmp_path, "key", fresh=False)
    assert [keep(name, lambda name=name: name * 2) for name in "abc"] == ["aa", "bb", "cc"]
    assert keep.seconds == {"a": 10.0, "b": 7.0, "c": 3.0}
    assert keep.spent == 15.0

    def refuse():
        raise AssertionError("computed again")

    monkeypatch.setattr(stages, "time", SimpleNamespace(time=lambda: 1000.0))
    again = Stages(tmp_path, "key", fresh=False)
    assert [again(name, refuse) for name in "abc"] == ["aa", "bb", "cc"]
    assert (again.seconds, again.spent) == (keep.seconds, keep.spent)
    for other in (Stages(tmp_path, "other", fresh=False), Stages(tmp_path, "key", fresh=True)):
        with pytest.raises(AssertionError, match="computed again"):
            other("a", refuse)


def test_a_stage_may_have_begun_earlier(monkeypatch):
    monkeypatch.setattr(stages, "time", SimpleNamespace(time=lambda: 50.0))
    keep = Stages(None, "key", fresh=False)
    assert keep("a", lambda: None, began=20.0) is None
    assert keep.seconds == {"a": 30.0}
