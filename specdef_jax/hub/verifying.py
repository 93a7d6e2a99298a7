"""Check a deformed checkpoint against its original: everything is computed again from the two directories."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from specdef_jax.hub import gauging, insertion
from specdef_jax.hub.attention import pair_at
from specdef_jax.hub.copying import parts_of, sha256_of
from specdef_jax.hub.deforming import config_text
from specdef_jax.hub.fusing import check_pair, inserted
from specdef_jax.hub.manifest import MANIFEST, Manifest, load_manifest, plain
from specdef_jax.hub.placing import leading
from specdef_jax.hub.planning import meets
from specdef_jax.hub.quantized import find_quantized
from specdef_jax.hub.safetensors_file import COMP
from specdef_jax.hub.shards import CONFIG, Shards, open_shards
from specdef_jax.hub.tensors import Tensor, tensors_of
from specdef_jax.hub.working import Step, default_workers, in_order
from specdef_jax.preservation import LayerPreservation

_SIGMA = 0.05  # to which leading singular values, found by iteration, are compared


@dataclass(frozen=True)
class VerifiedLayer:
    """One deformed layer, measured again.

    Attributes:
      measured: error of the stored factors against the original.
      exact: they are the original, to the bit.
      dtype: of the stored factors.
      holds: the derived bound held, the error is within the budget that the manifest states, and so are
        the singular values, before and after.
    """

    measured: LayerPreservation
    exact: bool
    dtype: str
    holds: bool


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
      placement: insert or gauge.
      layers: by name.
      identical: number of tensors that are those of the original, byte for byte.
      files: number of files whose sha256 is that of the manifest.
      problems: everything that is not as it should be, in words.
    """

    placement: str
    layers: dict[str, VerifiedLayer]
    identical: int
    files: int
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every layer holds and nothing else was changed."""
        return not self.problems and all(layer.holds for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, a number that is not finite as a string."""
        return plain(asdict(self) | {"holds": self.holds})


def verify_directory(
    out: Path | str, against: Path | str, *, workers: int | None = None, progress: Step | None = None
) -> Verification:
    """Check that a directory is the deformation of another, and nothing else.

    Of specdef.json only the names of what was deformed, the axes and the budget are taken; errors, singular
    values and bounds are computed from the tensors, every other tensor and file is compared byte by byte.

    Args:
      out: a directory that deform_directory wrote.
      against: the original.
      workers: tensors at work at a time.
      progress: progress(stage, done, total).

    Raises:
      FileError: either directory is damaged, or `out` has no manifest, or one that does not fit its tensors.
    """
    out, against = Path(out), Path(against)
    tell = progress or (lambda stage, done, total: None)
    manifest = load_manifest(out)
    made, original = open_shards(out), open_shards(against)
    dtypes = {np.dtype(d) for d in manifest.dequantized.values()}
    tensors = tensors_of(original, dtypes.pop() if dtypes else None)
    problems, files = _check_files(made, manifest, tell)
    problems += _check_config(made, original, manifest)
    problems += _check_records(made, manifest)
    problems += _check_others(made, original)
    untouched = sorted(set(tensors) - _touched(original, tensors, manifest, problems))
    problems += _check_names(made, tensors, manifest)
    count = workers or default_workers()
    compared = [name for name in untouched if name in made]
    same = in_order(
        lambda name: _same(made, original, tensors[name]),
        compared,
        lambda name: 0 if not tensors[name].parts else tensors[name].size,
        workers=count,
        told=lambda done: tell("comparing", done, len(untouched)),
    )
    problems += [f"'{n}' differs from the original" for n, s in zip(compared, same, strict=True) if not s]
    names = [name for name in manifest.layers if name in tensors and name in made]
    # Probes that nobody can know in advance: an error may hide from fixed ones.
    keys = jax.random.split(jax.random.key(secrets.randbits(32)), max(len(names), 1))[: len(names)]
    layers = in_order(
        lambda item: _layer(made, original, tensors, manifest, *item),
        list(zip(names, keys, strict=True)),
        lambda item: tensors[item[0]].size,
        workers=count,
        told=lambda done: tell("measuring", done, len(names)),
    )
    return Verification(
        manifest.placement, dict(zip(names, layers, strict=True)), sum(same), files, tuple(problems)
    )


