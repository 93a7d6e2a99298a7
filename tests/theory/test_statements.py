"""Every statement at the small size: its certificates hold, and it refuses what it should."""

import json

import jax
import pytest

from theory import catalogue
from theory.sizes import Size

STATEMENTS = [s.module for s in catalogue.statements()]


@pytest.mark.parametrize("module", STATEMENTS)
def test_every_certificate_holds(module):
    report = catalogue.run(module, 7, Size.SMALL)
    assert not report.error
    assert [c for c in report.certificates if not c.holds] == []
    assert len(report.certificates) >= 3
    assert report.holds
    json.dumps(catalogue.to_dict(report), allow_nan=False)


def test_seeds_differ():
    a, b = (catalogue.run("s2_4_product_bound", seed, Size.SMALL).certificates for seed in (1, 2))
    assert [c.claim for c in a] == [c.claim for c in b]
    assert sum(x.lhs != y.lhs for x, y in zip(a, b, strict=True)) > 10


def test_x64_is_left_as_it_was():
    with jax.enable_x64(False):
        catalogue.run("s2_3_interlacing", 0, Size.SMALL)
        assert not jax.config.read("jax_enable_x64")
