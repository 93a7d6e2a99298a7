"""Deformed leaves, kernel axes, merge, and losses on structured parameters."""

from __future__ import annotations

import itertools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from specdef_jax.errors import LayeredUnsupported, ProblemError, SpecError
from specdef_jax.layered import layered
from specdef_jax.parametrization import (
    Deformed,
    KernelAxes,
    Problem,
    StructuredWeight,
    full_precision_matmul,
    is_structured,
    loss_on,
    merge,
    problem,
)

IN_OUT = KernelAxes((0,), (1,))


def normal(seed, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def some_pair(seed=0, n=3, m=2, side="output", dtype=jnp.float64):
    d = m if side == "output" else n
    return Deformed(normal(seed, n, m, dtype=dtype), normal(seed + 1, d, d, dtype=dtype), side, IN_OUT)


# Axes


@st.composite
def axes_and_shapes(draw):
    rank = draw(st.integers(2, 5))
    order = draw(st.permutations(range(rank)))
    cuts = sorted(draw(st.lists(st.integers(0, rank), min_size=3, max_size=3)))
    parts = [tuple(order[a:b]) for a, b in itertools.pairwise([0, *cuts, rank])]
    hypothesis.assume(parts[0] and parts[1])
    return KernelAxes(*parts), tuple(draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)))


@hypothesis.given(axes_and_shapes(), st.sampled_from(["output", "input"]))
def test_to_matrix_and_back_is_the_identity_and_the_matrix_is_einsums(drawn, side):
    axes, shape = drawn
    kernel = np.arange(np.prod(shape), dtype=float).reshape(shape)
    matrix = axes.to_matrix(jnp.asarray(kernel), side)
    stack = tuple(shape[i] for i in axes.stack)
    assert matrix.shape[:-2] == stack
    assert matrix.shape[-1] == axes.dim(shape, side)
    np.testing.assert_array_equal(axes.from_matrix(matrix, shape, side), kernel)
    matrix = np.asarray(matrix)
    # Entry by entry: the last axis counts the features of the side, in the order the axes name them.
    other = axes.window + (axes.inputs if side == "output" else axes.outputs)
    for index in itertools.islice(np.ndindex(*shape), 20):
        features = axes.features(side)
        j = np.ravel_multi_index([index[i] for i in features], [shape[i] for i in features])
        row = np.ravel_multi_index([index[i] for i in other], [shape[i] for i in other])
        assert matrix[(*(index[i] for i in axes.stack), row, j)] == kernel[index]


@pytest.mark.parametrize(
    "parts", [((0,), (0,)), ((0,), (2,)), ((), (0, 1)), ((0, 1), ()), ((0,), (1,), (1,)), ((-1,), (0,))]
)
def test_axes_that_do_not_name_each_axis_once_are_refused(parts):
    with pytest.raises(SpecError, match="exactly once; give disjoint inputs and outputs"):
        KernelAxes(*parts)


# The leaf and merge


@pytest.mark.parametrize(("n", "m"), [(3, 2), (2, 3), (3, 3)])
def test_a_pair_stands_for_weight_comp_on_the_output_side_and_comp_weight_on_the_input_side(n, m):
    output, inward = some_pair(0, n, m), some_pair(0, n, m, "input")
    np.testing.assert_allclose(merge(output), np.asarray(output.weight) @ np.asarray(output.comp), rtol=1e-14)
    np.testing.assert_allclose(merge(inward), np.asarray(inward.comp) @ np.asarray(inward.weight), rtol=1e-14)
    if n == m:  # the same factors: only the order, and no transpose, tells the sides apart
        assert not np.allclose(merge(output), merge(inward))


