"""Steps-to-target races and their statistics."""

from specdef_jax.race.control import match_sharpness, scalar_control
from specdef_jax.race.driver import run, run_problems
from specdef_jax.race.grid import log_grid
from specdef_jax.race.optimizers import DEFAULT, FIRST_ORDER, SECOND_ORDER, adam, momentum, sgd
from specdef_jax.race.raveled import raveled
from specdef_jax.race.replay import replay
from specdef_jax.race.result import RaceResult
from specdef_jax.race.runs import Outcome
from specdef_jax.race.sampling import full_batch, minibatches
from specdef_jax.race.statistics import (
    Ratio,
    Survival,
    bootstrap_interval,
    logrank,
    ratio_of_means,
    recovery,
    survival,
)
from specdef_jax.race.switches import Switched

__all__ = [
    "DEFAULT",
    "FIRST_ORDER",
    "SECOND_ORDER",
    "Outcome",
    "RaceResult",
    "Ratio",
    "Survival",
    "Switched",
    "adam",
    "bootstrap_interval",
    "full_batch",
    "log_grid",
    "logrank",
    "match_sharpness",
    "minibatches",
    "momentum",
    "ratio_of_means",
    "raveled",
    "recovery",
    "replay",
    "run",
    "run_problems",
    "scalar_control",
    "sgd",
    "survival",
]
