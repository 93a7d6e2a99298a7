"""What an eigenvalue costs: our Lanczos beside scipy, matfree and the PyTorch tools, at equal true accuracy.

Three networks of 1 to 5 million parameters, float32. Measured in one run, in turn:

* seconds of a product inside eigsh, over one Hessian product in a compiled loop of 20 and the 4 m n itemsize
  bytes that reorthogonalizing moves, at the bandwidth measured here;
* seconds and products to sigma_1 at a true relative residual of 1e-6, for ours, scipy's ARPACK and matfree
  through the same compiled product, and for PyHessian, hessian-eigenthings and curvlinops through PyTorch
  (`--torch PYTHON`, an interpreter that has them). matfree has no stopping rule: the smallest of a few depths
  that reaches the residual is timed, the search for it is not. The same for the PyTorch tools;
* memory of the compiled programs at k = 20 wanted pairs;
* scaling over parameters and Krylov dimension.

Runs longer than LONG seconds are timed once in turn, shorter ones three times. Each network is saved when it
is done, and `--only` measures some of them anew beside the rows that are there.

    python -m benchmarks.curvature [--torch PYTHON] [--only NETWORK ...] [--quick]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse.linalg
from jax.tree_util import Partial
from matfree import decomp

from benchmarks import _curvature_models as cm
from benchmarks._harness import Paired, paired, results, save, seconds
from specdef_jax import curvature as cv
from specdef_jax.curvature import lanczos
from specdef_jax.curvature.operators import Operator, flattened
from specdef_jax.curvature.restart import Setting

KEY = jax.random.key(0)
TOL = 1e-6
M = 20
DEPTHS = (10, 20, 40, 80)
LONG = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--torch", type=Path, help="interpreter with torch, PyHessian, hessian-eigenthings, curvlinops"
    )
    parser.add_argument("--only", nargs="+", metavar="NETWORK", help="measure these, keep the other rows")
    parser.add_argument("--quick", action="store_true", help="one network, two repeats; not saved")
    options = parser.parse_args()
    repeats = 2 if options.quick else 3
    models = cm.models()
    wanted = ["mlp"] if options.quick else options.only or list(models)
    path = results() / "curvature.json"
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "summary": {}}
    rows = {row["network"]: row for row in old["rows"]}
    curve = old["summary"].get("scaling", [])
    speed = bandwidth()
    config = {"tol": TOL, "krylov": M, "repeats": repeats, "long": LONG, "bandwidth": speed}
    if not options.quick and (not options.only or not curve):
        curve = scaling(2)
    for name in wanted:
        model = models[name]
        op = cv.hessian(model.loss, model.params, *model.args)
        row: dict[str, Any] = {"network": name, "parameters": op.size, "date": str(datetime.date.today())}
        row |= product_cost(op, speed, repeats) | to_tolerance(op, repeats) | memory(op)
        if options.torch:
            row["torch"] = in_torch(options.torch, name, model, float(model.loss(model.params, *model.args)))
        rows[name] = row
        print(json.dumps(row, indent=1), flush=True)
        if not options.quick:
            kept = [rows[name] for name in models if name in rows]
            save("curvature", config, kept, {"scaling": curve})
            draw(kept, curve)


def in_turn(a: Callable[[], Any], b: Callable[[], Any], repeats: int) -> Paired:
    """Time a and b in turn: once if they are long, as a long run averages over the machine's moods itself."""
    first = paired(a, b, 1)
    return first if max(first.a, first.b) > LONG or repeats == 1 else paired(a, b, repeats)


def bandwidth(entries: int = 1 << 26) -> float:
    """Return bytes per second of y + a x over arrays beyond the cache, two reads and a write."""
    x, y = jnp.ones(entries, jnp.float32), jnp.ones(entries, jnp.float32)
    triad = jax.jit(lambda x, y: y + 2.5 * x)
    triad(x, y).block_until_ready()
    return 12 * entries / min(seconds(lambda: triad(x, y).block_until_ready()) for _ in range(9))


