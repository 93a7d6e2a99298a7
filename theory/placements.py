"""Deforming two linear maps that stand next to each other in a network already (statement 0, iv and v)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import specdef_jax as sd
from theory.assumptions import require_invariance
from theory.certificate import Certificate, Certificates, equality, refuses, under_assumptions
from theory.instances import adjacent
from theory.instances.adjacent import Adjacent
from theory.instances.matrices import orthonormal
from theory.instances.networks import Instance, transformer_instance
from theory.pair_factors import ALPHA, apart
from theory.sizes import Size


def on_placement(
    network: Adjacent, spec: sd.SpecDef, *, U: Float[Array, "groups d k"], key: PRNGKeyArray
) -> Certificates:
    """Certify that deforming two adjacent maps of anyone's network keeps its outputs.

    Args:
      network: apply, parameters, inputs, and which two layers are adjacent.
      spec: alpha, k and basis; its own directions are used for the certificate.
      U: fixed directions, with which the assumption is tested at random parameters.
      key: of the test, and of randomized subspaces.
    """
    claim = "deforming two adjacent maps keeps the outputs"
    name = f"{network.name}, {spec.basis}"

    @jax.jit
    def loss(params: PyTree, x: Array) -> Array:
        return jnp.mean(jnp.square(network.apply(params, x) - 0.3))

    def evaluate() -> Certificate:
        phi = functools.partial(_move, alpha=spec.alpha, U=U)
        require_invariance(loss, phi, network.params, network.x, key=key)
        return equality(claim, name, _gap(network, _placed(network, spec, key)), 0.0, scale=1.0)

    return under_assumptions(claim, name, evaluate)


def placements(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Value and output projections with any U; the axis-only places with columns of the identity."""
    found: list[Certificate] = []
    grouped = adjacent.grouped_attention(key)
    anywhere = [(grouped, basis) for basis in ("symmetric", "rotated", "axis")]
    diagonal = [adjacent.perceptron(key, "relu"), adjacent.gated(key), adjacent.norm_gain(key)]
    if size is not Size.SMALL:
        anywhere.append((_within(transformer_instance(key)), "symmetric"))
        diagonal.append(adjacent.perceptron(key, "leaky relu"))
    for network, basis in anywhere:
        spec = sd.SpecDef(alpha=ALPHA, k=1, basis=basis)
        found += on_placement(network, spec, U=_random(network, key), key=key)
    for network in diagonal:
        found += on_placement(network, _axis(), U=_axes(network), key=key)
        turned = _move(network.params, alpha=ALPHA, U=_random(network, key))
        gap = _gap(network, turned)
        found.append(apart("a T that is not diagonal keeps the outputs", network.name, gap))
    return found + _outside(key)


def _outside(key: PRNGKeyArray) -> list[Certificate]:
    """What stands between breaks the placement, and is named."""
    found: list[Certificate] = []
    which = "nothing nonlinear"
    for between in ("norm", "quantization"):
        network = adjacent.grouped_attention(key, between)
        refused = on_placement(network, sd.SpecDef(alpha=ALPHA, k=1), U=_random(network, key), key=key)
        found.append(refuses("a gauge pair needs linear maps between", network.name, refused, which))
    for network in (adjacent.perceptron(key, "gelu"), adjacent.gated(key, clamp=0.5)):
        refused = on_placement(network, _axis(), U=_axes(network), key=key)
        found.append(refuses("axis-only places need homogeneity", network.name, refused, which))
    return found


def _axis() -> sd.SpecDef:
    return sd.SpecDef(alpha=ALPHA, k=1, basis="axis")


def _axes(network: Adjacent) -> Float[Array, "groups d k"]:
    return jnp.eye(network.features)[None, :, :1]


def _random(network: Adjacent, key: PRNGKeyArray) -> Float[Array, "groups d k"]:
    keys = jax.random.split(key, network.groups)
    return jnp.stack([orthonormal(k, network.features, 1) for k in keys])


@jax.jit
def _move(params: PyTree, *, alpha: float, U: Float[Array, "groups d k"]) -> PyTree:
    """Return phi: T(a) into the first map and its bias, T(1/a) into the second, group by group."""
    first, second, (groups, d) = params["first"], params["second"], U.shape[:2]
    T, inverse = (jnp.eye(d) + (a - 1) * U @ jnp.swapaxes(U, 1, 2) for a in (alpha, 1 / alpha))

    def forward(features: Array) -> Array:
        return jnp.einsum("...gd,gde->...ge", features.reshape(-1, groups, d), T).reshape(features.shape)

    rows = second["w"].reshape(groups, -1, d, second["w"].shape[1])
    compensated = jnp.einsum("gde,gheo->ghdo", inverse, rows).reshape(second["w"].shape)
    first = {name: forward(x) for name, x in first.items()}
    return {**params, "first": first, "second": {**second, "w": compensated}}


def _placed(network: Adjacent, spec: sd.SpecDef, key: PRNGKeyArray) -> PyTree:
    """Return the parameters that sd.deform_pair makes."""
    first, second = network.params["first"], network.params["second"]
    pair = sd.deform_pair(first["w"], second["w"], spec, key=key, bias=first["b"], groups=network.groups)
    first, second = {"w": pair.first, "b": pair.bias}, {**second, "w": pair.second}
    return {**network.params, "first": first, "second": second}


def _gap(network: Adjacent, params: PyTree) -> float:
    """Return how far other parameters move the outputs, relative to the largest."""
    apply = jax.jit(network.apply)
    outputs, expected = apply(params, network.x), apply(network.params, network.x)
    return float(jnp.max(jnp.abs(outputs - expected)) / jnp.max(jnp.abs(expected)))


def _within(instance: Instance) -> Adjacent:
    """Return value and output projections of a transformer as adjacent maps."""
    names = {"block_0_v": "first", "block_0_o": "second"}

    def apply(params: PyTree, x: Array) -> Array:
        back = {new: old for old, new in names.items()}
        return instance.network.apply({back.get(name, name): layer for name, layer in params.items()}, x)

    params = {names.get(name, name): layer for name, layer in instance.params.items()}
    return Adjacent(f"{instance.name}, v and o", apply, params, instance.args[0], groups=2)
