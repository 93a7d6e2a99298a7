"""K-FAC against formulas written out, what it is invariant to, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import specdef_jax as sd
from specdef_jax import optim
from specdef_jax.errors import LayeredUnsupported, ProblemError, SpecError
from specdef_jax.parametrization import Deformed, KernelAxes
from specdef_jax.tasks.networks import transformer

KEY = jax.random.key(0)


def steps(optimizer, loss, params, count, **extra):
    """Return the parameters after each of so many steps."""

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params, value=value, value_fn=loss, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=count)[1])(params)


def net(seed=0, n=40, widths=(5, 4, 3)):
    """Return parameters of a tanh network with one hidden layer, inputs and targets."""
    rng = np.random.default_rng(seed)
    params = {
        "w": rng.standard_normal(widths[:2]) / 2,
        "b": rng.standard_normal(widths[1]) / 4,
        "v": rng.standard_normal(widths[1:]) / 2,
        "c": rng.standard_normal(widths[2]) / 4,
    }
    x, y = rng.standard_normal((n, widths[0])), rng.standard_normal((n, widths[2]))
    return jax.tree.map(jnp.asarray, params), jnp.asarray(x), jnp.asarray(y)


def squared(params, x, y):
    return jnp.mean(
        jnp.sum((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"] - y) ** 2, -1)
    )


def reference(params, x, y, count, *, eta, damping, decay, kl_clip=None):
    """Return the parameters after so many steps, by the formulas of a network with one hidden layer."""
    p, n = {k: np.array(v) for k, v in params.items()}, len(x)
    x, y = np.asarray(x), np.asarray(y)
    running = {}

    def averaged(name, new, t):
        running[name] = decay * running.get(name, 0) + (1 - decay) * new
        return running[name] / (1 - decay**t)

    for t in range(1, count + 1):
        h = np.tanh(x @ p["w"] + p["b"])
        last = 2 * (h @ p["v"] + p["c"] - y)  # of each example
        first = (last @ p["v"].T) * (1 - h**2)
        gradient, natural = {}, {}
        for kernel, bias, inputs, outputs in (("w", "b", x, first), ("v", "c", h, last)):
            gradient[kernel], gradient[bias] = inputs.T @ outputs / n, outputs.mean(0)
            a, g = (
                averaged(kernel + "A", inputs.T @ inputs / n, t),
                averaged(kernel + "G", outputs.T @ outputs / n, t),
            )
            pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
            a_inverse = np.linalg.inv(a + pi * np.sqrt(damping) * np.eye(len(a)))
            g_inverse = np.linalg.inv(g + np.sqrt(damping) / pi * np.eye(len(g)))
            natural[kernel] = a_inverse @ gradient[kernel] @ g_inverse
            natural[bias] = np.linalg.solve(g + damping * np.eye(len(g)), gradient[bias])
        nu = 1.0
        if kl_clip is not None:
            nu = min(1, np.sqrt(kl_clip / (eta**2 * sum(np.sum(natural[k] * gradient[k]) for k in p))))
        p = {k: p[k] - eta * nu * natural[k] for k in p}
    return p


@pytest.mark.parametrize(
    "settings",
    [
        {"damping": 0.0, "decay": 0.0},
        {"damping": 1e-2, "decay": 0.9},
        {"damping": 0.3, "decay": 0.5, "kl_clip": 1e-3},
    ],
)
def test_it_is_the_formulas_step_by_step(settings):
    params, x, y = net()
    trace = steps(optim.kfac(0.1, **settings), functools.partial(squared, x=x, y=y), params, 12)
    for count in (1, 2, 5, 12):
        expected = reference(params, x, y, count, eta=0.1, **settings)
        for name in params:
            np.testing.assert_allclose(trace[name][count - 1], expected[name], rtol=1e-10, atol=1e-10)


def test_settings_differ():
    params, x, y = net()
    loss = functools.partial(squared, x=x, y=y)
    plain = optim.kfac(0.1)
    others = [
        optim.kfac(0.1, damping=0.1),
        optim.kfac(0.1, decay=0.5),
        optim.kfac(0.1, kl_clip=1e-4),
        optim.kfac(0.1, plain=("v",)),
        optim.kfac(0.1, widest=4),
        optim.kfac(0.1, batch=20),
        optim.kfac(0.2),
    ]
    ends = [
        steps(o, loss, params, 3)["w"][-1] + steps(o, loss, params, 3)["v"][-1].sum()
        for o in [plain, *others]
    ]
    for end in ends[1:]:
        assert float(jnp.abs(end - ends[0]).max()) > 1e-6


def test_a_linear_layer_with_exact_factors_is_fitted_in_one_step():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((50, 6)), rng.standard_normal((50, 4))
    params = {"w": jnp.asarray(rng.standard_normal((6, 4)))}

    def loss(p):
        return jnp.mean(jnp.sum((x @ p["w"] - y) ** 2, -1)) / 2

    exact = {"w": (jnp.asarray(x.T @ x / 50), jnp.eye(4))}
    (w,) = steps(optim.kfac(1.0, damping=0.0), loss, params, 1, factors=exact)["w"]
    np.testing.assert_allclose(w, np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-12)
    (empirical,) = steps(optim.kfac(1.0, damping=0.0), loss, params, 1)["w"]
    assert float(jnp.abs(empirical - w).max()) > 0.1  # the empirical Fisher matrix is another one


def test_factors_running_averages_are_of_what_was_supplied():
    params, x, y = net()
    rng = np.random.default_rng(0)
    loss = functools.partial(squared, x=x, y=y)
    a, g = (m @ m.T for m in (rng.standard_normal((4, 4)), rng.standard_normal((3, 3))))
    optimizer = optim.kfac(decay=0.9)
    _, state = optimizer.update(
        jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss, factors={"v": (a, g)}
    )
    np.testing.assert_allclose(state.factors["v"][0], 0.1 * a)
    np.testing.assert_allclose(state.factors["v"][1], 0.1 * g)
    np.testing.assert_allclose(state.factors["w"][0], 0.1 * x.T @ x / 40, rtol=1e-12)


# Deformed leaves


def pair(kernel, alpha, side, seed=5):
    """Return a kernel as two factors, T of a random direction of the deformed side with factor alpha."""
    d = kernel.shape[1 if side == "output" else 0]
    u = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, 2)))[0]
    stretch, shrink = (jnp.asarray(np.eye(d) + (s - 1) * u @ u.T) for s in (alpha, 1 / alpha))
    weight = kernel @ stretch if side == "output" else stretch @ kernel
    return Deformed(weight, shrink, side, KernelAxes((0,), (1,)))


def gap(side, damping, *, alpha, merged=True, count=5):
    """Return how far the networks of the undeformed and the deformed product end, relatively."""
    params, x, y = net(widths=(4, 4, 3) if side == "input" else (5, 4, 3))
    apply = functools.partial(squared, x=x, y=y)
    loss = (lambda p: apply(sd.merge(p))) if merged else sd.layered(apply)
    ends = []
    for a in (1.0, alpha):
        tree = params | {"w": pair(params["w"], a, side)}
        end = steps(optim.kfac(0.1, damping=damping), loss, tree, count)
        ends.append(jax.vmap(sd.merge)(end)["w"][-1])
    return float(jnp.linalg.norm(ends[1] - ends[0]) / jnp.linalg.norm(ends[0] - params["w"]))


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("side", ["output", "input"])
def test_undamped_it_is_equivariant_and_damped_it_is_not(side, merged):
    """THEORY.md 4.4: the step in the factors of an identity, carried over to the deformed ones."""
    assert gap(side, 0.0, alpha=30.0, merged=merged) < 1e-8
    assert gap(side, 1e-2, alpha=30.0, merged=merged) > 0.05


def test_a_deformed_leaf_is_two_layers_in_sequence():
    params, x, y = net()
    tree = params | {"w": pair(params["w"], 7.0, "output")}

    def two(p):
        hidden = jnp.tanh(x @ p["w"] @ p["t"] + p["b"])
        return jnp.mean(jnp.sum((hidden @ p["v"] + p["c"] - y) ** 2, -1))

    split = params | {"w": tree["w"].weight, "t": tree["w"].comp}
    expected = steps(optim.kfac(0.1), two, split, 4)
    found = steps(optim.kfac(0.1), lambda p: squared(sd.merge(p), x, y), tree, 4)
    np.testing.assert_allclose(found["w"].weight, expected["w"], atol=1e-10)
    np.testing.assert_allclose(found["w"].comp, expected["t"], atol=1e-10)
    np.testing.assert_allclose(found["b"], expected["b"], atol=1e-10)


# Networks


def test_kernels_that_stand_left_of_the_activations_take_the_same_steps():
    params, x, y = net()
    turned = params | {"w": params["w"].T}
    found = steps(optim.kfac(0.1), lambda p: squared(p | {"w": p["w"].T}, x, y), turned, 5)
    expected = steps(optim.kfac(0.1), functools.partial(squared, x=x, y=y), params, 5)
    np.testing.assert_allclose(found["w"].swapaxes(1, 2), expected["w"], atol=1e-12)
    np.testing.assert_allclose(found["b"], expected["b"], atol=1e-12)


def test_positions_are_expanded():
    """A is a mean over examples and positions, G a mean over examples of the sum over positions."""
    rng = np.random.default_rng(2)
    x, w = jnp.asarray(rng.standard_normal((7, 3, 5))), jnp.asarray(rng.standard_normal((5, 4)))

    def loss(p):
        return jnp.mean(jnp.sum(jnp.tanh(x @ p["w"]), (1, 2)) ** 2)

    z = np.asarray(x @ w)
    g = 2 * np.tanh(z).sum((1, 2))[:, None, None] / np.cosh(z) ** 2  # of each example
    optimizer = optim.kfac(decay=0.0)
    params = {"w": w}
    _, state = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss)
    np.testing.assert_allclose(state.factors["w"][0], np.einsum("bpi,bpj->ij", x, x) / 21, rtol=1e-12)
    np.testing.assert_allclose(state.factors["w"][1], np.einsum("bpi,bpj->ij", g, g) / 7, rtol=1e-12)


def test_it_trains_a_transformer():
    network = transformer()
    x, y = jax.random.normal(KEY, (12, 64)), jnp.arange(12) % 10

    def loss(p):
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(p, x), y).mean()

    first, *_, last = jax.vmap(loss)(steps(optim.kfac(0.03), loss, network.init(KEY), 20))
    assert last < 0.7 * first


def test_remat_inside_changes_nothing():
    params, x, y = net()

    def checkpointed(p):
        hidden = jax.checkpoint(lambda x, w, b: jnp.tanh(x @ w + b))(x, p["w"], p["b"])
        return jnp.mean(jnp.sum((hidden @ p["v"] + p["c"] - y) ** 2, -1))

    found = steps(optim.kfac(0.1), checkpointed, params, 5)
    expected = steps(optim.kfac(0.1), functools.partial(squared, x=x, y=y), params, 5)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12)


def recurrent(p, x):
    def body(h, row):
        return jnp.tanh(row @ p["w"] + h @ p["u"]), None

    h, _ = jax.lax.scan(body, jnp.zeros((x.shape[1], 4)), x)
    return jnp.mean((h @ p["v"]) ** 2)


def test_a_kernel_inside_scan_is_refused_and_can_be_left_plain():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 8, 5)))
    params = {
        k: jnp.asarray(rng.standard_normal(s)) for k, s in {"w": (5, 4), "u": (4, 4), "v": (4, 2)}.items()
    }
    loss = functools.partial(recurrent, x=x)
    with pytest.raises(ProblemError, match=r"'w', 'u' may multiply activations inside scan.* plain="):
        steps(optim.kfac(), loss, params, 1)
    after = steps(optim.kfac(0.1, plain=("w", "u")), loss, params, 1)
    gradient = jax.grad(loss)(params)
    np.testing.assert_allclose(after["u"][0], params["u"] - 0.1 * gradient["u"])
    assert float(jnp.abs(after["v"][0] - (params["v"] - 0.1 * gradient["v"])).max()) > 1e-3


def test_what_is_no_dense_kernel_takes_plain_gradient_steps():
    rng = np.random.default_rng(0)
    shapes = {"table": (9, 5), "gain": (5,), "w": (5, 4), "stack": (2, 4, 4), "shift": (4,)}
    params = {k: jnp.asarray(rng.standard_normal(s)) for k, s in shapes.items()}
    tokens = jnp.arange(12) % 9

    def loss(p):
        h = p["table"][tokens] * p["gain"] @ p["w"]
        for kernel in p["stack"]:
            h = jnp.tanh(h @ kernel)
        return jnp.mean((h * p["shift"]) ** 2) + 1e-2 * jnp.sum(p["w"] ** 2)

    gradient = jax.grad(loss)(params)
    after = steps(optim.kfac(0.1), loss, params, 1)
    for name in ("table", "gain", "stack", "shift"):
        np.testing.assert_allclose(after[name][0], params[name] - 0.1 * gradient[name], atol=1e-14)
    assert float(jnp.abs(after["w"][0] - (params["w"] - 0.1 * gradient["w"])).max()) > 1e-3


def test_one_bias_of_two_layers_is_left_plain():
    params, x, y = net(widths=(4, 4, 4))
    shared = {k: params[k] for k in ("w", "b", "v")}

    def loss(p):
        return squared(p | {"c": p["b"]}, x, y)

    after = steps(optim.kfac(0.1), loss, shared, 1)
    np.testing.assert_allclose(after["b"][0], shared["b"] - 0.1 * jax.grad(loss)(shared)["b"], atol=1e-14)


# Refusals


def test_no_dense_kernel_is_named():
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 3))}
    optimizer = optim.kfac()

    def loss(p):
        return jnp.sum(p["a"] * p["b"]) ** 2

    with pytest.raises(ProblemError, match=r"no dense kernel. It looked for a 2-D.*'a' \(3,\), 'b' \(2, 3\)"):
        optimizer.update(jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss)


def test_missing_arguments_are_named():
    params, x, y = net()
    optimizer = optim.kfac()
    with pytest.raises(ProblemError, match="kfac needs the extra argument value_fn="):
        optimizer.update(params, optimizer.init(params), params)
    with pytest.raises(ProblemError, match="kfac needs the parameters"):
        optimizer.update(params, optimizer.init(params), value_fn=functools.partial(squared, x=x, y=y))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -1e-3}, "damping = -0.001: give zero"),
        ({"damping": float("nan")}, "damping = nan"),
        ({"decay": 1.0}, "decay = 1.0"),
        ({"decay": -0.1}, "decay = -0.1"),
        ({"kl_clip": 0.0}, "kl_clip"),
        ({"batch": 0}, "batch"),
        ({"widest": 0}, "widest"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(SpecError, match=message):
        optim.kfac(**settings)


def test_factors_that_do_not_fit_are_named():
    params, x, y = net()
    loss = functools.partial(squared, x=x, y=y)
    with pytest.raises(ProblemError, match=r"factors are given for 'u'; the dense kernels are v, w"):
        steps(optim.kfac(), loss, params, 1, factors={"u": (jnp.eye(5), jnp.eye(4))})
    with pytest.raises(ProblemError, match=r"'w' have shapes \(4, 4\) and \(5, 5\)"):
        steps(optim.kfac(), loss, params, 1, factors={"w": (jnp.eye(4), jnp.eye(5))})


def test_a_kernel_on_both_sides_is_refused():
    params, x, _ = net(widths=(4, 4, 4))
    with pytest.raises(ProblemError, match="'w' multiplies activations from both sides"):
        steps(optim.kfac(), lambda p: jnp.mean((jnp.tanh(x @ p["w"]) @ p["w"].T) ** 2), {"w": params["w"]}, 1)


def test_batches_that_differ_are_refused_until_the_batch_is_said():
    params, x, y = net()
    frozen = jnp.eye(4)

    def loss(p):
        return squared(p | {"w": p["w"] @ frozen}, x, y)

    with pytest.raises(ProblemError, match=r"these differ: \[\('v', 40\), \('w', 4\)\].*batch=") as error:
        steps(optim.kfac(), loss, params, 1)
    assert "plain=" in str(error.value)
    after = steps(optim.kfac(0.1, batch=40), loss, params, 1)
    np.testing.assert_allclose(after["w"][0], params["w"] - 0.1 * jax.grad(loss)(params)["w"], atol=1e-14)


def test_a_deformed_leaf_without_layered_form_is_refused():
    params, x, y = net()
    tree = params | {"w": pair(params["w"], 2.0, "output")}
    with pytest.raises(LayeredUnsupported, match=r"integer_pow|square|mul"):
        steps(optim.kfac(), lambda p: squared(sd.merge(p), x, y) + jnp.sum(sd.merge(p)["w"] ** 2), tree, 1)


@pytest.mark.parametrize("primitive", ["cond", "while", "custom_vjp_call"])
def test_what_keeps_its_activations_is_refused(primitive):
    params, x, y = net()

    @jax.custom_vjp
    def own(h, w):
        return h @ w

    own.defvjp(lambda h, w: (h @ w, (h, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    ways = {
        "cond": lambda h, w: jax.lax.cond(jnp.sum(y) > 0, lambda: h @ w, lambda: -h @ w),
        "while": lambda h, w: jax.lax.while_loop(lambda c: jnp.sum(c) < 0, lambda c: c + h @ w, y),
        "custom_vjp_call": own,
    }
    optimizer = optim.kfac()
    with pytest.raises(ProblemError, match=rf"'v' may multiply activations inside {primitive}"):
        optimizer.update(
            params,
            optimizer.init(params),
            params,
            value_fn=lambda p: jnp.mean((ways[primitive](jnp.tanh(x @ p["w"]), p["v"]) - y) ** 2),
        )


def test_a_layer_that_nothing_reaches_stays_where_it_is():
    params, x, y = net()
    params |= {"v": jnp.zeros_like(params["v"])}
    after = steps(optim.kfac(0.1), functools.partial(squared, x=x, y=y), params, 1)
    np.testing.assert_array_equal(after["w"][0], params["w"])
    assert np.all(np.isfinite(after["v"]))


def test_narrow_parameters_keep_their_dtype_and_wide_factors():
    params, x, y = jax.tree.map(lambda a: a.astype(jnp.bfloat16), net())
    loss = functools.partial(squared, x=x, y=y)
    optimizer = optim.kfac(jnp.float32(0.1))
    step, state = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss)
    assert {leaf.dtype for leaf in jax.tree.leaves(step)} == {jnp.dtype(jnp.bfloat16)}
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(state.factors["w"][0], 0.05 * exact.T @ exact / 40, rtol=1e-6)
