"""Orbax checkpoints: read from any of its checkpointers, written so that it reads them again."""

import gc
import json
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import specdef_jax as sd
from specdef_jax import hub, trees
from specdef_jax.errors import FileError


def tree() -> dict:
    rng = np.random.default_rng(0)
    return {
        "params": {
            "dense": {"kernel": jnp.asarray(rng.normal(size=(4, 3))), "bias": jnp.ones(3, jnp.bfloat16)},
            "half": {"kernel": jnp.asarray(rng.normal(size=(3, 3)), jnp.float16)},
        },
        "blocks": [np.arange(3), {"w": np.ones((2, 2), np.float32)}],
        "step": 3,
        "empty": {},
        "none": None,
    }


def save(path: Path, value: object) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, value)
    return path


def deformed() -> tuple[dict, dict]:
    plan = sd.plan(tree(), sd.SpecDef(4.0, 2), where="dense/kernel", key=jax.random.key(0))
    return sd.apply_plan(tree(), plan), hub.details_of(plan)


def assert_same(found: object, expected: object) -> None:
    a, b = dict(trees.named_leaves(found)), dict(trees.named_leaves(expected))
    assert a.keys() == b.keys()
    for name, leaf in b.items():
        assert np.asarray(a[name]).dtype == np.asarray(leaf).dtype, name
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(leaf), err_msg=name)


def test_what_orbax_saved_is_read(tmp_path: Path):
    found = hub.read_tree(save(tmp_path / "c", tree())).params
    assert_same(found, tree())
    assert found["step"] == 3
    assert isinstance(found["step"], int)
    assert isinstance(found["blocks"], list)


def test_a_sharded_checkpoint_is_read_on_the_host(tmp_path: Path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(jnp.arange(16.0), jax.NamedSharding(mesh, jax.P("x")))
    found = hub.read_tree(save(tmp_path / "c", {"w": spread})).params["w"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, np.arange(16.0))


def test_a_deformed_tree_comes_back_and_orbax_reads_it_too(tmp_path: Path):
    value, details = deformed()
    path = tmp_path / "d"
    with jax.enable_x64(False):  # as a user has it
        hub.write_tree(path, value, metadata={"run": 7}, details=details)
        found = hub.read_tree(path)
    leaf = found.params["params"]["dense"]["kernel"]
    assert isinstance(leaf, sd.Deformed)
    assert leaf.side == value["params"]["dense"]["kernel"].side
    assert_same(found.params, value)
    assert found.metadata == {"run": 7}
    assert found.details == {"params/dense/kernel": {"basis": "symmetric", "alpha": 4.0, "k": 2}}
    merged = sd.merge(found.params)["params"]["dense"]["kernel"]
    np.testing.assert_allclose(merged, tree()["params"]["dense"]["kernel"], rtol=1e-12, atol=1e-12)
    with ocp.StandardCheckpointer() as checkpointer:
        theirs = checkpointer.restore(path)
    assert isinstance(theirs["params"]["dense"]["kernel"]["comp"], jax.Array)
    assert theirs["params"]["dense"]["kernel"]["comp"].dtype == jnp.float64
    with ocp.StandardCheckpointer() as checkpointer:  # and into the deformed tree itself
        assert_same(checkpointer.restore(path, value), value)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_an_existing_directory_is_kept_unless_asked(tmp_path: Path):
    path = save(tmp_path / "c", {"w": np.ones(2)})
    with pytest.raises(FileError, match="exists already"):
        hub.write_tree(path, {"w": np.zeros(2)})
    hub.write_tree(path, {"w": np.zeros(2)}, overwrite=True)
    assert hub.read_tree(path).params["w"].tolist() == [0.0, 0.0]


def test_ctrl_c_and_what_orbax_cannot_hold_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileError, match="cannot be saved by Orbax"):
        hub.write_tree(tmp_path / "c", {"w": object()})

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.Checkpointer, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.write_tree(tmp_path / "c", tree())
    assert list(tmp_path.iterdir()) == []


