"""Statement 1.5 [ours, seen]: Low precision freezes what the deformation slows down.

STATEMENT. In a binary format of unit roundoff u with smallest normal number t, write h+(x) and h-(x) for half
the gaps from a number x to its neighbours away from zero and towards it:

    h+(x) = u max(2^floor(log2 |x|), t),   h-(x) = h+(x), or half of that where |x| is a power of two above t.

(i) Rounding to nearest, ties to even: fl(x + d) = x if and only if |d| < h, or |d| = h and the last bit of x
    is zero, with h = h+ or h- by the side of d (for x = 0 both are t u).
(ii) For normal x, u |x| / 2 <= h <= u |x|. So an update |d| <= u |x| / 2 is always lost and an update
    |d| > u |x| never is; both constants are sharp. "Lost when |d| < u |x|" is FALSE: 1.75 + 0.005 = 1.7578 in
    bfloat16, where u 1.75 = .0068.
(iii) If every update of a parameter satisfies |d_t| <= u |x| / 2 for t = 1, ..., T, it is x after T steps,
    while in real arithmetic it moves by sum d_t. Gradient descent at step c / a^2 on a network deformed in
    the axis or rotated basis loses every update of an entry outside the pair with c |g| <= a^2 u |x| / 2, and
    of Wt along U with c |g| <= a^4 u |x| / 2, where g and x are gradient and entry at a = 1. At a = 256:
    a^2 u = 2^8 in bfloat16, 2^-8 in float32, 2^-37 in float64.
(iv) [seen] Over 50 such steps at a = 256 bfloat16 moves the k amplified rows of C and at most a few percent
    of all entries outside C; float64 moves all that have a gradient; float32 moves nearly all, but loses a
    part of their updates. So claims about dynamics need float64, or master weights: bfloat16 gradients on
    float64 parameters move all.

ASSUMPTIONS. x finite; d any real number, added in one rounding; gradual underflow for subnormal x. (An update
that is itself rounded first, as optax does, is d after that rounding.)

PROOF. (i) fl(y) is the number nearest to y, of two the one with last bit zero. Between x and its neighbour on
the side of d, at distance 2h, x is nearer to x + d exactly for |d| < h, and the tie at |d| = h goes to x when
its last bit is zero (neighbours differ in it). Beyond the neighbour x is not nearest. The numbers of
[2^e, 2^(e+1)) are 2u 2^e apart, subnormal ones 2u t. Below a power of two above t the gap is that of the
binade below. (ii) |x| = f 2^e with 1 <= f < 2: h+ = u |x| / f lies in (u |x| / 2, u |x|]; h- = h+ unless
f = 1, then u |x| / 2. At |d| = u |x| / 2 = h- the last bit of x, a power of two, is zero: lost. (iii)
Induction: x stays x. g_a = phi^-T g (statement 2.1) is g outside the pair and g / a in Wt along U, whose
entries are a x: the updates are c g / a^2 against u |x| / 2, and c g / a^3 against u a |x| / 2. QED.

TIGHTNESS. h+ = u |x| at powers of two, and h- = u |x| / 2 there.

SOURCE. (i) and (ii) are IEEE 754 spelled out; (iii) and the correction of the constant are ours. The
functions are bounds.lost_update_threshold and bounds.update_is_lost.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.pair import Basis
from specdef_jax.precision import unit_roundoff
from specdef_jax.words import Word
from theory.assumptions import require
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    inequality,
    refuses,
    refuted,
    seen,
    tight,
    under_assumptions,
)
from theory.hessians import curvature_of, sigma_1
from theory.instances.networks import Instance, mlp_instance, networks
from theory.low_precision import STEPS, Frozen, cast, descend, moved
from theory.sizes import Size

ALPHA = 256.0
CLAIM = "an update is lost if and only if it is below half the gap on its side (a tie: if x is even)"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify (i) on all numbers of two formats, (ii), a step of a network, and measure fifty of them."""
    found = [*_every_number(), *_drawn(key, size), *_interval(), _too_large()]
    for instance in networks(size, key):
        found += _dynamics(instance, size, key)
    return (*found, *_outside(key))


# (i), (ii) one number


