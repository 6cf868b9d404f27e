"""Invalid weights and configs are rejected with a one-line message that names the problems."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests import golden_files
from tests.convert import published
from tests.convert.files import rewrite
from tests.golden_files import FOLDER
from xlstm_jax import convert
from xlstm_jax.config import ConfigError
from xlstm_jax.convert import WeightsError, large, mapping, names, tensors
from xlstm_jax.modules import LargeConfig, LMConfig


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint in one file, to be corrupted."""
    return shutil.copytree(FOLDER / "hf_tiny", tmp_path / "hf", copy_function=shutil.copyfile)


@pytest.fixture
def shards(tmp_path):
    """A copy of a checkpoint in four files, to be corrupted."""
    source = FOLDER / "hf_tiny_sharded"
    return shutil.copytree(source, tmp_path / "sharded", copy_function=shutil.copyfile)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(load, *args, error=ConfigError, **kwargs):
    with pytest.raises(error) as caught:
        load(*args, **kwargs)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(folder):
    def corrupt(tensors):
        del tensors["backbone.out_norm.weight"]
        del tensors["backbone.blocks.1.mlstm_layer.q.weight"]
        tensors["backbone.blocks.2.norm_ffn.weight"] = np.ones(128, np.float32)
        tensors["lm_head.weight"] = np.ones((96, 64), np.float32)

    rewrite(folder, corrupt)
    text = message(convert.load_hf, folder, error=WeightsError)
    for part in (
        "backbone.out_norm.weight (128,) is missing (our out_norm/scale)",
        "backbone.blocks.1.mlstm_layer.q.weight (64, 128) is missing (our stack/M/mlstm/q/kernel)",
        "backbone.blocks.2.norm_ffn.weight (128,) is unexpected",
        "lm_head.weight must have the shape (96, 128), got (96, 64) (our lm_head/kernel)",
    ):
        assert part in text


def test_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    text = message(convert.load_hf, folder, error=WeightsError)
    assert text.startswith(f"{file} must be a complete safetensors file, but is corrupt or")


def test_file_of_another_format_is_named(shards):
    file = shards / "model-00002-of-00004.safetensors"
    file.write_bytes(b"<html>error 404</html>")
    assert str(file) in message(convert.load_hf, shards, error=WeightsError)


def test_missing_shard_is_named(shards):
    (shards / "model-00003-of-00004.safetensors").unlink()
    text = message(convert.load_hf, shards, error=WeightsError)
    assert "lacks model-00003-of-00004.safetensors of the 4 files in" in text


@pytest.mark.parametrize(
    "text", ["{}", "{", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ""}}']
)
def test_invalid_index_is_named(shards, text):
    (shards / tensors.INDEX).write_text(text)
    assert tensors.INDEX in message(convert.load_hf, shards, error=WeightsError)


def test_tensor_in_two_files_is_rejected(shards):
    (shards / tensors.INDEX).unlink()
    shutil.copyfile(shards / "model-00001-of-00004.safetensors", shards / "model-00009.safetensors")
    text = message(convert.load_hf, shards, error=WeightsError)
    assert "must be in one file" in text and "model-00009.safetensors" in text


def test_integer_tensor_is_rejected(folder):
    rewrite(
        folder, lambda tensors: tensors.update({"lm_head.weight": np.ones((96, 128), np.int32)})
    )
    text = message(convert.load_hf, folder, error=WeightsError)
    assert "'lm_head.weight'" in text and "got I32" in text


def test_folder_without_weights_or_config_is_rejected(tmp_path, folder):
    assert "config.json" in message(convert.load_hf, tmp_path / "nothing")
    (folder / "model.safetensors").unlink()
    assert "but has none; convert" in message(convert.load_hf, folder, error=WeightsError)
    (folder / "pytorch_model.bin").write_bytes(b"")
    expected = "but has only pytorch_model.bin, which may run code when read"
    assert expected in message(convert.load_hf, folder, error=WeightsError)


