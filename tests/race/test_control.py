"""The scalar control against dense Hessians, and the matching of sharpness."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from specdef_jax import race
from specdef_jax.errors import ProblemError, SelectionError, SpecError
from tests.curvature.helpers_spectra import with_spectrum

KEY = jax.random.key(2)


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["w"] + params["b"], y).mean()


@pytest.fixture(scope="module")
def network():
    keys = jax.random.split(KEY, 3)
    params = {"w": jax.random.normal(keys[0], (4, 3)), "b": jax.random.normal(keys[1], (3,))}
    return params, jax.random.normal(keys[2], (8, 4)), jnp.arange(8) % 3


def test_only_the_curvature_along_the_scalar_grows(network):
    params, *data = network
    hessians = []
    for alpha in (1.0, 8.0):
        task = race.scalar_control(loss, params, "b", alpha, *data, index=1)
        np.testing.assert_allclose(task.loss(task.params, *data), loss(params, *data), rtol=1e-14)
        assert float(task.params["b"][1]) == pytest.approx(float(params["b"][1]) / alpha)
        for want, got in zip(
            jax.tree.leaves(params), jax.tree.leaves(task.read_back(task.params)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-15)
        flat, unravel = ravel_pytree(task.params)
        hessians.append(np.asarray(jax.hessian(lambda v, t=task, u=unravel: t.loss(u(v), *data))(flat)))
    factor = np.ones(15)
    factor[1] = 8.0  # "b" comes first
    np.testing.assert_allclose(hessians[1], factor[:, None] * hessians[0] * factor, rtol=1e-11, atol=1e-13)
    assert hessians[0][1, 1] > 1e-2


def test_bad_controls(network):
    params, *data = network
    with pytest.raises(SelectionError, match="no entry 0 of a leaf 'c'; leaves: 'b', 'w'"):
        race.scalar_control(loss, params, "c", 2.0, *data)
    with pytest.raises(SelectionError, match="no entry 3 of a leaf 'b'"):
        race.scalar_control(loss, params, "b", 2.0, *data, index=3)
    for alpha in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SpecError, match=r"alpha = .*positive and finite"):
            race.scalar_control(loss, params, "b", alpha, *data)


@pytest.mark.parametrize("guess", [0.1, 1.0, 3.0, 100.0])
@pytest.mark.parametrize(
    "curve", [lambda a: 2 + 3 * a**2, lambda a: max(5.0, 0.01 * a**2), lambda a: 3 * a**2 * (a > 1.5)]
)
def test_match_sharpness(curve, guess):
    calls = []

    def sharpness(alpha):
        calls.append(alpha)
        return float(curve(alpha))

    alpha, found = race.match_sharpness(sharpness, 1e4, guess)
    assert found == sharpness(alpha)
    assert found == pytest.approx(1e4, rel=0.01)
    assert len(calls) < 40


def test_a_rescaled_coordinate_is_matched_in_a_few_measurements():
    """sigma_1 of D H D: each measurement of a network is a Lanczos run."""
    hessian = with_spectrum(np.linspace(0.1, 15, 20))
    measured = []

    def sharpness(alpha):
        measured.append(alpha)
        scale = np.ones(20)
        scale[0] = alpha
        return float(np.abs(np.linalg.eigvalsh(scale[:, None] * hessian * scale)).max())

    for target in (1e3, 1e6):
        guess = (target / sharpness(1.0)) ** 0.5
        measured.clear()
        _, found = race.match_sharpness(sharpness, target, guess)
        assert found == pytest.approx(target, rel=0.005)
        assert len(measured) <= 4


def test_match_sharpness_at_alpha_one():
    for start in (10.0, 10.05):  # the target was itself measured at alpha = 1, to some tolerance
        assert race.match_sharpness(lambda a, s=start: s * a**2, 10.0, 1.0) == (1.0, start)


def test_sharpness_out_of_reach():
    with pytest.raises(ProblemError, match=r"no alpha gives sharpness 10; the closest is 20 at alpha = 1\."):
        race.match_sharpness(lambda a: 20.0 * a**2, 10.0, 4.0)
    with pytest.raises(ProblemError, match="no alpha gives sharpness 10; the closest is 3"):
        race.match_sharpness(lambda a: 3.0, 10.0, 4.0)
    with pytest.raises(ProblemError, match="no alpha gives sharpness"):
        race.match_sharpness(lambda a: 0.0, 10.0, 4.0)
    for target in (0.0, -1.0, float("nan")):
        with pytest.raises(ProblemError, match="must be positive and finite"):
            race.match_sharpness(lambda a: a**2, target, 1.0)