def _every_number() -> list[Certificate]:
    """Every finite float16 and every normal bfloat16, each with six updates, against rounding itself."""
    found: list[Certificate] = []
    for dtype, exponents in ((ml_dtypes.bfloat16, 0x7F80), (np.float16, 0x7C00)):
        bits = np.arange(2**16, dtype=np.uint16)
        numbers = bits[(bits & exponents) != exponents].view(dtype)  # the others are infinite or NaN
        # XLA flushes subnormal bfloat16 numbers to zero, so they are left out.
        lowest = float(jnp.finfo(dtype).tiny) if dtype is ml_dtypes.bfloat16 else 0.0
        x = numbers[np.abs(numbers.astype(np.float64)) >= lowest]
        half = _half_gaps(x)
        thresholds = [np.asarray(h) for h in bounds.lost_update_threshold(jnp.asarray(x))]
        wrong, told = 0, 0
        for side, sign in enumerate((-1.0, 1.0)):
            for share in (1 - 2.0**-10, 1.0, 1 + 2.0**-10):
                d = np.copysign(1.0, x.astype(np.float64)) * sign * share * half[side]
                predicted = np.asarray(bounds.update_is_lost(jnp.asarray(x), jnp.asarray(d)))
                wrong += int(np.sum(predicted != _lost(x, d)))
                told += len(x)
        name = f"every {'normal ' if lowest else 'finite '}{np.dtype(dtype).name}"
        found += [
            equality("h- and h+ are half the gaps", name, np.stack(thresholds), np.stack(half), allowance=0.0,
                     scale=[1.0, 1.0], word=Word.PROVED),
            inequality(CLAIM, f"{name}, just below, at and above both: wrong of {told:,}", wrong, 0.0),
        ]  # fmt: skip
    return found


