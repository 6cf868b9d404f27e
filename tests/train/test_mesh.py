"""Training on a mesh gives the losses, gradients and runs of a single device."""

import dataclasses
import functools
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests import quick
from tests.modules.models import BASELINES
from xlstm_jax.config import ConfigError
from xlstm_jax.data import Batch, DataConfig
from xlstm_jax.modules import (
    LM,
    LargeConfig,
    LMConfig,
    MLSTMConfig,
    SLSTMConfig,
    param_shapes,
    presets,
)
from xlstm_jax.modules.baselines import options
from xlstm_jax.plan.collectives import collectives
from xlstm_jax.plan.hlo import Program
from xlstm_jax.sharding import MeshConfig, get_rules, make_devices, partition_spec, path_name
from xlstm_jax.train import (
    ExperimentConfig,
    TrainConfig,
    eval_params,
    fit,
    init_state,
    make_optimizer,
    make_train_step,
    restore_params,
    rundir,
)
from xlstm_jax.train.losses import language_model_loss
from xlstm_jax.train.program import TrainProgram

slow = pytest.mark.slow
MESHES = {
    "data": MeshConfig(min_shard_size=2),
    "fsdp": MeshConfig(fsdp=4, min_shard_size=2),
    "fsdp_tensor": MeshConfig(fsdp=2, tensor=2, min_shard_size=2),
    "fsdp_seq": MeshConfig(fsdp=2, seq=2, min_shard_size=2),
}
"""Eight devices under all sharding rules; the small min_shard_size shards every parameter."""

every_mesh = pytest.mark.parametrize(
    "mesh",
    [
        # The rules with most axes run by default, the others only as slow tests.
        pytest.param(mesh, id=name, marks=[] if name in ("fsdp_tensor", "fsdp_seq") else slow)
        for name, mesh in MESHES.items()
    ],
)
T, VOCAB = 48, 64
TWO_KEYS = options.AttentionConfig(num_heads=4, num_kv_heads=2, cache_size=T)
BASELINE_OPTIONS = dict(
    lstm=options.LSTMConfig(num_heads=4),
    attention=TWO_KEYS,
    window=options.WindowConfig(num_heads=4, window=7, cache_size=T),
    hybrid=options.HybridConfig(num_heads=4, window=7, cache_size=T),
    mamba2=options.Mamba2Config(head_dim=16, state_dim=24, groups=2),
    gated_delta=options.GatedDeltaConfig(num_heads=4, num_qk_heads=2),
)


@pytest.fixture(autouse=True, scope="module")
def all_devices(one_device):
    """Overrides `one_device`, which restricts the other tests of training to one device."""
    with jax.default_device(None):
        yield


def config(pattern: str, remat: str = "none") -> LMConfig:
    return LMConfig(
        vocab_size=VOCAB,
        dim=64,
        pattern=pattern,
        mlstm=MLSTMConfig(num_heads=4),
        slstm=SLSTMConfig(num_heads=4, recurrent_init="standard"),
        large=LargeConfig(num_heads=4),
        **BASELINE_OPTIONS,
        remat=remat,
    )


def packed_batch(rng, batch_size=8) -> Batch:
    """Padded sequences of several documents; the number of targets varies between sequences."""
    shape = (batch_size, T)
    documents = np.sort(rng.integers(1, 4, shape), axis=1).astype(np.int32)
    documents[0, 40:] = 0
    weights = rng.random(shape) < np.linspace(0.2, 1.0, batch_size)[:, None]
    tokens = rng.integers(0, VOCAB, (2, *shape)).astype(np.int32)
    return Batch(*tokens, documents, weights.astype(np.float32), np.arange(batch_size))


TRAIN = TrainConfig(loss_chunk=16, z_loss=1e-2)


def random_params(model, rng):
    """Parameters with noise, so that none is still zero or one."""
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(x.dtype), params)


def loss_and_gradients(model, params, batch):
    return jax.value_and_grad(lambda p: language_model_loss(model, p, batch, TRAIN)[0])(params)


