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
# # How much slower does each optimizer become?
#
# A race asks one thing: how many steps to a target loss, at the best step size there is. Three rules keep it
# honest. The step size is searched until the best one is bracketed, for every arm anew; the slowdown compares
# with $\alpha = 1$, where the compensation is there and nothing is deformed; and a run that does not arrive
# is a lower bound, not a number.

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import specdef_jax as sd
from specdef_jax import curvature, race
from specdef_jax.parametrization import problem
from specdef_jax.tasks import digits, networks

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("SPECDEF_NOTEBOOK_SIZE") == "small"  # what the tests set
plt.rcParams.update(
    {"figure.figsize": (6.5, 3.4), "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110}
)
key = jax.random.key(0)

# %% [markdown]
# ## A task
#
# Networks that know the handwritten digits, fine-tuned to answer $y + 1 \bmod 10$. One direction of the
# middle layer is deformed.

# %%
network = networks.mlp((64, 6, 6, 10) if SMALL else (64, 32, 32, 10))
task = digits.task(
    seeds=2 if SMALL else 5, network=network, examples=32 if SMALL else 128, target=1.0 if SMALL else 0.1
)
plans = [sd.plan(p, sd.SpecDef(alpha=1.0, k=1), where=task.where, key=key) for p in task.networks]


def deformed(alpha):
    """Return one problem per pretrained network; None leaves the network as it is."""
    nets = task.networks
    if alpha is not None:
        nets = [sd.apply_plan(p, q.with_alpha(alpha)) for p, q in zip(nets, plans, strict=True)]
    return [problem(task.loss, p, *task.args) for p in nets]


def sharpness(one):
    op = curvature.hessian(one.loss, one.params, *task.args)
    return float(curvature.eigsh(op, tol=1e-4, key=key).values[0])


# %% [markdown]
# ## First order
#
# Gradient descent has to obey $2/\lambda_1$, and $\lambda_1$ grows as $\alpha^2$. Adam divides by the size of
# the gradient and sees $\alpha$. Muon orthogonalizes its update and hardly sees anything. The bars are
# paired over pretrained networks; the lines through them are 95% bootstrap intervals.

# %%
FIRST = ("sgd", "muon") if SMALL else ("sgd", "momentum", "rmsprop", "adagrad", "adam", "lion", "muon")
ALPHAS = (1.0, 8.0) if SMALL else (1.0, 4.0, 16.0)


def raced(problems, optimizers, **settings):
    center = float(np.median([2 / abs(sharpness(p)) for p in problems]))
    given = {
        "sample": race.full_batch(*task.args), "steps": 300 if SMALL else 4096, "target": task.target,
        "step_sizes": race.log_grid(center, decades=5, per_decade=1), "refine": 2.0,
        "prune": True, "lanes": 1,
    }  # fmt: skip
    return race.run_problems(problems, optimizers, **(given | settings))


optimizers = {name: race.FIRST_ORDER[name] for name in FIRST}
results = {alpha: raced(deformed(alpha), optimizers) for alpha in ALPHAS}

fig, ax = plt.subplots()
for j, alpha in enumerate(ALPHAS[1:]):
    ratios = results[alpha].slowdown(results[1.0])
    at = np.arange(len(FIRST)) + 0.35 * (j - 0.5 * (len(ALPHAS) - 2))
    values = np.array([ratios[name].value for name in FIRST])
    low, high = (np.array([getattr(ratios[name], side) for name in FIRST]) for side in ("low", "high"))
    high = np.where(np.isfinite(high), high, values)
    ax.bar(at, values, 0.32, color=f"C{j}", label=rf"$\alpha = {alpha:g}$")
    ax.vlines(at, low, high, color="k", lw=0.9)
ax.axhline(1, color="k", lw=0.8)
ax.set_yscale("log")
ax.set_xticks(range(len(FIRST)), FIRST, rotation=20)
ax.set(ylabel="steps over steps at alpha = 1", title="Who is slowed")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Where the best step size went
#
# The race finds it anew for every $\alpha$. The published bound speaks of the largest *stable* step at the
# start, $2/\lambda_1 \sim \alpha^{-2}$. The best step size of gradient descent falls more slowly than that:
# training beyond $2/\lambda_1$ goes on, the sharpness comes down on the way.

# %%
fig, ax = plt.subplots()
limits = {alpha: [2 / abs(sharpness(p)) for p in deformed(alpha)] for alpha in ALPHAS}
for i, name in enumerate(FIRST):
    best = []
    for alpha in ALPHAS:
        found = results[alpha]
        chosen = found.best_index(name)
        best.append(
            np.exp(np.mean(np.log(found.grid(name)[chosen[chosen >= 0]]))) if (chosen >= 0).any() else np.nan
        )
    ax.loglog(ALPHAS, best, "o-", color=f"C{i}", label=name)
ax.loglog(ALPHAS, [np.exp(np.mean(np.log(limits[a]))) for a in ALPHAS], "k--", lw=1, label=r"$2/\lambda_1$")
ax.set(
    xlabel=r"$\alpha$", ylabel="best step size", title="Best step sizes, and the stable limit at the start"
)
ax.legend(frameon=False, fontsize=8, ncols=2)
plt.show()

# %% [markdown]
# ## Second order
#
# Undamped Newton does not see a change of coordinates at all (statement 4.1). What is used in practice is
# damped, truncated or estimated, and each of these breaks the equivalence in its own way. Work is counted in
# gradients: a Hessian product is worth two.

# %%
SECOND = ("kfac",) if SMALL else ("lbfgs", "newton_cg", "cubic_newton", "adahessian", "kfac")
second = {name: race.SECOND_ORDER[name] for name in SECOND}
cap = {"steps": 60 if SMALL else 500, "max_evaluations": 400.0 if SMALL else 8192.0}
curved = {alpha: raced(deformed(alpha), second, **cap) for alpha in (1.0, ALPHAS[-1])}
ratios = curved[ALPHAS[-1]].slowdown(curved[1.0], "evaluations")
for name in SECOND:
    print(f"{name:>14}: {ratios[name]} times the gradients at alpha = {ALPHAS[-1]:g}")

# %% [markdown]
# ## What clipping changes
#
# The same step size, far beyond $2/\lambda_1$ of the deformed network. Plain gradient descent is thrown onto
# a plateau, its units saturated, and stays there: nothing non-finite for a detector of divergence to see.
# With the gradient clipped the same step size trains. So clipping gives the attacker step sizes that are
# lost without it, and a table that clips must say so.

# %%
one = deformed(ALPHAS[-1])[:1]
step = 300 / abs(sharpness(one[0]))
switched = {"plain": race.sgd, "clipped at 0.1": race.Switched(race.sgd, clip=0.1)}
shown = race.run_problems(
    one, switched, sample=race.full_batch(*task.args), steps=200, step_sizes=(step,), target=1e-9, lanes=1
)
fig, ax = plt.subplots()
for i, name in enumerate(shown.names):
    ax.semilogy(shown.record_at + 1, shown.trace[i, 0, 0], color=f"C{i}", label=name)
    ended = race.Outcome(int(shown.outcome[i, 0, 0])).name
    print(f"{name:>14}: {ended}, came back: {race.recovery(shown.trace[i, 0, 0])}")
ax.set(xlabel="step", ylabel="loss", title=rf"Step size $300/\lambda_1$, $\alpha = {ALPHAS[-1]:g}$")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Seeds that never arrive
#
# With a cap some seeds are censored. Kaplan and Meier's estimate uses what is known of them: that they were
# still running. The median is read off where the curve crosses one half; if it does not, there is none.

# %%
capped = raced(deformed(ALPHAS[-1]), {n: optimizers[n] for n in FIRST[:3]}, steps=40 if SMALL else 400)
fig, ax = plt.subplots()
for i, name in enumerate(capped.names):
    found = capped.survival(name)
    if not found.steps.size:
        ax.axhline(1, color=f"C{i}", label=f"{name}: none of {found.censored}")
        continue
    x = np.concatenate([[1], found.steps, [capped.cap]])
    y = np.concatenate([[1], found.share, found.share[-1:]])
    median = f"median {found.median:.0f}" if found.median > 0 else "no median"
    ax.step(
        x,
        y,
        where="post",
        color=f"C{i}",
        label=f"{name}: {median}",
    )
ax.axhline(0.5, color="k", lw=0.6)
ax.set(xscale="log", xlabel="steps", ylabel="share still above the target", ylim=(-0.03, 1.05))
ax.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## What the tables say
#
# `python -m benchmarks.race first_order` (and `second_order`, `answers`, `exponents`) races all of this with
# more seeds and writes `benchmarks/results/race_*.json`; the README reads its numbers from there.
