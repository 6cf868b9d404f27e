"""Weights and configs of strangers: other names, hostile files, senseless values."""

import itertools
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests import golden_files
from tests.convert import published
from tests.golden_files import FOLDER
from xlstm_jax import convert
from xlstm_jax.config import ConfigError
from xlstm_jax.convert import WeightsError, hf, names, tensors, yaml_file
from xlstm_jax.convert.fields import MAX_BYTES, Fields
from xlstm_jax.errors import quote
from xlstm_jax.modules import LargeConfig, LMConfig, param_shapes

PLAIN = FOLDER / "xlstm_large_plain_checkpoint"
SECONDS = 5
"""Far less than a config needs that is not rejected at once."""


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint in one file."""
    return shutil.copytree(FOLDER / "hf_tiny", tmp_path / "hf", copy_function=shutil.copyfile)


@pytest.fixture
def plain(tmp_path):
    """A copy of a checkpoint with a config.yaml."""
    return shutil.copytree(PLAIN, tmp_path / "plain", copy_function=shutil.copyfile)


def rename(folder, change):
    file = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({change(name): a for name, a in arrays.items()}, file)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(load, *args, error=ConfigError, **kwargs):
    """The message of an error that comes at once: one printable line of bounded length."""
    start = time.monotonic()
    with pytest.raises(error) as caught:
        load(*args, **kwargs)
    assert time.monotonic() - start < SECONDS
    text = str(caught.value)
    assert text.endswith(".") and text.isprintable() and len(text) < 600, text
    return text


def assert_same_models(a, b):
    assert a[0] == b[0]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, a[1], b[1]))


# How the names of a model change when it is compiled, wrapped, or saved in parts.
RENAMED = {
    "compiled": lambda name: "_orig_mod." + name,
    "wrapped": lambda name: "module." + name,
    "compiled and wrapped": lambda name: "module._orig_mod." + name,
    "part of another model": lambda name: "student.model." + name,
    "bare": lambda name: name.removeprefix("backbone."),
    "bare and wrapped": lambda name: "module." + name.removeprefix("backbone."),
    "blocks compiled": lambda name: name.replace(".mlstm_layer.", "._orig_mod.mlstm_layer."),
    "another name of the backbone": lambda name: name.replace("backbone.", "model."),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_renamed_tensors_load_as_the_originals(folder, kind):
    rename(folder, RENAMED[kind])
    assert_same_models(convert.load_hf(folder), convert.load_hf(FOLDER / "hf_tiny"))


@pytest.mark.parametrize("kind", ["compiled and wrapped", "bare"])
def test_renamed_tensors_of_a_config_yaml_load_as_the_originals(plain, kind):
    rename(plain, RENAMED[kind])
    assert_same_models(convert.load_large(plain), convert.load_large(PLAIN))


@pytest.mark.parametrize("name", ["xlstm_lm_1_1", "xlstm_block_stack_1_1"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model."])
def test_renamed_first_generation_tensors_load_as_the_originals(name, prefix):
    golden = golden_files.load(name)
    config, arrays = published.nested(golden.config), golden.under("param/")
    renamed = {prefix + key: array for key, array in arrays.items()}
    assert_same_models(convert.load_v1(config, renamed), convert.load_v1(config, arrays))


def test_first_generation_tensors_may_lack_the_name_of_the_stack():
    golden = golden_files.load("xlstm_lm_1_1")
    config, arrays = published.nested(golden.config), golden.under("param/")
    bare = {key.removeprefix(names.V1_STACK): array for key, array in arrays.items()}
    assert bare.keys() != arrays.keys()
    assert_same_models(convert.load_v1(config, bare), convert.load_v1(config, arrays))


def test_tied_model_without_its_head_loads_from_bare_names(folder):
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    del arrays["lm_head.weight"]
    bare = {name.removeprefix("backbone."): array for name, array in arrays.items()}
    safetensors.numpy.save_file(bare, folder / "model.safetensors")
    assert "lm_head.weight (96, 128) is missing" in message(convert.load_hf, folder)
    edit(folder, tie_word_embeddings=True)
    assert convert.load_hf(folder)[0].tie_embeddings


def test_tensors_of_two_models_are_rejected(folder):
    file = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    both = {f"{m}.{name}": a for m in ("student", "teacher") for name, a in arrays.items()}
    safetensors.numpy.save_file(both, file)
    text = message(convert.load_hf, folder, error=WeightsError)
    assert (
        "lm_head.weight (96, 128) is missing; backbone.out_norm.weight (128,) is missing; " in text
    )
    assert "student.backbone.blocks.0" in text and f"and {2 * len(arrays) - 2} more" in text


def test_unknown_names_are_counted_and_only_the_first_are_listed(folder):
    rename(folder, lambda name: "x" * 500 + name.replace("blocks", "layers"))
    text = message(convert.load_hf, folder, error=WeightsError)
    assert "lm_head.weight (96, 128) is missing" in text and " more; " in text


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/passwd", "a/b", "..", ".", "a\\b", "C:a", "a\0", "\ud800"]
    + ["a" * 300, " ", 5, None, ["a"], {}],
)
def test_index_may_only_name_files_in_its_folder(tmp_path, name):
    source = FOLDER / "hf_tiny_sharded"
    folder = shutil.copytree(source, tmp_path / "hf", copy_function=shutil.copyfile)
    shutil.copytree(source, tmp_path / "other")
    index = json.loads((folder / tensors.INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / tensors.INDEX).write_text(json.dumps(index))
    text = message(convert.load_hf, folder, error=WeightsError)
    assert "must have names of files in its folder, got " in text


def test_files_of_an_index_may_be_links(tmp_path):
    """The cache of the Hugging Face hub consists of links to other folders."""
    source = FOLDER / "hf_tiny_sharded"
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert_same_models(convert.load_hf(tmp_path), convert.load_hf(source))


@pytest.mark.parametrize("kind", ["folder", "empty", "broken link", "half"])
def test_damaged_file_is_named(folder, kind):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "broken link":
        file.symlink_to(folder / "nothing")
    else:
        file.write_bytes(data[: len(data) // 2] if kind == "half" else b"")
    text = message(convert.load_hf, folder, error=WeightsError)
    assert f"{file} must be a complete safetensors file" in text


@pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
def test_dtype_may_be_written_as_torch_prints_it(folder, field):
    edit(folder, **{"dtype": None, field: "torch.bfloat16"})
    assert convert.load_hf(folder)[0].dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["torch.float16", ["bfloat16"], 16])
def test_unsupported_dtype_is_rejected(folder, dtype):
    edit(folder, dtype=dtype)
    assert "dtype" in message(convert.load_hf, folder)


NAN = "backbone.blocks.1.mlstm_layer.q.weight"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tensor_that_is_not_finite_is_named_in_one_warning(folder, value, tmp_path):
    file = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    arrays[NAN][3, 5] = value
    safetensors.numpy.save_file(arrays, file)
    with pytest.warns(
        tensors.WeightsWarning, match=f"tensor '{NAN}' has values that are NaN"
    ) as caught:
        cfg, params = convert.load_hf(folder)
    assert len(caught) == 1
    with pytest.warns(tensors.WeightsWarning, match=f"tensor '{NAN}' has values that are NaN"):
        convert.save_hf(tmp_path / "out", cfg, params)


def test_tensors_that_are_not_finite_are_counted(plain):
    file = plain / "model.safetensors"
    arrays = {n: a.astype(np.float64) for n, a in safetensors.numpy.load_file(file).items()}
    for array in arrays.values():
        array.flat[0] = 1e300  # beyond float32, to which parameters are converted
    safetensors.numpy.save_file(arrays, file)
    with pytest.warns(
        tensors.WeightsWarning, match=f"and {len(arrays) - 1} others have values"
    ) as caught:
        convert.load_large(plain)
    assert len(caught) == 1


def test_first_generation_tensor_that_is_not_finite_is_named():
    golden = golden_files.load("xlstm_lm_1_1")
    arrays = {name: np.array(array) for name, array in golden.under("param/").items()}
    arrays["lm_head.weight"][0, 0] = np.nan
    with pytest.warns(tensors.WeightsWarning, match="'lm_head.weight'") as caught:
        convert.load_v1(published.nested(golden.config), arrays)
    assert len(caught) == 1


HUGE = [3, 10_000, 2_000_000_000, 10**20, 10**401]


@pytest.mark.parametrize("number", HUGE, ids=quote)
def test_config_with_more_blocks_than_the_weights_is_rejected_at_once(folder, plain, number):
    edit(folder, num_blocks=number, num_hidden_layers=number)
    assert message(convert.load_hf, folder).startswith(("num_hidden_layers of", "num_blocks of"))
    path = plain / "config.yaml"
    path.write_text(path.read_text().replace("num_blocks: 2", f"num_blocks: {number}"))
    assert "num_blocks of" in message(convert.load_large, plain)
    golden = golden_files.load("xlstm_lm_1_1")
    config = published.nested(golden.config) | {"num_blocks": number}
    assert "num_blocks" in message(convert.load_v1, config, golden.under("param/"))


def test_config_with_many_blocks_and_unknown_names_is_rejected_at_once(folder):
    edit(folder, num_blocks=10**9, num_hidden_layers=10**9)
    rename(folder, lambda name: name.replace("blocks", "stages"))
    assert "at most 0, the number of blocks in the weights" in message(convert.load_hf, folder)


SIZES = ["vocab_size", "hidden_size", "num_heads", "qk_dim_factor", "v_dim_factor"]
SIZES += ["ffn_proj_factor", "ffn_round_up_to_multiple_of"]


@pytest.mark.parametrize("number", [10**9, 10**30, 10**401, 1e300], ids=quote)
@pytest.mark.parametrize("field", SIZES)
def test_size_beyond_the_weights_is_rejected_at_once(folder, field, number):
    edit(folder, embedding_dim=None, **{field: number})
    assert "config.json" in message(convert.load_hf, folder)


@pytest.mark.parametrize("part, field", [("mlstm", "num_heads"), ("mlstm", "proj_factor")])
@pytest.mark.parametrize("number", [10**9, 10**401], ids=quote)
def test_first_generation_size_beyond_the_weights_is_rejected_at_once(part, field, number):
    golden = golden_files.load("xlstm_lm_1_1")
    config = published.nested(golden.config)
    config["mlstm_block"][part] = dict(config["mlstm_block"][part]) | {field: number}
    assert field in message(convert.load_v1, config, golden.under("param/"))


@pytest.mark.parametrize("number", [10**400, -(10**400), float("inf"), 3.5e38], ids=quote)
def test_number_beyond_float32_is_rejected(number):
    text = message(Fields({"eps": number}, "the config").number, "eps")
    assert "must be a finite number, got" in text


def test_key_that_is_not_a_string_is_rejected(unchecked_types):
    assert "strings as keys, got 1" in message(Fields, {1: 2}, "the config")


BRACKETS = "[" * 100_000


@pytest.mark.parametrize("name", ["config.json", tensors.INDEX])
def test_deeply_nested_json_is_rejected(tmp_path, name):
    source = FOLDER / "hf_tiny_sharded"
    folder = shutil.copytree(source, tmp_path / "hf", copy_function=shutil.copyfile)
    (folder / name).write_text(BRACKETS)
    assert str(folder / name) in message(convert.load_hf, folder)


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_config_of_many_bytes_is_rejected(folder, plain, name):
    load, path = {
        "config.json": (convert.load_hf, folder / "config.json"),
        "config.yaml": (convert.load_large, plain / "config.yaml"),
    }[name]
    path.write_text(path.read_text() + " " * MAX_BYTES)
    assert "must have at most" in message(load, path.parent)


def aliases(depth):
    """Few lines that unfold to 10^depth words."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    return "\n".join([*lines, f"embedding_dim: *a{depth - 1}"])


