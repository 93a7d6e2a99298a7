"""Every attack on every kind of layer: the same network at first, and what moves when it is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specdef_jax import attacks, trees
from specdef_jax.attacks import ATTACKS
from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import Deformed, is_structured
from tests.attacks.helpers_layers import KINDS

ALPHA = 64.0
IN_PLACE = ("rebalance", "blind", "lora", "lora_factors")  # what can be done without an inserted pair
CASES = [(kind, name) for kind in KINDS for name in ATTACKS]


@functools.cache
def kind_of(name):
    kind = KINDS[name]()
    return kind, kind.deform(ALPHA)


def out_of_scope(kind, name):
    """Say whether an attack refuses a kind of layer."""
    if kind == "gauge":
        return name not in IN_PLACE
    return name == "precondition_kfac" and not kind.startswith("dense")


@functools.cache
def made_by(kind_name, name):
    kind, deformed = kind_of(kind_name)
    more = {"pairs": kind.pairs} if kind.pairs and name in ("rebalance", "blind") else {}
    return ATTACKS[name](kind.loss, deformed, *kind.args, **more)


@functools.cache
def trained(kind_name, name):
    """Return the parameters after five steps of SGD, wrapped as the attack has it."""
    kind, _ = kind_of(kind_name)
    made = made_by(kind_name, name)

    @jax.jit
    def run(task, args):
        optimizer = optax.with_extra_args_support(made.optimizer(optax.sgd)(1e-4))

        def step(carry, _):
            params, state = carry

            def value_fn(p):
                return task.loss(p, *args)

            value, grad = jax.value_and_grad(value_fn)(params)
            updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (task.params, optimizer.init(task.params)), None, length=5)
        return params, task.read_back(params), task.loss(params, *args)

    return run(made.problem, kind.args)


@pytest.mark.parametrize(("kind_name", "name"), [case for case in CASES if out_of_scope(*case)])
def test_what_cannot_be_attacked_so_is_refused_with_a_remedy(kind_name, name):
    with pytest.raises(ProblemError, match=r"rebalance|'diagonal' or 'phi'"):
        made_by(kind_name, name)


@pytest.mark.parametrize(("kind_name", "name"), [case for case in CASES if not out_of_scope(*case)])
def test_every_attack_on_every_layer(kind_name, name):
    kind, deformed = kind_of(kind_name)
    task = made_by(kind_name, name).problem
    start = dict(trees.named_leaves(task.read_back(task.params)))
    before = float(kind.loss(kind.params, *kind.args))
    assert float(task.loss(task.params, *kind.args)) == pytest.approx(before, rel=1e-10)
    # The plain architecture, in structure, shapes, dtypes, and with an inserted pair in values.
    plain = kind.params
    assert jax.tree.structure(task.read_back(task.params)) == jax.tree.structure(plain)
    for leaf, (path, want) in zip(start.values(), trees.named_leaves(plain), strict=True):
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype), path
        if not kind.pairs:
            np.testing.assert_allclose(leaf, want, rtol=0, atol=1e-11, err_msg=path)

    params, back, after = trained(kind_name, name)
    assert float(after) < before
    lora = name.startswith("lora")
    if lora:
        # A moves from the second step on; B at once.
        attacks.moved(task, params)
    moved = {path: float(jnp.abs(x - start[path]).max()) for path, x in trees.named_leaves(back)}
    stay = {path for path, by in moved.items() if by == 0}
    biases = {path for path in moved if path.endswith("/b")}
    # A bias of keys shifts all scores alike: its gradient is rounding.
    assert stay - {"k/b"} == (biases - {"k/b"} if lora else set())
    assert moved[kind.where] > 0
    trainable = {path: x.shape for path, x in trees.named_leaves(task.params)}
    assert trainable == expected(kind, deformed, name)


def expected(kind, deformed, name):
    """Return the shapes that an attack trains, by hand."""
    named = dict(trees.named_leaves(deformed, is_leaf=is_structured))
    shapes = {path: x.shape for path, x in named.items() if not is_structured(x)}
    if name.startswith("lora"):
        shapes = {p: s for p, s in shapes.items() if not p.endswith("/b")}
        adapted = {f"{p}/{part}": size for p, s in shapes.items() for part, size in adapter(s).items()}
        pair = named[kind.where]
        if not isinstance(pair, Deformed):
            return adapted
        kernel, comp = stacked(pair, pair.weight.shape), adapter(pair.comp.shape)
        places = {"": kernel} if name == "lora" else {"weight/": kernel, "comp/": comp}
        return adapted | {
            f"{kind.where}/{place}{part}": size
            for place, sizes in places.items()
            for part, size in sizes.items()
        }
    pair = named[kind.where]
    if not isinstance(pair, Deformed):
        return shapes
    factors = {"weight": pair.weight.shape, "comp": pair.comp.shape}
    if name in ("two_steps", "rebalance", "blind") or name.startswith("precondition"):
        return shapes | {f"{kind.where}/{part}": s for part, s in factors.items()}
    if name == "identity":
        stack = tuple(pair.weight.shape[i] for i in pair.axes.stack)
        m = pair.axes.dim(pair.weight.shape, "output")
        return shapes | {kind.where: (*stack, m, m)}
    if name.startswith("svd_chain"):
        *stack, rest, d = pair.axes.to_matrix(pair.weight, pair.side).shape
        r, p = min(rest, d), int(name[-1])
        sizes = [(*stack, rest, r), *[(*stack, r, r)] * (p - 2), (*stack, r, d)]
        return shapes | {f"{kind.where}/{i}": s for i, s in enumerate(sizes)}
    return shapes | {kind.where: pair.weight.shape}  # fuse, freeze, inject


def adapter(shape, rank=4):
    """Return the shapes of an adapter beside a matrix, a stack (experts, in, out) or an HWIO kernel."""
    stack, rest = (shape[:1], shape[1]) if len(shape) == 3 else ((), int(np.prod(shape[:-1])))
    return {"down": (*stack, rest, rank), "up": (*stack, rank, shape[-1])}


def stacked(pair, shape):
    """Return the shapes of an adapter beside a deformed kernel."""
    moved = tuple(shape[i] for i in pair.axes.stack + pair.axes.window + pair.axes.inputs + pair.axes.outputs)
    return adapter(moved)


@dataclasses.dataclass(frozen=True)
class Doubled:
    """Another defence's weight: a plain array, halved."""

    half: jax.Array

    def materialize(self):
        return 2 * self.half


