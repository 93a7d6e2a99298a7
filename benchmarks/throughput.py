"""Tokens per second of a 1-billion-parameter Llama with random weights, plain and deformed.

The layout of Llama 3.2 1B in bfloat16. Every projection of every layer is deformed: by a dense compensation,
by one stored as directions and factors (specdef_jax.low_rank), and, values against outputs, by gauge
placement, which adds nothing. Forward pass, training step of Adam and greedy decoding, each variant in turn
with the plain network. `share` is what the plain network's products need over what the largest matrix product
reaches here; the products of a compensation count as cost and not as work. On a GPU attention is fused.

    python -m benchmarks.throughput [--quick]
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import specdef_jax as sd
from benchmarks._harness import paired, save, seconds
from specdef_jax.low_rank import compact
from specdef_jax.models import llama
from specdef_jax.models.pairing import deform_pairs

LAYOUT = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "layout": LAYOUT, "dtype": "bfloat16", "batch": 4, "length": 1024, "prompt": 128, "new": 128,
    "alpha": 16.0, "where": "*_proj.weight", "peak_size": 8192, "repeats": 11,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
QUICK = {
    "layout": LAYOUT | TINY, "length": 32, "prompt": 8, "new": 8, "peak_size": 256, "repeats": 1,
}  # fmt: skip
KEY = jax.random.key(0)
OPTIMIZER = optax.adam(1e-5)
WHATS = ("forward", "training step", "decoding")


def main() -> None:
    """Run the benchmark, print its table and save its JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a tiny layout, nothing is saved")
    quick = parser.parse_args().quick
    config = CONFIG | (QUICK if quick else {})
    model = llama.Config.from_json(config["layout"])
    params = jax.jit(llama.init, static_argnums=(0, 2))(model, KEY, jnp.dtype(config["dtype"]))
    peak = matmul_peak(config)
    rows: list[dict[str, Any]] = []
    for name, make in deformations(model, params, config).items():
        begin = time.perf_counter()
        network = jax.block_until_ready(make())
        made = {"variant": name, "parameters": sd.trees.size(network)}
        made |= {"deforming_seconds": time.perf_counter() - begin}  # with compilation
        for row in measure(model, params, network, config, peak):
            rows.append(made | row)
            print(
                "  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items())
            )
    summary = {
        "parameters": sd.trees.size(params),
        "matmul_peak_flops": peak,
        "fused_difference": fused_difference(model, params, config),
        "flops_per_token": {what: work(model, params, config, what) for what in WHATS},
    }
    print(summary)
    if not quick:
        save("throughput", config, rows, summary)


def fused_difference(model: llama.Config, params: Any, config: dict[str, Any]) -> float:
    """Return the relative change of the logits by fused attention, in the network's dtype."""
    tokens = jax.random.randint(KEY, (1, config["length"]), 0, model.vocab_size)
    plain = np.asarray(jax.jit(llama.apply, static_argnums=0)(model, params, tokens), np.float32)
    found = np.asarray(_apply(model, params, tokens), np.float32)
    return float(np.linalg.norm(found - plain) / np.linalg.norm(plain))


def deformations(model: llama.Config, params: Any, config: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return name -> what makes that variant."""
    spec = sd.SpecDef(alpha=config["alpha"])

    def dense() -> Any:
        return sd.deform(params, spec, where=config["where"], key=KEY)

    def low_rank() -> Any:
        made = sd.plan(params, spec, where=config["where"], key=KEY)
        return compact(sd.apply_plan(params, made), made)

    def gauge() -> Any:
        return deform_pairs(params, sd.models.decoder.gauge_pairs(model), spec, key=KEY)

    return {"dense C": dense, "low-rank C": low_rank, "gauge": gauge}


def matmul_peak(config: dict[str, Any]) -> float:
    """Return floating-point operations per second of one large square product in the network's dtype."""
    n, repeats = config["peak_size"], 10
    a, b = (jax.random.normal(k, (n, n), config["dtype"]) for k in jax.random.split(KEY))

    @jax.jit
    def products(a: Any, b: Any) -> Any:
        return jax.lax.fori_loop(0, repeats, lambda _, x: (x @ b) / n, a)  # each waits for the one before

    jax.block_until_ready(products(a, b))
    times = [seconds(lambda: jax.block_until_ready(products(a, b))) for _ in range(5)]
    return repeats * 2 * n**3 / float(np.median(times))


def work(model: llama.Config, params: Any, config: dict[str, Any], what: str) -> float:
    """Return what the plain network's products take per token: operations, attention unmasked."""
    kernels = sum(
        leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2
    )  # the head is the embedding
    keys = config["prompt"] + config["new"] if what == "decoding" else config["length"]
    attention = 4 * keys * model.num_attention_heads * model.head_dim * model.num_hidden_layers
    return float((2 * kernels + attention) * (3 if what == "training step" else 1))


def measure(
    model: llama.Config, plain: Any, deformed: Any, config: dict[str, Any], peak: float
) -> list[dict[str, Any]]:
    """Return a row for each thing measured, the variant in turn with the plain network."""
    tokens = jax.random.randint(KEY, (config["batch"], config["length"]), 0, model.vocab_size)
    exact, found = (np.asarray(_apply(model, p, tokens[:1]), np.float32) for p in (plain, deformed))
    difference = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    rows = []
    for what in WHATS:
        a, b = (_case(what, model, params, tokens, config) for params in (deformed, plain))
        a(), b()  # compile
        times = paired(a, b, config["repeats"])
        count = config["batch"] * (config["new"] if what == "decoding" else config["length"])
        rows.append(
            {
                "what": what, "seconds": times.a, "plain_seconds": times.b, "over_plain": times.ratio,
                "over_plain_low": min(times.ratios), "over_plain_high": max(times.ratios),
                "tokens_per_second": count / times.a, "plain_tokens_per_second": count / times.b,
                "share": work(model, plain, config, what) * count / times.a / peak,
                "plain_share": work(model, plain, config, what) * count / times.b / peak,
                "difference": difference,
            }
        )  # fmt: skip
    return rows


def _case(
    what: str, model: llama.Config, params: Any, tokens: Any, config: dict[str, Any]
) -> Callable[[], Any]:
    if what == "forward":
        return lambda: jax.block_until_ready(_apply(model, params, tokens))
    if what == "decoding":
        prompt = tokens[:, : config["prompt"]]
        return lambda: jax.block_until_ready(llama.generate(model, params, prompt, config["new"]))
    held = [jax.tree.map(jnp.copy, params), OPTIMIZER.init(params)]

    def train() -> Any:
        held[0], held[1], value = _step(model, *held, tokens)
        return jax.block_until_ready(value)

    return train


def _fused() -> bool:
    return jax.default_backend() == "gpu"


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: llama.Config, params: Any, tokens: Any) -> Any:
    return llama.apply(model, params, tokens, fused=_fused())


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(model: llama.Config, params: Any, state: Any, tokens: Any) -> Any:
    value, slopes = jax.value_and_grad(llama.loss(model, fused=_fused()))(params, tokens)
    updates, state = OPTIMIZER.update(slopes, state, params)
    return optax.apply_updates(params, updates), state, value


if __name__ == "__main__":
    main()