# What a config.yaml may end with, and a part of the message.
INVALID_YAML = {
    "aliases": (aliases(7), "has the anchor or alias 'a0'"),
    "an alias alone": ("a: *b", "has the anchor or alias 'b'"),
    "a tag": ("cell: !!bool maybe", "has the tag 'tag:yaml.org,2002:bool'"),
    "a Python tag": ("a: !!python/object/apply:os.system [ls]", "has the tag"),
    "brackets": ("a: " + "[" * 20_000, "nested more than 20 deep"),
    "indentation": ("\n".join(" " * n + "a:" for n in range(200)), "nested more than 20 deep"),
    "digits": ("steps: " + "9" * 5000, "integer of 5000 digits"),
    "a number as key": ("1: one", "the key 1 must be a string"),
    "no key": ("~: x", "the key None must be a string"),
    "a list as key": ("? [a]\n: x", "the key ['a'] must be a string"),
    "a key twice": ("a: 1\na: 2", "the key 'a' must be a string and unique"),
    "two documents": ("---\na: 1", "several documents"),
    "control characters": ("a: \x1b[31m", "is not valid YAML"),
    "a long word": ("num_heads: " + "x" * 90_000, "must be a finite number, got 'xxx"),
}


@pytest.mark.parametrize("kind", INVALID_YAML)
def test_invalid_yaml_is_rejected_at_once(plain, kind):
    text, expected = INVALID_YAML[kind]
    path = plain / "config.yaml"
    before = path.read_text()
    if "num_heads" in text:
        before = before.replace("num_heads: 4\n", "")
    path.write_text(f"{before}{text}\n")
    assert expected in message(convert.load_large, plain)


