"""What every test runs under: eight virtual CPU devices, float64, checked shapes, repeatable examples."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before jax is imported. More devices than cores, so that a sharding that does not divide is seen.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

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


@pytest.fixture
def key() -> jax.Array:
    """Return the key that a test splits for all its randomness."""
    return jax.random.key(0)
