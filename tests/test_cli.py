"""The command, run in this process: exit codes, what it prints, and what it leaves on disk."""

import builtins
import errno
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from rich.console import Console

import specdef_jax as sd
from specdef_jax import hub
from specdef_jax.cli import console, main
from specdef_jax.hub import safetensors_file

NAME = "model.layers.0.mlp.up_proj.weight"


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        NAME: rng.normal(size=(6, 4)).astype(np.float32),
        "model.layers.1.mlp.up_proj.weight": rng.normal(size=(6, 4)),
        "model.layers.0.norm.weight": np.ones(4, np.float32),
        "model.embed_tokens.weight": np.ones((7, 4), np.float32),
        "ids": np.arange(6).reshape(2, 3),
        "heads": np.ones((2, 3, 4), np.float32),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    safetensors.numpy.save_file(weights(), path, metadata={"format": "pt"})
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def deform(source: Path, out: Path, *options: str) -> int:
    return main(["deform", str(source), str(out), "--layers", "up_proj.weight", *options])


def test_deform_then_inspect_a_safetensors_file(source: Path, out: Path, capsys):
    before = source.read_bytes()
    globbed = ["--layers", "layers.*.mlp.up_proj.weight", "--alpha", "64", "--k", "2"]
    with jax.enable_x64(False):  # as a user has it
        assert main(["deform", str(source), str(out), *globbed]) == 0
    printed = capsys.readouterr().out
    assert "2 deformed" in printed
    assert NAME in printed
    assert source.read_bytes() == before

    found = hub.read_tree(out)
    assert found.metadata == {"format": "pt"}
    for name, expected in weights().items():
        leaf = found.params[name]
        assert isinstance(leaf, sd.Deformed) == ("up_proj" in name), name
        merged = np.asarray(sd.merge(leaf))
        assert merged.dtype == expected.dtype
        if isinstance(leaf, sd.Deformed):
            bound = 256 * np.finfo(expected.dtype).eps * np.abs(expected).max()
            assert np.abs(merged - expected).max() <= bound
        else:
            assert merged.tobytes() == expected.tobytes()

    assert main(["inspect", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows.keys() == weights().keys()
    assert rows[NAME]["deformed"] == {"side": "input", "basis": "symmetric", "alpha": 64.0, "k": 2}
    assert rows[NAME]["shape"] == [6, 4]
    oracle = np.linalg.svd(np.asarray(found.params[NAME].weight, float), compute_uv=False)
    np.testing.assert_allclose(rows[NAME]["singular_values"], oracle[:3], rtol=1e-5)
    np.testing.assert_allclose(rows[NAME]["gap"], max(oracle[:2] / oracle[1:3]), rtol=1e-5)
    assert rows["ids"]["singular_values"] is None
    assert rows["heads"]["note"] == "axes unknown"
    assert main(["inspect", str(out), "--layers", "up_proj.weight"]) == 0
    printed = capsys.readouterr().out
    assert NAME in printed
    assert "embed" not in printed


def test_deform_then_inspect_an_orbax_checkpoint(tmp_path: Path, capsys):
    kernel = np.random.default_rng(0).normal(size=(5, 3))
    tree = {"params": {"dense": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(3)}}, "step": 3}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", tree)
    assert main(["deform", str(tmp_path / "in"), str(tmp_path / "out"), "--alpha", "8"]) == 0
    found = hub.read_tree(tmp_path / "out").params
    assert found["step"] == 3
    assert found["params"]["dense"]["kernel"].side == "output"  # (in, out) = (5, 3): the smaller side
    np.testing.assert_allclose(sd.merge(found)["params"]["dense"]["kernel"], kernel, rtol=1e-12, atol=1e-12)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "side output, basis symmetric, alpha 8.0, k 1" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ("--side output", lambda leaf: leaf.side == "output"),
        ("--layout jax", lambda leaf: leaf.axes.inputs == (0,)),
        ("--layout hf", lambda leaf: leaf.axes.inputs == (1,)),
    ],
)
def test_options_reach_the_plan(
    source: Path, out: Path, options: str, changed: Callable[[sd.Deformed], bool]
):
    assert deform(source, out, "--alpha", "2", *options.split()) == 0
    assert changed(hub.read_tree(out).params[NAME])


def test_options_change_the_result_and_a_seed_repeats_it(source: Path, tmp_path: Path):
    runs = {
        "plain": "",
        "again": "",
        "k": "--k 2",
        "basis": "--basis rotated",
        "axis": "--basis axis",
        "bottom": "--directions bottom",
        "random": "--directions random",
        "seed": "--directions random --seed 1",
    }
    stored = {}
    for run, options in runs.items():
        assert deform(source, tmp_path / f"{run}.safetensors", "--alpha", "2", *options.split()) == 0
        leaf = hub.read_tree(tmp_path / f"{run}.safetensors").params[NAME]
        stored[run] = (np.asarray(leaf.weight).tobytes(), np.asarray(leaf.comp).tobytes())
    assert stored["plain"] == stored["again"]
    assert len(set(stored.values())) == len(runs) - 1


