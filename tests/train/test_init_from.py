"""Runs that start from other weights: a run, or a folder of transformers."""

import dataclasses
import logging
import shutil

import jax
import numpy as np
import pytest

from tests.convert.baselines import random_params
from xlstm_jax import convert
from xlstm_jax.cli import options
from xlstm_jax.cli.train import Train
from xlstm_jax.config import ConfigError
from xlstm_jax.modules import LM, LargeConfig
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.sharding import MeshConfig, make_devices
from xlstm_jax.train import checkpoint, fit, initial, program, restore_params
from xlstm_jax.train.program import TrainProgram

LARGE = dict(
    dim=16,
    pattern="MM",
    large=LargeConfig(num_heads=2, ffn_dim=16),
    final_norm="rms",
    final_norm_eps=1e-6,
)


@pytest.fixture(scope="module")
def base(tiny_lm, experiment, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("base") / "run"
    return fit(experiment(steps=3, eval_every=0, checkpoint_every=0), run_dir).state.params, run_dir


@pytest.fixture(scope="module")
def folder(experiment, tmp_path_factory):
    """A folder of transformers, its config and its parameters."""
    cfg = experiment(model=LARGE, eval_every=0, steps=1)
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("hf") / "hf"
    shapes = param_shapes(cfg.model)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape).astype(np.float32), shapes)
    convert.save_hf(path, cfg.model, params)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    return cfg, params, path


def from_(cfg, source, **train):
    train = dataclasses.replace(cfg.train, **train)
    return dataclasses.replace(cfg, init_from=str(source), train=train)


def test_a_run_starts_from_the_parameters_of_another(base, experiment, tmp_path, assert_same):
    params, run_dir = base
    # So small a rate changes no float32 parameter.
    cfg = from_(experiment(eval_every=0), run_dir, steps=1, lr=1e-30)
    assert_same(fit(cfg, tmp_path / "run").state.params, params)
    assert_same(restore_params(tmp_path / "run")[1], params)


@pytest.mark.slow
def test_the_source_is_read_only_when_the_run_starts(base, experiment, tmp_path, assert_same):
    source = shutil.copytree(base[1], tmp_path / "source")
    cfg = from_(experiment(eval_every=0), source, steps=6)

    def crash(step, metrics):
        if step == 6:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fit(cfg, tmp_path / "a", on_metrics=crash)
    expected = fit(cfg, tmp_path / "b").state
    shutil.rmtree(source)
    assert_same(fit(cfg, tmp_path / "a").state, expected)


def test_a_program_starts_from_a_folder_of_transformers(folder, assert_same, monkeypatch):
    monkeypatch.setattr(program, "LM", LM)
    cfg, params, path = folder
    with jax.default_device(None):
        mesh = MeshConfig(data=4, fsdp=2, min_shard_size=1)
        target = TrainProgram(dataclasses.replace(from_(cfg, path), mesh=mesh), make_devices(mesh))
        state = target.init_from(initial.load_params(target))
    assert_same(jax.device_get(state.params), params)
    for leaf, expected in zip(*map(jax.tree.leaves, (state, target.arguments[0])), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_a_run_of_a_baseline_starts_from_a_folder_of_transformers(experiment, tmp_path):
    model = dict(dim=16, pattern="a", final_norm="rms", final_norm_eps=1e-6)
    model |= dict(attention=AttentionConfig(num_heads=2, num_kv_heads=1, ffn_dim=16))
    cfg = experiment(model=model, eval_every=0)
    params = random_params(cfg.model)
    convert.save_hf(tmp_path / "hf", cfg.model, params)
    target = TrainProgram(from_(cfg, tmp_path / "hf"), make_devices(cfg.mesh))
    loaded = jax.device_get(initial.load_params(target))
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))


def test_the_license_of_the_weights_is_copied_to_the_run_and_further(folder, tmp_path):
    cfg, _, path = folder
    for name in ("first", "second"):
        (tmp_path / name / checkpoint.FOLDER).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    initial.copy_notes(from_(cfg, path), tmp_path / "first")
    initial.copy_notes(from_(cfg, tmp_path / "first"), tmp_path / "second")
    for name in ("WEIGHTS_LICENSE.txt", "special_tokens.json"):
        first, second = ((tmp_path / run / name).read_text() for run in ("first", "second"))
        assert first == second and first.strip()
    assert "mit (README.md)" in (tmp_path / "second" / "WEIGHTS_LICENSE.txt").read_text()


@pytest.mark.parametrize(
    "model, message",
    [
        ({"vocab_size": 300}, "model.vocab_size must be 257, that of init_from=.*, got 300"),
        (
            {"large": LargeConfig(num_heads=2, ffn_dim=32)},
            r"stack/M/ffn/proj_down/kernel is \(2, 32, 16\) instead of \(2, 16, 16\)",
        ),
        ({"pattern": "MMM"}, r"is \(3, .*\) instead of \(2, .*\)"),
        ({"pattern": "MmM"}, "is .* instead of"),
        ({"tie_embeddings": True}, "lm_head/kernel is absent instead of"),
    ],
)
def test_another_architecture_is_rejected_before_anything_is_read(
    folder, experiment, tmp_path, model, message, monkeypatch
):
    cfg, _, path = folder
    monkeypatch.setattr(convert.mapping, "load", lambda *_: pytest.fail("reads parameters"))
    monkeypatch.setattr(program.TrainProgram, "step", property(lambda _: pytest.fail("compiles")))
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model))
    with pytest.raises(ConfigError, match=message):
        fit(from_(other, path), tmp_path / "run")
    assert list(tmp_path.rglob("*.json")) == []


def test_other_options_of_the_model_are_named_in_a_warning(folder, experiment, caplog):
    cfg, _, path = folder
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, logit_soft_cap=30.0))
    with caplog.at_level(logging.WARNING, "xlstm_jax"):
        initial._check_model(from_(cfg, path), cfg.model)
        assert not caplog.messages
        initial._check_model(from_(other, path), cfg.model)
    assert "logit_soft_cap: 30.0, stored None" in caplog.messages[0]


def test_other_heads_and_positions_are_named_in_a_warning(experiment, caplog):
    """With half as many heads of twice the width, parameters have the same shapes."""
    few, many = AttentionConfig(num_heads=2), AttentionConfig(num_heads=4, rotary_base=5e5)
    model = dict(dim=16, pattern="a", final_norm="rms")
    cfg, other = (experiment(model=model | {"attention": options}) for options in (few, many))
    with caplog.at_level(logging.WARNING, "xlstm_jax"):
        initial._check_model(from_(cfg, "other"), other.model)
    assert "attention.num_heads: 2, stored 4" in caplog.messages[0]
    assert "attention.rotary_base: 10000.0, stored 500000.0" in caplog.messages[0]


@pytest.mark.parametrize(
    "source, message",
    [
        ("hf://name", "'hf://name' must be hf://ORG/NAME or hf://ORG/NAME@REVISION"),
        ("missing", "must be a run or a folder of transformers, but has no config.json"),
    ],
)
def test_a_source_that_does_not_exist_is_rejected(experiment, tmp_path, source, message, tiny_lm):
    with pytest.raises(ConfigError, match=message):
        fit(from_(experiment(), source), tmp_path / "run")
    assert list(tmp_path.rglob("*.json")) == []


def test_the_command_line_has_the_option(base):
    args = options.parse_with_config("train", Train, [str(base[1]), "--init-from", "other"])
    assert args.experiment.init_from == "other"