@pytest.mark.parametrize(
    "data", [b"", b"---\n", b"[1]", b"5", b"a: \xff", "a: \xe4".encode("latin-1")]
)
def test_yaml_without_a_mapping_of_text_is_rejected(plain, data):
    (plain / "config.yaml").write_bytes(data)
    assert str(plain / "config.yaml") in message(convert.load_large, plain)


# Scalars of YAML 1.2, core schema; YAML 1.1 reads most of them differently.
SCALARS = {
    "1:30": "1:30",
    "on": "on",
    "yes": "yes",
    "NO": "NO",
    "0o17": 15,
    "017": 17,
    "0x1F": 31,
    "0x_": "0x_",
    "1_000": "1_000",
    "+12": 12,
    "1e-6": 1e-6,
    "1.5E3": 1500.0,
    ".5": 0.5,
    ".inf": float("inf"),
    "-.Inf": -float("inf"),
    "2001-99-99": "2001-99-99",
    "True": True,
    "false": False,
    "~": None,
    "": None,
    "'12'": "12",
    '"true"': "true",
    "[1, [a, 2.0]]": [1, ["a", 2.0]],
    "{a: b}": {"a": "b"},
    "<<": "<<",
}


@pytest.mark.parametrize("text", SCALARS)
def test_yaml_scalars_are_those_of_the_core_schema(tmp_path, text):
    (tmp_path / "a.yaml").write_text(f"on: {text}\n")
    value = yaml_file.read(tmp_path / "a.yaml")["on"]
    assert value == SCALARS[text] and type(value) is type(SCALARS[text])


