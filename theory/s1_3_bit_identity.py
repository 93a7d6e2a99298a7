"""Statement 1.3 [ours]: With a power of two the rotated and axis bases are exact to the bit.

STATEMENT. Let a = 2^p. In floating point with an exponent for each number, by the same kernel and order of
summation, and while no factor, product, partial sum or result leaves the normal range, before or after it is
stored (exact zeros aside), the layer as released computes

    rotated, at a:  the same numbers as the rotated layer at a = 1,
    axis, at a:     the same numbers as the undeformed layer followed by an identity, and so as the undeformed
                    layer itself where the same kernel computes it,

on either side, and so do whole networks, with several layers, and with gauge placement on value and output
projections. "The same" is equality of all bits but for the sign of a zero. It is false for other a, for the
symmetric basis, beyond the range, for formats that share an exponent between numbers (int8, fp8 and MX block
scales), and for another order of summation.
Range: factors as in statement 1.4. float32 and bfloat16 reach 2^30 and more. float16, axis, output side: 2^12
for entries and activations below 16. On the INPUT side the compensation comes first and h / a is stored:
float16 fails there where |h_j| < a 2^-14. In gauge placement the output projection itself is divided by a:
float16 fails where an |O_ij| < a 2^-14, in general far below 2^12. Rotated in float16 fails at 2^4 when an
entry of Q is below 2^-10.

ASSUMPTIONS. a = 2^p, basis axis or rotated, the range as stated, one kernel, one order.

PROOF. Let s be a power of two. In the normal range fl(s x) = s fl(x) for every real x: scaling by s shifts
the exponent, so it maps the grid of numbers onto itself and nearest (and even) neighbours to such. Output
side: column j of A is D_j = a or 1 times that at a = 1, row j of B is 1/D_j times that (the library
multiplies by D after it has multiplied by Q, and rounds to storage after that; both commute with D by the
above). All products h_i A_ij, by induction along the order of summation all partial sums of column j, and the
stored result z_j are D_j times those at a = 1. The second product sums z_j B_jl = (D_j z'_j)(B'_jl / D_j) =
z'_j B'_jl: the exact products agree, so their roundings and all that follows do. Input side: the stored
(h B)_j is 1/D_j times that at a = 1, and the products (h B)_j A_jl agree as before. Axis at a = 1 has B = I:
the second product adds zeros to z_j 1, which is exact (and turns -0 into +0). Gauge: the same, as bias and
attention act on features one by one between the two maps. QED.

TIGHTNESS. Every condition is taken away alone below, and the bits differ.

SOURCE. Ours; exactness of scaling by the radix: Higham, Accuracy and Stability (2002), section 2.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds, trees
from specdef_jax.pair import Basis, build_pair
from specdef_jax.parametrization import is_structured
from specdef_jax.precision import Format, as_format
from specdef_jax.spec import Layer, Plan
from specdef_jax.words import Word
from theory.assumptions import require
from theory.bit_layers import CLAIM, layers, other_pairs, some
from theory.certificate import Certificate, Certificates, equality, refuses, seen, under_assumptions
from theory.instances.networks import Instance, mlp_instance, networks, transformer_instance
from theory.released_layer import run
from theory.sizes import Size


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify equal bits on random layers and networks, and refute each condition's absence."""
    found: list[Certificate] = []
    for basis in ("axis", "rotated"):
        found += layers(basis, key, size)
    found += other_pairs(key, size)
    for instance in networks(size, key):
        found += _network(instance, size, key)
    found += _gauge(transformer_instance(key), size, key)
    found += [*_conditions(key), *_outside(key)]
    return tuple(found)


# Networks


