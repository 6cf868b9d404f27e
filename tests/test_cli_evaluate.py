"""The data that `xlstm-jax evaluate` scores."""

import dataclasses

import jax
import numpy as np
import pytest

from xlstm_jax.cli import main
from xlstm_jax.data import DataConfig, load
from xlstm_jax.modules import LMConfig, param_shapes
from xlstm_jax.train import ExperimentConfig, TrainConfig, models


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The config and the parameters of a model of zeros, in place of a checkpoint."""
    cfg = ExperimentConfig(
        name="tiny",
        model=LMConfig(vocab_size=257, dim=8, pattern="m"),
        data=DataConfig(source="grammar", seq_len=32, batch_size=8),
        train=TrainConfig(),
    )
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), param_shapes(cfg.model))
    return tmp_path_factory.mktemp("run"), cfg, params


@pytest.fixture
def lines_of(run, monkeypatch, capsys):
    """Makes calls of `evaluate` with arguments: the label and the value of each printed line."""
    path, cfg, params = run
    model = models.Model(cfg, params, cfg.data.tokenizer, is_run=True)
    monkeypatch.setattr(models, "load", lambda *_, **__: model)

    def call(*arguments):
        code = main(["evaluate", str(path), *map(str, arguments)])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "") or (code == 2 and err.count("\n") == 1)
        return dict(line.split("  ", 1) for line in out.splitlines()) if code == 0 else err

    return call


def tokens(lines):
    return int(lines["tokens"].replace(",", ""))


def test_a_source_is_scored_whole_unless_a_split_is_given(lines_of, tmp_path):
    (tmp_path / "held_out.txt").write_text("a line of held out text here\n" * 200)
    source = ("--source", tmp_path / "held_out.txt")
    whole = lines_of(*source)
    assert "all splits" in whole["data"] and tokens(whole) == 200 * 29  # the first is no target
    valid = lines_of(*source, "--split", "valid")
    assert "valid" in valid["data"] and tokens(valid) == 10 * 29


def test_every_document_of_a_folder_with_splits_is_scored(lines_of, tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.py").write_text("text\n")
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.py").write_text("text\n")
    (tmp_path / "train" / "b.txt").write_text("text that the pattern leaves out\n")
    assert tokens(lines_of("--source", tmp_path, "--pattern", "*.py")) == 3 * 5


def test_the_data_of_the_run_are_scored_on_the_valid_split(lines_of, run):
    windows = load(run[1].data, "valid")
    lines = lines_of()
    assert (
        "grammar, valid" in lines["data"]
        and tokens(lines) == windows.store.num_tokens - windows.store.num_documents
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-batches 0", "max_batches must be at least 1, got 0"),
        ("--seq-len 0", "data.seq_len must be at least 1, got 0"),
        ("--batch-size 0", "data.batch_size must be at least 1, got 0"),
        ("--split all", "invalid choice 'all' for argument '--split'"),
        ("--source nowhere", "data.source='nowhere' is neither"),
        ("--pattern {,}", "data.pattern must match names of files, got '{,}'"),
    ],
)
def test_invalid_values_are_one_line_errors(lines_of, arguments, message):
    assert message in lines_of(*arguments.split())


def test_a_source_replaces_the_mixture_of_the_run(lines_of, run, tmp_path, monkeypatch):
    path, cfg, params = run
    mixed = dataclasses.replace(
        cfg.data,
        sources={"a": "grammar", "b": "topics"},
        weights={"a": 1, "b": 1},
        weight_schedule=((5, {"a": 0, "b": 1}),),
    )
    cfg = dataclasses.replace(cfg, data=mixed)
    model = models.Model(cfg, params, cfg.data.tokenizer, is_run=True)
    monkeypatch.setattr(models, "load", lambda *_, **__: model)
    (tmp_path / "held_out.txt").write_text("a line of held out text here\n" * 200)
    assert tokens(lines_of("--source", tmp_path / "held_out.txt")) == 200 * 29
