"""Checkpoints: whole or absent, exact, and every parameter accounted for."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import read
from jax.experimental import multihost_utils

from ttt.core.tree import named_leaves
from ttt.errors import RunError
from ttt.infra.checkpoint import (
    CheckpointError,
    Checkpoints,
    account,
    read_flat,
    read_json,
)
from ttt.infra.step_folders import run_folder

WEIGHTS = {
    "model": {
        "wte": {"weight": jnp.arange(6, dtype=jnp.bfloat16).reshape(3, 2), "bias": None},
        "ln_f": {"weight": jnp.array([1.0, 2.0], jnp.float32)},
    }
}
JSON = {"loader_state": {}, "manifest": {}}
OPT_STATE = optax.adamw(optax.linear_schedule(1.0, 0.0, 5)).init(WEIGHTS)


def save(checkpoints: Checkpoints, step: int, **changes) -> None:
    items = {
        "model_weights": WEIGHTS,
        "opt_state": OPT_STATE,
        "loader_state": {"next_index": 4 * step},
        "manifest": {"step": step, "note": "déjà vu"},
    }
    checkpoints.save(step, **(items | changes))
    checkpoints.wait()


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Checkpoints:
    """A run with one checkpoint, step 3; tests only read it."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"))
    save(checkpoints, 3)
    return checkpoints


def test_restore_gives_back_every_bit_and_the_structure(saved):
    like = {"model_weights": abstract(WEIGHTS), "opt_state": abstract(OPT_STATE)}
    restored = saved.restore(3, like)
    expected = {"model_weights": WEIGHTS, "opt_state": OPT_STATE}
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for name, leaf in named_leaves(restored).items():
        original = named_leaves(expected)[name]
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == original.dtype
        np.testing.assert_array_equal(leaf, original)
    assert saved.loader_state(3) == {"next_index": 12}
    assert saved.manifest(-1) == {"step": 3, "note": "déjà vu"}


def test_layout_is_the_published_one(saved):
    items = {path.name for path in saved.find(3).iterdir() if path.is_dir()}
    assert items >= {"model_weights", "opt_state", "train_ds_iter", "manifest"}
    position = saved.find(3) / "train_ds_iter" / "global_batch_progress.json"
    assert json.loads(position.read_text()) == {"next_index": 12}


def test_run_folder_is_root_folder_name(tmp_path):
    assert run_folder(tmp_path, "exp", "run") == tmp_path / "exp" / "run"


@pytest.mark.parametrize("scalar", [np.int64(7), np.float32(0.5), 3, True])
def test_scalars_that_orbax_refuses_come_back_exactly(tmp_path, scalar):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 0, opt_state={"count": scalar})
    like = {"opt_state": {"count": np.asarray(scalar)}}
    count = checkpoints.restore(0, like)["opt_state"]["count"]
    assert isinstance(count, np.ndarray)
    assert count.dtype == np.asarray(scalar).dtype
    assert count == scalar


@pytest.mark.parametrize("leaf", [np.zeros((0, 3)), "text"])
def test_a_leaf_without_numbers_is_named_before_anything_is_written(tmp_path, leaf):
    with pytest.raises(CheckpointError, match=r"a\.b: "):
        save(Checkpoints(tmp_path / "run"), 0, opt_state={"a": {"b": leaf}})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"wte": {"weight": (3, 5)}},
            r"wte.weight: float32\[3, 5\] requested, bfloat16\[3, 2\] stored",
        ),
        (
            {"wte": {"weight": (3, 2)}},
            r"wte.weight: float32\[3, 2\] requested, bfloat16\[3, 2\] stored",
        ),
        ({}, r"ln_f.weight: nothing requested, float32\[2\] stored"),
        ({"more": (1,)}, r"model.more: float32\[1\] requested, nothing stored"),
    ],
)
def test_an_exact_restore_names_whatever_differs(saved, weights, message):
    like = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        {"model": weights},
        is_leaf=lambda x: isinstance(x, tuple),
    )
    with pytest.raises(CheckpointError, match=message):
        saved.restore(3, {"model_weights": like})


def test_missing_runs_steps_and_items_say_what_there_is(saved, tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path / 'absent'}"):
        Checkpoints(tmp_path / "absent").find()
    with pytest.raises(CheckpointError, match="has no step 4: choose one of 3"):
        saved.restore(4, {})
    with pytest.raises(CheckpointError, match="no item 'ema': it has manifest, model_weights"):
        saved.restore(3, {"ema": {}})
    with pytest.raises(CheckpointError, match="no item 'ema'"):
        read_flat(saved.find(3), "ema")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_flat(tmp_path / "absent" / "7", "model_weights")