def product_cost(op: Operator, speed: float, repeats: int) -> dict[str, Any]:
    """Time a product inside eigsh against a bare one and the traffic of its two Gram-Schmidt sweeps."""
    start = jnp.ones(op.size, op.dtype) / np.sqrt(op.size)
    flat = flattened(op)

    @partial(jax.jit, static_argnames="count")
    def bare(op: Operator, v: jax.Array, count: int) -> jax.Array:
        def step(_: int, v: jax.Array) -> jax.Array:
            z = op.mv(v)
            return z / jnp.sqrt(jnp.sum(z * z))

        return jax.lax.fori_loop(0, count, step, v)

    budget = 4 * M + 1

    def ours() -> Any:
        return jax.block_until_ready(cv.eigsh(op, 1, "SA", 0.0, key=KEY, max_matvecs=budget))

    def loop() -> Any:
        return jax.block_until_ready(bare(flat, start, M))

    spent = int(ours().matvecs)
    loop()
    timed = in_turn(ours, loop, repeats)
    traffic = 4 * M * op.size * op.dtype.itemsize / speed
    model = timed.b / M + traffic
    return {
        "product_seconds": timed.b / M,
        "traffic_seconds": traffic,
        "eigsh_seconds_per_product": timed.a / spent,
        "cost_ratio": timed.a / spent / model,
    }


def to_tolerance(op: Operator, repeats: int) -> dict[str, Any]:
    """Time ours, ARPACK and matfree to sigma_1 at the same true residual."""
    flat = flattened(op)
    product = jax.jit(lambda op, v: op.mv(v))
    count = [0]

    def matvec(v: np.ndarray) -> np.ndarray:
        count[0] += 1
        return np.asarray(product(flat, jnp.asarray(v.astype(np.float32).ravel())))

    peer = scipy.sparse.linalg.LinearOperator((op.size, op.size), matvec, dtype=np.float32)

    def true(v: Any) -> float:
        v = jnp.asarray(v, jnp.float32)
        v = v / jnp.linalg.norm(v)
        z = product(flat, v)
        return float(jnp.linalg.norm(z - jnp.vdot(v, z) * v) / jnp.linalg.norm(z))

    def ours() -> Any:
        return jax.block_until_ready(cv.eigsh(op, 1, "LM", TOL, key=KEY))

    def arpack() -> Any:
        return scipy.sparse.linalg.eigsh(peer, 1, which="LM", tol=TOL, ncv=M, v0=np.ones(op.size, np.float32))

    found = ours()
    row: dict[str, Any] = {
        "ours": {
            "products": int(found.matvecs), "residual": float(found.residuals[0] / found.norm),
            "status": found.status.name, "value": float(found.values[0]),
        }
    }  # fmt: skip
    count[0] = 0
    value, vector = arpack()
    row["scipy"] = {"products": count[0], "residual": true(vector[:, 0]), "value": float(value[0])}
    timed = in_turn(ours, arpack, repeats)
    row["ours"]["seconds"], row["scipy"]["seconds"] = timed.a, timed.b
    row["scipy"]["ours_over_peer"] = timed.ratio
    start = jax.random.normal(KEY, (op.size,), jnp.float32)
    for depth in DEPTHS:
        if depth < row["ours"]["products"] // 2:  # it converges no faster than that, whoever runs it
            continue
        run = matfree_run(depth)
        theta, vectors = jax.block_until_ready(run(flat, start))
        rest = true(vectors[0])
        if rest <= TOL or depth == DEPTHS[-1]:
            timed = in_turn(ours, lambda run=run: jax.block_until_ready(run(flat, start)), repeats)
            row["matfree"] = {
                "products": depth, "residual": rest, "value": float(theta[0]), "seconds": timed.b,
                "ours_over_peer": timed.ratio, "reached": rest <= TOL,
            }  # fmt: skip
            break
    return row


