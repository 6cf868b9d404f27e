"""Models that commands take: runs, and folders of transformers with their tokenizers."""

import jax
import numpy as np
import pytest

from tests.convert.baselines import random_params
from tests.data import tokenizer_files as make
from xlstm_jax import convert
from xlstm_jax.cli import main
from xlstm_jax.config import ConfigError
from xlstm_jax.data import tokenizers
from xlstm_jax.modules import LargeConfig, LMConfig
from xlstm_jax.train import models, restore_params, rundir


def save(folder, vocab_size):
    """A checkpoint of a small model, and its parameters."""
    large = LargeConfig(num_heads=2)
    cfg = LMConfig(
        vocab_size=vocab_size, dim=16, pattern="M", large=large, final_norm="rms",
        final_norm_eps=1e-6,
    )  # fmt: skip
    params = random_params(cfg)
    convert.save_hf(folder, cfg, params)
    return params


def assert_same(a, b):
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with its tokenizer."""
    tokenizer = tokenizers.get(make.write_folder(tmp_path / "tok", make.byte_level_bpe()))
    params = save(tmp_path / "hf", tokenizer.vocab_size)
    tokenizer.save(tmp_path / "hf")
    return tmp_path / "hf", params


def test_a_folder_is_a_model_with_its_tokenizer(folder):
    path, params = folder
    model = models.load(path)
    assert_same(model.params, params)
    assert model.tokenizer == str(path) and not model.is_run
    assert model.cfg.model.vocab_size == tokenizers.get(model.tokenizer).vocab_size


def test_a_folder_without_a_tokenizer_has_one_of_bytes_or_none(tmp_path, monkeypatch):
    save(tmp_path / "bytes", 257)
    save(tmp_path / "other", 300)
    assert models.load(tmp_path / "bytes").tokenizer == "byte"
    assert models.load(tmp_path / "other", needs_tokenizer=False).tokenizer is None
    monkeypatch.setattr(convert.mapping, "load", lambda *_: pytest.fail("reads parameters"))
    with pytest.raises(ConfigError, match=r"other must have a tokenizer.json or a \*.model"):
        models.load(tmp_path / "other")


@pytest.mark.parametrize("options", [{"step": 0}, {"ema": True}])
def test_options_of_runs_are_rejected_for_folders(folder, options):
    [name] = options
    with pytest.raises(ConfigError, match=f"{name}=.* applies to a run only, .* leave --{name}"):
        models.load(folder[0], **options)


def test_a_tokenizer_travels_to_a_run_and_back(folder, tmp_path, monkeypatch):
    path, params = folder
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "hf-to-run", "hf", "run"]) == 0
    model = models.load("run")
    assert_same(model.params, params)
    assert model.is_run and model.tokenizer == "run/tokenizer"
    assert restore_params("run")[0].data.tokenizer == str(path)
    assert main(["convert", "run-to-hf", "run", "back"]) == 0
    sha256 = {tokenizers.get(folder).sha256 for folder in ("hf", "run/tokenizer", "back")}
    assert len(sha256) == 1
    assert main(["convert", "hf-to-run", "hf", "other", "--data.tokenizer", "byte"]) == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": "{}"}, False),
        ({"config.json": '{"model": {}}'}, True),
        ({"config.json": "[]"}, True),  # named by the error about a run
        ({"config.json": "{}", "run.json": "{}"}, True),
        ({}, True),
    ],
)
def test_runs_are_told_from_folders_by_their_files(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert rundir.is_run(tmp_path) == expected
