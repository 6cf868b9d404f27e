"""The data that `xlstm-jax evaluate` scores."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests import quick
from xlstm_jax.cli import main
from xlstm_jax.config import to_dict
from xlstm_jax.data import DataConfig, load
from xlstm_jax.modules import LMConfig, param_shapes
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig, models, rundir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The config and the parameters of a model of zeros, instead of a checkpoint."""
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


def test_all_of_a_source_is_scored_unless_a_split_is_given(lines_of, tmp_path):
    (tmp_path / "book.txt").write_text("a line of short text is here\n" * 200)
    source = ("--source", tmp_path / "book.txt")
    fields = lines_of(*source)
    assert "all splits" in fields["data"] and tokens(fields) == 200 * 29  # the first is no target
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
        ("--segment-len 0", "segment_len must be at least 1, got 0"),
        ("--edges 1 10 10", "edges must be increasing counts from 0 on, got [1, 10, 10]"),
        ("--domains nowhere", "the folder of domains must be a folder, got nowhere"),
        ("--limit 3", "--task-path, --num-fewshot and --limit need --tasks"),
        ("--tasks any --limit -1", "limit must be at least 1, got -1"),
        ("--plot plot.jpeg", "--plot must be a file that ends in .png, .pdf, .svg, got plot.jpeg"),
        ("--plot nowhere/a.png", "--plot must be a file in an existing folder"),
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
    (tmp_path / "book.txt").write_text("a line of short text is here\n" * 200)
    assert tokens(lines_of("--source", tmp_path / "book.txt")) == 200 * 29


def test_a_model_named_twice_is_an_error(lines_of, run):
    assert f"models must differ, got '{run[0]}/' twice" in lines_of(f"{run[0]}/")


def test_no_model_is_an_error(capsys):
    assert main(["evaluate", "--json"]) == 2
    assert capsys.readouterr().err.startswith("xlstm-jax: `xlstm-jax evaluate` needs MODEL")


@pytest.fixture
def two(run, tmp_path, monkeypatch):
    """Two runs: models of zeros, and of a vocabulary with ids that no text has."""
    _, cfg, _ = run
    loaded = {}
    for name, vocab_size in (("first", 257), ("second", 300)):
        (tmp_path / name).mkdir()
        model = dataclasses.replace(cfg.model, vocab_size=vocab_size)
        changed = dataclasses.replace(cfg, model=model)
        rundir.write_json(tmp_path / name / rundir.CONFIG, to_dict(changed))
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), param_shapes(model))
        loaded[str(tmp_path / name)] = models.Model(changed, params, "byte", is_run=True)
    monkeypatch.setattr(models, "load", lambda source, *_, **__: loaded[source])
    (tmp_path / "compiled").mkdir()
    with quick.compilation(tmp_path / "compiled"):
        yield list(loaded)


def test_models_are_compared_in_tables_in_json_and_in_a_picture(two, tmp_path, capsys):
    (tmp_path / "domains").mkdir()
    (tmp_path / "domains" / "letters.txt").write_text("abc")
    (tmp_path / "domains" / "digits.txt").write_text("0123")
    options = ["--max-batches", "1", "--by-position", "--by-frequency", "--edges", "0", "1", "100"]
    options += ["--split", "valid", "--seq-len", "16", "--domains", str(tmp_path / "domains")]
    picture = tmp_path / "comparison.png"
    assert main(["evaluate", *two, *options, "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    words = [line.split() for line in out.splitlines()]
    assert ["first", "8.0056", "5.5491", "256.9994", "128"] in words  # of uniform predictions
    assert ["second", "8.2288", "5.7038", "299.9997", "128"] in words
    assert ["8-15", "5.5491", "5.7038", "64"] in words
    assert ["letters", "8.0056", "8.2288", "3", "1"] in words
    assert "first has the lower loss in 2 of 2 domains, second in 0." in out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 300 * 1024

    assert main(["evaluate", *two, *options, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, second = json.loads(out)["models"]
    assert [first["model"], second["model"]] == two
    assert first["nats_per_token"] == pytest.approx(np.log(257), rel=1e-5)
    assert second["perplexity"] == pytest.approx(300, rel=1e-5) and second["num_tokens"] == 128
    assert sum(bucket["num_tokens"] for bucket in first["by_frequency"]) == 128
    assert first["by_frequency"][0] | {"nats_per_token": None} == {
        "start": 0, "stop": 1, "nats_per_token": None, "num_tokens": 0
    }  # fmt: skip
    assert first["domains"]["digits"]["num_bytes"] == 4
    comparison = {"num_wins": 2, "num_ties": 0, "num_domains": 2}
    assert json.loads(out)["wins"] == [{"model": two[0], "over": two[1]} | comparison]


def test_a_run_without_a_checkpoint_is_an_error_before_any_model_is_evaluated(
    two, tmp_path, capsys
):
    (tmp_path / "started").mkdir()
    rundir.write_json(tmp_path / "started" / rundir.CONFIG, {"model": {}})
    with pytest.raises(KeyError, match="started"):  # of the fake `models.load`
        main(["evaluate", two[0], str(tmp_path / "started")])


def test_a_window_beyond_the_attention_cache_is_an_error(lines_of, run, monkeypatch):
    path, cfg, _ = run
    model = LMConfig(vocab_size=257, dim=8, pattern="a", attention=AttentionConfig(cache_size=64))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), param_shapes(model))
    cfg = dataclasses.replace(cfg, model=model)
    loaded = models.Model(cfg, params, "byte", is_run=True)
    monkeypatch.setattr(models, "load", lambda *_, **__: loaded)
    message = "--seq-len must be at most model.attention.cache_size=64, the positions that its"
    assert message in lines_of("--seq-len", 65)
    assert tokens(lines_of("--seq-len", 65, "--cache-size", 80, "--max-batches", 1)) > 0
