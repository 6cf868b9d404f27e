"""Measures the loading of prepared data: tokens per second of one process, by packing.

    python experiments/benchmarks/data_loader.py --out RESULT.json

Two prepared folders of random documents, of 32 to 4,096 tokens, form a mixture; batches have
segment ids. The peer is `grain` alone, reading the same files in equal windows without documents:
`MapDataset` with its own shuffle, batch and prefetching thread. Files are in the page cache.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from experiments.benchmarks import measure
from xlstm_jax.data import DataConfig, batches, load
from xlstm_jax.data.shards.manifest import Manifest, TokenizerInfo, to_json
from xlstm_jax.data.shards.writer import ShardWriter
from xlstm_jax.data.tokenizers import get

PACKINGS = ("windows", "first_fit", "best_fit", "pad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments):
    """`repeats`: batches of each kind."""

    tokens: int = 100_000_000  # of each of the two sources
    seq_len: int = 2048
    batch_size: int = 16
    workers: tuple[int, ...] = (0, 1)


def main(args: Arguments) -> int:
    """Measures every packing and the peer, and writes one result."""
    result: dict[str, Any] = measure.run_info("data_loader") | {"records": []}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("a", "b")}
        for seed, path in enumerate(paths.values()):
            write(path, args.tokens, seed)
        cfg = DataConfig(
            sources={name: str(path) for name, path in paths.items()},
            weights={"a": 0.7, "b": 0.3},
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            cache_dir=folder,
        )
        for packing in PACKINGS:
            for workers in args.workers:
                one = dataclasses.replace(cfg, packing=packing, workers=workers)
                start = time.perf_counter()
                examples = load(one, "train")
                seconds = time.perf_counter() - start
                with batches(examples, one) as iterator:
                    rate = tokens_per_second(iterator, args)
                record = {"packing": packing, "workers": workers, "load_seconds": seconds}
                result["records"].append(record | {"tokens_per_second": rate})
                print(f"{packing}, {workers} workers: {rate:,.0f} tokens/s")
        rate = tokens_per_second(peer(paths["a"] / "train" / "00000.bin", args), args)
        result["peer"] = {"name": f"grain {grain.__version__}", "tokens_per_second": rate}
        print(f"grain alone: {rate:,.0f} tokens/s")
    measure.write(args.out, result)
    return 0


def write(path: Path, tokens: int, seed: int) -> None:
    """Prepared data of random bytes in one shard of the split train."""
    rng, tokenizer = np.random.default_rng(seed), get("byte")
    with ShardWriter(path, "train", "00000", "uint16") as writer:
        written = 0
        while written < tokens:
            ids = rng.integers(0, 256, int(2 ** rng.uniform(5, 12)), np.uint16)
            ids[-1] = tokenizer.eos_id
            writer.write(ids, len(ids) - 1, ends_document=True)
            written += len(ids)
        info = writer.close()
    assert info is not None
    about = TokenizerInfo(
        name="byte",
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )
    manifest = Manifest(tokenizer=about, dtype="uint16", sources={}, splits={"train": (info,)})
    (path / "manifest.json").write_text(to_json(manifest))


def peer(path: Path, args: Arguments) -> Iterator[Any]:
    """Batches of grain: windows of a mapped file, shuffled and batched."""
    tokens, length = np.memmap(path, np.uint16, "r"), args.seq_len

    def window(i: int) -> Any:
        return tokens[i * length : (i + 1) * length + 1].astype(np.int32)

    windows = grain.MapDataset.range((len(tokens) - 1) // length).map(window)
    shuffled = windows.seed(0).shuffle().repeat().batch(args.batch_size)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(shuffled.to_iter_dataset(options))


def tokens_per_second(iterator: Iterator[Any], args: Arguments) -> float:
    """Input tokens of a batch over the median time of a batch."""
    for _ in range(20):  # the prefetched ones, and the page cache
        next(iterator)
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        for _ in range(10):  # a round: a prefetching thread delivers unevenly
            next(iterator)
        times.append((time.perf_counter() - start) / 10)
    return args.batch_size * args.seq_len / float(np.median(times))


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
