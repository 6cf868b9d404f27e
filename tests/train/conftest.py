"""A model with the interface of `LM` that compiles quickly, and configs of small runs."""

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
    """A layer with the parameter names of the library, so that it has logical axes."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="proj_down")(x)


class TinyLM(nn.Module):
    """Embedding, one hidden layer, head: parameter names and call of `LM`, but no state."""

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
def compile_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compile_cache")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(compile_cache, one_device):
    """Compiles with few optimizations, which are not worth their time in these tests."""
    with quick.compilation(compile_cache):
        yield


@pytest.fixture(autouse=True, scope="module")
def shared_programs():
    """Runs of one config share their programs, because tracing dominates the time of small runs."""
    programs = {}

    def shared(cfg, devices, *options):
        key = cfg, str(devices), *options
        if key not in programs:
            programs[key] = program.TrainProgram(cfg, devices, *options)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "TrainProgram", shared)
        yield


@pytest.fixture(scope="module")
def tiny_lm():
    """Replaces the model of all runs with `TinyLM`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "LM", TinyLM)
        patch.setattr(checkpoint.restore, "param_shapes", lambda cfg: shapes(TinyLM(cfg)))
        yield TinyLM


def shapes(model):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


@pytest.fixture
def tiny():
    """A model for train steps."""
    return TinyLM(LMConfig(vocab_size=11, dim=8, pattern="m"))


@pytest.fixture
def batches(rng):
    """Makes random batches; the number of targets varies between sequences."""

    def make(batch_size=8, length=12, vocab=11):
        shape = (batch_size, length)
        is_target = np.arange(length) < rng.integers(1, length + 1, (batch_size, 1))
        return Batch(
            inputs=rng.integers(0, vocab, shape).astype(np.int32),
            targets=rng.integers(0, vocab, shape).astype(np.int32),
            segment_ids=is_target.astype(np.int32),
            weights=is_target.astype(np.float32),
            index=np.arange(batch_size, dtype=np.int64),
        )

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with a small text."""
    rng, root = np.random.default_rng(1), tmp_path_factory.mktemp("text")
    for split, count in (("train", 3000), ("valid", 300), ("test", 300)):
        (root / split).mkdir()
        words = rng.choice(["state ", "gate ", "memory ", "scan\n"], count)
        (root / split / "a.txt").write_text("".join(words))
    return root


@pytest.fixture(scope="session")
def experiment(text):
    """Makes configs of runs on that text; keywords are fields of TrainConfig."""

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
    """`with_train(cfg, lr=1)` replaces fields of `cfg.train`."""
    return lambda cfg, **fields: dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, **fields)
    )


@pytest.fixture
def tokens():
    """The smallest input that initializes parameters."""
    return jnp.zeros((1, 1), jnp.int32)


@pytest.fixture(scope="session")
def crash_and_resume():
    """Runs `fit` until the record of step 6, then again to the end; returns its result."""

    def crash(step, metrics):
        if step == 6:
            raise RuntimeError

    def twice(cfg, run_dir):
        with pytest.raises(RuntimeError):
            run.fit(cfg, run_dir, on_metrics=crash)
        return run.fit(cfg, run_dir)

    return twice
