"""The examples in the docstrings of the models run, and say what they claim."""

import doctest
import re

import jax
import jax.numpy as jnp
import pytest

from specdef_jax import models
from specdef_jax.models import gpt_oss, llama, stacking
from tests.hub.helpers_checkpoints import DATA

README = (DATA.parents[1] / "README.md").read_text()
EXAMPLES = [
    code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "hub.load" in code
]


def test_each_model_has_an_example():
    assert len(EXAMPLES) == 3
    for name in ("llama", "gpt_oss", "unet"):
        assert sum(f"tests/data/{name}" in code or f"_{name}_" in code for code in EXAMPLES) == 1


@pytest.mark.parametrize("code", EXAMPLES, ids=["llama", "gpt_oss", "unet"])
def test_the_examples_of_the_readme_run(code, capsys, monkeypatch):
    assert len(code.split("\n\n")[1].splitlines()) <= 10
    monkeypatch.chdir(DATA.parents[1])
    names = {}
    with jax.enable_x64(False):
        exec(code, names)
    assert 0 < float(capsys.readouterr().out) < 1e-3
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((names["loss"], names["slopes"])))
    if "generate" in code:
        model, text = names["model"], names["text"]
        assert text.shape == (1, 12)
        assert bool((text == model.generate(model.params, names["tokens"], 8)).all())
    else:
        assert names["image"].shape == names["noise"].shape


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
