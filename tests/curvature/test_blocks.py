"""Choosing leaves, preconditioning, and means over batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from specdef_jax import curvature as cv
from specdef_jax import trees
from specdef_jax.errors import ProblemError, SelectionError, StructureError
from tests.curvature import helpers_operators as ho

KEY = jax.random.key(4)


def test_names_are_key_paths_and_a_node_means_its_leaves():
    params = ho.deformed(ho.network()[0])
    chosen = partial(cv.blocks.chosen, params)
    assert chosen("first") == ("first/bias", "first/kernel/weight", "first/kernel/comp")
    assert chosen("kernel") == ("first/kernel/weight", "first/kernel/comp", "second/kernel")
    assert chosen("**/comp") == ("first/kernel/comp",)
    assert chosen(["second", "bias"]) == ("first/bias", "second/kernel")
    with pytest.raises(SelectionError, match="no leaf matches 'third'; there are first/bias"):
        chosen(["first", "third"])
    with pytest.raises(SelectionError, match="at least one glob"):
        chosen([])


def test_blocks_of_one_hessian_fit_together():
    params, x, labels = ho.network()
    block = partial(cv.block, ho.loss, params)
    v = trees.normal_like(KEY, params)
    whole = cv.hessian(ho.loss, params, x, labels).mv(v)
    parts = {
        rows: [block(rows, cols, x, labels).mv({cols: leaf}) for cols, leaf in trees.named_leaves(v)]
        for rows, _ in trees.named_leaves(params)
    }
    for name, leaf in trees.named_leaves(whole):
        np.testing.assert_allclose(sum(part[name] for part in parts[name]), leaf, atol=1e-13)


def test_an_off_diagonal_block_is_the_transpose_of_its_mirror():
    params, x, labels = ho.network()
    one = cv.block(ho.loss, params, "first", "second", x, labels)
    other = cv.block(ho.loss, params, "second", "first", x, labels)
    u = trees.normal_like(KEY, one.image)
    for name, leaf in one.rmv(u).items():
        np.testing.assert_array_equal(leaf, other.mv(u)[name])


def test_only_the_chosen_leaves_need_be_floats():
    params, x, labels = ho.network()
    counted = params | {"steps": jnp.array(3)}

    def loss(params, x, labels):
        return ho.loss(params, x, labels)

    op = cv.block(loss, counted, "second", None, x, labels)
    np.testing.assert_allclose(
        cv.dense(op).matrix, cv.dense(cv.block(loss, params, "second", None, x, labels)).matrix
    )
    with pytest.raises(ProblemError, match="leaf 'steps' has dtype int"):
        cv.block(loss, counted, "steps", None, x, labels)


def test_adam_diagonal_is_what_adam_divides_by():
    params, x, labels = ho.network()
    optimizer = optax.chain(optax.clip_by_global_norm(100.0), optax.adamw(1e-2, b2=0.99, eps=1e-6))
    state = optimizer.init(params)
    for _ in range(3):
        gradient = jax.grad(ho.loss)(params, x, labels)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    found = cv.adam_diagonal(state, b2=0.99, eps=1e-6)
    adam = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu"))
    scale = optax.scale_by_adam(b2=0.99, eps=1e-6)
    # the division itself: a step whose moments stay as they are
    for name, leaf in trees.named_leaves(found):
        nu = dict(trees.named_leaves(adam.nu))[name]
        np.testing.assert_allclose(leaf, np.sqrt(nu / (1 - 0.99**3)) + 1e-6, rtol=1e-12)
    del scale
    op = cv.preconditioned(cv.hessian(ho.loss, params, x, labels), found)
    exact = ho.exact_hessian(params, x, labels)
    p = np.asarray(ravel_pytree(found)[0])
    # similar to P^-1 H, which is what a step multiplies errors by
    expected = np.sort(np.linalg.eigvals(exact / p[:, None]).real)
    np.testing.assert_allclose(cv.eigvals(op), expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_adam_diagonal_refuses_what_is_not_one_adam():
    params = {"w": jnp.ones(3)}
    with pytest.raises(ProblemError, match="holds 0"):
        cv.adam_diagonal(optax.sgd(0.1).init(params))
    with pytest.raises(ProblemError, match="holds 2"):
        cv.adam_diagonal(optax.chain(optax.adam(0.1), optax.adam(0.1)).init(params))
    with pytest.raises(ProblemError, match="no step"):
        cv.adam_diagonal(optax.adam(0.1).init(params))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_preconditioner_must_be_positive(bad):
    params, x, labels = ho.network()
    op = cv.hessian(ho.loss, params, x, labels)
    diagonal = ho.diagonal_like(params)
    diagonal["first"]["bias"] = diagonal["first"]["bias"].at[2].set(bad)
    with pytest.raises(ProblemError, match="'first/bias'"):
        cv.preconditioned(op, diagonal)
    with pytest.raises(StructureError, match="'second/kernel' is missing"):
        cv.preconditioned(op, {"first": params["first"]})


def test_streamed_equals_stacked_and_reads_in_order():
    params, x, labels = ho.network()
    stacked = ho.of_stacked()[0]
    read = []

    class Batches:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            read.append(i)
            return np.asarray(x[4 * i : 4 * i + 4]), np.asarray(labels[4 * i : 4 * i + 4])

    op = cv.streamed(ho.HESSIAN_OF_LOSS, params, Batches(), key=KEY)
    read.clear()
    v = trees.normal_like(KEY, params)
    found, expected = op.mv(v), stacked.mv(v)
    jax.block_until_ready(found)
    assert read == [0, 1, 2]
    for (_, a), (_, b) in zip(trees.named_leaves(found), trees.named_leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-15)
    eigen = cv.eigsh(op, 1, key=KEY)
    assert float(eigen.values[0]) == pytest.approx(float(cv.eigsh(stacked, 1, key=KEY).values[0]), rel=1e-10)


def test_a_sequence_that_shuffles_is_found_out():
    params, x, labels = ho.network()
    rng = np.random.default_rng(0)

    class Augmented:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            noise = 1e-9 * rng.standard_normal((4, 4))
            return np.asarray(x[4 * i : 4 * i + 4]) + noise, np.asarray(labels[4 * i : 4 * i + 4])

    with pytest.raises(ProblemError, match="same order"):
        cv.streamed(ho.HESSIAN_OF_LOSS, params, Augmented(), key=KEY)


def test_batches_must_be_there_and_alike():
    params, x, labels = ho.network()
    with pytest.raises(ProblemError, match="at least one batch"):
        cv.streamed(ho.HESSIAN_OF_LOSS, params, [], key=KEY)
    with pytest.raises(StructureError, match="batch 1: leaf '0'"):
        cv.streamed(ho.HESSIAN_OF_LOSS, params, [(x[:4], labels[:4]), (x[:3], labels[:3])], key=KEY)
    with pytest.raises(StructureError, match="leaf '1' has a leading axis"):
        cv.stacked(ho.HESSIAN_OF_LOSS, params, (x[None], jnp.stack([labels, labels])))
    with pytest.raises(ProblemError, match="at least one batch"):
        cv.stacked(ho.HESSIAN_OF_LOSS, params, ())


def test_other_curvatures_stream_too():
    params, x, labels = ho.network()
    build = partial(cv.gauss_newton, ho.model, ho.criterion)
    op = cv.stacked(build, params, ho.batches_of(x, labels))
    np.testing.assert_allclose(cv.dense(op).matrix, ho.exact_gauss_newton(params, x, labels), atol=1e-13)


def test_operators_of_a_loss_refuse_what_has_no_meaning():
    params, x, labels = ho.network()
    with pytest.raises(ProblemError, match="one real array"):
        cv.fisher(lambda p, x: p["second"]["kernel"].astype(int), params, x)
    with pytest.raises(ProblemError, match="cannot be evaluated"):
        cv.gauss_newton(ho.model, ho.criterion, params, x[:, :2], labels)
    with pytest.raises(ProblemError, match="one real scalar"):
        cv.gauss_newton(ho.model, ho.cross_entropies, params, x, labels)
    with pytest.raises(ProblemError, match=r"losses \(N,\)"):
        cv.empirical_fisher(ho.loss, params, x, labels)


def test_fisher_is_gauss_newton_of_its_own_likelihood():
    params, x, labels = ho.network()
    of_model = cv.dense(cv.fisher(ho.model, params, x)).matrix
    of_loss = cv.dense(cv.gauss_newton(ho.model, ho.criterion, params, x, labels)).matrix
    np.testing.assert_allclose(of_model, of_loss, atol=1e-14)
    empirical = cv.dense(cv.empirical_fisher(ho.losses, params, x, labels)).matrix
    assert np.abs(empirical - of_model).max() > 1e-2


def test_progress_tells_products_and_residuals():
    told = []

    def progress(matvecs, residual):
        told.append((int(matvecs), float(residual)))

    op = cv.from_matrix(np.diag(np.linspace(0.0, 1.0, 300)))
    eigen = cv.eigsh(op, 1, "LA", 1e-8, key=KEY, progress=progress)
    jax.effects_barrier()
    assert len(told) > 2
    assert [m for m, _ in told] == sorted({m for m, _ in told})
    assert told[-1][0] == int(eigen.matvecs) - 1
    assert told[-1][1] < 1e-8 < told[0][1]
    told.clear()
    cv.svds(op, 1, key=KEY, progress=progress)
    jax.effects_barrier()
    assert told


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_lower_bound_is_below(dtype):
    from tests.curvature.helpers_spectra import with_spectrum

    for seed in range(20):
        values = np.random.default_rng(seed).standard_normal(80)
        matrix = np.asarray(with_spectrum(values, seed), dtype)
        eigen = cv.eigsh(cv.from_matrix(matrix), 1, "LM", 0.0, key=jax.random.key(seed))
        sigma = np.linalg.norm(np.asarray(matrix, np.float64), 2)
        assert float(eigen.lower_bound) <= sigma
        assert float(eigen.lower_bound) >= sigma * (1 - 300 * np.finfo(dtype).eps)
