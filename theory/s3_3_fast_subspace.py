"""Statement 3.3 [ours]: Fast subspace: what gradient descent at a stable step can still move.

STATEMENT. Write the parameters at alpha = 1 (theta = phi^-1 theta_a) as (f, r), f the directions dC = E U^T
of the deformed layers. Gradient descent on the deformed network at step c / a^2, T fixed, a -> infinity,
tends to gradient descent with step c on f alone, that is on L(W + B U^T W) in B (input side W + W V B^T),
everything else frozen. With L_f the largest singular value of the f rows of the Hessian and G the largest
slow gradient where both run,

    |theta(T) - theta_fast(T)| <= G ((1 + c L_f)^T - 1) / (a^2 L_f).                                    (*)

If in addition |I - c H_ff| <= rho < 1 there (c < 2 / lambda_fast and H_ff positive DEFINITE), the bound is
(c G / a^2) T (1 + c L_f / (1 - rho)): order T. Convexity alone is not enough for order T: L = f r with
r' = -G has H_ff = 0 and error T (T - 1) / 2 times c^2 G / a^2. [Corrects: "K = O(T) if c < 2/lambda_fast and
the fast problem is locally convex".]
    (i) the fast run descends at normal speed, at best to the floor L*_U = inf_B L(W + B U^T W);
    (ii) all else moves at c / a^2, the rows U^T of Wt across row(W) at c / a^4;
    (iii) for nested U the floor does not increase with k: raising k weakens. At k = m the fast set is {M W},
    which is every matrix iff W has full column rank.

ASSUMPTIONS. alpha >= 1; L twice differentiable where both iterations run.

PROOF. By 3.2 the deformed run is, in theta, theta <- theta - (c/a^2) P g(theta) with P = phi^-1 phi^-T, which
is a^2 on f, 1 on C's other directions and on rest, a^-2 on U^T dWt. So f <- f - c g_f(theta) exactly, and r
moves by at most c G / a^2 a step. The fast run has f <- f - c g_f(f, r_0). The difference e of the two
obeys |e_(t+1)| <= |e_t| + c L_f |e_t| + c G / a^2, as g_f is L_f-Lipschitz in theta; with e_0 = 0 the
geometric sum is (*). If |I - c H_ff| <= rho, then |e_f| <- rho |e_f| + c L_f |e_r| and
|e_r| <= t c G / a^2, so |e_f| <= c L_f / (1 - rho) T c G / a^2, whence the second bound. In the example
f <- f - c r_t with r_t = r_0 + t c G / a^2: the sum of t over t < T is T (T - 1) / 2.
(i) Gradient descent at a stable step does not increase the fast loss and stays in its sublevel set; the
infimum bounds it from below. (ii) These are P's other eigenvalues; a composite step is dC' W + C' dW', and
the part of dC' W across row(W) vanishes, so U^T (composite) E with W E = 0 has only U^T dW' E, to order
c/a^4. (iii) U in U' means {W + B U^T W} in {W + B' U'^T W}; the infimum over more is not larger. At k = m,
B U^T is any matrix. M W ranges over all matrices iff the row space of W is everything. QED.

TIGHTNESS. (*) is attained to first order in 1/a^2 at T = 1 (error exactly c G / a^2 when g_r is along C's
other directions and rest); the table certifies it within a factor 1 + 1/a^2.

SOURCE. Ours; (*) is the discrete Gronwall lemma.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds, trees
from specdef_jax.parametrization import loss_on
from specdef_jax.spec import Plan
from theory.assumptions import require_alpha, require_smooth
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    fit,
    inequality,
    refuses,
    refuted,
    seen,
    tight,
    under_assumptions,
)
from theory.draws import over_draws
from theory.fits import exponent
from theory.instances.matrices import orthonormal
from theory.instances.networks import Instance, linear_tail_instance, mlp_instance, networks
from theory.sizes import Size

ALPHAS = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
STEPS = 12


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the limit and its error on networks and quadratics, and the properties of the floor."""
    found: list[Certificate] = []
    for instance in networks(size, key, hard="shared"):
        for side in ("output",) if size is not Size.FULL else ("output", "input"):
            spec = sd.SpecDef(alpha=1.0, k=1, side=side)
            plan = sd.plan(instance.params, spec, where=instance.where, key=key)
            name = f"{instance.name}, {side} side"
            found += on_network(instance.loss, instance.params, plan, *instance.args, name=name)
    found += _quadratics(key, size)
    found += _order_in_time(key)
    found += _slow_directions(linear_tail_instance(key), key)
    found += _floors(linear_tail_instance(key, "cross-entropy"), key)
    instance = mlp_instance(key, "relu")
    flat = jax.tree.map(lambda b: jnp.zeros_like(b) if b.ndim == 1 else b, instance.params)
    plan = sd.plan(flat, sd.SpecDef(alpha=1.0, side="output"), where=instance.where, key=key)
    x, y = instance.args
    at_kink = on_network(instance.loss, flat, plan, x.at[0].set(0.0), y, name="")
    found.append(refuses("a point without second derivative is refused", "ReLU at 0", at_kink, "twice"))
    return tuple(found)


