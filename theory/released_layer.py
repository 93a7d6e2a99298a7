"""One linear layer as released, in a number format: h -> fl(fl(h A) B), beside its exact output."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import specdef_jax as sd
from specdef_jax.pair import Basis, build_pair
from specdef_jax.parametrization import Deformed, KernelAxes
from specdef_jax.precision import Format
from specdef_jax.rounding import round_products

AXES = KernelAxes((0,), (1,))


@functools.cache
def released(form: Format) -> Callable[..., Array]:
    """Return the layer {"w": kernel or pair}, h -> h w, its products rounded as the format does."""
    network = sd.layered(_layer)
    return jax.jit(network if form.mantissa_bits is None else round_products(network, form))


def _layer(params: dict[str, Array], h: Array) -> Array:
    return h @ params["w"]


def run(form: Format, h: Any, first: Any, second: Any) -> Float[np.ndarray, "batch q"]:
    """Return what the layer computes in the format from factors in the order of the forward pass."""
    h, first, second = (jnp.asarray(x, form.dtype) for x in (h, first, second))
    pair = Deformed(first, second, "output", AXES)
    return np.asarray(released(form)({"w": pair}, h), np.float64)


def stored(x: Array, form: Format) -> Array:
    """Return x rounded to the storage format, in float64."""
    return x.astype(form.dtype).astype(jnp.float64)


def exact(x: Any) -> np.ndarray:
    """Return x in the widest float of NumPy, for references."""
    return np.asarray(x).astype(np.longdouble)


def errors(
    form: Format, W: Float[Array, "n m"], h: Any, alpha: float, k: int, basis: Basis = "symmetric"
) -> tuple[np.ndarray, np.ndarray]:
    """Return fl(C (Wt h)) - W h and W h for a pair on the output side, with the top k directions of W."""
    U = jnp.asarray(np.linalg.svd(np.asarray(W))[2][:k].T)
    weight, comp = build_pair(W, U, jnp.asarray(alpha), basis, "output")
    h = stored(jnp.asarray(h), form)
    expected = exact(h) @ exact(W)
    return (run(form, h, weight, comp) - expected).astype(float), expected.astype(float)


def ratio(error: np.ndarray, expected: np.ndarray) -> float:
    """Return ||error|| / ||expected||, infinite after an overflow."""
    return float(np.linalg.norm(error) / np.linalg.norm(expected)) if np.isfinite(error).all() else math.inf