jax.tree_util.register_dataclass(Doubled, ["half"], [])


@pytest.mark.parametrize("name", list(ATTACKS))
def test_what_another_defence_structured_is_trained_as_it_is_and_read_back_plain(name):
    kind, deformed = kind_of("dense")
    mixed = {**deformed, "layer_0": {**deformed["layer_0"], "w": Doubled(kind.params["layer_0"]["w"] / 2)}}
    task = ATTACKS[name](kind.loss, mixed, *kind.args).problem
    back = task.read_back(task.params)
    assert jax.tree.structure(back) == jax.tree.structure(kind.params)
    np.testing.assert_allclose(back["layer_0"]["w"], kind.params["layer_0"]["w"], atol=1e-12)
    np.testing.assert_allclose(
        task.loss(task.params, *kind.args), kind.loss(kind.params, *kind.args), rtol=1e-10
    )


def test_the_registry_names_attacks_that_differ():
    """No two entries leave the same network after five steps, but reset coordinates and exact undoing."""
    ends = {name: trained("dense", name)[1] for name in ATTACKS}
    flat = {name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(end)]) for name, end in ends.items()}
    names = list(flat)
    same = {
        (a, b) for i, a in enumerate(names) for b in names[i + 1 :] if np.abs(flat[a] - flat[b]).max() < 1e-12
    }
    assert same == {
        ("fuse", "inject"),  # 5.3
        ("rebalance", "blind"),  # it was seen
        ("precondition", "precondition_phi"),  # of gradient descent
    }
