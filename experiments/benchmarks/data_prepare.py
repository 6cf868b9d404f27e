"""Compares `xlstm-jax data prepare` with its tokenizer library alone, and measures its peak memory.

Targets: at least 80 % of the library's MB/s, and below 1 GiB for 2 GiB of text, on two cores.

    python experiments/benchmarks/data_prepare.py --mib 256 --out RESULT.json

The text is made of lines of the running Python's standard library, in an order that does not
repeat. The library, `encode_batch_fast` of `tokenizers` with a thread for each core, gets batches
of documents that are already in memory; `data prepare` reads, tokenizes, hashes and writes them.
They alternate, in separate processes. Memory is the sum over all processes of the command:
resident (shared pages count several times) and proportional.
"""

import dataclasses
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time

from experiments.benchmarks import measure

TARGET_SHARE, TARGET_BYTES = 0.8, 2**30

LIBRARY = """
import json, pathlib, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
seconds = cpu = tokens = size = 0
for path in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    size += sum(len(text.encode()) for text in texts)
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        before = time.perf_counter(), time.process_time()
        tokens += sum(map(len, tokenizer.encode_batch_fast(batch, add_special_tokens=False)))
        seconds += time.perf_counter() - before[0]
        cpu += time.process_time() - before[1]
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens, "bytes": size}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """Options of the benchmark of `data prepare`."""

    mib: int = 256  # MiB of text
    files: int = 8  # input files
    tokenizer: pathlib.Path | None = None  # a tokenizer.json; None: trained on the text
    vocab_size: int = 8192  # of the trained tokenizer
    repeats: int = 3  # of each
    with_library: bool = True  # measure the library too


def main(args: Arguments) -> int:
    """Alternates both and writes one result."""
    with tempfile.TemporaryDirectory() as parent:
        source, out = pathlib.Path(parent, "in"), pathlib.Path(parent, "out")
        write_text(source, args.mib * 2**20, args.files)
        tokenizer = args.tokenizer or train(source, pathlib.Path(parent), args.vocab_size)
        library, prepared = [], []
        for _ in range(args.repeats):
            if args.with_library:
                library.append(run_library(tokenizer, source))
            prepared.append(run_prepare(tokenizer, source, out))
    result = {
        **measure.run_info("data_prepare", (*measure.PACKAGES, "tokenizers")),
        "options": dataclasses.asdict(args),
        "library": library,
        "prepare": prepared,
        "target_share": TARGET_SHARE,
        "target_peak_bytes": TARGET_BYTES,
    }
    measure.write(args.out, result)
    for name, runs in (("library", library), ("data prepare", prepared)):
        rates = [f"{run['bytes'] / 1e6 / run['seconds']:.2f}" for run in runs]
        print(f"{name}: {', '.join(rates)} MB/s")
    if library:
        # Processor time matters where other processes use the cores too.
        for key in ("seconds", "cpu_seconds"):
            share = min(run[key] for run in library) / min(run[key] for run in prepared)
            print(f"share of the library's rate, by {key}: {share:.0%}, target {TARGET_SHARE:.0%}")
    peaks = {key: max(run[key] for run in prepared) / 2**20 for key in ("rss", "pss")}
    print(f"peak memory: {peaks['rss']:,.0f} MiB resident, {peaks['pss']:,.0f} MiB proportional")
    return 0


def write_text(folder: pathlib.Path, size: int, num_files: int) -> None:
    """Writes JSON lines: documents of passages of the standard library, in a seeded order."""
    folder.mkdir()
    paths = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    lines = "".join(texts).splitlines(keepends=True)
    rng = random.Random(0)
    for number in range(num_files):
        left = size // num_files
        with (folder / f"{number:03}.jsonl").open("w", encoding="utf-8") as file:
            while left > 0:
                starts = [rng.randrange(len(lines)) for _ in range(rng.randint(1, 12))]
                text = "".join(
                    "".join(lines[start : start + rng.randint(1, 15)]) for start in starts
                )
                file.write(json.dumps({"text": text}) + "\n")
                left -= len(text.encode())


def train(source: pathlib.Path, folder: pathlib.Path, vocab_size: int) -> pathlib.Path:
    """A byte-level BPE of the text, trained by the command on 16 MiB of it."""
    options = ["--vocab-size", str(vocab_size), "--max-bytes", str(2**24)]
    command = ["data", "train-tokenizer", str(source), str(folder / "tokenizer"), *options]
    subprocess.run([sys.executable, "-m", "xlstm_jax", *command], check=True, capture_output=True)
    return folder / "tokenizer" / "tokenizer.json"


def run_library(tokenizer: pathlib.Path, source: pathlib.Path) -> dict[str, float]:
    """Seconds, tokens and bytes of the library alone."""
    command = [sys.executable, "-c", LIBRARY, str(tokenizer), str(source)]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, env=env).stdout)


def run_prepare(
    tokenizer: pathlib.Path, source: pathlib.Path, out: pathlib.Path
) -> dict[str, float]:
    """Seconds, start and end of the command included, tokens, bytes and peaks of memory."""
    command = ["data", "prepare", str(source), str(out), "--tokenizer", str(tokenizer), "--fresh"]
    start, cpu = time.perf_counter(), cpu_of_children()
    process = subprocess.Popen(
        [sys.executable, "-m", "xlstm_jax", *command], stdout=subprocess.DEVNULL
    )
    peaks = {"rss": 0, "pss": 0}
    while process.poll() is None:
        for key, size in memory_of_tree(process.pid).items():
            peaks[key] = max(peaks[key], size)
        time.sleep(0.2)
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_of_children() - cpu}
    assert process.returncode == 0, "the command failed"
    splits = json.loads((out / "manifest.json").read_text())["splits"].values()
    shards = [shard for split in splits for shard in split]
    counts = {
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": sum(shard["num_bytes"] for shard in shards),
    }
    return {**times, **counts, **peaks}


def cpu_of_children() -> float:
    """Processor seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory_of_tree(root: int) -> dict[str, int]:
    """Bytes of memory of a process and its descendants, from /proc."""
    total, pending = {"rss": 0, "pss": 0}, [root]
    while pending:
        pid = pending.pop()
        try:
            for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
            for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                key = line.partition(":")[0].lower()
                if key in total:
                    total[key] += int(line.split()[1]) * 1024
        except OSError:  # it has ended
            continue
    return total


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
