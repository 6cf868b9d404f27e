"""Parameters of a run restored layer by layer: the values of `restore_params`."""

import jax
import jax.numpy as jnp
import pytest

from xlstm_jax.config import to_dict
from xlstm_jax.data import DataConfig
from xlstm_jax.modules import LM, LMConfig
from xlstm_jax.modules.stack import stack_layers
from xlstm_jax.train import ExperimentConfig, TrainConfig, rundir
from xlstm_jax.train.checkpoint import Checkpointer, CheckpointError, restore_params
from xlstm_jax.train.checkpoint.unstacked import restore_unstacked
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.state import init_state

MODEL = LMConfig(vocab_size=257, dim=4, pattern="lLl")
AVERAGED = dict(optimizer="schedule_free_adamw", schedule="constant")


def save(folder, **train):
    """A run with one checkpoint whose moving average differs from its parameters."""
    train = TrainConfig(steps=2, **train)
    cfg = ExperimentConfig(name="run", model=MODEL, data=DataConfig(), train=train)
    state = init_state(
        LM(MODEL), make_optimizer(train), jax.random.key(0), jnp.zeros((1, 1), int), ema=True
    )
    state = state.replace(ema=jax.tree.map(lambda x: 2 * x + 1, state.ema))
    rundir.prepare(folder, cfg, {}, step=2)
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(2, state, {}, to_dict(cfg))
    return cfg


@pytest.mark.parametrize("ema", [False, True])
def test_layers_have_the_values_of_the_stacked_parameters(ema, tmp_path, assert_same):
    cfg = save(tmp_path / "run", ema_decay=0.5)
    restored_cfg, params = restore_unstacked(tmp_path / "run", ema=ema)
    assert restored_cfg == cfg
    assert [len(params["stack"][letter]) for letter in "lL"] == [2, 1]
    expected = restore_params(tmp_path / "run", ema=ema)[1]
    assert_same({**params, "stack": stack_layers(params["stack"])}, expected)


@pytest.mark.parametrize("train", [AVERAGED, dict(freeze="embedding")])
def test_computed_parameters_stay_stacked(train, tmp_path, assert_same):
    save(tmp_path / "run", **train)
    expected = restore_params(tmp_path / "run")[1]
    assert_same(restore_unstacked(tmp_path / "run")[1], expected)


def test_errors_are_those_of_restore_params(tmp_path):
    save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; use one of: 2"):
        restore_unstacked(tmp_path / "run", 3)
    part = max(
        (tmp_path / "run/checkpoints/2/state").rglob("*"), key=lambda path: path.stat().st_size
    )
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="must have"):
        restore_unstacked(tmp_path / "run")
