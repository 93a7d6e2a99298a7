"""What is asked of a deformation (SpecDef), and what was decided (Plan)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from specdef_jax.errors import SpecError
from specdef_jax.pair import Basis
from specdef_jax.parametrization import KernelAxes, Side

Directions = Literal["top", "bottom", "random", "resistant"] | Array | np.ndarray


@dataclass(frozen=True, eq=False)
class SpecDef:
    """How to deform one linear map.

    Attributes:
      alpha: factor on the chosen singular directions, > 0; powers of two are exact in the axis basis.
      k: number of directions, 1 <= k <= min(m, n).
      basis: "symmetric" T(a) as in the paper, "rotated" (diagonal after an orthogonal change of
        basis), or "axis" (directions among the columns of the identity).
      side: which side the compensation stands on; "auto" takes the side with fewer features.
      directions: "top" or "bottom" singular directions, "random", "resistant" (least informative about an
        attacker's residual, from a batch of activations; output side), or an array (features, k).
      tol: residual asked of the subspace; missing it is a status, not an error.
      budget: largest relative error of the layer in its storage dtype that is accepted
        (THEORY.md 1.2 rule of thumb); math.inf accepts any.

    Raises:
      SpecError: a field has no meaning.
    """

    alpha: float = 2.0**13
    k: int = 1
    basis: Basis = "symmetric"
    side: Literal["auto", "output", "input"] = "auto"
    directions: Directions = "top"
    tol: float = 1e-2
    budget: float = 0.1

    def __post_init__(self) -> None:
        _positive("alpha", self.alpha)
        _positive("tol", self.tol)
        if not isinstance(self.budget, Real) or not self.budget > 0:
            raise SpecError(f"budget = {self.budget}: must be positive (math.inf accepts any error).")
        if isinstance(self.k, bool) or not isinstance(self.k, int | np.integer) or self.k < 1:
            raise SpecError(f"k = {self.k!r}: the number of directions must be an integer >= 1.")
        _one_of("basis", self.basis, get_args(Basis))
        _one_of("side", self.side, ("auto", "output", "input"))
        if isinstance(self.directions, str):
            _one_of("directions", self.directions, ("top", "bottom", "random", "resistant"))
            if self.directions == "resistant" and (self.side == "input" or self.basis == "axis"):
                raise SpecError(
                    "directions 'resistant' stand on the output side and are no columns of the identity."
                )
        elif not isinstance(self.directions, jax.Array | np.ndarray):
            raise SpecError(
                f"directions has type {type(self.directions).__name__}: "
                "give 'top', 'bottom', 'random', 'resistant' or an array (features, k)."
            )
        elif self.basis == "axis":
            raise SpecError("basis 'axis' chooses columns of the identity; it takes no directions array.")

    @classmethod
    def paper(cls) -> SpecDef:
        """Return the setting reported for the paper: alpha 1e4, k 25, top singular directions."""
        return cls(alpha=1e4, k=25)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """The decision for one kernel; arrays are data, the rest static.

    Attributes:
      U: orthonormal directions (*stack, d, k), d the features of `side`.
      alpha: the factor, a scalar.
      singular_values: ||W restricted to each direction|| (*stack, k), before deformation.
      residual: relative residual of the subspace (*stack), see specdef_jax.subspace.
      status: specdef_jax.subspace.Status (*stack).
      side, basis, axes: static.
    """

    U: Float[Array, "*stack d k"]
    alpha: Float[Array, ""]
    singular_values: Float[Array, "*stack k"]
    residual: Float[Array, "*stack"]
    status: Int[Array, "*stack"]
    side: Side = field(metadata={"static": True})
    basis: Basis = field(metadata={"static": True})
    axes: KernelAxes = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Path -> Layer for every kernel to deform: a pytree."""

    layers: dict[str, Layer]

    def __getitem__(self, path: str) -> Layer:
        """Return the layer planned at a path."""
        return self.layers[path]

    def __iter__(self) -> Iterator[str]:
        """Iterate over paths."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of planned layers."""
        return len(self.layers)

    def items(self) -> Iterator[tuple[str, Layer]]:
        """Iterate over (path, layer)."""
        return iter(self.layers.items())

    def with_alpha(self, alpha: float | Float[Array, ""]) -> Plan:
        """Return the same plan at another alpha (a traced scalar under vmap is fine), any budget accepted.

        Raises:
          SpecError: alpha is known, and not positive and finite.
        """
        if not isinstance(alpha, Tracer):
            _positive("alpha", float(alpha))
        return Plan(
            {
                path: replace(layer, alpha=jnp.asarray(alpha, layer.alpha.dtype))
                for path, layer in self.items()
            }
        )


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SpecError(f"{name} = {value!r}: must be a number.")
    if not math.isfinite(value) or value <= 0:
        raise SpecError(f"{name} = {value}: must be positive and finite.")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{name} = {value!r}: must be one of {', '.join(map(repr, allowed))}.")