def test_looking_makes_no_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps() == []
    assert checkpoints.latest() is None
    assert not (tmp_path / "run").exists()


def test_retention_keeps_the_latest_and_the_milestones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, milestone_freq=4)
    for step in (2, 4, 6, 7, 9):
        save(checkpoints, step, opt_state={"x": np.ones(1)})
    assert checkpoints.steps() == [4, 7, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "7", "9"]


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="keep_checkpoints=0"):
        Checkpoints(tmp_path, keep=0)


def test_a_saved_step_is_not_overwritten(saved):
    with pytest.raises(CheckpointError, match="has a step 3 already"):
        save(saved, 3)


KILLED_SAVE = """
import os, pathlib, sys
import numpy as np
from ttt.infra.checkpoint import Checkpoints

pathlib.Path.rename = pathlib.Path.replace = os.rename = os.replace = lambda *a, **k: os._exit(9)
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(
    5, model_weights={"w": np.ones(3)}, opt_state={"m": np.ones(3)}, loader_state={}, manifest={}
)
checkpoints.wait()
"""


def test_a_save_killed_before_its_commit_is_no_checkpoint_and_is_cleaned_up(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED_SAVE, str(tmp_path)], check=False)
    assert killed.returncode == 9
    left = [path.name for path in tmp_path.iterdir()]
    assert any(name.startswith("5.") for name in left)
    assert checkpoints.latest() is None
    (tmp_path / "4.deleting").mkdir()  # and a deletion that was cut off
    save(checkpoints, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_a_save_is_of_the_moment_it_was_asked_for(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    weights = {str(i): jnp.full((512, 512), i, jnp.float32) for i in range(8)}
    expected = jax.tree.map(np.array, weights)
    checkpoints.save(1, model_weights=weights, opt_state={"m": np.ones(1)}, **JSON)
    for _ in range(5):  # the buffers that are being written are given away
        weights = step(weights)
    checkpoints.wait()
    jax.tree.map(
        np.testing.assert_array_equal, read_flat(tmp_path / "1", "model_weights"), expected
    )


# ---- damage ------------------------------------------------------------------------------


def largest_file(folder):
    data = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
    return max(data, key=lambda path: path.stat().st_size)


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "bytes, .* were saved": truncate,
    "SHA-256 differs": flip_a_bit,
    "train_ds_iter.* is missing": lambda folder: shutil.rmtree(folder / "train_ds_iter"),
    "opt_state.* is missing": lambda folder: shutil.rmtree(folder / "opt_state"),
    r"hashes\.json or what it names cannot be read": lambda folder: (
        folder / "hashes.json"
    ).unlink(),
    r"hashes\.json .*cannot be read": lambda folder: (folder / "hashes.json").write_text('{"a": '),
    "names no file": lambda folder: (folder / "hashes.json").write_text("{}"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_damage_is_found_and_the_newest_good_checkpoint_taken(tmp_path, caplog, fault):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (3, 6):
        save(checkpoints, step)
    assert checkpoints.find_good() == 6
    DAMAGES[fault](tmp_path / "6")
    with caplog.at_level("WARNING", "ttt"):
        assert checkpoints.find_good() == 3
    assert re.search(f"CHECKPOINT 6 IS BROKEN: .*{fault}", caplog.text)
    with pytest.raises(CheckpointError, match=f"(?s)can be used.*{fault}.*Nothing was changed"):
        checkpoints.find_good(6)
    assert checkpoints.steps() == [3, 6]
    checkpoints.put_aside_after(3)
    assert checkpoints.steps() == [3]
    assert (tmp_path / "6.broken").is_dir()
    save(checkpoints, 6)
    assert checkpoints.find_good() == 6


def test_published_checkpoints_without_hashes_are_taken_as_they_are(golden, caplog):
    assert Checkpoints(golden / "published_checkpoint").find_good() == 7
    assert caplog.text == ""


FULL_DISK = """
import resource, signal, sys
import numpy as np
from ttt.errors import RunError
from ttt.infra.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
items = {"model_weights": {"w": np.ones(1000)}, "opt_state": {"m": np.ones(1000)}}
checkpoints.save(3, **items, loader_state={}, manifest={})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes of a file
try:
    checkpoints.save(6, **items, loader_state={}, manifest={})
    checkpoints.wait()
except RunError as error:
    sys.exit(f"refused: {error}")
"""


def test_a_disk_that_takes_no_more_is_told_and_the_last_checkpoint_stays(tmp_path):
    # In a process of its own: the limit holds for every file that the process writes.
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    full = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    assert re.search(r"refused: .*step 6 could not be written(?s:.*)step 3 is intact", full.stderr)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [3]
    assert checkpoints.find_good() == 3
    save(checkpoints, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_what_the_first_process_sees_holds_for_a_process_that_sees_nothing(tmp_path, monkeypatch):
    """A shared file system shows a new folder to one host before another."""
    said = iter([1, 0, 7])  # there are steps; no refusal; the step
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda mine: next(said))
    assert Checkpoints(tmp_path / "not there yet").newest_good() == 7
    assert next(said, None) is None


def check_until_it_fails(checkpoints):
    """As a run does, after each of its steps."""
    while True:
        checkpoints.check()


def test_what_the_last_steps_of_a_save_meet_is_told_too(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        checkpoints.save(6, model_weights=WEIGHTS, opt_state={"m": np.ones(1)}, **JSON)
        with pytest.raises(RunError, match="No space left on device"):
            check_until_it_fails(checkpoints)
    assert checkpoints.steps() == [3]


def test_restore_puts_arrays_on_the_sharding_asked_for(saved):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), WEIGHTS
    )
    restored = saved.restore(3, {"model_weights": like})
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored))


