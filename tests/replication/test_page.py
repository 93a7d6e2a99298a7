"""The verdicts of docs/replication.md follow the numbers, in both directions."""

import copy
import math

import pytest

from benchmarks import _replication_page as page

NAN = math.nan


def networks(*steps, capability=0.8):
    return [{"steps": s, "capability": capability, "retained": 0.0, "peak": 1.0} for s in steps]


def row(*steps, **more):
    return {"start": [], "refused": "", "cells": [{"step_size": 1e-3, "networks": networks(*steps, **more)}]}


def raced(*steps):
    return {"adam": {"steps": list(steps), "at_edge": False}, "refused": ""}


RESULTS = {
    "config": {"steps": 100, "step_sizes": [1e-3], "ranks": [4], "alphas": [1e2, 1e4]},
    "task": {
        "defended": "npo",
        "variants": {"known": [{"capability": 0.9}], "ignorant": [{"capability": 0.1}]},
    },
    "matrix": {
        "never learned": row(10.0, 12.0),
        "NPO": row(20.0, 22.0),
        "one entry rescaled": row(30.0, 30.0),
        "SpecDef 100, top": row(60.0, 70.0),
        "SpecDef 100, resistant": row(10.0, 12.0),
        "SpecDef 100, axis": row(NAN, 30.0),
        "SpecDef 10000, top": row(NAN, NAN),
    },
    "utility": [{"basis": "symmetric", "alpha": 100.0, "format": "float32", "before": 1.0, "after": 1.0001}],
    "optimizers": {"undefended": {"adam": raced(20.0, 22.0)}, "SpecDef": {"adam": raced(80.0, 90.0)}},
    "lora": {
        "undefended, composite, rank 4": raced(20.0, 21.0),
        "SpecDef, composite, rank 4": raced(20.0, 21.0),
        "SpecDef, factors, rank 4": raced(40.0, 44.0),
    },
    "attacks": [
        {"attack": name, "bill": {"added_share": 0.5}} | raced(20.0, 22.0) for name in ("inject", "fuse")
    ],
}
VERDICTS = {claim.judge.__name__.lstrip("_"): claim.judge for claim in page.CLAIMS}


def changed(path, value):
    found = copy.deepcopy(RESULTS)
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return found


@pytest.mark.parametrize("name", VERDICTS)
def test_the_claims_hold_where_the_numbers_say_so(name):
    assert VERDICTS[name](RESULTS)[0] == page.AGREES


@pytest.mark.parametrize(
    ("name", "path", "value", "verdict"),
    [
        ("learnable", ("matrix", "never learned"), row(10.0, 12.0, capability=0.2), page.DISAGREES),
        ("learnable", ("task", "variants", "known"), [{"capability": 0.1}], page.UNCLEAR),
        ("unlearning", ("matrix", "NPO"), row(NAN, NAN), page.DISAGREES),
        ("blocked", ("matrix", "SpecDef 10000, top"), row(50.0, 60.0), page.DISAGREES),
        ("beats_the_control", ("matrix", "SpecDef 100, top"), row(31.0, 29.0), page.DISAGREES),
        ("beats_the_control", ("matrix", "one entry rescaled"), row(NAN, NAN), page.DISAGREES),
        ("utility", ("utility", 0, "after"), 2.0, page.DISAGREES),
        ("optimizers", ("optimizers", "SpecDef", "adam"), raced(20.0, 22.0), page.DISAGREES),
        ("optimizers", ("optimizers", "SpecDef", "adam"), raced(NAN, NAN), page.AGREES),
        ("lora", ("lora", "SpecDef, factors, rank 4"), raced(20.0, 21.0), page.DISAGREES),
        ("lora", ("lora", "undefended, composite, rank 4"), raced(NAN, NAN), page.UNCLEAR),
        ("lora", ("lora", "undefended, composite, rank 4"), raced(20.0, NAN), page.UNCLEAR),
        ("optimizers", ("optimizers", "undefended", "adam"), raced(20.0, NAN), page.UNCLEAR),
        ("injection", ("optimizers", "undefended", "adam"), raced(NAN, NAN), page.UNCLEAR),
        ("fused", ("optimizers", "undefended", "adam"), raced(20.0, NAN), page.AGREES),
        ("helped", ("matrix", "SpecDef 100, resistant"), row(10.0, 21.0), page.DISAGREES),
        ("helped", ("matrix", "SpecDef 100, resistant"), row(10.0, NAN), page.DISAGREES),
        ("seeds", ("matrix", "SpecDef 100, axis"), row(NAN, NAN), page.DISAGREES),
        ("injection", ("attacks", 0), RESULTS["attacks"][0] | raced(50.0, 60.0), page.DISAGREES),
        ("fused", ("attacks", 1), {"attack": "fuse", "refused": "no"}, page.UNCLEAR),
    ],
)
def test_and_do_not_where_they_do_not(name, path, value, verdict):
    assert VERDICTS[name](changed(path, value))[0] == verdict
