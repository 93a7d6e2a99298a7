"""What a number was measured on: versions, device, processor, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

PACKAGES = ("specdef_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy", "scipy")


def describe() -> dict[str, object]:
    """Return the environment of this process as plain JSON values."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "x64": bool(jax.config.read("jax_enable_x64")),
        "commit": commit(),
    }


def commit() -> str:
    """Return the git commit of the installed source, "+" appended if the tree was changed, else "unknown"."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    return head + ("+" if _git(root, "status", "--porcelain") else "") if head else "unknown"


def _git(root: Path, *args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
