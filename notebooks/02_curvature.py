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
# # What deforming a layer does to the curvature
#
# Statements 2.1 to 2.4 of the theory, one after the other, on a network small enough for its whole Hessian.
# `python -m theory` certifies the same statements on many more instances; here they are looked at.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import specdef_jax as sd
from specdef_jax import bounds, curvature
from specdef_jax.tasks import digits, networks

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("SPECDEF_NOTEBOOK_SIZE") == "small"  # what the tests set
plt.rcParams.update(
    {"figure.figsize": (6.5, 3.4), "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110}
)
key = jax.random.key(0)

# %% [markdown]
# A perceptron that knows the handwritten digits is attacked: the labels are shifted by one. We deform its
# second layer along the top singular direction.

# %%
network = networks.mlp((64, 4, 4, 10) if SMALL else (64, 8, 8, 10))
task = digits.task(seeds=1, network=network, examples=32 if SMALL else 128)
params = task.networks[0]
plan = sd.plan(params, sd.SpecDef(alpha=1.0, k=1, side="output"), where=task.where, key=key)
inserted = sd.apply_plan(params, plan)  # alpha = 1: an identity stands beside the weight
print(f"{sd.trees.size(params)} parameters, {sd.trees.size(inserted)} with the identity inserted")


def spectrum(tree):
    """Return all eigenvalues of the Hessian, ascending."""
    return np.asarray(curvature.eigvals(curvature.hessian(task.loss, tree, *task.args)))


# %% [markdown]
# ## 2.1 Congruence
#
# Deforming is a linear change of parameters $\varphi$ that does not change the loss, so
#
# $$H_\alpha = \varphi^{-\top} H_1\, \varphi^{-1}.$$
#
# Two consequences can be seen in the spectrum: **signs are kept** (Sylvester), and each eigenvalue moves by a
# factor between $\alpha^{-2}$ and $\alpha^2$ (Ostrowski).

# %%
alphas = [1.0, 4.0, 16.0]
spectra = {a: spectrum(sd.apply_plan(params, plan.with_alpha(a))) for a in alphas}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(1.5, 1))
for a, values in spectra.items():
    axes[0].plot(values, ".", ms=3, label=f"alpha = {a:g}")
axes[0].set_yscale("symlog", linthresh=1e-6)
axes[0].set_yticks([-1e3, -1, -1e-3, 0, 1e-3, 1, 1e3])
axes[0].set(xlabel="index", ylabel="eigenvalue", title="Every eigenvalue keeps its sign")
axes[0].legend(frameon=False)

a = alphas[-1]
low, high = bounds.ostrowski(jnp.asarray(spectra[1.0]), a)
floor = 1e-10 * abs(spectra[1.0]).max()
sure = np.abs(spectra[1.0]) > floor
ratio = spectra[a][sure] / spectra[1.0][sure]
axes[1].plot(np.arange(len(ratio)), ratio, ".", ms=3)
axes[1].axhspan(a**-2, a**2, alpha=0.15, label="Ostrowski")
axes[1].set(yscale="log", xlabel="index", title=f"Factor from alpha = 1 to {a:g}")
axes[1].legend(frameon=False, loc="lower right")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 2.2 The sandwich
#
# The growth sits in the compensation. Let $K_U$ be the Hessian on $W \to W + B\, U^\top W$ at $B = 0$. Then
#
# $$\alpha^2 \lVert K_U \rVert \;\le\; \sigma_1(H_\alpha) \;\le\; \alpha^2\, \sigma_1(H_1),$$
#
# and the difference on the left stays bounded: the sharpness is $\alpha^2 \lVert K_U \rVert + O(1)$.

# %%
grid = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
sharp, lower, upper = [], [], []
for a in grid:
    at_alpha = plan.with_alpha(a)
    op = curvature.hessian(task.loss, sd.apply_plan(params, at_alpha), *task.args)
    sharp.append(abs(float(curvature.eigsh(op, key=key).values[0])))
    sides = bounds.sandwich(task.loss, params, at_alpha, *task.args, key=key)
    assert sides.holds(sharp[-1])
    lower.append(float(sides.lower))
    upper.append(float(sides.upper))

fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
axes[0].fill_between(grid, lower, upper, alpha=0.2, label="sandwich")
axes[0].loglog(grid, sharp, "o-", ms=4, label="measured")
axes[0].set(xlabel="alpha", ylabel="sharpness", title="Quadratic growth")
axes[0].legend(frameon=False)
axes[1].semilogx(grid, np.subtract(sharp, lower), "o-", ms=4)
axes[1].set(xlabel="alpha", title="Sharpness minus alpha² ‖K‖: bounded", ylim=(0, None))
fig.tight_layout()
plt.show()

# %% [markdown]
# Where does it sit? The norm of each block of the Hessian, before and after: the compensation's own block
# grows as $\alpha^2$, its blocks with everything else as $\alpha$, and the deformed weight becomes *flat*
# along its $k$ rows.


