"""Names of checkpoints: globs with dots or slashes, and the layout that a name stands for."""

import jax
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax import hub
from specdef_jax.parametrization import KernelAxes
from specdef_jax.select import Candidate

NAMES = [
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.up_proj.bias",
    "model.layers.11.mlp.up_proj.weight",
    "model.embed_tokens.weight",
    "time_embedding.net.linear_1.weight",
]


def chosen(globs: list[str], names: list[str] = NAMES) -> list[str]:
    candidates = [Candidate(n, (3, 2), np.dtype(np.float32)) for n in names]
    return [c.name for c in hub.selector(globs).choose(candidates, jax.random.key(0))]


@pytest.mark.parametrize("sign", [".", "/"])
def test_dots_and_slashes_are_the_same(sign: str):
    names = [name.replace(".", sign) for name in NAMES]
    for glob in ("layers.*.mlp.up_proj.weight", "layers/*/mlp/up_proj/weight", "**.up_proj.weight"):
        assert chosen([glob], names) == [names[0], names[2]]
    assert chosen(["layers.?.mlp.*.weight"], names) == [names[0]]
    assert chosen(["*.weight"], names) == [names[i] for i in (0, 2, 3, 4)]
    assert chosen(["up_proj"], names) == []


def test_embeddings_are_told_by_component():
    assert "model.embed_tokens.weight" not in chosen([])
    assert "time_embedding.net.linear_1.weight" in chosen([])


def test_the_optimizers_copies_are_left_alone():
    names = ["params/dense/kernel", "opt_state/0/mu/params/dense/kernel"]
    assert chosen(["dense/kernel"], names) == names[:1]
    assert chosen([], names) == names[:1]


def test_layouts():
    params = {"a.weight": np.ones((3, 2)), "a.kernel": np.ones((3, 2)), "c.weight": np.ones((4, 3, 1, 1))}
    hf, conv = KernelAxes((1,), (0,)), KernelAxes((1,), (0,), (2, 3))
    assert hub.axes_for(params) == {"a.weight": hf, "c.weight": conv}
    assert hub.axes_for(params, "jax") == {}
    assert hub.axes_for(params, "hf") == {"a.weight": hf, "a.kernel": hf, "c.weight": conv}


def test_one_name_that_ends_another_does_not_lend_its_axes():
    """sd.plan reads the keys as globs, with a leading **/ implied."""
    params = {
        "weight": np.ones((5, 3, 1, 1)),
        "x/weight": np.ones((4, 3)),
        "odd[0]*/weight": np.ones((4, 2)),
    }
    plan = sd.plan(params, sd.SpecDef(2.0), where="**", key=jax.random.key(0), axes=hub.axes_for(params))
    assert {name: len(layer.axes.window) for name, layer in plan.items()} == {
        "weight": 2,
        "x/weight": 0,
        "odd[0]*/weight": 0,
    }
    assert all(layer.axes.outputs == (0,) for _, layer in plan.items())