def _layer(
    made: Shards,
    original: Shards,
    tensors: dict[str, Tensor],
    manifest: Manifest,
    name: str,
    key: PRNGKeyArray,
) -> VerifiedLayer:
    told = manifest.layers[name]
    entry = told.entry
    if manifest.placement == "insert":
        axes, side = entry["axes"], entry["side"]
        check_pair(made, name, entry)
        kernel, weight, comp = tensors[name].read(), made.read(name), made.read(name + COMP)
        measured, exact = insertion.measure_pair(name, kernel, weight, comp, axes, side, key)
        dtype = weight.dtype
        sigmas = [leading(x, axes, len(told.sigma_after), key, side) for x in (kernel, weight)]
    else:
        pair = pair_at(original, name)
        matrices = gauging.matrices_of(original, pair), gauging.matrices_of(made, pair)
        measured, exact = gauging.measure_pair(*matrices, pair, key)
        dtype = matrices[1][0].dtype
        sigmas = [
            gauging.leading_of_groups(shards, pair, len(told.sigma_after), key) for shards in (original, made)
        ]
    broken = measured.bound_ratio > 1
    as_told = all(
        len(a) == len(b) and np.allclose(a, b, rtol=_SIGMA)
        for a, b in zip(sigmas, (told.sigma_before, told.sigma_after), strict=True)
    )
    within = meets(measured, exact, float(manifest.spec["budget"]))
    return VerifiedLayer(measured, exact, str(dtype), within and not broken and as_told)


def _touched(
    original: Shards, tensors: dict[str, Tensor], manifest: Manifest, problems: list[str]
) -> set[str]:
    """Return the tensors of the original that may differ."""
    found: set[str] = set()
    for name in manifest.layers:
        found.add(name)
        if name not in tensors:
            problems.append(f"'{name}' of the manifest is not in the original")
        elif manifest.placement == "gauge":
            found |= set(pair_at(original, name).names)
    return found


def _check_names(made: Shards, tensors: dict[str, Tensor], manifest: Manifest) -> list[str]:
    comps = {name + COMP for name in manifest.layers} if manifest.placement == "insert" else set()
    expected, found = set(tensors) | comps, set(made)
    return [f"'{n}' is missing" for n in sorted(expected - found)] + [
        f"'{n}' is in neither the original nor the manifest" for n in sorted(found - expected)
    ]


def _check_files(made: Shards, manifest: Manifest, tell: Step) -> tuple[list[str], int]:
    problems, whole = [], 0
    present = {CONFIG, *(s.name for s in made.shards), *made.others, *([made.index] if made.index else [])}
    problems += [f"{n} is not in the manifest" for n in sorted(present - {MANIFEST} - set(manifest.files))]
    total = sum(entry.size for entry in manifest.files.values())
    done = 0
    for name, entry in manifest.files.items():
        if name not in present:
            problems.append(f"{name} is missing")
            continue
        if sha256_of(made.path / name) == entry.sha256:
            whole += 1
        else:
            problems.append(f"{name} is not the file that was written: its sha256 differs")
        done += entry.size
        tell("hashing", done, total)
    return problems, whole


def _check_config(made: Shards, original: Shards, manifest: Manifest) -> list[str]:
    """Compare configs: that of the output must be what deform makes of the original's, and nothing else."""
    expected = dict(original.config)
    if manifest.dequantized:
        expected.pop("quantization_config", None)
    problems = []
    if manifest.config != config_text(original, expected):
        problems.append(f"the manifest does not hold the original's {CONFIG}")
    if manifest.placement == "insert":
        expected |= insertion.own_config(expected)
    keys = {key for key in {*made.config, *expected} if made.config.get(key) != expected.get(key)}
    keys |= made.config.keys() ^ expected.keys()
    problems += [f"{CONFIG} differs from the original in '{key}'" for key in sorted(keys)]
    quantized = set(find_quantized(original))
    if manifest.dequantized and set(manifest.dequantized) != quantized:
        problems.append("the manifest names other tensors as dequantized than were quantized")
    return problems


def _check_records(made: Shards, manifest: Manifest) -> list[str]:
    """Compare what the headers say, by which loaders go, with the manifest."""
    told = inserted(made)
    inserts = manifest.layers if manifest.placement == "insert" else {}
    claimed = {name: layer.entry for name, layer in inserts.items()}
    return [
        f"the headers say of '{name}' what the manifest does not"
        for name in sorted({*told, *claimed})
        if told.get(name) != claimed.get(name)
    ]


def _check_others(made: Shards, original: Shards) -> list[str]:
    ours, theirs = set(made.others) - {MANIFEST}, set(original.others)
    problems = [f"{name} is missing" for name in sorted(theirs - ours)]
    problems += [f"{name} is not in the original" for name in sorted(ours - theirs)]
    problems += [f"{name} is not in the original" for name in made.left_out]
    return problems + [
        f"{name} differs from the original"
        for name in sorted(ours & theirs)
        if sha256_of(made.path / name) != sha256_of(original.path / name)
    ]


def _same(made: Shards, original: Shards, tensor: Tensor) -> bool:
    """Tell whether a tensor is that of the original, dtype, shape and bytes."""
    info = made.info(tensor.name)
    if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
        return False
    if tensor.parts:
        return made.read(tensor.name).tobytes() == tensor.read().tobytes()
    theirs = original.info(tensor.name)
    pairs = zip(
        parts_of(made.path / made.shard_of(tensor.name).name, info.start, info.stop),
        parts_of(original.path / original.shard_of(tensor.name).name, theirs.start, theirs.stop),
        strict=True,
    )
    return all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pairs)
