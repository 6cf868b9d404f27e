"""Truncated backpropagation through time: windows of a stream, with the state carried over."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import quick
from tests.modules import models
from tests.train.conftest import Hidden
from xlstm_jax.config import ConfigError
from xlstm_jax.data import Batch, DataConfig
from xlstm_jax.modules import LM, LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.ops.documents import document_starts
from xlstm_jax.sharding import MeshConfig, make_devices
from xlstm_jax.train import ExperimentConfig, TrainConfig, checkpoint, fit, init_state, program
from xlstm_jax.train.carry import Carry
from xlstm_jax.train.losses import token_sums
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.step import make_train_step

B, T, STEPS = 4, 6, 3


class RecurrentLM(nn.Module):
    """A model with the interface of `LM` that compiles quickly: h becomes tanh(x + h / 2)."""

    cfg: LMConfig

    @nn.compact
    def __call__(self, tokens, state=None, segment_ids=None, mask=None, *, head=True, **_):
        cfg, init = self.cfg, nn.initializers.normal(0.5)
        table = nn.Embed(cfg.vocab_size, cfg.dim, embedding_init=init, name="token_embedding")
        x = Hidden(name="ffn")(table(tokens))
        reset = jnp.zeros_like(tokens) if segment_ids is None else document_starts(segment_ids)
        h = jnp.zeros_like(x[:, 0]) if state is None else state["m"][0]

        def step(h, inputs):
            x, reset = inputs
            h = jnp.tanh(x + jnp.where(reset[:, None] > 0, 0.0, h) / 2)
            return h, h

        h, hidden = jax.lax.scan(step, h, (jnp.moveaxis(x, 1, 0), reset.T))
        hidden = jnp.moveaxis(hidden, 0, 1)
        logits = nn.Dense(cfg.vocab_size, use_bias=False, name="lm_head")(hidden)
        return (logits if head else hidden), {"m": h[None]}

    @nn.nowrap
    def init_state(self, batch_size):
        return {"m": jnp.zeros((1, batch_size, self.cfg.dim))}


MODEL = RecurrentLM(LMConfig(vocab_size=11, dim=8, pattern="m"))
XLSTM = LM(
    LMConfig(
        vocab_size=11,
        dim=8,
        pattern="msM",
        mlstm=MLSTMConfig(num_heads=2),
        slstm=SLSTMConfig(num_heads=2),
        large=LargeConfig(num_heads=2),
    )
)
BASELINES = LM(models.config(models.MIXED_BASELINES))
CFG = TrainConfig(warmup_steps=0, schedule="constant", grad_clip=None, carry_state=True)
SGD = optax.sgd(1.0)


@pytest.fixture(scope="module")
def document():
    """Long sequences, one document each: all at once, and as windows of T."""
    tokens = np.random.default_rng(0).integers(0, 11, (B, STEPS * T + 1)).astype(np.int32)
    length = STEPS * T
    ones = np.ones((B, length), np.int32)
    full = Batch(tokens[:, :-1], tokens[:, 1:], ones, ones.astype(np.float32), np.arange(B))
    windows = [
        Batch(*(x[:, i * T : (i + 1) * T] for x in full[:-1]), index=100 * np.arange(B) + i)
        for i in range(STEPS)
    ]
    put = lambda batch: jax.tree.map(jnp.asarray, batch)  # noqa: E731
    return put(full), [put(window) for window in windows]


def first_state(model):
    state = init_state(model, SGD, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return state.replace(carry=Carry.start(model, B))


@pytest.fixture(scope="module")
def start():
    return first_state(MODEL)


def make_step(model=MODEL, **changes):
    return quick.jit(make_train_step(model, SGD, dataclasses.replace(CFG, **changes)))


@pytest.fixture(scope="module")
def step():
    return make_step()


@quick.jit
def sums(params, batch, state):
    return token_sums(MODEL, params, batch, document_resets=True, state=state)


def carried(step, state, windows):
    """Steps with the same parameters: the states after them and their metrics."""
    params, results = state.params, []
    for window in windows:
        state, metrics = step(state, window)
        results.append((state, metrics))
        state = state.replace(params=params)
    return results


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize(
    "model",
    [MODEL, *(pytest.param(model, marks=pytest.mark.slow) for model in (XLSTM, BASELINES))],
    ids=["recurrent", "xlstm", "baselines"],
)
def test_losses_of_consecutive_windows_are_those_of_the_document(document, model):
    full, windows = document
    start = first_state(model)
    results = carried(make_step(model), start, windows)
    run = quick.jit(lambda p, batch: token_sums(model, p, batch, document_resets=True))
    expected, after = run(start.params, full)
    loss = np.mean([metrics["loss"] for _, metrics in results])
    np.testing.assert_allclose(loss, expected.ce_sum / expected.weight_sum, rtol=1e-5)
    assert_close(results[-1][0].carry.state, after)
    fresh = run(start.params, windows[1])[0]
    assert abs(results[1][1]["loss"] - fresh.ce_sum / fresh.weight_sum) > 1e-5


def test_gradients_are_truncated_at_the_start_of_a_window(document, start, step):
    _, windows = document
    before = sums(start.params, windows[0], None)[1]

    def loss(params):
        # `before` is a constant here.
        out = token_sums(MODEL, params, windows[1], document_resets=True, state=before)[0]
        return out.ce_sum / out.weight_sum

    expected = quick.jit(jax.grad(loss))(start.params)
    new = carried(step, start, windows[:2])[1][0].params
    assert_close(jax.tree.map(jnp.subtract, start.params, new), expected)


def test_micro_batches_carry_their_own_sequences(document, start, step):
    _, windows = document
    results = carried(make_step(accumulation=2), start, windows)
    expected = carried(step, start, windows)
    assert_close([state.carry for state, _ in results], [state.carry for state, _ in expected])
    assert_close(results[-1][1]["loss"], expected[-1][1]["loss"])


def test_the_state_is_reset_where_a_window_starts_a_document_or_does_not_follow(
    document, start, step
):
    _, windows = document
    state = step(start, windows[0])[0].replace(params=start.params)
    second = windows[1]
    ids = second.segment_ids.at[1].add(1)  # a document begins with the window
    index = second.index.at[2].add(1)  # a window is left out
    new, metrics = step(state, second._replace(segment_ids=ids, index=index))
    assert metrics["documents"] == B
    after = new.carry.state
    continued = step(state, second)[0].carry.state
    fresh = sums(start.params, second, None)[1]
    for i, expected in enumerate((continued, fresh, fresh, continued)):
        assert_close(after["m"][:, i], expected["m"][:, i])
    without = make_step(document_resets=False)
    after = without(state, second._replace(segment_ids=ids))[0].carry.state
    assert_close(after, continued)


def test_a_skipped_step_does_not_poison_the_state(document, start, step):
    _, windows = document
    state = step(start, windows[0])[0].replace(params=start.params)
    broken = jax.tree.map(lambda x: x * jnp.nan, start.params)
    skipped, metrics = step(state.replace(params=broken), windows[1])
    assert metrics["skipped"] == 1
    assert_close(skipped.carry, state.carry, atol=0)
    # The next window does not follow the one before the skipped step.
    after, metrics = step(skipped.replace(params=start.params), windows[2])
    assert metrics["skipped"] == 0
    assert_close(after.carry.state, sums(start.params, windows[2], None)[1])


def test_a_loss_function_of_your_own_cannot_carry_state():
    with pytest.raises(ConfigError, match="carry_state must be False with a loss_fn"):
        make_train_step(MODEL, SGD, CFG, lambda *_: None)


@pytest.fixture
def recurrent_lm(monkeypatch):
    """Replaces the model of all runs."""
    monkeypatch.setattr(program, "LM", RecurrentLM)


def make(experiment, **train):
    return experiment(data={"packing": "stream"}, carry_state=True, eval_every=0, **train)


@pytest.mark.slow
def test_a_resumed_run_is_bit_exact(recurrent_lm, experiment, tmp_path, assert_same):
    cfg = make(experiment, steps=6)

    def crash(step, metrics):
        if step == 6:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fit(cfg, tmp_path / "a", on_metrics=crash)
    assert checkpoint.latest_step(tmp_path / "a") == 5
    result, expected = fit(cfg, tmp_path / "a").state, fit(cfg, tmp_path / "b").state
    assert_same(result, expected)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(result.carry))


@pytest.mark.slow
def test_a_resumed_run_restores_caches_of_attention(experiment, tmp_path, assert_same):
    """A checkpoint has their lengths, integers, too."""
    cache = models.config().window
    cfg = make(experiment, steps=4, checkpoint_every=2, model=dict(pattern="wr", window=cache))

    def crash(step, metrics):
        if step == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fit(dataclasses.replace(cfg), tmp_path / "a", on_metrics=crash)
    assert checkpoint.latest_step(tmp_path / "a") == 2
    result, expected = fit(cfg, tmp_path / "a").state, fit(cfg, tmp_path / "b").state
    assert_same(result, expected)
    length = result.carry.state["w"].length
    assert length.dtype == jnp.int32 and bool((length > 0).all())


@pytest.mark.parametrize(
    "train, data, message",
    [
        ({}, {"packing": "windows"}, "carry_state must be False unless data.packing='stream'"),
        ({"batch_ramp": ((0, 0.5),)}, {}, "batch_ramp must be empty with train.carry_state"),
    ],
)
def test_a_config_without_a_stream_of_fixed_sequences_is_rejected(train, data, message):
    data = DataConfig(**{"packing": "stream", **data})
    train = TrainConfig(carry_state=True, **train)
    with pytest.raises(ConfigError, match=message):
        ExperimentConfig(name="a", model=MODEL.cfg, data=data, train=train)


def test_independent_samples_are_rejected(experiment, tmp_path):
    cfg = make(experiment)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source="parity"))
    with pytest.raises(ConfigError, match="whose samples are independent"):
        fit(cfg, tmp_path / "run")


def test_the_state_is_sharded_over_the_batch(experiment):
    with jax.default_device(None):
        mesh = MeshConfig(data=2, fsdp=2, tensor=2)
        program = TrainProgram(dataclasses.replace(make(experiment), mesh=mesh), make_devices(mesh))
    carry, batch = program.arguments[0].carry, program.arguments[2]
    assert carry.index.sharding.is_equivalent_to(batch.index.sharding, 1)
    for leaf in jax.tree.leaves(carry.state):
        assert leaf.sharding.spec == jax.P(None, ("data", "fsdp"))
