"""Steps-to-target races and their statistics."""

from specdef_jax.race.control import match_sharpness, scalar_control
from specdef_jax.race.driver import run, run_problems
from specdef_jax.race.grid import log_grid
from specdef_jax.race.optimizers import DEFAULT, FIRST_ORDER, SECOND_ORDER, adam, momentum, sgd
from specdef_jax.race.result import RaceResult
from specdef_jax.race.runner import Outcome
from specdef_jax.race.statistics import Ratio, bootstrap_interval, ratio_of_means

__all__ = [
    "DEFAULT",
    "FIRST_ORDER",
    "SECOND_ORDER",
    "Outcome",
    "RaceResult",
    "Ratio",
    "adam",
    "bootstrap_interval",
    "log_grid",
    "match_sharpness",
    "momentum",
    "ratio_of_means",
    "run",
    "run_problems",
    "scalar_control",
    "sgd",
]