@functools.cache
def on_one_device(pattern: str, remat: str):
    """Parameters, a batch, and their loss and gradients on one device."""
    rng = np.random.default_rng(0)
    model = LM(config(pattern, remat))
    params, batch = random_params(model, rng), packed_batch(rng)
    return params, batch, quick.jit(functools.partial(loss_and_gradients, model))(params, batch)


@pytest.mark.slow
@every_mesh
@pytest.mark.parametrize(
    "pattern,remat",
    [
        ("M", "none"),
        pytest.param("msM", "none", marks=slow),
        pytest.param("mMsmMs", "full", marks=slow),
        pytest.param("aBd", "full", marks=slow),
    ],
)
def test_loss_and_gradients_equal_those_of_one_device(pattern, remat, mesh, capfd):
    """The compiler must not report involuntary rematerialization of sharded arrays either."""
    params, batch, (loss, expected) = on_one_device(pattern, remat)
    devices = make_devices(mesh)
    shardings = devices.shardings(params)
    compute = functools.partial(loss_and_gradients, LM(config(pattern, remat)))
    with devices.active():
        args = jax.device_put(params, shardings), devices.batch(batch)
        sharded_loss, grads = quick.jit(compute, out_shardings=(None, shardings))(*args)
    assert "nvoluntary" not in capfd.readouterr().err
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def test_the_compiler_reports_involuntary_rematerialization(capfd):
    """Ensures that the test above searches for the right message."""
    devices = make_devices(MESHES["fsdp"])
    new = time.time()  # a new constant: a program from the compilation cache reports nothing

    def reshard(x):
        x = jax.lax.with_sharding_constraint(x, P("fsdp", None, "data"))
        return jax.lax.with_sharding_constraint(jnp.sin(x) + new, P(None, ("data", "fsdp"), None))

    with devices.active():
        jax.jit(reshard).lower(jnp.zeros((8, 8, 8))).compile()
    assert "nvoluntary" in capfd.readouterr().err


@slow
def test_no_collective_of_a_step_grows_with_the_sequence_length():
    """Compares complete train steps, with the sequence sharded over `seq`."""
    mesh = MeshConfig(fsdp=2, seq=4, min_shard_size=2)

    def collectives_of_step(length: int) -> list[str]:
        data = DataConfig(batch_size=2, seq_len=length)
        cfg = ExperimentConfig(name="", model=config("Mm"), data=data, train=TRAIN, mesh=mesh)
        program = TrainProgram(cfg, make_devices(mesh), optax.sgd(0.1))
        with program.devices.active():
            lowered = program.step.lower(*program.arguments)
        compiled = lowered.compile(compiler_options=quick.OPTIONS)
        return sorted(map(str, collectives(Program(compiled.as_text()))))

    short = collectives_of_step(256)
    assert any("all-gather" in collective for collective in short)
    assert short == collectives_of_step(512)


BASELINES_ON_ONE_MESH = [
    (letter, MeshConfig(data=1, fsdp=2, tensor=2, min_shard_size=2)) for letter in BASELINES
]


@slow
@pytest.mark.parametrize(
    "pattern,mesh",
    [*(("mM", mesh) for mesh in MESHES.values()), *BASELINES_ON_ONE_MESH],
    ids=[*MESHES, *BASELINES],
)
def test_a_train_step_equals_that_of_one_device(pattern, mesh, rng):
    """Accumulates two micro-batches; both have sequences on every device."""
    # With a small eps, Adam moves a parameter by the sign of its gradient, which may be rounding.
    cfg = TrainConfig(accumulation=2, lr=1e-2, warmup_steps=0, loss_chunk=16, eps=1e-3)
    model, tx = LM(config(pattern)), make_optimizer(cfg)
    key, tokens, batch = jax.random.key(0), jnp.zeros((1, 1), jnp.int32), packed_batch(rng, 16)

    def train(devices):
        state = init_state(model, tx, key, tokens, devices=devices)
        step = quick.jit(make_train_step(model, tx, cfg))
        if devices is None:
            return step(state, batch)
        with devices.active():
            return step(state, devices.batch(batch))

    some = jax.devices()[:4] if mesh.data == 1 else None
    expected, actual = train(None), train(make_devices(mesh, some))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(actual[1][name], expected[1][name], rtol=1e-5)


