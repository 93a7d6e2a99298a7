"""The small reference checkpoints, and what a directory holds by the safetensors library."""

import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy

DATA = Path(__file__).parents[1] / "data"


def checkpoint(name: str, to: Path) -> Path:
    """Copy a checkpoint of tests/data, without what lies beside it."""
    to.mkdir(parents=True)
    for file in (DATA / name).iterdir():
        if file.name not in ("reference.safetensors", "config.legacy.json"):
            shutil.copyfile(file, to / file.name)
    return to


def tensors_in(path: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a directory."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(file)
    return found
