"""specdef.json: what a deformed checkpoint says of itself, for readers and for `verify`.

Nothing is computed from what it claims to hold: `verify` and `fuse` go by the tensors, and take from here
only which of them belong together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from specdef_jax.errors import FileError
from specdef_jax.files import unreadable
from specdef_jax.hub.record import FORMAT, load_entry
from specdef_jax.hub.rewrite import Written
from specdef_jax.hub.safetensors_header import DTYPES
from specdef_jax.preservation import LayerPreservation
from specdef_jax.words import Word

MANIFEST = "specdef.json"
_DTYPES = tuple(str(dtype) for dtype in DTYPES.values())
Placement = Literal["insert", "gauge"]


@dataclass(frozen=True)
class StoredLayer:
    """One deformed tensor, or one pair of them.

    Attributes:
      entry: insert: "side", "axes" (KernelAxes), "basis", "alpha", "k"; gauge: "second", "bias", "groups".
      source_dtype: of the original tensor.
      dtype: of what is stored.
      sigma_before: leading singular values of the original (gauge: of each group, the largest).
      sigma_after: those of the stored weight.
      exact: the stored factors are the original, to the last bit.
      measured: error of the stored factors in their dtype, measured and derived, after reloading.
      status: how well the directions are known.
    """

    entry: dict[str, Any]
    source_dtype: str
    dtype: str
    sigma_before: list[float]
    sigma_after: list[float]
    exact: bool
    measured: LayerPreservation
    status: str


@dataclass(frozen=True)
class Manifest:
    """The whole checkpoint.

    Attributes:
      placement: insert or gauge.
      spec: alpha, k, basis, directions, tol, budget and seed as asked for.
      config: text of config.json without what the placement changed.
      layers: by name (gauge: of the value projection).
      dequantized: name -> dtype, tensors that replace quantized ones.
      files: every other file.
      environment: versions that wrote it.
    """

    placement: Placement
    spec: dict[str, Any]
    config: str
    layers: dict[str, StoredLayer]
    dequantized: dict[str, str]
    files: dict[str, Written]
    environment: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return strict JSON; a number that is not finite is a string."""
        found = asdict(self) | {"format": FORMAT}
        return json.dumps(plain(found), indent=1, allow_nan=False) + "\n"


def load_manifest(directory: Path) -> Manifest:
    """Read and check specdef.json.

    Raises:
      FileError: there is none, or it is damaged, or of another format.
    """
    path = directory / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise FileError(
                f"{path} has format {found['format']!r}, this version reads {FORMAT}; use the version of "
                "specdef_jax that wrote it."
            )
        if found["placement"] not in get_args(Placement):
            raise ValueError(f"placement {found['placement']!r}")
        budget = found["spec"]["budget"]
        return Manifest(
            placement=found["placement"],
            spec=found["spec"] | {"budget": float(_number(budget))},
            config=_object(found["config"]),
            layers={str(n): _layer(e, found["placement"]) for n, e in found["layers"].items()},
            dequantized={str(n): _dtype(d) for n, d in found["dequantized"].items()},
            files={str(n): Written(_text(e["sha256"]), int(e["size"])) for n, e in found["files"].items()},
            environment=dict(found["environment"]),
        )
    except FileError:
        raise
    except FileNotFoundError as error:
        raise FileError(
            f"{directory} has no {MANIFEST}, so it was not written by specdef deform; give its output."
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise FileError(
            f"{path} is damaged ({type(error).__name__}: {error}); deform the original again."
        ) from error


def _layer(found: Mapping[str, Any], placement: Placement) -> StoredLayer:
    entry = found["entry"]
    if placement == "insert":
        entry = load_entry(entry)
    else:
        bias = entry["bias"]
        entry = {
            "second": _text(entry["second"]),
            "bias": None if bias is None else _text(bias),
            "groups": int(entry["groups"]),
        } | {key: entry[key] for key in ("basis", "alpha", "k")}
    told = dict(found["measured"])
    word = Word(told.pop("word"))
    measured = LayerPreservation(
        path=_text(told.pop("path")), word=word, **{key: float(value) for key, value in told.items()}
    )
    return StoredLayer(
        entry=entry,
        source_dtype=_dtype(found["source_dtype"]),
        dtype=_dtype(found["dtype"]),
        sigma_before=[float(x) for x in found["sigma_before"]],
        sigma_after=[float(x) for x in found["sigma_after"]],
        exact=bool(found["exact"]),
        measured=measured,
        status=_text(found["status"]),
    )


def _object(text: Any) -> str:
    if not isinstance(json.loads(_text(text)), dict):
        raise ValueError("config is no JSON object")
    return text


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not float(value) > 0:
        raise ValueError(f"budget {value!r}")
    return value


def _dtype(value: Any) -> str:
    if value not in _DTYPES:
        raise ValueError(f"dtype {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def plain(value: Any) -> Any:
    """Return a value with every number that is not finite as a string."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
