"""Runs on prepared tokens: every packing, the tokenizer of the run, and data that do not fit."""

import shutil

import numpy as np
import pytest

from xlstm_jax.cli import main
from xlstm_jax.config import ConfigError
from xlstm_jax.data import load, tokenizers
from xlstm_jax.data.loader import load_eval_sets
from xlstm_jax.data.prepare import PrepareConfig, prepare
from xlstm_jax.data.train_tokenizer import train_bpe
from xlstm_jax.train import fit

pytest.importorskip("tokenizers")

TEXT = "the state of a gate is the memory of the scan ".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Raw text, a tokenizer, and the tokens that both make."""
    root, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    for split, count in (("train", 40), ("valid", 6)):
        (root / "raw" / split).mkdir(parents=True)
        for number in range(count):
            words = rng.choice(TEXT, int(rng.integers(5, 60)))
            (root / "raw" / split / f"{number:02}.txt").write_text(" ".join(words) + ".\n")
    texts = [path.read_bytes() for path in (root / "raw").rglob("*.txt")]
    train_bpe(texts, 280, root / "tokenizer")
    cfg = PrepareConfig(source=str(root / "raw"), tokenizer=str(root / "tokenizer"))
    prepare(cfg, root / "tokens", num_workers=1)
    return root


def config(experiment, folder, **data):
    return experiment(
        data={"source": str(folder / "tokens"), "seq_len": 32} | data, model={"vocab_size": 280}
    )


@pytest.mark.parametrize("packing", ["windows", "first_fit", "best_fit", "pad", "stream"])
def test_every_packing_has_every_target_once(experiment, folder, packing):
    cfg = config(experiment, folder, packing=packing)
    examples = load(cfg.data, "train")
    batch = examples.batch(np.arange(len(examples)))
    num_targets = examples.store.num_tokens - examples.store.num_documents
    assert batch.weights.sum() == num_targets
    targets = batch.targets[batch.weights > 0]
    assert np.count_nonzero(targets == examples.tokenizer.eos_id) == 40
    text = b"".join(p.read_bytes() for p in (folder / "raw" / "train").glob("*.txt"))
    assert examples.tokenizer.num_bytes(targets) <= len(text)


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer(experiment, folder, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    cfg = config(experiment, moved, packing="best_fit")
    result = fit(cfg, tmp_path / "run")
    assert result.finished and result.evaluation["valid_bits_per_byte"] > 0
    saved = tokenizers.get(str(tmp_path / "run" / "tokenizer"))
    assert saved.sha256 == tokenizers.get(str(folder / "tokenizer")).sha256
    shutil.rmtree(moved)
    generate = ["generate", str(tmp_path / "run"), "--prompt", "the", "--max-new-tokens", "5"]
    assert main(generate) == 0
    assert capsys.readouterr().out.startswith("the")
    evaluate = ["evaluate", str(tmp_path / "run"), "--source"]
    for source in ("tokens", "raw"):
        assert main([*evaluate, str(folder / source)]) == 0
        assert "bits per byte" in capsys.readouterr().out


def test_another_tokenizer_than_that_of_the_data_is_rejected(experiment, folder, tmp_path):
    train_bpe([b"other words"], 270, tmp_path / "other")
    cfg = config(experiment, folder, tokenizer=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="must be the tokenizer of the data, SHA-256"):
        load(cfg.data, "train")
    same = config(experiment, folder, tokenizer=str(folder / "tokenizer"))
    assert len(load(same.data, "train"))


def test_a_model_with_a_smaller_vocabulary_is_rejected(experiment, folder, tmp_path):
    cfg = experiment(data={"source": str(folder / "tokens"), "seq_len": 32})
    with pytest.raises(ConfigError, match=r"model.vocab_size must be at least 2\d\d, which"):
        fit(cfg, tmp_path)


def test_sources_of_a_mixture_must_have_one_tokenizer(experiment, folder):
    data = {"sources": {"a": str(folder / "tokens"), "b": str(folder / "raw")}}
    cfg = experiment(data=data | {"weights": {"a": 1, "b": 1}})
    with pytest.raises(ConfigError, match="data.sources must have one tokenizer"):
        load(cfg.data, "train")


def test_a_validation_set_of_another_tokenizer_is_rejected(experiment, folder, tmp_path):
    sets = {"raw": str(folder / "raw")}
    cfg = config(experiment, folder, eval_sets=sets)
    with pytest.raises(ConfigError, match="data.eval_sets must have one tokenizer, got several"):
        fit(cfg, tmp_path)
    same = config(experiment, folder, eval_sets=sets, tokenizer=str(folder / "tokenizer"))
    raw = load_eval_sets(same.data)["raw"]
    assert raw.tokenizer.sha256 == load(same.data, "train").tokenizer.sha256
