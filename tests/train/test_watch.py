"""Statistics of gates and parameters: values, meshes, records and pictures."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from xlstm_jax.data import Batch, DataConfig
from xlstm_jax.modules import LM, LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.sharding import MeshConfig, make_devices
from xlstm_jax.train import ExperimentConfig, TrainConfig, fit, gate_plot
from xlstm_jax.train.losses import language_model_loss
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.state import first_state
from xlstm_jax.train.watch import Watch

B, T, VOCAB = 8, 12, 16
MODEL = LMConfig(
    vocab_size=VOCAB,
    dim=16,
    pattern="ms",
    mlstm=MLSTMConfig(num_heads=2),
    slstm=SLSTMConfig(num_heads=2),
)


def config(model=MODEL, **train):
    return ExperimentConfig(
        name="tiny",
        model=model,
        data=DataConfig(seq_len=T, batch_size=B),
        train=TrainConfig(watch_every=2, **train),
    )


@functools.cache
def batch():
    """Two documents and padding in every sequence."""
    rng = np.random.default_rng(0)
    documents = np.tile(np.repeat([1, 2, 0], [5, 4, 3]), (B, 1)).astype(np.int32)
    tokens = rng.integers(0, VOCAB, (2, B, T)).astype(np.int32)
    return Batch(*tokens, documents, (documents > 0).astype(np.float32), np.arange(B))


@functools.cache
def params(model=MODEL):
    variables = jax.jit(LM(model).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(x.dtype), variables["params"]
    )


def watch(cfg, mesh=None):
    """The record of the statistics of `cfg`, on one device or on a mesh."""
    devices = make_devices(mesh or MeshConfig(), None if mesh else jax.devices()[:1])
    program = TrainProgram(cfg, devices)
    watcher = Watch(program)
    with devices.active():
        sharded = jax.device_put(params(cfg.model), devices.shardings(params(cfg.model)))
        state = first_state(sharded, program.tx)
        return watcher.record(watcher.dispatch(state, devices.batch(batch())))


@functools.cache
def statistics():
    return watch(config())["gates"]


@functools.cache
def captured():
    """What the model computes for every second sequence, of which the statistics are."""
    sequences = batch().inputs[::2], batch().segment_ids[::2]
    run = quick.jit(functools.partial(LM(MODEL).apply, capture=("gates",)))
    documents = np.where(sequences[1] == 0, -1, sequences[1])
    _, state, trees = run({"params": params()}, sequences[0], segment_ids=documents)
    return jax.device_get((state, trees["gates"]))


def test_gate_statistics_are_those_of_the_gates_at_tokens():
    gates, is_token = captured()[1], batch().segment_ids[::2] != 0
    assert list(statistics()) == ["0m", "1s"]
    assert set(statistics()["0m"]) == {
        "forget_mean", "effective_length", "input_mean", "input_min", "input_max", "floor_share",
        "m_min", "m_max", "C_norm",
    }  # fmt: skip
    for name, block in statistics().items():
        traces = {key: value[0][is_token] for key, value in gates[name[1]].items()}
        per_head = {key: np.moveaxis(x, 1, 0).reshape(2, -1) for key, x in traces.items()}
        forget = (1 / (1 + np.exp(-per_head["f"]))).mean(1)
        expected = {
            "forget_mean": forget,
            "effective_length": 1 / (1 - forget),
            "input_mean": per_head["i"].mean(1),
            "input_min": per_head["i"].min(1),
            "input_max": per_head["i"].max(1),
            "m_min": per_head["m"].min(1),
            "m_max": per_head["m"].max(1),
        }
        for key, values in expected.items():
            np.testing.assert_allclose(block[key], values, rtol=2e-4, err_msg=f"{name} {key}")


def test_the_floor_acts_where_the_query_hardly_meets_the_normalizer():
    trace, is_token = captured()[1]["m"], batch().segment_ids[::2] != 0
    # max(|q n|, exp(-m)) + eps is at least exp(-m) + eps, and equal where the floor acts.
    floor = np.exp(-trace["m"]) + MODEL.mlstm.eps
    acts = np.isclose(trace["normalizer"], floor, rtol=1e-6, atol=0)
    expected = acts[0][is_token].mean(0)
    assert 0 < expected.min() < 1
    np.testing.assert_allclose(statistics()["0m"]["floor_share"], expected, rtol=1e-4)
    assert "floor_share" not in statistics()["1s"]


def test_c_norm_is_that_of_the_stored_memory_after_the_last_position():
    state = captured()[0]
    norms = np.sqrt((state["m"].cell.C ** 2).sum((-1, -2))).mean(1)[0]
    np.testing.assert_allclose(statistics()["0m"]["C_norm"], norms, rtol=2e-4)
    norms = np.sqrt((state["s"].cell.c ** 2).sum(-1)).mean(1)[0]
    np.testing.assert_allclose(statistics()["1s"]["C_norm"], norms, rtol=2e-4)


def test_statistics_of_a_letter_are_given_to_its_blocks_in_order():
    model = dataclasses.replace(MODEL, pattern="msm")
    watcher = Watch(TrainProgram(config(model), make_devices(MeshConfig(), jax.devices()[:1])))
    host = {"m": {"x": np.array([[1.0, 2], [3, 4]])}, "s": {"x": np.array([[5.0, 6]])}}
    assert watcher.record({"gates": host})["gates"] == {
        "0m": {"x": [1, 2]}, "1s": {"x": [5, 6]}, "2m": {"x": [3, 4]},
    }  # fmt: skip


@pytest.mark.slow
def test_parameter_and_gradient_norms_are_per_layer():
    sample = Batch(*(jnp.asarray(leaf[::2]) for leaf in batch()))

    def loss(params, sample):
        return language_model_loss(LM(MODEL), params, sample, TrainConfig())[0]

    grads = quick.jit(jax.grad(loss))(params(), sample)
    grads = jax.tree.map(lambda g: g / sample.weights.sum(), grads)
    record = watch(config(watch="params"))
    assert list(record) == ["params"]
    norms = record["params"]
    assert len(norms) == len(jax.tree.leaves(params()))
    path = "stack/m/mlstm/proj_up/kernel"
    for key, tree in (("norm", params()), ("grad_norm", grads)):
        kernel = tree["stack"]["m"]["mlstm"]["proj_up"]["kernel"]
        expected = np.sqrt((np.asarray(kernel) ** 2).sum((1, 2)))
        np.testing.assert_allclose(norms[path][key], expected, rtol=1e-3)
        head = np.linalg.norm(tree["lm_head"]["kernel"])
        assert norms["lm_head/kernel"][key] == pytest.approx(head, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "fsdp_tensor", "fsdp_seq"])
def test_statistics_on_a_mesh_equal_those_of_one_device(mesh):
    meshes = {
        "data": MeshConfig(data=4, tensor=2, rules="fsdp_tensor", min_shard_size=2),
        "fsdp_tensor": MeshConfig(fsdp=2, tensor=2, min_shard_size=2),
        "fsdp_seq": MeshConfig(fsdp=2, seq=2, min_shard_size=2),
    }
    with jax.default_device(None):
        record = watch(config(watch="all"), meshes[mesh])
    chex.assert_trees_all_close(record, watch(config(watch="all")), rtol=2e-3, atol=1e-5)


@pytest.mark.slow
def test_statistics_of_large_blocks_are_finite():
    model = LMConfig(vocab_size=VOCAB, dim=16, pattern="M", large=LargeConfig(num_heads=2))
    ((name, block),) = watch(config(model))["gates"].items()
    assert name == "0M" and all(np.isfinite(values).all() for values in block.values())


@pytest.fixture
def constant_gates(monkeypatch, tiny_lm):
    """A model without gates, and statistics that compile quickly."""
    values = {"forget_mean": jnp.full((1, 2), 0.5), "effective_length": jnp.full((1, 2), 2.0)}
    monkeypatch.setattr(Watch, "_gates", lambda *_: {"m": values})
    return {"0m": {"forget_mean": [0.5, 0.5], "effective_length": [2.0, 2.0]}}


def test_a_run_records_gates_and_draws_one_picture_per_checkpoint(
    constant_gates, experiment, tmp_path, monkeypatch, caplog
):
    cfg = experiment(steps=5, watch_every=2, checkpoint_every=2, eval_every=0, log_every=2)
    fit(cfg, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["step"], r.get("gates")) for r in records] == [
        (2, None), (2, constant_gates), (4, None), (4, constant_gates), (5, None),
    ]  # fmt: skip
    pictures = sorted(path.name for path in (tmp_path / "run" / "gates").iterdir())
    assert pictures == ["2.png", "4.png"]

    def fail(*_):
        raise ValueError("no fonts")

    monkeypatch.setattr(gate_plot, "draw", fail)
    assert fit(cfg, tmp_path / "other").finished
    assert caplog.messages[0].startswith("the picture gates/2.png failed (ValueError: no fonts)")


@pytest.mark.parametrize("kind", [pytest.param("large", marks=pytest.mark.slow), "odd"])
def test_the_picture_of_gates_is_a_small_png(tmp_path, kind):
    rng = np.random.default_rng(0)
    num_blocks, num_heads = 64, 16
    names = "forget_mean effective_length input_mean input_min input_max floor_share C_norm".split()
    gates = {
        f"{n}m": {name: rng.random(num_heads).tolist() for name in names} for n in range(num_blocks)
    }
    if kind == "odd":  # null, infinite and equal values; another number of heads; no statistic
        nothing = [None, float("inf"), 0.0]
        gates = {"0m": {"C_norm": [2.0] * 2, "input_mean": [0.0] * 2}, "1x": {"m_max": nothing}}
        gates["2s"] = {"effective_length": nothing, "C_norm": [2.0] * 3}
    gate_plot.draw(gates, tmp_path / "1.png", "a$b")
    data = (tmp_path / "1.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 300 * 1024


def test_watch_none_computes_nothing():
    watcher = Watch(
        TrainProgram(config(watch="none"), make_devices(MeshConfig(), jax.devices()[:1]))
    )
    assert not any(watcher.is_due(step) for step in range(10))
    cfg = dataclasses.replace(config())
    watcher = Watch(TrainProgram(cfg, make_devices(MeshConfig(), jax.devices()[:1])))
    assert [step for step in range(1, 7) if watcher.is_due(step)] == [2, 4, 6]