def test_a_convolution_and_a_stack_merge_as_einsum_says():
    hwio = KernelAxes((2,), (3,), window=(0, 1))
    leaf = Deformed(normal(0, 2, 3, 4, 5), normal(1, 4, 4), "input", hwio)
    np.testing.assert_allclose(merge(leaf), jnp.einsum("ic,hwco->hwio", leaf.comp, leaf.weight), rtol=1e-13)
    stacked = KernelAxes((1,), (2,), stack=(0,))
    leaf = Deformed(normal(0, 3, 4, 5), normal(1, 3, 5, 5), "output", stacked)
    np.testing.assert_allclose(merge(leaf), jnp.einsum("lic,lco->lio", leaf.weight, leaf.comp), rtol=1e-12)
    heads = KernelAxes((0,), (2, 1))  # features counted in the order the axes are named
    leaf = Deformed(normal(0, 3, 2, 4), normal(1, 8, 8), "output", heads)
    comp = leaf.comp.reshape(4, 2, 4, 2)
    np.testing.assert_allclose(merge(leaf), jnp.einsum("iad,daeb->ibe", leaf.weight, comp), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_merge_keeps_structure_and_dtypes_and_is_idempotent(dtype):
    params = {"a": some_pair(dtype=dtype), "b": [jnp.ones(2, jnp.int32), np.float32(1.0)], "c": None}
    merged = merge(params)
    plain = {"a": params["a"].weight, "b": params["b"], "c": None}
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    assert [jnp.asarray(x).dtype for x in jax.tree.leaves(merged)] == [dtype, jnp.int32, jnp.float32]
    again = merge(merged)
    assert all(x is y for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(again), strict=True))


def test_a_product_of_narrow_factors_accumulates_in_float32():
    a, b = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((4096, 1), jnp.bfloat16)
    assert full_precision_matmul(a, b).dtype == jnp.bfloat16
    assert float(full_precision_matmul(a, b)[0, 0]) == 4096  # bfloat16 sums would stop at 256
    text = str(jax.make_jaxpr(full_precision_matmul)(normal(0, 2, 2), normal(0, 2, 2)))
    assert "HIGHEST" in text


def test_deformed_leaves_are_arrays_only_so_grad_optax_and_ravel_take_them():
    params = {"w": some_pair(), "b": jnp.ones(2)}
    assert len(jax.tree.leaves(params)) == 3
    vector, unravel = ravel_pytree(params)
    assert jax.tree.structure(unravel(vector)) == jax.tree.structure(params)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(merge(p)["w"]) + p["b"]))(params)
    cosine = np.cos(merge(params)["w"])  # the chain rule by hand
    np.testing.assert_allclose(gradient["w"].weight, cosine @ np.asarray(params["w"].comp).T, rtol=1e-12)
    np.testing.assert_allclose(gradient["w"].comp, np.asarray(params["w"].weight).T @ cosine, rtol=1e-12)
    state = optax.adam(0.1).init(params)
    updates, _ = optax.adam(0.1).update(gradient, state, params)
    assert is_structured(optax.apply_updates(params, updates)["w"])


def test_what_is_structured():
    assert is_structured(some_pair())
    assert isinstance(some_pair(), StructuredWeight)
    # An NNX variable passes attributes on to its value, but is no structured weight itself.
    assert not is_structured(nnx.Param(some_pair()))
    assert not is_structured(jnp.ones(2))
    assert not is_structured({"materialize": 1})
    assert not is_structured(None)


# Losses


def plain_loss(params, x):
    return jnp.sum((x @ params["w"] + params["b"]) ** 2)


X = normal(9, 4, 3)
PLAIN = {"w": normal(0, 3, 2), "b": normal(3, 2)}
DEFORMED = {"w": some_pair(), "b": normal(3, 2)}


def test_a_loss_for_plain_params_works_on_a_deformed_tree():
    loss = loss_on(plain_loss, DEFORMED, X)
    assert float(loss(DEFORMED, X)) == pytest.approx(float(plain_loss(merge(DEFORMED), X)), rel=1e-14)
    gradient = jax.jit(jax.grad(loss))(DEFORMED, X)
    assert isinstance(gradient["w"], Deformed)
    assert float(jnp.abs(gradient["w"].comp).max()) > 0


def test_a_loss_that_reads_structured_weights_is_left_alone():
    seen = []

    def merging(params, x):
        seen.append(isinstance(params["w"], Deformed))
        return plain_loss(merge(params), x)

    def by_layers(params, x):
        seen.append(isinstance(params["w"], Deformed))
        return jnp.sum(layered(lambda p, x: x @ p["w"] + p["b"])(params, x) ** 2)

    for loss in (merging, by_layers):
        seen.clear()
        ready = loss_on(loss, DEFORMED, X)
        value = float(ready(DEFORMED, X))
        assert seen
        assert all(seen), "the loss was handed merged weights"
        assert value == pytest.approx(float(plain_loss(merge(DEFORMED), X)), rel=1e-12)


