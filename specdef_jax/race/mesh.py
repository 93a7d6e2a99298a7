"""A race over a mesh: each device drives its own lanes by its own loop, none waits for another's step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from specdef_jax.race import runner
from specdef_jax.race.pacing import FIRST, paced
from specdef_jax.race.runs import Factory, Progress, Runs

OWN = ("problem", "seed", "keys", "step_sizes", "targets", "count", "best")  # fields that differ by device


class Spread:
    """One share of runs per device. Every process of the mesh calls this with the same runs."""

    def __init__(
        self, mesh: Mesh, parts: Sequence[Runs], factory: Factory, eval_every: int, lanes: int
    ) -> None:
        """Place the shares and compile; the problems and data are copied to every device."""
        split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
        self.mesh = mesh
        self._total = sum(int(part.count) for part in parts)
        unkeyed = [replace(part, keys=jax.random.key_data(part.keys)) for part in parts]
        join = functools.partial(_joined, str(jax.random.key_impl(parts[0].keys)))
        own = {name: np.stack([np.asarray(getattr(part, name)) for part in unkeyed]) for name in OWN}
        self._own = self._placed(own, split)
        self._common = self._placed(replace(parts[0], **dict.fromkeys(OWN)), whole)
        options = {"factory": factory, "lanes": lanes}

        def start(own: PyTree, common: Runs) -> Progress:
            return _wider(runner.start(join(own, common), **options))

        def advance(state: Progress, own: PyTree, common: Runs, iterations: Array) -> Progress:
            state = runner.advance(
                _narrower(state), join(own, common), iterations, eval_every=eval_every, **options
            )
            return _wider(state)

        shard = functools.partial(jax.shard_map, mesh=mesh, out_specs=split, check_vma=False)
        self._start = jax.jit(shard(start, in_specs=(split, whole)))
        moved = shard(advance, in_specs=(split, split, whole, whole))

        @functools.partial(jax.jit, donate_argnums=0, out_shardings=(None, NamedSharding(mesh, whole)))
        def advance_all(state: Progress, own: PyTree, common: Runs, iterations: Array) -> tuple:
            state = moved(state, own, common, iterations)
            return state, jnp.sum(state.done)

        self._advance = advance_all
        jax.block_until_ready(self._advance(self._start(self._own, self._common), self._own, self._common, 0))

    def drive(self, report: Callable[[int], None] | None) -> list[Progress]:
        """Advance until all runs are done; return the final state of every device, as numpy arrays."""
        state, iterations = self._start(self._own, self._common), FIRST
        while True:
            clock = time.perf_counter()
            state, done = self._advance(state, self._own, self._common, iterations)
            if report is not None:
                report(int(done))
            if int(done) >= self._total:
                break
            # Processes must agree on the number of visits, not on the work between two of them.
            iterations = paced(iterations, time.perf_counter() - clock)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        kept = (state.results, state.stepped)
        results, stepped = jax.jit(lambda x: x, out_shardings=everywhere)(kept)
        results, stepped = jax.tree.map(np.asarray, (results, stepped))
        return [
            replace(state, results=jax.tree.map(lambda x, i=i: x[i], results), stepped=stepped[i])
            for i in range(self.mesh.size)
        ]

    def _placed(self, tree: PyTree, spec: PartitionSpec) -> PyTree:
        """Make global arrays of what every process holds."""
        sharding = NamedSharding(self.mesh, spec)

        def place(leaf: Any) -> jax.Array:
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(place, tree)


def _joined(impl: str, own: dict[str, Array], common: Runs) -> Runs:
    mine = {name: x[0] for name, x in own.items()}
    return replace(common, **(mine | {"keys": jax.random.wrap_key_data(mine["keys"], impl=impl)}))


def _wider(state: Progress) -> Progress:
    return jax.tree.map(lambda x: x[None], state)


def _narrower(state: Progress) -> Progress:
    return jax.tree.map(lambda x: x[0], state)
