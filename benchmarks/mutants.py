"""Does the theory notice when a bound is wrong? Every function of specdef_jax/bounds, broken on purpose.

A mutant changes one thing: the sign of a term, a product into a quotient, a square dropped, maximum into
minimum, a comparison turned round, the first of two singular values for the second, a constant by a
tenth. The statements that use the file run on it at the small size, in a process of their own; a mutant
is killed when a certificate fails or the statement breaks. One that gets past them meets the file's own
unit tests. What survives both must be in EQUIVALENT, with a reason why nothing could tell it from the
original.

    python -m benchmarks.mutants [FILE ...] [--jobs N]
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BOUNDS = ROOT / "specdef_jax" / "bounds"
THEORY = ROOT / "theory"
MOST = 3  # statements that a mutant meets
LIMIT = 240.0  # seconds; a mutant that loops for ever is killed

# (file, function, mutation) -> why it computes the same for every input that a statement may give it.
_MASKED = "the value stands where `where` does not look"
_SIGN = "B is called -B, in the loss and in what is read back alike"
_CLAMPED = "with one pair computed JAX takes the only entry for any index"
_ONE_MORE = "one more pair is computed, and the first is looked at"
_SHAPE = "the array has two axes, or the smaller number is taken: the rank is at most both"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("chain", "chain_sides", "1 -> 2"): "an update beyond the last index, which JAX drops",
    ("fast_subspace", "fast_subspace_loss", "1.0 -> 1.1"): "the infimum over B is the same for every alpha",
    ("fast_subspace", "_move", "matrix + step -> matrix - step"): _SIGN,
    ("hutchinson", "probes_needed", "1 -> 2"): _MASKED,
    ("information", "floor_interval", "1 -> 2"): _MASKED,
    ("product", "_overlaps", "1 -> 2"): "one more zero behind the singular values, where a zero is the end",
    ("product", "_smallest", "-1 -> 1"): _SHAPE,
    ("product", "_smallest", "1 -> 2"): _SHAPE,
    ("rates", "steps_to_reduce", "8 -> 9"): "how many eps count as reached: a tolerance, no mathematics",
    ("rates", "heavy_ball_factor", "-momentum * one -> -momentum / one"): "one is one",
    ("rounding_limits", "paper_compensation", "1.0 -> 1.1"): _MASKED,
    ("rounding_limits", "update_is_lost", "jnp.abs(theta) -> theta"): "an odd number is odd with either sign",
    ("sandwich", "sandwich", "0 -> 1"): _CLAMPED,
    ("sandwich", "sandwich", "1 -> 2"): _ONE_MORE,
    ("stability", "max_stable_step", "1.0 -> 1.1"): _MASKED,
}


@dataclass(frozen=True)
class Mutant:
    """One change in one function.

    Attributes:
      file: stem of the module in specdef_jax/bounds.
      function: the function it stands in.
      line: of the original source.
      change: "before -> after".
    """

    file: str
    function: str
    line: int
    change: str


def main() -> None:
    """Run every mutant and print who survived."""
    parser = argparse.ArgumentParser(description="Break the bounds one by one.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="stems of modules in specdef_jax/bounds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    files = options.files or sorted(p.stem for p in BOUNDS.glob("*.py") if p.stem != "__init__")
    begin = time.perf_counter()
    tasks = [(mutant, source) for file in files for mutant, source in mutants(file)]
    users = {file: statements_using(file) for file in files}
    print(f"{len(tasks)} mutants; statements by file: {users}", flush=True)
    rows = []
    with ThreadPoolExecutor(options.jobs) as pool:
        originals = {f: (Mutant(f, "", 0, ""), (BOUNDS / f"{f}.py").read_text(), users[f]) for f in files}
        for file, whole in zip(files, pool.map(lambda f: judge(*originals[f]), files), strict=True):
            if not whole["survived"]:  # a check that fails on the original could not tell a mutant from it
                sys.exit(f"{file} itself does not survive: {whole}")
        print(f"the originals pass, {time.perf_counter() - begin:.0f} s", flush=True)
        for mutant, verdict in pool.map(lambda t: (t[0], judge(t[0], t[1], users[t[0].file])), tasks):
            rows.append(asdict(mutant) | verdict)
            known = EQUIVALENT.get((mutant.file, mutant.function, mutant.change))
            if verdict["survived"]:
                told = f"equivalent: {known}" if known else "SURVIVED"
                print(f"{mutant.file}.{mutant.function}:{mutant.line}  {mutant.change}  {told}", flush=True)
                rows[-1]["equivalent"] = known or ""
    from benchmarks._harness import RESULTS, save  # not above: it loads the originals

    seconds = time.perf_counter() - begin
    if options.files:  # their rows, instead of those of the last run of all
        held = json.loads((RESULTS / "mutants.json").read_text())
        rows = [*(r for r in held["rows"] if r["file"] not in options.files), *rows]
        seconds += held["summary"]["seconds"]
    survivors = [r for r in rows if r["survived"] and not r["equivalent"]]
    listed = sum(r["survived"] for r in rows) - len(survivors)
    print(f"{len(rows)} mutants, {len(survivors)} survive, {listed} listed as equivalent, {seconds:.0f} s")
    counts = {"mutants": len(rows), "survivors": len(survivors), "equivalent": listed, "seconds": seconds}
    save("mutants", {"size": "small", "jobs": options.jobs}, rows, counts)
    sys.exit(1 if survivors else 0)


def judge(mutant: Mutant, source: str, statements: list[str]) -> dict[str, Any]:
    """Run the statements on a mutant, in a process of its own, until one notices."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "optax", "scipy.optimize", "scipy.stats", "flax"])
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_run, args=(mutant.file, source, statements, theirs))
    begin = time.perf_counter()
    worker.start()
    theirs.close()
    try:
        killer = ours.recv() if ours.poll(LIMIT) else "time"
    except EOFError:
        killer = "crash"
    worker.kill()
    worker.join()
    if killer == "" and mutant.function:
        killer = _unit_tests(mutant.file, source)
    return {"survived": killer == "", "killed_by": killer, "seconds": round(time.perf_counter() - begin, 1)}


