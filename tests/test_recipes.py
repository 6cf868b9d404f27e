"""The recipes of CONTRIBUTING.md; that of a block kind is in `modules/test_block_kinds.py`."""

import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from tests import quick
from xlstm_jax import data, ops, sharding
from xlstm_jax.data import DATASETS, Batch, DataConfig, tokenizers
from xlstm_jax.modules import LM, LMConfig, MLSTMConfig, param_shapes
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.mlstm.api import IMPLEMENTATIONS
from xlstm_jax.sharding.rules import RULES
from xlstm_jax.train import ExperimentConfig, TrainConfig, fit

MODEL = LMConfig(vocab_size=257, dim=8, pattern="m", mlstm=MLSTMConfig(num_heads=2, inner_dim=16))


def experiment(**changes) -> ExperimentConfig:
    values = {
        "name": "recipe",
        "model": MODEL,
        "data": DataConfig(source="grammar", seq_len=16, batch_size=2),
        "train": TrainConfig(steps=2, eval_every=0, log_every=1),
    }
    return ExperimentConfig(**values | changes)


def test_adding_an_implementation_of_an_op():
    """By name it runs or raises the reason; "auto" skips it where it does not support a call."""
    calls = []

    def compute(x, state, flags, options):
        calls.append(x.q.shape)
        return jnp.full_like(x.v, 7.0), state

    toy = Implementation(compute, lambda call: "it needs T = 2" if call.T != 2 else None)
    table = {"toy": toy, **IMPLEMENTATIONS}  # "auto" tries it first
    q, i = jnp.ones((1, 3, 1, 2)), jnp.zeros((1, 3, 1))
    with mock.patch.dict(IMPLEMENTATIONS, table, clear=True):
        h, _ = ops.mlstm(q[:, :2], q[:, :2], q[:, :2], i[:, :2], i[:, :2])
        assert (h == 7).all() and calls == [(1, 2, 1, 2)]
        h, _ = jax.eval_shape(ops.mlstm, q, q, q, i, i)
        assert h.shape == q.shape and len(calls) == 1
        assert ops.implementations("mlstm")["toy"] == "it needs T = 2"
        with pytest.raises(NotImplementedError, match="toy: it needs T = 2"):
            ops.mlstm(q, q, q, i, i, implementation="toy")


@dataclasses.dataclass(frozen=True)
class Letters(tokenizers.BaseTokenizer):
    """A tokenizer of letters; all other characters are token 0."""

    name: str = "letters"
    vocab_size: int = 28
    eos_id: int = 27
    sha256: str = "letters, version 1"
    token_bytes = np.array([1] * 27 + [0], np.int32)

    def encode(self, text):
        codes = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)
        codes = codes.astype(np.int64) | 32
        return np.where((codes >= 97) & (codes < 123), codes - 96, 0)

    def decode(self, ids):
        return "".join(chr(96 + int(x)) if 0 < x < 27 else " " for x in ids)


def test_adding_a_tokenizer(monkeypatch):
    monkeypatch.setitem(tokenizers.TOKENIZERS, "letters", Letters())
    cfg = DataConfig(source="grammar", seq_len=16, batch_size=2, tokenizer="letters")
    windows = data.load(cfg, "train")
    assert windows.vocab_size == 28 and windows.tokenizer.decode([1, 2, 0]) == "ab "
    batch = data.batch_at(windows, cfg, 0)
    assert batch.inputs.shape == (2, 16) and batch.inputs.max() < 28


@dataclasses.dataclass(frozen=True)
class Counting:
    """A dataset whose example i counts up from i, modulo 11."""

    seq_len: int
    vocab_size: int = 11
    shuffle: bool = True

    @property
    def description(self):
        return {"source": "counting"}

    def __len__(self):
        return 100

    def batch(self, index):
        tokens = (index[:, None] + np.arange(self.seq_len + 1)).astype(np.int32) % 11
        ones = np.ones((len(index), self.seq_len), np.int32)
        return Batch(tokens[:, :-1], tokens[:, 1:], ones, ones.astype(np.float32), index)


def test_adding_a_dataset_and_passing_an_optimizer_to_fit(monkeypatch, tmp_path, one_device):
    monkeypatch.setitem(DATASETS, "counting", lambda cfg, split: Counting(cfg.seq_len))
    cfg = experiment(data=DataConfig(source="counting", seq_len=8, batch_size=2))
    result = fit(cfg, tmp_path / "run", tx=optax.lion(1e-3))
    assert result.finished and isinstance(result.state.opt_state[0], optax.ScaleByLionState)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["data"]["train"] == {"source": "counting"}


def test_adding_a_table_of_sharding_rules(monkeypatch, tmp_path):
    rules = {**RULES["fsdp"], "inner": ("fsdp",), "embed": ()}
    monkeypatch.setitem(RULES, "inner_over_fsdp", rules)
    mesh = sharding.MeshConfig(fsdp=2, data=1, rules="inner_over_fsdp", min_shard_size=1)
    devices = sharding.make_devices(mesh, jax.devices()[:2])
    specs = jax.tree.map(lambda x: x.spec, devices.shardings(param_shapes(MODEL)))
    assert specs["stack"]["m"]["mlstm"]["proj_up"]["kernel"] == PartitionSpec(None, None, "fsdp")
    tokens = jnp.zeros((2, 4), jnp.int32)
    variables = quick.jit(LM(MODEL).init)(jax.random.key(0), tokens)
    expected, _ = quick.jit(LM(MODEL).apply)(variables, tokens)
    with jax.set_mesh(devices.mesh), sharding.use_rules(rules):
        logits, _ = quick.jit(LM(MODEL).apply)(variables, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
