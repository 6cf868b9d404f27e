"""Classifies images as sequences of patches that successive blocks read in alternating directions.

An image has a bright and a dark square; its class is where the dark one is: left, right, above or
below. Patches are read in raster order, by every second block from the last one backward, as in
Vision-LSTM (Alkin et al. 2024, arXiv:2406.04303). Expected: more than 0.9 of test images with
alternating directions. The accuracy with one direction is measured for comparison.

    python experiments/applications/image_scans.py                # a minute on two idle cores
"""

import dataclasses
import pathlib
from typing import Literal

import numpy as np

from experiments import record
from experiments.applications import training
from xlstm_jax import cpu
from xlstm_jax.data import Batch
from xlstm_jax.data.lra.labeled import labeled_batch
from xlstm_jax.modules import LMConfig, MLSTMConfig

WIDTH, PATCH, SQUARE, NOISE = 16, 4, 3, 0.1  # pixels of an image, a patch, a square; noise
NUM_PATCHES = (WIDTH // PATCH) ** 2
NUM_CLASSES = 4
PATCH_DIM = PATCH**2 + 2  # pixels and the position of the patch
NUM_TEST = 1024
BLOCKS = LMConfig(vocab_size=1, dim=32, pattern="mm", mlstm=MLSTMConfig(num_heads=2))
STEPS = {"smoke": 10, "cpu": 400}
FORWARD = tuple(range(NUM_PATCHES))
ORDERS = {"alternating": (FORWARD, FORWARD[::-1]), "forward": (FORWARD,)}


def images(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `N H W` and their classes: left, right, above, below."""
    rng = np.random.default_rng(seed)
    pixels = NOISE * rng.standard_normal((count, WIDTH, WIDTH))
    # Corners of both squares, drawn again until they are clearly apart along one axis only.
    corners = rng.integers(0, WIDTH - SQUARE + 1, (count, 2, 2))
    while True:
        offset = corners[:, 1] - corners[:, 0]  # (down, right) from the bright to the dark one
        larger, smaller = np.abs(offset).max(axis=1), np.abs(offset).min(axis=1)
        (unclear,) = np.nonzero((larger <= SQUARE) | (larger - smaller < 2))
        if not unclear.size:
            break
        corners[unclear] = rng.integers(0, WIDTH - SQUARE + 1, (len(unclear), 2, 2))
    for image, (bright, dark) in zip(pixels, corners, strict=True):
        for (y, x), value in ((bright, 1), (dark, -1)):
            image[y : y + SQUARE, x : x + SQUARE] += value
    vertical = np.abs(offset[:, 0]) > np.abs(offset[:, 1])
    along = np.where(vertical, offset[:, 0], offset[:, 1])
    return pixels.astype(np.float32), 2 * vertical + (along > 0)


def patches(pixels: np.ndarray) -> np.ndarray:
    """Patches `N T C` in raster order, each with its position (y, x) in [-1, 1]."""
    n, count = WIDTH // PATCH, len(pixels)
    parts = pixels.reshape(count, n, PATCH, n, PATCH).swapaxes(2, 3).reshape(count, n * n, -1)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n)] * 2, indexing="ij"), axis=-1)
    position = np.broadcast_to(grid.reshape(1, n * n, 2), (count, n * n, 2))
    return np.concatenate([parts, position], axis=-1).astype(np.float32)


def make_batch(seed: int, count: int) -> Batch:
    """Random images as a batch."""
    pixels, classes = images(seed, count)
    segment_ids = np.ones((count, NUM_PATCHES), np.int32)
    return labeled_batch(patches(pixels), segment_ids, classes, np.arange(count))


def accuracy(size: str, orders: tuple[tuple[int, ...], ...]) -> float:
    """Trains one model; returns the share of test images that it classifies correctly."""
    from xlstm_jax.modules.heads import Classifier
    from xlstm_jax.train.head_losses import classification_loss

    model = Classifier(BLOCKS, NUM_CLASSES, in_dim=PATCH_DIM, orders=orders)
    return training.accuracy(model, classification_loss, make_batch, STEPS[size], NUM_TEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains both models and writes one JSON file."""

    size: Literal["smoke", "cpu"] = "cpu"
    out: pathlib.Path = record.RESULTS / "applications" / "image_scans.json"


def main(options: Options) -> int:
    """Runs the application; returns 0 if the expectation holds (smoke: always), else 1."""
    cpu.prepare()
    result = record.start("applications/image_scans", options.size)
    scores = {name: accuracy(options.size, orders) for name, orders in ORDERS.items()}
    print(f"accuracy: {scores}")
    result |= {"steps": STEPS[options.size], "accuracy": scores}
    result["outcome"] = {"alternating directions above 0.9": scores["alternating"] > 0.9}
    return record.save(result, options.out)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
