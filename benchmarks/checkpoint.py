"""What deforming a whole checkpoint takes: time beside cp and sha256sum, and memory, at the real shapes.

Directories of random weights in the layouts of Llama-3.1-8B, GPT-OSS-20b and the Stable Diffusion 1.5 UNet
are deformed, verified and fused, each step in a process of its own, whose stages are timed and whose peak
memory is taken. The peer is `cp -r` with a sync, and `sha256sum` of the output.

    python -m benchmarks.checkpoint [--folder DIR] [--only NAME ...] [--small]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks._harness import RESULTS, save

BF16 = np.dtype(ml_dtypes.bfloat16)
SHARD = 5 << 30
Tensors = Iterator[tuple[str, np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    """A checkpoint to make up, and what is deformed in it."""

    config: dict[str, Any]
    tensors: list[tuple[str, np.dtype, tuple[int, ...]]]
    layers: tuple[str, ...]


def llama(layers: int, hidden: int, inner: int, vocabulary: int) -> Layout:
    """Return the layout of Llama-3.1, 8B at 32 layers of 4096 and 14336."""
    heads, groups = hidden // 128, max(1, hidden // 512)
    tensors = [("model.embed_tokens.weight", BF16, (vocabulary, hidden))]
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors += [
            (f"{at}.{n}.weight", BF16, (hidden,)) for n in ("input_layernorm", "post_attention_layernorm")
        ]
        for name, shape in (
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.k_proj", (128 * groups, hidden)),
            ("self_attn.v_proj", (128 * groups, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):
            tensors.append((f"{at}.{name}.weight", BF16, shape))
    tensors += [("model.norm.weight", BF16, (hidden,)), ("lm_head.weight", BF16, (vocabulary, hidden))]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
    }
    return Layout(config, tensors, ("mlp.up_proj.weight",))


def gpt_oss(layers: int, hidden: int, experts: int, vocabulary: int) -> Layout:
    """Return the layout of GPT-OSS, 20b at 24 layers of 2880 with 32 experts."""
    heads, groups, u8 = 64, 8, np.dtype(np.uint8)
    tensors = [("model.embed_tokens.weight", BF16, (vocabulary, hidden))]
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors += [
            (f"{at}.{n}.weight", BF16, (hidden,)) for n in ("input_layernorm", "post_attention_layernorm")
        ]
        for name, out, into in (
            ("q", heads * 64, hidden),
            ("k", groups * 64, hidden),
            ("v", groups * 64, hidden),
            ("o", hidden, heads * 64),
        ):
            tensors.append((f"{at}.self_attn.{name}_proj.weight", BF16, (out, into)))
            tensors.append((f"{at}.self_attn.{name}_proj.bias", BF16, (out,)))
        tensors.append((f"{at}.self_attn.sinks", BF16, (heads,)))
        tensors.append((f"{at}.mlp.router.weight", BF16, (experts, hidden)))
        tensors.append((f"{at}.mlp.router.bias", BF16, (experts,)))
        for name, out in (("gate_up_proj", 2 * hidden), ("down_proj", hidden)):
            tensors.append((f"{at}.mlp.experts.{name}_blocks", u8, (experts, out, hidden // 32, 16)))
            tensors.append((f"{at}.mlp.experts.{name}_scales", u8, (experts, out, hidden // 32)))
            tensors.append((f"{at}.mlp.experts.{name}_bias", BF16, (experts, out)))
    tensors += [("model.norm.weight", BF16, (hidden,)), ("lm_head.weight", BF16, (vocabulary, hidden))]
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 64,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    return Layout(config, tensors, ("self_attn.*_proj.weight",))


def unet(widths: tuple[int, ...], context: int) -> Layout:
    """Return the transformer blocks of the Stable Diffusion UNet, 1.5 at widths 320 to 1280, in float32."""
    f32 = np.dtype(np.float32)
    tensors = [("conv_in.weight", f32, (widths[0], 4, 3, 3)), ("conv_in.bias", f32, (widths[0],))]
    places = [(f"down_blocks.{i}", d, 2) for i, d in enumerate(widths[:-1])]
    places += [("mid_block", widths[-1], 1)]
    places += [(f"up_blocks.{i + 1}", d, 3) for i, d in enumerate(reversed(widths[:-1]))]
    for place, d, count in places:
        for j in range(count):
            at = f"{place}.attentions.{j}"
            block = f"{at}.transformer_blocks.0"
            for name in ("proj_in", "proj_out"):
                tensors.append((f"{at}.{name}.weight", f32, (d, d, 1, 1)))
            for attention, read in (("attn1", d), ("attn2", context)):
                tensors.append((f"{block}.{attention}.to_q.weight", f32, (d, d)))
                tensors.append((f"{block}.{attention}.to_k.weight", f32, (d, read)))
                tensors.append((f"{block}.{attention}.to_v.weight", f32, (d, read)))
                tensors.append((f"{block}.{attention}.to_out.0.weight", f32, (d, d)))
                tensors.append((f"{block}.{attention}.to_out.0.bias", f32, (d,)))
            tensors.append((f"{block}.ff.net.0.proj.weight", f32, (8 * d, d)))
            tensors.append((f"{block}.ff.net.2.weight", f32, (d, 4 * d)))
        for j in range(2):
            for k in (1, 2):
                tensors.append((f"{place}.resnets.{j}.conv{k}.weight", f32, (d, d, 3, 3)))
    config = {"_class_name": "UNet2DConditionModel", "attention_head_dim": 8}
    return Layout(config, tensors, ("attn*.to_*.weight", "attn*.to_out.0.weight"))


LAYOUTS = {
    "llama-3.1-8b": lambda: llama(32, 4096, 14336, 128256),
    "gpt-oss-20b, 10 layers": lambda: gpt_oss(10, 2880, 32, 201088),
    "stable diffusion 1.5": lambda: unet((320, 640, 1280, 1280), 768),
}
SMALL = {
    "llama-3.1-8b": lambda: llama(2, 512, 1024, 1000),
    "gpt-oss-20b, 10 layers": lambda: gpt_oss(2, 320, 4, 1000),
    "stable diffusion 1.5": lambda: unet((32, 64, 64), 64),
}
PLACEMENTS = {
    "insert": {"alpha": 1e4, "k": 25, "basis": "symmetric"},
    "gauge": {"alpha": 2.0**12, "k": 4, "basis": "axis"},
}


def main() -> None:
    """Run every layout and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, help="where the checkpoints go, 50 GB for all; removed again")
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--small", action="store_true", help="small shapes, for a try; writes no JSON")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in options.only:
            layout = (SMALL if options.small else LAYOUTS)[name]()
            rows += list(measure(name, layout, Path(folder)))
    if not options.small:
        save("checkpoint", {"placements": PLACEMENTS}, [*_others(options.only), *rows], {})