def on_network(loss: Any, params: PyTree, plan: Plan, *args: Any, name: str) -> Certificates:
    """Certify the limit on anyone's network: error order -2 in alpha over STEPS steps.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what to deform; its alphas are replaced by a range.
      *args: data.
      name: of the instance.
    """
    claim = "the error of the fast limit falls as alpha^-2"

    def evaluate() -> list[Certificate]:
        require_alpha(*ALPHAS)
        as_partial = loss_on(loss, params, *args)
        require_smooth(as_partial, params, *args)
        task = bounds.fast_subspace(loss, params, plan.with_alpha(1.0), *args)
        fast_hessian = sd.curvature.eigvals(sd.curvature.hessian(task.loss, task.params, *args))
        # Half the curvature's inverse where it is stable all the way, and less where the curvature grows.
        for step in 0.5 / float(jnp.abs(fast_hessian).max()) * 0.5 ** np.arange(8):
            errors, moved, losses = _limit_errors(as_partial, params, plan, args, step, jnp.array(ALPHAS))
            if np.all(np.diff(losses) <= 0):
                break
        slope = exponent(ALPHAS[-3:], errors[-3:])  # kinks of a network are crossed alike from some alpha on
        return [
            fit(claim, name, slope.slope, -2.0, tolerance=0.1, count=3,
                note=f"{STEPS} steps at c = {step:.3g}; error {errors[-1]:.1e} at alpha {ALPHAS[-1]:g}, "
                f"while the fast run moved by {moved:.2g}"),
            inequality("the fast run does not increase the loss", name, np.diff(losses), 0.0,
                       allowance=1e-12, word=sd.Word.CHECKED),
        ]  # fmt: skip

    return under_assumptions(claim, name, evaluate)


@jax.jit
def _limit_errors(
    loss: Any, params: PyTree, plan: Plan, args: tuple[Any, ...], step: float, alphas: Array
) -> tuple[Array, Array, Array]:
    """Return the distance of the two trajectories' networks per alpha, and how far the fast one went."""
    as_loss = jax.tree_util.Partial(_through_merge, loss)

    def descend(task_loss: Any, start: PyTree, step: Array) -> tuple[PyTree, Array]:
        def one(at: PyTree, _: None) -> tuple[PyTree, Array]:
            value, grad = jax.value_and_grad(lambda p: task_loss(p, *args))(at)
            return trees.axpy(-step, grad, at), value

        return jax.lax.scan(one, start, None, length=STEPS)

    fast = bounds.fast_subspace(loss, params, plan.with_alpha(1.0), *args)
    end, losses = descend(fast.loss, fast.params, step)
    limit = fast.read_back(end)

    def error(alpha: Array) -> Array:
        deformed = sd.apply_plan(params, plan.with_alpha(alpha))
        last, _ = descend(as_loss, deformed, step / alpha**2)
        return trees.norm(trees.axpy(-1.0, limit, sd.merge(last)))

    return jax.vmap(error)(alphas), trees.norm(trees.axpy(-1.0, params, limit)), losses


def _through_merge(loss: Any, params: PyTree, *args: Any) -> Array:
    return loss(sd.merge(params), *args)


