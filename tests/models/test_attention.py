"""Attention is the softmax of its definition, with derivatives, for every mask, group and sink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax.models.attention import attend, causal_mask

KEY = jax.random.key(4)


def by_definition(q, k, v, mask, sinks):
    """One query at a time, in numpy's order of operations: softmax first, then the mixture."""
    heads, groups = q.shape[2], k.shape[2]
    k, v = (jnp.repeat(x, heads // groups, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    if sinks is not None:
        resting = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, resting], axis=-1)
    shares = jax.nn.softmax(scores)[..., : k.shape[1]]
    return jnp.einsum("bhts,bshd->bthd", shares, v).reshape(*q.shape[:2], -1)


def case(groups, time, length, masked, sunk):
    keys = jax.random.split(jax.random.fold_in(KEY, 7 * groups + time), 4)
    q = jax.random.normal(keys[0], (2, time, 4, 6))
    k, v = (jax.random.normal(key, (2, length, groups, 6)) for key in keys[1:3])
    mask = causal_mask(jnp.arange(length - time, length), jnp.arange(length), 3) if masked else None
    return (q, k, v), mask, jax.random.normal(keys[3], (4,)) if sunk else None


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("time", "length", "masked", "sunk"),
    [(5, 5, True, True), (5, 5, False, False), (1, 7, True, False), (1, 7, False, True)],
)
def test_it_is_the_softmax_of_its_definition(groups, time, length, masked, sunk):
    given, mask, sinks = case(groups, time, length, masked, sunk)

    def told(of):
        """Return the mixture, the gradient of a function of it, and that gradient's derivative."""

        def run(x):
            mixed = of(*x[0], mask, x[1])
            return jnp.sum(jnp.sin(mixed)), mixed

        def compute(x):
            return jax.jvp(jax.grad(run, has_aux=True), (x,), (jax.tree.map(jnp.ones_like, x),))

        return jax.jit(compute)((given, sinks))

    for ours, theirs in zip(jax.tree.leaves(told(attend)), jax.tree.leaves(told(by_definition)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)


@pytest.mark.parametrize("sink", [None, -1e4, 1e4])
def test_large_scores_neither_overflow_nor_vanish(sink):
    (q, k, v), mask, _ = case(2, 5, 5, masked=True, sunk=False)
    sinks = None if sink is None else jnp.full(4, sink)
    ours = attend(300 * q, 300 * k, v, mask, sinks)
    np.testing.assert_allclose(ours, by_definition(300 * q, 300 * k, v, mask, sinks), atol=1e-12)


def test_half_precision_is_as_close_as_its_format():
    given, mask, sinks = case(2, 5, 5, masked=True, sunk=True)
    half = [x.astype(jnp.bfloat16) for x in given]
    mixed = attend(*half, mask, sinks.astype(jnp.bfloat16))
    assert mixed.dtype == jnp.bfloat16
    exact = by_definition(*(x.astype(jnp.float64) for x in half), mask, sinks.astype(jnp.bfloat16))
    np.testing.assert_allclose(
        mixed.astype(jnp.float64), exact, atol=4 * 2**-8 * float(jnp.abs(given[2]).max())
    )
