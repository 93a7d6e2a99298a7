"""Llama, GPT-OSS and the UNet against their PyTorch implementations, in one process and on the same weights.

Forward pass and training step (loss, gradients, a step of SGD in place), float32, compiled before. And ours
deformed against ours plain, every value projection an inserted pair. Needs the extra `stock`.

XLA asks for its scratch memory anew at each call, and a kernel that hands out pages of 4 KiB can take longer
for that than the step does for its products. So it is measured twice, the second time with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment, for both sides.

    [GLIBC_TUNABLES=glibc.malloc.hugetlb=1] python -m benchmarks.models [--only MODEL ...] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import specdef_jax as sd
from benchmarks._harness import paired, results, save
from specdef_jax.models import gpt_oss

CONFIG: dict[str, Any] = {
    "llama": {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "gpt_oss": {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "sliding_window": 64,
    },
    "unet": {
        "sample_size": 16, "block_out_channels": [64, 128], "layers_per_block": 1, "cross_attention_dim": 64,
        "attention_head_dim": 8, "norm_num_groups": 16,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "batch": 4,
    "length": 128,
    "repeats": 15,
}  # fmt: skip
LAYERS = {"llama": "*v_proj.weight", "gpt_oss": "*v_proj.weight", "unet": "*attn2.to_v.weight"}
STEP = 1e-3
HUGE_PAGES = "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
Case = tuple[Callable[[], Any], Callable[[], Any]]


def main() -> None:
    """Run the benchmark, print its table and save its JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", metavar="MODEL", choices=LAYERS, help="keep the others' rows")
    parser.add_argument("--quick", action="store_true", help="one repeat, nothing is saved")
    options = parser.parse_args()
    import diffusers
    import torch
    import transformers

    jax.config.update("jax_default_matmul_precision", "float32")  # as PyTorch's, on accelerators too
    config = CONFIG | ({"repeats": 1} if options.quick else {})
    path = results() / "models.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    peers = {lib.__name__: lib.__version__ for lib in (torch, transformers, diffusers)}
    for name in options.only or LAYERS:
        rows = [row for row in rows if (row["model"], row.get("huge_pages", False)) != (name, HUGE_PAGES)]
        for row in measure(name, config):
            rows.append(row)
            print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
        if not options.quick:
            save("models", config | {"peers": peers, "threads": torch.get_num_threads()}, rows, {})


def measure(name: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for the forward pass and one for the training step."""
    with tempfile.TemporaryDirectory() as directory:
        theirs, inputs = _stock(name, config, Path(directory))
        model = sd.hub.load(Path(directory))
    key = jax.random.key(0)
    deformed = sd.deform(model.params, sd.SpecDef(alpha=16.0), where=LAYERS[name], key=key)
    ours, trained = _ours(model, model.params, inputs), _ours(model, deformed, inputs)
    rows = []
    for what, mine, defended, peer in zip(("forward", "training step"), ours, trained, theirs, strict=True):
        a, b = np.asarray(mine(), np.float64), np.asarray(peer(), np.float64)
        defended()
        times, cost = paired(peer, mine, config["repeats"]), paired(defended, mine, config["repeats"])
        rows.append(
            {
                "model": name, "what": what, "huge_pages": HUGE_PAGES,
                "parameters": sd.trees.size(model.params),
                "torch_seconds": times.a, "seconds": times.b, "ratio": times.ratio,
                "ratio_low": min(times.ratios), "ratio_high": max(times.ratios),
                "deformed_over_plain": cost.ratio,
                "difference": float(np.abs(a - b).max() / np.abs(b).max()),
            }
        )  # fmt: skip
    return rows


def _ours(model: sd.hub.Model, params: Any, inputs: dict[str, np.ndarray]) -> Case:
    given = [jnp.asarray(x) for x in inputs.values()]
    forward_of, loss_of = model.apply, model.loss
    if isinstance(model.config, gpt_oss.Config):  # each expert reads its own tokens only, as PyTorch's does
        forward_of = functools.partial(gpt_oss.apply, model.config, grouped=True)
        loss_of = gpt_oss.loss(model.config, grouped=True)
    apply = jax.jit(forward_of)
    if "tokens" in inputs:
        seen, args = given, given
    else:
        latents, noise, timestep, states = given
        seen, args = [latents, timestep, states], [latents, noise, timestep, states]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(params: Any, *args: Any) -> Any:
        loss, slopes = jax.value_and_grad(loss_of)(params, *args)
        return jax.tree.map(lambda p, g: p - STEP * g, params, slopes), loss

    held = [jax.tree.map(jnp.copy, params)]

    def train() -> Any:
        held[0], loss = step(held[0], *args)
        return jax.block_until_ready(loss)

    def forward() -> Any:
        return jax.block_until_ready(apply(params, *seen))

    return forward, train


def _stock(name: str, config: dict[str, Any], directory: Path) -> tuple[Case, dict[str, np.ndarray]]:
    """Return the same two with PyTorch, after writing its weights, and the inputs of both."""
    import torch

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if name == "unet":
        model, inputs = _unet(config, rng)
    else:
        model, inputs = _text(name, config, rng)
    model.save_pretrained(directory)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model.to(device)
    given = {key: torch.from_numpy(x).to(device) for key, x in inputs.items()}

    def forward() -> np.ndarray:
        with torch.no_grad():
            return run(given).cpu().numpy()

    def run(given: dict[str, Any]) -> Any:
        if name == "unet":
            return model(given["latents"], given["timestep"], given["states"]).sample
        return model(given["tokens"].long(), use_cache=False).logits

    def train() -> np.ndarray:
        for parameter in model.parameters():
            parameter.grad = None
        if name == "unet":
            table = (
                torch.from_numpy(sd.models.diffusion.alphas_cumprod())
                .float()
                .to(device)[given["timestep"].long()]
            )
            a = table[:, None, None, None]
            noisy = a.sqrt() * given["latents"] + (1 - a).sqrt() * given["noise"]
            loss = ((run(given | {"latents": noisy}) - given["noise"]) ** 2).mean()
        else:
            logits, tokens = run(given)[:, :-1], given["tokens"].long()[:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= STEP * parameter.grad
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.detach().cpu().numpy()

    return (forward, train), inputs


def _text(name: str, config: dict[str, Any], rng: np.random.Generator) -> tuple[Any, dict[str, np.ndarray]]:
    import transformers

    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    }
    of_config, of_model = kinds[name]
    model = of_model(of_config(**config[name])).eval()
    shape = (config["batch"], config["length"])
    return model, {"tokens": rng.integers(0, config[name]["vocab_size"], shape).astype(np.int32)}


def _unet(config: dict[str, Any], rng: np.random.Generator) -> tuple[Any, dict[str, np.ndarray]]:
    import diffusers

    model = diffusers.UNet2DConditionModel(**config["unet"]).eval()
    size, batch = config["unet"]["sample_size"], config["batch"]
    latents, noise = rng.standard_normal((2, batch, 4, size, size)).astype(np.float32)
    states = rng.standard_normal((batch, 16, config["unet"]["cross_attention_dim"])).astype(np.float32)
    timestep = rng.integers(0, 1000, batch).astype(np.int32)
    return model, {"latents": latents, "noise": noise, "timestep": timestep, "states": states}


if __name__ == "__main__":
    main()
