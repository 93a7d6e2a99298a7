"""Selectors: what a glob means, how selectors compose, what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax import select
from specdef_jax.errors import SelectionError

KEY = jax.random.key(0)


def candidate(name, shape=(4, 4), dtype=jnp.float32):
    return select.Candidate(name, shape, jnp.dtype(dtype))


def chosen(selector, candidates, key=KEY):
    return [c.name for c in selector.choose(candidates, key)]


NAMES = ["kernel", "a/kernel", "a/b/kernel", "a/b/bias", "a/xb/kernel", "dense_0/kernel", "dense_12/kernel"]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("kernel", ["kernel", "a/kernel", "a/b/kernel", "a/xb/kernel", "dense_0/kernel", "dense_12/kernel"]),
        ("b/kernel", ["a/b/kernel"]),  # a leading **/ is implied, but components are whole
        ("*/kernel", ["a/kernel", "a/b/kernel", "a/xb/kernel", "dense_0/kernel", "dense_12/kernel"]),
        ("a/*", ["a/kernel"]),  # * stays within a component
        ("a/**", ["a/kernel", "a/b/kernel", "a/b/bias", "a/xb/kernel"]),
        ("a/**/kernel", ["a/kernel", "a/b/kernel", "a/xb/kernel"]),  # ** also stands for nothing
        ("**/b/*", ["a/b/kernel", "a/b/bias"]),
        ("dense_?/kernel", ["dense_0/kernel"]),
        ("dense_*/kernel", ["dense_0/kernel", "dense_12/kernel"]),
        ("dense_[0-9]/kernel", ["dense_0/kernel"]),
        ("a/[!x]*/kernel", ["a/b/kernel"]),
        ("a.b/kernel", []),  # a dot is a dot
        ("nothing", []),
    ],
)
def test_globs(glob, expected):
    assert chosen(select.match(glob), [candidate(name) for name in NAMES]) == expected


def test_several_globs_are_a_union_in_the_order_of_the_tree():
    assert chosen(select.match("b/bias", "a/kernel"), [candidate(n) for n in NAMES]) == [
        "a/kernel",
        "a/b/bias",
    ]


def test_and_lets_the_second_choose_among_the_first_and_or_is_the_union():
    sizes = [candidate("a/w", (2, 2)), candidate("b/w", (9, 9)), candidate("a/v", (3, 3))]
    assert chosen(select.match("a/*") & select.largest(1), sizes) == ["a/v"]
    assert chosen(select.largest(1) & select.match("a/*"), sizes) == []
    assert chosen(select.match("a/w") | select.largest(1), sizes) == ["a/w", "b/w"]
    both = select.match("a/w") & (select.match("b") | select.largest(1))
    assert both.description == "match('a/w') & (match('b') | largest(1))"


def test_largest_counts_entries_and_takes_matrices_only():
    leaves = [
        candidate("bias", (1000,)),
        candidate("w", (2, 3)),
        candidate("v", (3, 3)),
        candidate("u", (9,)),
    ]
    assert chosen(select.largest(1), leaves) == ["v"]
    assert chosen(select.largest(5), leaves) == ["w", "v"]
    assert chosen(select.largest(1), [candidate("x"), candidate("y")]) == ["x"]


def test_random_depends_on_the_key_and_is_uniform():
    leaves = [candidate(f"w{i}") for i in range(6)] + [candidate("bias", (3,))]
    draws = [tuple(chosen(select.random(2), leaves, jax.random.key(i))) for i in range(120)]
    assert draws[0] == tuple(chosen(select.random(2), leaves, jax.random.key(0)))
    assert {len(set(d)) for d in draws} == {2}
    counts = np.bincount([int(name[1:]) for d in draws for name in d], minlength=6)
    assert counts.sum() == 240
    assert counts.min() > 20  # 40 expected each, standard deviation 5
    assert chosen(select.random(9), leaves) == [f"w{i}" for i in range(6)]
    assert chosen(select.random(1), [candidate("bias", (3,))]) == []


@pytest.mark.parametrize(
    ("leaf", "is_matrix"),
    [
        (candidate("kernel"), True),
        (candidate("kernel", (3, 3, 4, 4), jnp.bfloat16), True),
        (candidate("bias", (4,)), False),
        (candidate("table", dtype=jnp.int32), False),
        (candidate("phase", dtype=jnp.complex64), False),
        (candidate("Embed_0/embedding"), False),
        (candidate("embed_tokens/weight"), False),
        (candidate("embedder/block/mlp/kernel"), True),  # only the last two components tell
    ],
)
def test_what_counts_as_a_matrix(leaf, is_matrix):
    assert leaf.is_matrix is is_matrix
    assert chosen(select.matrices(), [leaf]) == ([leaf.name] if is_matrix else [])


def test_as_selector_takes_what_users_write():
    leaves = [candidate(n) for n in ("a/kernel", "b/kernel", "a/bias")]
    assert chosen(select.as_selector("a/*"), leaves) == ["a/kernel", "a/bias"]
    assert chosen(select.as_selector(["a/kernel", "b/kernel"]), leaves) == ["a/kernel", "b/kernel"]
    assert chosen(select.as_selector(None), leaves) == ["a/kernel", "b/kernel"]  # what is added is no kernel
    selector = select.random(1)
    assert select.as_selector(selector) is selector


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: select.match(), ["match()", "at least one glob"]),
        (lambda: select.match(""), ["match('',)", "non-empty"]),
        (lambda: select.match("w[z-a]"), ["'w[z-a]'", "not a glob"]),
        (lambda: select.largest(0), ["largest(0)", "positive integer"]),
        (lambda: select.random(-1), ["random(-1)", "positive integer"]),
        (lambda: select.random(True), ["random(True)", "positive integer"]),
    ],
)
def test_a_selector_without_meaning_says_so(make, words):
    with pytest.raises(SelectionError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)
