"""A user-defined `BlockKind` suffices to train, shard, checkpoint and restore a model."""

import dataclasses
import functools
import json
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from xlstm_jax import config, cpu, flops, sharding
from xlstm_jax.cli import main
from xlstm_jax.config import ConfigError, from_dict, to_dict, user_code
from xlstm_jax.modules import BLOCKS, LM, Backbone, LMConfig, MLSTMConfig, param_shapes
from xlstm_jax.modules.capture import sow_gates
from xlstm_jax.plan import formula
from xlstm_jax.train import restore_params

MODULE = pathlib.Path(__file__).with_name("toy_kind.py")


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Restores block kinds and imported modules after a test."""
    before = dict(BLOCKS)
    monkeypatch.setattr(user_code, "imported", {})
    monkeypatch.setattr(cpu, "prepare", lambda: None)
    yield BLOCKS
    BLOCKS.clear()
    BLOCKS.update(before)


@pytest.fixture
def toy(registry):
    config.import_module(str(MODULE))
    return registry["x"]


def model(**changes):
    sizes = dict(vocab_size=11, dim=8, mlstm=MLSTMConfig(num_heads=2, inner_dim=16))
    return LMConfig(**sizes | {"pattern": "mxx"} | changes)


def test_parameters_and_flops_are_counted_by_the_formulas_of_the_kind(toy):
    cfg = model(options=(toy.options(width=5),))
    leaves = jax.tree.leaves(param_shapes(cfg))
    assert flops.count_params(cfg) == sum(leaf.size for leaf in leaves)
    without = flops.forward_flops(model(pattern="m"), 10)
    assert flops.forward_flops(cfg, 10) - without == 10 * 2 * 4 * 8 * 5
    # Sharded over tensor: proj_down of m and out of each x; proj_up of m and inner of each x.
    assert formula._sharded_products(cfg) == (1 + 2, 1 + 2)


def test_parameters_are_sharded_by_the_axes_of_the_kind(toy, one_device):
    cfg = model(vocab_size=16, pattern="xx", options=(toy.options(width=4),))
    rules = sharding.get_rules("fsdp_tensor")
    devices = sharding.make_devices(sharding.MeshConfig(tensor=2, data=1), jax.devices("cpu")[:2])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 6)))
    params = jax.jit(LM(cfg).init)(jax.random.key(0), tokens)
    expected, state = jax.jit(LM(cfg).apply)(params, tokens)
    sharded = jax.device_put(params, sharding.tree_shardings(params, rules, devices.mesh))
    block = sharded["params"]["stack"]["x"]
    assert block["inner"]["kernel"].sharding.spec == PartitionSpec(None, None, "tensor")
    assert block["out"]["kernel"].sharding.spec == PartitionSpec(None, "tensor", None)
    with devices.active():
        logits, _ = jax.jit(LM(cfg).apply)(sharded, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    assert state["x"].shape == (2, 2, 4)


def test_options_round_trip_through_json_under_the_name_of_the_kind(toy):
    cfg = model(options=(toy.options(width=5),))
    values = json.loads(json.dumps(to_dict(cfg)))
    assert values["options"] == {"toy": {"width": 5}}
    assert from_dict(LMConfig, values) == cfg and hash(cfg) == hash(from_dict(LMConfig, values))
    # Defaults are recorded for kinds in the pattern, not for others.
    assert to_dict(model())["options"] == {"toy": {"width": 6}}
    assert "options" not in to_dict(model(pattern="m"))
    with pytest.raises(ConfigError, match=r"toy\.width must be at least 1, got 0"):
        model(options=(toy.options(width=0),))
    with pytest.raises(ConfigError, match=r"options\.toy\.widht is not a field of ToyOptions"):
        from_dict(LMConfig, values | {"options": {"toy": {"widht": 5}}})
    with pytest.raises(ConfigError, match="one entry per kind in modules.BLOCKS, got"):
        model(options=(toy.options(), toy.options()))
    del BLOCKS["x"]
    with pytest.raises(
        ConfigError, match=r"options\.toy names a block kind that is not reg.*--imp"
    ):
        from_dict(LMConfig, values)
    with pytest.raises(
        ConfigError, match="letter='x' is not known; use one of: m, s, M, .*, r, or --imp"
    ):
        model()


def test_kind_without_gates_captures_its_states_and_outputs_alone(toy):
    cfg = model(vocab_size=16)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 4)))
    params = jax.jit(LM(cfg).init)(jax.random.key(0), tokens)
    run = jax.jit(functools.partial(LM(cfg).apply, capture=("gates", "state", "hidden")))
    logits, state, captured = run(params, tokens)
    np.testing.assert_array_equal(logits, jax.jit(LM(cfg).apply)(params, tokens)[0])
    assert set(captured["gates"]) == {"m"} and captured["hidden"].shape == (3, 2, 4, 8)
    assert captured["state"]["x"].shape == (2, 2, 4, 6)  # layers B T width
    np.testing.assert_allclose(captured["state"]["x"][:, :, -1], state["x"], 1e-5, 1e-6)


def test_initial_state_of_a_kind_is_float64_on_request(toy, x64):
    state = LM(model()).init_state(3, "float64")
    assert state["x"].shape == (2, 3, 6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float64")}


class _Gates(nn.Module):
    @nn.compact
    def __call__(self, x):
        sow_gates(self, lambda: {"f": x[..., None]})
        return x


@pytest.mark.parametrize("num_layers", [1, 2])
def test_gates_of_a_kind_are_those_its_layers_store_under_different_names(toy, num_layers):
    class Block(toy.block):
        @nn.compact
        def __call__(self, x, state=None, **flags):
            for _ in range(num_layers):
                x = _Gates()(x)
            return x, self.init_state(x.shape[0]) if state is None else state

    BLOCKS["x"] = dataclasses.replace(toy, block=Block)
    backbone = Backbone(model(pattern="x", final_norm="none"))
    params = {"stack": {"x": {"unused": jnp.zeros(1)}}}
    apply = functools.partial(backbone.apply, {"params": params}, capture=("gates",))
    run, x = lambda x: jax.eval_shape(apply, x)[2], jnp.zeros((2, 4, 8))
    if num_layers == 1:
        assert run(x)["gates"]["x"]["f"].shape == (1, 2, 4, 8, 1)
    else:
        with pytest.raises(ValueError, match="names of captured gates must differ within a block"):
            run(x)


CONFIG = """
import sizes
from xlstm_jax.data import DataConfig
from xlstm_jax.modules import LMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig

def config():
    return ExperimentConfig(
        name="toy",
        model=LMConfig(vocab_size=257, dim=sizes.DIM, pattern="xx"),
        data=DataConfig(source="grammar", seq_len=16, batch_size=4),
        train=TrainConfig(steps=3, eval_every=0, log_every=1),
    )
"""


@pytest.mark.usefixtures("one_device")
def test_commands_import_the_module_given_by_import_option(tmp_path, monkeypatch, capsys):
    """Trains, saves, restores, describes and samples; without the import each command fails."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "toy.py").write_text(CONFIG)
    (tmp_path / "configs" / "sizes.py").write_text("DIM = 8\n")
    shutil.copyfile(MODULE, "my_kinds.py")
    train = ["train", "configs/toy.py", "--run-dir", "run"]
    assert main(train) == 2
    assert "B, d, r, or --import" in capsys.readouterr().err
    assert main([*train, "--import", "my_kinds"]) == 0
    capsys.readouterr()
    cfg, params = restore_params("run")
    assert cfg.model.options_of("x").width == 6
    assert flops.count_params(cfg.model) == sum(leaf.size for leaf in jax.tree.leaves(params))
    # Modules that CONFIG.py imports from its folder are recorded too.
    imports = json.loads((tmp_path / "run" / "config.json").read_text())["imports"]
    assert imports == ["configs/sizes.py", "my_kinds"]

    generate = ["generate", "run", "--prompt", "a", "--max-new-tokens", "2"]
    del BLOCKS["x"]
    user_code.imported.clear()
    assert main(generate) == 2
    error = capsys.readouterr().err
    assert (
        "config.json needs --import configs/sizes.py --import my_kinds" in error
        and error.count("\n") == 1
    )
    monkeypatch.setenv("XLSTM_IMPORT", "my_kinds.py")
    assert main(generate) == 0
    assert capsys.readouterr().out.startswith("a")
    assert main(["describe", "run"]) == 0
    assert "stack/x/inner/kernel" in capsys.readouterr().out
    # The run resumes: imported modules are not part of the compared config.
    assert main([*train, "--train.log-every", "2"]) == 0


def test_missing_module_is_rejected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("nothing", "nothing.py", "../nothing"):
        assert main(["describe", "scaling_160m", "--import", name]) == 2
        assert f"--import {name} must name a .py file or a module" in capsys.readouterr().err
    (tmp_path / "broken.py").write_text("import not_installed_anywhere\n")
    assert main(["describe", "scaling_160m", "--import", "broken"]) == 2
    assert "broken.py:1: ModuleNotFoundError: No module" in capsys.readouterr().err
