"""The statements in order, and how one of them is run."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from theory.certificate import Certificate
from theory.sizes import Size

FOLDER = Path(__file__).parent
PREFIX = "s"  # s2_4_product_bound holds statement 2.4


@dataclass(frozen=True)
class Statement:
    """A module of the theory: its number, title and standing, read from the first line of its docstring."""

    module: str
    number: str
    title: str
    standing: str


@dataclass(frozen=True)
class Report:
    """What running one statement gave."""

    statement: Statement
    certificates: tuple[Certificate, ...]
    seconds: float
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether it ran, and no certificate fails."""
        return not self.error and bool(self.certificates) and not any(c.fails for c in self.certificates)


def statements() -> list[Statement]:
    """Return every statement, in the order of its number."""
    names = [m.name for m in pkgutil.iter_modules([str(FOLDER)])]
    return sorted(map(describe, filter(_is_statement, names)), key=lambda s: _order(s.number))


def run(module: str, seed: int, size: Size) -> Report:
    """Run certify of one module in float64, timed; an exception is reported, not raised."""
    begin = time.perf_counter()
    statement = describe(module)
    try:
        loaded = importlib.import_module(f"theory.{module}")
        with jax.enable_x64(True):
            key = jax.random.fold_in(jax.random.key(seed), sum(map(ord, module)))
            certificates = tuple(loaded.certify(key, size))
    except Exception as error:  # one broken statement must not hide the others
        return Report(statement, (), time.perf_counter() - begin, f"{type(error).__name__}: {error}")
    finally:
        # A process may hold some 65,000 memory maps, and the programs of a statement take thousands.
        jax.clear_caches()
    return Report(statement, certificates, time.perf_counter() - begin)


def to_dict(report: Report) -> dict[str, Any]:
    """Return plain JSON values."""
    return {
        "statement": report.statement.number,
        "title": report.statement.title,
        "standing": report.statement.standing,
        "module": report.statement.module,
        "holds": report.holds,
        "seconds": round(report.seconds, 2),
        "error": report.error,
        "certificates": [c.to_dict() for c in report.certificates],
    }


def _is_statement(name: str) -> bool:
    return name.startswith(PREFIX) and name[1:2].isdigit()


def describe(module: str) -> Statement:
    """Read 'Statement 2.4 [paper, ours]: Product bound.' from the docstring; nothing is imported."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{module}.py").read_text())) or ""
    head, _, title = docstring.split("\n", 1)[0].partition(": ")
    number, _, standing = head.removeprefix("Statement ").partition(" [")
    return Statement(module, number, title.rstrip("."), standing.rstrip("]"))


def _order(number: str) -> tuple[int, ...]:
    major, _, minor = number.partition(".")
    digits = "".join(c for c in minor if c.isdigit())
    letters = "".join(c for c in minor if not c.isdigit())
    return int(major), int(digits or 0), *map(ord, letters)
