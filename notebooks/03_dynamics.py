# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What deforming a layer does to optimizers
#
# Statements 3.1 to 3.5 of the theory: the largest stable step, the preconditioner that a deformation is, the
# few directions that stay fast, what sharpness can and cannot do, and why Adam sees $\alpha$ where gradient
# descent sees $\alpha^2$.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import specdef_jax as sd
from specdef_jax import bounds, curvature, trees
from specdef_jax.tasks import digits, networks

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("SPECDEF_NOTEBOOK_SIZE") == "small"  # what the tests set
plt.rcParams.update(
    {"figure.figsize": (6.5, 3.4), "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110}
)
key = jax.random.key(0)

# %% [markdown]
# ## 3.1 The largest stable step
#
# On a quadratic of curvature $\lambda$ an optimizer with momentum is a linear map of (position, state), and
# it is stable as long as the map's spectral radius stays below 1. The radius of *optax's own* update crosses
# 1 exactly at the formula (dashed).

# %%
momentum, lam = 0.9, 1.0
methods = {
    "gd": lambda step: optax.sgd(step),
    "heavy_ball": lambda step: optax.sgd(step, momentum=momentum),
    "nesterov": lambda step: optax.sgd(step, momentum=momentum, nesterov=True),
    "ema_momentum": lambda step: optax.chain(optax.ema(momentum, debias=False), optax.scale(-step)),
}


def radius(make, step):
    """Return the spectral radius of one update on curvature lam, in (position, floating state)."""
    optimizer, x = make(step), jnp.zeros(())
    leaves, treedef = jax.tree.flatten((x, optimizer.init(x)))
    free = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def update(values):
        full = list(leaves)
        for i, value in zip(free, values, strict=True):
            full[i] = value
        x, state = treedef.unflatten(full)
        updates, state = optimizer.update(lam * x, state, x)
        after = jax.tree.leaves((optax.apply_updates(x, updates), state))
        return jnp.stack([after[i] for i in free])

    return np.abs(np.linalg.eigvals(np.asarray(jax.jacobian(update)(jnp.zeros(len(free)))))).max()


fig, ax = plt.subplots()
for i, (name, make) in enumerate(methods.items()):
    limit = float(bounds.max_stable_step(name, lam, momentum=momentum))
    steps = limit * np.linspace(0.05, 1.25, 8 if SMALL else 25)
    ax.semilogx(steps, [radius(make, s) for s in steps], color=f"C{i}", label=f"{name}: {limit:.3g}")
    ax.axvline(limit, color=f"C{i}", ls="--", lw=0.8)
ax.axhline(1, color="k", lw=0.8)
ax.set(xlabel="step size × curvature", ylabel="spectral radius", title="Stable below the dashed lines")
ax.set_ylim(0.75, 1.35)
ax.legend(frameon=False, fontsize=9, loc="upper left")
plt.show()

# %% [markdown]
# ## 3.2 A deformation is a preconditioner
#
# Gradient descent on the deformed network is, step for step, gradient descent on the identity-inserted one
# with preconditioner $\varphi^{-1}\varphi^{-\top}$: eigenvalues $\alpha^2$ on a few directions, $\alpha^{-2}$
# on others, 1 elsewhere. Adam is no such method, and its trajectories do not match.

# %%
network = networks.mlp((64, 6, 6, 10) if SMALL else (64, 16, 16, 10))
task = digits.task(seeds=1, network=network, examples=32 if SMALL else 128)
params = task.networks[0]
plan = sd.plan(params, sd.SpecDef(alpha=8.0, k=1, side="output"), where=task.where, key=key)
inserted = sd.apply_plan(params, plan.with_alpha(1.0))


def loss(tree, *args):
    return task.loss(sd.merge(tree), *args)


def run(start, optimizer, steps, precondition=lambda g: g):
    """Return the losses along a run."""

    @jax.jit
    def descend(start, args):
        def one(carry, _):
            at, state = carry
            value, grad = jax.value_and_grad(loss)(at, *args)
            updates, state = optimizer.update(precondition(grad), state, at)
            return (optax.apply_updates(at, updates), state), value

        return jax.lax.scan(one, (start, optimizer.init(start)), None, length=steps)[1]

    return np.asarray(descend(start, task.args))


steps = 30 if SMALL else 80
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for axis, name, make in zip(
    axes, ("SGD", "Adam"), (lambda: optax.sgd(2e-3), lambda: optax.adam(3e-3)), strict=True
):
    deformed = run(sd.apply_plan(params, plan), make(), steps)
    preconditioned = run(inserted, make(), steps, lambda g: bounds.preconditioned(g, plan))
    axis.plot(deformed, label="on the deformed network")
    axis.plot(preconditioned, "k:", label="preconditioned, not deformed")
    gap = np.abs(deformed - preconditioned).max()
    axis.set(title=f"{name}: largest difference {gap:.1e}", xlabel="step")
axes[0].set_ylabel("loss")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## 3.3 The fast subspace
#
# At the stable step $c/\alpha^2$ only the compensation's $k$ directions move at normal speed. As $\alpha$
# grows the trajectory tends to gradient descent on $W \to W + B\,U^\top W$ alone, and the difference falls as
# $\alpha^{-2}$.

# %%
task_fast = bounds.fast_subspace(task.loss, params, plan.with_alpha(1.0), *task.args)
fast_curvature = np.abs(
    curvature.eigvals(curvature.hessian(task_fast.loss, task_fast.params, *task.args))
).max()
c, horizon = 0.5 / fast_curvature, 40 if SMALL else 150


@jax.jit
def fast_run(args):
    def one(B, _):
        value, grad = jax.value_and_grad(task_fast.loss)(B, *args)
        return trees.axpy(-c, grad, B), value

    return jax.lax.scan(one, task_fast.params, None, length=horizon)[1]


limit = np.asarray(fast_run(task.args))
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
axes[0].plot(limit, "k", lw=2, label="limit: fast set alone")
errors, grid = [], [8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0]
for a in grid:
    losses = run(sd.apply_plan(params, plan.with_alpha(a)), optax.sgd(c / a**2), horizon)
    errors.append(np.abs(losses - limit).max())
    if a in (8.0, 16.0, 64.0):
        axes[0].plot(losses, "--", label=f"alpha = {a:g}")
axes[0].set(xlabel="step at c / alpha²", ylabel="loss", title="The limit")
axes[0].legend(frameon=False)
slope = np.log(errors[-1] / errors[-3]) / np.log(grid[-1] / grid[-3])
axes[1].loglog(grid, errors, "o-", ms=4)
axes[1].set(xlabel="alpha", ylabel="largest difference", title=f"Error, exponent at the end {slope:.2f}")
fig.tight_layout()
plt.show()

# %% [markdown]
# What the fast set can reach is the floor $L^*_U$. It falls with $k$: **raising $k$ weakens the defence**.
# And it depends on the directions: what matters is how little $U^\top W h$ tells about the attacker's
# residual (statement 3.3iv). `resistant` picks those directions from benign activations.

# %%
acts = sd.activations(task.apply, params, digits.load().x[:500], where=task.where)
ks = [1, 2] if SMALL else [1, 2, 3, 4, 6]
fig, ax = plt.subplots()
for directions in ("top", "random", "bottom", "resistant"):
    floors = []
    for k in ks:
        spec = sd.SpecDef(alpha=1.0, k=k, side="output", directions=directions)
        at = sd.plan(params, spec, where=task.where, key=key, activations=acts)
        floors.append(float(bounds.fast_subspace_loss(task.loss, params, at, *task.args, steps=1000)))
    ax.semilogy(ks, floors, "o-", ms=4, label=directions)
ax.axhline(float(task.loss(params, *task.args)), color="k", lw=0.8, ls=":", label="start")
ax.set(xlabel="k", ylabel="floor of the loss (nats)", title="What an attacker reaches at normal speed")
ax.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## What sharpness can and cannot do (3.3v)
#
# A defence that only speeds directions up cannot delay gradient descent by more than its sharpness $s$ over
# the curvature $\mu$ of the slow directions: $T \le (s/\mu)\log(\mathrm{gap}/\mathrm{target})$. One rescaled
# scalar comes within a factor four of that. Sign descent, and Adam, are slowed by $\sqrt{s}$ only, times
# $\lVert u \rVert_1$ of the stiff direction: 1 for a scalar, $\sqrt n$ for a direction spread over $n$
# coordinates.

# %%
s = np.logspace(1, 6, 40)
n = 256
axis_u, dense_u = jnp.eye(n)[0], jnp.ones(n) / np.sqrt(n)
fig, ax = plt.subplots()
ceiling = np.asarray(bounds.ceiling_steps(s, 1.0, 1.0, 1e-2))
scalar = np.asarray(bounds.stiff_scalar_steps(s, 1.0, 1.0, 1e-2))
ax.fill_between(s, scalar, ceiling, alpha=0.2, color="C0", label="GD: between one scalar and any defence")
ax.loglog(s, scalar, "C0")
ax.loglog(s, ceiling, "C0")
for u, label, style in ((axis_u, "sign descent: one scalar", "C1--"), (dense_u, f"{n} coordinates", "C1")):
    ax.loglog(s, [float(bounds.sign_min_steps(1.0, v, u, 1e-2)) for v in s], style, label=label)
ax.set(xlabel="sharpness / slowest curvature", ylabel="steps", title="Linear for GD, a root for sign methods")
ax.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## 3.5 How far Adam can move
#
# $|\hat m_t| / \sqrt{\hat v_t} \le c_t$ for every sequence of gradients, and one sequence attains it. So a
# coordinate that has to travel a distance needs at least that over $\eta \max c_t$ steps, whatever the
# sharpness.

# %%
horizon = 100 if SMALL else 2000
t = np.arange(1, horizon + 1)
bound = np.asarray(jax.vmap(lambda k: bounds.adam_displacement(k))(jnp.asarray(t)))
optimizer = optax.scale_by_adam(eps=0.0)


@jax.jit
@jax.vmap
def typical(key):
    """Return |m| / sqrt(v) along a run of independent normal gradients."""
    grads = jax.random.normal(key, (horizon,))

    def one(state, g):
        update, state = optimizer.update(g, state)
        return state, jnp.abs(update)

    return jax.lax.scan(one, optimizer.init(jnp.zeros(())), grads)[1]


noise = np.asarray(typical(jax.random.split(key, 200)))
fig, ax = plt.subplots()
ax.semilogx(t, bound, "k", label="bound c_t, attained")
ax.axhline(float(bounds.displacement_limit()), color="k", ls=":", lw=0.8, label="its limit, 7.27")
ax.fill_between(t, *np.quantile(noise, [0.05, 0.95], axis=0), alpha=0.3, label="random gradients, 90%")
ax.set(xlabel="step", ylabel="|update| / step size", title="Adam's largest step")
ax.legend(frameon=False, fontsize=9)
plt.show()
