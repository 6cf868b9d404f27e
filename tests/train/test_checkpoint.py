"""Checkpoints restore exactly; corrupt ones raise a one-line error."""

import hashlib
import json

import jax
import numpy as np
import pytest

from xlstm_jax.config import ConfigError, to_dict
from xlstm_jax.train import (
    Checkpointer,
    CheckpointError,
    TrainState,
    checkpoint,
    init_state,
    make_optimizer,
    restore_params,
)


@pytest.fixture
def saved(tmp_path, tiny_lm, experiment, key, tokens):
    """A run directory with checkpoints of steps 2 and 4, its config, and the saved states."""
    cfg, run_dir = experiment(), tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(to_dict(cfg)))
    state = init_state(tiny_lm(cfg.model), make_optimizer(cfg.train), key, tokens)
    states = {}
    with Checkpointer(run_dir, keep=2) as saver:
        for step in (1, 2, 4):
            states[step] = jax.tree.map(lambda x, step=step: x + x.dtype.type(step), state)
            saver.save(step, states[step], {"step": step, "third": 1 / 3}, to_dict(cfg))
            saver.save(step, state, {"step": -1}, {})  # already saved: ignored
    return run_dir, cfg, states


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_restore_latest_is_bit_exact(saved, assert_same):
    run_dir, _, states = saved
    assert checkpoint.steps(run_dir) == [2, 4]  # step 1 was deleted, as keep=2
    before = contents(run_dir)
    like = jax.eval_shape(lambda: states[4])
    state, data = checkpoint.restore_latest(run_dir, like)
    assert isinstance(state, TrainState) and data == {"step": 4, "third": 1 / 3}
    assert_same(state, states[4])
    assert contents(run_dir) == before


def test_restore_params_restores_the_config_and_parameters_of_a_step(saved, assert_same):
    run_dir, cfg, states = saved
    for step, expected in ((None, 4), (2, 2)):
        restored_cfg, params = restore_params(run_dir, step)
        assert restored_cfg == cfg
        assert_same(params, states[expected].params)


def test_a_missing_checkpoint_or_run_is_an_error(tmp_path, saved):
    assert checkpoint.restore_latest(tmp_path / "none", {}) is None
    run_dir, _, _ = saved
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; use one of: 2, 4"):
        restore_params(run_dir, 3)
    with pytest.raises(ConfigError, match="none does not exist"):
        restore_params(tmp_path / "none")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("name", "corrupt"),
    [
        ("state", truncate),
        ("state", flip),
        ("state", remove),
        ("data", truncate),
        ("data", flip),
        ("manifest.json", truncate),
    ],
)
def test_a_corrupt_file_is_named_and_no_file_changes(saved, corrupt, name):
    run_dir, _, states = saved
    folder = run_dir / "checkpoints" / "4" / name
    files = [folder] if folder.is_file() else [p for p in folder.rglob("*") if p.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    corrupt(victim)
    before = contents(run_dir)
    like = jax.eval_shape(lambda: states[4])
    for restore in (
        lambda: checkpoint.restore_latest(run_dir, like),
        lambda: restore_params(run_dir),
    ):
        with pytest.raises(CheckpointError) as caught:
            restore()
        message = str(caught.value)
        assert str(victim) in message and "\n" not in message
        assert f"delete {run_dir / 'checkpoints' / '4'} to resume from step 2" in message
    assert contents(run_dir) == before


def test_if_the_only_checkpoint_is_corrupt_the_error_suggests_fresh(saved):
    run_dir, _, states = saved
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "2").rename(run_dir / "moved")
    truncate(checkpoints / "4" / "data" / "data.json")
    with pytest.raises(CheckpointError, match=r"must have \d+ bytes, got \d+.*--fresh"):
        checkpoint.restore_latest(run_dir, jax.eval_shape(lambda: states[4]))


def test_a_state_of_another_structure_is_an_error(saved):
    run_dir, _, states = saved
    like = jax.eval_shape(lambda: states[4])
    other = like.replace(params={"else": jax.ShapeDtypeStruct((3,), np.float32)})
    with pytest.raises(CheckpointError, match="must be a complete checkpoint of this config"):
        checkpoint.restore_latest(run_dir, other)