M = LMConfig(
    vocab_size=7,
    dim=8,
    pattern="M",
    large=LargeConfig(num_heads=2),
    final_norm="rms",
    final_norm_eps=1e-6,
)


def params_of(cfg):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), param_shapes(cfg))


@pytest.mark.parametrize(
    "tokens",
    [
        {"vocab_size": 7, "use_bias": True},
        {"eos_token_id": "</s>"},
        {"eos_token_id": 7},
        {"eos_token_id": 10**401},
        {"eos_token_id": -1},
        {"eos_token_id": True},
        {"eos_token_id": 2.0},
        {"eos_token_id": None},
        {3: 2},
        [2],
        None,
    ],
)
def test_special_tokens_have_known_names_and_ids_in_the_vocabulary(
    tmp_path, tokens, unchecked_types
):
    text = message(convert.save_hf, tmp_path / "hf", M, params_of(M), special_tokens=tokens)
    assert "special_tokens" in text
    assert not list(tmp_path.iterdir())


def test_special_tokens_are_written_and_read(tmp_path, caplog):
    tokens = {"eos_token_id": 6, "unk_token_id": np.int64(0)}
    convert.save_hf(tmp_path / "hf", M, params_of(M), special_tokens=tokens)
    assert hf.special_tokens_of(tmp_path / "hf", 7) == {
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 6,
        "unk_token_id": 0,
    }
    assert "eos_token_id" not in hf.special_tokens_of(tmp_path / "hf", 6)
    convert.load_hf(tmp_path / "hf")
    assert not caplog.text


def test_default_special_tokens_are_in_the_vocabulary(tmp_path):
    cfg = LMConfig(**vars(M) | {"vocab_size": 2})
    convert.save_hf(tmp_path / "hf", cfg, params_of(cfg))
    assert hf.special_tokens_of(tmp_path / "hf", 2) == {"pad_token_id": 1, "bos_token_id": 0}


def test_reason_against_an_export_is_known_before_training():
    assert hf.why_not_exportable(M) is None
    for change in itertools.product(["layer", "rms"], [1e-5, 1e-6]):
        cfg = LMConfig(**vars(M) | dict(zip(("final_norm", "final_norm_eps"), change, strict=True)))
        reason = hf.why_not_exportable(cfg)
        assert (reason is None) == (change == ("rms", 1e-6))
        if reason:
            with pytest.raises(ConfigError, match=reason.split("=")[0]):
                hf.config_of(cfg)
