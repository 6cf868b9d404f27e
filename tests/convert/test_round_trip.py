"""Round trips: loaded weights are saved unchanged, and saved weights load again."""

import errno
import json
import shutil
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.golden_files import FOLDER
from xlstm_jax import convert, sharding
from xlstm_jax.config import ConfigError
from xlstm_jax.convert import hf, large_fields, mapping, names, tensors
from xlstm_jax.convert.families import FAMILIES
from xlstm_jax.convert.layouts import LAYOUTS
from xlstm_jax.modules import LargeConfig, LMConfig, head_kernel, param_shapes, presets

HF = ["hf_tiny", "hf_tiny_sharded"]
every_folder = pytest.mark.parametrize("name", HF)


def model(**changes) -> LMConfig:
    sizes = {"vocab_size": 23, "dim": 16, "pattern": "MM", "final_norm": "rms"}
    sizes |= {"final_norm_eps": 1e-6, "logit_soft_cap": 30.0}
    return LMConfig(**sizes | {"large": LargeConfig(num_heads=2)} | changes)


@pytest.fixture
def params(key):
    return init(model(), key)


def init(cfg, key):
    """Random parameters, without compiling `LM.init` for each model."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), param_shapes(cfg)
    )


def contents(folder):
    arrays = {}
    for file in folder.glob("*.safetensors"):
        arrays |= safetensors.numpy.load_file(file)
    return arrays


def assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, a, b))


@every_folder
def test_loaded_folder_is_saved_tensor_for_tensor(name, tmp_path):
    cfg, params = convert.load_hf(FOLDER / name)
    convert.save_hf(tmp_path / "out", cfg, params)
    before, after = contents(FOLDER / name), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert after[key].dtype == array.dtype and np.array_equal(after[key], array), key
    assert convert.load_hf(tmp_path / "out")[0] == cfg


def test_saved_config_has_the_fields_of_the_loaded_one(tmp_path):
    cfg, params = convert.load_hf(FOLDER / "hf_tiny")
    convert.save_hf(tmp_path / "out", cfg, params)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (FOLDER / "hf_tiny", tmp_path / "out")
    )
    # The feed-forward width 352 is 2.667 * 128 rounded up to a multiple of 16, and 2.75 * 128.
    rewritten = {"ffn_proj_factor", "ffn_round_up_to_multiple_of", "transformers_version"}
    assert {k for k in before if before[k] != after.get(k)} == rewritten


def test_shards_have_an_index_and_load_as_a_single_file_does(tmp_path, params):
    convert.save_hf(tmp_path / "one", model(), params)
    convert.save_hf(tmp_path / "many", model(), params, max_shard_bytes=6000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / tensors.INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["weight_map"].keys() == contents(tmp_path / "one").keys()
    sizes = {name: array.nbytes for name, array in contents(tmp_path / "one").items()}
    total = sum(sizes.values())
    assert index["metadata"] == {"total_parameters": total // 4, "total_size": total}
    for file in files:
        inside = [sizes[name] for name, other in index["weight_map"].items() if other == file]
        assert len(inside) == 1 or sum(inside) <= 6000
    assert_same_trees(convert.load_hf(tmp_path / "many")[1], params)
    assert not list(tmp_path.glob(".*")), "a temporary folder was left behind"


def test_saving_in_bfloat16_rounds_once(tmp_path, params):
    convert.save_hf(tmp_path / "out", model(), params, dtype="bfloat16")
    cfg, loaded = convert.load_hf(tmp_path / "out")
    assert cfg.dtype == "bfloat16"
    assert convert.load_hf(tmp_path / "out", dtype="float32")[0].dtype == "float32"
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_same_trees(loaded, rounded)
    assert {a.dtype for a in contents(tmp_path / "out").values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_tied_head_is_saved_as_a_separate_tensor(tmp_path, key):
    cfg = model(tie_embeddings=True)
    params = init(cfg, key)
    convert.save_hf(tmp_path / "out", cfg, params)
    loaded_cfg, loaded = convert.load_hf(tmp_path / "out")
    assert not loaded_cfg.tie_embeddings
    assert jnp.array_equal(head_kernel(cfg, params), head_kernel(loaded_cfg, loaded))
    del loaded["lm_head"]
    assert_same_trees(loaded, params)


@pytest.mark.parametrize("has_head", [True, False])
def test_head_tensor_overrides_tie_word_embeddings(tmp_path, params, has_head):
    convert.save_hf(tmp_path / "out", model(), params)
    edit(tmp_path / "out", tie_word_embeddings=True)
    if not has_head:
        arrays = contents(tmp_path / "out")
        del arrays["lm_head.weight"]
        safetensors.numpy.save_file(arrays, tmp_path / "out" / "model.safetensors")
    cfg, _ = convert.load_hf(tmp_path / "out")
    assert cfg.tie_embeddings == (not has_head)


def edit(folder, *drop, **changes):
    config = json.loads((folder / hf.CONFIG).read_text()) | changes
    config = {name: value for name, value in config.items() if name not in drop}
    (folder / hf.CONFIG).write_text(json.dumps(config))


def test_alternative_names_of_sizes_are_accepted(tmp_path, params):
    convert.save_hf(tmp_path / "out", model(), params)
    cfg = convert.load_hf(tmp_path / "out")[0]
    edit(tmp_path / "out", "hidden_size", "num_hidden_layers")
    assert convert.load_hf(tmp_path / "out")[0] == cfg
    edit(tmp_path / "out", hidden_size=8)
    with pytest.raises(ConfigError, match="hidden_size and embedding_dim of .* got 8 and 16"):
        convert.load_hf(tmp_path / "out")


def test_use_bias_adds_no_bias_to_the_final_norm(tmp_path, key):
    cfg = model(large=LargeConfig(num_heads=2, use_bias=True))
    convert.save_hf(tmp_path / "out", cfg, init(cfg, key))
    assert convert.load_hf(tmp_path / "out")[0].final_norm_bias is False


def test_load_large_reads_several_numbered_files(tmp_path):
    source = FOLDER / "xlstm_large_plain_checkpoint"
    shutil.copyfile(source / "config.yaml", tmp_path / "config.yaml")
    tensors = sorted(contents(source).items())
    for number in range(3):
        part = dict(tensors[number::3])
        safetensors.numpy.save_file(part, tmp_path / f"model_{number}.safetensors")
    cfg, params = convert.load_large(tmp_path)
    expected_cfg, expected = convert.load_large(source)
    assert cfg == expected_cfg
    assert_same_trees(params, expected)


def test_parameters_are_sharded_over_the_active_mesh():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        _, sharded = convert.load_hf(FOLDER / "hf_tiny")
    kernel = sharded["stack"]["M"]["ffn"]["proj_up"]["kernel"]
    # Below `min_shard_size`, hence replicated over fsdp, but sharded over tensor.
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor")
    assert len(kernel.sharding.device_set) == 8
    _, expected = convert.load_hf(FOLDER / "hf_tiny")
    assert_same_trees(jax.device_get(sharded), jax.device_get(expected))


@pytest.mark.parametrize("width", [1, 3, 7, 64, 100, 352, 2048, 2112, 10944])
@pytest.mark.parametrize("dim", [3, 48, 100, 768, 4096])
def test_factor_of_gives_the_exact_width(width, dim):
    assert int(dim * large_fields.factor_of(width, dim)) == width


def test_7b_model_has_a_name_for_every_parameter_and_the_published_config():
    cfg = presets.get("xlstm_7b")
    table = mapping.targets(cfg, names.HF, mapping.parameters(cfg))
    sizes = [int(np.prod(target.torch_shape)) for target in table.values()]
    assert sum(sizes) == 6_865_424_896
    config = hf.config_of(cfg)
    published = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_heads": 8,
        "vocab_size": 50304,
        "qk_dim_factor": 0.5,
        "v_dim_factor": 1.0,
        "ffn_proj_factor": 2.667,
        "ffn_round_up_to_multiple_of": 64,
        "gate_soft_cap": 15.0,
        "output_logit_soft_cap": 30.0,
        "use_bias": False,
    }
    assert {name: config[name] for name in published} == published


RULES = [names.V1, names.LARGE, *(family.rules for family in FAMILIES.values())]


@pytest.mark.parametrize("rules", RULES)
def test_names_and_paths_are_unique(rules):
    # Two kinds of blocks may use the same name, as no block is of both kinds.
    assert len({(rule.torch_name, rule.path.split("/")[1]) for rule in rules}) == len(rules)
    assert len({rule.path for rule in rules}) == len(rules)


def test_from_torch_inverts_to_torch_for_every_layout(rng):
    shapes = {
        "same": [(3,), (3, 4)],
        "transposed": [(3, 4)],
        "row": [(3,)],
        "headwise": [(2, 3, 4)],
        "convolution": [(4, 6), (4, 6, 6)],
        "recurrent": [(2, 3, 4, 3)],
        "gate_biases": [(2, 4, 3)],
    }
    assert shapes.keys() == LAYOUTS.keys()
    for name, layout in LAYOUTS.items():
        for shape in shapes[name]:
            array = rng.normal(size=shape)
            converted = layout.to_torch(array)
            assert converted.shape == layout.torch_shape(shape)
            assert np.array_equal(layout.from_torch(converted, shape), array)


def test_missing_cap_is_saved_as_a_cap_without_effect(tmp_path, key):
    cfg = model(logit_soft_cap=None, large=LargeConfig(num_heads=2, gate_soft_cap=None))
    params = init(cfg, key)
    convert.save_hf(tmp_path / "out", cfg, params)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["output_logit_soft_cap"] == config["gate_soft_cap"] == large_fields.NO_CAP
    loaded = convert.load_hf(tmp_path / "out")[0]
    assert loaded.logit_soft_cap is None and loaded.large.gate_soft_cap is None


@pytest.mark.parametrize("dim, fits", [(128, True), (64, False)])
def test_use_cache_is_set_only_for_widths_that_transformers_supports(dim, fits):
    cfg = model(dim=dim)
    assert hf.config_of(cfg)["use_cache"] is fits


def test_a_folder_that_cannot_be_written_is_named_in_the_error(tmp_path, params, monkeypatch):
    def mkdtemp(prefix, dir):
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/{prefix}x")

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with pytest.raises(PermissionError) as error:
        convert.save_hf(tmp_path / "folder", model(), params)
    assert error.value.filename == str(tmp_path / "folder")