def broken(**changes: np.ndarray) -> Callable[[Path], None]:
    return lambda path: safetensors.numpy.save_file(weights() | changes, path)


def nan(value: float) -> Callable[[Path], None]:
    weight = weights()[NAME]
    weight[1, 2] = value
    return broken(**{NAME: weight})


BAD_INPUT = {
    "nan": (nan(np.nan), [], f"'{NAME}' holds NaN or Inf"),
    "inf": (nan(np.inf), [], f"'{NAME}' holds NaN or Inf"),
    "k too large": (None, ["--k", "5"], rf"'{NAME}': k = 5 exceeds min\(m, n\) = 4"),
    "k zero": (None, ["--k", "0"], "k = 0: .* integer >= 1"),
    "alpha zero": (None, ["--alpha", "0"], "alpha = 0.0: must be positive and finite"),
    "alpha negative": (None, ["--alpha", "-1"], "alpha = -1.0: must be positive"),
    "alpha nan": (None, ["--alpha", "nan"], "alpha = nan: must be positive and finite"),
    "alpha inf": (None, ["--alpha", "inf"], "alpha = inf: must be positive and finite"),
    "alpha beyond the budget": (None, ["--alpha", "1e9"], f"'{NAME}'.*alpha"),
    "nothing matches": (
        None,
        ["--layers", "no.such"],
        r"match\('no.such'\) matched nothing. Matrices.*" + NAME,
    ),
    "only a vector": (None, ["--layers", "norm.weight"], "matched only leaves that are no kernels"),
    "integers": (None, ["--layers", "ids"], "'ids' has dtype int64: .*dequantize"),
    "ambiguous axes": (None, ["--layers", "heads"], r"'heads' has shape \(2, 3, 4\), which is ambiguous"),
    "no layers": (None, ["--layers", ""], "at least one glob"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1]), [], "in.safetensors.* truncated or corrupt"),
    "corrupt": (lambda p: p.write_bytes(b"\x10" + p.read_bytes()[1:]), [], "in.safetensors.* corrupt"),
    "missing": (lambda p: p.unlink(), [], "in.safetensors does not exist"),
    "not a number": (None, ["--alpha", "x"], "could not convert string to float"),
    "unknown option": (None, ["--alhpa", "2"], "alhpa"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_exit_code_2(source: Path, out: Path, case: str, capsys):
    damage, options, message = BAD_INPUT[case]
    if damage is not None:
        damage(source)
    before = source.read_bytes() if source.exists() else None
    assert deform(source, out, *options) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err)
    assert "Traceback" not in printed.err
    if not options or options[-1] not in ("x", "2"):  # the parser draws a box
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("specdef: ")
    assert printed.out == ""
    assert not out.exists()
    assert [p for p in out.parent.iterdir() if p != source] == []
    assert (source.read_bytes() if source.exists() else None) == before


def test_a_deformed_kernel_is_not_deformed_again(source: Path, out: Path, tmp_path: Path, capsys):
    assert deform(source, out, "--alpha", "2") == 0
    assert deform(out, tmp_path / "twice.safetensors", "--alpha", "2") == 2
    assert f"'{NAME}' is deformed already" in capsys.readouterr().err


def test_one_kernel_after_another(source: Path, out: Path, tmp_path: Path):
    """What an earlier run recorded is kept."""
    assert main(["deform", str(source), str(out), "--layers", "0.mlp.up_proj.weight", "--alpha", "2"]) == 0
    last = tmp_path / "last.safetensors"
    assert main(["deform", str(out), str(last), "--layers", "1.mlp.up_proj.weight", "--alpha", "4"]) == 0
    assert {d["alpha"] for d in hub.read_tree(last).details.values()} == {2.0, 4.0}


def test_outputs_that_would_touch_something(source: Path, out: Path, tmp_path: Path, capsys):
    assert deform(source, source, "--overwrite") == 2
    assert "inputs are never modified" in capsys.readouterr().err
    (tmp_path / "link.safetensors").symlink_to(source)
    assert deform(source, tmp_path / "link.safetensors", "--overwrite") == 2
    assert "inputs are never modified" in capsys.readouterr().err
    assert deform(source, tmp_path / "directory") == 2
    assert "name a .safetensors file" in capsys.readouterr().err
    (tmp_path / "checkpoint").mkdir()
    assert deform(tmp_path / "checkpoint", out) == 2
    assert "name a directory" in capsys.readouterr().err
    assert deform(tmp_path, tmp_path / "inside") == 2
    assert "inputs are never modified" in capsys.readouterr().err
    out.write_text("mine")
    assert deform(source, out, "--alpha", "2") == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert deform(source, out, "--alpha", "2", "--overwrite") == 0
    assert isinstance(hub.read_tree(out).params[NAME], sd.Deformed)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "No space left on device; free some space"),
    ],
)
def test_ctrl_c_and_a_full_disk_leave_nothing(
    source: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
    error: BaseException,
    code: int,
    message: str,
):
    def fail(leaf: object, part: int) -> None:
        raise error

    monkeypatch.setattr(safetensors_file, "bytes_of", fail)
    assert deform(source, out, "--alpha", "2") == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert list(out.parent.iterdir()) == [source]


