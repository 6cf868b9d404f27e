"""Weights and configs that do not fit are refused in one sentence that names all of it."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from tests import golden_files
from tests.convert import published
from tests.golden_files import FOLDER
from xlstm_jax import convert
from xlstm_jax.config import ConfigError
from xlstm_jax.convert import WeightsError, large, tensors
from xlstm_jax.modules import LMConfig


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint in one file, to be spoilt."""
    return shutil.copytree(FOLDER / "hf_tiny", tmp_path / "hf", copy_function=shutil.copyfile)


@pytest.fixture
def shards(tmp_path):
    """A copy of a checkpoint in four files, to be spoilt."""
    source = FOLDER / "hf_tiny_sharded"
    return shutil.copytree(source, tmp_path / "sharded", copy_function=shutil.copyfile)


def rewrite(folder, change):
    file = folder / "model.safetensors"
    held = safetensors.numpy.load_file(file)
    change(held)
    safetensors.numpy.save_file(held, file)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(load, *args, error=ConfigError, **kwargs):
    with pytest.raises(error) as caught:
        load(*args, **kwargs)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


def test_missing_surplus_and_misshapen_tensors_are_all_listed(folder):
    def spoil(held):
        del held["backbone.out_norm.weight"]
        del held["backbone.blocks.1.mlstm_layer.q.weight"]
        held["backbone.blocks.2.norm_ffn.weight"] = np.ones(128, np.float32)
        held["lm_head.weight"] = np.ones((96, 64), np.float32)

    rewrite(folder, spoil)
    text = message(convert.load_hf, folder, error=WeightsError)
    for part in (
        "backbone.out_norm.weight is missing (out_norm/scale)",
        "backbone.blocks.1.mlstm_layer.q.weight is missing (stack/M/mlstm/q/kernel)",
        "backbone.blocks.2.norm_ffn.weight (128,) is not known",
        "lm_head.weight must have the shape (96, 128), got (96, 64) (lm_head/kernel)",
    ):
        assert part in text


def test_a_file_that_is_cut_short_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    text = message(convert.load_hf, folder, error=WeightsError)
    assert text.startswith(f"{file} must be a whole safetensors file, but it is damaged or cut")


def test_a_file_of_something_else_is_named(shards):
    file = shards / "model-00002-of-00004.safetensors"
    file.write_bytes(b"<html>not found</html>")
    assert str(file) in message(convert.load_hf, shards, error=WeightsError)


def test_a_shard_that_is_not_there_is_named(shards):
    (shards / "model-00003-of-00004.safetensors").unlink()
    text = message(convert.load_hf, shards, error=WeightsError)
    assert "lacks model-00003-of-00004.safetensors of the 4 files" in text


def test_an_index_that_cannot_be_read_is_named(shards):
    (shards / tensors.INDEX).write_text("{}")
    assert tensors.INDEX in message(convert.load_hf, shards, error=WeightsError)


def test_a_tensor_in_two_files_is_refused(shards):
    (shards / tensors.INDEX).unlink()
    shutil.copyfile(shards / "model-00001-of-00004.safetensors", shards / "model-00009.safetensors")
    text = message(convert.load_hf, shards, error=WeightsError)
    assert "must be in one file" in text and "model-00009.safetensors" in text


def test_whole_numbers_are_no_parameters(folder):
    rewrite(folder, lambda held: held.update({"lm_head.weight": np.ones((96, 128), np.int32)}))
    text = message(convert.load_hf, folder, error=WeightsError)
    assert "'lm_head.weight'" in text and "got I32" in text


def test_a_folder_without_weights_or_config_is_refused(tmp_path, folder):
    assert "config.json" in message(convert.load_hf, tmp_path / "nothing")
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in message(convert.load_hf, folder, error=WeightsError)


# Field of a config.json -> a value that cannot be honoured, and what the sentence must say.
HF_FIELDS = {
    "model_type": ("llama", "must be 'xlstm' here, got 'llama'"),
    "weight_mode": ("fused", "must be 'single' here, got 'fused'; transformers reads no other"),
    "add_out_norm": (False, "transformers applies that norm all the same"),
    "dtype": ("float16", "load it with dtype='bfloat16' or dtype='float32'"),
    "num_heads": (3, "large.num_heads must divide qk_dim=64, got 3; use for example"),
    "num_blocks": (3, "num_hidden_layers and num_blocks of"),
    "use_bias": ("yes", "must be true or false, got 'yes'"),
    "norm_eps": ("small", "norm_eps of"),
    "vocab_size": (0, "must be a whole number above 0, got 0"),
    "gate_soft_cap": ("none", "must be a number, got 'none'"),
}


