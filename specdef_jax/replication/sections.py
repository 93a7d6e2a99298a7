"""The sections of a replication: plain JSON values, or the jobs that give them, {what it is of: function}."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from specdef_jax import race, trees
from specdef_jax.attacks import ATTACKS, adapted
from specdef_jax.certification.store import Keep
from specdef_jax.errors import SpecDefError
from specdef_jax.layered import layered
from specdef_jax.parametrization import is_structured, problem
from specdef_jax.race.runs import Factory
from specdef_jax.replication import cells, rows
from specdef_jax.replication.config import Config
from specdef_jax.tasks.experiment import Experiment

ALL = race.FIRST_ORDER | race.SECOND_ORDER
FORMATS = ("float64", "float32", "bfloat16", "float16")
ARMS = ("undefended", "SpecDef")
Jobs = dict[Any, Callable[[], Any]]


def facts(experiment: Experiment) -> dict[str, Any]:
    """Tell what every variant can do before any attack, and show samples of the first network."""
    told = {
        variant: cells.states(experiment, [rows.plain(experiment, variant, i) for i in range(len(networks))])
        for variant, networks in experiment.networks.items()
    }
    samples = {}
    if experiment.samples is not None:
        samples = {variant: experiment.samples(n[0]) for variant, n in experiment.networks.items()}
    return {
        "name": experiment.name,
        "description": experiment.description,
        "parameters": trees.size(experiment.networks["known"][0]),
        "seeds": experiment.seeds,
        "capability": experiment.capability_name,
        "defended": experiment.defended,
        "targets": experiment.targets,
        "variants": told,
        "samples": samples,
    }


def measures(experiment: Experiment, config: Config, keep: Keep) -> Jobs:
    """Return what is told without a race: of the variants, and of the utility."""
    return {
        "task": functools.partial(keep, "task", lambda: facts(experiment)),
        "utility": functools.partial(keep, "utility", lambda: utility(experiment, config)),
    }


def matrix(experiment: Experiment, config: Config, keep: Keep, folder: Path | None) -> Jobs:
    """Return the races of the attack on every defence at every step size."""

    def race_it(one: rows.Row) -> dict[str, Any]:
        with jax.enable_x64(one.wide or jax.config.read("jax_enable_x64")):
            return cells.row(experiment, config, one, folder)

    return {
        one.name: functools.partial(keep, f"row_{i}", functools.partial(race_it, one))
        for i, one in enumerate(rows.rows(experiment, config))
    }


def utility(experiment: Experiment, config: Config) -> list[dict[str, Any]]:
    """Tell what deforming costs the retained domain, alpha by alpha and format by format."""
    params = experiment.networks[experiment.defended][0]
    told = []
    ways = [rows.Way(alpha, wide=True) for alpha in (*config.alphas, *config.wide_alphas)]
    with jax.enable_x64(True):
        before = {name: _retained(experiment, params, name) for name in FORMATS}
        for way in [*ways, rows.Way(config.exact_alpha, basis="axis", wide=True)]:
            tree = rows.released(experiment, config, way, 0)
            for name in FORMATS:
                told.append(
                    {
                        "basis": way.basis,
                        "alpha": way.alpha,
                        "format": name,
                        "before": before[name],
                        "after": _retained(experiment, tree, name),
                    }
                )
    return told


def optimizers(experiment: Experiment, config: Config, keep: Keep, folder: Path | None) -> Jobs:
    """Return the races of (arm, optimizer) on the defended variant, each at its best step size."""
    jobs = {}
    for arm in ARMS:
        made = [problem(experiment.loss, t, *experiment.judged_on) for t in _trees(experiment, config, arm)]
        for name in config.optimizers:
            race_it = functools.partial(cells.fastest, experiment, config, made, {name: ALL[name]}, folder)
            jobs[arm, name] = functools.partial(keep, f"optimizer_{name}_{arm}", race_it)
    return jobs


def adapters(experiment: Experiment, config: Config, keep: Keep, folder: Path | None) -> Jobs:
    """Return the races of LoRA on the undefended variant, on composites and on the factors of pairs."""

    def race_it(arm: str, on: Any, rank: int) -> dict[str, Any]:
        trees_ = _trees(experiment, config, arm)
        made = [adapted(experiment.loss, tree, rank=rank, on=on) for tree in trees_]
        return cells.fastest(experiment, config, made, {"adam": race.FIRST_ORDER["adam"]}, folder)

    return {
        f"{arm}, {on}, rank {rank}": functools.partial(
            keep, f"lora_{arm}_{on}_{rank}", functools.partial(race_it, arm, on, rank)
        )
        for rank in config.ranks
        for arm, on in (("undefended", "composite"), ("SpecDef", "composite"), ("SpecDef", "factors"))
    }


def attacks(experiment: Experiment, config: Config, keep: Keep, folder: Path | None) -> Jobs:
    """Return the races of every attack on SpecDef, with its bill."""
    trees_ = _trees(experiment, config, "SpecDef")

    def race_it(name: str) -> dict[str, Any]:
        try:
            made = [ATTACKS[name](experiment.loss, tree, *experiment.judged_on) for tree in trees_]
            optimizer: Factory = made[0].optimizer(race.FIRST_ORDER["adam"])
            found = cells.fastest(experiment, config, [m.problem for m in made], {"adam": optimizer}, folder)
        except SpecDefError as error:
            return {"bill": None, "refused": str(error)}
        bill = made[0].bill
        return found | {"bill": asdict(bill) | {"knowledge": bill.knowledge.label}}

    return {
        name: functools.partial(keep, f"attack_{name}", functools.partial(race_it, name))
        for name in config.attacks
    }


def _trees(experiment: Experiment, config: Config, arm: str) -> list[PyTree]:
    count = min(config.seeds, experiment.seeds)
    if arm == "undefended":
        return list(experiment.networks[experiment.defended][:count])
    return [rows.released(experiment, config, rows.Way(config.optimizer_alpha), i) for i in range(count)]


def _retained(experiment: Experiment, params: PyTree, name: str) -> float:
    """Return the retained loss with every weight rounded to a format, evaluated as it is released."""
    cast = jax.tree.map(lambda x: jnp.asarray(x, name), params)
    structured = any(map(is_structured, jax.tree.leaves(cast, is_leaf=is_structured)))
    return float((layered(experiment.retained) if structured else experiment.retained)(cast))
