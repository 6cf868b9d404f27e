"""Compares the two-level shuffle with a full one: requests to a remote file system, and losses.

    python experiments/benchmarks/data_shuffle.py --out RESULT.json

Requests: one epoch of windows of 2,048 tokens in blocks of 256, from a file system in memory that
counts range reads; a full shuffle reads every window on its own. Loss: a small model after one
epoch of the standard library, about 170,000 windows of 64 tokens, in 22 sets of 128 blocks of 64;
three seeds of each order.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem

from experiments.benchmarks import data_loader, measure
from xlstm_jax.data import DataConfig, load
from xlstm_jax.data.order import Order
from xlstm_jax.data.shards.open import open_tokens
from xlstm_jax.modules import LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig, fit

SEQ_LEN, BLOCK, SET = 2048, 256, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """What to measure."""

    tokens: int = 100_000_000  # of the counted epoch
    steps: int | None = None  # of each run; None: one epoch
    seeds: tuple[int, ...] = (0, 1, 2)


class Counting(MemoryFileSystem):
    """A file system in memory that counts reads of ranges."""

    protocol = "counting"
    requests = num_bytes = 0

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        """The bytes of a range."""
        data = super().cat_file(path, start=start, end=end, **kwargs)
        Counting.requests += 1
        Counting.num_bytes += len(data)
        return data


def main(args: Arguments) -> int:
    """Counts requests, trains, and writes one result."""
    result: dict[str, Any] = measure.run_info("data_shuffle")
    result["requests"] = {name: count(name, args.tokens) for name in ("blocks", "full")}
    for name, counted in result["requests"].items():
        print(f"{name}: {counted['requests']:,} requests, {counted['bytes_over_corpus']:.4f} x")
    result["losses"] = {
        shuffle: [loss(shuffle, seed, args.steps) for seed in args.seeds]
        for shuffle in ("blocks", "full")
    }
    for shuffle, losses in result["losses"].items():
        print(f"{shuffle}: {np.mean(losses):.4f} nats, standard deviation {np.std(losses):.4f}")
    measure.write(args.out, result)
    return 0


def count(shuffle: str, tokens: int) -> dict[str, float]:
    """Requests and bytes of one epoch."""
    fsspec.register_implementation("counting", Counting, clobber=True)
    with tempfile.TemporaryDirectory() as folder:
        data_loader.write(Path(folder), tokens, seed=0)
        fsspec.filesystem("counting").put(folder, f"/{shuffle}", recursive=True)
    block = BLOCK if shuffle == "blocks" else 1
    url = f"counting://{shuffle}"
    store = open_tokens(
        url, "train", verify="size", block_len=block * SEQ_LEN, max_blocks=SET
    ).store
    size = -(-(store.num_tokens - 1) // SEQ_LEN)
    order = Order(size, (0,), shuffle, BLOCK, SET)  # pyright: ignore[reportArgumentType]
    Counting.requests = Counting.num_bytes = 0
    for window in order.window(np.arange(size)).tolist():
        start = window * SEQ_LEN
        store.read(start, min(start + SEQ_LEN + 1, store.num_tokens))
    return {
        "windows": size,
        "requests": Counting.requests,
        "bytes_over_corpus": Counting.num_bytes / (2 * store.num_tokens),
    }


def loss(shuffle: str, seed: int, steps: int | None) -> float:
    """The held-out loss of a small model after training in an order."""
    model = LMConfig(
        vocab_size=257,
        dim=64,
        pattern="ms",
        mlstm=MLSTMConfig(num_heads=4),
        slstm=SLSTMConfig(num_heads=4),
    )
    data = DataConfig(
        source="stdlib",
        seq_len=64,
        batch_size=32,
        seed=seed,
        shuffle=shuffle,  # pyright: ignore[reportArgumentType]
        shuffle_block=64,
        shuffle_set=128,
    )
    steps = steps or len(load(data, "train")) // data.batch_size
    train = TrainConfig(
        steps=steps, lr=3e-3, seed=seed, eval_every=steps, eval_batches=400, checkpoint_every=0
    )
    cfg = ExperimentConfig(name=shuffle, model=model, data=data, train=train)
    with tempfile.TemporaryDirectory() as folder:
        evaluation = fit(cfg, folder).evaluation
    assert evaluation is not None
    return evaluation["valid_loss"]


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