@every_mesh
def test_the_state_is_created_sharded(mesh):
    """Under fsdp no parameter or moment above the threshold is replicated."""
    cfg = dataclasses.replace(mesh, min_shard_size=2**12)
    devices, tx = make_devices(cfg), make_optimizer(TRAIN)
    tokens = jnp.zeros((1, 1), jnp.int32)
    state = init_state(LM(config("M")), tx, jax.random.key(0), tokens, devices=devices)
    sizes = dict(devices.mesh.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        one_layer = leaf.size // (leaf.shape[0] if "/stack/" in path_name(path) else 1)
        num_shards = leaf.size // leaf.addressable_shards[0].data.size
        if one_layer >= cfg.min_shard_size and "fsdp" in devices.rules["embed"]:
            assert num_shards % sizes["fsdp"] == 0, path_name(path)
        if cfg.rules_name() == "data":
            assert num_shards == 1


@pytest.mark.parametrize(
    "name,fsdp",
    # 256 does not divide the vocabulary.
    [("xlstm_7b", 8), ("xlstm_7b", 256), ("xlstm_1.3b_7:1", 8), ("xlstm_125m_1:0", 8)],
)
def test_no_large_parameter_of_a_preset_is_replicated_under_fsdp(name, fsdp):
    sizes = {"data": 32, "fsdp": fsdp, "seq": 1, "tensor": 1}
    shapes = param_shapes(presets.get(name))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        spec = partition_spec(path_name(path), leaf.shape, get_rules("fsdp"), sizes)
        one_layer = leaf.size // (leaf.shape[0] if path_name(path).startswith("stack/") else 1)
        assert one_layer < 2**18 or "fsdp" in str(spec), path_name(path)


# Runs


def on(cfg, **mesh):
    """A config with another mesh."""
    return dataclasses.replace(cfg, mesh=MeshConfig(min_shard_size=2, **mesh))


def fit_on_one_device(cfg, run_dir, **options):
    with jax.default_device(jax.devices()[0]):
        return fit(cfg, run_dir, **options)


def losses(run_dir):
    return [r["loss"] for r in rundir.read_metrics(run_dir / rundir.METRICS) if "loss" in r]


RUN_MESHES = {
    "data": dict(data=8),
    "fsdp": dict(data=2, fsdp=4),
    "fsdp_tensor": dict(fsdp=2, tensor=2),
    "fsdp_seq": dict(fsdp=2, seq=2),
}


@pytest.fixture(scope="module")
def run_config(experiment):
    model = dict(pattern="ms", mlstm=MLSTMConfig(num_heads=2), slstm=SLSTMConfig(num_heads=2))
    return experiment(data=dict(batch_size=8), model=model, steps=6, log_every=1, eval_every=3)


@pytest.fixture(scope="module")
def one_run(run_config, tmp_path_factory):
    """Losses and final evaluation of an uninterrupted run on one device."""
    run_dir = tmp_path_factory.mktemp("one_device") / "run"
    result = fit_on_one_device(run_config, run_dir)
    return losses(run_dir), result.evaluation


@slow
@pytest.mark.parametrize("mesh", RUN_MESHES.values(), ids=RUN_MESHES)
def test_a_run_resumes_on_any_other_mesh(mesh, run_config, one_run, tmp_path):
    """Starts on one device, resumes on a mesh, and finishes on another mesh."""
    run_dir = tmp_path / "run"

    def stop_at(step):
        def callback(current, record):
            if current == step:
                signal.raise_signal(signal.SIGTERM)

        return callback

    fit_on_one_device(run_config, run_dir, on_metrics=stop_at(2))
    fit(on(run_config, **mesh), run_dir, on_metrics=stop_at(4))
    result = fit(on(run_config, data=4, fsdp=2), run_dir)
    assert result.finished and len(losses(run_dir)) == 6
    np.testing.assert_allclose(losses(run_dir), one_run[0], rtol=1e-5)
    assert result.evaluation["valid_loss"] == pytest.approx(one_run[1]["valid_loss"], rel=1e-5)


@slow
def test_a_run_resumed_on_the_same_mesh_is_bit_exact(run_config, tmp_path, assert_same):
    cfg = on(run_config, fsdp=2, seq=2)
    expected = fit(cfg, tmp_path / "uninterrupted")

    def stop(step, record):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    assert not fit(cfg, tmp_path / "resumed", on_metrics=stop).finished
    result = fit(cfg, tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "uninterrupted")
    assert_same(result.state, expected.state)


@slow
@pytest.mark.parametrize("name", ["muon", "schedule_free_adamw", "adafactor"])
def test_a_run_with_another_optimizer_equals_that_of_one_device(
    name, run_config, with_train, tmp_path
):
    """Also its averages, which are saved sharded and restored to one device."""
    cfg = with_train(run_config, optimizer=name, ema_decay=0.5, lr=1e-3)
    expected = fit_on_one_device(cfg, tmp_path / "one")
    result = fit(on(cfg, fsdp=2, tensor=2), tmp_path / "mesh")
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "one"), rtol=1e-4)
    assert result.evaluation["valid_loss"] == pytest.approx(
        expected.evaluation["valid_loss"], rel=1e-4
    )
    state = result.state
    average = eval_params(cfg, state.params, state.opt_state)
    for ema, tree in ((False, average), (True, state.ema)):
        _, restored = restore_params(tmp_path / "mesh", ema=ema)
        for a, b in zip(*map(jax.tree.leaves, (restored, tree)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@slow
def test_another_model_is_rejected_on_resume_but_another_mesh_is_not(run_config, tmp_path):
    """The error message must list the fields of the model only."""
    short = dataclasses.replace(run_config.train, steps=1)
    fit(on(dataclasses.replace(run_config, train=short), fsdp=2), tmp_path / "run")
    other = dataclasses.replace(run_config, model=dataclasses.replace(run_config.model, dim=64))
    dim = run_config.model.dim
    with pytest.raises(ConfigError, match=f"model.dim: 64, stored {dim}") as caught:
        fit(on(other, fsdp=4, tensor=2), tmp_path / "run")
    assert "mesh" not in str(caught.value)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(mesh=dict(data=3)), "must multiply to 8.*got data=3.*8 x 1, 4 x 2"),
        (
            dict(mesh=dict(fsdp=8), data=dict(batch_size=4)),
            "batch_size must be a multiple of 8.*data=1 x fsdp=8, got 4; use 8, or another mesh",
        ),
        (
            dict(mesh=dict(seq=8), data=dict(seq_len=20)),
            "seq_len must be a multiple of 8.*16 or 24",
        ),
        (dict(mesh=dict(tensor=8)), r"model.mlstm.num_heads must be a multiple of 8.*got 4"),
        (dict(mesh=dict(tensor=2, seq=2)), "no sharding rules use seq and tensor together"),
        (dict(mesh=dict(fsdp=2, rules="data")), "must use the mesh axis fsdp.*use one of: fsdp, "),
        (dict(mesh=dict(data=-1, fsdp=-1)), "only one mesh axis may be -1, got data and fsdp"),
        (dict(mesh=dict(seq=2, slstm_seq="refuse"), model=dict(pattern="ms")), "cannot shard"),
        (
            dict(mesh=dict(seq=2, slstm_seq="refuse"), model=dict(pattern="ma")),
            "cannot .* blocks a ",
        ),
        (
            dict(mesh=dict(tensor=4), model=dict(pattern="a", attention=TWO_KEYS)),
            "model.attention.num_kv_heads must be a multiple of 4, .*, got 2",
        ),
    ],
)
def test_sizes_that_the_mesh_does_not_divide_are_rejected(change, message, experiment, tmp_path):
    data = dict(batch_size=8) | change.get("data", {})
    model = dict(dim=16, mlstm=MLSTMConfig(num_heads=4)) | change.get("model", {})
    with pytest.raises(ConfigError, match=message):
        cfg = experiment(data=data, model=model)
        fit(dataclasses.replace(cfg, mesh=MeshConfig(**change["mesh"])), tmp_path / "run")
    assert not (tmp_path / "run").exists()
