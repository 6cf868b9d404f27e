"""Readers of the Long Range Arena, on small files in the published layouts."""

import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, batch_at, eval_batches
from xlstm_jax.data.lra import images, text
from xlstm_jax.data.synthetic import listops
from xlstm_jax.errors import ArgumentError


def all_of(examples):
    return examples.batch(np.arange(len(examples)))


def classes(batch):
    return batch.targets[batch.weights > 0]


def test_listops_files_give_expressions_and_their_values(tmp_path):
    lines = ["Source\tTarget", "( ( ( [MAX 4 ) 3 ) ] )\t4", "( ( ( [SM 5 ) 7 ) ] )\t2"]
    (tmp_path / "basic_val.tsv").write_text("\n".join(lines) + "\n")
    examples = text.read_listops(tmp_path, "valid", seq_len=6)
    batch = all_of(examples)
    np.testing.assert_array_equal(batch.inputs[0, :4], listops.encode("[MAX 4 3 ]"))
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert classes(batch).tolist() == [4, 2] and (batch.weights[:, 3] == 1).all()
    assert examples.vocab_size == listops.VOCAB_SIZE
    assert all_of(text.read_listops(tmp_path, "valid", seq_len=3)).segment_ids.all()  # truncated


def test_retrieval_files_give_two_documents_of_bytes(tmp_path):
    line = '"{}"\t"1"\t"2"\t"{}"\t"{}"\n'
    content = line.format("1.0", "ab", 'é""c') + line.format("0.0", "abcdefgh", "x")
    (tmp_path / "new_aan_pairs.eval.tsv").write_text(content)
    batch = all_of(text.read_retrieval(tmp_path, "valid", document_len=5))
    assert batch.inputs.shape == (2, 10)
    np.testing.assert_array_equal(batch.inputs[0, :7] - 1, [*b"ab", *'é"c'.encode(), -1])
    assert batch.segment_ids[0].tolist() == [1, 1, 2, 2, 2, 2, 0, 0, 0, 0]
    assert batch.segment_ids[1].tolist() == [1, 1, 1, 1, 1, 2, 0, 0, 0, 0]
    assert classes(batch).tolist() == [1, 0]


@pytest.fixture
def cifar(tmp_path, rng):
    """A folder of tiny batches in the layout of CIFAR-10, and the images and classes of them."""
    pixels = rng.integers(0, 256, (24, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, 24).tolist()
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    for n, name in enumerate(names):
        part = slice(4 * n, 4 * n + 4)
        content = {b"data": pixels[part], b"labels": labels[part]}
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    return tmp_path, pixels, np.array(labels)


def test_cifar_images_are_sequences_of_pixels(cifar):
    folder, pixels, labels = cifar
    sizes = {}
    for split in ("train", "valid", "test"):
        examples = images.read_cifar10(folder, split, gray=False)
        sizes[split] = len(examples)
        batch = all_of(examples)
        start = {"train": 0, "valid": 18, "test": 20}[split]
        expected = pixels[start : start + len(examples)].reshape(-1, 3, 1024)
        np.testing.assert_allclose(batch.inputs, expected.swapaxes(1, 2) / 127.5 - 1, atol=1e-6)
        np.testing.assert_array_equal(classes(batch), labels[start : start + len(examples)])
    assert sizes == {"train": 18, "valid": 2, "test": 4}
    gray = all_of(images.read_cifar10(folder, "test", gray=True)).inputs
    assert gray.shape == (4, 1024, 1) and gray.dtype == np.float32
    color = all_of(images.read_cifar10(folder, "test", gray=False)).inputs
    np.testing.assert_allclose(gray[..., 0], color @ np.float32(images.LUMA), atol=1e-5)


def test_a_pickle_that_could_run_code_is_rejected(cifar):
    folder, *_ = cifar
    (folder / "test_batch").write_bytes(pickle.dumps(pathlib.Path("x"), protocol=2))
    with pytest.raises(ConfigError, match=r"no Python batch of CIFAR-10 \(.*is not allowed"):
        images.read_cifar10(folder, "test", gray=True)
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": np.zeros((1, 5), np.uint8),
                                                      b"labels": [0]}, protocol=2))  # fmt: skip
    with pytest.raises(ConfigError, match=r"3 x 32 x 32, got uint8 of shape \(1, 5\)"):
        images.read_cifar10(folder, "test", gray=True)