def _others(measured: list[str]) -> list[dict[str, Any]]:
    """Return the rows of the last run about other layouts; each row has its own date."""
    path = RESULTS / "checkpoint.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["layout"] not in measured]


def measure(name: str, layout: Layout, folder: Path) -> Iterator[dict[str, Any]]:
    """Make up one checkpoint, then deform, verify and fuse it in both placements."""
    source, out, fused = (folder / n for n in ("source", "out", "fused"))
    make_up(source, layout)
    largest = 8 * max(math.prod(shape) for _, _, shape in layout.tensors)
    for placement, spec in PLACEMENTS.items():
        layers = layout.layers if placement == "insert" else ()
        job = {"source": str(source), "out": str(out), "fused": str(fused), "spec": spec}
        job |= {"placement": placement, "layers": layers}
        row: dict[str, Any] = {"layout": name, "placement": placement, "bytes": size(source)}
        row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row["cp_seconds"] = timed(f"cp -r '{source}' '{folder / 'copy'}' && sync")
        shutil.rmtree(folder / "copy")
        row["deform"] = child("deform", job)
        row["sha256sum_seconds"] = timed(f"find '{out}' -type f -exec sha256sum {{}} + > /dev/null")
        row["verify"] = child("verify", job)
        row["fuse"] = child("fuse", job)
        row["largest_float64_bytes"] = largest
        writing, peer = row["deform"]["stages"]["writing"], row["cp_seconds"] + row["sha256sum_seconds"]
        row["writing_ratio"] = writing / peer
        row["memory_bound_bytes"] = 1.5e9 + largest
        row["peak_bytes"] = max(row[step]["peak_bytes"] for step in ("deform", "verify", "fuse"))
        print(json.dumps(row, indent=1), flush=True)
        yield row
        shutil.rmtree(out)
        shutil.rmtree(fused)
    shutil.rmtree(source)


