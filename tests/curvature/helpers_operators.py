"""Every operator of a small network, each with its matrix computed some other way."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import specdef_jax as sd
from specdef_jax import curvature as cv
from specdef_jax import trees

KEY = jax.random.key(11)
CLASSES = 3


def network(dtype=jnp.float64, seed=0, count=12):
    """Return parameters, inputs and labels of a network 4 -> 5 -> 3."""
    a, b, c, x = (
        jax.random.normal(k, s).astype(dtype)
        for k, s in zip(
            jax.random.split(jax.random.key(seed), 4), [(4, 5), (5,), (5, CLASSES), (count, 4)], strict=True
        )
    )
    labels = jax.random.randint(jax.random.key(seed + 1), (count,), 0, CLASSES)
    return {"first": {"kernel": a, "bias": b}, "second": {"kernel": c}}, x, labels


def deformed(params, alpha=3.0):
    return sd.deform(params, sd.SpecDef(alpha=alpha), where="first/kernel", key=KEY)


def model(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"]


def cross_entropies(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]


def criterion(logits, labels):
    return jnp.mean(cross_entropies(logits, labels))


def losses(params, x, labels):
    return cross_entropies(model(params, x), labels)


def loss(params, x, labels):
    return jnp.mean(losses(params, x, labels))


def squared(outputs, targets):
    return jnp.sum((outputs - targets) ** 2)


def of_vector(fn, params):
    """Return fn as a function of the raveled parameters, structured weights written out as products."""
    flat, unravel = ravel_pytree(params)

    def on_vector(v):
        tree = unravel(v)
        kernel = tree["first"]["kernel"]
        if sd.parametrization.is_structured(kernel):
            factors = (kernel.comp, kernel.weight) if kernel.side == "input" else (kernel.weight, kernel.comp)
            tree["first"]["kernel"] = factors[0] @ factors[1]
        return fn(tree)

    return flat, on_vector


def exact_hessian(params, x, labels):
    flat, fn = of_vector(lambda p: loss(p, x, labels), params)
    return np.asarray(jax.jit(jax.hessian(fn))(flat))


def exact_jacobian(params, x):
    flat, fn = of_vector(lambda p: model(p, x), params)
    return np.asarray(jax.jit(jax.jacrev(fn))(flat))


def exact_gauss_newton(params, x, labels):
    jacobian = exact_jacobian(params, x)
    logits = jax.jit(lambda p: of_vector(lambda q: model(q, x), p)[1](ravel_pytree(p)[0]))(params)
    middle = np.asarray(jax.hessian(criterion)(logits, labels))
    return np.einsum("nci,ncmd,mdj->ij", jacobian, middle, jacobian)


def exact_fisher(params, x, family):
    """Average the outer products of the scores over every label that the model can draw."""
    jacobian = exact_jacobian(params, x)
    flat, fn = of_vector(lambda p: model(p, x), params)
    logits = np.asarray(fn(flat))
    n, size = len(x), flat.size
    total = np.zeros((size, size))
    for i in range(n):
        if family == "categorical":
            p = np.exp(logits[i] - logits[i].max())
            p /= p.sum()
            draws = [(p[c], np.eye(CLASSES)[c] - p) for c in range(CLASSES)]
        elif family == "bernoulli":
            p = 1 / (1 + np.exp(-logits[i]))
            draws = [
                (np.prod(np.where(bits, p, 1 - p)), np.asarray(bits) - p) for bits in np.ndindex(2, 2, 2)
            ]
        else:  # standard normal: the fourth moments do not matter, +-1 with equal odds has the same second
            draws = [(1 / 8, 2.0 * np.asarray(bits) - 1) for bits in np.ndindex(2, 2, 2)]
        for odds, score in draws:
            gradient = score @ jacobian[i]
            total += odds * np.outer(gradient, gradient) / n
    return total


def exact_empirical(params, x, labels):
    flat, fn = of_vector(lambda p: losses(p, x, labels), params)
    gradients = np.asarray(jax.jacrev(fn)(flat))
    return gradients.T @ gradients / len(x)


def positions(params, globs):
    """Return the indices of leaves in the raveled parameters, in the order of a dictionary of them."""
    numbered = ravel_pytree(params)[1](jnp.arange(float(trees.size(params))))
    chosen = cv.blocks.chosen(params, globs)
    leaves = dict(trees.named_leaves(numbered))
    return np.concatenate([np.ravel(leaves[name]) for name in sorted(chosen)]).astype(int)


def diagonal_like(params):
    return jax.tree.map(lambda leaf: 0.5 + jnp.abs(leaf), params)


def of_hessian(dtype=jnp.float64, seed=0, structured=False):
    params, x, labels = network(dtype, seed)
    params = deformed(params) if structured else params
    return cv.hessian(loss, params, x, labels), lambda: exact_hessian(params, x, labels)


def of_gauss_newton(dtype=jnp.float64, seed=0, structured=False):
    params, x, labels = network(dtype, seed)
    params = deformed(params) if structured else params
    op = cv.gauss_newton(model, criterion, params, x, labels)
    return op, lambda: exact_gauss_newton(params, x, labels)


def of_fisher(family, dtype=jnp.float64, seed=0, structured=False):
    params, x, _ = network(dtype, seed)
    params = deformed(params) if structured else params
    return cv.fisher(model, params, x, family), lambda: exact_fisher(params, x, family)


def of_empirical(dtype=jnp.float64, seed=0, structured=False):
    params, x, labels = network(dtype, seed)
    params = deformed(params) if structured else params
    return cv.empirical_fisher(losses, params, x, labels), lambda: exact_empirical(params, x, labels)


def of_block(rows, cols, dtype=jnp.float64, seed=0, structured=False):
    params, x, labels = network(dtype, seed)
    params = deformed(params) if structured else params

    def exact():
        of_cols = positions(params, rows if cols is None else cols)
        return exact_hessian(params, x, labels)[np.ix_(positions(params, rows), of_cols)]

    return cv.block(loss, params, rows, cols, x, labels), exact


def of_restriction(rows, cols, dtype=jnp.float64, seed=0, structured=False):
    op, exact = of_gauss_newton(dtype, seed, structured)

    params = network(dtype, seed)[0]
    params = deformed(params) if structured else params

    def part():
        of_cols = positions(params, rows if cols is None else cols)
        return exact()[np.ix_(positions(params, rows), of_cols)]

    return cv.restricted(op, rows, cols), part


def of_preconditioned(dtype=jnp.float64, seed=0, structured=False):
    op, exact = of_hessian(dtype, seed, structured)
    params = network(dtype, seed)[0]
    scales = diagonal_like(deformed(params) if structured else params)
    root = np.sqrt(np.asarray(ravel_pytree(scales)[0], np.float64))
    return cv.preconditioned(op, scales), lambda: exact() / np.outer(root, root)


def batches_of(x, labels, count=3):
    return x.reshape(count, -1, 4), labels.reshape(count, -1)


HESSIAN_OF_LOSS = partial(cv.hessian, loss)


def of_stacked(dtype=jnp.float64, seed=0, structured=False):
    params, x, labels = network(dtype, seed)
    params = deformed(params) if structured else params
    op = cv.stacked(HESSIAN_OF_LOSS, params, batches_of(x, labels))
    return op, lambda: exact_hessian(params, x, labels)


def of_streamed(dtype=jnp.float64, seed=0, structured=False):
    params, x, labels = network(dtype, seed)
    params = deformed(params) if structured else params
    host = [(np.asarray(a), np.asarray(b)) for a, b in zip(*batches_of(x, labels), strict=True)]
    op = cv.streamed(HESSIAN_OF_LOSS, params, host, key=KEY)
    return op, lambda: exact_hessian(params, x, labels)


OPERATORS = {
    "hessian": of_hessian,
    "gauss_newton": of_gauss_newton,
    "fisher categorical": partial(of_fisher, "categorical"),
    "fisher bernoulli": partial(of_fisher, "bernoulli"),
    "fisher gaussian": partial(of_fisher, "gaussian"),
    "empirical_fisher": of_empirical,
    "block principal": partial(of_block, "first", None),
    "block off-diagonal": partial(of_block, "first", "second/kernel"),
    "block overlapping": partial(of_block, "first/kernel", ("first", "second")),
    "restricted principal": partial(of_restriction, "first", None),
    "restricted off-diagonal": partial(of_restriction, "second", "first"),
    "preconditioned": of_preconditioned,
    "stacked": of_stacked,
    "streamed": of_streamed,
}