def _run(file: str, source: str, statements: list[str], pipe: Any) -> None:
    """Send the name of the statement that noticed, or nothing."""
    with open(os.devnull, "w") as quiet:
        for stream in (1, 2):  # LAPACK complains there of a mutant's NaN
            os.dup2(quiet.fileno(), stream)
        from theory.__main__ import _settle_on_cpu

        _settle_on_cpu()
        import jax

        # What a mutant leaves as it was need not be compiled again.
        jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "mutants"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        sys.meta_path.insert(0, _Replaced(f"specdef_jax.bounds.{file}", source))
        from theory import catalogue
        from theory.sizes import Size

        _stop_at_the_first_failure()
        for module in statements:
            try:
                noticed = not catalogue.run(module, 0, Size.SMALL).holds
            except _Noticed:
                noticed = True
            if noticed:
                pipe.send(module)
                return
        pipe.send("")


def _unit_tests(file: str, source: str) -> str:
    """Return "unit tests" if those of the file notice, nothing if they pass."""
    options = ["-qx", "-n0", "-pno:cacheprovider", "-Wignore::pytest.PytestAssertRewriteWarning"]
    script = (
        "import sys, pytest; from benchmarks.mutants import _Replaced;"
        f"sys.meta_path.insert(0, _Replaced('specdef_jax.bounds.{file}', sys.stdin.read()));"
        "import specdef_jax.bounds;"  # before the tests' import hook, which would load the original
        f"sys.exit(pytest.main({[*options, f'tests/bounds/test_{file}.py']}))"
    )
    alone = {"NPROC": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "mutants"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    flags = (
        "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 "
        "--xla_force_host_platform_device_count=8"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=source, text=True, capture_output=True, cwd=ROOT, timeout=LIMIT,
        env={**os.environ, **alone, **cache, "XLA_FLAGS": flags}, check=False,
    )  # fmt: skip
    return "unit tests" if done.returncode else ""


class _Noticed(BaseException):
    """A certificate has failed."""


def _stop_at_the_first_failure() -> None:
    from theory.certificate import Certificate

    construct = Certificate.__init__

    def checked(self: Certificate, *args: Any, **fields: Any) -> None:
        construct(self, *args, **fields)
        if self.fails:
            raise _Noticed

    Certificate.__init__ = checked  # type: ignore[method-assign]


class _Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Load one module from a source of ours."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.source, f"<mutant of {self.name}>", "exec"), module.__dict__)


def statements_using(file: str) -> list[str]:
    """Return the statement modules that use a public name of a bounds module, the most specific first."""
    tree = ast.parse((BOUNDS / f"{file}.py").read_text())
    public = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"}
    helpers = {
        p.stem: _names(p)
        for p in THEORY.rglob("*.py")
        if not p.stem.startswith(("s0", "s1", "s2", "s3", "s5"))
    }
    indirect = {stem for stem, names in helpers.items() if names & public}
    counts = {}
    for path in sorted(THEORY.glob("s[0-9]*.py")):
        names = _names(path)
        uses = len(names & public) + sum(stem in names for stem in indirect)
        if uses:
            counts[path.stem] = uses
    return sorted(counts, key=lambda stem: -counts[stem])[:MOST]


def _names(path: Path) -> set[str]:
    """Return every name, attribute and imported module that a file mentions in code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[-1], *(a.name for a in node.names)}
    return found


def mutants(file: str) -> Iterator[tuple[Mutant, str]]:
    """Yield every mutant of a file with its source."""
    tree = ast.parse((BOUNDS / f"{file}.py").read_text())
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        skipped = set(_skipped(function))
        for node in [n for n in ast.walk(function) if id(n) not in skipped]:
            for replacement in _replacements(node):
                mutated = copy.deepcopy(_Swap(node, replacement).of(tree))
                change = f"{ast.unparse(node)} -> {ast.unparse(replacement)}"
                yield Mutant(file, function.name, getattr(node, "lineno", 0), change), ast.unparse(mutated)


def _skipped(function: ast.FunctionDef) -> Iterator[int]:
    """Yield what is no mathematics: annotations, docstrings, decorators, checks of input, inner functions."""
    parts: list[Any] = [function.args, function.returns, *function.decorator_list]
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef) and node is not function:
            parts.append(node)
        if isinstance(node, ast.Raise) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            parts.append(node)
        if isinstance(node, ast.If) and any(isinstance(n, ast.Raise) for n in node.body):
            parts.append(node)
        if isinstance(node, ast.AnnAssign):
            parts.append(node.annotation)
    for part in parts:
        if part is not None:
            yield from (id(n) for n in ast.walk(part))


_OPPOSITE: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE, ast.Eq: ast.NotEq,
}  # fmt: skip
_NAMES = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "cumsum": "cumprod"}
_DROPPED = {"square", "sqrt", "abs", "transpose", "swapaxes"}


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in place of a node."""
    if isinstance(node, ast.BinOp):
        if type(node.op) in _OPPOSITE:
            yield ast.BinOp(node.left, _OPPOSITE[type(node.op)](), node.right)
        if isinstance(node.op, ast.Pow):
            yield node.left
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _OPPOSITE:
        yield ast.Compare(node.left, [_OPPOSITE[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name in _NAMES:
            func = ast.Attribute(node.func.value, _NAMES[name], ast.Load())
            yield ast.Call(func, node.args, node.keywords)
        if name in _DROPPED and node.args:
            yield node.args[0]
    elif (
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
    ):
        value = node.value
        yield ast.Constant(value + 1 if isinstance(value, int) else 1.1 * value if value else 0.1)


class _Swap(ast.NodeTransformer):
    """A tree with one node replaced; the original stays as it is."""

    def __init__(self, node: ast.AST, replacement: ast.AST) -> None:
        self.node, self.replacement = node, replacement

    def of(self, tree: ast.AST) -> ast.AST:
        """Return the changed copy."""
        return self.visit(_shallow(tree))

    def visit(self, node: ast.AST) -> ast.AST:
        """Replace the node itself; copy the rest as it is visited."""
        if node is self.node:
            return ast.copy_location(self.replacement, node)
        copied = _shallow(node)
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.AST):
                setattr(copied, field, self.visit(value))
            elif isinstance(value, list):
                setattr(copied, field, [self.visit(x) if isinstance(x, ast.AST) else x for x in value])
        return copied


def _shallow(node: ast.AST) -> ast.AST:
    return copy.copy(node)


if __name__ == "__main__":
    main()
