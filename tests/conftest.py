"""What every test runs under: eight virtual CPU devices, float64, checked shapes, repeatable examples."""

import itertools
import os
from collections.abc import Iterator
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before jax is imported. More devices than cores, so that a sharding that does not divide is seen.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# Most of a test is compilation. XLA's older emitters take half as long, and are gone from jaxlib 0.11 on.
if "--xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"] and (
    tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  the hook below finds it by name

jax.config.update("jax_enable_x64", True)
install_import_hook("specdef_jax", "tests.typecheck.check")

# The first call of a function compiles, so examples have no deadline. CI draws the same ones every time.
hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def _room_for_programs() -> Iterator[None]:
    """Forget compiled programs before their memory maps run out; looking takes some milliseconds."""
    from specdef_jax.programs import free_when_many  # after the hook: theory imports the package

    yield
    if next(_tests_run) % 20 == 0:
        free_when_many()


@pytest.fixture
def key() -> jax.Array:
    """Return the key that a test splits for all its randomness."""
    return jax.random.key(0)