# Field of config.json -> an unsupported value, and a part of the message.
HF_FIELDS = {
    "model_type": (
        "gpt2",
        "must be one of 'xlstm', 'llama', 'mamba', 'mamba2', 'rwkv', 'qwen3_next'",
    ),
    "weight_mode": ("fused", "must be 'single', got 'fused'; transformers only loads separate"),
    "add_out_norm": (False, "transformers applies that norm anyway"),
    "dtype": ("float16", "load it with dtype='bfloat16' or dtype='float32'"),
    "num_heads": (3, "large.num_heads must divide qk_dim=64, got 3; use for example"),
    "num_blocks": (3, "num_hidden_layers and num_blocks of"),
    "use_bias": ("yes", "must be true or false, got 'yes'"),
    "norm_eps": ("small", "norm_eps of"),
    "vocab_size": (0, "must be an integer of at least 1, got 0"),
    "gate_soft_cap": ("none", "must be a finite number, got 'none'"),
}


@pytest.mark.parametrize("field", HF_FIELDS)
def test_unsupported_field_is_named(folder, field):
    value, expected = HF_FIELDS[field]
    edit(folder, **{field: value})
    assert expected in message(convert.load_hf, folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_config_that_is_not_a_json_object_is_rejected(folder, text):
    (folder / "config.json").write_text(text)
    error = message(convert.load_hf, folder)
    assert str(folder / "config.json") in error and error.endswith("it again.")


def test_unknown_fields_are_logged(folder, caplog):
    edit(folder, mlstm_round_up_to_multiple_of=64)
    convert.load_hf(folder)
    assert "are ignored: mlstm_round_up_to_multiple_of" in caplog.text


# A model that `transformers` does not support, and a part of the message.
RMS = {"final_norm": "rms", "final_norm_eps": 1e-6}
UNSUPPORTED = {
    "blocks": (dict(pattern="Mm", **RMS), "pattern='Mm' with letters other than M"),
    "gate": (
        dict(pattern="M", large=LargeConfig(forget_gate="exp"), **RMS),
        "large.forget_gate='exp' instead of 'sigmoid'",
    ),
    "norm": (dict(pattern="M"), "final_norm='layer' instead of 'rms'"),
    "bias": (dict(pattern="M", final_norm_bias=True, **RMS), "final_norm_bias=True"),
    "no norm": (dict(pattern="M", final_norm="none"), "final_norm='none' instead of 'rms'"),
    "eps": (dict(pattern="M", final_norm="rms"), "final_norm_eps=1e-05 different from"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_model_that_transformers_does_not_support_is_rejected(name, tmp_path):
    fields, expected = UNSUPPORTED[name]
    cfg = LMConfig(vocab_size=7, dim=8, **fields)
    assert expected in message(convert.save_hf, tmp_path / "out", cfg, {})
    assert not list(tmp_path.iterdir())


def test_folder_with_weights_is_not_overwritten(folder):
    cfg, params = convert.load_hf(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "contains model.safetensors" in message(convert.save_hf, folder, cfg, params)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("option", [{"dtype": "int8"}, {"max_shard_bytes": 0}])
def test_options_out_of_range_are_rejected(folder, tmp_path, option):
    cfg, params = convert.load_hf(folder)
    text = message(convert.save_hf, tmp_path / "out", cfg, params, **option)
    assert next(iter(option)) in text
    assert not (tmp_path / "out").exists()


PLAIN = FOLDER / "xlstm_large_plain_checkpoint"


@pytest.fixture
def plain(tmp_path):
    return shutil.copytree(PLAIN, tmp_path / "plain", copy_function=shutil.copyfile)


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("weight_mode: single", "weight_mode: mixed", "must be 'single' or 'fused', got 'mixed'"),
        ("embedding_dim: 32", "", "must have the field 'embedding_dim'"),
        ("num_heads: 4", "num_heads: [4", "is not valid YAML"),
    ],
)
def test_invalid_config_yaml_is_rejected(plain, old, new, expected):
    path = plain / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert expected in message(convert.load_large, plain)


def test_folder_without_config_yaml_is_rejected(plain):
    (plain / "config.yaml").unlink()
    assert "must have a readable config.yaml" in message(convert.load_large, plain)


@pytest.fixture
def v1():
    golden = golden_files.load("xlstm_lm_1_1")
    return published.nested(golden.config), golden.under("param/")


# Part of a first-generation config, a change of its fields, and a part of the message.
V1_FIELDS = {
    "an LSTM": ("slstm", {"function": "lstm"}, "the nearest is `ops.lstm`"),
    "a truncated gradient": (
        "slstm",
        {"gradient_recurrent_cut": True},
        "gradients are not truncated",
    ),
    "clipped outputs": ("slstm", {"forward_clipval": 1.0}, "outputs are not clipped"),
    "an initial bias": ("slstm", {"bias_init": "ones"}, "slstm.bias_init must be one of 'powerlaw"),
    "an activation": ("feedforward", {"act_fn": "tanh"}, "the nearest is gelu"),
    "activations": ("feedforward", {"act_fn": ["gelu"]}, "the nearest is gelu"),
    "a feed-forward": ("feedforward", {"ff_type": "ffn"}, "only the gated one is supported"),
    "heads": ("mlstm", {"num_heads": 5}, "mlstm.num_heads must divide the inner width=64, got 5"),
}


@pytest.mark.parametrize("name", V1_FIELDS)
def test_unsupported_first_generation_field_is_named(v1, name, unchecked_types):
    config, arrays = v1
    part, change, expected = V1_FIELDS[name]
    block = config["mlstm_block" if part == "mlstm" else "slstm_block"]
    block[part] = dict(block.get(part, {})) | change
    assert expected in message(convert.load_v1, config, arrays)


def test_recurrent_weights_of_unknown_layout_are_listed_with_other_problems(v1):
    config, arrays = v1
    name = "xlstm_block_stack.blocks.1.xlstm.slstm_cell._recurrent_kernel_"
    arrays[name] = np.zeros((2, 16, 16), np.float32)
    del arrays["lm_head.weight"]
    text = message(convert.load_v1, config, arrays, error=WeightsError)
    assert f"{name} must have the shape (2, 64, 16), got (2, 16, 16)" in text
    assert "lm_head.weight (53, 32) is missing" in text


def test_tied_model_with_a_different_head_is_rejected():
    golden = golden_files.load("xlstm_lm_tied")
    arrays = golden.under("param/") | {"lm_head.weight": np.zeros((3, 3), np.float32)}
    text = message(convert.load_v1, published.nested(golden.config), arrays, error=WeightsError)
    assert "lm_head.weight (3, 3) is unexpected" in text


def test_missing_embedding_and_head_are_listed(v1):
    text = message(convert.load_v1, v1[0], {}, error=WeightsError)
    assert "token_embedding.weight (53, 32) is missing" in text
    assert "lm_head.weight (53, 32) is missing" in text


def test_errors_use_the_names_of_a_bare_stack():
    golden = golden_files.load("xlstm_block_stack_1_1")
    arrays = golden.under("param/")
    del arrays["post_blocks_norm.weight"]
    text = message(convert.load_v1, published.nested(golden.config), arrays, error=WeightsError)
    assert "config: post_blocks_norm.weight (32,) is missing" in text


@pytest.mark.parametrize(
    "array", [np.ones(3, np.int32), np.ones(3, complex), np.array(["a"]), [1.0]]
)
def test_value_that_is_not_a_floating_point_array_is_named(v1, array, unchecked_types):
    config, arrays = v1
    arrays["lm_head.weight"] = array
    text = message(convert.load_v1, config, arrays, error=WeightsError)
    assert "must be floating-point arrays, got lm_head.weight (" in text


@pytest.mark.parametrize("slstm_at", ["every", None, 1, ["1"], [None], [True], [1.0]])
def test_invalid_slstm_at_is_rejected(v1, slstm_at):
    config, arrays = v1
    text = message(convert.load_v1, config | {"slstm_at": slstm_at}, arrays)
    assert (
        f"slstm_at of the config must be 'all' or a list of block indices, got {slstm_at!r}" in text
    )


def test_misspelled_part_is_logged(v1, caplog):
    config, arrays = v1
    config["slstm_block"]["feed_forward"] = None
    convert.load_v1(config | {"weight_decay_on_embedding": True}, arrays)
    assert "unknown fields of slstm_block of the config are ignored: feed_forward" in caplog.text
    assert "train.decay_pattern=" in caplog.text


def test_slstm_at_outside_the_model_is_rejected(v1):
    config, arrays = v1
    assert "block indices from 0 to 1" in message(
        convert.load_v1, config | {"slstm_at": [2]}, arrays
    )


FUSED = "backbone.blocks.0.mlstm_layer.ifgate_preact.weight"


@pytest.mark.parametrize("shape", [(7, 32), ()])
def test_fused_weight_of_wrong_size_is_listed(shape):
    cfg, params = convert.load_large(PLAIN)
    gates = ("igate_preact", "fgate_preact")
    others = {
        name: array
        for name, array in mapping.export(cfg, names.LARGE, params)
        if not ("blocks.0" in name and name.endswith("weight") and name.split(".")[-2] in gates)
    }
    arrays = tensors.from_arrays(others | {FUSED: np.zeros(shape, np.float32)})
    source = large.unfused(arrays, cfg)
    text = message(mapping.load, cfg, names.LARGE, source, error=WeightsError)
    assert f"{FUSED} {shape} is unexpected" in text
    assert "backbone.blocks.0.mlstm_layer.igate_preact.weight (4, 32) is missing" in text


def test_fused_weight_in_addition_to_separate_ones_is_unexpected():
    cfg, params = convert.load_large(PLAIN)
    separate = dict(mapping.export(cfg, names.LARGE, params))
    source = large.unfused(
        tensors.from_arrays(separate | {FUSED: np.zeros((8, 32), np.float32)}), cfg
    )
    text = message(mapping.load, cfg, names.LARGE, source, error=WeightsError)
    assert f"{FUSED} (8, 32) is unexpected" in text


# Name -> how to change config and parameters, and a part of the message.
MISMATCHED = {
    "none": (lambda cfg, p: (cfg, {}), "lm_head/kernel (128, 96) is missing"),
    "variables": (lambda cfg, p: (cfg, {"params": p}), "pass variables['params']"),
    "vocabulary": (
        lambda cfg, p: (dataclasses.replace(cfg, vocab_size=50), p),
        "lm_head/kernel must have the shape (128, 50), got (128, 96)",
    ),
    "blocks": (
        lambda cfg, p: (dataclasses.replace(cfg, pattern="MMM"), p),
        "stack/M/ffn/proj_down/kernel must have the shape (3, 352, 128), got (2, 352, 128); ",
    ),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_parameters_that_do_not_match_the_config_are_not_saved(name, tmp_path):
    change, expected = MISMATCHED[name]
    arguments = change(*convert.load_hf(FOLDER / "hf_tiny"))
    text = message(convert.save_hf, tmp_path / "out", *arguments, error=WeightsError)
    assert expected in text
    assert not list(tmp_path.iterdir())


def test_index_is_ignored_beside_a_single_file(folder):
    (folder / tensors.INDEX).write_text("{}")
    assert convert.load_hf(folder)[0].num_blocks == 2


def test_ignored_tie_word_embeddings_is_logged(folder, caplog):
    edit(folder, tie_word_embeddings=True)
    assert not convert.load_hf(folder)[0].tie_embeddings
    assert "is ignored, as the weights have an embedding and a head" in caplog.text


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize(
    "field", ["vocab_size", "norm_eps", "eps", "qk_dim_factor", "gate_soft_cap"]
)
def test_non_finite_and_negative_numbers_are_named(folder, field, number):
    edit(folder, **{field: number})
    assert f"{field} of {folder / 'config.json'} must be" in message(convert.load_hf, folder)


def test_yaml_number_without_decimal_point_is_accepted(plain):
    path = plain / "config.yaml"
    path.write_text(path.read_text().replace("norm_eps: 1.0e-06", "norm_eps: 1e-6"))
    assert convert.load_large(plain)[0].large.norm_eps == 1e-6


def test_config_yaml_that_is_not_text_is_rejected(plain):
    (plain / "config.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not valid YAML" in message(convert.load_large, plain)
