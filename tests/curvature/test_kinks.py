"""Where functions are not twice differentiable, and where they only look so."""

import jax
import jax.numpy as jnp
import optax
import pytest

from specdef_jax.curvature import kinks


@pytest.mark.parametrize(
    ("fn", "smooth", "edge"),
    [
        (jax.nn.relu, 1.0, 0.0),
        (jnp.abs, 1.0, 0.0),
        (jnp.sign, 1.0, 0.0),
        (jax.nn.leaky_relu, 1.0, 0.0),
        (lambda x: jnp.clip(x, -1, 2), 1.0, 2.0),
        (lambda x: jnp.maximum(x, x**2), 2.0, 1.0),
        (lambda x: jnp.where(x > 3, x, 2 * x), 1.0, 3.0),
        (jnp.sqrt, 1.0, 0.0),
        (lambda x: jnp.max(jnp.stack([x, 2 - x, x - 5])), 2.0, 1.0),
        (jax.jit(jax.checkpoint(jax.nn.relu)), 1.0, 0.0),
    ],
)
def test_on_and_off_the_edge(fn, smooth, edge):
    assert kinks(fn, jnp.asarray(smooth)) == []
    assert kinks(fn, jnp.asarray(edge)) != []


def test_entries_are_counted():
    (found,) = kinks(lambda x: jax.nn.relu(x).sum(), jnp.array([0.0, 1.0, 0.0]))
    assert found == ("max", 2)


def test_the_shift_inside_a_softmax_does_not_count():
    logits = jnp.zeros((2, 3))  # every maximum is a tie
    labels = jnp.array([0, 1])
    assert kinks(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels).mean(), logits) == []
    assert kinks(lambda z: jax.nn.softmax(z).sum(), logits) == []


def test_what_the_result_does_not_depend_on_does_not_count():
    assert (
        kinks(lambda x: jnp.sum(x**2) + 0 * jax.lax.stop_gradient(jax.nn.relu(x)).sum(), jnp.zeros(2)) == []
    )