def on_network(
    apply: Callable[..., Array], params: PyTree, plan: Plan, *inputs: Any, dtype: str, name: str
) -> Certificates:
    """Certify equal bits on anyone's network, against the same plan at alpha = 1.

    For the axis basis that is the undeformed network followed by identities.

    Args:
      apply: apply(params, *inputs) -> outputs, on plain parameters.
      params: plain parameters, of any dtype.
      plan: what to deform.
      *inputs: example inputs.
      dtype: number format to evaluate in.
      name: of the instance.
    """
    form = as_format(dtype)
    params = jax.tree.map(lambda x: jnp.asarray(x).astype(form.dtype), params)

    def evaluate() -> Certificate:
        for path, layer in plan.items():
            alpha = float(layer.alpha)
            require(np.frexp(alpha)[0] == 0.5, f"alpha is a power of two ('{path}': {alpha:g})")
            require(layer.basis != "symmetric", f"the basis is axis or rotated ('{path}': {layer.basis})")
        one = sd.apply_plan(params, plan.with_alpha(1.0))
        for path, layer in plan.items():
            limit = float(bounds.exact_alpha_range(*_scaled(one, path, layer), form.dtype))
            told = f"'{path}': alpha = {float(layer.alpha):g}, limit {limit:.3g} in {dtype}"
            require(float(layer.alpha) <= limit, f"no stored factor leaves the normal range ({told})")
        same = sd.bit_identical(apply, one, sd.apply_plan(params, plan), *inputs, dtype=form)
        return equality(CLAIM, f"{name}, {dtype}", float(same), 1.0, allowance=0.0, word=Word.PROVED)

    return under_assumptions(CLAIM, name, evaluate)


def _scaled(one: PyTree, path: str, layer: Layer) -> tuple[Array, Array]:
    """Return the entries that alpha multiplies and divides, from the pair at alpha = 1."""
    pair = dict(trees.named_leaves(one, is_leaf=is_structured))[path]
    matrix = layer.axes.to_matrix(pair.weight, pair.side)
    comp = pair.comp if pair.side == "output" else jnp.swapaxes(pair.comp, -1, -2)
    d, k = layer.U.shape[-2:]
    chosen = jnp.sum(jnp.abs(layer.U), -1) > 0.5 if layer.basis == "axis" else jnp.arange(d) < k
    grown = matrix * chosen[..., None, :]
    return grown.astype(jnp.float64), (comp * chosen[..., :, None]).astype(jnp.float64)


def _network(instance: Instance, size: Size, key: PRNGKeyArray) -> list[Certificate]:
    """Axis and rotated in several formats; axis against the plain network too, without identities."""
    many = size is Size.FULL or instance.positions == 1
    apply, params, x = instance.network.apply, instance.params, instance.args[0]
    found: list[Certificate] = []
    for basis, p in (("axis", 12), ("rotated", 30)):
        plan = _plan(instance, basis, 2.0**p, key)
        for dtype in ("float32", "bfloat16") if many else ("float32",):
            found += on_network(apply, params, plan, x, dtype=dtype, name=f"{instance.name}, {basis}, 2^{p}")
    single, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
    deformed = sd.apply_plan(single, _plan(instance, "axis", 2.0**12, key))
    outputs = [np.asarray(jax.jit(sd.layered(apply))(tree, x)) for tree in (single, deformed)]
    differ = int(np.sum(outputs[0] != outputs[1]))
    name = f"{instance.name}, axis, 2^12, float32, outputs that differ from those of the plain network"
    found.append(seen("the plain network runs the same kernels", name, differ, differ == 0, against=0.0))
    return found


def _plan(instance: Instance, basis: Basis, alpha: float, key: PRNGKeyArray) -> Plan:
    spec = sd.SpecDef(alpha=alpha, k=2, basis=basis, side="output", budget=np.inf)
    return sd.plan(instance.params, spec, where=instance.where, key=key)


def _gauge(instance: Instance, size: Size, key: PRNGKeyArray) -> list[Certificate]:
    """Value and output projections at 2^12, stock network, logits compared; and what stops float16."""
    apply, x = instance.network.apply, instance.args[0]
    found: list[Certificate] = []
    claim = f"{CLAIM}, gauge"
    for dtype in ("float32", "bfloat16", "float64") if size is Size.FULL else ("float32", "bfloat16"):
        params = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), instance.params)
        compare = functools.partial(sd.bit_identical, apply, dtype=dtype)
        made = {
            (basis, alpha): _placed(params, basis, alpha, key)
            for basis, alpha in (
                ("axis", 2.0**12),
                ("axis", 3 * 2.0**10),
                ("rotated", 1.0),
                ("rotated", 2.0**12),
            )
        }
        name = f"{instance.name}, v and o, {dtype}"
        same = [
            compare(params, made["axis", 2.0**12], x),
            compare(made["rotated", 1.0], made["rotated", 2.0**12], x),
        ]
        found += [
            equality(f"{claim}, {basis}", f"{name}, 2^12", float(x), 1.0, allowance=0.0, word=Word.PROVED)
            for basis, x in zip(("axis", "rotated"), same, strict=True)
        ]
        other = not compare(params, made["axis", 3 * 2.0**10], x)
        found.append(some(f"{claim}, for 3 2^10 too", name, other))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), instance.params)
    limit = bounds.exact_alpha_range(half["block_0_v"]["w"], half["block_0_o"]["w"], jnp.float16)
    apart = not sd.bit_identical(apply, half, _placed(half, "axis", 2.0**12, key), x, dtype="float16")
    name = f"{instance.name}, v and o, float16, 2^12"
    found.append(
        some(f"{claim}, in float16 too", f"{name}, where the entries of O allow {limit:.0f} only", apart)
    )
    return found


