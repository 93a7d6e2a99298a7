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
# # The limit: who knows the method pays next to nothing
#
# A deformation makes fine-tuning slow and keeps the function. This notebook walks up to its limit: an attack
# that is fine-tuning of the original network, step for step, at a known price in size; then all the others,
# their bills, what the weights alone give away, and two defences that are not SpecDef.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import specdef_jax as sd
from specdef_jax import attacks, campaign, race
from specdef_jax.parametrization import problem
from specdef_jax.tasks import digits, networks

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("SPECDEF_NOTEBOOK_SIZE") == "small"  # what the tests set
plt.rcParams.update(
    {"figure.figsize": (6.5, 3.4), "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110}
)
key = jax.random.key(0)

# %% [markdown]
# ## A network that resists
#
# It reads handwritten digits; the attacker teaches it to answer $y + 1 \bmod 10$. One direction of its middle
# layer is deformed.

# %%
network = networks.mlp((64, 6, 6, 10) if SMALL else (64, 32, 32, 10))
task = digits.task(seeds=1, network=network, examples=32 if SMALL else 128, target=1.0 if SMALL else 0.1)
plain = task.networks[0]
spec = sd.SpecDef(alpha=4.0 if SMALL else 16.0, k=1)
released = sd.deform(plain, spec, where=task.where, key=key)
setting = campaign.Setting(
    task.args, task.target, {"sgd": race.sgd}, steps=200 if SMALL else 3000, decades=4.0, refine=2.0
)


def curve(one, factory, step_size, steps):
    """Return the attacker's loss along one run, and its plain parameters at the end."""

    @jax.jit
    def run(one):
        optimizer = factory(step_size)

        def step(carry, _):
            params, state = carry
            value, grad = jax.value_and_grad(one.loss)(params, *task.args)
            updates, state = optimizer.update(grad, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (one.params, optimizer.init(one.params)), None, length=steps)
        return losses, one.read_back(params)

    return run(one)


base = setting.run([problem(task.loss, plain, *task.args)])
direct = setting.run([problem(task.loss, released, *task.args)])
print(
    "SGD, steps:",
    base.steps("sgd"),
    "undefended,",
    direct.steps("sgd"),
    "as released (NaN: not within the cap)",
)

# %% [markdown]
# ## The linear-size limit
#
# Hold both factors of the pair still and add a matrix $S = 0$ beside them: the layer computes $CW + S$. Since
# $CW$ does not move, the gradient with respect to $S$ is the gradient with respect to the weight of the
# original network, and every optimizer that looks at gradients alone does to $S$ what it would have done to
# the weight. Not "about as fast": the same run. The price is one more matrix per deformed layer.

# %%
injected = attacks.inject(task.loss, released, *task.args)
steps, rates = (40, {"sgd": 0.1, "adam": 0.01}) if SMALL else (200, {"sgd": 0.1, "adam": 0.01})
fig, axes = plt.subplots(1, 2, sharey=True, layout="constrained")
for ax, (name, rate) in zip(axes, rates.items(), strict=True):
    factory = race.FIRST_ORDER[name]
    original, end = curve(problem(task.loss, plain, *task.args), factory, rate, steps)
    ours, ours_end = curve(injected.problem, factory, rate, steps)
    asis, _ = curve(problem(task.loss, released, *task.args), factory, rate, steps)
    ax.plot(asis, color="#b5482a", label="as released")
    ax.plot(original, color="#bbbbbb", linewidth=4, label="original")
    ax.plot(ours, color="#3b6ea8", linestyle="--", label="inject")
    ax.set(yscale="log", ylim=(0.01, 100), title=name, xlabel="step")
    apart = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(ours_end), strict=True)
    )
    print(f"{name}: original and inject end {apart:.1e} apart, entry by entry, after {steps} steps")
axes[0].set_ylabel("attacker's loss, nats")
axes[1].legend(frameon=False)
bill = injected.bill
print(
    f"added: {bill.added_parameters} numbers, {bill.added_share:.0%} of the network; "
    f"{bill.conversion_seconds:.2g} s"
)

# %% [markdown]
# Where an optimizer looks at the weights themselves (decay in AdamW, the step size of Adafactor) the runs
# differ, and they are not slower for it: the exact statement ends there, the attack does not.
#
# ## All attacks, one ledger
#
# Each attack turns what was released into something to train. The ledger races all of them, at the best step
# size each. One means: as fast as the network that was never defended.

# %%
few = {n: attacks.ATTACKS[n] for n in ("fuse", "inject")} if SMALL else attacks.ATTACKS
book = campaign.ledger(task.loss, [released], setting, attacks=few)
colors = dict(
    zip((k.label for k in attacks.Knowledge), ("#b5482a", "#d9a441", "#3b6ea8", "#555555"), strict=True)
)
fig, ax = plt.subplots(figsize=(6.5, 1 + 0.28 * len(book.entries)), layout="constrained")
for y, entry in enumerate(reversed(book.entries)):
    if entry.best is None:
        ax.text(0.8, y, entry.refused or f"not within {setting.steps} steps", fontsize=8, va="center")
        continue
    ax.plot([1, entry.best[1].value], [y, y], color=colors[entry.knowledge.label], linewidth=1)
    ax.plot(entry.best[1].value, y, "o", color=colors[entry.knowledge.label])
