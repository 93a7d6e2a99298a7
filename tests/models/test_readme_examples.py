"""The examples in the docstrings of the models run, and say what they claim."""

import doctest

import jax.numpy as jnp
import pytest

from specdef_jax import models
from specdef_jax.models import gpt_oss, llama, stacking


@pytest.mark.parametrize("module", [models, llama, gpt_oss, stacking])
def test_examples_run(module):
    done = doctest.testmod(module)
    assert done.failed == 0
    assert done.attempted >= 1


def test_the_example_of_linear_runs():
    runner = doctest.DocTestRunner()
    (example,) = doctest.DocTestFinder().find(models.linear, globs={"linear": models.linear, "jnp": jnp})
    assert runner.run(example) == (0, 1)


@pytest.mark.parametrize("module", [llama, gpt_oss])
def test_an_example_of_a_model_has_ten_statements_at_most(module):
    (example,) = [t for t in doctest.DocTestFinder(recurse=False).find(module) if t.examples]
    assert len(example.examples) <= 10
