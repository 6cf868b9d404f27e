"""Recall, nearest neighbors, the Long Range Arena and the applications: configs and outcomes."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import long_range_arena, mqar, nearest_neighbor
from experiments.applications import frame_classifier, image_scans, translation
from xlstm_jax.config import ConfigError
from xlstm_jax.data import load
from xlstm_jax.data.synthetic import listops
from xlstm_jax.train.config import check_vocabulary
from xlstm_jax.train.grid import batches_of

EXPERIMENTS = (mqar, nearest_neighbor, long_range_arena)
APPLICATIONS = (translation, frame_classifier, image_scans)
NAMES = dict(ids=lambda module: module.__name__.rpartition(".")[-1])


# Associative recall.


def recall(*scores):
    names = ("xLSTM[1:0]", "xLSTM[0:1]", "Llama")
    return {n: {"accuracy": {"32": list(s)}} for n, s in zip(names, scores, strict=True)}


def test_one_seed_must_recall_and_no_seed_of_the_vector_memory():
    models = recall((0.2, 0.97), (0.5, 0.6), (0.99, 0.99))
    assert list(mqar.outcome(models, 32).values()) == [True, True, True]
    models = recall((0.2, 0.97), (0.5, 0.9), (0.94, 0.2))
    assert list(mqar.outcome(models, 32).values()) == [True, False, False]


def test_published_settings_of_recall():
    cfg = mqar.paper(2048, 256, 128)
    assert (cfg.data.batch_size, cfg.data.min_len, cfg.model.vocab_size) == (24, 2049, 8192)
    assert cfg.train.steps == 64 * 100_000 // 24
    assert cfg.train.lr == 1e-3 and cfg.train.lr * cfg.train.end_factor == pytest.approx(1e-5)
    assert mqar.learning_rates(cfg, "paper") == (1e-3, 2.2e-4, 5e-5, 1e-5)
    assert mqar.learning_rates(mqar.paper(), "paper") == (1e-2, 2.15e-3, 4.6e-4, 1e-4)
    with pytest.raises(ConfigError, match="length=100 has no published settings; use one of: 64"):
        mqar.paper(100)


def test_training_repeats_its_samples_only_if_their_number_is_given():
    cfg = mqar.config("smoke")
    B = cfg.data.batch_size
    train = load(cfg.data, "train")
    endless, repeated = (batches_of(train, cfg.data, n)(1, 2) for n in (None, B))
    assert endless.inputs.shape == (2, B, cfg.data.seq_len)
    assert endless.index.ravel().tolist() == list(range(B, 3 * B))
    np.testing.assert_array_equal(repeated.inputs[0], repeated.inputs[1])


# Nearest neighbors.


def test_every_model_must_be_better_than_a_constant_and_xlstm_than_the_lstm():
    def outcome(*errors):
        models = {
            n: {"mean_mse": e} for n, e in zip(nearest_neighbor.PATTERNS, errors, strict=True)
        }
        return list(nearest_neighbor.outcome(models).values())

    assert outcome(0.05, 0.01, 0.02, 0.08) == [True, True]
    assert outcome(0.01, 0.05, 0.02, 0.09) == [False, False]


def test_confidence_intervals_are_those_of_students_distribution():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    half = 4.604 * np.std(values, ddof=1) / np.sqrt(5)
    assert nearest_neighbor.confidence(values) == pytest.approx(half)
    assert nearest_neighbor.confidence([1.0]) == 0


def test_a_language_model_is_not_trained_on_vectors():
    cfg = nearest_neighbor.CPU
    with pytest.raises(ConfigError, match="has vectors instead of tokens, which a language model"):
        check_vocabulary(cfg, load(cfg.data, "train"))


# Long Range Arena.


def test_published_settings_of_the_long_range_arena():
    table = {
        name: (len(s.pattern), s.dim, s.batch_size, s.steps, 1 / s.num_classes)
        for name, s in long_range_arena.PAPER.items()
    }
    assert table == {
        "retrieval": (6, 128, 64, 100_000, 0.5),
        "listops": (8, 128, 32, 80_000, 0.1),
        "pathfinder": (6, 192, 64, 500_000, 0.5),
        "gray": (6, 512, 64, 180_000, 0.1),
        "rgb": (6, 512, 64, 180_000, 0.1),
    }
    assert {s.pattern[0] for n, s in long_range_arena.PAPER.items() if n in ("gray", "rgb")} == {
        "s"
    }


def test_generated_expressions_have_their_values_as_classes():
    cfg = long_range_arena.config("cpu").data
    batch = long_range_arena.Generated(cfg, "train").batch(np.arange(50))
    as_task = load(cfg, "train")
    assert as_task.vocab_size == listops.VOCAB_SIZE
    lengths = batch.segment_ids.sum(axis=1)
    assert lengths.min() >= 8 and lengths.max() <= 64
    assert (np.argmax(batch.weights, axis=1) == lengths - 1).all()
    assert set(batch.targets[batch.weights > 0].tolist()) <= set(range(10))


def test_the_best_constant_depends_on_the_operator_only():
    max_, min_ = listops.OPERATOR, listops.OPERATOR + 1
    inputs = np.array([[max_, 0], [max_, 0], [max_, 0], [min_, 0]], np.int32)
    targets = np.array([[-1, 9], [-1, 9], [-1, 8], [-1, 0]], np.int32)
    weights = (targets >= 0).astype(np.float32)
    batch = long_range_arena.Batch(inputs, targets, weights, weights, np.arange(4))
    assert long_range_arena.best_constant(iter([batch])) == 3 / 4


def test_tasks_without_data_are_rejected_before_anything_is_compiled():
    cfg = long_range_arena.config("paper").data
    with pytest.raises(ConfigError, match="data must be the folder with the files of task='rgb'"):
        long_range_arena.open_set("rgb", cfg, "train", None)
    with pytest.raises(ConfigError, match="task='gray' must be 'listops'.*use --size paper"):
        long_range_arena.main(long_range_arena.Options(task="gray"))


# Applications.


def test_a_translation_is_the_only_target_of_its_sequence():
    source = np.array([3, 5, 4])
    batch = translation.make_batch([source], "translate")
    words = translation.translate(source, "translate").tolist()
    assert batch.inputs[0, :8].tolist() == [3, 5, 4, translation.SEPARATOR, *words, translation.END]
    (targets,) = np.nonzero(batch.weights[0])
    assert batch.targets[0, targets].tolist() == [*words, translation.END]
    assert translation.translate(source, "copy").tolist() == [3, 5, 4]
    assert len(set(translation.WORDS)) == translation.NUM_SYMBOLS


def test_the_class_of_a_frame_is_shown_once_in_its_segment():
    batch = frame_classifier.signals(0, 50)
    for frames, classes, valid in zip(batch.inputs, batch.targets, batch.weights, strict=True):
        frames, classes = frames[valid > 0], classes[valid > 0]
        starts = np.flatnonzero(frames[:, -1] > 0.5)
        for start, stop in zip(starts, [*starts[1:], len(frames)], strict=True):
            told = frames[start:stop, :-1] > 0.5
            assert told.sum() == 1 and (classes[start:stop] == told.argmax(axis=1).max()).all()


def test_the_class_of_an_image_is_the_position_of_its_dark_square():
    pixels, classes = image_scans.images(0, 200)
    for image, label in zip(pixels, classes, strict=True):
        (y, x) = np.argwhere(image < -0.5).mean(axis=0) - np.argwhere(image > 0.5).mean(axis=0)
        vertical = abs(y) > abs(x)
        assert label == 2 * vertical + ((y if vertical else x) > 0)
    parts = image_scans.patches(pixels)
    np.testing.assert_array_equal(parts[0, 5, :16].reshape(4, 4), pixels[0, 4:8, 4:8])
    np.testing.assert_allclose(parts[0, 6, 16:], [-1 / 3, 1 / 3], rtol=1e-6)  # y and x


# All of them.


@pytest.mark.parametrize("module", EXPERIMENTS, **NAMES)
def test_an_unknown_size_is_rejected_with_the_known_ones(module):
    with pytest.raises(ConfigError, match="'huge' is unknown; use one of: smoke, cpu, paper"):
        module.config("huge")


@pytest.fixture
def lstm_only(monkeypatch):
    """Leaves the process as it is, and trains LSTMs, which compile fast."""
    monkeypatch.setattr(mqar.cpu, "prepare", lambda: None)
    names = ("xLSTM[1:0]", "xLSTM[0:1]", "Llama")
    monkeypatch.setattr(mqar, "PATTERNS", dict.fromkeys(names, "l"))
    monkeypatch.setattr(nearest_neighbor, "PATTERNS", {"LSTM": "l", "xLSTM[0:1]": "l"})
    smoke = long_range_arena.config("smoke")
    smoke = dataclasses.replace(smoke, model=dataclasses.replace(smoke.model, pattern="l"))
    monkeypatch.setitem(long_range_arena.SIZES, "smoke", smoke)
    for module in APPLICATIONS:
        monkeypatch.setattr(module, "BLOCKS", dataclasses.replace(module.BLOCKS, pattern="l"))


def smoke_result(module, out):
    assert module.main(module.Options(size="smoke", out=out)) == 0
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("module", EXPERIMENTS, **NAMES)
def test_the_smallest_size_writes_a_result_and_a_plot(module, lstm_only, one_device, tmp_path):
    result = smoke_result(module, tmp_path / "result.json")
    assert result["size"] == "smoke" and result["outcome"]
    assert (tmp_path / "result.png").stat().st_size < 300 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("module", APPLICATIONS, **NAMES)
def test_the_smallest_size_of_an_application_writes_a_result(
    module, lstm_only, one_device, tmp_path
):
    result = smoke_result(module, tmp_path / "result.json")
    assert result["size"] == "smoke" and result["outcome"]


@pytest.mark.slow
def test_published_files_are_trained_on(one_device, tmp_path, monkeypatch):
    for split in ("train", "eval", "test"):
        lines = [f'"{n % 2}.0"\t"a"\t"b"\t"text {n}"\t"other {n % 2}"\n' for n in range(12)]
        (tmp_path / f"new_aan_pairs.{split}.tsv").write_text("".join(lines))
    small = long_range_arena.PAPER["retrieval"]._replace(
        pattern="l", dim=8, batch_size=4, steps=2, seq_len=24
    )
    monkeypatch.setitem(long_range_arena.PAPER, "retrieval", small)
    monkeypatch.setitem(long_range_arena.LRS, "paper", (1e-3,))
    monkeypatch.setattr(long_range_arena.cpu, "prepare", lambda: None)
    options = dict(size="paper", task="retrieval", data=tmp_path, out=tmp_path / "result.json")
    long_range_arena.main(long_range_arena.Options(**options))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["published"]["xLSTM"] == 0.906 and 0 <= result["test_accuracy"] <= 1