def test_flat_reading_gives_host_arrays_without_the_absent_leaves(saved):
    flat = read_flat(saved.find(), "model_weights")
    assert set(flat) == {"model.wte.weight", "model.ln_f.weight"}
    assert all(isinstance(array, np.ndarray) for array in flat.values())
    np.testing.assert_array_equal(flat["model.wte.weight"], WEIGHTS["model"]["wte"]["weight"])
    assert flat["model.wte.weight"].dtype == jnp.bfloat16


def test_a_published_checkpoint_reads_by_name(golden):
    checkpoints = Checkpoints(golden / "published_checkpoint")
    assert checkpoints.steps() == [7]
    flat = read_flat(checkpoints.find(), "model_weights")
    arrays = read(golden, "e2e_meta")[1]
    names = [key for key in arrays if key.startswith("param.")]
    expected = {key.removeprefix("param."): arrays[key] for key in names}
    assert flat.keys() == expected.keys()
    for name, array in flat.items():
        np.testing.assert_array_equal(array, expected[name])
    assert read_json(checkpoints.find(), "train_ds_iter") == {"next_index": 20}
    assert "1.0.mu.language_model.model.ln_f.weight" in read_flat(checkpoints.find(), "opt_state")
    with pytest.raises(CheckpointError, match="no item 'manifest'"):
        checkpoints.manifest(7)


def test_an_account_restores_casts_initialises_and_lists_the_unused():
    target = {
        "a.w": jax.ShapeDtypeStruct((2,), jnp.bfloat16),
        "prime.w": jax.ShapeDtypeStruct((3,), jnp.float32),
        "prime.v": jax.ShapeDtypeStruct((1,), jnp.float32),
    }
    source = {
        "a.w": np.array([1.0, 2.0], np.float32),
        "prime.v": np.ones(1, np.float32),
        "head.w": np.ones(4, np.float32),
    }
    restored, summary = account(target, source, may_initialise=["prime.**"])
    assert restored.keys() == {"a.w", "prime.v"}
    assert restored["a.w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(restored["a.w"].astype(np.float32), source["a.w"])
    assert summary.initialised == ("prime.w",)
    assert summary.unused == ("head.w",)
    assert json.loads(json.dumps(asdict(summary)))["restored"] == ["a.w", "prime.v"]
    assert str(summary).splitlines() == [
        "restored 2 of 3 parameters",
        "initialised anew: prime.w",
        "cast: a.w (float32 to bfloat16)",
        "unused in the checkpoint: head.w",
    ]


def test_an_account_without_exceptions_is_one_line():
    array = {"a": np.ones(2)}
    assert str(account(array, array)[1]) == "restored 1 of 1 parameters"


def test_every_fault_is_named_and_a_wrong_shape_is_never_initialised():
    target = {
        "prime.w": np.zeros((3, 2), np.float32),
        "a.w": np.zeros((2,), np.float32),
        "b.count": np.zeros((), np.int32),
        "c.w": np.zeros((), np.float32),
    }
    source = {
        "prime.w": np.zeros((2, 3), np.float32),
        "b.count": np.zeros((), np.float32),
        "c.w": np.zeros((), np.float64),
    }
    with pytest.raises(CheckpointError) as error:
        account(target, source, may_initialise=["prime.**"])
    message = str(error.value)
    assert "3 of 4 parameters" in message
    assert "prime.w: float32[3, 2] expected, float32[2, 3] in the checkpoint" in message
    assert "a.w: float32[2] expected, none in the checkpoint" in message
    assert "b.count: int32[] expected, float32[] in the checkpoint" in message
    assert "c.w" not in message
