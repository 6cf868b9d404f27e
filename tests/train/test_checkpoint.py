"""A checkpoint comes back as it was, or says in one sentence what is wrong with it."""

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
    """A run directory with the steps 2 and 4, and what was saved in them."""
    cfg, run_dir = experiment(), tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(to_dict(cfg)))
    state = init_state(tiny_lm(cfg.model), make_optimizer(cfg.train), key, tokens)
    states = {}
    with Checkpointer(run_dir, keep=2) as saver:
        for step in (1, 2, 4):
            states[step] = jax.tree.map(lambda x, step=step: x + x.dtype.type(step), state)
            saver.save(step, states[step], {"step": step, "third": 1 / 3}, to_dict(cfg))
            saver.save(step, state, {"step": -1}, {})  # is there already: left alone
    return run_dir, cfg, states


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_newest_state_comes_back_bit_for_bit(saved, assert_same):
    run_dir, _, states = saved
    assert checkpoint.steps(run_dir) == [2, 4]  # the oldest made room
    before = contents(run_dir)
    like = jax.eval_shape(lambda: states[4])
    state, data = checkpoint.restore_latest(run_dir, like)
    assert isinstance(state, TrainState) and data == {"step": 4, "third": 1 / 3}
    assert_same(state, states[4])
    assert contents(run_dir) == before


def test_parameters_come_back_without_the_optimiser(saved, assert_same):
    run_dir, cfg, states = saved
    for step, expected in ((None, 4), (2, 2)):
        found, params = restore_params(run_dir, step)
        assert found == cfg
        assert_same(params, states[expected].params)


def test_a_run_without_checkpoints_has_nothing_to_restore(tmp_path, saved):
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
    ("which", "harm"),
    [
        ("state", truncate),
        ("state", flip),
        ("state", remove),
        ("data", truncate),
        ("data", flip),
        ("manifest.json", truncate),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_touched(saved, harm, which):
    run_dir, _, states = saved
    folder = run_dir / "checkpoints" / "4" / which
    files = [folder] if folder.is_file() else [p for p in folder.rglob("*") if p.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    harm(victim)
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


def test_the_only_checkpoint_damaged_leaves_a_fresh_start(saved):
    run_dir, _, states = saved
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "2").rename(run_dir / "elsewhere")
    truncate(checkpoints / "4" / "data" / "metadata")
    with pytest.raises(CheckpointError, match=r"must have \d+ bytes, got \d+.*--fresh"):
        checkpoint.restore_latest(run_dir, jax.eval_shape(lambda: states[4]))


def test_a_state_of_another_structure_is_refused_in_one_sentence(saved):
    run_dir, _, states = saved
    like = jax.eval_shape(lambda: states[4])
    other = like.replace(params={"else": jax.ShapeDtypeStruct((3,), np.float32)})
    with pytest.raises(CheckpointError, match="must be a complete checkpoint of this config"):
        checkpoint.restore_latest(run_dir, other)
