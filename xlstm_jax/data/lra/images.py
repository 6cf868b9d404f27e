"""The image sets of the Long Range Arena: Pathfinder, and CIFAR-10 in gray and in color.

Sources: Tay et al. 2020, arXiv:2011.04006; Linsley et al. 2018, arXiv:1805.08315 (Pathfinder);
Krizhevsky 2009 (CIFAR-10). Images become sequences of pixels, in reading order, with values in
[-1, 1].
"""

import io
import pathlib
import pickle
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from xlstm_jax.data.config import Split
from xlstm_jax.data.hashing import fold, key, permute
from xlstm_jax.data.lra.labeled import Labeled, Sequences
from xlstm_jax.data.lra.text import require
from xlstm_jax.errors import ConfigError, quote, quote_path

NUM_VALID = 5000
"""Images of the training files of CIFAR-10 in the validation split."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in gray (ITU-R BT.601)."""

_PATHFINDER_LAYOUT = (
    "metadata/*.npy, text lines whose fields are folder, file and label (the fourth), beside "
    "imgs/*/*.png; or images.npy (N H W, uint8) and labels.npy"
)
_CIFAR_LAYOUT = "data_batch_1 to data_batch_5 and test_batch, the Python version of CIFAR-10"


def read_cifar10(folder: pathlib.Path, split: Split, *, gray: bool) -> Labeled:
    """CIFAR-10 from its Python batches: 1,024 pixels of one number, or of three.

    The last `NUM_VALID` training images are the validation split. All images of a split are in
    memory as bytes.

    Raises:
        ConfigError: a file is missing or is not such a batch.
    """
    names = ["test_batch"] if split == "test" else [f"data_batch_{n}" for n in range(1, 6)]
    paths = [require(folder / name, _CIFAR_LAYOUT) for name in names]
    data, labels = map(np.concatenate, zip(*map(_read_batch, paths), strict=True))
    num_valid = min(NUM_VALID, len(labels) // 10)
    part = {
        "train": slice(None, len(labels) - num_valid),
        "valid": slice(len(labels) - num_valid, None),
        "test": slice(None),
    }[split]
    data, labels = data[part], labels[part]

    def read(index: Int64[np.ndarray, "B"]) -> Sequences:
        # Stored by channel: 1,024 values of red, then green, then blue.
        pixels = data[index].reshape(len(index), 3, -1).swapaxes(1, 2).astype(np.float32)
        return _to_sequences(pixels @ np.array([LUMA], np.float32).T if gray else pixels)

    return Labeled(read, labels, 0, f"{folder} {'gray' if gray else 'rgb'} {split}")


def read_pathfinder(folder: pathlib.Path, split: Split) -> Labeled:
    """Pathfinder images: are the two dots connected? In both layouts 80, 10 and 10 % are a split.

    `folder` has the published layout, PNG files that are read when a batch needs them, or two
    arrays, of which the images are mapped into memory. The order is shuffled, the same every time.

    Raises:
        ConfigError: files are missing or have another layout.
    """
    if (folder / "images.npy").exists():
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(require(folder / "labels.npy", _PATHFINDER_LAYOUT)).astype(np.int64)
        if images.ndim != 3 or len(images) != len(labels):
            raise ConfigError(
                f"{quote_path(folder)} must have as many images (N H W) as labels, got "
                f"{images.shape} and {labels.shape}; the expected layout is {_PATHFINDER_LAYOUT}."
            )
        pixels = lambda i: images[i]  # noqa: E731
    else:
        require(folder / "metadata", _PATHFINDER_LAYOUT)
        paths, labels = _read_metadata(folder)
        pixels = lambda i: read_png(paths[i])  # noqa: E731
    chosen = split_indices(len(labels), split)

    def read(index: Int64[np.ndarray, "B"]) -> Sequences:
        flat = [np.asarray(pixels(i), np.float32).reshape(-1, 1) for i in chosen[index]]
        return _to_sequences(np.stack(flat))

    return Labeled(read, labels[chosen], 0, f"{folder} {split}")


def split_indices(count: int, split: Split) -> Int64[np.ndarray, "N"]:
    """80, 10 and 10 % of shuffled indices, for the three splits."""
    order = permute(np.arange(count), count, np.repeat(fold(key(0), key(count)), count))
    first, second = count * 8 // 10, count * 9 // 10
    part = {"train": slice(first), "valid": slice(first, second), "test": slice(second, None)}
    return order[part[split]]


def read_png(path: pathlib.Path) -> UInt8[np.ndarray, "H W"]:
    """A gray image; of a colored one, the first channel."""
    from PIL import Image  # a dependency of matplotlib

    image = np.asarray(Image.open(path))
    return image if image.ndim == 2 else image[..., 0]


def _to_sequences(pixels: Float32[np.ndarray, "B T C"]) -> Sequences:
    return pixels / np.float32(127.5) - 1, np.ones(pixels.shape[:2], np.int32)


def _read_metadata(folder: pathlib.Path) -> tuple[list[pathlib.Path], Int64[np.ndarray, "N"]]:
    paths, labels = [], []
    # By number, as numbers are not padded with zeros: 2.npy comes before 10.npy.
    files = sorted((folder / "metadata").glob("*.npy"), key=lambda p: (len(p.stem), p.stem))
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise ConfigError(
                    f"{quote_path(file)}, line {number}: expected a folder, a file, a number and "
                    f"the label 0 or 1, got {quote(line)}; the expected layout is "
                    f"{_PATHFINDER_LAYOUT}."
                )
            paths.append(folder / fields[0] / fields[1])
            labels.append(int(fields[3]))
    return paths, np.array(labels, np.int64)


class _Unpickler(pickle.Unpickler):
    """Loads arrays, and nothing that could run code of the file."""

    _ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_batch(
    path: pathlib.Path,
) -> tuple[UInt8[np.ndarray, "N 3072"], Int64[np.ndarray, "N"]]:
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        data, labels = content[b"data"], np.array(content[b"labels"], np.int64)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{quote_path(path)} is no Python batch of CIFAR-10 ({quote(str(error))}); the "
            f"expected layout is {_CIFAR_LAYOUT}."
        ) from error
    if data.shape != (len(labels), 3072) or data.dtype != np.uint8:
        raise ConfigError(
            f"{quote_path(path)} must have the bytes of N images of 3 x 32 x 32, got "
            f"{data.dtype} of shape {data.shape}; the expected layout is {_CIFAR_LAYOUT}."
        )
    return data, labels