def test_a_loss_on_plain_params_is_left_alone_and_a_partial_keeps_its_data():
    loss = Partial(lambda scale, params, x: scale * plain_loss(params, x), jnp.asarray(2.0))
    assert loss_on(loss, PLAIN, X) is loss
    on_pair = loss_on(loss, DEFORMED, X)
    assert float(on_pair(DEFORMED, X)) == pytest.approx(2 * float(plain_loss(merge(DEFORMED), X)), rel=1e-14)
    assert 2.0 in [float(x) for x in jax.tree.leaves(on_pair) if jnp.ndim(x) == 0], "data must stay data"


def test_linen_losses_go_through_merge():
    model = nn.Dense(2, param_dtype=jnp.float64)
    params = {"params": {"kernel": some_pair(), "bias": jnp.ones(2)}}
    loss = loss_on(lambda p, x: jnp.mean(model.apply(p, x) ** 2), params, X)
    assert float(loss(params, X)) == pytest.approx(float(jnp.mean(model.apply(merge(params), X) ** 2)))


def test_a_problem_holds_params_loss_and_the_way_back():
    made = problem(plain_loss, DEFORMED, X)
    assert isinstance(made, Problem)
    value = jax.jit(lambda p, x: p.loss(p.params, x))(made, X)  # a pytree: it passes through jit
    assert float(value) == pytest.approx(float(plain_loss(merge(DEFORMED), X)), rel=1e-14)
    np.testing.assert_array_equal(made.read_back(DEFORMED)["w"], merge(DEFORMED)["w"])


@pytest.mark.parametrize("params", [PLAIN, DEFORMED], ids=["plain", "deformed"])
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda p, x: x @ merge(p)["w"], ["one real scalar", "(4, 2)"]),
        (lambda p, x: (jnp.zeros(()), x), ["one real scalar"]),
        (lambda p, x: jnp.zeros((), jnp.complex128), ["one real scalar", "complex"]),
        (lambda p, x: jnp.zeros((), jnp.int32), ["one real scalar", "int32"]),
        (lambda p, x: plain_loss(p, x[:, :2]), ["cannot be evaluated", "(2,) and (3,)"]),
        (lambda p, x: p["missing"], ["cannot be evaluated", "missing"]),
    ],
)
def test_a_loss_that_cannot_be_used_says_why(params, loss, words):
    with pytest.raises(ProblemError) as error:
        loss_on(loss, params, X)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_refusal_of_layered_reaches_the_user_and_is_not_merged_in_silence():
    def loss(params, x):
        return jnp.sum(layered(lambda p, x: x @ jnp.sin(p["w"]))(params, x))

    with pytest.raises(LayeredUnsupported, match="sin"):
        loss_on(loss, DEFORMED, X)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_single_and_differentiated_in_half(dtype):
    a = jax.random.normal(jax.random.key(0), (3, 4, 300), dtype)
    b = jax.random.normal(jax.random.key(1), (300, 5), dtype)
    weights = jax.random.normal(jax.random.key(2), (3, 4, 5), dtype)

    def loss(a, b):
        return jnp.sum((weights * full_precision_matmul(a, b)).astype(jnp.float32))

    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    found = full_precision_matmul(a, b)
    assert found.dtype == dtype
    unit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=1.1 * unit * np.abs(exact).max())
    # what the cotangents meet is narrow, so no product of the backward pass reads float32
    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(a, b))
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert sum("preferred_element_type=float32" in line for line in products) <= 1
    slopes = jax.grad(loss, (0, 1))(a, b)
    w, A, B = (np.asarray(x, np.float64) for x in (weights, a, b))
    for slope, want in zip(slopes, (w @ B.T, np.einsum("ijk,ijl->kl", A, w)), strict=True):
        np.testing.assert_allclose(np.asarray(slope, np.float64), want, atol=4 * unit * np.abs(want).max())


def test_half_precision_products_are_differentiated_in_every_way():
    a, b, da = (jax.random.normal(jax.random.key(i), (4, 4), jnp.bfloat16) for i in range(3))

    def loss(a, product):
        return jnp.sum(jnp.sin(product(product(a, b), a)).astype(jnp.float32))

    for product in (full_precision_matmul, jnp.matmul):
        curved = jax.jvp(jax.grad(lambda a, p=product: loss(a, p)), (a,), (da,))[1]
        mapped = jax.vmap(lambda a, p=product: loss(a, p))(jnp.stack([a, b]))
        if product is full_precision_matmul:
            first = curved, mapped
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (first[0], curved)), rtol=0.1, atol=0.5)
    np.testing.assert_allclose(first[1], mapped, rtol=0.05, atol=0.2)
