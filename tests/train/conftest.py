"""A model that compiles at once, called like `LM`, and runs small enough to be cut and resumed."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from xlstm_jax.data import Batch, DataConfig
from xlstm_jax.modules import LMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig, checkpoint, program, run


class Hidden(nn.Module):
    """A layer by the names of one of ours: every parameter has its place on a mesh."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="proj_down")(x)


class TinyLM(nn.Module):
    """Embedding, one hidden layer, head: the parameter names and the call of `LM`, no memory."""

    cfg: LMConfig

    @nn.compact
    def __call__(self, tokens, state=None, segment_ids=None, mask=None, *, head=True, **_):
        cfg = self.cfg
        init = nn.initializers.normal(0.3)
        table = nn.Embed(cfg.vocab_size, cfg.dim, embedding_init=init, name="token_embedding")
        x = nn.tanh(Hidden(name="ffn")(table(tokens)))
        logits = nn.Dense(cfg.vocab_size, use_bias=False, name="lm_head")(x)
        return (logits if head else x), state


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(compiled, one_device):
    """Nothing here is about speed."""
    with quick.compilation(compiled):
        yield


@pytest.fixture(autouse=True, scope="module")
def shared_programs():
    """Runs of one config share their programs: tracing is most of what a small run takes."""
    programs = {}

    def shared(cfg, devices, tx=None):
        key = cfg, str(devices), tx
        if key not in programs:
            programs[key] = program.TrainProgram(cfg, devices, tx)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "TrainProgram", shared)
        yield


@pytest.fixture(scope="module")
def tiny_lm():
    """Runs train a `TinyLM`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "LM", TinyLM)
        patch.setattr(checkpoint, "param_shapes", lambda cfg: shapes(TinyLM(cfg)))
        yield TinyLM


def shapes(model):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


@pytest.fixture
def tiny():
    """A model for calls of a step."""
    return TinyLM(LMConfig(vocab_size=11, dim=8, pattern="m"))


@pytest.fixture
def batches(rng):
    """Makes batches with rows of very different weight."""

    def make(num_rows=8, length=12, vocab=11):
        shape = (num_rows, length)
        counts = np.arange(length) < rng.integers(1, length + 1, (num_rows, 1))
        return Batch(
            inputs=rng.integers(0, vocab, shape).astype(np.int32),
            targets=rng.integers(0, vocab, shape).astype(np.int32),
            segment_ids=counts.astype(np.int32),
            weights=counts.astype(np.float32),
            index=np.arange(num_rows, dtype=np.int64),
        )

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with a little text."""
    rng, root = np.random.default_rng(1), tmp_path_factory.mktemp("text")
    for split, count in (("train", 3000), ("valid", 300), ("test", 300)):
        (root / split).mkdir()
        words = rng.choice(["state ", "gate ", "memory ", "scan\n"], count)
        (root / split / "a.txt").write_text("".join(words))
    return root


@pytest.fixture(scope="session")
def experiment(text):
    """Makes configs of runs over that text; keywords go to TrainConfig."""

    def make(data=None, model=None, **train):
        defaults = dict(steps=12, lr=1e-2, log_every=3, eval_every=4, eval_batches=2)
        return ExperimentConfig(
            name="tiny",
            model=LMConfig(**dict(vocab_size=257, dim=8, pattern="m") | (model or {})),
            data=DataConfig(**dict(source=str(text), seq_len=16, batch_size=4) | (data or {})),
            train=TrainConfig(**defaults | dict(checkpoint_every=5) | train),
        )

    return make


@pytest.fixture
def assert_same():
    """Asserts that two trees are equal bit for bit."""

    def bits(tree):
        return jax.tree.map(lambda x: np.frombuffer(np.asarray(x).tobytes(), np.uint8), tree)

    def check(a, b):
        chex.assert_trees_all_equal_structs(a, b)
        chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
        chex.assert_trees_all_equal(bits(a), bits(b))

    return check


@pytest.fixture
def with_train():
    """`with_train(cfg, lr=1)`: a run's config with other fields of `train`."""
    return lambda cfg, **fields: dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, **fields)
    )


@pytest.fixture
def tokens():
    """Enough to make parameters."""
    return jnp.zeros((1, 1), jnp.int32)
