"""Exported models give the tokens of `generate`, in a process without this library too."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

from tests.data import tokenizer_files
from tests.generate.conversations import BYTES, initialized, model_and_variables
from tests.modules.models import MIXED_BASELINES
from xlstm_jax.config import ConfigError
from xlstm_jax.data import tokenizers
from xlstm_jax.data.tokenizers import ByteTokenizer
from xlstm_jax.errors import ArgumentError
from xlstm_jax.generate import (
    export,
    export_model,
    exported,
    generate,
    load_exported,
    prefill,
    prepare_params,
)

pytest.importorskip("safetensors")
pytest.importorskip("flatbuffers")

RUNNER = pathlib.Path(__file__).parents[2] / "docs" / "run_exported.py"
PROMPTS = [[*b"a prompt of more than sixteen bytes"], [5]]
COUNT = 6


@pytest.fixture(scope="module", autouse=True)
def narrow_passes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "WIDTHS", (16,))
        patch.setattr(export, "PREFILL_WIDTH", 16)
        yield


def greedy_tokens(model, prompts, count=COUNT, state=None):
    """Tokens and state by the programs of an exported model."""
    logits, state = model.prefill(prompts, state)
    tokens = []
    for _ in range(count):
        tokens.append(np.asarray(logits.argmax(axis=1)))
        logits, state = model.decode(tokens[-1], state)
    return np.stack(tokens, axis=1).tolist(), state


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    export_model(path, *model_and_variables(), tokenizer=BYTES)
    return path


@pytest.fixture(scope="module")
def loaded(file):
    return load_exported(file)


def test_tokens_are_those_of_generate_and_a_state_can_be_continued(loaded):
    assert loaded.tokenizer == BYTES and loaded.record["platforms"] == ["cpu", "cuda", "tpu"]
    inputs = model_and_variables()
    tokens, state = greedy_tokens(loaded, PROMPTS)
    assert tokens == generate(*inputs, PROMPTS, max_new_tokens=COUNT).tokens
    joined = [prompt + ids + prompt for prompt, ids in zip(PROMPTS, tokens, strict=True)]
    expected = generate(*inputs, joined, max_new_tokens=COUNT).tokens
    assert greedy_tokens(loaded, PROMPTS, state=state)[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_batch_runs(loaded, batch_size):
    prompts = [PROMPTS[0], [7] * 20, [5]][:batch_size]
    expected = generate(*model_and_variables(), prompts, max_new_tokens=COUNT).tokens
    assert greedy_tokens(loaded, prompts)[0] == expected


def test_programs_are_in_the_compatibility_window_of_stablehlo(file):
    """They have no custom call, whose implementations may change, but that of symbolic shapes."""
    _, arrays = exported.container.read(file, exported.KIND)
    for name in ("prefill", "decode"):
        program = jax.export.deserialize(bytearray(arrays[f"programs/{name}"]))
        assert program.platforms == ("cpu", "cuda", "tpu")
        calls = set(re.findall(r"custom_call @(\w+)", program.mlir_module()))
        assert calls == {"shape_assertion"}


def test_weights_are_in_the_file_once(file):
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model_and_variables()[1]))
    assert num_bytes < file.stat().st_size < 1.3 * num_bytes + 500_000


def test_altered_and_truncated_files_are_refused(file, tmp_path, rng):
    data, path = file.read_bytes(), tmp_path / "altered"
    for position in [0, 9, *rng.integers(0, len(data), 40).tolist()]:
        altered = bytearray(data)
        altered[position] ^= int(rng.integers(1, 256))
        for contents in (altered, data[:position]):
            path.write_bytes(contents)
            with pytest.raises(ConfigError, match="must be an unaltered model file") as error:
                load_exported(path)
            assert "\n" not in str(error.value)


def test_a_file_for_other_platforms_or_versions_is_refused(file, tmp_path):
    record, arrays = exported.container.read(file, exported.KIND)
    path = tmp_path / "model"
    exported.container.write(path, exported.KIND, record | {"platforms": ["tpu"]}, arrays)
    with pytest.raises(ConfigError, match="runs on tpu, not on cpu; export the model for this"):
        load_exported(path)
    broken = arrays | {"programs/decode": np.zeros(100, np.uint8)}
    exported.container.write(path, exported.KIND, record | {"jax": "0.1.0"}, broken)
    match = "from a version of JAX up to six months older than .*, got 0.1.0 .* export the model"
    with pytest.raises(ConfigError, match=match):
        load_exported(path)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("platforms", [(), "cpu", ("gpu",), ["cpu", "metal"]])
def test_unknown_platforms_are_refused_first(platforms, tmp_path):
    with pytest.raises(ArgumentError, match="platforms must be a list of names from cpu, cuda"):
        export_model(tmp_path / "model", None, None, platforms=platforms)


@pytest.mark.usefixtures("unchecked_types")
def test_invalid_arguments_are_refused(loaded, tmp_path):
    with pytest.raises(ArgumentError, match="tokenizer must have at most 610 ids, .* got 700"):
        export_model(
            tmp_path / "model", *model_and_variables(), tokenizer=ByteTokenizer(vocab_size=700)
        )
    for prompts, message in (
        ([[]], r"prompts\[0\] must be a list of at least one token id"),
        ([[1], [700]], r"prompts\[1\] must have token ids from 0 to 609, got 700"),
        ([], "prompts must have at least one list of token ids, got none"),
    ):
        with pytest.raises(ArgumentError, match=message):
            loaded.prefill(prompts)
    for state in (loaded.init_state(2), {}, None):
        with pytest.raises(ArgumentError, match="state must be that of this model and 1 sequences"):
            loaded.decode(np.array([1]), state)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        loaded.init_state(0)


@pytest.mark.exhaustive
def test_weights_of_eight_bits_are_exported(tmp_path):
    model, variables = initialized("M")
    inputs = model, prepare_params(model, variables, dtype="int8")
    export_model(tmp_path / "model", *inputs)
    expected = generate(*inputs, PROMPTS, max_new_tokens=COUNT).tokens
    assert greedy_tokens(load_exported(tmp_path / "model"), PROMPTS)[0] == expected


# In bfloat16, twelve blocks round the logits enough to change a token.
@pytest.mark.parametrize(
    "pattern, dtype",
    [
        pytest.param("aM", "bfloat16", marks=pytest.mark.slow),
        pytest.param("msM" + MIXED_BASELINES + "l", "float32", marks=pytest.mark.exhaustive),
    ],
    ids=["bfloat16", "every kind"],
)
def test_every_kind_of_block_is_exported(pattern, dtype, tmp_path):
    inputs = model_and_variables(pattern, dtype=dtype)
    export_model(tmp_path / "model", *inputs)
    loaded = load_exported(tmp_path / "model")
    assert loaded.tokenizer is None
    expected = generate(*inputs, PROMPTS, max_new_tokens=COUNT)
    tokens, state = greedy_tokens(loaded, PROMPTS)
    assert tokens == expected.tokens
    assert {leaf.dtype for leaf in state.values()} == {
        leaf.dtype for leaf in jax.tree.leaves(expected.state)
    }


def without_library(*arguments):
    """The output of the runner in a process that cannot import this library."""
    code = (
        "import runpy, sys; sys.modules.update(xlstm_jax=None, pallas_kernels=None); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(RUNNER), *map(str, arguments)]
    env = os.environ | {"XLA_FLAGS": "", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.run(command, capture_output=True, env=env, timeout=300)
    assert process.returncode == 0, process.stderr.decode()
    return process.stdout.decode()


@pytest.mark.slow
def test_the_runner_needs_jax_alone(file):
    prompt = bytes(PROMPTS[0]).decode()
    options = dict(max_new_tokens=8, stop=[BYTES.eos_id])
    (tokens,) = generate(*model_and_variables(), PROMPTS[:1], **options).tokens
    expected = prompt + BYTES.decode([token for token in tokens if token < 256])
    assert without_library(file, "--prompt", prompt, "--max-new-tokens", 8) == expected + "\n"


@pytest.mark.exhaustive
def test_the_file_of_a_tokenizer_is_included(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer_files.write_folder(tmp_path / "tokenizer", tokenizer_files.byte_level_bpe())
    tokenizer = tokenizers.get(str(tmp_path / "tokenizer"))
    inputs = model_and_variables("s", vocab_size=tokenizer.vocab_size)
    export_model(tmp_path / "model", *inputs, tokenizer=tokenizer, platforms=["cpu"])
    loaded = load_exported(tmp_path / "model")
    assert loaded.tokenizer.sha256 == tokenizer.sha256
    options = dict(max_new_tokens=8, stop=[tokenizer.eos_id])
    prompt = tokenizer.encode("some text").tolist()
    (tokens,) = generate(*inputs, [prompt], **options).tokens
    expected = tokenizer.decode(prompt + [i for i in tokens if i != tokenizer.eos_id])
    output = without_library(tmp_path / "model", "--prompt", "some text", "--max-new-tokens", 8)
    assert output == expected + "\n"
