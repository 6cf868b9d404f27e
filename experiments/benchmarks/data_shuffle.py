"""Compares the two-level shuffle with a full one: requests to a remote file system, and losses.

    python experiments/python_sources.py --out sources --max-bytes 320000000
    xlstm-jax data prepare sources prepared/byte
    python experiments/benchmarks/data_shuffle.py --data prepared/byte --out RESULT.json

Requests: one epoch of windows of 2,048 tokens in blocks of 256, from a file system that counts
reads of ranges; a full shuffle reads every window on its own. Loss: a small model on windows and
blocks of the same sizes, in sets of 512 blocks, several seeds of each order.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from experiments.benchmarks import data_loader, measure
from xlstm_jax.data import DataConfig
from xlstm_jax.data.order import Order
from xlstm_jax.data.shards.open import open_tokens
from xlstm_jax.data.shards.store import TokenStore
from xlstm_jax.modules import LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig, fit

SEQ_LEN, BLOCK, SET = 2048, 256, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """What to measure."""

    tokens: int = 100_000_000  # of the counted epoch
    data: Path  # prepared tokens, of bytes, for the losses
    steps: int = 400  # of each run
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)


class Counting(fsspec.AbstractFileSystem):
    """Local files as counting://PATH, with the number and the bytes of reads of ranges."""

    protocol = "counting"
    requests = num_bytes = 0

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size and type of a file or folder."""
        local = Path("/", str(self._strip_protocol(path)))
        kind = "directory" if local.is_dir() else "file"
        return {"name": path, "size": local.stat().st_size, "type": kind}

    def ls(self, path: str, detail: Any = True, **kwargs: Any) -> list[Any]:
        """The files of a folder."""
        return [
            self.info(str(file)) for file in Path("/", str(self._strip_protocol(path))).iterdir()
        ]

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        """The bytes of a range."""
        with open(Path("/", str(self._strip_protocol(path))), "rb") as file:
            file.seek(start or 0)
            data = file.read() if end is None else file.read(end - (start or 0))
        Counting.requests += 1
        Counting.num_bytes += len(data)
        return data


def main(args: Arguments) -> int:
    """Counts requests, trains, and writes one result."""
    result: dict[str, Any] = measure.run_info("data_shuffle") | {"seeds": args.seeds}
    result["requests"] = {name: count(name, args.tokens) for name in ("blocks", "full")}
    for name, counted in result["requests"].items():
        print(f"{name}: {counted['requests']:,} requests, {counted['bytes_over_corpus']:.4f} x")
    result["losses"] = {
        shuffle: [loss(shuffle, seed, args) for seed in args.seeds]
        for shuffle in ("blocks", "full")
    }
    for shuffle, losses in result["losses"].items():
        print(f"{shuffle}: {np.mean(losses):.4f} nats, standard deviation {np.std(losses):.4f}")
    measure.write(args.out, result)
    return 0


def count(shuffle: str, tokens: int) -> dict[str, float]:
    """Requests and bytes of one epoch."""
    fsspec.register_implementation("counting", Counting, clobber=True)
    block = BLOCK if shuffle == "blocks" else 1
    with tempfile.TemporaryDirectory() as folder:
        data_loader.write(Path(folder), tokens, seed=0)
        url, length = f"counting:/{folder}", block * SEQ_LEN
        opened = open_tokens(url, "train", verify="size", block_len=length, max_blocks=SET)
        return read_epoch(opened.store, shuffle)


def read_epoch(store: TokenStore, shuffle: str) -> dict[str, float]:
    """Reads every window of an epoch once."""
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


def loss(shuffle: str, seed: int, args: Arguments) -> float:
    """The validation loss of a small model after training in an order."""
    model = LMConfig(
        vocab_size=257,
        dim=64,
        pattern="ms",
        mlstm=MLSTMConfig(num_heads=4),
        slstm=SLSTMConfig(num_heads=4),
    )
    data = DataConfig(
        source=str(args.data),
        seq_len=SEQ_LEN,
        batch_size=4,
        seed=seed,
        shuffle=shuffle,  # pyright: ignore[reportArgumentType]
        shuffle_block=BLOCK,
        shuffle_set=512,
    )
    train = TrainConfig(
        steps=args.steps,
        lr=3e-3,
        seed=seed,
        eval_every=args.steps,
        eval_batches=None,
        checkpoint_every=0,
    )
    cfg = ExperimentConfig(name=shuffle, model=model, data=data, train=train)
    with tempfile.TemporaryDirectory() as folder:
        evaluation = fit(cfg, folder).evaluation
    assert evaluation is not None
    return evaluation["valid_loss"]


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