def make_up(folder: Path, layout: Layout) -> None:
    """Write random weights, cut from one pool of numbers: the spectra are those of Gaussian matrices."""
    from specdef_jax.hub.safetensors_header import header_of

    rng = np.random.default_rng(0)
    pools = {BF16: (0.02 * rng.standard_normal(1 << 26, np.float32)).astype(BF16)}
    pools[np.dtype(np.float32)] = 0.02 * rng.standard_normal(1 << 25, np.float32)
    pools[np.dtype(np.uint8)] = rng.integers(110, 128, 1 << 26, np.uint8)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(layout.config, indent=2))
    files: list[list[tuple[str, np.dtype, tuple[int, ...]]]] = [[]]
    held = 0
    for tensor in layout.tensors:
        held += math.prod(tensor[2]) * tensor[1].itemsize
        if held > SHARD * len(files):
            files.append([])
        files[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(files, 1):
        file = f"model-{i:05}-of-{len(files):05}.safetensors"
        weight_map |= {tensor: file for tensor, _, _ in tensors}
        header, _ = header_of({name: (dtype, shape) for name, dtype, shape in tensors}, {})
        with (folder / file).open("wb") as stream:
            stream.write(header)
            for _, dtype, shape in tensors:
                left, pool = math.prod(shape), pools[dtype]
                while left:
                    start = int(rng.integers(0, len(pool) - 1))
                    part = pool[start : start + left]
                    stream.write(part.view(np.uint8).data)
                    left -= len(part)
    index = {"metadata": {"total_size": held}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def size(folder: Path) -> int:
    """Return the bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def timed(command: str) -> float:
    """Return the seconds that a shell command takes."""
    begin = time.perf_counter()
    subprocess.run(command, shell=True, check=True)
    return time.perf_counter() - begin


def child(step: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one step in a process of its own and return what it says of itself."""
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--step", step, json.dumps(job)]
    begin = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": time.perf_counter() - begin}


def run_step(step: str, job: dict[str, Any]) -> None:
    """Do one step and print its stages and peak memory."""
    from specdef_jax import hub
    from specdef_jax.spec import SpecDef

    marks: list[tuple[str, float]] = []

    def tell(stage: str, done: int, total: int) -> None:
        marks.append((stage, time.perf_counter()))

    begin = time.perf_counter()
    found: dict[str, Any] = {}
    if step == "deform":
        spec = SpecDef(**job["spec"], budget=hub.BUDGET)
        where = job["layers"] or None
        made = hub.deform(job["source"], job["out"], spec, where, placement=job["placement"], progress=tell)
        found = {
            "layers": len(made.layers),
            "dtypes": sorted({layer.dtype for layer in made.layers.values()}),
            "largest_error": max(layer.measured.error for layer in made.layers.values()),
            "largest_bound_ratio": max(layer.measured.bound_ratio for layer in made.layers.values()),
            "exact": sum(layer.exact for layer in made.layers.values()),
            "output_bytes": size(Path(job["out"])),
        }
    elif step == "verify":
        checked = hub.verify(job["out"], job["source"], progress=tell)
        found = {"holds": checked.holds, "identical": checked.identical}
    else:
        undone = hub.fuse(job["out"], job["fused"], progress=tell)
        found = {"multiplied": len(undone.multiplied), "balanced": len(undone.balanced)}
    stages, last = {}, begin
    for stage, at in marks:
        stages[stage] = stages.get(stage, 0.0) + at - last
        last = at
    # Not ru_maxrss, which a new process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
    print(json.dumps(found | {"seconds": time.perf_counter() - begin, "stages": stages, "peak_bytes": peak}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        run_step(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
