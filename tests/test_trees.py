"""Pytrees as vectors, against NumPy on the flattened tree; the names of leaves."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from specdef_jax import trees
from specdef_jax.errors import StructureError


def tree(seed: int, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.standard_normal((3, 2)), dtype),
        "b": [jnp.asarray(rng.standard_normal(4), dtype), jnp.asarray(rng.standard_normal(()), dtype)],
    }


def flat(a) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(a)])


def test_vector_operations_agree_with_numpy():
    a, b = tree(0), tree(1)
    assert float(trees.inner(a, b)) == pytest.approx(flat(a) @ flat(b), rel=1e-14)
    assert float(trees.norm(a)) == pytest.approx(np.linalg.norm(flat(a)), rel=1e-14)
    np.testing.assert_allclose(flat(trees.scale(3.0, a)), 3 * flat(a), rtol=1e-15)
    np.testing.assert_allclose(flat(trees.axpy(-2.0, a, b)), flat(b) - 2 * flat(a), rtol=1e-14)
    assert trees.size(a) == trees.size(jax.eval_shape(lambda: a)) == 11


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_norm_keeps_the_dtype_of_its_tree(dtype):
    a = tree(0, dtype)
    normalized = trees.scale(1 / trees.norm(a), a)
    assert trees.norm(a).dtype == trees.inner(a, a).dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(normalized)} == {jnp.dtype(dtype)}


def test_result_dtype_is_what_the_leaves_promote_to():
    assert (
        trees.result_dtype({"a": jnp.zeros(1, jnp.bfloat16), "b": jnp.zeros(1, jnp.float32)}) == jnp.float32
    )


def test_normal_like_draws_independent_normals_of_the_same_dtypes(key):
    like = {"a": jnp.zeros((200, 100), jnp.float32), "b": jnp.zeros((200, 100))}
    drawn = trees.normal_like(key, like)
    assert [x.dtype for x in jax.tree.leaves(drawn)] == [jnp.float32, jnp.float64]
    a, b = (np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(drawn))
    assert abs(a.mean()) < 0.05
    assert a.std() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    assert not np.array_equal(flat(trees.normal_like(jax.random.key(1), like)), flat(drawn))


class Pair(NamedTuple):
    kernel: jax.Array
    value: jax.Array


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.head = nnx.Linear(3, 2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs)])


def test_names_of_a_raw_tree_join_keys_by_a_slash():
    raw = {"enc": {"w": jnp.ones(1), "value": jnp.ones(1)}, "blocks": [Pair(jnp.ones(1), jnp.ones(1))]}
    names = [name for name, _ in trees.named_leaves(raw)]
    # A dictionary key is kept, whatever it is called.
    assert set(names) == {"enc/w", "enc/value", "blocks/0/kernel", "blocks/0"}


def test_names_of_an_nnx_state_drop_value():
    _, state = nnx.split(Net(nnx.Rngs(0)))
    raw_path = str(jax.tree_util.tree_flatten_with_path(state)[0][0][0][-1])
    assert raw_path == ".value", "NNX names its values another way now; path_name must follow"
    names = [name for name, _ in trees.named_leaves(state)]
    assert names == ["blocks/0/bias", "blocks/0/kernel", "head/bias", "head/kernel"]


def test_names_of_linen_params_are_those_of_the_modules():
    params = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    assert [name for name, _ in trees.named_leaves(params)] == ["params/bias", "params/kernel"]


def test_map_named_gives_each_leaf_its_own_name():
    a = tree(0)
    assert trees.map_named(lambda name, _: name, a) == {"a": "a", "b": ["b/0", "b/1"]}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"a": np.zeros(2)}, ["the tangent", "'b/0'", "missing"]),
        ({"a": np.zeros(2), "b": [np.zeros(3)], "c": np.zeros(1)}, ["'c'", "not expected"]),
        ({"a": np.zeros(2), "b": [np.zeros(4)]}, ["'b/0'", "(4,)", "(3,)", "same shapes"]),
    ],
)
def test_a_tree_of_another_structure_is_named(found, words):
    expected = {"a": np.zeros(2), "b": [np.zeros(3)]}
    with pytest.raises(StructureError) as error:
        trees.check_same_structure(expected, found, "the tangent")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_first_leaf_that_differs_is_named_and_shape_structs_will_do():
    expected = {name: np.zeros(2) for name in "abcdef"}
    with pytest.raises(StructureError, match="'a'"):
        trees.check_same_structure(expected, {name: np.zeros(3) for name in "abcdef"}, "x")
    trees.check_same_structure(expected, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, expected)), "x")