def _quadratics(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(*) on random quadratics, indefinite ones included, and the instance that attains it."""
    sides = over_draws(_quadratic_error, key, size.draws)
    a, c = 8.0, 0.3
    H = jnp.zeros((3, 3)).at[0, 0].set(1.0)
    g = jnp.array([0.0, 1.0, 0.0])
    error = jnp.linalg.norm(
        _run(H, g, jnp.array([1, 0, 0]), a, c, 1) - _fast(H, g, jnp.array([1, 0, 0]), c, 1)
    )
    bound = bounds.fast_limit_error(a, c, 1, 1.0, 1.0)
    return [
        inequality("the error is at most (*)", "Gaussian quadratics in 6 dimensions, 1 to 8 steps",
                   sides["error"], sides["bound"], allowance=sides["allowance"], scale=sides["bound"]),
        tight("(*) is attained", "one step, gradient along a slow direction", error, bound,
              factor=1 + 1 / a**2),
    ]  # fmt: skip


def _quadratic_error(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 5)
    n = 6
    H = jax.random.normal(keys[0], (n, n))
    H = (H + H.T) / 4
    g = jax.random.normal(keys[1], (n,))
    fast = jnp.array([1, 1, 0, 0, 0, -1])  # 1 fast, 0 as before, -1 slowed
    a = jnp.exp2(jax.random.uniform(keys[2], minval=1.0, maxval=6.0))
    c = jax.random.uniform(keys[3], minval=0.05, maxval=0.3)
    T = jax.random.randint(keys[4], (), 1, 9)
    deformed, G = _run_with_gradient(H, g, fast, a, c, T)
    error = jnp.linalg.norm(deformed - _fast(H, g, fast, c, T))
    lipschitz = jnp.linalg.norm(jnp.where((fast == 1)[:, None], H, 0), 2)
    # A computed step is off by (n + 4) eps of its terms, which stay below `size`; later steps amplify it.
    norm = jnp.linalg.norm(H, 2)
    growth = (1 + c * norm) ** T
    size = growth * jnp.linalg.norm(g) * (c + 1 / norm)
    allowance = 2 * T * (n + 4) * jnp.finfo(H.dtype).eps * growth * size
    bound = bounds.fast_limit_error(a, c, T, lipschitz, G)
    return {"error": error, "bound": bound, "allowance": allowance}


def _run_with_gradient(
    H: Array, g: Array, fast: Array, a: Array | float, c: Array | float, T: Array | int
) -> tuple[Array, Array]:
    """Descend on theta^T H theta / 2 + g^T theta from 0, preconditioned; with the largest slow gradient."""
    speeds = jnp.asarray(a, float) ** (2 * fast)

    def step(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        theta, largest = carry
        gradient = H @ theta + g
        slow = jnp.linalg.norm(jnp.where(fast == 1, 0, gradient))
        return theta - c / a**2 * speeds * gradient, jnp.maximum(largest, slow)

    return jax.lax.fori_loop(0, T, step, (jnp.zeros_like(g), jnp.zeros(())))


def _run(H: Array, g: Array, fast: Array, a: float, c: float, T: int) -> Array:
    return _run_with_gradient(H, g, fast, a, c, T)[0]


def _fast(H: Array, g: Array, fast: Array, c: Array | float, T: Array | int) -> Array:
    def step(_: int, theta: Array) -> Array:
        return theta - c * jnp.where(fast == 1, H @ theta + g, 0)

    return jax.lax.fori_loop(0, T, step, jnp.zeros_like(g))


def _order_in_time(key: PRNGKeyArray) -> list[Certificate]:
    """Order T where the fast block is positive definite, order T^2 in the flat example."""
    fast = jnp.array([1, 0])
    times = np.array([8, 16, 32, 64, 128, 256])
    a, c = 1e4, 0.5
    cases = {
        "H_ff = 1": (jnp.array([[1.0, 0.6], [0.6, 0.0]]), 1),
        "H_ff = 0, L = f r": (jnp.array([[0.0, 1.0], [1.0, 0.0]]), 2),
    }
    g = jnp.array([0.0, 1.0])
    found = []
    for name, (H, power) in cases.items():
        errors = [
            float(jnp.linalg.norm(_run(H, g, fast, a, c, int(T)) - _fast(H, g, fast, c, int(T))))
            for T in times
        ]
        found.append(
            fit(f"the error grows as T^{power}", name, exponent(times, errors).slope, power, tolerance=0.1,
                count=len(times))
        )  # fmt: skip
    flat = [abs(float(_run(cases["H_ff = 0, L = f r"][0], g, fast, a, c, int(T))[0])) for T in times[:3]]
    exact = [c * c * T * (T - 1) / 2 / a**2 for T in times[:3]]
    found.append(equality("the flat example: c^2 T (T - 1) / 2 a^2", "H_ff = 0", flat, exact, allowance=1e-5,
                          note="to order a^-4"))  # fmt: skip
    return found


def _slow_directions(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """(ii): displacements of the composite across row(W), on a rank-deficient W."""
    params = {**instance.params}
    kernel = params[layer := instance.where.split("/")[0]]["w"]  # (in, out)
    kernel = orthonormal(key, kernel.shape[0], 2) @ orthonormal(key, kernel.shape[1], 2).T
    params[layer] = {**params[layer], "w": kernel}
    plan = sd.plan(params, sd.SpecDef(alpha=1.0, k=1, side="output"), where=instance.where, key=key)
    across = jnp.linalg.svd(kernel)[0][:, 2:]  # inputs that W annihilates: W E = 0
    U = plan[instance.where].U
    rest = jnp.linalg.svd(U)[0][:, 1:]
    moved = _composite_moves(
        loss_on(instance.loss, params, *instance.args), params, plan, instance.args, 0.05, jnp.array(ALPHAS),
        across, jnp.concatenate([U, rest], axis=1), instance.where,
    )  # fmt: skip
    return [
        fit(f"{claim} as alpha^{power}", instance.name, exponent(ALPHAS, part).slope, power, tolerance=0.1,
            count=len(ALPHAS))
        for claim, part, power in (
            ("U^T (composite) E, W E = 0, moves", moved[0], -4.0),
            ("the other rows of (composite) E move", moved[1], -2.0),
        )
    ]  # fmt: skip


@functools.partial(jax.jit, static_argnames="where")
def _composite_moves(
    loss: Any, params: PyTree, plan: Plan, args: tuple[Any, ...], step: float, alphas: Array, across: Array,
    rows: Array, where: str,
) -> tuple[Array, Array]:  # fmt: skip
    as_loss = jax.tree_util.Partial(_through_merge, loss)

    def move(alpha: Array) -> tuple[Array, Array]:
        at = sd.apply_plan(params, plan.with_alpha(alpha))
        for _ in range(3):
            at = trees.axpy(-step / alpha**2, jax.grad(lambda p: as_loss(p, *args))(at), at)
        moved = dict(trees.named_leaves(sd.merge(at)))[where] - dict(trees.named_leaves(params))[where]
        parts = rows.T @ (across.T @ moved).T
        return jnp.linalg.norm(parts[0]), jnp.linalg.norm(parts[1:])

    return jax.vmap(move)(alphas)


def _floors(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """(iii): floors of nested subspaces with a convex tail, and k = m against all matrices."""
    x, y = instance.args
    layer = instance.where.split("/")[0]
    W = instance.params[layer]["w"]
    floors, bottoms = (
        [_floor(instance, k, directions, key) for k in (1, 2, 3)] for directions in ("top", "bottom")
    )
    hidden = jnp.tanh(x @ instance.params["layer_0"]["w"] + instance.params["layer_0"]["b"])
    bias = instance.params[layer]["b"]
    free = _convex_minimum(hidden, bias, y, W.shape)
    within = _convex_minimum(hidden @ W, bias, y, (W.shape[1], W.shape[1]))
    name = f"{instance.name}, linear tail"
    return [
        inequality("the floor does not increase with k (top)", name, np.diff(floors), 0.0, allowance=1e-8,
                   word=sd.Word.CHECKED, note="floors " + ", ".join(f"{v:.4f}" for v in floors)),
        inequality("the floor does not increase with k (bottom)", name, np.diff(bottoms), 0.0, allowance=1e-8,
                   word=sd.Word.CHECKED, note="floors " + ", ".join(f"{v:.4f}" for v in bottoms)),
        equality("at k = m the fast set is {M W}", name, floors[-1], within, allowance=1e-6),
        refuted("at k = m everything is reached although W lacks full column rank is false",
                f"{name}, 3 outputs, 5 inputs", floors[-1], free, allowance=1e-4, word=sd.Word.CHECKED),
        seen("floor of the bottom direction / of the top one, k = 1", name, bottoms[0] / floors[0], True),
    ]  # fmt: skip


def _floor(instance: Instance, k: int, directions: str, key: PRNGKeyArray) -> float:
    spec = sd.SpecDef(alpha=1.0, k=k, side="output", directions=directions)
    plan = sd.plan(instance.params, spec, where=instance.where, key=key)
    return float(
        bounds.fast_subspace_loss(instance.loss, instance.params, plan, *instance.args, steps=2000, tol=1e-9)
    )


def _convex_minimum(features: Array, bias: Array, y: Array, shape: tuple[int, int]) -> float:
    """Return the least cross-entropy over all matrices on fixed features, by SciPy."""

    @jax.jit
    @jax.value_and_grad
    def objective(flat: Float[Array, " n"]) -> Array:
        logits = features @ flat.reshape(shape) + bias
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(y)), y])

    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10}
    start = np.zeros(shape).ravel()
    return float(scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options).fun)