def test_both_layouts_of_pathfinder_have_the_same_images(tmp_path, rng):
    pixels = rng.integers(0, 256, (20, 4, 4), dtype=np.uint8)
    labels = np.arange(20) % 2
    published, arrays = tmp_path / "published", tmp_path / "arrays"
    (published / "metadata").mkdir(parents=True)
    lines = {"0": [], "10": [], "2": []}
    for n, image in enumerate(pixels):
        part = ("0", "2", "10")[n // 7]
        folder = published / "imgs" / part
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"sample_{n}.png")
        lines[part].append(f"imgs/{part} sample_{n}.png {n} {labels[n]} 1.8 6")
    for part, content in lines.items():
        (published / "metadata" / f"{part}.npy").write_text("\n".join(content))
    arrays.mkdir()
    np.save(arrays / "images.npy", pixels)
    np.save(arrays / "labels.npy", labels)
    seen = []
    for split, count in (("train", 16), ("valid", 2), ("test", 2)):
        a, b = (all_of(images.read_pathfinder(f, split)) for f in (published, arrays))
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(classes(a), classes(b))
        assert a.inputs.shape == (count, 16, 1)
        for image, label in zip(a.inputs, classes(a), strict=True):
            matches = (pixels.reshape(20, 16) / 127.5 - 1 - image[:, 0]).round(4) == 0
            (n,) = np.flatnonzero(matches.all(axis=1))
            assert labels[n] == label
            seen.append(n)
    assert sorted(seen) == list(range(20))  # the splits are disjoint


def test_every_epoch_has_all_sequences_in_another_order(cifar):
    folder, *_ = cifar
    cfg = DataConfig(batch_size=6, seq_len=1024)
    examples = images.read_cifar10(folder, "train", gray=True)
    epochs = [np.concatenate([batch_at(examples, cfg, 3 * e + s).index for s in range(3)])
              for e in range(2)]  # fmt: skip
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(18))
    assert epochs[0].tolist() != epochs[1].tolist()
    *_, last = eval_batches(images.read_cifar10(folder, "test", gray=True), cfg)
    assert last.weights.sum() == 4 and last.inputs.shape == (6, 1024, 1)


@pytest.mark.parametrize(
    ("read", "layout"),
    [
        (lambda f: text.read_listops(f, "test"), r"basic_test.tsv .* layout is basic_\{train,val"),
        (lambda f: text.read_retrieval(f, "test"), "new_aan_pairs.test.tsv .* layout is new_aan"),
        (lambda f: images.read_cifar10(f, "test", gray=True), "test_batch .* is data_batch_1 to"),
        (lambda f: images.read_pathfinder(f, "test"), r"metadata .* layout is metadata/\*.npy, t"),
    ],
)
def test_missing_files_are_reported_with_the_expected_layout(read, layout, tmp_path):
    with pytest.raises(ConfigError, match=f"does not exist|{layout}") as error:
        read(tmp_path)
    assert "Nothing is downloaded" in str(error.value) and "\n" not in str(error.value)


def test_invalid_lines_are_reported_with_their_number(tmp_path):
    (tmp_path / "basic_test.tsv").write_text("Source\tTarget\n[MAX 1 2 ]\t2\n[MAX 1 2 ]\t12\n")
    with pytest.raises(ConfigError, match="line 3: expected a class from 0 to 9, got '12'"):
        text.read_listops(tmp_path, "test")
    (tmp_path / "basic_test.tsv").write_text("Source\tTarget\n[MAX 1 x ]\t2\n")
    with pytest.raises(ArgumentError, match="got 'x'"):
        all_of(text.read_listops(tmp_path, "test"))
    (tmp_path / "new_aan_pairs.test.tsv").write_text('"1.0"\t"1"\t"2"\t"a"\n')
    with pytest.raises(ConfigError, match="line 1: expected 5 columns separated by tabs, got 4"):
        all_of(text.read_retrieval(tmp_path, "test"))
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n")
    with pytest.raises(ConfigError, match="must have at least one sequence, got none"):
        text.read_listops(tmp_path, "train")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "0.npy").write_text("imgs/0 a.png 0 7 1\n")
    with pytest.raises(ConfigError, match="0.npy, line 1: expected a folder, a file, a number"):
        images.read_pathfinder(tmp_path, "test")
