"""The examples in the docstrings of the models run, and say what they claim."""

import doctest

import jax
import jax.numpy as jnp
import pytest

from specdef_jax import models
from specdef_jax.models import gpt_oss, llama, stacking
from tests.hub.helpers_checkpoints import DATA

README = {
    "llama_tiny": """
import jax, jax.numpy as jnp
import specdef_jax as sd

model = sd.hub.load("tests/data/llama_tiny")  # any directory with a Llama in it
tokens, key = jnp.asarray([[11, 5, 97, 32]]), jax.random.key(0)
where, spec = "*mlp.up_proj.weight", sd.SpecDef(alpha=64.0)
deformed = sd.deform(model.params, spec, where=where, key=key)
print(jnp.abs(model.apply(deformed, tokens) - model.apply(model.params, tokens)).max())
text = model.generate(deformed, tokens, 8)
loss, slopes = jax.jit(jax.value_and_grad(model.loss))(deformed, text)
""",
    "gpt_oss_tiny_mxfp4": """
import jax, jax.numpy as jnp
import specdef_jax as sd

model = sd.hub.load("tests/data/gpt_oss_tiny_mxfp4")  # MXFP4 experts become plain ones
tokens, key = jnp.asarray([[11, 5, 97, 32]]), jax.random.key(0)
where, spec = "*experts.down_proj", sd.SpecDef(alpha=64.0)
deformed = sd.deform(model.params, spec, where=where, stacked=True, key=key)
print(jnp.abs(model.apply(deformed, tokens) - model.apply(model.params, tokens)).max())
text = model.generate(deformed, tokens, 8)
loss, slopes = jax.jit(jax.value_and_grad(model.loss))(deformed, text)
""",
}


@pytest.mark.parametrize("name", README)
def test_the_examples_for_the_readme_run(name, capsys, monkeypatch):
    code = README[name]
    assert len(code.split("\n\n")[1].splitlines()) <= 10
    monkeypatch.chdir(DATA.parents[1])
    names = {}
    with jax.enable_x64(False):
        exec(code, names)
    assert 0 < float(capsys.readouterr().out) < 1e-3
    model, text = names["model"], names["text"]
    assert text.shape == (1, 12)
    assert bool((text == model.generate(model.params, names["tokens"], 8)).all())
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(names["slopes"]))


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
