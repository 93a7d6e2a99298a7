"""Convergence-rate control of open-weight models: deform, certify, race and undo, in JAX.

    import specdef_jax as sd

The public names are listed in __all__; the rooms sd.bounds, sd.curvature, sd.race, sd.attacks, sd.models and
sd.hub hold the rest. sd.certify and sd.load_results need the extra `cli`.
"""

from specdef_jax import attacks, bounds, curvature, hub, models, race, select, tasks
from specdef_jax.activations import activations
from specdef_jax.certification import Certification, certify, load_results
from specdef_jax.errors import (
    BudgetError,
    ConfigError,
    FileError,
    LayeredUnsupported,
    LeafError,
    MissingExtra,
    ProblemError,
    SelectionError,
    SpecDefError,
    SpecError,
    StructureError,
)
from specdef_jax.gauge import GaugePair, deform_pair
from specdef_jax.layered import layered
from specdef_jax.parametrization import Deformed, KernelAxes, Problem, merge
from specdef_jax.precision import alpha_max
from specdef_jax.preservation import PreservationCertificate, bit_identical, preservation
from specdef_jax.resistant import resistant_directions
from specdef_jax.spec import Layer, Plan, SpecDef
from specdef_jax.specdef import apply_plan, deform, plan
from specdef_jax.words import Word

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Certification",
    "ConfigError",
    "Deformed",
    "FileError",
    "GaugePair",
    "KernelAxes",
    "Layer",
    "LayeredUnsupported",
    "LeafError",
    "MissingExtra",
    "Plan",
    "PreservationCertificate",
    "Problem",
    "ProblemError",
    "SelectionError",
    "SpecDef",
    "SpecDefError",
    "SpecError",
    "StructureError",
    "Word",
    "activations",
    "alpha_max",
    "apply_plan",
    "attacks",
    "bit_identical",
    "bounds",
    "certify",
    "curvature",
    "deform",
    "deform_pair",
    "hub",
    "layered",
    "load_results",
    "merge",
    "models",
    "plan",
    "preservation",
    "race",
    "resistant_directions",
    "select",
    "tasks",
]
