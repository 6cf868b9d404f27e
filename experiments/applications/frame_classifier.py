"""Classifies every frame of a signal, with a stack that reads it in both directions.

A signal consists of segments, each of one class. Its frames are noisy vectors: the first frame of a
segment is marked, and one frame at a random position tells the class. A causal model cannot
classify the frames before that one. Expected: the bidirectional stack classifies more than 0.95 of
the test frames, at least 0.15 more than the forward stack of the same blocks.

    python experiments/applications/frame_classifier.py           # a minute on two idle cores
"""

import dataclasses
import pathlib
from typing import Literal

import numpy as np

from experiments import record
from experiments.applications import training
from xlstm_jax import cpu
from xlstm_jax.data import Batch
from xlstm_jax.modules import LMConfig, MLSTMConfig

NUM_CLASSES, SEGMENT = 4, (3, 8)  # classes, and the shortest and longest segment
FRAME_DIM = NUM_CLASSES + 1  # one number per class, and the mark
MIN_LEN, MAX_LEN, NOISE = 16, 32, 0.1
NUM_TEST = 512
BLOCKS = LMConfig(vocab_size=1, dim=32, pattern="m", mlstm=MLSTMConfig(num_heads=2))
STEPS = {"smoke": 10, "cpu": 250}


def signals(seed: int, count: int) -> Batch:
    """Random signals of different lengths, padded with zeros, and the class of every frame."""
    rng = np.random.default_rng(seed)
    frames = NOISE * rng.standard_normal((count, MAX_LEN, FRAME_DIM)).astype(np.float32)
    classes = np.zeros((count, MAX_LEN), np.int32)
    inside = np.arange(MAX_LEN) < rng.integers(MIN_LEN, MAX_LEN + 1, (count, 1))
    for signal, labels, valid in zip(frames, classes, inside.sum(axis=1), strict=True):
        start = 0
        while start < valid:
            stop = min(start + rng.integers(SEGMENT[0], SEGMENT[1] + 1), valid)
            label = rng.integers(NUM_CLASSES)
            signal[start, -1] += 1
            signal[rng.integers(start, stop), label] += 1
            labels[start:stop] = label
            start = stop
    return Batch(
        inputs=np.where(inside[..., None], frames, np.float32(0)),
        targets=classes,
        segment_ids=inside.astype(np.int32),
        weights=inside.astype(np.float32),
        index=np.arange(count),
    )


def accuracy(size: str, *, bidirectional: bool) -> float:
    """Trains one model; returns the share of test frames that it classifies correctly."""
    from xlstm_jax.modules.heads import PositionHead
    from xlstm_jax.train.head_losses import position_classification_loss

    model = PositionHead(BLOCKS, NUM_CLASSES, in_dim=FRAME_DIM, bidirectional=bidirectional)
    loss = position_classification_loss
    return training.accuracy(model, loss, signals, STEPS[size], NUM_TEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains both models and writes one JSON file."""

    size: Literal["smoke", "cpu"] = "cpu"
    out: pathlib.Path = record.RESULTS / "applications" / "frame_classifier.json"


def main(options: Options) -> int:
    """Runs the application; returns 0 if both expectations hold (smoke: always), else 1."""
    cpu.prepare()
    result = record.start("applications/frame_classifier", options.size)
    both = accuracy(options.size, bidirectional=True)
    forward = accuracy(options.size, bidirectional=False)
    print(f"accuracy of frames: {both:.3f} in both directions, {forward:.3f} forward")
    result |= {"steps": STEPS[options.size], "bidirectional": both, "forward": forward}
    result["outcome"] = {
        "bidirectional above 0.95": both > 0.95,
        "bidirectional at least 0.15 above forward": both >= forward + 0.15,
    }
    return record.save(result, options.out)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
