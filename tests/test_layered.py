"""layered against the merged network: values, gradients, order of the products, refusals."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from specdef_jax.errors import LayeredUnsupported
from specdef_jax.jaxprs import scan_operands
from specdef_jax.layered import layered
from specdef_jax.parametrization import Deformed, KernelAxes, is_structured, merge
from specdef_jax.trees import map_named, named_leaves

# Most of the time here would go into optimizing programs that run once.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

IN_OUT = KernelAxes((0,), (1,))
STACKED = KernelAxes((1,), (2,), stack=(0,))
HWIO = KernelAxes((2,), (3,), window=(0, 1))
IN_HEADS = KernelAxes((0,), (1, 2))
HEADS_OUT = KernelAxes((0, 1), (2,))


def normal(seed, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def deform(kernel, axes, side, alpha=16.0, seed=0, k=2):
    """A pair with a comp that is not symmetric: T(a) = I + (a - 1) U U^T, then an orthogonal mix Q."""
    d = axes.dim(kernel.shape, side)
    stack = tuple(kernel.shape[i] for i in axes.stack)
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((*stack, d, min(k, d))))[0]
    q = np.linalg.qr(rng.standard_normal((*stack, d, d)))[0]
    project = u @ np.swapaxes(u, -1, -2)
    other = axes.window + (axes.inputs if side == "output" else axes.outputs)
    order = axes.stack + other + axes.features(side)
    ordered = np.asarray(kernel, np.float64).transpose(order)
    weight = ordered.reshape(*stack, -1, d) @ (np.eye(d) + (alpha - 1) * project) @ q
    comp = np.swapaxes(q, -1, -2) @ (np.eye(d) + (1 / alpha - 1) * project)
    comp = comp if side == "output" else np.swapaxes(comp, -1, -2)
    weight = weight.reshape(ordered.shape).transpose(np.argsort(order))
    return Deformed(jnp.asarray(weight, kernel.dtype), jnp.asarray(comp, kernel.dtype), side, axes)


def deform_tree(params, axes, side, alpha=16.0):
    """Deform the leaves named in `axes`; the names must all exist."""
    assert set(axes) <= {name for name, _ in named_leaves(params)}
    seeds = itertools.count(100, 2)
    return map_named(
        lambda name, leaf: deform(leaf, axes[name], side, alpha, next(seeds)) if name in axes else leaf,
        params,
    )


# Which inputs does an intermediate depend on? A value that depends on both factors of a pair and on no
# data is a kernel that was multiplied out.

Origins = frozenset


def sub_programs(eqn, ins):
    """Yield (jaxpr, origins of its inputs) for the programs that run once each inside an equation."""
    name, params = eqn.primitive.name, eqn.params
    if name in ("jit", "pjit"):
        yield params["jaxpr"].jaxpr, ins
    elif name in ("remat2", "checkpoint"):
        yield params["jaxpr"], ins
    elif name in ("custom_jvp_call", "custom_vjp_call", "closed_call"):
        yield params["call_jaxpr"].jaxpr, ins
    elif name == "cond":
        for branch in params["branches"]:
            yield branch.jaxpr, [x | ins[0] for x in ins[1:]]


def loop_programs(eqn, ins):
    """Return the body of a loop and the origins of its consts, carry and slices."""
    params = eqn.params
    if eqn.primitive.name == "scan":
        n, carried = scan_operands(params)
        m = n + carried
        return params["jaxpr"].jaxpr, ins[:n], ins[n:m], ins[m:]
    if eqn.primitive.name == "while":
        a, b = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        return params["body_jaxpr"].jaxpr, ins[a:b], ins[b:], []
    return None


def trace_origins(jaxpr, ins, found):
    env = dict(zip(jaxpr.invars, ins, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [env.get(v, Origins()) if not hasattr(v, "val") else Origins() for v in eqn.invars]
        subs, loop = list(sub_programs(eqn, inputs)), loop_programs(eqn, inputs)
        if subs:
            results = [trace_origins(sub, sub_ins, found) for sub, sub_ins in subs]
            outs = [Origins().union(*each) for each in zip(*results, strict=True)]
        elif loop:
            body, consts, carry, xs = loop
            for _ in range(len(carry) + 1):
                outs = trace_origins(body, [*consts, *carry, *xs], [])
                carry = [a | b for a, b in zip(carry, outs, strict=False)]
            outs = trace_origins(body, [*consts, *carry, *xs], found)
        elif eqn.primitive.name == "optimization_barrier":
            outs = inputs
        else:
            union = Origins().union(*inputs)
            leaves = {origin[:-1] for origin in union}
            if "data" not in {o[0] for o in union} and any(
                {(*leaf, "weight"), (*leaf, "comp")} <= union for leaf in leaves
            ):
                found.append(eqn.primitive.name)
            outs = [union] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [env.get(v, Origins()) if not hasattr(v, "val") else Origins() for v in jaxpr.outvars]


def multiplied_out(fn, *args):
    """Return the primitives by which `fn` forms a value from both factors of a pair and nothing else."""
    origins = []
    for name, leaf in named_leaves(args, is_leaf=is_structured):
        if isinstance(leaf, Deformed):
            origins += [Origins({("leaf", name, "weight")}), Origins({("leaf", name, "comp")})]
        elif isinstance(leaf, jax.Array):
            origins += [Origins({("data", name)})]
    leaves, treedef = jax.tree.flatten(args)
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def flat(*values):
        filled = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        return jax.tree.leaves(fn(*treedef.unflatten(filled)))

    found: list[str] = []
    trace_origins(jax.make_jaxpr(flat)(*(leaves[i] for i in arrays)).jaxpr, origins, found)
    return found


# The networks


@dataclass(frozen=True)
class Case:
    """A network on plain arrays: apply(params, x), and the axes of the kernels to deform."""

    apply: Callable[..., Any]
    params: Any
    axes: dict[str, KernelAxes]
    x: jax.Array
    sides: tuple[str, ...] = ("output", "input")
    reverse_mode: bool = True


CASES: dict[str, Callable[[], Case]] = {}


def case(name):
    def register(build):
        CASES[name] = build
        return build

    return register


def on_kernel(name, apply, kernel_shape, x_shape, axes=IN_OUT, **options):
    """Register apply(w, b, x) on one kernel w; the bias keeps the place of the compensation visible."""
    CASES[name] = lambda: Case(
        lambda p, x: apply(p["w"], p["b"], x),
        {"w": normal(1, *kernel_shape), "b": normal(2, kernel_shape[-1])},
        {"w": axes},
        normal(3, *x_shape),
        **options,
    )


@jax.custom_vjp
def swish(x):
    return x * jax.nn.sigmoid(x)


swish.defvjp(lambda x: (swish(x), x), lambda x, g: (2.0 * g * x,))  # a rule of its own, to be told apart

on_kernel("matmul", lambda w, b, x: x @ w + b, (3, 5), (4, 3))
on_kernel("vector", lambda w, b, x: x @ w + b, (3, 5), (3,))
on_kernel("matmul from the left", lambda w, b, h: w.T @ h + b[:, None], (3, 5), (3, 4))
for spec, xs in {
    "bi,io->bo": (4, 3),
    "io,bi->bo": (4, 3),
    "bi,io->ob": (4, 3),
    "io,ib->ob": (3, 4),
    "bti,io->tbo": (2, 4, 3),
    "io,bti->otb": (2, 4, 3),
}.items():
    kernel_first = spec.startswith("io")
    on_kernel(
        f"einsum {spec}",
        lambda w, b, x, spec=spec, first=kernel_first: (
            jnp.einsum(spec, *((w, x) if first else (x, w))) * b[0]
        ),
        (3, 5),
        xs,
    )
on_kernel("sum of outputs", lambda w, b, x: jnp.tanh(x) @ jnp.swapaxes(w, 0, 1) + b[0], (3, 5), (4, 5))
on_kernel("reshape heads to one", lambda w, b, x: x @ w.reshape(3, 8), (3, 2, 4), (5, 3), IN_HEADS)
on_kernel(
    "transpose heads, reshape",
    lambda w, b, x: x @ w.transpose(0, 2, 1).reshape(3, 8),
    (3, 2, 4),
    (5, 3),
    IN_HEADS,
)
on_kernel("split to heads", lambda w, b, x: jnp.einsum("bi,ihd->hbd", x, w.reshape(3, 2, 4)), (3, 8), (5, 3))
on_kernel(
    "heads to out", lambda w, b, x: jnp.einsum("bhd,hdo->bo", x, w) + b, (2, 4, 3), (5, 2, 4), HEADS_OUT
)
on_kernel("added axis", lambda w, b, x: (x @ w[None, :, None, :][0].squeeze(1)) + b, (3, 5), (4, 3))
on_kernel("copies of a kernel", lambda w, b, x: x @ jnp.broadcast_to(w, (2, 3, 5)) + b, (3, 5), (2, 4, 3))
on_kernel("copy", lambda w, b, x: x @ jnp.array(w, copy=True) + b, (3, 5), (4, 3))
on_kernel("checkpoint_name", lambda w, b, x: x @ checkpoint_name(w, "w") + b, (3, 5), (4, 3))
on_kernel("stop_gradient", lambda w, b, x: x @ (lax.stop_gradient(w)) + b, (3, 5), (4, 3))
on_kernel("rows", lambda w, b, x: x @ w[1:3] + b, (4, 5), (6, 2), sides=("output",))
on_kernel(
    "columns", lambda w, b, x: x @ lax.slice(w, (0, 0), (4, 5), (1, 2)), (4, 5), (6, 4), sides=("input",)
)
on_kernel("flipped rows", lambda w, b, x: x @ jnp.flip(w, 0) + b, (4, 5), (6, 4), sides=("output",))

on_kernel("relu", lambda w, b, x: jax.nn.relu(x @ w + b) @ w.T, (3, 5), (4, 3))
on_kernel("gelu", lambda w, b, x: jax.nn.gelu(x @ w + b) @ w.T, (3, 5), (4, 3))
on_kernel("custom_vjp", lambda w, b, x: swish(x @ w + b) @ w.T, (3, 5), (4, 3))
on_kernel("jit inside", lambda w, b, x: jax.jit(lambda v, x: jnp.sin(x @ v.T))(w, x @ w + b), (3, 5), (4, 3))
on_kernel("jit that gives the kernel", lambda w, b, x: x @ jax.jit(lambda v: v.T)(w).T + b, (3, 5), (4, 3))
on_kernel("checkpoint", jax.checkpoint(lambda w, b, x: jnp.sin(x @ w + b) @ w.T), (3, 5), (4, 3))
on_kernel(
    "checkpoint with a policy",
    jax.checkpoint(
        lambda w, b, x: jnp.sin(x @ w + b) @ w.T,
        policy=jax.checkpoint_policies.dots_saveable,
        prevent_cse=False,
    ),
    (3, 5),
    (4, 3),
)
on_kernel("grad inside", lambda w, b, x: jax.grad(lambda x: jnp.sum((x @ w + b) ** 3))(x), (3, 5), (4, 3))
on_kernel(
    "grad of checkpoint inside",
    lambda w, b, x: jax.grad(
        lambda x: jnp.sum(jax.checkpoint(lambda w, x: jnp.sin(x @ w + b) @ w.T)(w, x) ** 2)
    )(x),
    (3, 5),
    (4, 3),
)
on_kernel("grad by the kernel", lambda w, b, x: jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w), (3, 5), (4, 3))
on_kernel("vmap inside", lambda w, b, x: jax.vmap(lambda h: jnp.sin(h @ w + b))(x), (3, 5), (4, 3))
on_kernel(
    "cond",
    lambda w, b, x: lax.cond(x[0, 0] > 0, lambda w: x @ w + b, lambda w: 2 * x @ w, w),
    (3, 5),
    (4, 3),
)
on_kernel(
    "switch",
    lambda w, b, x: lax.switch(jnp.argmax(x[0]), [lambda v, s=s: s * x @ v + b for s in (1.0, 2.0, 3.0)], w),
    (3, 5),
    (4, 3),
)
on_kernel(
    "while",
    lambda w, b, x: lax.while_loop(
        lambda c: (c[0] < 3) & (jnp.sum(c[1] @ w) < 1e9),
        lambda c: (c[0] + 1, jnp.sin(c[1] @ w + b)),
        (0, x),
    )[1],
    (5, 5),
    (4, 5),
    reverse_mode=False,
)
on_kernel(
    "fori_loop",
    lambda w, b, x: lax.fori_loop(0, 3, lambda i, h: jnp.sin(h @ w + b), x),
    (5, 5),
    (4, 5),
)
on_kernel(
    "scan over time",
    lambda w, b, x: lax.scan(lambda h, v: (jnp.tanh(h @ w + v),) * 2, b, x, reverse=True)[1],
    (5, 5),
    (4, 5),
)
on_kernel(
    "scan over layers",
    lambda w, b, x: lax.scan(lambda h, v: (jnp.tanh(h @ v) + b, jnp.sum(h)), x, w),
    (3, 5, 5),
    (4, 5),
    STACKED,
)
on_kernel(
    "scan over layers kept last",
    lambda w, b, x: lax.scan(lambda h, v: (jnp.tanh(h @ v), None), x, jnp.moveaxis(w, 2, 0))[0],
    (5, 5, 3),
    (4, 5),
    KernelAxes((0,), (1,), stack=(2,)),
)
on_kernel(
    "scan over two stacks",
    lambda w, b, x: lax.scan(
        lambda h, v: (lax.scan(lambda h, u: (jnp.tanh(h @ u), None), h, v)[0], None), x, w.swapaxes(0, 1)
    )[0],
    (2, 3, 5, 5),
    (4, 5),
    KernelAxes((2,), (3,), stack=(0, 1)),
)
on_kernel("vmap over layers", lambda w, b, x: jax.vmap(lambda v: x @ v + b)(w), (3, 4, 5), (6, 4), STACKED)
on_kernel(
    "vmap over layers, from the left",
    lambda w, b, x: jax.vmap(lambda v: v.T @ x, out_axes=1)(w),
    (3, 4, 5),
    (4, 6),
    STACKED,
)
on_kernel("vmap over experts", lambda w, b, x: jax.vmap(jnp.matmul)(x, w) + b, (3, 4, 5), (3, 6, 4), STACKED)
on_kernel(
    "two stacks, one shared",
    lambda w, b, x: jnp.einsum("ebi,leio->belo", x, w),
    (2, 3, 4, 5),
    (3, 6, 4),
    KernelAxes((2,), (3,), stack=(0, 1)),
)
on_kernel("index of a layer", lambda w, b, x: jnp.tanh(x @ w[0]) @ w[2] + b, (3, 5, 5), (4, 5), STACKED)
on_kernel(
    "traced index of a layer",
    lambda w, b, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[i]) + b, x),
    (3, 5, 5),
    (4, 5),
    STACKED,
)
on_kernel(
    "sum over experts",
    lambda w, b, x: jnp.einsum("ebi,eio->bo", x, w) + b,
    (3, 4, 5),
    (3, 6, 4),
    STACKED,
    sides=("input",),
)


def plain_conv(w, b, x, **options):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, dimension_numbers=dims, **({"padding": "SAME", "window_strides": (1, 1)} | options)
    )


on_kernel("conv", lambda w, b, x: plain_conv(w, b, x) + b, (3, 2, 4, 5), (2, 6, 7, 4), HWIO)
on_kernel(
    "conv, channels first",
    lambda w, b, x: lax.conv_general_dilated(
        x, w.transpose(3, 2, 0, 1), (2, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NHWC")
    ),
    (3, 2, 4, 5),
    (2, 4, 6, 7),
    HWIO,
)
on_kernel(
    "grad of conv inside",
    lambda w, b, x: jax.grad(lambda x: jnp.sum((plain_conv(w, b, x, window_strides=(2, 1)) + b) ** 3))(x),
    (3, 2, 4, 5),
    (2, 6, 7, 4),
    HWIO,
)
on_kernel(
    "conv in groups",
    lambda w, b, x: plain_conv(w, b, x, feature_group_count=3) + b,
    (3, 2, 4, 6),
    (2, 5, 5, 12),
    HWIO,
    sides=("input",),
)


def linen_params(module, x):
    """Random parameters without running the initializers, which would compile one by one."""
    seeds = itertools.count(10)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda s: normal(next(seeds), *s.shape, dtype=s.dtype) / 2, shapes)


def linen(name, build, x_shape, axes, **options):
    @case(name)
    def _():
        x = normal(3, *x_shape)
        module = build()
        return Case(module.apply, linen_params(module, x), axes, x, **options)


F64 = {"param_dtype": jnp.float64}
linen(
    "nn.Conv",
    lambda: nn.Conv(5, (3, 3), strides=(2, 1), padding=((1, 0), (2, 1)), kernel_dilation=(1, 2), **F64),
    (2, 7, 6, 4),
    {"params/kernel": HWIO},
)
linen(
    "nn.Conv in groups",
    lambda: nn.Conv(6, (3, 3), feature_group_count=2, **F64),
    (2, 5, 5, 4),
    {"params/kernel": HWIO},
    sides=("input",),
)
linen(
    "nn.ConvTranspose",
    lambda: nn.ConvTranspose(5, (3, 3), strides=(2, 2), **F64),
    (2, 4, 4, 3),
    {"params/kernel": HWIO},
)
linen(
    "nn.Dense",
    lambda: nn.Dense(5, bias_init=nn.initializers.normal(), **F64),
    (4, 3),
    {"params/kernel": IN_OUT},
)
linen(
    "nn.DenseGeneral",
    lambda: nn.DenseGeneral((2, 5), axis=(-2, -1), **F64),
    (4, 3, 2),
    {"params/kernel": KernelAxes((0, 1), (2, 3))},
)
linen(
    "attention",
    lambda: nn.MultiHeadDotProductAttention(2, deterministic=True, **F64),
    (2, 3, 4),
    {f"params/{n}/kernel": IN_HEADS for n in ("query", "key", "value")} | {"params/out/kernel": HEADS_OUT},
)


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _=None):
        return jnp.tanh(nn.Dense(h.shape[-1], **F64)(h)) + h, None


class Layers(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2, **F64)(stack(name="stack")(x, None)[0])


LAYERS = {"params/stack/Dense_0/kernel": STACKED, "params/Dense_0/kernel": IN_OUT}
linen("nn.scan", Layers, (4, 5), LAYERS)
linen("nn.scan of nn.remat", lambda: Layers(remat=True), (4, 5), LAYERS)


class Rematted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)(name="block")(x)[0]


linen("nn.remat", Rematted, (4, 5), {"params/block/Dense_0/kernel": IN_OUT})
linen(
    "nn.vmap",
    lambda: nn.vmap(
        nn.Dense, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3
    )(5, **F64),
    (4, 2),
    {"params/kernel": STACKED},
)


@case("nnx")
def _():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 6, rngs=rngs, **F64)
            self.b = nnx.Linear(6, 4, rngs=rngs, **F64)

        def __call__(self, x):
            return self.b(nnx.gelu(self.a(x)))

    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    apply = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    return Case(apply, state, {"a/kernel": IN_OUT, "b/kernel": IN_OUT}, normal(3, 5, 3))


@case("equinox")
def _():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 4, 6, 1, dtype=jnp.float64, key=jax.random.key(0))
    axes = {f"layers/{i}/weight": KernelAxes((1,), (0,)) for i in range(2)}
    return Case(lambda model, x: jax.vmap(model)(x), model, axes, normal(3, 5, 3))


@case("sharding inside")
def _():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("d"))

    def apply(p, x):
        w = lax.with_sharding_constraint(p["w"], rows)
        return jax.jit(lambda w, x: jnp.sin(x @ w), in_shardings=rows, out_shardings=rows)(w, x)

    return Case(apply, {"w": normal(1, 3, 5)}, {"w": IN_OUT}, normal(3, 4, 3))


# Conformance


@functools.cache
def built(name):
    return CASES[name]()


def assert_close(found, expected, rtol=1e-12):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.max(np.abs(b)), 1.0)),
        found,
        expected,
    )


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_layered_is_the_merged_network(name, side):
    c = built(name)
    if side not in c.sides:
        with pytest.raises(LayeredUnsupported):
            layered(c.apply)(deform_tree(c.params, c.axes, side), c.x)
        return
    deformed = deform_tree(c.params, c.axes, side)
    assert jax.tree.structure(merge(deformed)) == jax.tree.structure(c.params)
    arrays, static = _split(deformed)

    def values_and_grads(fn, arrays, x):
        def run(arrays, x):
            return fn(_join(arrays, static), x)

        if not c.reverse_mode:
            return jax.jvp(run, (arrays, x), jax.tree.map(jnp.ones_like, (arrays, x)))
        out, pull = jax.vjp(run, arrays, x)
        leaves, treedef = jax.tree.flatten(out)
        return out, pull(treedef.unflatten([normal(7, *leaf.shape) for leaf in leaves]))

    @quick_jit
    def both(arrays, x):
        through_merge = lambda p, x: c.apply(merge(p), x)  # noqa: E731
        return values_and_grads(layered(c.apply), arrays, x), values_and_grads(through_merge, arrays, x)

    found, expected = both(arrays, c.x)
    assert_close(found, expected)
    assert multiplied_out(layered(c.apply), deformed, c.x) == []
    assert multiplied_out(lambda p, x: c.apply(merge(p), x), deformed, c.x)  # the check can fail


def _split(tree):
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return arrays, (treedef, [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves])


def _join(arrays, static):
    treedef, leaves = static
    arrays = iter(arrays)
    return treedef.unflatten([next(arrays) if leaf is None else leaf for leaf in leaves])


OUTSIDE = {
    "vmap over the data": lambda f: jax.vmap(f, (None, 0)),
    "vmap over the factors": lambda f: (
        lambda p, x: jax.vmap(f, (0, None))(jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), p), x)
    ),
    "checkpoint": lambda f: jax.grad(lambda p, x: jnp.sum(jax.checkpoint(f)(p, x) ** 2)),
    "scan": lambda f: lambda p, xs: lax.scan(lambda c, x: (c, f(p, x)), 0, xs)[1],
    "second derivative": lambda f: (
        lambda p, x: jax.jvp(jax.grad(lambda p: jnp.sum(f(p, x) ** 2)), (p,), (p,))
    ),
    "no jit": lambda f: jax.disable_jit()(f),
    "shapes only": lambda f: (
        lambda p, x: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, p, x))
    ),
}


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_layered_under_a_transformation(name):
    c, transform = built("gelu"), OUTSIDE[name]
    deformed = deform_tree(c.params, c.axes, "output")
    both = lambda p, x: (  # noqa: E731
        transform(layered(c.apply))(p, x),
        transform(lambda p, x: c.apply(merge(p), x))(p, x),
    )
    assert_close(*(both if name == "no jit" else quick_jit(both))(deformed, c.x))


def test_arguments_and_outputs_that_are_not_arrays_stay_as_they_are():
    def apply(act, p, x, *, scale, mode, none):
        assert isinstance(scale, float)
        assert mode == "train"
        assert none is None
        return {
            "y": act(scale * x @ p["w"]),
            "mode": mode,
            "count": 3,
            "const": jnp.float32(2),
            "np": np.ones(2),
        }

    c = built("matmul")
    deformed = deform_tree(c.params, c.axes, "input")
    out = layered(apply)(jax.nn.relu, p=deformed, x=np.asarray(c.x), scale=2.0, mode="train", none=None)
    expected = apply(jax.nn.relu, merge(deformed), c.x, scale=2.0, mode="train", none=None)
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    assert out["mode"] == "train"
    assert out["count"] == 3
    assert type(out["count"]) is int
    assert out["const"].dtype == jnp.float32
    assert isinstance(out["np"], jax.Array)
    assert_close(out["y"], expected["y"])


def test_plain_trees_are_passed_on_untouched():
    seen = []
    x = np.ones(2)
    assert layered(lambda p, x: seen.append((p, x)) or "out")({"w": x}, 3) == "out"
    assert seen[0][0]["w"] is x
    assert seen[0][1] == 3


def test_other_structured_weights_are_merged_first():
    @jax.tree_util.register_pytree_node_class
    class Doubled:
        def __init__(self, half):
            self.half = half

        def materialize(self):
            return 2 * self.half

        def tree_flatten(self):
            return (self.half,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    c = built("matmul")
    apply = lambda p, x: x @ p["w"] @ p["v"]  # noqa: E731
    other = {"v": Doubled(normal(8, 5, 2))}
    out = layered(apply)(other | deform_tree({"w": c.params["w"]}, c.axes, "output"), c.x)
    assert_close(out, apply({"w": c.params["w"], "v": 2 * other["v"].half}, c.x))
    assert_close(layered(apply)(other | {"w": c.params["w"]}, c.x), out)


# Order of the products, precision, exactness


def test_factors_whose_product_overflows():
    """1e200 * 1e200 is infinite: only the layered order gives a finite output."""
    leaf = deform(normal(1, 3, 5), IN_OUT, "output", alpha=1.0)
    huge = Deformed(leaf.weight * 1e200, leaf.comp * 1e200, "output", IN_OUT)
    x = 1e-300 * normal(3, 4, 3)
    apply = lambda w, x: x @ w  # noqa: E731
    assert not np.isfinite(apply(merge(huge), x)).all()
    np.testing.assert_allclose(layered(apply)(huge, x), 1e100 * (x * 1e300 @ merge(leaf)), rtol=1e-12)


@pytest.mark.parametrize("side", ["output", "input"])
def test_bias_comes_after_both_factors(side):
    leaf = deform(normal(1, 4, 4), IN_OUT, side)
    params = {"params": {"kernel": leaf, "bias": 10 + normal(2, 4)}}
    x = normal(3, 6, 4)
    first, second = (leaf.weight, leaf.comp) if side == "output" else (leaf.comp, leaf.weight)
    found = layered(nn.Dense(4).apply)(params, x)
    np.testing.assert_allclose(found, x @ first @ second + params["params"]["bias"], rtol=1e-12)
    assert np.abs(found - (x @ first + params["params"]["bias"]) @ second).max() > 1


@pytest.mark.parametrize("side", ["output", "input"])
def test_float32_error_is_that_of_two_products(side):
    """THEORY 1.2: within gamma |x| |first| |second|, and far above the error of the merged kernel."""
    m, u = 64, float(np.finfo(np.float32).eps) / 2
    leaf = deform(normal(1, m, m, dtype=jnp.float32), IN_OUT, side, alpha=1e4, k=4)
    x = normal(3, 128, m, dtype=jnp.float32)
    exact = [np.asarray(a, np.float64) for a in (x, leaf.weight, leaf.comp)]
    first, second = exact[1:] if side == "output" else exact[:0:-1]
    truth = exact[0] @ first @ second
    apply = jax.jit(lambda w, x: x @ w)
    error = np.abs(jax.jit(layered(apply))(leaf, x) - truth)
    gamma = (2 * m + 1) * u / (1 - (2 * m + 1) * u)
    assert np.all(error <= gamma * (np.abs(exact[0]) @ np.abs(first) @ np.abs(second)))
    merged = jnp.asarray(first @ second, jnp.float32)
    assert np.linalg.norm(error) > 100 * np.linalg.norm(np.abs(apply(merged, x) - truth))


@pytest.mark.parametrize("side", ["output", "input"])
def test_bfloat16_rounds_after_each_product(side):
    """nn.Dense(dtype=bfloat16): both factors are cast, both activations are stored in bfloat16."""
    leaf = deform(normal(1, 32, 32, dtype=jnp.float32), IN_OUT, side, alpha=100.0)
    x = normal(3, 64, 32, dtype=jnp.bfloat16)
    module = nn.Dense(32, use_bias=False, dtype=jnp.bfloat16)
    found = jax.jit(layered(module.apply))({"params": {"kernel": leaf}}, x)
    assert found.dtype == jnp.bfloat16

    first, second = (leaf.weight, leaf.comp) if side == "output" else (leaf.comp, leaf.weight)
    wide = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, first, second)]
    stored = np.asarray(jnp.asarray(wide[0] @ wide[1], jnp.bfloat16), np.float64)
    expected = jnp.asarray(stored @ wide[2], jnp.bfloat16)
    # A float32 sum may round to the other neighbour of an exact one now and then, never further.
    steps = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    assert np.mean(steps > 0) < 0.02
    assert np.all(steps <= 0.01 * np.max(np.abs(np.asarray(expected, np.float64))))
    # Without the rounding between the products the outputs are others.
    unrounded = jnp.asarray(wide[0] @ wide[1] @ wide[2], jnp.bfloat16)
    assert np.mean(np.asarray(found) != np.asarray(unrounded)) > 0.3

    merged = module.apply({"params": {"kernel": merge(leaf)}}, x)
    relative = np.linalg.norm(np.asarray(found - merged, np.float64)) / np.linalg.norm(
        np.asarray(merged, np.float64)
    )
    assert 0.01 < relative < 1


def test_bfloat16_gradients_exist_for_dense_and_conv():
    for module, x, axes in (
        (nn.Dense(5, dtype=jnp.bfloat16), normal(3, 4, 3, dtype=jnp.float32), IN_OUT),
        (nn.Conv(5, (3, 3), dtype=jnp.bfloat16), normal(3, 2, 4, 4, 3, dtype=jnp.float32), HWIO),
    ):
        params = linen_params(module, x)
        for side in ("output", "input"):
            deformed = deform_tree(params, {"params/kernel": axes}, side, alpha=2.0)
            loss = lambda apply, p: jnp.sum(apply(p, x).astype(jnp.float32) ** 2)  # noqa: B023, E731
            found, expected = quick_jit(
                lambda p: (
                    jax.grad(lambda p: loss(layered(module.apply), p))(p),  # noqa: B023
                    jax.grad(lambda p: loss(module.apply, merge(p)))(p),  # noqa: B023
                )
            )(deformed)
            assert_close(found, expected, rtol=0.05)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("p", [0, 12, 30])
def test_axis_basis_at_a_power_of_two_is_the_plain_layer_to_the_bit(dtype, side, p):
    """THEORY 1.3, axis: T is diagonal with powers of two, so every product is exact up to its scale."""
    kernel, x = normal(1, 48, 32, dtype=dtype), normal(3, 16, 48, dtype=dtype)
    d = IN_OUT.dim(kernel.shape, side)
    scale = jnp.ones(d, dtype).at[jnp.array([1, 7])].set(2.0**p)
    weight = kernel * scale if side == "output" else kernel * scale[:, None]
    leaf = Deformed(weight, jnp.diag(1 / scale), side, IN_OUT)
    # The plain layer asks for the precision that layered asks for: THEORY 1.3 compares the same kernel.
    apply = jax.jit(
        lambda w, x: jnp.matmul(
            x, w, precision="highest", preferred_element_type=jnp.promote_types(dtype, jnp.float32)
        ).astype(dtype)
    )
    expected = apply(kernel, x)
    assert expected.dtype == dtype
    np.testing.assert_array_equal(jax.jit(layered(lambda w, x: x @ w))(leaf, x), expected)
    if p:
        rotated = deform(kernel, IN_OUT, side, alpha=2.0**p)
        assert np.any(jax.jit(layered(lambda w, x: x @ w))(rotated, x) != expected)  # the test can fail


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(name, side="output"):
    c = built(name)
    return list(equations(jax.make_jaxpr(layered(c.apply))(deform_tree(c.params, c.axes, side), c.x).jaxpr))


@pytest.mark.parametrize("side", ["output", "input"])
def test_products_ask_for_full_precision_and_float32_sums(side):
    full = (lax.Precision.HIGHEST,) * 2
    for module, x, axes in (
        (nn.Dense(5, dtype=jnp.bfloat16), normal(3, 4, 3, dtype=jnp.bfloat16), IN_OUT),
        (nn.Conv(5, (3, 3), dtype=jnp.bfloat16), normal(3, 2, 4, 4, 3, dtype=jnp.bfloat16), HWIO),
    ):
        deformed = deform_tree(linen_params(module, x), {"params/kernel": axes}, side)
        program = jax.make_jaxpr(layered(module.apply))(deformed, x)
        products = [
            e for e in equations(program.jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated")
        ]
        assert [e.params["precision"] for e in products] == [full, full]
        assert [e.params["preferred_element_type"] for e in products] == [jnp.float32] * 2
        assert [a.dtype for a in program.out_avals] == [jnp.bfloat16]


def test_what_a_network_asks_of_the_compiler_is_kept():
    names = [e.primitive.name for e in traced("sharding inside")]
    assert names.count("sharding_constraint") == 4  # the weight, the two inputs of the jit, its output

    (remat,) = (e for e in traced("checkpoint with a policy") if "policy" in e.params)
    assert remat.params["policy"] is jax.checkpoint_policies.dots_saveable
    assert remat.params["prevent_cse"] is False

    barriers = [e for e in traced("grad of checkpoint inside") if e.primitive.name == "optimization_barrier"]
    assert len(barriers) == 1


# Refusals


@jax.custom_vjp
def product(w, x):
    return x @ w


product.defvjp(lambda w, x: (product(w, x), (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


@jax.custom_jvp
def product_jvp(w, x):
    return x @ w


product_jvp.defjvp(lambda primals, tangents: (product_jvp(*primals), tangents[1] @ primals[0]))


def mapped(w, x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec()
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(w, x)


def square_conv(w, x, **options):
    settings = {"window_strides": (1,), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, w, dimension_numbers=("NWC", "WIO", "NWC"), **settings)


WIO = KernelAxes((1,), (2,), window=(0,))
REFUSED = {
    "scalar": ("mul", lambda w, x: x @ (2 * w), (4, 4), (3, 4), IN_OUT),
    "addition": ("add", lambda w, x: x @ (w + 1), (4, 4), (3, 4), IN_OUT),
    "penalty": ("integer_pow", lambda w, x: jnp.sum(w**2), (4, 4), (3, 4), IN_OUT),
    "sum": ("reduce_sum", lambda w, x: jnp.sum(w), (4, 4), (3, 4), IN_OUT),
    "concatenate": ("concatenate", lambda w, x: x @ jnp.concatenate([w, w], 1), (4, 4), (3, 4), IN_OUT),
    "both": ("dot_general", lambda w, x: w @ w.T, (4, 4), (3, 4), IN_OUT),
    "part of the features": (
        "dot_general",
        lambda w, x: jnp.einsum("ihd,bd->ihb", w, x),
        (4, 2, 3),
        (5, 3),
        IN_HEADS,
    ),
    "features as batch": ("dot_general", lambda w, x: jnp.einsum("io,bo->oib", w, x), (4, 3), (5, 3), IN_OUT),
    "sum over the stack": (
        "dot_general",
        lambda w, x: jnp.einsum("lio,lbi->bo", w, x),
        (2, 4, 3),
        (2, 5, 4),
        STACKED,
    ),
    "conv of the kernel": ("conv_general_dilated", lambda w, x: square_conv(x, w), (3, 4, 4), (3, 4, 4), WIO),
    "conv in groups": (
        "conv_general_dilated",
        lambda w, x: square_conv(w, x, feature_group_count=2),
        (3, 2, 4),
        (3, 5, 4),
        WIO,
    ),
    "conv in batch groups": (
        "conv_general_dilated",
        lambda w, x: square_conv(w, x, batch_group_count=2),
        (3, 4, 4),
        (2, 5, 4),
        WIO,
    ),
    "conv along features": (
        "conv_general_dilated",
        lambda w, x: square_conv(w.transpose(2, 0, 1), x),
        (3, 4, 3),
        (2, 5, 3),
        KernelAxes((0,), (2,), window=(1,)),
    ),
    "flat": ("reshape", lambda w, x: w.reshape(-1) @ x, (2, 2), (4,), IN_OUT),
    "layers into features": (
        "reshape",
        lambda w, x: x @ w.swapaxes(0, 1).reshape(4, -1),
        (2, 4, 3),
        (5, 4),
        STACKED,
    ),
    "transpose in reshape": (
        "reshape",
        lambda w, x: x @ lax.reshape(w, (12,), (1, 0)),
        (3, 4),
        (2, 12),
        IN_OUT,
    ),
    "repeated features": (
        "broadcast_in_dim",
        lambda w, x: x @ jnp.broadcast_to(w, (3, 4)),
        (3, 1),
        (2, 3),
        IN_OUT,
    ),
    "slice": ("slice", lambda w, x: x @ w[:, 1:], (4, 4), (3, 4), IN_OUT),
    "split": ("split", lambda w, x: x @ jnp.split(w, 2, 1)[0], (4, 4), (3, 4), IN_OUT),
    "one feature": ("dynamic_slice", lambda w, x: x @ w[:, jnp.argmax(x[0])], (4, 4), (3, 4), IN_OUT),
    "gather": ("gather", lambda w, x: x @ w[jnp.array([1, 0, 2, 3])], (4, 4), (3, 4), IN_OUT),
    "flip": ("rev", lambda w, x: x @ w[:, ::-1], (4, 4), (3, 4), IN_OUT),
    "integers": ("convert_element_type", lambda w, x: x @ w.astype(int), (4, 4), (3, 4), IN_OUT),
    "carry of scan": (
        "scan",
        lambda w, x: lax.scan(lambda c, _: ((c[0] @ c[1], c[1].T), None), (x, w), None, length=2)[0][0],
        (4, 4),
        (3, 4),
        IN_OUT,
    ),
    "output of scan": (
        "scan",
        lambda w, x: lax.scan(lambda c, v: (c @ v, v.T), x, w)[1] @ x.T,
        (2, 4, 4),
        (3, 4),
        STACKED,
    ),
    "rows of scan": ("scan", lambda w, x: lax.scan(lambda c, v: (c, x @ v), 0, w)[1], (3, 4), (2, 4), IN_OUT),
    "carry of while": (
        "while",
        lambda w, x: lax.while_loop(lambda c: jnp.sum(c[0]) < 1, lambda c: (c[0] @ c[1] + 1, c[1].T), (x, w))[
            0
        ],
        (4, 4),
        (3, 4),
        IN_OUT,
    ),
    "output of cond": (
        "cond",
        lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda w: w, lambda w: w.T, w),
        (4, 4),
        (3, 4),
        IN_OUT,
    ),
    "cond under vmap": (
        "select_n",
        lambda w, x: jax.vmap(lambda h: lax.cond(h[0] > 0, lambda w: h @ w, lambda w: h @ w.T, w))(x),
        (4, 4),
        (3, 4),
        IN_OUT,
    ),
    "custom_jvp": ("custom_jvp_call", product_jvp, (4, 4), (3, 4), IN_OUT),
    "custom_vjp": ("custom_vjp_call", product, (4, 4), (3, 4), IN_OUT),
    "shard_map": ("shard_map", mapped, (4, 4), (3, 4), IN_OUT),
    "ragged_dot": (
        "ragged_dot_general",
        lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 2])),
        (2, 4, 4),
        (3, 4),
        STACKED,
    ),
    "the weight itself": ("return", lambda w, x: w.T, (4, 4), (3, 4), IN_OUT),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_layered_form_is_refused(name):
    primitive, apply, kernel_shape, x_shape, axes = REFUSED[name]
    leaf, x = deform(normal(1, *kernel_shape), axes, "output"), normal(3, *x_shape)
    jax.eval_shape(apply, merge(leaf), x)  # the network itself is fine
    with pytest.raises(LayeredUnsupported) as refusal:
        jax.eval_shape(layered(lambda p, x: apply(p["layer"]["kernel"], x)), {"layer": {"kernel": leaf}}, x)
    assert (refusal.value.primitive, refusal.value.path) == (primitive, "layer/kernel")
    assert f"'{primitive}'" in str(refusal.value)
    assert "'layer/kernel'" in str(refusal.value)
    assert "sd.merge(deformed)" in refusal.value.remedy


def test_comp_of_a_grouped_convolution_cannot_follow_it():
    """Why output-side groups are refused: comp mixes channels that read different inputs."""
    leaf = deform(normal(1, 3, 2, 4), WIO, "output")
    x = normal(3, 2, 5, 4)
    wrong = square_conv(leaf.weight, x, feature_group_count=2) @ leaf.comp
    assert np.abs(wrong - square_conv(merge(leaf), x, feature_group_count=2)).max() > 0.1


def test_an_argument_that_is_a_leaf_is_named_by_its_place():
    leaf = deform(normal(1, 3, 3), IN_OUT, "output")
    with pytest.raises(LayeredUnsupported, match="'1'"):
        layered(lambda x, w: w + x)(1.0, leaf)
    with pytest.raises(LayeredUnsupported, match="'kernel'"):
        layered(lambda x, kernel: kernel + x)(1.0, kernel=leaf)