def test_a_missed_tolerance_is_explained_not_refused(source: Path, out: Path, capsys):
    flat = np.random.default_rng(1).normal(size=(300, 300)).astype(np.float32)
    safetensors.numpy.save_file({"w.kernel": flat}, source)
    assert main(["deform", str(source), str(out), "--k", "2", "--tol", "1e-6"]) == 0
    printed = capsys.readouterr().out
    assert "flat spectrum" in printed or "stalled" in printed
    assert "exact all the same" in printed


def test_a_damaged_checkpoint_is_one_line_from_the_process_too(tmp_path: Path):
    """Orbax's threads write tracebacks of their own when a read fails."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {f"w{i}": jnp.ones((3, 3)) for i in range(5)})
    for part in tmp_path.rglob("d/*"):
        if part.is_file():
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    code = "import sys; from specdef_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "inspect", str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"specdef: {tmp_path / 'c'} cannot be restored")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_inspect_says_what_it_cannot_measure(source: Path, capsys):
    bad = weights()[NAME]
    bad[0, 0] = np.nan
    arrays = {"bad": bad, "empty": np.zeros((0, 3), np.float32), "zero": np.zeros((3, 3), np.float32)}
    safetensors.numpy.save_file(arrays | {"a[b]": np.eye(3)}, source)
    assert main(["inspect", str(source), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
    assert rows["bad"]["note"] == "holds NaN or Inf"
    assert rows["empty"]["note"] == "empty"
    assert rows["zero"]["singular_values"] == [0.0, 0.0, 0.0]
    assert rows["zero"]["gap"] is None
    assert rows["a[b]"]["gap"] == pytest.approx(1.0)
    assert main(["inspect", str(source)]) == 0
    assert "a[b]" in capsys.readouterr().out
    assert main(["inspect", str(source), "--layers", "none"]) == 2
    assert "'none' matched nothing" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["deform", "--help"], ["inspect", "--help"]])
def test_help(arguments: list[str], capsys):
    assert main(arguments) == 0
    assert "usage: specdef" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["none"], ["inspect"], ["certify", "--size", "huge"]])
def test_arguments_that_do_not_parse(arguments: list[str], capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("missing", ["tyro", "rich"])
def test_a_missing_extra_says_how_to_install_it(missing: str, monkeypatch: pytest.MonkeyPatch, capsys):
    load = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "specdef_jax.cli.commands":
            raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["--help"]) == 2
    assert "pip install 'specdef_jax[cli]'" in capsys.readouterr().err


class _Certified:
    holds = True

    def summary_rows(self) -> list[dict[str, object]]:
        return [{"certificate": "preservation", "holds": self.holds}]


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (False, 1)])
def test_certify_exits_1_when_a_certificate_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, holds: bool, code: int
):
    seen = {}

    def certify(
        out: Path, config: object, *, task: object, fresh: bool, progress: Callable[[str, int, int], None]
    ) -> object:
        seen.update(out=out, config=config, fresh=fresh)
        progress("race", 1, 2)
        found = _Certified()
        found.holds = holds
        return found

    monkeypatch.setattr("specdef_jax.certification.certify", certify)
    assert main(["certify", "--out", str(tmp_path), "--size", "smoke", "--fresh"]) == code
    assert seen["out"] == tmp_path
    assert seen["fresh"] is True
    assert seen["config"].size == "smoke"
    assert "report.html" in capsys.readouterr().out


def test_progress_is_a_line_now_and_then_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(console, "_LOG_EVERY", 0.0)
    clock = iter((0.0, 1.0, 2.0, 6.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.reporting() as report:
        report("reading", 0, 0)
        report("writing", 0, 4)
        report("writing", 1, 4)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["reading ...", "writing: 0 of 4", "writing: 1 of 4, about 12 s left"]
    assert printed.out == ""


def test_progress_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(console, "Console", functools.partial(Console, force_terminal=True))
    with console.reporting() as report:
        report("reading", 0, 0)
        report("writing", 1, 2)
    assert "writing" in capsys.readouterr().err