def test_directories_that_are_no_checkpoint(tmp_path: Path):
    with pytest.raises(FileError, match="give the directory that holds _METADATA"):
        hub.read_tree(tmp_path)
    save(tmp_path / "10" / "default", tree())
    with pytest.raises(FileError, match=r"give one inside it: .*10.default"):
        hub.read_tree(tmp_path)


# Orbax gives up at the first failed read and closes its event loop on those still under way.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["_METADATA", "manifest.ocdbt", "d"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str):
    path = save(tmp_path / "c", tree())
    victims = [path / damage] if damage != "d" else [p for p in path.rglob("d/*") if p.is_file()]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(FileError, match="cannot be restored"):
        hub.read_tree(path)
    time.sleep(0.2)
    gc.collect()  # so that what they leave is not found in the next test


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: "no", "record is damaged"),
        (lambda r: {"format": 1, "tensors": {"else": r["tensors"]["params/dense/kernel"]}}, "names .'else'"),
        (lambda r: {"format": 1, "tensors": {"step": r["tensors"]["params/dense/kernel"]}}, "do not fit"),
    ],
)
def test_a_sidecar_that_does_not_fit_is_refused(tmp_path: Path, change, reason: str):
    value, details = deformed()
    hub.write_tree(tmp_path / "d", value, details=details)
    sidecar = tmp_path / "d" / "specdef.json"
    new = change(json.loads(sidecar.read_text()))
    sidecar.write_text(new if isinstance(new, str) else json.dumps(new))
    with pytest.raises(FileError, match=reason):
        hub.read_tree(tmp_path / "d")


def test_a_lost_sidecar_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    value, details = deformed()
    hub.write_tree(tmp_path / "d", value, details=details)
    (tmp_path / "d" / "specdef.json").unlink()
    assert isinstance(hub.read_tree(tmp_path / "d").params["params"]["dense"]["kernel"], dict)
    assert "params/dense/kernel/comp" in caplog.text


@pytest.fixture
def state():
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (16, 8)), "b": jnp.ones(8)}
    params = sd.deform(params, sd.SpecDef(4.0), where="w", key=key)
    return {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": jnp.asarray(3)}


def test_training_state_is_restored_onto_a_mesh(tmp_path: Path, state):
    hub.write_orbax(tmp_path / "state", state)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def placed(leaf):
        spec = jax.P("x") if leaf.ndim and leaf.shape[0] % 8 == 0 else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    like = jax.tree.map(placed, state)
    found = hub.restore_orbax(tmp_path / "state", like)
    chex.assert_trees_all_equal(found, state)
    jax.tree.map(lambda x, s: chex.assert_equal(x.sharding, s.sharding), found, like)
    assert not found["params"]["w"].weight.sharding.is_fully_replicated


def test_a_restored_state_goes_on_as_if_nothing_had_happened(tmp_path: Path, state):
    optimizer = optax.adam(1e-3)

    def step(params, opt_state):
        grads = jax.grad(lambda p: jnp.sum(jnp.tanh(sd.merge(p)["w"])))(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = step(state["params"], state["opt_state"])
    hub.write_orbax(tmp_path / "state", {"params": params, "opt_state": opt_state})
    like = jax.eval_shape(lambda: {"params": params, "opt_state": opt_state})
    found = hub.restore_orbax(tmp_path / "state", like)
    chex.assert_trees_all_equal(step(found["params"], found["opt_state"]), step(params, opt_state))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
def test_a_state_of_another_shape_or_structure_is_refused(tmp_path: Path, state):
    hub.write_orbax(tmp_path / "state", state)
    for like in (state | {"step": jnp.zeros(2)}, state | {"more": jnp.zeros(2)}, {"step": state["step"]}):
        with pytest.raises(FileError, match="cannot be restored"):
            hub.restore_orbax(tmp_path / "state", like)
    time.sleep(0.2)
    gc.collect()
