"""Configs and weights of the baselines: round trips, and what is rejected."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.convert.baselines import GOLDEN, OTHERS, changed, random_params
from tests.golden_files import FOLDER
from xlstm_jax import convert
from xlstm_jax.config import ConfigError
from xlstm_jax.convert import WeightsError, hf
from xlstm_jax.convert.families import FAMILIES
from xlstm_jax.convert.joined import Stored, joined, separate, stored_tensors
from xlstm_jax.convert.tensors import WeightsWarning, from_arrays

every_family = pytest.mark.parametrize("family", GOLDEN)


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.fixture
def folder_of(tmp_path):
    """Copies the golden folder of a family, with changed fields and tensors."""

    def copy(family, fields=None, change=lambda tensors: None):
        name = GOLDEN.get(family, family)
        folder = shutil.copytree(FOLDER / name, tmp_path / name, copy_function=shutil.copyfile)
        path, tensors = folder / "config.json", tensors_of(folder)
        path.write_text(json.dumps(json.loads(path.read_text()) | (fields or {})))
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder

    return copy


def message(function, *args, **options):
    with pytest.raises(ConfigError) as error:
        function(*args, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def assert_same_arrays(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@every_family
def test_exported_folder_has_the_tensors_it_was_loaded_from(family, tmp_path):
    source = FOLDER / GOLDEN[family]
    cfg, params = convert.load_hf(source)
    convert.save_hf(tmp_path / "out", cfg, params)
    a, b = tensors_of(source), tensors_of(tmp_path / "out")
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    loaded, again = convert.load_hf(tmp_path / "out")
    assert loaded == cfg
    assert_same_arrays(again, params)


@every_family
def test_loading_inverts_saving_for_other_shapes(family, tmp_path):
    cfg = OTHERS[family]
    params = random_params(cfg)
    convert.save_hf(tmp_path / "out", cfg, params, max_shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded, again = convert.load_hf(tmp_path / "out")
    assert loaded == cfg
    assert_same_arrays(again, params)


@every_family
def test_saved_config_has_no_unknown_field(family, tmp_path, caplog):
    convert.save_hf(tmp_path / "out", OTHERS[family], random_params(OTHERS[family]))
    hf.open_folder(tmp_path / "out")
    assert not caplog.messages


# Family, a field of config.json with an unsupported value, and a part of the message.
FIELDS = [
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "rope_type of rope_scaling of"),
    ("llama", {"rope_parameters": {"type": "yarn"}}, "must be 'default', got 'yarn'"),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta of rope_parameters of"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor of"),
    ("llama", {"mlp_bias": True}, "mlp_bias of"),
    ("llama", {"hidden_act": "gelu"}, "must be 'silu', got 'gelu'"),
    ("llama", {"num_attention_heads": 5}, "must be a divisor of hidden_size=48, got 5"),
    ("llama", {"num_key_value_heads": 3}, "must be a divisor of num_attention_heads=4, got 3"),
    ("llama", {"num_hidden_layers": 3}, "at most 2, the number of blocks in the weights"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps of"),
    ("llama", {"model_type": "mistral"}, "must be one of 'xlstm', 'llama', 'mamba', "),
    ("llama", {"dtype": "float16"}, "load it with dtype='bfloat16' or dtype='float32'"),
    ("mamba", {"hidden_act": "relu"}, "must be 'silu', got 'relu'"),
    ("mamba", {"time_step_rank": "large"}, "time_step_rank of"),
    ("mamba", {"state_size": 0}, "state_size of"),
    ("mamba2", {"time_step_limit": [0.0, 0.1]}, "must be [0, Infinity], got [0.0, 0.1]"),
    ("mamba2", {"num_heads": 5}, "must be expand * hidden_size / head_dim = 6, got 5"),
    ("mamba2", {"n_groups": 4}, "must be a divisor of num_heads=6, got 4"),
    ("rwkv", {"layer_norm_epsilon": 1e-6}, "must be 1e-05, that of the final norm, got 1e-06"),
    ("qwen3_next", {"num_experts": 8}, "must be 0, got 8; only dense models are supported"),
    ("qwen3_next", {"num_experts": None}, "num_experts of"),
    ("qwen3_next", {"layer_types": ["full_attention"]}, "must be a list of 2 of"),
    ("qwen3_next", {"layer_types": ["full_attention", "x"]}, "must be a list of 2 of"),
    ("qwen3_next", {"linear_num_key_heads": 3}, "a divisor of linear_num_value_heads=4, got 3"),
    ("qwen3_next", {"rope_parameters": {"partial_rotary_factor": 2}}, "must be at most 1, got 2"),
]


@pytest.mark.parametrize("family, fields, expected", FIELDS)
def test_unsupported_field_is_named(folder_of, family, fields, expected):
    text = message(convert.load_hf, folder_of(family, fields))
    assert expected in text and next(iter(fields)) in text


@pytest.mark.parametrize(
    "limit", [None, [0, float("inf")], [0.0, {"__float__": "Infinity"}]], ids=str
)
def test_steps_without_limit_are_accepted(folder_of, limit):
    fields = {"time_step_limit": limit} if limit else {}
    assert hf.open_folder(folder_of("mamba2", fields))[0].mamba2.groups == 2


def test_older_configs_of_rotary_positions_are_read(folder_of):
    fields = {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": None}
    cfg, _ = hf.open_folder(folder_of("llama", fields | {"head_dim": None}))
    assert cfg.attention.rotary_base == 500.0 and cfg.attention.head_dim == 12


def test_pattern_of_a_hybrid_follows_the_interval(folder_of):
    fields = {"layer_types": None, "full_attention_interval": 2, "partial_rotary_factor": 0.5}
    cfg, _ = hf.open_folder(folder_of("qwen3_next", fields | {"rope_parameters": None}))
    assert cfg.pattern == "da" and cfg.attention.rotary_fraction == 0.5


def test_dropout_that_only_affects_training_is_logged(folder_of, caplog):
    hf.open_folder(folder_of("llama", {"attention_dropout": 0.1}))
    assert "attention_dropout of" in caplog.text and "only affects training" in caplog.text


def test_unknown_fields_are_logged(folder_of, caplog):
    hf.open_folder(folder_of("rwkv", {"head_size": 64}))
    assert "are ignored: head_size" in caplog.text


# Family, a change of the tensors, and a part of the message.
TENSORS = [
    (
        "mamba",
        lambda t: t.pop("backbone.layers.1.mixer.in_proj.weight"),
        "mixer.in_proj.weight (128, 32) is missing (our stack/b/mamba/x/kernel, "
        "stack/b/mamba/gate/kernel)",
    ),
    (
        "mamba2",
        lambda t: t.update({"backbone.layers.0.mixer.conv1d.bias": np.zeros(71, np.float32)}),
        "backbone.layers.0.mixer.conv1d.bias must have the shape (72,), got (71,)",
    ),
    (
        "qwen3_next",
        lambda t: t.pop("model.layers.0.linear_attn.in_proj_ba.weight"),
        "model.layers.0.linear_attn.in_proj_ba.weight (8, 24) is missing",
    ),
    (
        "llama",
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(48, np.float32)}),
        "model.layers.0.self_attn.q_proj.bias (48,) is unexpected",
    ),
    ("rwkv", lambda t: t.pop("head.weight"), "head.weight (97, 32) is missing"),
    ("llama", lambda t: t.pop("lm_head.weight"), "lm_head.weight (97, 48) is missing"),
]


@pytest.mark.parametrize("family, change, expected", TENSORS)
def test_tensor_that_does_not_match_is_named_as_it_is_stored(folder_of, family, change, expected):
    with pytest.raises(WeightsError) as error:
        convert.load_hf(folder_of(family, change=change))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_value_of_a_joined_tensor_that_is_not_finite_is_named_once(folder_of, tmp_path):
    name = "backbone.layers.0.mixer.in_proj.weight"
    folder = folder_of("mamba", change=lambda tensors: tensors[name].fill(np.nan))
    with pytest.warns(WeightsWarning, match=f"tensor '{name}' has") as caught:
        cfg, params = convert.load_hf(folder)
    assert len(caught) == 1
    with pytest.warns(WeightsWarning, match=f"tensor '{name}' has"):
        convert.save_hf(tmp_path / "out", cfg, params)


@pytest.mark.parametrize("family", ["llama", "rwkv"])
@pytest.mark.parametrize("prefix, base", [("module.", ""), ("_orig_mod.", ""), ("", "base")])
def test_renamed_tensors_load_as_the_originals(folder_of, family, prefix, base):
    base = FAMILIES[family].base if base else ""

    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix(base)] = tensors.pop(name)

    a, b = (
        convert.load_hf(folder_of(family, change=rename)),
        convert.load_hf(FOLDER / GOLDEN[family]),
    )
    assert a[0] == b[0]
    assert_same_arrays(a[1], b[1])


def test_saved_rotary_frequencies_are_skipped(folder_of):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = folder_of("llama", change=lambda t: t.update({name: np.ones(6, np.float32)}))
    assert convert.load_hf(folder)[0].num_blocks == 2


# Family, changed options, and a part of the message.
UNSUPPORTED = [
    ("llama", {"attention__window": 32}, "attention.window=32 instead of None"),
    ("llama", {"attention__rotary_fraction": 0.0}, "attention.rotary_fraction=0.0 instead of 1.0"),
    ("llama", {"attention__num_heads": 5}, "attention.num_heads=5 that does not divide dim"),
    (
        "llama",
        {"attention__norm_eps": 1e-5},
        "final_norm_eps=1e-06 different from attention.norm_eps",
    ),
    ("llama", {"final_norm": "layer"}, "final_norm='layer' instead of 'rms'"),
    ("llama", {"logit_soft_cap": 30.0}, "logit_soft_cap=30.0 instead of None"),
    ("mamba", {"mamba__inner_dim": 50}, "mamba.inner_dim=50 that is not a multiple of dim=36"),
    ("mamba", {"embedding_norm": "layer_scale"}, "embedding_norm='layer_scale' instead of 'none'"),
    ("mamba2", {"final_norm_eps": 1e-6}, "final_norm_eps=1e-06 different from mamba2.norm_eps"),
    ("rwkv", {"embedding_norm": "none"}, "embedding_norm='none' instead of 'layer_scale'"),
    (
        "rwkv",
        {"rwkv4__norm_eps": 1e-6, "final_norm_eps": 1e-6},
        "final_norm_eps=1e-06 instead of 1e-05",
    ),
    ("qwen3_next", {"attention__ffn_dim": 60}, "ffn_dim that differs between letters"),
    ("qwen3_next", {"gated_delta__norm_offset": False}, "gated_delta.norm_offset=False instead"),
    ("qwen3_next", {"attention__num_sinks": 4}, "attention.num_sinks=4 instead of 0"),
    ("qwen3_next", {"pattern": "bd"}, "pattern='bd' with letters other than M, a, b, B, r or da"),
]


@pytest.mark.parametrize("family, changes, expected", UNSUPPORTED)
def test_model_that_transformers_does_not_support_is_rejected(family, changes, expected, tmp_path):
    cfg = changed(family, **changes)
    text = message(convert.save_hf, tmp_path / "out", cfg, {})
    assert f"got {expected}" in text or f", {expected}" in text
    assert not list(tmp_path.iterdir())


def test_attention_is_written_as_the_family_that_has_its_options():
    assert hf.config_of(OTHERS["llama"])["model_type"] == "llama"
    cfg = changed("qwen3_next", pattern="aa")
    assert hf.config_of(cfg)["model_type"] == "qwen3_next"


@pytest.mark.parametrize("groups", [1, 2])
def test_joined_tensor_has_its_parts_group_by_group(groups):
    parts = {"a": np.arange(4.0).reshape(4, 1), "b": 10 + np.arange(8.0).reshape(8, 1)}
    stored = Stored({name: part.shape for name, part in parts.items()}, groups)
    array = stored.join(list(parts.values()))
    expected = {1: [*range(4), *range(10, 18)], 2: [0, 1, *range(10, 14), 2, 3, *range(14, 18)]}
    assert array[:, 0].tolist() == expected[groups]
    for name, part in parts.items():
        assert np.array_equal(stored.part(name, array), part)


def test_tensors_are_joined_in_the_blocks_that_have_the_parts():
    modules = (joined("layers.{}.in", "x", "y"),)
    shapes = {"layers.1.in.x.weight": (2, 3), "layers.1.in.y.weight": (4, 3), "head": (5,)}
    stored = stored_tensors(shapes, modules, 2)
    assert {n: t.shape for n, t in stored.items()} == {"layers.1.in.weight": (6, 3), "head": (5,)}
    source = from_arrays({"layers.1.in.weight": np.arange(18.0).reshape(6, 3), "head": np.ones(5)})
    source = separate(source, stored)
    assert source.shapes == shapes
    assert source.read("layers.1.in.y.weight")[0].tolist() == [6, 7, 8]