def matfree_run(depth: int, k: int = 1) -> Any:
    """Return a compiled run of matfree's Lanczos, which gives the k Ritz pairs of largest magnitude."""
    tridiagonal = decomp.tridiag_sym(depth, materialize=True, reortho="full")

    @jax.jit
    def run(op: Operator, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = tridiagonal(lambda v, op: op.mv(v), start, op)
        theta, vectors = jnp.linalg.eigh(found.J_small)
        order = jnp.argsort(-jnp.abs(theta))[:k]
        return theta[order], vectors[:, order].T @ found.Q_tall

    return run


def memory(op: Operator, k: int = 20) -> dict[str, Any]:
    """Return bytes of temporaries at k pairs, in vectors; ARPACK's follow from its interface."""
    flat = flattened(op)
    m = max(20, 2 * k + 10)
    setting = Setting(k, m, "LM", whole=False, narrowest="float32", in_place=True)
    ours = lanczos._solve.lower(setting, flat, KEY, TOL, 1000, None).compile().memory_analysis()
    start = jnp.ones(op.size, jnp.float32)
    peer = matfree_run(m, k).lower(flat, start).compile().memory_analysis()
    product = jax.jit(lambda op, v: op.mv(v)).lower(flat, start).compile().memory_analysis()
    unit = op.size * 4
    vectors = {
        "ours": (ours.temp_size_in_bytes + ours.output_size_in_bytes) / unit,
        "matfree": (peer.temp_size_in_bytes + peer.output_size_in_bytes) / unit,
        # v (m), workd (3), resid, and the vectors returned, as its source allocates them; and one product
        "scipy": m + k + 4.0 + (product.temp_size_in_bytes + product.output_size_in_bytes) / unit,
    }
    return {"memory": {"pairs": k, "krylov": m, "vectors": vectors}}


def in_torch(python: Path, name: str, model: cm.Model, loss: float) -> dict[str, Any]:
    """Run the PyTorch peers on the same numbers, alone on the machine."""
    x, y = (np.asarray(a) for a in model.args)
    arrays = {f"p:{n}": np.asarray(v) for n, v in model.params.items()}
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, x=x, y=y, kind=name, heads=model.heads, tol=TOL, **arrays)
        file.flush()
        script = Path(__file__).with_name("_torch_peers.py")
        command = [str(python), str(script), file.name, str(os.cpu_count())]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if abs(found["loss"] - loss) > 1e-4 * abs(loss):
        raise RuntimeError(f"{name}: the loss is {found['loss']} in PyTorch, {loss} here")
    return found


def scaling(repeats: int) -> list[dict[str, Any]]:
    """Time products of eigsh over sizes and Krylov dimensions, the operator itself next to free."""
    rows = []
    for size in (10**5, 3 * 10**5, 10**6, 3 * 10**6):
        for m in (10, 20, 40, 80):
            diagonal = jnp.linspace(0.0, 1.0, size, dtype=jnp.float32)
            op = cv.linear(Partial(jnp.multiply, diagonal), jax.ShapeDtypeStruct((size,), jnp.float32))
            budget = 2 * m + 1

            def run(op: Operator = op, m: int = m, budget: int = budget) -> Any:
                return jax.block_until_ready(
                    cv.eigsh(op, 1, "LA", 0.0, key=KEY, max_matvecs=budget, krylov=m)
                )

            spent = int(run().matvecs)
            took = min(seconds(run) for _ in range(repeats))
            rows.append({"parameters": size, "krylov": m, "seconds_per_product": took / spent})
    return rows


def draw(rows: list[dict[str, Any]], curve: list[dict[str, Any]]) -> None:
    """Draw time to tolerance by tool, and the scaling."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [row["network"] for row in rows]
    bars: dict[str, list[float]] = {
        tool: [row[tool]["seconds"] for row in rows] for tool in ("ours", "scipy", "matfree")
    }
    for i, row in enumerate(rows):
        for peer in row.get("torch", {}).get("rows", []):
            bars.setdefault(peer["peer"], [np.nan] * len(rows))[i] = peer.get("seconds", np.nan)
    width = 0.8 / len(bars)
    for j, (tool, values) in enumerate(bars.items()):
        left.bar(np.arange(len(names)) + j * width - 0.4 + width / 2, values, width, label=tool)
    left.set_xticks(range(len(names)), names)
    left.set_yscale("log")
    left.set_ylim(0.5, 12 * max(x for values in bars.values() for x in values if np.isfinite(x)))
    left.set_ylabel(f"seconds to a true residual of {TOL:g}")
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    for m in sorted({row["krylov"] for row in curve}):
        mine = [row for row in curve if row["krylov"] == m]
        right.loglog(
            [r["parameters"] for r in mine],
            [r["seconds_per_product"] for r in mine],
            marker="o",
            label=f"m = {m}",
        )
    right.set_xlabel("parameters")
    right.set_ylabel("seconds per product, operator free")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(results() / "curvature.svg")


if __name__ == "__main__":
    main()