def _placed(params: PyTree, basis: Basis, alpha: float, key: PRNGKeyArray) -> PyTree:
    v, o = params["block_0_v"], params["block_0_o"]
    spec = sd.SpecDef(alpha=alpha, k=1, basis=basis, budget=np.inf)
    pair = sd.deform_pair(v["w"], o["w"], spec, key=key, bias=v["b"], groups=2)
    placed = {"block_0_v": {"w": pair.first, "b": pair.bias}, "block_0_o": {**o, "w": pair.second}}
    return {**params, **placed}


# Without one of the conditions


def _conditions(key: PRNGKeyArray) -> list[Certificate]:
    """Range, exponents of one's own, and the order of summation, each taken away."""
    half, single = as_format("float16"), as_format("float32")
    c, s = np.cos(9e-4), np.sin(9e-4)
    U, h = jnp.array([[c], [s]]), np.array([[1.0, 0.0]])
    rotated = [_outputs(half, np.eye(2), U, a, "rotated", h) for a in (1.0, 16.0)]
    M = np.asarray(jax.random.normal(key, (8, 4)))
    inputs = np.asarray(jax.random.normal(jax.random.fold_in(key, 1), (64, 8)))
    axis = [_outputs(half, M, jnp.eye(4)[:, :1], a, "axis", inputs) for a in (1.0, 2.0**14)]
    scaled = [_block_scaled(M * np.array([a, 1, 1, 1])) / np.array([a, 1, 1, 1]) for a in (1.0, 2.0**6)]
    orders = [
        run(single, inputs[:, order], M[order], np.eye(4)) for order in (np.arange(8), np.arange(8)[::-1])
    ]
    return [
        some("rotated in float16 reaches 2^4", "Q with an entry 9e-4", _apart(*rotated)),
        some("axis in float16 reaches 2^14", "Gaussian layer and inputs", _apart(*axis)),
        some("equal bits with a shared exponent", "int8 with one scale for each row, 2^6", _apart(*scaled)),
        some("equal bits in another order of summation", "float32, 8 terms backwards", _apart(*orders)),
    ]


def _outputs(
    form: Format, M: np.ndarray, U: Array, alpha: float, basis: Basis, h: np.ndarray
) -> Float[np.ndarray, "batch m"]:
    weight, comp = build_pair(
        jnp.asarray(M, form.dtype).astype(jnp.float64), U, jnp.asarray(alpha), basis, "output"
    )
    return run(form, h, weight, comp)


def _block_scaled(M: np.ndarray) -> np.ndarray:
    """Round each row to 8-bit integers times one power of two, as block-scaled formats do."""
    scale = 2.0 ** (np.floor(np.log2(np.abs(M).max(axis=1, keepdims=True))) - 6)
    return np.round(M / scale) * scale


def _apart(a: np.ndarray, b: np.ndarray) -> bool:
    return not np.array_equal(a, b)


def _outside(key: PRNGKeyArray) -> list[Certificate]:
    """What the assumptions exclude is refused by name."""
    instance = mlp_instance(key)
    apply, params, x = instance.network.apply, instance.params, instance.args[0]

    def refused(basis: Basis, alpha: float, dtype: str) -> Certificates:
        return on_network(apply, params, _plan(instance, basis, alpha, key), x, dtype=dtype, name="")

    return [
        refuses(CLAIM, "axis, a = 1000", refused("axis", 1000.0, "float32"), "power of two"),
        refuses(CLAIM, "symmetric, a = 2^4", refused("symmetric", 16.0, "float32"), "axis or rotated"),
        refuses(CLAIM, "axis, a = 2^20 in float16", refused("axis", 2.0**20, "float16"), "normal range"),
    ]