ax.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
ax.set(xscale="log", xlabel="steps over those of the undefended network, SGD")
ax.set_yticks(range(len(book.entries)), [e.attack for e in reversed(book.entries)])
ax.legend(
    [plt.Rectangle((0, 0), 1, 1, color=c) for c in colors.values()], colors, frameon=False, fontsize=8,
    title="must know", title_fontsize=8,
)  # fmt: skip
for rung, entry in book.strongest().items():
    cost = "" if entry.bill is None else f", after {entry.bill.conversion_seconds:.2g} s of conversion"
    print(f"{rung.label}: {entry.attack}, {entry.best[1].value:.3g} times the steps{cost}")

# %% [markdown]
# ## What the weights give away
#
# An inserted compensation is recognised by its singular values: one number $k$ times, and 1 otherwise.
# Training does not hide it at once. A layer deformed in place leaves only gaps, and natural layers have gaps
# too; below, what a layer that was never deformed scores, and what the deformed one does, over $\alpha$.

# %%
alphas = np.geomspace(1.0, 1e4, 5 if SMALL else 17)
plan = sd.plan(plain, spec, where=task.where, key=key)
pairs = [attacks.detect(sd.apply_plan(plain, plan.with_alpha(float(a))))[task.where] for a in alphas]
natural = attacks.detect(plain)
fig, ax = plt.subplots()
ax.loglog(alphas, [s.imbalance for s in pairs], color="#3b6ea8", label="imbalance of the pair")
ax.loglog(alphas, [s.gap for s in pairs], color="#d9a441", label="gap of its weight")
ax.axhline(pairs[0].imbalance_limit, color="#3b6ea8", linestyle=":", label="limit of an inserted identity")
for score in natural.values():
    ax.axhline(score.gap, color="#bbbbbb", linewidth=0.8, zorder=0)
ax.set(xlabel=r"$\alpha$", ylabel="score", title="grey: gaps of layers that were never deformed")
ax.legend(frameon=False, fontsize=8)
sure = [a for a, s in zip(alphas, pairs, strict=True) if s.certain]
print(f"the compensation itself is recognised from alpha {min(sure):.3g} on" if sure else "never recognised")

# %% [markdown]
# ## Other defences through the same gate
#
# `campaign.auto` takes any defence that keeps the function, tries what is cheapest first and stops at what
# works. Two that one may think of next: channels of a ReLU network rescaled against one another, and a kernel
# written as a chain of factors. Each sentence says first whether the defence holds anyone off at all.

# %%
width = 6 if SMALL else 32
relu = networks.mlp((64, width, 10), activation="relu")
other = digits.task(seeds=1, network=relu, examples=task.args[0].shape[0], target=task.target)
scales = jnp.geomspace(1 / 64, 64.0, width)
first, second = relu.kernels
defences = [
    campaign.Defence("SpecDef", task.loss, released, plain),
    campaign.rescaled_channels(
        other.loss, other.networks[0], (first, first.replace("/w", "/b")), second, scales
    ),
    campaign.chain(other.loss, other.networks[0], second, alpha=16.0),
]
verdicts = [campaign.auto(d, setting) for d in (defences[1:2] if SMALL else defences)]
for verdict in verdicts:
    print(verdict)

# %% [markdown]
# ## Is any way of deforming worth more?
#
# How many times the steps each way costs an attacker who trains what was released (red), and what the
# cheapest attack that works leaves of that (blue). Some ways, at this alpha, even help: an inserted identity
# alone speeds gradient descent up.

# %%
ways = (
    [("symmetric", "top", 1, 4.0)]
    if SMALL
    else [
        ("symmetric", "top", 1, 16.0), ("symmetric", "top", 1, 32.0), ("symmetric", "top", 4, 16.0),
        ("symmetric", "bottom", 1, 16.0), ("symmetric", "bottom", 1, 512.0), ("rotated", "top", 1, 16.0),
        ("axis", "top", 1, 16.0),
    ]
)  # fmt: skip
specs = {
    f"{basis}, {chosen}, k {k}, alpha {alpha:g}": (
        sd.SpecDef(alpha, k, basis, directions=chosen), task.where
    )
    for basis, chosen, k, alpha in ways
}  # fmt: skip
points = campaign.frontier(task.loss, plain, specs, setting, key=key)
fig, ax = plt.subplots(figsize=(6.5, 1 + 0.35 * len(points)), layout="constrained")
for y, point in enumerate(reversed(points)):
    v = point.verdict
    ax.plot(v.resistance, y, ">" if v.resistance_is_bound else "o", color="#b5482a")
    if v.cheapest is not None:
        ax.plot([v.resistance, v.cheapest.ratio], [y, y], color="#bbbbbb", linewidth=1, zorder=0)
        ax.plot(v.cheapest.ratio, y, "o", color="#3b6ea8", markersize=4)
        ax.annotate(
            v.cheapest.attack, (v.cheapest.ratio, y), fontsize=7, xytext=(0, 4), textcoords="offset points"
        )
    print(v)
ax.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
ax.set(xscale="log", xlabel="steps over those of the undefended network, SGD (triangle: lower bound)")
ax.set_yticks(range(len(points)), [p.name for p in reversed(points)])

# %% [markdown]
# The defence is what its paper says it is: a price for those who fine-tune without looking. For those who
# look, undoing it costs a fraction of a second.
