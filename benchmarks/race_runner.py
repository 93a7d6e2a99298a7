"""How fast is a race, against a Python loop with a jitted step over the same pairs?

One 64-32-10 network on the handwritten digits, float32, minibatches of 32 and 256. Two peers, each in
the same run: all pairs for a fixed number of steps, and with an early stop at a target loss, where
the loop asks for the loss after every step as such loops do. Results are compared, not assumed equal.
And what a step costs beyond the gradient and optax's update of it, in one compiled loop without a race.

    python -m benchmarks.race_runner [--quick]
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from benchmarks._harness import paired, save
from specdef_jax import race
from specdef_jax.tasks import digits, networks

BARS = {"32": {"bar": 6.0, "goal": 12.0}, "256": {"bar": 1.3, "goal": 2.5}}
WIDTHS = (64, 32, 10)
NETWORK = networks.mlp(WIDTHS)


def main() -> None:
    """Run the benchmark, print its table and save its JSON."""
    parser = argparse.ArgumentParser(description="Time a race against a Python loop.")
    parser.add_argument("--quick", action="store_true", help="few steps, nothing is saved")
    args = parser.parse_args()
    config = {
        "widths": WIDTHS,
        "optimizer": "adam",
        "step_sizes": np.logspace(-4, -1.5, 8).tolist(),
        "seeds": 4,
        "steps": 40 if args.quick else 300,
        "target": 1.0,
        "repeats": 1 if args.quick else 15,
        "bars": BARS,
    }
    data = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype.kind == "f" else x, digits.load())
    rows = [measure(data, batch, early_stop, config) for batch in (32, 256) for early_stop in (False, True)]
    overheads = [overhead(data, batch, config) for batch in (32, 256)]
    for row in rows + overheads:
        print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    if not args.quick:
        summary = {
            f"batch_{r['batch']}_{'early_stop' if r['early_stop'] else 'fixed'}": r["ratio"] for r in rows
        }
        save("race_runner", config, rows, summary | {"overhead": overheads})


def measure(data: digits.Digits, batch: int, early_stop: bool, config: dict[str, Any]) -> dict[str, Any]:
    """Time the race and the loop in turn, compiled before, and compare what they found."""
    params = NETWORK.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    sample = Partial(functools.partial(minibatch, batch), data.x, data.y)
    key = jax.random.key(1)
    target = config["target"] if early_stop else -1.0
    steps, grid, seeds = config["steps"], np.asarray(config["step_sizes"]), config["seeds"]

    def ours() -> race.RaceResult:
        return race.run(
            digits.loss_of(NETWORK),
            params,
            {"adam": race.adam},
            sample=sample,
            steps=steps,
            step_sizes=grid,
            seeds=seeds,
            target=target,
            key=key,
        )

    def loop() -> np.ndarray:
        found = np.full((grid.size, seeds), np.nan)
        for j, order in enumerate(jax.random.split(key, seeds)):
            for i, step_size in enumerate(jnp.asarray(grid, jnp.float32)):
                p, state = params, race.adam(step_size).init(params)
                for t in range(steps + 1):
                    p, state, value = jitted_step(p, state, sample, order, t, step_size)
                    if early_stop and float(value) <= target:
                        found[i, j] = t
                        break
                jax.block_until_ready(p)
        return found

    ahead, behind = ours(), loop()
    times = paired(loop, ours, config["repeats"])
    same = np.array_equal(np.ceil(ahead.to_target[0] - 1e-6), behind, equal_nan=True)
    return {
        "batch": batch,
        "early_stop": early_stop,
        "pairs": grid.size * seeds,
        "lanes": ahead.lanes,
        "loop_seconds": times.a,
        "race_seconds": times.b,
        "ratio": times.ratio,
        "ratio_low": min(times.ratios),
        "ratio_high": max(times.ratios),
        "equal_results": bool(same),
    }


def overhead(data: digits.Digits, batch: int, config: dict[str, Any]) -> dict[str, Any]:
    """Time the steps of one run, in one lane, over those of a bare compiled loop with the same arithmetic."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), NETWORK.init(jax.random.key(0)))
    sample = Partial(functools.partial(minibatch, batch), data.x, data.y)
    key, steps = jax.random.key(1), 20 * config["steps"]

    def ours() -> race.RaceResult:
        return race.run(
            digits.loss_of(NETWORK), params, {"adam": race.adam}, sample=sample, steps=steps, lanes=1,
            step_sizes=[1e-3], target=-1.0, key=key,
        )  # fmt: skip

    order = jax.random.split(key, 1)[0]

    def loop() -> Any:
        return jax.block_until_ready(bare_loop(params, sample, order, steps + 1, jnp.float32(1e-3)))

    loop(), ours()
    found, seconds = [], []
    for _ in range(config["repeats"]):
        begin = time.perf_counter()
        loop()
        seconds.append(time.perf_counter() - begin)
        found.append(ours().seconds / seconds[-1])  # compilation apart
    return {
        "batch": batch,
        "bare_seconds_per_step": min(seconds) / (steps + 1),
        "race_over_bare": float(np.median(found)),
        "lowest": min(found),
        "highest": max(found),
    }


@jax.jit
def bare_loop(params: Any, sample: Partial, key: jax.Array, steps: int, step_size: jax.Array) -> Any:
    """Take so many steps of Adam, with nothing beside."""
    optimizer = race.adam(step_size)

    def step(t: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = carry
        args = sample(jax.random.fold_in(key, t))
        gradient = jax.grad(digits.loss_of(NETWORK))(params, *args)
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))


@jax.jit
def jitted_step(
    params: Any, state: Any, sample: Partial, key: jax.Array, t: int, step_size: jax.Array
) -> Any:
    """Take one step of Adam, as a plain training loop would."""
    args = sample(jax.random.fold_in(key, t))
    value, grad = jax.value_and_grad(digits.loss_of(NETWORK))(params, *args)
    updates, state = race.adam(step_size).update(grad, state, params)
    return jax.tree.map(jnp.add, params, updates), state, value


def minibatch(batch: int, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw a batch with replacement."""
    chosen = jax.random.randint(key, (batch,), 0, len(x))
    return x[chosen], y[chosen]


if __name__ == "__main__":
    main()