@pytest.mark.parametrize("field", HF_FIELDS)
def test_a_field_that_cannot_be_honoured_is_named(folder, field):
    value, expected = HF_FIELDS[field]
    edit(folder, **{field: value})
    assert expected in message(convert.load_hf, folder)


def test_a_config_that_is_no_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in message(convert.load_hf, folder)


def test_unknown_fields_are_said_to_be_ignored(folder, caplog):
    edit(folder, mlstm_round_up_to_multiple_of=64)
    convert.load_hf(folder)
    assert "are ignored: mlstm_round_up_to_multiple_of" in caplog.text


# A model that `transformers` has no fields for, and what the sentence must say.
RMS = {"final_norm": "rms", "final_norm_eps": 1e-6}
UNWRITABLE = {
    "blocks": (dict(pattern="Mm", **RMS), "pattern='Mm' with other letters than M"),
    "norm": (dict(pattern="M"), "final_norm='layer' instead of 'rms'"),
    "bias": (dict(pattern="M", final_norm_bias=True, **RMS), "final_norm_bias=True"),
    "no norm": (dict(pattern="M", final_norm="none"), "must have final_norm='rms' without a bias"),
    "eps": (dict(pattern="M", final_norm="rms"), "final_norm_eps=1e-05 that is not"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_model_that_transformers_does_not_have_is_refused(name, tmp_path):
    fields, expected = UNWRITABLE[name]
    cfg = LMConfig(vocab_size=7, dim=8, **fields)
    assert expected in message(convert.save_hf, tmp_path / "out", cfg, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_weights_is_not_overwritten(folder):
    cfg, params = convert.load_hf(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "model.safetensors is there" in message(convert.save_hf, folder, cfg, params)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("option", [{"dtype": "int8"}, {"max_shard_bytes": 0}])
def test_options_out_of_range_are_refused(folder, tmp_path, option):
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
def test_a_plain_folder_that_does_not_fit_is_refused(plain, old, new, expected):
    path = plain / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert expected in message(convert.load_large, plain)


def test_a_plain_folder_without_config_is_refused(plain):
    (plain / "config.yaml").unlink()
    assert "must have a config.yaml" in message(convert.load_large, plain)


@pytest.fixture
def v1():
    golden = golden_files.load("xlstm_lm_1_1")
    return published.nested(golden.config), golden.under("param/")


# Where in a config, what there, and what the sentence must say.
V1_FIELDS = {
    "an LSTM": ("slstm", {"function": "lstm"}, "the nearest is `ops.lstm`"),
    "a cut gradient": ("slstm", {"gradient_recurrent_cut": True}, "gradients here are the true"),
    "clipped outputs": ("slstm", {"forward_clipval": 1.0}, "outputs are not clipped"),
    "an initial bias": ("slstm", {"bias_init": "ones"}, "slstm.bias_init='ones' is not known"),
    "an activation": ("feedforward", {"act_fn": "tanh"}, "the nearest is gelu"),
    "a feed-forward": ("feedforward", {"ff_type": "ffn"}, "the gated one is the only one"),
    "heads": ("mlstm", {"num_heads": 5}, "mlstm.num_heads must divide the inner width=64, got 5"),
}


@pytest.mark.parametrize("name", V1_FIELDS)
def test_a_first_generation_field_that_cannot_be_honoured_is_named(v1, name, unchecked_types):
    config, arrays = v1
    part, change, expected = V1_FIELDS[name]
    block = config["mlstm_block" if part == "mlstm" else "slstm_block"]
    block[part] = dict(block.get(part, {})) | change
    assert expected in message(convert.load_v1, config, arrays)


def test_recurrent_weights_in_no_known_layout_are_refused(v1):
    config, arrays = v1
    name = "xlstm_block_stack.blocks.1.xlstm.slstm_cell._recurrent_kernel_"
    arrays[name] = np.zeros((2, 16, 16), np.float32)
    text = message(convert.load_v1, config, arrays, error=WeightsError)
    assert "(heads, 4 K, K) or (heads, K, 4 K), got (2, 16, 16)" in text


def test_positions_outside_the_model_are_refused(v1):
    config, arrays = v1
    assert "positions from 0 to 1" in message(convert.load_v1, config | {"slstm_at": [2]}, arrays)


def test_fused_rows_that_do_not_add_up_are_refused():
    cfg, _ = convert.load_large(PLAIN)
    whole = "backbone.blocks.0.mlstm_layer.ifgate_preact.weight"
    source = tensors.Arrays({whole: np.zeros((7, 32), np.float32)})
    text = message(large.Unfused, source, cfg, error=WeightsError)
    assert f"{whole} must have 8 rows" in text and "got (7, 32)" in text