# %%
def block_norms(tree):
    """Return the spectral norms of the blocks of the Hessian between groups of leaves."""
    matrix = np.asarray(curvature.dense(curvature.hessian(task.loss, tree, *task.args)).matrix)
    groups, start = {}, 0
    for name, leaf in sd.trees.named_leaves(tree):
        stop = start + leaf.size
        kind = "C" if name.endswith("/comp") else "deformed W" if name.endswith("/weight") else "rest"
        groups.setdefault(kind, []).extend(range(start, stop))
        start = stop
    names = ["C", "deformed W", "rest"]
    return names, [[np.linalg.norm(matrix[np.ix_(groups[p], groups[q])], 2) for q in names] for p in names]


fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
for axis, a in zip(axes, (1.0, 16.0), strict=True):
    names, norms = block_norms(sd.apply_plan(params, plan.with_alpha(a)))
    image = axis.imshow(np.log10(norms), vmin=-1, vmax=3.5, cmap="viridis")
    axis.set_xticks(range(3), names)
    axis.set_yticks(range(3), names)
    axis.set_title(f"alpha = {a:g}")
    for i in range(3):
        for j in range(3):
            dark = np.log10(norms[i][j]) < 1.5
            axis.text(j, i, f"{norms[i][j]:.3g}", ha="center", va="center", color="w" if dark else "k")
    axis.spines[:].set_visible(False)
fig.suptitle("Norms of the blocks of the Hessian")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 2.3 Blocks and the whole
#
# The eigenvalues of a diagonal block interlace with those of the matrix (Cauchy), so a block can be measured
# alone: its largest eigenvalue is a *lower* bound for the whole network.

# %%
matrix = np.asarray(curvature.dense(curvature.hessian(task.loss, inserted, *task.args)).matrix)
names = [name for name, leaf in sd.trees.named_leaves(inserted) for _ in range(leaf.size)]
name = "layer_2/w"
rows = np.flatnonzero(np.asarray(names) == name)
whole, inner = np.linalg.eigvalsh(matrix), np.linalg.eigvalsh(matrix[np.ix_(rows, rows)])
low, high = bounds.compression_intervals(jnp.asarray(whole), len(inner))
inside = (inner >= np.asarray(low) - 1e-9) & (inner <= np.asarray(high) + 1e-9)
print(f"block of '{name}': {inside.sum()} of {len(inner)} eigenvalues in their Cauchy interval")
print(f"largest eigenvalue: block {inner[-1]:.3f} <= whole {whole[-1]:.3f}")

# %% [markdown]
# ## 2.4 The product bound, as reported and as it holds
#
# An off-diagonal block factors as $A B C$ with $B$ a weight, and the paper's Theorem 3 bounds
# $\sigma_1(ABC)$ from below by singular values of the factors and two angles. **Read as reported it is
# false**: two close singular values of $B$ can interfere destructively. Three corrected forms hold.

# %%
draws = 500 if SMALL else 3000
shape = [(3, 3), (3, 3), (3, 3)]
keys = jax.random.split(key, 3)
A, B, C = (jax.random.normal(k, (draws, *s)) for k, s in zip(keys, shape, strict=True))
truth = np.asarray(jax.vmap(lambda a, b, c: jnp.linalg.norm(a @ b @ c, 2))(A, B, C))
forms = {
    "as reported": bounds.product_reported,
    "V1": bounds.product_v1,
    "V2": bounds.product_v2,
    "V2k": bounds.product_v2k,
}
fig, axes = plt.subplots(1, 4, figsize=(10, 2.9), sharey=True)
for axis, (label, bound) in zip(axes, forms.items(), strict=True):
    ratio = np.asarray(jax.jit(jax.vmap(bound))(A, B, C)) / truth
    axis.hist(ratio, bins=np.linspace(0, 1.6, 49), color="C3" if ratio.max() > 1 + 1e-9 else "C0")
    axis.axvline(1, color="k", lw=0.8)
    told = f"false on {np.mean(ratio > 1 + 1e-9):.1%}" if ratio.max() > 1 + 1e-9 else "never false"
    axis.set(xlabel="bound / truth", yticks=[])
    axis.set_title(f"{label}: {told}", fontsize=10)
fig.suptitle("A lower bound must stay left of 1 (Gaussian 3 × 3 factors)", y=1.06)
plt.show()

# %% [markdown]
# The smallest counterexample to the reported reading, by hand:

# %%
s, c = np.sin(0.7), np.cos(0.7)
A, B, C = jnp.array([[c, s]]), jnp.diag(jnp.array([1.01, 1.0])), jnp.array([[-s], [c]])
print(f"sigma_1(ABC) = {float(jnp.linalg.norm(A @ B @ C)):.4f}")
for label, bound in forms.items():
    print(f"{label:>12}: {float(bound(A, B, C)):.4f}")
