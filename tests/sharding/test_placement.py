"""Every parameter has a sharding on every mesh, under all sharding rules."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from xlstm_jax import sharding
from xlstm_jax.config import ConfigError
from xlstm_jax.convert.mapping import parameters
from xlstm_jax.modules import LM, LMConfig, MLSTMConfig, SLSTMConfig, presets
from xlstm_jax.modules.large import LargeConfig
from xlstm_jax.sharding.rules import LOGICAL_AXES
from xlstm_jax.train import TrainConfig, make_optimizer

# Models that together have every kind of parameter.
MODELS = [
    LMConfig(
        vocab_size=16,
        dim=8,
        pattern="msM",
        mlstm=MLSTMConfig(use_bias=True, conv_mixing=mixing),
        slstm=SLSTMConfig(ffn_bias=True, conv_mixing=mixing),
        large=LargeConfig(use_bias=True),
        final_norm_bias=True,
    )
    for mixing in (False, True)
]


@pytest.mark.parametrize("cfg", MODELS, ids=["depthwise conv", "mixing conv"])
def test_every_parameter_has_logical_axes(cfg):
    for path, leaf in parameters(cfg).items():
        names = sharding.logical_axes(path, len(leaf.shape))
        assert len(names) == len(leaf.shape)
        assert set(names) <= {*LOGICAL_AXES, None}
        assert (names[:1] == ("layers",)) == path.startswith("stack/"), path


@pytest.mark.parametrize("name", ["xlstm_7b", "xlstm_125m_7:1"])
def test_every_parameter_of_a_preset_has_logical_axes(name):
    for path, leaf in parameters(presets.get(name)).items():
        assert len(sharding.logical_axes(path, len(leaf.shape))) == len(leaf.shape)


def test_a_parameter_without_logical_axes_is_an_error():
    with pytest.raises(KeyError, match="stack/m/new/kernel with 3 axes"):
        sharding.logical_axes("stack/m/new/kernel", 3)


def test_moments_are_sharded_like_their_parameters():
    cfg = presets.get("scaling_160m")
    state = jax.eval_shape(make_optimizer(TrainConfig()).init, _tree(cfg))
    sizes = {"data": 2, "fsdp": 4, "seq": 1, "tensor": 2}
    rules = sharding.get_rules("fsdp_tensor")
    num_bytes = sharding.bytes_per_device(_tree(cfg), rules, sizes)
    assert sharding.bytes_per_device(state, rules, sizes) == pytest.approx(2 * num_bytes, rel=1e-6)


def _tree(cfg):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(LM(cfg).init, jax.random.key(0), tokens)["params"]


@pytest.mark.parametrize("table", sharding.RULES.values(), ids=sharding.RULES)
def test_all_rules_have_every_logical_axis_and_only_mesh_axes(table):
    assert set(table) == set(LOGICAL_AXES)
    assert {axis for axes in table.values() for axis in axes} <= set(sharding.MESH_AXES)


SIZES = {"data": 2, "fsdp": 4, "seq": 1, "tensor": 2}


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        ("token_embedding/embedding", (1024, 512), (("tensor", "fsdp"), None)),
        ("lm_head/kernel", (512, 1024), ("fsdp", "tensor")),  # fsdp already shards embed
        ("stack/M/mlstm/q/kernel", (3, 512, 512), (None, "fsdp", "tensor")),
        ("stack/M/mlstm/out_proj/kernel", (3, 512, 512), (None, "tensor", "fsdp")),
        ("stack/M/ffn/proj_down/kernel", (3, 1024, 512), (None, "tensor", "fsdp")),
        ("stack/M/mlstm/q/kernel", (3, 64, 64), (None, None, "tensor")),  # small
        ("stack/M/mlstm/q/kernel", (3, 514, 1023), (None, None, None)),  # does not divide
        ("stack/s/slstm/recurrent_kernel", (2, 4, 8, 4, 8), (None, "tensor", None, None, None)),
        ("stack/m/xlstm_norm/scale_offset", (2, 512), (None, None)),
    ],
)
def test_parameters_are_sharded_by_the_rules(path, shape, expected):
    spec = sharding.partition_spec(path, shape, sharding.get_rules("fsdp_tensor"), SIZES)
    assert spec == PartitionSpec(*expected)


@pytest.mark.parametrize("dim", [64, 512])
def test_the_number_of_stacked_layers_does_not_change_the_sharding(dim):
    rules = sharding.get_rules("fsdp_tensor")
    specs = {
        sharding.partition_spec("stack/M/mlstm/q/kernel", (layers, dim, dim), rules, SIZES)
        for layers in (1, 3, 1000)
    }
    assert len(specs) == 1


def test_axes_that_the_mesh_lacks_are_ignored():
    rules = sharding.get_rules("fsdp_tensor")
    spec = sharding.partition_spec("lm_head/kernel", (512, 1024), rules, {"tensor": 2})
    assert spec == PartitionSpec(None, "tensor")


@pytest.mark.parametrize("rules", sharding.RULES)
def test_bytes_per_device_is_the_sum_of_shard_bytes(rules):
    cfg = presets.large(512, 2, 4, 1024, vocab_size=1024)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    table = sharding.get_rules(rules)
    total = 0
    for path, leaf in parameters(cfg).items():
        leaf_sharding = sharding.sharding_of(path, leaf.shape, table, mesh)
        total += math.prod(leaf_sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    assert sharding.bytes_per_device(_tree(cfg), table, dict(mesh.shape)) == total


def test_make_mesh_uses_all_devices():
    assert dict(sharding.make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4, "seq": 1, "tensor": 1}
    assert sharding.make_mesh(data=1, tensor=-1).shape["tensor"] == 8


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 2, "fsdp": 2}, {"fsdp": 3}])
def test_mesh_sizes_that_do_not_multiply_are_rejected_with_sizes_that_do(sizes):
    with pytest.raises(ConfigError, match="multiply to 8.*8 x 1, 4 x 2, 2 x 4, 1 x 8"):
        sharding.make_mesh(**sizes)


def test_unknown_rules_are_rejected():
    with pytest.raises(ConfigError, match="use one of: data, fsdp, fsdp_tensor, fsdp_seq"):
        sharding.get_rules("zero")


def test_logical_axes_have_the_widths_that_they_name():
    """Of two that are exchanged, one dimension would have another width."""
    cfg = LMConfig(
        vocab_size=50,
        dim=12,
        pattern="msM",
        mlstm=MLSTMConfig(num_heads=2, inner_dim=28, qkv_block_size=2),
        slstm=SLSTMConfig(num_heads=2, ffn_dim=20),
        large=LargeConfig(num_heads=2, qk_dim=6, v_dim=16, ffn_dim=20),
    )
    # `proj_up` has two inner widths, and a block-diagonal projection is stored by blocks of two.
    widths = {
        "embed": {12},
        "inner": {56, 28, 14, 6, 16},
        "mlp": {20, 40},
        "vocab": {50},
        "heads": {2},
    }
    checked = set()
    for path, leaf in parameters(cfg).items():
        names = sharding.logical_axes(path, len(leaf.shape))
        if "recurrent" in path or "slstm/" in path:  # of one head
            continue
        for size, name in zip(leaf.shape, names, strict=True):
            assert size in widths.get(name, {size}), (path, names)
            checked.add(name)
    assert checked >= widths.keys()