def _half_gaps(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return half the distances to the neighbours towards zero and away from it, from the neighbours."""
    size, kind = np.abs(x), x.dtype.type
    with np.errstate(over="ignore"):
        above = np.nextafter(size, kind(np.inf)).astype(np.float64)
    below = np.nextafter(size, kind(-1)).astype(np.float64)
    wide = size.astype(np.float64)
    away = np.where(np.isinf(above), wide - below, above - wide) / 2  # beyond the largest as below it
    return np.where(wide == 0, away, (wide - below) / 2), away


def _lost(x: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Round x + d, exact in float32 for 16-bit x and these d, to the format of x."""
    total = (x.astype(np.float64) + d).astype(np.float32)
    with np.errstate(over="ignore"):
        return total.astype(x.dtype) == x


def _drawn(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Random float32 and float64 numbers over 60 binades, against the addition of NumPy."""
    x_key, share_key, exponent_key, kind_key = jax.random.split(key, 4)
    draws = (size.draws,)
    mantissa = np.asarray(jax.random.uniform(x_key, draws, float, 1, 2))
    mantissa = np.where(np.asarray(jax.random.bernoulli(kind_key, 0.2, draws)), 1.0, mantissa)
    scale = 2.0 ** np.asarray(jax.random.randint(exponent_key, draws, -30, 31))
    shares = np.asarray(jax.random.uniform(share_key, draws, float, -2, 2))
    shares = np.where(np.asarray(jax.random.bernoulli(kind_key, 0.5, draws)), np.sign(shares), shares)
    found: list[Certificate] = []
    for dtype in (np.float32, np.float64):
        x = (mantissa * scale).astype(dtype)
        u = unit_roundoff(np.dtype(dtype))
        d = (shares * u * scale).astype(dtype)
        predicted = np.asarray(bounds.update_is_lost(jnp.asarray(x), jnp.asarray(d)))
        towards, away = (np.asarray(h) for h in bounds.lost_update_threshold(jnp.asarray(x)))
        wide = u * x.astype(np.float64)
        name = f"{np.dtype(dtype).name}, 2^-30 to 2^30, a fifth of them powers of two"
        found += [
            inequality(CLAIM, f"{name}; half the updates ties: wrong", predicted != (x + d == x), 0.0),
            inequality("u |x| / 2 <= h-", name, wide / 2, towards, scale=wide),
            inequality("h+ <= u |x|", name, away, wide, scale=wide),
        ]
    return found


def _interval() -> list[Certificate]:
    """Both ends of [u |x| / 2, u |x|], at powers of two."""
    powers = jnp.asarray(2.0 ** np.arange(-100, 101, 25), jnp.bfloat16)
    u = unit_roundoff(powers.dtype)
    towards, away = bounds.lost_update_threshold(powers)
    wide, name = u * powers.astype(jnp.float64), "bfloat16 powers of two, 2^-100 to 2^100"
    return [
        tight("u |x| / 2 <= h-", name, wide / 2, towards, factor=1.0),
        tight("h+ <= u |x|", name, away, wide, factor=1.0),
    ]


def _too_large() -> Certificate:
    """An update below u |x| that is not lost."""
    x, d = ml_dtypes.bfloat16(1.75), 0.005
    after = float((np.float32(x) + np.float32(d)).astype(ml_dtypes.bfloat16))
    told = f"x = 1.75, d = {d}, u |x| = {2.0**-8 * 1.75:.4f}; fl(x + d) = {after}; in rational arithmetic "
    exact = Fraction(7, 4) + Fraction(1, 200)
    told += f"{exact} is nearer to {Fraction(after)} than to 7/4"
    nearer = abs(exact - Fraction(7, 4)) - abs(exact - Fraction(after))
    return refuted("an update below u |x| is lost", "bfloat16", float(nearer), 0.0, note=told)


# (iii), (iv) networks


def on_network(
    loss: Callable[..., Array], params: PyTree, *args: Any, step_size: float, name: str
) -> Certificates:
    """Certify, for one step of gradient descent on anyone's parameters, which entries it cannot move.

    Args:
      loss: loss(params, *args) -> scalar, in the dtype of the parameters.
      params: parameters, deformed or plain, as stored.
      *args: data.
      step_size: of the step.
      name: of the instance.
    """

    def evaluate() -> Certificate:
        updates = jax.tree.map(lambda g: -step_size * g, jax.jit(jax.grad(loss))(params, *args))
        require(all(bool(jnp.isfinite(d).all()) for d in jax.tree.leaves(updates)), "updates are finite")
        after = optax.apply_updates(params, updates)
        wrong, stays, count = 0, 0, 0
        for x, d, y in zip(*map(jax.tree.leaves, (params, updates, after)), strict=True):
            predicted = np.asarray(bounds.update_is_lost(x, d))
            wrong += int(np.sum(predicted != np.asarray(x == y)))
            stays, count = stays + int(predicted.sum()), count + x.size
        note = f"{stays} of {count} entries stay"
        return inequality(
            "(i) tells which entries a step leaves as they are", f"{name}: wrong", wrong, 0.0, note=note
        )

    return under_assumptions("(i) tells which entries a step leaves as they are", name, evaluate)


def _dynamics(instance: Instance, size: Size, key: PRNGKeyArray) -> list[Certificate]:
    """Gradient descent on the network as released, half the stable step, in three formats."""
    found: list[Certificate] = []
    loss = sd.layered(instance.loss)
    for basis in ("rotated", "symmetric", "axis") if size is Size.FULL else ("rotated",):
        deformed, step = _deformed(instance, basis, key)
        name = f"{instance.name}, {basis}"
        ran = {}
        for dtype in ("float64", "float32", "bfloat16"):
            tree, args = cast((deformed, instance.args), dtype)
            if dtype == "bfloat16" or size is Size.FULL:
                found += on_network(loss, tree, *args, step_size=step, name=f"{name}, {dtype}")
            ran[dtype] = moved(tree, descend(loss, tree, args, step, master=False))
        master = moved(deformed, descend(loss, deformed, cast(instance.args, "bfloat16"), step, master=True))
        found += _seen(ran, master, name, basis)
    return found


def _seen(ran: dict[str, Frozen], master: Frozen, name: str, basis: Basis) -> list[Certificate]:
    double, single, half = (ran[dtype] for dtype in ("float64", "float32", "bfloat16"))
    told = f"{name}, {STEPS} steps of 1/sigma_1(H_a) at a = {ALPHA:g}"
    where = f"{told}: share of other entries moved"
    note = f"C: {half.comp:.0%} of its entries"
    lost = f"float64 {double.lost:.1%}, float32 {single.lost:.1%}, bfloat16 {half.lost:.1%}"
    return [
        seen("bfloat16 moves nothing but C", where, half.rest, half.rest <= 0.1, against=0.1, note=note),
        seen("float64 moves all that have a gradient", where, double.rest, double.rest >= 0.9, against=0.9),
        seen("float32 lies between in updates lost", f"{told}: share of the updates outside C", single.lost,
             double.lost <= single.lost < half.lost, against=half.lost, note=lost),
        seen("bfloat16 gradients on float64 master weights move all", where, master.rest, master.rest >= 0.9,
             against=0.9),
    ]  # fmt: skip


def _deformed(instance: Instance, basis: Basis, key: PRNGKeyArray) -> tuple[PyTree, float]:
    """Return the network deformed at ALPHA and half its largest stable step."""
    spec = sd.SpecDef(alpha=ALPHA, k=1, basis=basis, side="output", budget=np.inf)
    tree = sd.deform(instance.params, spec, where=instance.where, key=key)
    return tree, float(1 / sigma_1(curvature_of(instance.loss, tree, *instance.args).hessian))


def _outside(key: PRNGKeyArray) -> list[Certificate]:
    """Updates that are not finite are refused."""
    instance = mlp_instance(key)
    broken = jax.tree.map(lambda x: x * jnp.nan, instance.params)
    refused = on_network(instance.loss, broken, *instance.args, step_size=0.1, name="")
    return [refuses(CLAIM, "a gradient of NaN", refused, "updates are finite")]
